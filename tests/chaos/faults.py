"""What can go wrong, one coroutine per kind: it breaks something, waits, mends it, and says what it did.

A fault leaves nothing behind but what the store has to live with. Names are those of the simulator's scenarios where
both have the fault. `PROCESS` faults touch processes and disks and run one at a time; `NETWORK` faults touch the proxy,
`MAP` faults change who owns which shard, and each of these kinds runs one at a time beside the others. A fault that
can't be had just now says nothing, and doesn't count.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raftkv.client.controllers import Controllers
from raftkv.daemons.failpoints import NAMES, VARIABLE
from raftkv.machines.balance import moves
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import RaftKVError
from tests.chaos.cluster import COORDINATORS, ChaosCluster, Daemon
from tests.chaos.proxy import CLIENT, Network

DOWN_S = (0.1, 3.0)
CUT_S = (1.0, 6.0)
PAUSE_S = (0.1, 10.0)
STALL_S = (0.2, 5.0)
STEP_S_MAX = 8.0
"""So long somebody may take to come by a step of a transaction."""
MAP_TIMEOUT_S = 15.0
ARRIVAL_S_MAX = 20.0
"""A change of the map counts as under way until its shards have arrived, or for so long."""
LOOK_S = 0.1
AT_A_MOVE_SHARE = 0.6
"""How many of the faults, while shards are moving, meet a group that they move from or to."""


@dataclass
class Scene:
    """What a fault acts on. `full_disk_victim` has a small disk of its own, if that could be mounted. `moving`: the
    groups that shards are just moving from or to, as far as is known."""

    cluster: ChaosCluster
    network: Network
    rng: random.Random
    full_disk_victim: Daemon | None = None
    moving: list[int] = field(default_factory=list)

    def any_gid(self) -> int:
        if self.moving and self.rng.random() < AT_A_MOVE_SHARE:
            return self.rng.choice(self.moving)
        return self.rng.choice([gid for gid in self.cluster.groups if gid > 0])

    def any_group(self) -> int:
        """Controllers and coordinators too."""
        return self.rng.choice([gid if gid <= 0 else self.any_gid() for gid in self.cluster.groups])

    async def leader(self, gid: int) -> Daemon:
        """The leader, or any replica if nobody leads just now."""
        found = await self.cluster.leader(gid)
        return found if found is not None else self.rng.choice(self.cluster.groups[gid])

    async def follower(self, gid: int) -> Daemon:
        leader = await self.cluster.leader(gid)
        return self.rng.choice([daemon for daemon in self.cluster.groups[gid] if daemon is not leader])

    async def linger(self, bounds: tuple[float, float]) -> float:
        """Wait for a time from the range, short ones as often as long ones."""
        low, high = bounds
        seconds: float = low * (high / low) ** self.rng.random()
        await asyncio.sleep(seconds)
        return seconds


Fault = Callable[[Scene], Awaitable[str]]

NEED_COORDINATORS = ("kill_coordinator_leader", "kill_coordinators", "pause_coordinator", "cut_coordinators")
"""Where there are none, these can't be had."""

PROCESS: dict[str, Fault] = {}
NETWORK: dict[str, Fault] = {}
MAP: dict[str, Fault] = {}


def process(fault: Fault) -> Fault:
    PROCESS[getattr(fault, "__name__", "")] = fault
    return fault


def network(fault: Fault) -> Fault:
    NETWORK[getattr(fault, "__name__", "")] = fault
    return fault


def of_the_map(fault: Fault) -> Fault:
    MAP[getattr(fault, "__name__", "")] = fault
    return fault


# ---- processes


async def _kill(scene: Scene, victims: Sequence[Daemon]) -> str:
    """SIGKILL them all, wait, start them all."""
    for victim in victims:
        victim.kill()
    down_s = await scene.linger(DOWN_S)
    order = scene.rng.sample(list(victims), len(victims))
    for victim in order:
        victim.start()
    for victim in order:
        await victim.ready()
    return f"SIGKILL {_names(victims)}, down for {down_s:.1f} s"


