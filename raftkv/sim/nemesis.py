"""What goes wrong, and how it ends. One function per kind of fault; a scenario gives their weights by name.

A fault begins, lasts, and is undone; `heal` undoes all. Every choice comes from the nemesis's own generator, so the
faults of a seed don't depend on what the store does, other than on who leads. Damage to data (a wiped disk, a
flipped bit) is kept to one replica of a group at a time: more would be a loss that no store survives.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from raftkv.client.controllers import Controllers
from raftkv.daemons import failpoints
from raftkv.daemons.group_calls import GroupCalls, named_client
from raftkv.machines.kv import KvMachine
from raftkv.machines.machine import decode_commands
from raftkv.machines.moves import IMPORT_INSTALL
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import LastGroup, RaftKVError
from raftkv.protocol.messages import Hello, Verb, encode_hello, encode_request
from raftkv.protocol.migration import ShardBody, ShardOp, encode_shard_body
from raftkv.raft.entry import EntryKind
from raftkv.sim.disk import Directory, MediaFile
from raftkv.sim.loop import ProcessEnded
from raftkv.sim.network import cut_between
from raftkv.sim.process import DaemonProcess
from raftkv.sim.scenario import NemesisPlan, Scenario, ScenarioError, draw
from raftkv.storage.memory import STATE_FILE, Write
from raftkv.storage.wal_format import BATCH_HEADER_BYTES, BATCH_MAGIC, BLOCK_BYTES

if TYPE_CHECKING:
    from raftkv.sim.cluster import Cluster, Group

Undo = Callable[[], None]
Fault = Callable[["Nemesis"], "Undo | None"]
"""Begins a fault; what ends it, or None if there was nothing to do it to."""

CLIENT_DOWN_S = (0.1, 2.0)
RESTART_S = (0.1, 4.0)
EXITED_RESTART_S = (0.3, 2.0)
AFTERMATH_S = 5.0
MAP_TIMEOUT_S = 5.0
STOPPING_POLL_S = 0.5
HANDOVER_LOOK_S = 0.001
HANDOVER_SLOW_S = (0.02, 0.2)
HANDOVER_LASTS_S = (1.2, 2.0)
LATE_RELEASE_LOOK_S = 0.005
LATE_RELEASE_S = (0.2, 5.0)
STEP_STALL_S = (0.1, 8.0)

INSTANTS = ("reset", "graceful_stop", "kill_client", "forged_map", "transfer", "hostile_bytes", "join", "leave", "move")
"""Faults that don't last."""

FAULTS: dict[str, Fault] = {}
"""By the name that scenarios use."""


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


def check_faults(scenario: Scenario) -> None:
    """Raise ScenarioError for a fault that isn't known."""
    unknown = sorted(set(scenario.nemesis.faults) - set(FAULTS))
    if unknown:
        raise ScenarioError(f"{scenario.name}: there is no fault {unknown[0]!r}; there are {', '.join(sorted(FAULTS))}")


