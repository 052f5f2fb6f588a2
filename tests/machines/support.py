"""What the tests of the machines share: a replica made of a machine and a dict for an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgpack

from raftkv.machines.controller import DRAIN, GIVE_UP, INIT, JOIN, LEAVE, LEAVE_DRAINED, LIFT, MOVE, ShardMapMachine
from raftkv.machines.coordinator import CoordinatorMachine
from raftkv.machines.kv import CONFIG, MAP_TIME, KvMachine
from raftkv.machines.machine import SessionedMachine
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.slots import shard_of
from raftkv.raft.entry import Entry, EntryKind
from raftkv.storage.engine import Overlay, Range

CLUSTER_ID = b"cluster-id-16-by"
ADDRESSES = ["h:1", "h:2", "h:3"]


class DictEngine:
    """The contract of a storage engine, as far as a machine needs it; it never touches a disk."""

    def __init__(self, rows: Mapping[bytes, bytes] | None = None) -> None:
        self.rows: dict[bytes, bytes] = dict(rows or {})

    def get(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted((key, row) for key, row in self.rows.items() if start <= key < end))

    def write(self, changes: Mapping[bytes, bytes | None], range_deletes: Sequence[tuple[bytes, bytes]] = ()) -> None:
        for start, end in range_deletes:
            for key in [key for key in self.rows if start <= key < end]:
                del self.rows[key]
        for key, row in changes.items():
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = row

    async def flush(self) -> None:
        return None

    async def checkpoint(self, directory: str, keys: Sequence[bytes] = ()) -> list[bytes | None]:
        raise NotImplementedError("a machine makes no checkpoints")

    async def reclaim(self, ranges: Sequence[Range]) -> None:
        return None

    def close(self) -> None:
        self.rows = {}

    async def abandon(self) -> None:
        self.close()

    def approximate_bytes(self, start: bytes, end: bytes) -> int:
        return sum(len(key) + len(row) for key, row in self.scan(start, end))


M = TypeVar("M", bound=SessionedMachine | CoordinatorMachine)


class Replica(Generic[M]):
    """A machine over its engine; feeds entries to it and writes their effects."""

    def __init__(self, machine: M) -> None:
        self.machine = machine
        self.engine = DictEngine()
        self.index = 0
        self.stamp_ms = 0
        machine.load(self.engine)

    def apply(self, entry: Entry, commands: Sequence[list[Any]] | None = None) -> list[list[Any]]:
        view = Overlay(self.engine)
        results = self.machine.apply(view, entry, commands)
        self.engine.write(view.changes, view.range_deletes)
        return results

    def entry(self, commands: Sequence[Any], kind: int = EntryKind.COMMANDS) -> Entry:
        self.index += 1
        return Entry.make(1, self.index, kind, self.stamp_ms, msgpack.packb(commands))

    def run(self, *commands: Any) -> list[list[Any]]:
        """Apply the commands as one entry, from their encoded form."""
        return self.apply(self.entry(commands))

    def run_one(self, command: Any) -> list[Any]:
        (result,) = self.run(command)
        return result

    def tick(self, advance_ms: int) -> None:
        self.stamp_ms += advance_ms
        self.apply(self.entry([], EntryKind.TICK))


class Client:
    """Numbers its commands as the SDK does: per shard, one at a time unless told otherwise."""

    def __init__(self, name: int, *, shards: int = 10, stamp_ms: int = 0) -> None:
        self.client_id = name.to_bytes(16, "big")
        self.shards = shards
        self.stamp_ms = stamp_ms
        self._seqs: dict[int, int] = {}

    def command(
        self,
        op: int,
        *args: Any,
        shard: int | None = None,
        seq: int | None = None,
        first_unacked: int | None = None,
        stamp_ms: int | None = None,
    ) -> list[Any]:
        """The next command of this client; `shard` defaults to that of the key, `args[0]`."""
        if shard is None:
            shard = shard_of(args[0], self.shards)
        if seq is None:
            seq = self._seqs.get(shard, 0) + 1
            self._seqs[shard] = seq
        return [
            op,
            shard,
            self.client_id,
            seq,
            seq if first_unacked is None else first_unacked,
            self.stamp_ms if stamp_ms is None else stamp_ms,
            *args,
        ]


def one_group(gid: int = 1, shards: int = 10, num: int = 1) -> ShardMap:
    return ShardMap(num, (gid,) * shards, {gid: tuple(ADDRESSES)})


def config_command(config: ShardMap) -> list[Any]:
    return [CONFIG, config.encode()]


def map_time_command(map_time_ms: int) -> list[Any]:
    return [MAP_TIME, map_time_ms]


def kv_replica(gid: int = 1, *, config: ShardMap | None = None, **options: Any) -> Replica[KvMachine]:
    """A replica that has taken configuration 1: all ten shards are its group's, unless told otherwise."""
    replica = Replica(KvMachine(gid, **options))
    assert replica.run_one(config_command(config or one_group(gid)))[0] == 0
    return replica


class Controllers(Replica[ShardMapMachine]):
    """A controller replica with one client."""

    def __init__(self, shards: int = 10, *, init: bool = True) -> None:
        super().__init__(ShardMapMachine())
        self.client = Client(1)
        if init:
            assert self.run_one([INIT, CLUSTER_ID, shards]) == [0, 0]

    @property
    def latest(self) -> ShardMap:
        return self.machine.config(-1)

    def join(self, *gids: int) -> list[Any]:
        return self.run_one(self.client.command(JOIN, [[gid, addresses_of(gid)] for gid in gids], shard=-1))

    def leave(self, *gids: int, force: bool = False) -> list[Any]:
        return self.run_one(self.client.command(GIVE_UP if force else LEAVE, list(gids), shard=-1))

    def drain(self, *gids: int, config_num: int | None = None) -> list[Any]:
        num = self.machine.config_num if config_num is None else config_num
        return self.run_one(self.client.command(DRAIN, list(gids), num, shard=-1))

    def lift(self, drain: int) -> list[Any]:
        return self.run_one(self.client.command(LIFT, drain, shard=-1))

    def leave_drained(self, drain: int, *gids: int) -> list[Any]:
        return self.run_one(self.client.command(LEAVE_DRAINED, list(gids), drain, shard=-1))

    def move(self, shard: int, gid: int) -> list[Any]:
        return self.run_one(self.client.command(MOVE, shard, gid, shard=-1))


def addresses_of(gid: int) -> list[str]:
    return [f"host-{gid}:{port}" for port in (3, 1, 2)]


def check_config(config: ShardMap, gids: Iterable[int]) -> None:
    """The configuration check used everywhere: exact groups, addresses in order, owners exist, balance."""
    expected = sorted(gids)
    assert list(config.groups) == expected
    for gid in expected:
        assert list(config.groups[gid]) == addresses_of(gid)
    if not expected:
        assert set(config.owners) == {0}
        return
    counts = [len(config.shards_of(gid)) for gid in expected]
    assert sum(counts) == config.shards, "a shard is on a group that doesn't exist"
    assert max(counts) - min(counts) <= 1, config