@process
async def kill_leader(scene: Scene) -> str:
    return await _kill(scene, [await scene.leader(scene.any_gid())])


@process
async def kill_follower(scene: Scene) -> str:
    return await _kill(scene, [await scene.follower(scene.any_gid())])


@process
async def kill_group(scene: Scene) -> str:
    return await _kill(scene, scene.cluster.groups[scene.any_gid()])


@process
async def kill_all_groups(scene: Scene) -> str:
    return await _kill(scene, scene.cluster.data_daemons)


@process
async def kill_controller_leader(scene: Scene) -> str:
    return await _kill(scene, [await scene.leader(0)])


@process
async def kill_controllers(scene: Scene) -> str:
    return await _kill(scene, scene.cluster.groups[0])


@process
async def kill_coordinator_leader(scene: Scene) -> str:
    return await _kill(scene, [await scene.leader(COORDINATORS)])


@process
async def kill_coordinators(scene: Scene) -> str:
    return await _kill(scene, scene.cluster.coordinators)


@process
async def kill_all(scene: Scene) -> str:
    return await _kill(scene, scene.cluster.daemons)


@process
async def restart_storm(scene: Scene) -> str:
    """One replica of every group is killed again and again, often while it still starts."""
    victims = [scene.rng.choice(group) for group in scene.cluster.groups.values()]
    turns = scene.rng.randint(3, 6)
    for _ in range(turns):
        for victim in victims:
            victim.kill()
            victim.start()
        await scene.linger((0.05, 2.0))
    for victim in victims:
        await victim.ready()
    return f"{turns} times SIGKILL and start at once of {_names(victims)}"


async def _pause(scene: Scene, victims: Sequence[Daemon]) -> str:
    for victim in victims:
        victim.pause()
    try:
        seconds = await scene.linger(PAUSE_S)
    finally:
        for victim in victims:
            victim.resume()
    return f"SIGSTOP {_names(victims)} for {seconds:.1f} s"


@process
async def pause_leader(scene: Scene) -> str:
    return await _pause(scene, [await scene.leader(scene.any_gid())])


@process
async def pause_follower(scene: Scene) -> str:
    return await _pause(scene, [await scene.follower(scene.any_gid())])


@process
async def pause_group(scene: Scene) -> str:
    return await _pause(scene, scene.cluster.groups[scene.any_gid()])


@process
async def pause_controller_leader(scene: Scene) -> str:
    return await _pause(scene, [await scene.leader(0)])


@process
async def pause_coordinator(scene: Scene) -> str:
    """Their leader, as a rule."""
    leader = await scene.leader(COORDINATORS)
    return await _pause(scene, [leader if scene.rng.random() < 0.7 else scene.rng.choice(scene.cluster.coordinators)])


@process
async def pause_some(scene: Scene) -> str:
    """Any replicas of any groups, majorities too."""
    daemons = scene.cluster.daemons
    return await _pause(scene, scene.rng.sample(daemons, scene.rng.randint(2, len(daemons) - 1)))


async def _stop(scene: Scene, victims: Sequence[Daemon]) -> str:
    await asyncio.gather(*(victim.stop_gracefully() for victim in victims))
    await scene.linger(DOWN_S)
    for victim in victims:
        victim.start()
    for victim in victims:
        await victim.ready()
    return f"SIGTERM {_names(victims)}"


@process
async def graceful_stop(scene: Scene) -> str:
    return await _stop(scene, [await scene.leader(scene.any_group())])


@process
async def rolling_restart(scene: Scene) -> str:
    """Each replica of a group in turn, without waiting for more than its readiness."""
    group = scene.cluster.groups[scene.any_group()]
    for victim in group:
        await victim.stop_gracefully()
        victim.start()
        await victim.ready()
    return f"SIGTERM and start, in turn, {_names(group)}"


