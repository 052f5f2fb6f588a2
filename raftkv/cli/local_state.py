"""What `raftkv local` remembers about its cluster, in the cluster's data directory, and the port layout.

Small and quick to import: `raftkv-kv` without --controllers looks here for the local cluster. Trusts
nothing that the file says about processes: a pid is ours only if its command line says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
STATE_FILE = "cluster.json"
FORMAT = 1
CONTROLLERS = 3
COORDINATORS = 3
PORTS = 200
"""A cluster's ports are base … base+199: controllers from base, coordinators from base+10, groups from base+20,
Redis listeners from base+80, metrics from base+140, one after the other in the order of the processes."""
COORDINATOR_PORTS_FROM = 10
COORDINATORS_MAX = 9
CLAIM_PORT = 19
"""Bound by `up` while it starts processes: two that want the same ports don't both find them free."""
GROUP_PORTS_FROM = 20
GROUP_PORTS = 60
REDIS_PORTS_FROM = 80
METRICS_PORTS_FROM = 140
METRICS_PORTS = 60
BASE_PORT_FIRST = 20_000
BASE_PORT_BLOCKS = 60
"""Blocks of 200 from 20,000: below the range from which Linux gives out ports on its own (32,768)."""


@dataclass(slots=True)
class LocalProcess:
    """One daemon of the cluster. `pid` is the last that was started, dead or alive; None: never started."""

    role: str
    gid: int | None
    id: int
    addr: str
    pid: int | None = None
    metrics: str | None = None  # as in what earlier releases wrote
    redis: str | None = None  # likewise

    @property
    def name(self) -> str:
        """The name of its data directory and log file."""
        return f"{self.role}-{self.id}" if self.gid is None else f"group-{self.gid}-{self.id}"

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.role} {self.id}" if self.gid is None else f"replica {self.id} of group {self.gid}"


@dataclass(slots=True)
class LocalState:
    """A cluster's shape and processes, as in its state file."""

    groups: int
    replicas: int
    shards: int
    base_port: int
    processes: list[LocalProcess] = field(default_factory=list)
    coordinators: int = 0  # as in what earlier releases wrote

    @property
    def controllers(self) -> tuple[str, ...]:
        """Addresses of the controllers."""
        return tuple(process.addr for process in self.processes if process.role == "controller")

    @property
    def has_metrics(self) -> bool:
        """Whether the daemons serve metrics."""
        return any(process.metrics is not None for process in self.processes)

    @property
    def has_redis(self) -> bool:
        """Whether the groups' replicas listen to Redis clients."""
        return any(process.redis is not None for process in self.processes)

    @property
    def coordinator_addresses(self) -> tuple[str, ...]:
        """Addresses of the coordinators."""
        return tuple(process.addr for process in self.processes if process.role == "coordinator")

    def addresses_of(self, gid: int) -> list[str]:
        """Addresses of one group's replicas."""
        return [process.addr for process in self.processes if process.gid == gid]


def new_state(groups: int, replicas: int, shards: int, base_port: int, coordinators: int = COORDINATORS) -> LocalState:
    """The processes and ports of a new cluster."""
    assert groups * replicas <= GROUP_PORTS and coordinators <= COORDINATORS_MAX
    processes = [LocalProcess("controller", None, i, f"{HOST}:{base_port + i}") for i in range(CONTROLLERS)]
    port = base_port + GROUP_PORTS_FROM
    for gid in range(1, groups + 1):
        for replica in range(replicas):
            processes.append(LocalProcess("shardkv", gid, replica, f"{HOST}:{port}"))
            port += 1
    first = base_port + COORDINATOR_PORTS_FROM
    processes += [LocalProcess("coordinator", None, i, f"{HOST}:{first + i}") for i in range(coordinators)]
    return LocalState(groups, replicas, shards, base_port, processes, coordinators)


def add_metrics(state: LocalState) -> None:
    """Give every process a port for metrics."""
    assert len(state.processes) <= METRICS_PORTS
    for number, process in enumerate(state.processes):
        process.metrics = f"{HOST}:{state.base_port + METRICS_PORTS_FROM + number}"


def add_redis(state: LocalState) -> None:
    """Give every replica of a group a port for Redis clients."""
    replicas = [process for process in state.processes if process.role == "shardkv"]
    assert len(replicas) <= GROUP_PORTS
    for number, process in enumerate(replicas):
        process.redis = f"{HOST}:{state.base_port + REDIS_PORTS_FROM + number}"


def base_ports(data_dir: Path) -> Iterator[int]:
    """First ports to try for a cluster in that directory: its own block first, so that two rarely meet."""
    first = zlib.crc32(os.fsencode(data_dir)) % BASE_PORT_BLOCKS
    for step in range(BASE_PORT_BLOCKS):
        yield BASE_PORT_FIRST + (first + step) % BASE_PORT_BLOCKS * PORTS


def default_data_dir() -> Path:
    """Where the cluster is if nobody says: RAFTKV_DATA_DIR, else `$XDG_DATA_HOME/raftkv/local`."""
    given = os.environ.get("RAFTKV_DATA_DIR")
    if given:
        return Path(given)
    data_home = os.environ.get("XDG_DATA_HOME") or ""
    base = Path(data_home) if Path(data_home).is_absolute() else Path.home() / ".local" / "share"
    return base / "raftkv" / "local"


def default_controllers() -> tuple[str, ...]:
    """The controllers of the local cluster in the default place; none if there is no cluster."""
    try:
        state = load(default_data_dir())
    except (OSError, ValueError, RuntimeError):
        return ()
    return state.controllers if state is not None else ()


def load(data_dir: Path) -> LocalState | None:
    """The state in that directory, None if there is none. Raises OSError, ValueError if it isn't readable."""
    try:
        text = (data_dir / STATE_FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        raw: dict[str, Any] = json.loads(text)
        if raw.pop("format") != FORMAT:
            raise ValueError("it was written by another release")
        processes = [LocalProcess(**process) for process in raw.pop("processes")]
        return LocalState(**raw, processes=processes)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{data_dir / STATE_FILE} is not a state file of `raftkv local`: {error}") from None


def save(data_dir: Path, state: LocalState) -> None:
    """Write the state file, whole or not at all."""
    temporary = data_dir / f"{STATE_FILE}.new"
    temporary.write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(data_dir / STATE_FILE)


def is_running(data_dir: Path, process: LocalProcess) -> bool:
    """Whether the pid is alive and really that daemon: its command line names the data directory."""
    if process.pid is None:
        return False
    return str(data_dir / process.name) in command_line(process.pid)


def command_line(pid: int) -> list[str]:
    """The arguments of a live process; empty for one that is gone, a zombie, or another user's."""
    proc = Path("/proc") / str(pid)
    try:
        return os.fsdecode((proc / "cmdline").read_bytes()).split("\0")  # a zombie's is empty
    except OSError:
        if (Path("/proc/self") / "cmdline").exists():
            return []
    # No /proc: macOS and the like.
    found = subprocess.run(["ps", "-ww", "-p", str(pid), "-o", "command="], capture_output=True, check=False)
    return os.fsdecode(found.stdout).split()