class Nemesis:
    """Begins faults at random times until `heal`."""

    def __init__(self, cluster: Cluster, plan: NemesisPlan) -> None:
        self.cluster = cluster
        self.rng = cluster.world.rng("nemesis")
        self.plan = plan
        self.counts: dict[str, int] = {}
        self.timeline: list[tuple[float, str]] = []
        self.active: dict[int, tuple[str, Undo]] = {}
        self.healed = False
        self._every_s = draw(self.rng, plan.every_s)
        self._names = list(plan.faults)
        self._weights = list(plan.faults.values())
        self._number = 0
        self._damaged: dict[DaemonProcess, None] = {}

    def start(self) -> None:
        if self._names:
            self._later(draw(self.rng, self.plan.start_s))

    def _later(self, delay_s: float) -> None:
        self.cluster.world.scheduler.after(delay_s, self._strike)

    def _strike(self) -> None:
        if self.healed:
            return
        if len(self.active) < self.plan.at_once:
            self.begin(self.rng.choices(self._names, self._weights)[0])
        self._later(self.rng.expovariate(1 / self._every_s))

    def begin(self, name: str) -> bool:
        """Begin a fault now; whether there was anything to do it to."""
        undo = FAULTS[name](self)
        if undo is None:
            return False
        self.counts[name] = self.counts.get(name, 0) + 1
        self._number += 1
        self.active[self._number] = (name, undo)
        self.cluster.world.scheduler.after(self._duration_s(name), self._end, self._number)
        return True

    def _duration_s(self, name: str) -> float:
        if name in ("old_disk", "late_answers", "kill_at_handover", "late_release", "crash_at_step", "stall_at_step"):
            return 7.0 + 4 * self.rng.random()
        if name in INSTANTS:
            return 0.0
        if name.startswith(("kill", "power")):
            return draw(self.rng, RESTART_S)
        return self.rng.choice((0.3, 1.0, 3.0, 8.0)) * (0.5 + self.rng.random())

    def _end(self, number: int) -> None:
        active = self.active.pop(number, None)
        if active is not None:
            self.say(f"end of {active[0]}")
            active[1]()

    @property
    def total(self) -> int:
        """Faults begun."""
        return sum(self.counts.values())

    def heal(self) -> None:
        """Everything ends, everybody starts."""
        self.say("all heals")
        self.healed = True
        for number in list(self.active):
            self._end(number)
        self.cluster.world.network.mend_all()
        for process in self.cluster.daemons:
            process.resume()
            process.set_slowness(1.0)
            process.set_clock_rate(1.0)
            process.media.heal()
            process.engine_stalls = False
            process.power_lasts_steps = None
            if process.disk is not None:
                process.disk.power_lasts_steps = None
            if not process.running:
                process.start()

    def later(self, delay_s: float, act: Callable[[], object]) -> None:
        """A part of a fault that comes later: not once all has healed."""

        def unless_healed() -> None:
            if not self.healed:
                act()

        self.cluster.world.scheduler.after(delay_s, unless_healed)

    def say(self, text: str) -> None:
        self.timeline.append((self.cluster.world.scheduler.now, text))

    # ---- what faults are made of

    def process_exited(self, process: DaemonProcess) -> None:
        """It ended by itself: whoever watches over it starts it again."""
        if process not in self._damaged or self.healed:
            self.cluster.world.scheduler.after(draw(self.rng, EXITED_RESTART_S), self.start_process, process)

    def start_process(self, process: DaemonProcess) -> None:
        if not process.running:
            self.say(f"{process.host} starts")
            process.start()

    def start_all(self, processes: list[DaemonProcess]) -> None:
        for process in processes:
            self.start_process(process)

    def running(self) -> list[DaemonProcess]:
        return [process for process in self.cluster.daemons if process.running]

    def some_process(self) -> DaemonProcess | None:
        """A running daemon, the leader of its group half of the time."""
        running = self.running()
        if not running:
            return None
        process = self.rng.choice(running)
        if self.rng.random() < 0.5:
            leader = self.cluster.group_of(process).leader()
            if leader is not None:
                return leader
        return process

    def some_group(self) -> Group:
        return self.rng.choice(self.cluster.groups)

    def undamaged_victim(self) -> DaemonProcess | None:
        """A replica whose data may be damaged: no other of its group is."""
        groups = [
            group
            for group in self.cluster.groups
            if group.formed and len(group.processes) > 2 and not any(p in self._damaged for p in group.processes)
        ]
        if not groups:
            return None
        return self.rng.choice(self.rng.choice(groups).processes)

    def damage(self, process: DaemonProcess) -> None:
        self._damaged[process] = None
        process.excuses += 1

    def repaired(self, process: DaemonProcess) -> None:
        """The data is what it was before; the process may start from it."""
        self._damaged.pop(process, None)
        self.excused(process)
        self.start_process(process)

    def excused(self, process: DaemonProcess) -> None:
        """One thing that was wrong with the disk is over; what it caused may come to light yet."""
        process.excuses -= 1
        process.excused_until = self.cluster.world.scheduler.now + AFTERMATH_S


# ---- processes


