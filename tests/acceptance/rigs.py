"""What a scenario may ask of its world, simulated (kv_rig) or of real processes (real_rig), and its clerks.

A scenario that keeps to this runs in both. It is written as a plain sequence of steps: time passes in `sleep`,
`finish_all` and what is made of them. A bound on time is given as it holds in virtual time; `slower` times as much
is allowed.
"""

from __future__ import annotations

import asyncio
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, TypeVar

import msgpack

from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV, Value
from raftkv.machines.slots import shard_of
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import RaftKVError, VersionMismatch
from raftkv.protocol.limits import ID_BYTES
from raftkv.protocol.messages import Hello, Verb
from raftkv.sim.check.history import Kind, Output
from raftkv.sim.workload import Recorder

BASE_SEED = int(os.environ.get("RAFTKV_SEED", "0"))
ELECTION_TIMEOUT_S = 1.0
"""What the course allows for an election."""
NO_LIMIT = -1
"""`maxraftstate`: never cut the log."""
CLERK_TIMEOUT_S = 120.0
"""A clerk of the course tries for ever; a test must end in that time."""
FORMED_TIMEOUT_S = 30.0
CLIENT_LOSS = 0.1
SERVER_RESETS = 0.01
HOLD_S_MAX = 0.026

T = TypeVar("T")
P = TypeVar("P")
"""A process of the world."""


class Task(Generic[T]):
    """Something that a clerk does. Times in seconds of the world."""

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.ended_s: float | None = None
        self._result: T | None = None
        self.error: RaftKVError | None = None

    @property
    def done(self) -> bool:
        return self.ended_s is not None

    @property
    def result(self) -> T:
        assert self.done, "it has not ended"
        if self.error is not None:
            raise self.error
        return self._result  # type: ignore[return-value]

    def end(self, now: float, result: T | None, error: RaftKVError | None) -> None:
        self.ended_s, self._result, self.error = now, result, error


class BaseClerk(ABC):
    """A client with one `RaftKV` and one `Controllers`, whose operations are recorded."""

    rig: BaseRig[Any]
    number: int
    host: str
    """Its name in the network."""
    rng: random.Random
    kv: RaftKV
    controllers: Controllers

    def __init__(self) -> None:
        self._free_names: list[str] = []

    @abstractmethod
    def spawn(self, work: Coroutine[Any, Any, T]) -> Task[T]:
        """Begin it; it goes on while time passes."""

    @abstractmethod
    def address_of(self, server: Any) -> str:
        """Where this clerk reaches the server."""

    def do(self, work: Coroutine[Any, Any, T], within_s: float = 30.0) -> T:
        """Carry it out now; raise its error, or AssertionError if it takes longer."""
        return self.rig.finish(self.spawn(work), within_s)

    async def get(self, key: bytes) -> Value | None:
        found: Value | None = await self._record(Kind.GET, key, None, None, self.kv.get(key))
        return found

    async def put(self, key: bytes, value: bytes, if_version: int | None = None) -> int:
        call = self.kv.put(key, value, if_version=if_version)
        version: int = await self._record(Kind.PUT, key, value, if_version, call)
        return version

    async def append(self, key: bytes, suffix: bytes) -> int:
        version: int = await self._record(Kind.APPEND, key, suffix, None, self.kv.append(key, suffix))
        return version

    async def _record(
        self, kind: Kind, key: bytes, value: bytes | None, if_version: int | None, call: Awaitable[Any]
    ) -> Any:
        """A history's client is sequential: each operation at a time has a name, lost to an unknown outcome."""
        recorder = self.rig.recorder
        name = self._free_names.pop() if self._free_names else recorder.name(self.host)
        operation = recorder.begin(name, kind, key, value, if_version=if_version)
        output: Output | None = None
        failure: RaftKVError | None = None
        try:
            found = await call
            if kind is Kind.GET:
                output = Output.read(None) if found is None else Output.read(found.value, found.version)
            else:
                output = Output.written(found)
            return found
        except VersionMismatch as error:
            output, failure = Output.mismatched(error.version), error
            raise
        except RaftKVError as error:
            failure = error
            raise
        finally:
            if not recorder.end(operation, output, failure):
                self._free_names.append(name)


class Raw:
    """A client without the SDK: one connection to one server, each request one attempt, headers as one likes.

    It lives in a clerk's process, and is used in its coroutines.
    """

    def __init__(self, clerk: BaseClerk, server: Any, *, client_id: bytes = b"", timeout_s: float = 10.0) -> None:
        self.client_id = client_id or clerk.rng.randbytes(ID_BYTES)
        self.address = clerk.address_of(server)
        self.timeout_s = timeout_s
        self.channel: Channel | None = None
        self._shards = clerk.rig.shards

    def command(
        self, op: int, key: bytes, *args: Any, seq: int = 1, first_unacked: int = 1, stamp_ms: int = 0
    ) -> list[Any]:
        return [op, shard_of(key, self._shards), self.client_id, seq, first_unacked, stamp_ms, key, *args]

    async def open(self) -> None:
        self.channel = await Channel.open(self.address, Hello.of_client())

    async def request(self, verb: int, body: list[Any]) -> Any:
        """The reply's body, or the error of this one attempt."""
        if self.channel is None or self.channel.closed:
            await self.open()
        assert self.channel is not None
        return await self.channel.request(verb, body, timeout_s=self.timeout_s)

    async def write(self, command: list[Any]) -> list[Any]:
        """The result array [0, …]."""
        result: list[Any] = await self.request(Verb.WRITE, [1, msgpack.packb(command)])
        return result

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()


