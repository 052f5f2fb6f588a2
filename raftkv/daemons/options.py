"""What a daemon is told at its start; checked here, so that the rest can rely on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raftkv.machines.slots import SLOTS
from raftkv.protocol.addresses import format_address, parse_address
from raftkv.protocol.errors import BadRequest
from raftkv.storage.wal import SEGMENT_BYTES

if TYPE_CHECKING:
    import ssl

    from raftkv.protocol.tls import Tls

SNAPSHOT_BYTES_DEFAULT = 16 * 1024 * 1024
SNAPSHOT_ENTRIES_DEFAULT = 10_000
CACHE_BYTES_DEFAULT = 128 * 1024 * 1024
MOVE_BYTES_PER_S_DEFAULT = 64 * 1024 * 1024


class BadOptions(ValueError):
    """The options can't be right together; the text is one line for a person."""


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """Options of one replica.

    `peers` maps every replica id of the group, this one's included, to its HOST:PORT. `snapshot_bytes`
    and `snapshot_entries` bound the log kept since the last flush of the engine, so also what a
    restart replays. `cache_bytes` is the engine's block cache, `wal_segment_bytes` the size of one file of the log.
    With `redis_listen` it talks to Redis clients too; `redis_mode` 'cluster' sends them to the leaders of their keys.
    `move_bytes_per_s` bounds what a group takes in of the shards that move to it. With `tls` every connection is TLS.
    """

    role: str
    replica: int
    listen: str
    peers: dict[int, str]
    data_dir: str
    gid: int = 0
    advertise: str | None = None
    metrics_listen: str | None = None
    redis_listen: str | None = None
    redis_mode: str = "plain"
    controllers: tuple[str, ...] = ()
    shards: int = 10
    snapshot_entries: int = SNAPSHOT_ENTRIES_DEFAULT
    snapshot_bytes: int = SNAPSHOT_BYTES_DEFAULT
    reads: str = "readindex"
    cache_bytes: int = CACHE_BYTES_DEFAULT
    wal_segment_bytes: int = SEGMENT_BYTES
    move_bytes_per_s: int = MOVE_BYTES_PER_S_DEFAULT
    log_level: str = "info"
    log_format: str = "text"
    tls: Tls | None = None

    def __post_init__(self) -> None:
        if self.role not in ("controller", "shardkv", "coordinator"):
            raise BadOptions(f"unknown role {self.role!r}")
        if not self.data_dir:
            raise BadOptions("--data-dir is empty; name a directory for this replica alone")
        if self.replica < 0:
            raise BadOptions(f"--id must not be negative, not {self.replica}")
        if self.replica not in self.peers:
            ids = ", ".join(str(peer) for peer in sorted(self.peers)) or "none"
            raise BadOptions(f"--id {self.replica} is not among the --peers (they name {ids})")
        if len(set(self.peers.values())) != len(self.peers):
            raise BadOptions("two of the --peers have the same address")
        for name, address in [("--listen", self.listen), *[("--peers", a) for a in self.peers.values()]]:
            _check_address(address, name)
        for address in self.controllers:
            _check_address(address, "--controllers")
        if self.advertise is not None:
            _check_address(self.advertise, "--advertise")
        if self.metrics_listen is not None:
            _check_address(self.metrics_listen, "--metrics-listen")
            if self.metrics_listen == self.listen:
                raise BadOptions("--metrics-listen is the same address as --listen; choose another port")
        if self.redis_listen is not None:
            _check_address(self.redis_listen, "--redis-listen")
            if self.redis_listen in (self.listen, self.metrics_listen):
                raise BadOptions("--redis-listen is the same address as another listener's; choose another port")
        if self.redis_mode not in ("plain", "cluster"):
            raise BadOptions(f"--redis-mode must be plain or cluster, not {self.redis_mode!r}")
        if self.role != "controller":
            if self.gid <= 0:
                raise BadOptions(f"--gid must be at least 1, not {self.gid}")
            if not self.controllers:
                raise BadOptions(f"a {self.role} needs --controllers HOST:PORT,…")
        if not 1 <= self.shards <= SLOTS:
            raise BadOptions(f"--shards must be from 1 to {SLOTS}, not {self.shards}")
        if self.snapshot_entries < 1 or self.snapshot_bytes < 1:
            raise BadOptions("--snapshot-entries and --snapshot-bytes must be at least 1")
        if self.move_bytes_per_s < 1:
            raise BadOptions("--move-bytes-per-s must be at least 1")
        if self.reads not in ("readindex", "lease"):
            raise BadOptions(f"--reads must be readindex or lease, not {self.reads!r}")

    @property
    def address(self) -> str:
        """Where clients are sent to reach this replica."""
        return self.advertise or self.peers[self.replica]

    @property
    def redis_address(self) -> str | None:
        """Where Redis clients are sent to reach this replica: as it listens, or at the host that others know it by."""
        if self.redis_listen is None:
            return None
        host, port = parse_address(self.redis_listen)
        return format_address(parse_address(self.address)[0] if host in ("0.0.0.0", "::") else host, port)

    @property
    def client_ssl(self) -> ssl.SSLContext | None:
        """For the connections that this replica dials."""
        return self.tls.client if self.tls is not None else None

    @property
    def name(self) -> str:
        """How messages for people call this replica."""
        if self.role == "shardkv":
            return f"replica {self.replica} of group {self.gid}"
        return f"{self.role} {self.replica}"


def _check_address(address: str, option: str) -> None:
    try:
        parse_address(address)
    except BadRequest as error:
        raise BadOptions(f"{option}: {error}") from None
