"""The harness of the key-value, rsm and controller scenarios: production daemons and SDK in the simulator.

One group serves all shards where the course has one replicated service, one controller that nothing ever happens to
hands out the map. A *clerk* is a client process of its own with one `RaftKV`; what it does is recorded as a history.
The network model of the course is mapped to TCP:

* reliable: 0.5 to 1 ms, nothing is lost;
* unreliable: 10 % of the requests of clerks never arrive and 10 % of the answers are lost, because the connection is
  reset under them; between servers 4 % of the segments are sent again after a retransmission timeout of 0.2 to 0.6 s
  (and all behind them wait: such a loss costs more than one of the course's), and 1 % reset their connection;
  everything is delayed, by 6.5 ms on average in each direction;
* a crash is a loss of power or a SIGKILL, half and half: what was synced stays.

The simulator's invariants are checked after every turn of every daemon. The rig must never help: it tells no daemon
and no clerk anything.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV, Value
from raftkv.machines.kv import KvMachine
from raftkv.machines.slots import shard_of
from raftkv.protocol.errors import RaftKVError
from raftkv.sim.check.linearizability import check_linearizability
from raftkv.sim.cluster import ALL_KEYS, Cluster, Group
from raftkv.sim.network import LATENCY_S_MIN, Pipe, cut_between
from raftkv.sim.probes import Probes, listening
from raftkv.sim.process import ClientProcess, DaemonProcess
from raftkv.sim.scenario import ClusterPlan, DiskPlan, NetworkPlan, Scenario, WorkPlan
from raftkv.sim.workload import Recorder
from tests.acceptance.rigs import (
    BASE_SEED,
    CLERK_TIMEOUT_S,
    CLIENT_LOSS,
    FORMED_TIMEOUT_S,
    HOLD_S_MAX,
    NO_LIMIT,
    SERVER_RESETS,
    BaseClerk,
    BaseRig,
    Task,
    raise_bugs,
)

SERVER_LOSS = 0.04
SLOW_SYNC_S = 0.05

T = TypeVar("T")


def seeds(quick: int, long: int) -> pytest.MarkDecorator:
    """So many seeds in every run, so many more in `make test-all`."""
    numbers = range(BASE_SEED, BASE_SEED + quick + long)
    values = [pytest.param(n, marks=pytest.mark.long if i >= quick else ()) for i, n in enumerate(numbers)]
    return pytest.mark.parametrize("seed", values)


class Clerk(BaseClerk):
    """It is a client process of its own."""

    def __init__(self, rig: Rig, number: int, timeout_s: float) -> None:
        super().__init__()
        self.rig: Rig = rig
        self.number = number
        self.host = f"k{number}"
        self.rng = rig.cluster.world.rng(f"clerk {number}")
        self.process = ClientProcess(rig.cluster.world, self.host, rig.cluster.failed)
        self.kv = RaftKV(rig.cluster.controllers, timeout_s=timeout_s, rng=self.rng)
        self.controllers = Controllers(rig.cluster.controllers, timeout_s=timeout_s, rng=self.rng)
        self.process.launch(self._main)

    async def _main(self) -> None:
        """The process lives until the end of the run: what it does comes by `spawn`."""

    def spawn(self, work: Coroutine[Any, Any, T]) -> Task[T]:
        scheduler = self.rig.scheduler
        task: Task[T] = Task(scheduler.now)

        async def carry_out() -> None:
            try:
                result = await work
            except RaftKVError as error:
                task.end(scheduler.now, None, error)
            else:
                task.end(scheduler.now, result, None)
            scheduler.stop()

        loop = self.process.loop
        assert loop is not None
        loop.post(lambda: loop.create_task(carry_out()).add_done_callback(raise_bugs))
        self.rig.tasks.append(task)
        return task

    def address_of(self, server: DaemonProcess) -> str:
        return server.options.address


class Rig(BaseRig[DaemonProcess]):
    """A simulated cluster of one controller and one group of `servers`, formed and joined, and its clerks.

    `groups` 0 leaves only the controllers. Leave it as a context: then every violation of an invariant, and
    a history that isn't linearizable, fails the test.
    """

    def __init__(
        self,
        servers: int,
        seed: int,
        *,
        unreliable: bool = False,
        max_raft_state: int = NO_LIMIT,
        shards: int = 10,
        groups: int = 1,
        controllers: int = 1,
        join: bool = True,
        coordinators: int = 0,
    ) -> None:
        self.seed = seed
        self.shards = shards
        kib = 1024.0**2 if max_raft_state == NO_LIMIT else max_raft_state / 1024
        scenario = Scenario(
            "acceptance",
            cluster=ClusterPlan(
                controllers, groups, servers, shards, (1e9, 1e9), (kib, kib), (64, 64), coordinators=coordinators
            ),
            workload=WorkPlan(clients=0),
            network=NetworkPlan((0.5, 0.5), (0.1, 0.1), (0, 0), 0.0),
            disk=DiskPlan((0.3, 0.3), (0.1, 0.1), 0.0),
        )
        self.rng = random.Random(seed)
        self.max_raft_state = max_raft_state
        self._context = contextlib.ExitStack()
        self._collected = gc.isenabled()
        gc.disable()  # as in raftkv.sim.run: a finaliser in the midst of a run would make it another run
        self._probes = Probes()
        self._context.enter_context(listening(self._probes))
        self.cluster = Cluster(str(seed), scenario, self._probes)
        self.scheduler = self.cluster.world.scheduler
        self.network = self.cluster.world.network
        self.recorder: Recorder = self.cluster.recorder
        self._clerks: list[Clerk] = []
        self.tasks: list[Task[Any]] = []
        self._cuts: list[Callable[[], None]] = []
        self._send = self.network.send
        self.set_unreliable(unreliable)
        try:
            self._start(join)
        except BaseException:
            self._dispose()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.check()
                self.recorder.close()
                verdict = check_linearizability(self.recorder.history)
                assert verdict.passed, f"seed {self.seed}: {verdict}"
            else:
                print(f"seed {self.seed}, at {self.scheduler.now:.3f} s")
        finally:
            self._dispose()

    def _start(self, join: bool) -> None:
        for process in self.cluster.daemons:
            process.start()
        groups = self.cluster.serving_groups
        if groups and join:
            self.join({group.gid: list(group.addresses.values()) for group in groups})
        self.wait_until(lambda: all(group.leader() is not None for group in self.cluster.groups), "leaders")

    def join(self, groups: dict[int, list[str]]) -> None:
        """As an administrator does it."""
        admin = self.clerk()
        admin.do(admin.controllers.join(groups), FORMED_TIMEOUT_S)
        admin.do(admin.get(b"is it there?"), FORMED_TIMEOUT_S)

    def _dispose(self) -> None:
        self.network.send = self._send  # type: ignore[method-assign]
        for clerk in self.clerks:
            clerk.process.dispose()
        self.cluster.dispose()
        self._context.close()
        if self._collected:
            gc.enable()

    # ---- time

    @property
    def now(self) -> float:
        return self.scheduler.now

    def sleep(self, seconds: float) -> None:
        deadline = self.now + seconds
        while self.now < deadline:
            self.scheduler.run_until(deadline)  # it stops whenever a task ends
            self.check()

    def finish_all(self, tasks: Sequence[Task[Any]], within_s: float) -> None:
        deadline = self.now + within_s
        while not all(task.done for task in tasks):
            assert self.now < deadline, (
                f"seed {self.seed}: {sum(not task.done for task in tasks)} of {len(tasks)} tasks did not end "
                f"within {within_s:g} s"
            )
            self.scheduler.run_until(deadline)
            self.check()

    def check(self) -> None:
        assert not self.cluster.violations, f"seed {self.seed}: {self.cluster.violations}"

    # ---- who is there

    @property
    def group(self) -> Group:
        return self.cluster.groups[1]

    @property
    def _served_by(self) -> list[Group]:
        """The last is the one that a scenario is about."""
        return self.cluster.serving_groups or self.cluster.groups

    @property
    def servers(self) -> list[DaemonProcess]:
        return self._served_by[-1].processes

    def host_of(self, process: DaemonProcess) -> str:
        return process.host

    def leader_now(self) -> DaemonProcess | None:
        return self._served_by[-1].leader()

    def leader(self, group: Group | None = None) -> DaemonProcess:
        group = group or self._served_by[-1]
        self.wait_until(lambda: group.leader() is not None, "leader", 10)
        process = group.leader()
        assert process is not None
        return process

    @property
    def clerks(self) -> Sequence[Clerk]:
        return self._clerks

    def clerk(self, timeout_s: float = CLERK_TIMEOUT_S) -> Clerk:
        self._clerks.append(Clerk(self, len(self._clerks), timeout_s))
        return self._clerks[-1]

    def clerks_of(self, count: int) -> list[Clerk]:
        return [self.clerk() for _ in range(count)]

    # ---- faults

    def set_unreliable(self, unreliable: bool) -> None:
        profile = self.network.profile
        profile.latency_s, profile.jitter_s = LATENCY_S_MIN, 0.0001
        if unreliable:
            profile.jitter_s = HOLD_S_MAX / 4
        for group in self.cluster.groups:
            for source, target in itertools.permutations(group.hosts, 2):
                self.network.link(source, target).loss = SERVER_LOSS if unreliable else 0.0
        self.network.send = self._unreliable_send if unreliable else self._send  # type: ignore[method-assign]

    def _unreliable_send(self, pipe: Pipe, data: bytes | None) -> None:
        """A segment, which may be what breaks its connection: it is lost, and whatever is under way."""
        ends = pipe.sender.interface.host, pipe.receiver.interface.host
        loss = CLIENT_LOSS if any(host.startswith("k") for host in ends) else SERVER_RESETS
        if data is None or self.network.rng.random() >= loss:
            self._send(pipe, data)
        elif not pipe.lost:
            pipe.lost = True
            self.scheduler.after(LATENCY_S_MIN, self.network.reset, pipe.sender)

    def cut(self, left: Iterable[str], right: Iterable[str]) -> None:
        """Nothing passes between the two sets of hosts."""
        self._cuts.append(cut_between(self.network, list(left), list(right)))

    def isolate(self, process: DaemonProcess) -> None:
        """From the other replicas of its group, and from all clerks."""
        group = self.cluster.group_of(process)
        others = [host for host in group.hosts if host != process.host]
        self.cut([process.host], [*others, *(clerk.host for clerk in self.clerks)])

    def lose_segments_of(self, process: DaemonProcess) -> None:
        """What TCP holds back for this host during a cut doesn't arrive after it: all its connections break."""
        for transport in self.network.connections():
            if process.host in (transport.interface.host, transport.out.receiver.interface.host):
                self.network.reset(transport)

    def heal(self) -> None:
        cuts, self._cuts = self._cuts, []
        for mend in cuts:
            mend()

    def crash(self, process: DaemonProcess) -> None:
        if self.rng.random() < 0.5:
            process.lose_power()
        else:
            process.kill()

    def start(self, process: DaemonProcess) -> None:
        process.start()

    def end(self, process: DaemonProcess, how: str) -> None:
        """How: a method of the process."""
        process.excused_until = float("inf")
        getattr(process, how)()

    def revive(self, process: DaemonProcess) -> None:
        process.resume()
        if not process.running:
            process.start()

    def hold_writes(self) -> None:
        """The disks are slow."""
        for process in self.servers:
            process.media.slow_s = SLOW_SYNC_S

    def release_writes(self) -> None:
        for process in self.servers:
            process.media.heal()

    # ---- what is inside

    def state_bytes(self, process: DaemonProcess) -> int:
        """Raft state: the log entries kept, in logical bytes."""
        assert process.daemon is not None and process.daemon.replica is not None
        return process.daemon.replica.raft.log_bytes

    def raft_state_max(self) -> int:
        """The largest of any server that is up."""
        return max(self.state_bytes(process) for process in self.servers if self.is_up(process))

    def snapshot_bytes(self, process: DaemonProcess) -> int:
        """State, encoded."""
        return sum(len(key) + len(value) for key, value in self.rows(process).items())

    def rows(self, process: DaemonProcess) -> dict[bytes, bytes]:
        assert process.daemon is not None and process.daemon._store is not None
        return dict(process.daemon._store.engine.scan(*ALL_KEYS))

    def snapshots_made(self, process: DaemonProcess) -> int:
        """How often this incarnation cut its log, or replaced its state by another's."""
        assert process.daemon is not None and process.daemon.replica is not None
        replica = process.daemon.replica
        return replica.compaction.flushes + replica.snapshots.installed

    def snapshots_installed(self, process: DaemonProcess) -> int:
        assert process.daemon is not None and process.daemon.replica is not None
        return process.daemon.replica.snapshots.installed

    def reachable(self) -> list[DaemonProcess]:
        return [process for process in self.servers if self.is_up(process)]

    def is_up(self, process: DaemonProcess) -> bool:
        return process.running and process.daemon is not None and process.daemon.replica is not None

    def local_get(self, process: DaemonProcess, key: bytes) -> Value | None:
        """What this one replica has applied."""
        assert process.daemon is not None and process.daemon._store is not None
        machine = process.daemon._role.machine
        assert isinstance(machine, KvMachine)
        value, version = machine.get(process.daemon._store.engine, shard_of(key, machine.shard_count), key)
        return None if value is None else Value(value, version)

    def wait_equal(self, within_s: float = 10.0) -> float:
        """Until all replicas of all groups hold the same; how long that took."""
        took = self.wait_until(lambda: self.cluster_trouble() is None, f"agreement: {self.cluster_trouble()}", within_s)
        for group in self.cluster.groups:
            assert group.difference() is None, f"seed {self.seed}: {group.difference()}"
        return took

    def cluster_trouble(self) -> str | None:
        problems = (group.trouble() for group in self.cluster.groups)
        return next((problem for problem in problems if problem is not None), None)