@process
async def crash_at_step(scene: Scene) -> str:
    """Whoever of a group, or of the coordinators, comes by a step of a transaction dies there; perhaps the next
    leader too."""
    group, step = _at_a_step(scene, "crash")
    deadline_s = time.monotonic() + STEP_S_MAX
    while all(daemon.running for daemon in group) and time.monotonic() < deadline_s:
        await asyncio.sleep(LOOK_S)
    await scene.linger(DOWN_S)
    dead = [daemon for daemon in group if not daemon.running]
    await _kill(scene, group)
    return f"{_names(dead)} at '{step}', and SIGKILL {_names(group)}" if dead else ""


@process
async def stall_at_step(scene: Scene) -> str:
    """Whoever comes by a step of a transaction takes a while there."""
    low, high = STALL_S
    seconds = scene.rng.uniform(low, high)
    group, step = _at_a_step(scene, f"stall:{seconds:.1f}")
    await scene.linger((seconds, 2 * seconds + 1.0))
    await _kill(scene, group)
    return f"{_names(group)} for {seconds:.1f} s at '{step}', then SIGKILL"


def _at_a_step(scene: Scene, action: str) -> tuple[list[Daemon], str]:
    """SIGKILL and start all coordinators, or all of a group, so that each acts like that at a step of transactions; who
    was meant, and the step."""
    gid = scene.rng.choice([COORDINATORS, scene.any_gid()]) if scene.cluster.coordinators else scene.any_gid()
    step = scene.rng.choice([name for name in NAMES if name.startswith("group") == (gid > 0)])
    group = scene.cluster.groups[gid]
    for daemon in group:
        daemon.kill()
        daemon.start(environment={VARIABLE: f"{step}={action}"})
        daemon.wanted = False  # it may end by itself now
    return group, step


@process
async def full_disk(scene: Scene) -> str:
    """No byte is left on one replica's disk: it ends with one line, and comes back when there is room."""
    victim = scene.full_disk_victim
    if victim is None:
        return ""
    ballast = victim.data_dir.parent / "ballast"
    _fill(ballast)
    victim.wanted = False  # it may end by itself now
    try:
        for _ in range(100):
            _fill(ballast)  # what it has freed meanwhile, too
            if not victim.running:
                break
            await asyncio.sleep(0.1)
        ended = not victim.running
        log = victim.log_of_this_start()
        assert "Traceback" not in log, f"{victim.name} on a full disk: {log[-3000:]}"
        if ended:
            assert victim.popen is not None
            status = victim.popen.returncode
            assert status == 1, f"{victim.name} on a full disk exits {status}: {log[-2000:]}"
            victim.start()  # no room yet: it ends again, or starts with the room it has
            victim.wanted = False
            await asyncio.sleep(2.0)
    finally:
        ballast.unlink()
    if victim.running:
        victim.kill()
    victim.start()
    await victim.ready()
    return f"{victim.name} without a free byte: it " + ("ended" if ended else "went on")