class BaseRig(ABC, Generic[P]):
    """A cluster of controllers and one group (or none) of servers, formed and joined, and its clerks.

    The *servers* are the group's replicas, or the controllers if there is no group.
    """

    slower = 1.0
    seed: int
    rng: random.Random
    shards: int
    recorder: Recorder
    max_raft_state: int
    restarts = 0

    # ---- time

    @property
    @abstractmethod
    def now(self) -> float: ...

    @abstractmethod
    def sleep(self, seconds: float) -> None: ...

    @abstractmethod
    def finish_all(self, tasks: Sequence[Task[Any]], within_s: float) -> None:
        """Until all have ended, `within_s` from now at the latest."""

    def finish(self, task: Task[T], within_s: float) -> T:
        """Its result, `within_s` from now at the latest."""
        self.finish_all([task], within_s)
        return task.result

    def wait_until(self, condition: Callable[[], bool], what: str, within_s: float = FORMED_TIMEOUT_S) -> float:
        """How long it took, in steps of 10 ms."""
        started = self.now
        while not condition():
            late = self.now >= started + within_s * self.slower
            assert not late, f"seed {self.seed}: no {what} within {within_s:g} s"
            self.sleep(0.01)
        return self.now - started

    # ---- who is there

    @property
    @abstractmethod
    def servers(self) -> Sequence[P]: ...

    @property
    @abstractmethod
    def clerks(self) -> Sequence[BaseClerk]: ...

    @abstractmethod
    def clerk(self, timeout_s: float = CLERK_TIMEOUT_S) -> BaseClerk: ...

    def clerks_of(self, count: int) -> Sequence[BaseClerk]:
        return [self.clerk() for _ in range(count)]

    @abstractmethod
    def host_of(self, process: P) -> str:
        """Its name in the network."""

    def hosts_of(self, processes: Iterable[P]) -> list[str]:
        return [self.host_of(process) for process in processes]

    @abstractmethod
    def leader_now(self) -> P | None:
        """The server that says that it leads, in the highest term."""

    def leader(self) -> P:
        self.wait_until(lambda: self.leader_now() is not None, "leader", 10)
        leader = self.leader_now()
        assert leader is not None
        return leader

    # ---- faults

    @abstractmethod
    def cut(self, left: Iterable[str], right: Iterable[str]) -> None:
        """Nothing passes between the two sets of hosts."""

    @abstractmethod
    def heal(self) -> None:
        """Mend all cuts."""

    @abstractmethod
    def lose_segments_of(self, process: P) -> None:
        """What TCP holds back for this host during a cut doesn't arrive after it: all its connections break."""

    def partition(self, *parts: Sequence[P]) -> None:
        """Servers in different parts can't reach each other; clerks reach all."""
        self.heal()
        for index, part in enumerate(parts):
            for other in parts[index + 1 :]:
                self.cut(self.hosts_of(part), self.hosts_of(other))

    def isolate(self, process: P) -> None:
        """From the other servers, and from all clerks that there are."""
        others = [other for other in self.servers if other is not process]
        self.cut([self.host_of(process)], [*self.hosts_of(others), *(clerk.host for clerk in self.clerks)])

    @abstractmethod
    def crash(self, process: P) -> None: ...

    @abstractmethod
    def start(self, process: P) -> None: ...

    @abstractmethod
    def end(self, process: P, how: str) -> None:
        """It goes: stop, kill, pause, or another way that the world knows."""

    @abstractmethod
    def revive(self, process: P) -> None:
        """Take back what `end` did."""

    def restart(self, processes: Sequence[P], down_s: float = ELECTION_TIMEOUT_S) -> None:
        """Crash all of them, and start them again from what their disks hold."""
        for process in processes:
            self.crash(process)
        self.sleep(down_s)
        for process in processes:
            self.start(process)
        self.restarts += len(processes)

    @abstractmethod
    def hold_writes(self) -> None:
        """From now on no server can commit."""

    @abstractmethod
    def release_writes(self) -> None: ...

    # ---- what is inside

    @abstractmethod
    def state_bytes(self, process: P) -> int:
        """Raft state: the log entries kept, in logical bytes."""

    @abstractmethod
    def raft_state_max(self) -> int:
        """The largest of any server that is up."""

    @abstractmethod
    def snapshot_bytes(self, process: P) -> int:
        """State, encoded."""

    @abstractmethod
    def snapshots_made(self, process: P) -> int:
        """Whether this incarnation has cut its log, or replaced its state by another's; how often, if that is known."""

    @abstractmethod
    def snapshots_installed(self, process: P) -> int:
        """How often this incarnation replaced its state by another's."""

    @abstractmethod
    def local_get(self, process: P, key: bytes) -> Value | None:
        """What this one replica has applied."""

    @abstractmethod
    def reachable(self) -> Sequence[P]:
        """The servers that can be looked into just now."""

    @abstractmethod
    def wait_equal(self, within_s: float = 10.0) -> float:
        """Until all replicas of all groups hold the same; how long that took."""


def raise_bugs(task: asyncio.Task[None]) -> None:
    """An exception that is no RaftKVError is a failure of the run: the loop's handler reports it."""
    if not task.cancelled():
        task.result()