@fault
def kill(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None:
        return None
    nemesis.say(f"kill {process.host}")
    process.kill()
    return partial(nemesis.start_process, process)


@fault
def kill_leader(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_group().leader()
    if process is None:
        return None
    nemesis.say(f"kill the leader {process.host}")
    process.kill()
    return partial(nemesis.start_process, process)


@fault
def kill_group(nemesis: Nemesis) -> Undo | None:
    group = nemesis.some_group()
    nemesis.say(f"kill all of {group.name}")
    for process in group.processes:
        process.kill()
    return partial(nemesis.start_all, group.processes)


@fault
def kill_all(nemesis: Nemesis) -> Undo | None:
    nemesis.say("kill all daemons")
    for process in nemesis.cluster.daemons:
        process.kill()
    return partial(nemesis.start_all, nemesis.cluster.daemons)


@fault
def power_loss(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None:
        return None
    nemesis.say(f"power loss of {process.host}")
    process.lose_power()
    return partial(nemesis.start_process, process)


@fault
def power_group(nemesis: Nemesis) -> Undo | None:
    group = nemesis.some_group()
    nemesis.say(f"power loss of all of {group.name}")
    for process in group.processes:
        process.lose_power()
    return partial(nemesis.start_all, group.processes)


@fault
def power_all(nemesis: Nemesis) -> Undo | None:
    nemesis.say("power loss of all daemons")
    for process in nemesis.cluster.daemons:
        process.lose_power()
    return partial(nemesis.start_all, nemesis.cluster.daemons)


@fault
def power_while_starting(nemesis: Nemesis) -> Undo | None:
    """Loses its power now, and again after a few steps of its start."""
    process = nemesis.some_process()
    if process is None:
        return None
    nemesis.say(f"power loss of {process.host}, and again while it starts")
    process.lose_power()
    process.power_lasts_steps = nemesis.rng.randint(0, 40)

    def start_twice() -> None:
        nemesis.start_process(process)
        nemesis.cluster.world.scheduler.after(draw(nemesis.rng, RESTART_S), nemesis.start_process, process)

    return start_twice


@fault
def power_while_writing(nemesis: Nemesis) -> Undo | None:
    """The power goes in the midst of one of the next changes of the disk."""
    process = nemesis.some_process()
    if process is None or process.disk is None:
        return None
    disk = process.disk
    disk.power_lasts_steps = nemesis.rng.randint(0, 8)
    nemesis.say(f"power loss of {process.host} after {disk.power_lasts_steps} steps")

    def undo() -> None:
        disk.power_lasts_steps = None
        nemesis.start_process(process)

    return undo


@fault
def restart_storm(nemesis: Nemesis) -> Undo | None:
    """Several processes of a group are killed and started again and again."""
    group = nemesis.some_group()
    nemesis.say(f"restart storm in {group.name}")
    at_s = 0.0
    for _ in range(nemesis.rng.randint(3, 10)):
        process = nemesis.rng.choice(group.processes)
        nemesis.later(at_s, process.kill if nemesis.rng.random() < 0.5 else process.lose_power)
        nemesis.cluster.world.scheduler.after(at_s + nemesis.rng.random() * 0.6, nemesis.start_process, process)
        at_s += nemesis.rng.random() * 0.8
    return partial(nemesis.start_all, group.processes)


@fault
def pause(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None or process.paused:
        return None
    nemesis.say(f"pause {process.host}")
    process.pause()
    return process.resume


@fault
def graceful_stop(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None:
        return None
    nemesis.say(f"stop {process.host}")
    process.stop()
    incarnation = process.incarnation
    scheduler = nemesis.cluster.world.scheduler

    def start_again() -> None:
        if process.running and process.incarnation == incarnation:  # it may take its time, above all if it is paused
            scheduler.after(STOPPING_POLL_S, start_again)
        else:
            nemesis.start_process(process)

    scheduler.after(draw(nemesis.rng, (0.5, 8.0)), start_again)
    return _nothing


@fault
def transfer(nemesis: Nemesis) -> Undo | None:
    """A leader is asked to hand over, to the best replica or a random one."""
    group = nemesis.some_group()
    leader = group.leader()
    if leader is None or leader.daemon is None or leader.loop is None or leader.daemon.replica is None:
        return None
    replica = leader.daemon.replica
    target = nemesis.rng.choice([None, *group.addresses])
    nemesis.say(f"{leader.host} hands over")

    def ask() -> None:
        try:
            replica.transfer(target)
        except RaftKVError:
            nemesis.say("the transfer is refused")
        else:
            nemesis.cluster.probes.hit("leadership transfer begun")

    leader.loop.post(ask)
    return _nothing


@fault
def slow_cpu(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None:
        return None
    slowness = nemesis.rng.choice((10.0, 50.0, 300.0))
    nemesis.say(f"{process.host} is {slowness:g} times slower")
    process.set_slowness(slowness)
    return partial(process.set_slowness, 1.0)


@fault
def kill_client(nemesis: Nemesis) -> Undo | None:
    workload = nemesis.cluster.workload
    number = nemesis.rng.randrange(len(workload.processes))
    if not workload.processes[number].running:
        return None
    nemesis.say(f"kill client {workload.processes[number].host}")
    workload.kill(number)
    nemesis.cluster.world.scheduler.after(draw(nemesis.rng, CLIENT_DOWN_S), workload.start, number)
    return _nothing


@fault
def forged_map(nemesis: Nemesis) -> Undo | None:
    """A client believes in an older map of this cluster that never was: other groups own its shards."""
    workload = nemesis.cluster.workload
    number = nemesis.rng.randrange(len(workload.processes))
    kv = workload.clients.get(number)
    shard_map = None if kv is None else kv._cluster.router._map
    if shard_map is None or kv is None or len(shard_map.groups) < 2 or not workload.processes[number].running:
        return None
    gids = sorted(shard_map.groups)
    neighbour = dict(zip(gids, [*gids[1:], gids[0]], strict=True))
    owners = tuple(neighbour.get(gid, gid) for gid in shard_map.owners)
    nemesis.say(f"client {workload.processes[number].host} asks the wrong groups")
    kv._cluster.router._map = ShardMap(shard_map.num - 1, owners, shard_map.groups)
    return _nothing


# ---- network


@fault
def isolate(nemesis: Nemesis) -> Undo | None:
    """A replica is cut off from everybody, or from its group only."""
    process = nemesis.some_process()
    if process is None:
        return None
    group = nemesis.cluster.group_of(process)
    others = group.hosts if nemesis.rng.random() < 0.5 else nemesis.cluster.all_hosts
    one_way = nemesis.rng.random() < 0.4
    inward = nemesis.rng.random() < 0.5
    nemesis.say(f"isolate {process.host}{' one way' if one_way else ''}")
    left, right = ([process.host], others) if not inward else (others, [process.host])
    return cut_between(nemesis.cluster.world.network, left, right, one_way=one_way)


@fault
def isolate_leader(nemesis: Nemesis) -> Undo | None:
    """The leader is cut off from its group; the clients still reach it."""
    group = nemesis.some_group()
    leader = group.leader()
    if leader is None:
        return None
    nemesis.say(f"isolate the leader {leader.host}")
    return cut_between(nemesis.cluster.world.network, [leader.host], group.hosts)


@fault
def partial_partition(nemesis: Nemesis) -> Undo | None:
    """Two replicas don't hear each other, both hear the others."""
    group = nemesis.some_group()
    if len(group.processes) < 2:
        return None
    one, other = nemesis.rng.sample(group.hosts, 2)
    one_way = nemesis.rng.random() < 0.4
    nemesis.say(f"cut {one} from {other}{' one way' if one_way else ''}")
    return cut_between(nemesis.cluster.world.network, [one], [other], one_way=one_way)


@fault
def split(nemesis: Nemesis) -> Undo | None:
    """All hosts, clients included, fall into two halves at random."""
    hosts = nemesis.cluster.all_hosts
    left = [host for host in hosts if nemesis.rng.random() < 0.5]
    right = [host for host in hosts if host not in left]
    nemesis.say(f"split {', '.join(left)} from the others")
    return cut_between(nemesis.cluster.world.network, left, right)


@fault
def ring(nemesis: Nemesis) -> Undo | None:
    """Every replica of a group is cut from the one across: each sees a majority, no two the same."""
    group = nemesis.some_group()
    hosts = group.hosts
    count = len(hosts)
    if count < 4:
        return None
    nemesis.say(f"majority ring in {group.name}")
    undos = [
        cut_between(nemesis.cluster.world.network, [hosts[i]], [hosts[(i + count // 2) % count]]) for i in range(count)
    ]

    def undo() -> None:
        for each in undos:
            each()

    return undo


@fault
def cut_controllers(nemesis: Nemesis) -> Undo | None:
    cluster = nemesis.cluster
    controllers = cluster.groups[0].hosts
    others = [host for host in cluster.all_hosts if host not in controllers]
    if nemesis.rng.random() < 0.5:
        others = [host for host in others if host.startswith("g")]
    nemesis.say("cut the controllers off")
    return cut_between(cluster.world.network, controllers, others)


@fault
def cut_client(nemesis: Nemesis) -> Undo | None:
    cluster = nemesis.cluster
    client = nemesis.rng.choice(cluster.workload.processes).host
    one_way = nemesis.rng.random() < 0.5
    nemesis.say(f"cut client {client}{' one way' if one_way else ''}")
    return cut_between(cluster.world.network, [client], [d.host for d in cluster.daemons], one_way=one_way)


@fault
def clog(nemesis: Nemesis) -> Undo | None:
    """Some links are slow."""
    network = nemesis.cluster.world.network
    hosts = nemesis.cluster.all_hosts
    pairs = [(a, b) for a in hosts for b in hosts if a != b and nemesis.rng.random() < 0.2]
    extra_s = nemesis.rng.choice((0.01, 0.05, 0.3, 1.0))
    nemesis.say(f"{len(pairs)} links are {extra_s:g} s slower")
    for a, b in pairs:
        network.link(a, b).extra_s = extra_s

    def undo() -> None:
        for a, b in pairs:
            network.link(a, b).extra_s = 0.0

    return undo


@fault
def late_answers(nemesis: Nemesis) -> Undo | None:
    """What a group tells its leader takes longer and longer; then the leader isn't heard any more."""
    cluster = nemesis.cluster
    network = cluster.world.network
    group = nemesis.some_group()
    leader = group.leader()
    if leader is None:
        return None
    followers = [host for host in group.hosts if host != leader.host]
    links = [network.link(host, leader.host) for host in followers]
    nemesis.say(f"answers to {leader.host} are late, and later it is not heard")
    mends: list[Undo] = []
    steps = 10
    over = False

    def slower(step: int) -> None:
        if over:
            return
        for link in links:
            link.extra_s = 0.2 * step
        if step < steps:
            cluster.world.scheduler.after(0.5, slower, step + 1)
        else:
            mends.append(cut_between(network, [leader.host], followers, one_way=True))

    def undo() -> None:
        nonlocal over
        over = True
        for link in links:
            link.extra_s = 0.0
        for mend in mends:
            mend()

    slower(1)
    return undo


@fault
def lossy(nemesis: Nemesis) -> Undo | None:
    """Some links lose segments, which arrive late then."""
    network = nemesis.cluster.world.network
    hosts = nemesis.cluster.all_hosts
    pairs = [(a, b) for a in hosts for b in hosts if a != b and nemesis.rng.random() < 0.3]
    loss = nemesis.rng.choice((0.02, 0.1, 0.3))
    nemesis.say(f"{len(pairs)} links lose {loss:.0%}")
    for a, b in pairs:
        network.link(a, b).loss = loss

    def undo() -> None:
        for a, b in pairs:
            network.link(a, b).loss = 0.0

    return undo


@fault
def reset(nemesis: Nemesis) -> Undo | None:
    """Some connections break, with what is under way on them."""
    network = nemesis.cluster.world.network
    connections = network.connections()
    if not connections:
        return None
    count = min(len(connections), nemesis.rng.choice((1, 3, 10)))
    nemesis.say(f"reset {count} connections")
    for transport in nemesis.rng.sample(connections, count):
        network.reset(transport)
    return _nothing


@fault
def half_open(nemesis: Nemesis) -> Undo | None:
    """Some connections go dead without a word."""
    network = nemesis.cluster.world.network
    connections = network.connections()
    if not connections:
        return None
    count = min(len(connections), nemesis.rng.choice((1, 3, 6)))
    nemesis.say(f"{count} connections are half-open")
    for transport in nemesis.rng.sample(connections, count):
        network.half_open(transport)
    return _nothing


@fault
def hostile_bytes(nemesis: Nemesis) -> Undo | None:
    """A stranger sends nonsense, alone or behind a proper hello: it costs the stranger its connection, no more."""
    cluster = nemesis.cluster
    process = nemesis.some_process()
    if process is None:
        return None
    rng = nemesis.rng
    data = rng.choice(
        (
            rng.randbytes(rng.randint(1, 2000)),
            (rng.randint(0, 1 << 32) % (1 << 32)).to_bytes(4, "big") + rng.randbytes(100),
            encode_hello(Hello.of_client(b"")) + rng.randbytes(rng.randint(1, 300)),
            encode_hello(Hello.of_client(b"")) + encode_request(1, rng.randint(0, 9), [rng.randbytes(20), -1, [[]]]),
            encode_hello(Hello.of_client(b""))[: rng.randint(1, 20)],
        )
    )
    host, port = process.host, process.options.address.rpartition(":")[2]
    nemesis.say(f"a stranger sends {len(data)} bytes of nonsense to {host}")
    cluster.probes.hit("hostile bytes sent")

    async def send() -> None:
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.create_connection(asyncio.Protocol, host, int(port))
        except OSError:
            return
        transport.write(data)
        await asyncio.sleep(5)
        transport.close()

    cluster.stranger(send)
    return _nothing


# ---- disks


@fault
def slow_disk(nemesis: Nemesis) -> Undo | None:
    process = nemesis.rng.choice(nemesis.cluster.daemons)
    process.media.slow_s = slow_s = nemesis.rng.choice((0.02, 0.1, 0.5))
    nemesis.say(f"the disk of {process.host} is {slow_s:g} s slower")

    def undo() -> None:
        process.media.slow_s = 0.0

    return undo


@fault
def stalled_disk(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None:
        return None
    process.media.stalled = True
    nemesis.say(f"the disk of {process.host} stalls")

    def undo() -> None:
        process.media.stalled = False

    return undo


@fault
def failing_sync(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None or process in nemesis._damaged:
        return None
    process.media.failing = errno.EIO
    process.excuses += 1
    nemesis.say(f"the next sync of {process.host} fails")

    def undo() -> None:
        process.media.failing = None
        nemesis.excused(process)

    return undo


@fault
def full_disk(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None or process in nemesis._damaged:
        return None
    process.media.capacity_bytes = process.media.used_bytes() + nemesis.rng.choice((0, 5_000, 50_000))
    process.excuses += 1
    nemesis.say(f"the disk of {process.host} is almost full")

    def undo() -> None:
        process.media.capacity_bytes = None
        nemesis.excused(process)

    return undo


@fault
def stalled_engine(nemesis: Nemesis) -> Undo | None:
    """The storage engine takes no writes for a while."""
    process = nemesis.some_process()
    if process is None:
        return None
    process.engine_stalls = True
    nemesis.say(f"the engine of {process.host} stalls")

    def undo() -> None:
        process.engine_stalls = False

    return undo


@fault
def wiped_disk(nemesis: Nemesis) -> Undo | None:
    """A replica comes back with an empty disk; later its own is put in again."""
    process = nemesis.undamaged_victim()
    if process is None:
        return None
    nemesis.say(f"{process.host} starts with an empty disk")
    nemesis.damage(process)
    process.lose_power()
    before = process.media.replace(None)
    unflushed = process.backing.unflushed
    process.backing.unflushed = {}
    process.start()

    def undo() -> None:
        process.lose_power()
        process.media.replace(before)
        process.backing.unflushed = unflushed
        nemesis.repaired(process)

    return undo


JUDGED_S = 2.0
"""So long after a replica has come back its leader has told it whether it may stay."""


@fault
def old_disk(nemesis: Nemesis) -> Undo | None:
    """A follower comes back with what its disk held some time ago; later with its own again.

    Its leader knows what it had acknowledged, and refuses it. Nobody knows once that leader is gone, so
    this one is for scenarios in which leaders stay.
    """
    victim = nemesis.undamaged_victim()
    if victim is None or not victim.running:
        return None
    leader = nemesis.cluster.group_of(victim).leader()
    if leader is None or leader is victim:
        return None
    process = victim
    nemesis.say(f"a copy is made of the disk of {process.host}")
    nemesis.damage(process)
    old = process.media.copy()
    before: list[Directory] = []
    unflushed: list[dict[str, list[Write]]] = []
    scheduler = nemesis.cluster.world.scheduler
    judged_at_s = 0.0

    def bring_back() -> None:
        nonlocal judged_at_s
        judged_at_s = scheduler.now + JUDGED_S
        nemesis.say(f"{process.host} starts with its old disk")
        process.lose_power()
        before.append(process.media.replace(old))
        unflushed.append(process.backing.unflushed)
        process.backing.unflushed = {}
        nemesis.cluster.invariants_of(process).forget(process.options.replica)
        process.start()

    nemesis.later(draw(nemesis.rng, (0.1, 3.0)), bring_back)

    def undo() -> None:
        if before and process.exit_text is None and scheduler.now < judged_at_s:
            scheduler.after(judged_at_s - scheduler.now, undo)
            return
        if not before or process.exit_text is None:
            # Nothing that counts had come since the copy was made: it serves as well as the original.
            nemesis.excused(process)
            nemesis._damaged.pop(process, None)
            nemesis.start_process(process)
            return
        process.lose_power()
        process.media.replace(before[0])
        process.backing.unflushed = unflushed[0]
        nemesis.cluster.invariants_of(process).forget(process.options.replica)
        for other in nemesis.cluster.group_of(process).processes:
            other.kill()  # a leader that has refused a replica goes on to, until it is started again
            nemesis.start_process(other)
        nemesis.repaired(process)

    return undo


@fault
def flipped_bit(nemesis: Nemesis) -> Undo | None:
    """A bit on the disk of a replica that is down has changed when it starts; later it is set right."""
    process = nemesis.undamaged_victim()
    if process is None:
        return None
    process.lose_power()
    place = damageable(process, nemesis.rng)
    nemesis.damage(process)
    if place is None:
        nemesis.repaired(process)
        return None
    path, file, offset = place
    flip = process.media.flip(file, offset, nemesis.rng.randrange(8))
    nemesis.say(f"a bit of {process.host} flips, in {path} at {offset}")
    process.start()

    def undo() -> None:
        process.lose_power()
        process.media.undo(flip)
        nemesis.repaired(process)

    return undo


def damageable(process: DaemonProcess, rng: random.Random) -> tuple[str, MediaFile, int] | None:
    """A place in data that matters: the engine's state, or the log before its last batch.

    Damage to a log's last batch can't be told from a torn write: no log on one disk can.
    """
    files = process.media.files()
    states = [(path, file) for path, file in files if path.endswith(f"/{STATE_FILE}") and "/engine/" in path]
    if states and rng.random() < 0.3:
        path, file = rng.choice(states)
        return path, file, rng.randrange(len(file.content))
    batches = [
        (path, file, at)
        for path, file in files
        if path.endswith(".wal")
        for at in range(BLOCK_BYTES, len(file.content), BLOCK_BYTES)
        if file.content.startswith(BATCH_MAGIC, at)
    ]
    if len(batches) < 2:
        return None
    path, file, at = rng.choice(batches[:-1])
    return path, file, at + rng.randrange(BATCH_HEADER_BYTES)


@fault
def flipped_snapshot(nemesis: Nemesis) -> Undo | None:
    """A bit flips in the next snapshot that some replica makes or receives; nobody may take it for good."""
    group = nemesis.some_group()
    over = False
    nemesis.say(f"a bit of the next snapshot in {group.name} is to flip")

    def look() -> None:
        if over:
            return
        for process in group.processes:
            for path, file in process.media.files():
                if ("/checkpoints/" in path or "/incoming/" in path) and file.content and file.content == file.durable:
                    process.media.flip(file, nemesis.rng.randrange(len(file.content)), nemesis.rng.randrange(8))
                    nemesis.say(f"a bit of {process.host} flips, in {path}")
                    nemesis.cluster.probes.hit("snapshot damaged")
                    return
        nemesis.cluster.world.scheduler.after(0.002, look)

    look()

    def undo() -> None:
        nonlocal over
        over = True

    return undo


# ---- the map


@fault
def join(nemesis: Nemesis) -> Undo | None:
    """A group that isn't in the map joins it."""
    return _change_map(nemesis, "join")


@fault
def leave(nemesis: Nemesis) -> Undo | None:
    """Groups leave the map; when all of them are to, they are refused or come back."""
    return _change_map(nemesis, "leave")


@fault
def move(nemesis: Nemesis) -> Undo | None:
    """A shard moves to a group, or two between two groups, there and back."""
    return _change_map(nemesis, "move")


def _change_map(nemesis: Nemesis, kind: str) -> Undo:
    cluster, rng = nemesis.cluster, random.Random(nemesis.rng.getrandbits(64))
    nemesis.say(f"the map changes: {kind}")

    async def main() -> None:
        controllers = Controllers(cluster.controllers, timeout_s=MAP_TIMEOUT_S, rng=rng)
        try:
            await _apply_change(cluster, controllers, kind, rng)
            cluster.probes.hit(f"map changed by {kind}")
        except RaftKVError:
            cluster.probes.hit("map not changed")
        await controllers.close()

    cluster.stranger(main)
    return _nothing


async def _apply_change(cluster: Cluster, controllers: Controllers, kind: str, rng: random.Random) -> None:
    latest = await controllers.query()
    members = list(latest.groups)
    absent = [group for group in cluster.groups if group.gid and group.gid not in latest.groups]
    if kind == "join" and absent:
        groups = rng.sample(absent, rng.randint(1, len(absent)))
        await controllers.join({group.gid: list(group.addresses.values()) for group in groups})
    elif kind == "leave" and members:
        try:
            await controllers.leave(rng.sample(members, rng.randint(1, len(members))))
        except LastGroup:
            cluster.probes.hit("last group stayed")
        finally:
            await _come_back(cluster, controllers, {gid: latest.groups[gid] for gid in members})
    elif kind == "move" and len(members) > 1:
        one, other = rng.sample(members, 2)
        held = [latest.shards_of(one), latest.shards_of(other)]
        for shards, gid in zip(held, (other, one), strict=True):
            if shards:
                await controllers.move(rng.choice(shards), gid)


async def _come_back(cluster: Cluster, controllers: Controllers, groups: dict[int, tuple[str, ...]]) -> None:
    """A cluster that was empty for a moment has no groups now: its clients would wait for ever."""
    while True:
        try:
            if (await controllers.query()).groups:
                return
            await controllers.join(groups)
            cluster.probes.hit("last group came back")
        except RaftKVError:
            await asyncio.sleep(0.2)


@fault
def kill_at_handover(nemesis: Nemesis) -> Undo | None:
    """For a while the leader of a group dies, one at a time, when the entry by which a shard arrives has just come to
    another replica, and the others' disks are slow then: its successor begins while that entry is neither committed
    nor lost."""
    cluster, rng = nemesis.cluster, random.Random(nemesis.rng.getrandbits(64))
    ends: list[Undo] = []
    over = False
    nemesis.say("leaders to whom a shard arrives are to die")

    def look() -> None:
        if over:
            return
        for group in cluster.serving_groups:
            leader = group.leader()
            others = [process for process in group.processes if process is not leader]
            if leader is not None and any(map(_about_to_install, others)):
                strike(leader, others)
                return
        cluster.world.scheduler.after(HANDOVER_LOOK_S, look)

    def strike(leader: DaemonProcess, others: list[DaemonProcess]) -> None:
        slow_s = draw(rng, HANDOVER_SLOW_S)
        nemesis.say(f"kill {leader.host}, to which a shard arrives; the others' disks are {slow_s:.3f} s slower")
        leader.kill()
        for other in others:
            other.media.slow_s = slow_s

        def end() -> None:
            for other in others:
                other.media.slow_s = 0.0
            nemesis.start_process(leader)

        def end_and_look() -> None:
            if not over:
                ends.pop()()
                look()

        ends.append(end)
        nemesis.later(draw(rng, HANDOVER_LASTS_S), end_and_look)

    def undo() -> None:
        nonlocal over
        over = True
        for end in ends:
            end()

    look()
    return undo


@fault
def late_release(nemesis: Nemesis) -> Undo | None:
    """For a while every release that one group asks of another is heard a second time, seconds later, as from a
    connection that hung: the shard may be back by then."""
    cluster, rng = nemesis.cluster, random.Random(nemesis.rng.getrandbits(64))
    seen: set[tuple[int, int, int]] = set()
    over = False
    nemesis.say("releases of shards are heard twice")

    def look() -> None:
        if over:
            return
        for group in cluster.serving_groups:
            leader = group.leader()
            daemon = leader.daemon if leader is not None else None
            if daemon is None or daemon.replica is None or daemon._store is None:
                continue
            machine = daemon.replica.machine
            assert isinstance(machine, KvMachine)
            hello = named_client(daemon.options, daemon._store)()
            for shard, config_num, source in machine.releases():
                if (shard, config_num, group.gid) not in seen:
                    seen.add((shard, config_num, group.gid))
                    body = ShardBody(ShardOp.RELEASE, shard, group.gid, config_num)
                    nemesis.later(draw(rng, LATE_RELEASE_S), partial(_ask_again, cluster, hello, source, body))
        cluster.world.scheduler.after(LATE_RELEASE_LOOK_S, look)

    def undo() -> None:
        nonlocal over
        over = True

    look()
    return undo


def _ask_again(cluster: Cluster, hello: Hello, gid: int, body: ShardBody) -> None:
    group = next(group for group in cluster.groups if group.gid == gid)

    async def main() -> None:
        calls = GroupCalls(lambda: hello)
        with suppress(RaftKVError):
            await calls.ask(gid, list(group.addresses.values()), Verb.SHARD, encode_shard_body(body))
        calls.close()

    cluster.stranger(main)


@fault
def crash_at_step(nemesis: Nemesis) -> Undo | None:
    """The next process of a group or of the coordinators that comes by a certain step of a transaction dies there."""
    names = _steps_of(nemesis)
    if names is None:
        return None
    group, name = names
    rng = random.Random(nemesis.rng.getrandbits(64))
    nemesis.say(f"whoever of {group.name} comes by {name!r} dies there")
    came = False

    def die(process: DaemonProcess) -> float:
        nonlocal came
        if came:
            return 0.0
        came = True
        nemesis.say(f"{process.host} dies: {name}")
        nemesis.cluster.probes.hit(f"died: {name}")
        nemesis.later(draw(rng, RESTART_S), partial(nemesis.start_process, process))
        if rng.random() < 0.3:
            process.lose_power()
        else:
            process.kill()
        raise ProcessEnded

    return _arm(group, name, die)


@fault
def stall_at_step(nemesis: Nemesis) -> Undo | None:
    """Those of a group or of the coordinators that come by a certain step of a transaction stop there for a while."""
    names = _steps_of(nemesis)
    if names is None:
        return None
    group, name = names
    rng = random.Random(nemesis.rng.getrandbits(64))
    nemesis.say(f"whoever of {group.name} comes by {name!r} stops there")
    left = rng.randint(1, 5)

    def stop(process: DaemonProcess) -> float:
        nonlocal left
        if left == 0:
            return 0.0
        left -= 1
        nemesis.cluster.probes.hit(f"stalled: {name}")
        return draw(rng, STEP_STALL_S)

    return _arm(group, name, stop)


def _steps_of(nemesis: Nemesis) -> tuple[Group, str] | None:
    coordinators = nemesis.cluster.coordinators
    if coordinators is None:
        return None
    name = nemesis.rng.choice(failpoints.NAMES)
    if name.startswith("coordinator"):
        return coordinators, name
    return nemesis.rng.choice(nemesis.cluster.serving_groups), name


def _arm(group: Group, name: str, act: Callable[[DaemonProcess], float]) -> Undo:
    for process in group.processes:
        process.failpoints.arm(name, partial(act, process))

    def undo() -> None:
        for process in group.processes:
            process.failpoints.disarm(name)

    return undo


def _about_to_install(process: DaemonProcess) -> bool:
    """Whether its log ends with an entry by which a shard arrives, and it has not applied that."""
    replica = process.daemon.replica if process.running and process.daemon is not None else None
    if replica is None or replica.raft.last_index <= replica.applied_index:
        return False
    entry = replica.raft.node.log.entry_at(replica.raft.last_index)
    return entry.kind == EntryKind.COMMANDS and any(c[0] == IMPORT_INSTALL for c in decode_commands(entry.data))


# ---- clocks


@fault
def clock_drift(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None:
        return None
    rate = nemesis.rng.choice((0.1, 0.5, 0.9, 1.1, 2.0))
    nemesis.say(f"the clock of {process.host} runs at {rate:g}")
    process.set_clock_rate(rate)
    return partial(process.set_clock_rate, 1.0)


@fault
def clock_jump(nemesis: Nemesis) -> Undo | None:
    process = nemesis.some_process()
    if process is None:
        return None
    forward_s = nemesis.rng.choice((0.2, 2.0, 30.0, 3600.0))
    nemesis.say(f"the clock of {process.host} jumps by {forward_s:g} s")
    process.jump_clock(forward_s)
    return _nothing


@fault
def clock_strobe(nemesis: Nemesis) -> Undo | None:
    """The clock jumps again and again."""
    process = nemesis.some_process()
    if process is None:
        return None
    nemesis.say(f"the clock of {process.host} strobes")
    for number in range(nemesis.rng.randint(5, 30)):
        nemesis.later(number * 0.1, partial(process.jump_clock, nemesis.rng.random() * 0.5))
    return _nothing


def _nothing() -> None:
    """There is nothing to undo."""