def _fill(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                continue


# ---- the network


def _cut(scene: Scene, sources: Sequence[str], targets: Sequence[str], *, both: bool = True) -> None:
    for source in sources:
        for target in targets:
            if source != target:
                scene.network.cut(source, target)
                if both:
                    scene.network.cut(target, source)


async def _until_healed(scene: Scene, bounds: tuple[float, float] = CUT_S) -> str:
    """Put the changes into effect for a while; then all passes again, late bytes too, or connections are reset."""
    scene.network.changed()
    try:
        seconds = await scene.linger(bounds)
    finally:
        late = scene.rng.random() < 0.5
        if not late:
            names = [CLIENT, *(daemon.name for daemon in scene.cluster.daemons)]
            for source in names:
                for target in names:
                    if scene.network.flow(source, target).cut:
                        scene.network.reset_all(source, target)
                        scene.network.reset_all(target, source)
        scene.network.heal()
    return f"for {seconds:.1f} s" + (", then what was held arrives" if late else "")


def _all_names(scene: Scene) -> list[str]:
    return [CLIENT, *(daemon.name for daemon in scene.cluster.daemons)]


def _names_of(scene: Scene, gid: int) -> list[str]:
    return [daemon.name for daemon in scene.cluster.groups[gid]]


@network
async def isolate_leader(scene: Scene) -> str:
    leader = await scene.leader(scene.any_group())
    _cut(scene, [leader.name], _all_names(scene))
    return f"{leader.name} from all {await _until_healed(scene)}"


@network
async def leader_without_peers(scene: Scene) -> str:
    """Clients still reach it: what it answers now must not be stale."""
    gid = scene.any_group()
    leader = await scene.leader(gid)
    _cut(scene, [leader.name], _names_of(scene, gid))
    return f"{leader.name} from its peers {await _until_healed(scene)}"


@network
async def one_way_out(scene: Scene) -> str:
    gid = scene.any_group()
    leader = await scene.leader(gid)
    _cut(scene, [leader.name], _names_of(scene, gid), both=False)
    return f"{leader.name} is not heard by its peers {await _until_healed(scene)}"


@network
async def one_way_in(scene: Scene) -> str:
    gid = scene.any_group()
    leader = await scene.leader(gid)
    _cut(scene, _names_of(scene, gid), [leader.name], both=False)
    return f"{leader.name} does not hear its peers {await _until_healed(scene)}"


@network
async def isolate_follower(scene: Scene) -> str:
    follower = await scene.follower(scene.any_group())
    _cut(scene, [follower.name], _all_names(scene))
    return f"{follower.name} from all {await _until_healed(scene)}"


@network
async def partial_partition(scene: Scene) -> str:
    """Two don't see each other, everybody else sees both; the leader is one of them."""
    gid = scene.any_group()
    leader, other = await scene.leader(gid), await scene.follower(gid)
    _cut(scene, [leader.name], [other.name])
    return f"between {leader.name} and {other.name} {await _until_healed(scene)}"


@network
async def majority_ring(scene: Scene) -> str:
    """Each sees a majority, no two the same one; of three replicas, each is heard by the next one only."""
    gid = max(scene.cluster.groups, key=lambda gid: (len(scene.cluster.groups[gid]), scene.rng.random()))
    ring = scene.rng.sample(_names_of(scene, gid), len(scene.cluster.groups[gid]))
    count = len(ring)
    for place, name in enumerate(ring):
        if count >= 5:
            neighbours = {ring[(place + step) % count] for step in range(-(count // 4), count // 4 + 1)}
            _cut(scene, [name], [other for other in ring if other not in neighbours])
        else:
            _cut(scene, [name], [ring[place - 1]], both=False)
    return f"ring {' > '.join(ring)} {await _until_healed(scene)}"


@network
async def split(scene: Scene) -> str:
    """All nodes in two halves, clients in one of them."""
    names = _all_names(scene)
    scene.rng.shuffle(names)
    half = names[: scene.rng.randint(2, len(names) - 2)]
    _cut(scene, half, [name for name in names if name not in half])
    return f"between {', '.join(sorted(half))} and the others {await _until_healed(scene)}"


@network
async def cut_controllers(scene: Scene) -> str:
    """The groups and the coordinators don't reach the controllers; clients do."""
    others = [daemon.name for gid, group in scene.cluster.groups.items() if gid for daemon in group]
    _cut(scene, _names_of(scene, 0), others)
    return f"controllers from groups {await _until_healed(scene)}"


@network
async def cut_coordinators(scene: Scene) -> str:
    """One group, or all of them, and the coordinators don't see each other; clients see both."""
    groups = [gid for gid in scene.cluster.groups if gid > 0]
    cut = scene.rng.choice([groups, [scene.any_gid()]])
    _cut(scene, _names_of(scene, COORDINATORS), [name for gid in cut for name in _names_of(scene, gid)])
    return f"coordinators from {_groups(cut)} {await _until_healed(scene)}"


@network
async def cut_client(scene: Scene) -> str:
    """From everybody, from the controllers, or from one group."""
    targets = scene.rng.choice([_all_names(scene), *(_names_of(scene, gid) for gid in scene.cluster.groups)])
    _cut(scene, [CLIENT], targets)
    return f"clients from {len(targets)} nodes {await _until_healed(scene)}"


@network
async def lost_answers(scene: Scene) -> str:
    """Requests arrive, answers don't."""
    gid = scene.any_gid()
    _cut(scene, _names_of(scene, gid), [CLIENT], both=False)
    return f"from group {gid} to clients {await _until_healed(scene)}"


@network
async def half_open(scene: Scene) -> str:
    """Connections to and from one leader stay open, and what is sent on them is lost."""
    leader = await scene.leader(scene.any_group())
    for name in _all_names(scene):
        if name != leader.name:
            scene.network.flow(name, leader.name).swallow = True
            scene.network.flow(leader.name, name).swallow = True
    return f"{leader.name} swallows and is swallowed {await _until_healed(scene)}"


@network
async def refuse(scene: Scene) -> str:
    """A partition by RST, as firewalls make it."""
    leader = await scene.leader(scene.any_gid())
    for name in _all_names(scene):
        if name != leader.name:
            scene.network.flow(name, leader.name).refuse = True
            scene.network.flow(leader.name, name).refuse = True
    return f"{leader.name} reset by all {await _until_healed(scene)}"


async def _resets(scene: Scene, kind: str) -> str:
    """Requests of clients, and messages between replicas, meet a reset now and then."""
    names = [daemon.name for daemon in scene.cluster.daemons]
    for target in names:
        setattr(scene.network.flow(CLIENT, target), kind, 0.2)
        for source in names:
            setattr(scene.network.flow(source, target), kind, 0.01)
    return f"everywhere {await _until_healed(scene)}"


@network
async def reset_before(scene: Scene) -> str:
    return await _resets(scene, "reset_before")


@network
async def reset_midway(scene: Scene) -> str:
    return await _resets(scene, "reset_midway")


@network
async def reset_after(scene: Scene) -> str:
    return await _resets(scene, "reset_after")


@network
async def reset_at_answer(scene: Scene) -> str:
    return await _resets(scene, "reset_at_answer")


@network
async def delay(scene: Scene) -> str:
    """Every hop takes its time, some more than others."""
    names = _all_names(scene)
    for source in names:
        for target in names:
            scene.network.flow(source, target).delay_s = 0.001 * 100 ** scene.rng.random()
    return f"1–100 ms everywhere {await _until_healed(scene)}"


@network
async def trickle(scene: Scene) -> str:
    """One node's links in both directions are as good as clogged."""
    leader = await scene.leader(scene.any_group())
    bytes_per_s = scene.rng.choice([200.0, 2_000.0, 20_000.0])
    for name in _all_names(scene):
        scene.network.flow(name, leader.name).bytes_per_s = bytes_per_s
        scene.network.flow(leader.name, name).bytes_per_s = bytes_per_s
    return f"{leader.name} at {bytes_per_s:g} bytes/s {await _until_healed(scene)}"


@network
async def cut_groups(scene: Scene) -> str:
    """Two groups don't see each other; clients, and the controllers, see both."""
    one = scene.any_gid()
    others = [gid for gid in scene.cluster.groups if gid > 0 and gid != one]
    other = scene.rng.choice([gid for gid in scene.moving if gid != one] or others)
    _cut(scene, _names_of(scene, one), _names_of(scene, other))
    return f"between groups {one} and {other} {await _until_healed(scene)}"


# ---- the map

Change = Callable[[Scene, Controllers, ShardMap], Awaitable[str]]


async def _change_map(scene: Scene, change: Change) -> str:
    """Half of the time go on when the shards that it moves have arrived, else at once: so the next change meets them on
    their way. One that is refused, or whose fate nobody knows, is a change too."""
    try:
        async with Controllers(scene.cluster.controller_addresses, timeout_s=MAP_TIMEOUT_S) as controllers:
            before = await controllers.query()
            text = await change(scene, controllers, before)
            if not text:
                return ""
            after = await controllers.query()
    except RaftKVError as error:
        return f"{type(error).__name__}: {error}"
    moved = moves(before.owners, after.owners)
    scene.moving = sorted({gid for _, *ends in moved for gid in ends if gid})
    text = f"{text}: configuration {after.num}, {len(moved)} shards move"
    if scene.rng.random() < 0.5:
        return f"{text}; {await _arrival(scene, [(shard, gid) for shard, _, gid in moved])}"
    await scene.linger((0.02, 2.0))
    return text


async def _arrival(scene: Scene, awaited: Sequence[tuple[int, int]]) -> str:
    """Until each of the shards has been seen at its new group; other changes may have sent it elsewhere meanwhile."""
    began_s = time.monotonic()
    missing = set(awaited)
    while missing and time.monotonic() < began_s + ARRIVAL_S_MAX:
        gids = sorted({gid for _, gid in missing})
        asked = [daemon.status_now() for gid in gids for daemon in scene.cluster.groups[gid]]
        for report in await asyncio.gather(*asked):
            if report is not None:
                missing -= {(shard, report["gid"]) for shard, state in report["shards"] if state == "serving"}
        await asyncio.sleep(LOOK_S)
    scene.moving = []
    took_s = time.monotonic() - began_s
    return f"{len(missing)} not there after {took_s:.1f} s" if missing else f"there after {took_s:.1f} s"


@of_the_map
async def join(scene: Scene) -> str:
    """One or more of the groups that aren't in the map."""

    async def change(scene: Scene, controllers: Controllers, latest: ShardMap) -> str:
        absent = [gid for gid in scene.cluster.groups if gid > 0 and gid not in latest.groups]
        if not absent:
            return ""
        gids = scene.rng.sample(absent, scene.rng.randint(1, len(absent)))
        await controllers.join({gid: scene.cluster.addresses_of(gid) for gid in gids})
        return f"of {_groups(gids)}"

    return await _change_map(scene, change)


@of_the_map
async def leave(scene: Scene) -> str:
    """One or more groups, never all of them."""

    async def change(scene: Scene, controllers: Controllers, latest: ShardMap) -> str:
        members = list(latest.groups)
        if len(members) < 2:
            return ""
        gids = scene.rng.sample(members, scene.rng.randint(1, len(members) - 1))
        await controllers.leave(gids)
        return f"of {_groups(gids)}"

    return await _change_map(scene, change)


@of_the_map
async def move(scene: Scene) -> str:
    """One shard from each of two groups to the other."""

    async def change(scene: Scene, controllers: Controllers, latest: ShardMap) -> str:
        members = list(latest.groups)
        if len(members) < 2:
            return ""
        one, other = scene.rng.sample(members, 2)
        moved = []
        for source, target in ((one, other), (other, one)):
            if shards := latest.shards_of(source):
                moved.append(scene.rng.choice(shards))
                await controllers.move(moved[-1], target)
        return f"of {' and '.join(map(str, moved))} between groups {one} and {other}"

    return await _change_map(scene, change)


def _groups(gids: Sequence[int]) -> str:
    return f"group{'s' * (len(gids) > 1)} {', '.join(map(str, sorted(gids)))}"


# ---- a small disk


def mount_small_disk(daemon: Daemon, megabytes: int) -> str:
    """Put the daemon's data directory on a tmpfs; "" or the reason why that can't be. Before its first start."""
    where = daemon.data_dir.parent / f"{daemon.data_dir.name}.mount"
    if os.geteuid() != 0:
        return "mounting a small disk needs root"
    where.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(where)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"mount: {error}"
    if result.returncode != 0:
        return result.stderr.strip() or "mount failed"
    daemon.data_dir = where / "data"
    return ""


def unmount_small_disk(daemon: Daemon) -> None:
    subprocess.run(["umount", "-l", str(daemon.data_dir.parent)], capture_output=True, timeout=20, check=False)


def _names(daemons: Sequence[Daemon]) -> str:
    return ", ".join(daemon.name for daemon in daemons)
