"""A simulated cluster: controllers, groups and clients as processes, and what is asked of them at the end.

Daemons and SDK are the production ones. This module starts them, lets them join, and looks: who leads, whether
all replicas hold the same. What goes wrong is the nemesis's affair.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

from raftkv.client.controllers import Controllers
from raftkv.daemons.options import DaemonOptions
from raftkv.machines.controller import ShardMapMachine
from raftkv.machines.coordinator import CoordinatorMachine
from raftkv.machines.kv import KvMachine
from raftkv.machines.shard_states import ShardState
from raftkv.protocol.errors import GroupExists, RaftKVError
from raftkv.sim.disk import DiskProfile
from raftkv.sim.invariants import GroupInvariants, ShardInvariants
from raftkv.sim.network import Network, NetworkProfile
from raftkv.sim.probes import Probes
from raftkv.sim.process import ClientProcess, DaemonProcess, Process, World
from raftkv.sim.scenario import Scenario, draw
from raftkv.sim.scheduler import Scheduler
from raftkv.sim.txn_invariants import EndInvariant, decisions_differ, locks_left
from raftkv.sim.txn_workload import TxnRecorder
from raftkv.sim.workload import Recorder, Workload
from raftkv.storage.engine import StorageEngine

PORT = 7000
COORDINATORS_GID = 1
ALL_KEYS = (b"", b"\xff" * 16)
JOIN_TIMEOUT_S = 5.0
JOIN_AGAIN_S = 0.5
WATCH_S = 1.0


class Group:
    """One Raft group: the controllers or the coordinators (gid 0), or the replicas of a gid that serves shards."""

    def __init__(self, name: str, gid: int, addresses: dict[int, str]) -> None:
        self.name = name
        self.gid = gid
        self.addresses = addresses
        self.processes: list[DaemonProcess] = []
        self.formed = False
        """All replicas have once known their membership."""

    @property
    def hosts(self) -> list[str]:
        return [process.host for process in self.processes]

    def leader(self) -> DaemonProcess | None:
        """The running replica that leads in the highest term."""
        best: tuple[int, DaemonProcess] | None = None
        for process in self.processes:
            replica = process.daemon.replica if process.running and process.daemon is not None else None
            if replica is not None and replica.is_leader and (best is None or replica.raft.term > best[0]):
                best = replica.raft.term, process
        return best[1] if best is not None else None

    def trouble(self) -> str | None:
        """What is not as it should be in a group that nothing ails; None if all replicas are equal."""
        rafts = []
        for process in self.processes:
            replica = process.daemon.replica if process.running and process.daemon is not None else None
            if replica is None:
                return f"{process.host} is down or waits: {process.exit_text or 'not formed'}"
            rafts.append((process, replica))
        leaders = [process.host for process, replica in rafts if replica.is_leader]
        if len(leaders) != 1:
            return f"{self.name} has leaders {leaders}"
        terms = {replica.raft.term for _, replica in rafts}
        applied = {replica.applied_index for _, replica in rafts}
        if len(terms) != 1 or len(applied) != 1 or {replica.raft.last_index for _, replica in rafts} != applied:
            return f"{self.name} is at terms {sorted(terms)}, applied {sorted(applied)}"
        return None

    def difference(self) -> str | None:
        """Where the contents of two replicas, both at the same index, differ, key for key."""
        first: dict[bytes, bytes] | None = None
        for process in self.processes:
            assert process.daemon is not None and process.daemon._store is not None
            rows = dict(process.daemon._store.engine.scan(*ALL_KEYS))
            if first is None:
                first = rows
            elif rows != first:
                keys = sorted(key for key in rows.keys() | first.keys() if rows.get(key) != first.get(key))
                return f"{process.host} and {self.hosts[0]} differ in {len(keys)} rows, first {keys[0]!r}"
        return None


def shards_of(process: DaemonProcess) -> KvMachine:
    """The state machine of a running replica of a group."""
    assert process.daemon is not None
    machine = process.daemon._role.machine
    assert isinstance(machine, KvMachine)
    return machine


class Cluster:
    """Everything of one run that is simulated."""

    def __init__(self, seed: str, scenario: Scenario, probes: Probes) -> None:
        self.scenario = scenario
        self.probes = probes
        scheduler = Scheduler()
        rng = World(scheduler, None, seed, DiskProfile()).rng("plan")  # type: ignore[arg-type]
        net, disk, plan = scenario.network, scenario.disk, scenario.cluster
        profile = NetworkProfile(
            draw(rng, net.latency_ms) / 1000, draw(rng, net.jitter_ms) / 1000, draw(rng, net.loss), net.split
        )
        disk_profile = DiskProfile(draw(rng, disk.sync_ms) / 1000, draw(rng, disk.jitter_ms) / 1000, disk.spike)
        network = Network(scheduler, World(scheduler, None, seed, disk_profile).rng("network"), profile)  # type: ignore[arg-type]
        network.on_event = probes.hit
        self.world = World(scheduler, network, seed, disk_profile, plan.clock_step_ms / 1000)
        self.violations: list[str] = []
        controllers = {number: f"c{number}:{PORT}" for number in range(plan.controllers)}
        self.controllers = tuple(controllers.values())
        self.groups = [Group("the controllers", 0, controllers)]
        for gid in range(1, plan.groups + 1):
            self.groups.append(
                Group(f"group {gid}", gid, {number: f"g{gid}r{number}:{PORT}" for number in range(plan.replicas)})
            )
        self.coordinators: Group | None = None
        if plan.coordinators:
            addresses = {number: f"t{number}:{PORT}" for number in range(plan.coordinators)}
            self.coordinators = Group("the coordinators", 0, addresses)
            self.groups.append(self.coordinators)
        common = DaemonOptions(
            role="controller",
            replica=0,
            listen=controllers[0],
            peers=controllers,
            data_dir="data",
            shards=plan.shards,
            reads=plan.reads,
            snapshot_entries=max(1, int(draw(rng, plan.snapshot_entries))),
            snapshot_bytes=int(draw(rng, plan.snapshot_kib) * 1024),
            wal_segment_bytes=int(draw(rng, plan.wal_segment_kib)) * 1024,
        )
        self._group_of: dict[DaemonProcess, Group] = {}
        self._invariants: dict[Group, GroupInvariants] = {}
        self._shards = ShardInvariants()
        self._ends = EndInvariant()
        for group in self.groups:
            for number, address in group.addresses.items():
                options = dataclasses.replace(common, replica=number, listen=address, peers=group.addresses)
                if group.gid:
                    options = dataclasses.replace(options, role="shardkv", gid=group.gid, controllers=self.controllers)
                elif group is self.coordinators:
                    options = dataclasses.replace(
                        options, role="coordinator", gid=COORDINATORS_GID, controllers=self.controllers
                    )
                host = address.partition(":")[0]
                process = DaemonProcess(self.world, host, options, self.failed, self._exited)
                process.after_turn = self._after_turn
                process.media.on_event = probes.hit
                group.processes.append(process)
                self._group_of[process] = group
            by_number = dict(enumerate(group.processes))
            self._invariants[group] = GroupInvariants(group.name, by_number, probes)
        self.daemons = [process for group in self.groups for process in group.processes]
        self.recorder = Recorder(self.world, probes)
        self.transactions = TxnRecorder(self.recorder, scenario.transactions, self.violate)
        self.workload = Workload(
            self.world, scenario.workload, self.controllers, self.recorder, self.transactions, self.failed
        )
        self.admin = ClientProcess(self.world, "admin", self.failed)
        self._strangers: list[ClientProcess] = []
        self.joined = False
        self.on_exit: Callable[[DaemonProcess], None] = lambda process: None
        self.exits: list[tuple[float, str]] = []

    @property
    def all_hosts(self) -> list[str]:
        return [process.host for process in self.daemons] + [process.host for process in self.workload.processes]

    @property
    def serving_groups(self) -> list[Group]:
        """Those that may serve shards."""
        return [group for group in self.groups if group.gid]

    @property
    def elections(self) -> int:
        return sum(invariants.elections for invariants in self._invariants.values())

    def group_of(self, process: DaemonProcess) -> Group:
        return self._group_of[process]

    def invariants_of(self, process: DaemonProcess) -> GroupInvariants:
        return self._invariants[self._group_of[process]]

    def start(self) -> None:
        """All daemons, a moment apart; then the groups join and the clients begin."""
        rng = self.world.rng("start")
        for process in self.daemons:
            self.world.scheduler.after(rng.random() * 0.2, self._start_first, process)
        self.admin.launch(self._join)
        for number in range(len(self.workload.processes)):
            self.world.scheduler.after(0.3 + rng.random() * 0.3, self.workload.start, number)

    def _start_first(self, process: DaemonProcess) -> None:
        """Unless the nemesis was quicker."""
        if process.incarnation == 0:
            process.start()

    async def _join(self) -> None:
        """Add all groups at once, however long it takes."""
        groups = {group.gid: list(group.addresses.values()) for group in self.groups if group.gid}
        controllers = Controllers(self.controllers, timeout_s=JOIN_TIMEOUT_S, rng=self.world.rng("admin"))
        while not self.joined:
            try:
                await controllers.join(groups)
                self.joined = True
            except GroupExists:  # an earlier attempt, of which we heard nothing
                self.joined = True
            except RaftKVError:
                await asyncio.sleep(JOIN_AGAIN_S)
        rng = self.world.rng("watcher")
        while True:  # then it watches: what it asks is answered, refused or not answered, and harms nobody
            address = rng.choice(self.daemons).options.address
            try:
                await controllers.status_of(address)
                await controllers.query(rng.choice((None, 0, 1, 99)))
            except RaftKVError:
                self.probes.hit("watcher got no answer")
            await asyncio.sleep(WATCH_S)

    def stranger(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `main()` in a process that has nothing to do with the cluster."""
        process = ClientProcess(self.world, f"stranger{len(self._strangers)}", self.failed)
        self._strangers.append(process)
        process.launch(main)

    # ---- what must not be

    def _after_turn(self, process: DaemonProcess) -> None:
        group = self._group_of[process]
        self._invariants[group].check(process)
        if group.gid:
            self._shards.check(process)
        if self.coordinators is not None:
            self._ends.check(process)
        if not group.formed:
            group.formed = all(
                member.daemon is not None and member.daemon.replica is not None for member in group.processes
            )

    def failed(self, process: Process, message: str, error: BaseException) -> None:
        """An exception in the product that nobody caught."""
        place = ""
        traceback = error.__traceback__
        while traceback is not None:
            code = traceback.tb_frame.f_code
            place = f" in {code.co_filename.rpartition('raftkv/')[2]}:{traceback.tb_lineno}"
            traceback = traceback.tb_next
        self.violate(f"UnexpectedException: {process.host}: {message}: {error!r}{place}")

    def violate(self, text: str) -> None:
        self.violations.append(text)
        self.world.scheduler.stop()

    def _exited(self, process: DaemonProcess, text: str) -> None:
        """A daemon ended itself."""
        now = self.world.scheduler.now
        self.exits.append((now, f"{process.host}: {text}"))
        if "must be replaced" in text or "another data directory" in text:
            self.probes.hit("exit: must be replaced")
        elif process.excuses or now < process.excused_until:
            self.probes.hit("exit: full or failing disk" if "can't be written" in text else "exit: damaged data")
        if not (process.excuses or now < process.excused_until) or "bug in raftkv" in text:
            self.violate(f"UnexpectedExit: {process.host}: {text}")
        self.on_exit(process)

    def trouble(self) -> str | None:
        """What is not well yet, after everything healed."""
        for group in self.groups:
            problem = group.trouble()
            if problem is not None:
                return problem
        return self._unsettled() if self.joined else "the groups could not join"

    def _unsettled(self) -> str | None:
        """A shard that isn't yet where it belongs, or not yet gone from where it was."""
        controllers = self.groups[0].processes[0].daemon
        assert controllers is not None
        machine = controllers._role.machine
        assert isinstance(machine, ShardMapMachine)
        for group in self.serving_groups:
            shards = shards_of(group.processes[0])
            if shards.config_num != machine.config_num:
                return f"{group.name} is at configuration {shards.config_num} of {machine.config_num}"
            owned = machine.config(-1).shards_of(group.gid)
            if shards.shard_states() != [(shard, ShardState.SERVING) for shard in owned] or shards.releases():
                return f"{group.name} owns {owned}, has {shards.shard_states()}, owes {shards.releases()}"
        return self.locks_left()

    def locks_left(self) -> str | None:
        """What some transaction still holds or waits for."""
        machines = [shards_of(group.processes[0]) for group in self.serving_groups]
        return locks_left(machines, self._coordinator())

    def decisions_differ(self) -> str | None:
        """A transaction that ended in two ways, or in another one than its client was told."""
        rows = []
        for group in self.serving_groups:
            process = group.processes[0]
            assert process.daemon is not None and process.daemon._store is not None
            rows.append((shards_of(process), process.daemon._store.engine))
        coordinator = self._coordinator()
        return decisions_differ(rows, coordinator, self.transactions.told)

    def _coordinator(self) -> tuple[CoordinatorMachine, StorageEngine] | None:
        if self.coordinators is None:
            return None
        daemon = self.coordinators.processes[0].daemon
        assert daemon is not None and daemon._store is not None
        machine = daemon._role.machine
        assert isinstance(machine, CoordinatorMachine)
        return machine, daemon._store.engine

    def left_behind(self) -> str | None:
        """Rows of shards that aren't anywhere, once everything has settled."""
        for group in self.serving_groups:
            process = group.processes[0]
            assert process.daemon is not None and process.daemon._store is not None
            prefixes = tuple(shards_of(process).prefixes())
            for key, _ in process.daemon._store.engine.scan(b"m", b"t"):
                if not key.startswith(prefixes):
                    return f"{process.host} still has {key!r}"
        return None

    def dispose(self) -> None:
        for process in [*self.daemons, *self.workload.processes, self.admin, *self._strangers]:
            process.dispose()
        self.world.scheduler.clear()
