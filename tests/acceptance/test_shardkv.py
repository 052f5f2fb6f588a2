"""The sharded scenarios of the course: groups join and leave, shards move, everything stays served and right.

The course's groups 100, 101, 102 are 1, 2, 3 here. A "round" is: for every key, Get must give what is expected, then
Append. What clerks do is a history, so every scenario ends with the check that it is linearizable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from raftkv.machines.kv import APPEND, KvMachine
from raftkv.machines.shard_states import ShardState
from raftkv.machines.slots import shard_of
from raftkv.protocol.errors import RaftKVError, Timeout
from raftkv.sim.cluster import Group, shards_of
from raftkv.sim.process import DaemonProcess
from tests.acceptance.kv_rig import Clerk, Rig, seeds
from tests.acceptance.rigs import Raw, Task

SETTLE_S = 20.0


class ShardedRig(Rig):
    """One controller and three groups of three, none of which has joined; `values` are what the keys must hold."""

    def __init__(self, seed: int, *, unreliable: bool = False, max_raft_state: int = -1) -> None:
        super().__init__(3, seed, groups=3, join=False, unreliable=unreliable, max_raft_state=max_raft_state)
        self.admin = self.clerk()
        self.values: dict[bytes, bytes] = {}

    def group_of(self, gid: int) -> Group:
        return self.cluster.groups[gid]

    def join_gids(self, *gids: int) -> None:
        self.admin.do(self.admin.controllers.join({gid: list(self.group_of(gid).addresses.values()) for gid in gids}))

    def leave(self, *gids: int) -> None:
        self.admin.do(self.admin.controllers.leave(gids))

    def put_keys(self, clerk: Clerk, count: int, size_bytes: int = 5) -> None:
        for number in range(count):
            key, value = b"%d" % number, self.rng.randbytes(size_bytes)
            clerk.do(clerk.put(key, value))
            self.values[key] = value

    def round(self, clerk: Clerk, append: bool = True) -> None:
        for key in self.values:
            found = clerk.do(clerk.get(key))
            assert found is not None and found.value == self.values[key], f"seed {self.seed}: {key!r}"
            if append:
                clerk.do(clerk.append(key, b"+%d" % len(self.values[key])))
                self.values[key] += b"+%d" % len(self.values[key])

    def stop_groups(self, *gids: int) -> None:
        for gid in gids:
            for process in self.group_of(gid).processes:
                if process.running:
                    self.crash(process)

    def start_groups(self, *gids: int) -> None:
        for gid in gids:
            for process in self.group_of(gid).processes:
                process.start()

    def settle(self, within_s: float = SETTLE_S) -> None:
        """Until every shard is where it belongs, and nowhere else."""
        self.cluster.joined = True
        self.wait_until(lambda: self.cluster.trouble() is None, "end of the moves", within_s)
        assert self.cluster.left_behind() is None

    def machine(self, gid: int) -> KvMachine:
        return shards_of(self.leader(self.group_of(gid)))

    def keys_at(self, gid: int) -> list[bytes]:
        latest = self.admin.do(self.admin.controllers.query())
        return [key for key in self.values if latest.owner(shard_of(key, latest.shards)) == gid]

    def appenders(self, count: int, pause_s: float) -> tuple[list[Task[int]], list[bool]]:
        """Clerks that append to a key of their own until told; each append must be there once, in order."""
        stop: list[bool] = []

        async def append(clerk: Clerk, key: bytes) -> int:
            done = 0
            while not stop:
                await clerk.append(key, b"x %d y" % done)
                done += 1
                await asyncio.sleep(pause_s)
            return done

        tasks = [clerk.spawn(append(clerk, b"%d" % n)) for n, clerk in enumerate(self.clerks_of(count))]
        return tasks, stop

    def check_appends(self, tasks: Sequence[Task[int]], stop: list[bool]) -> None:
        stop.append(True)
        self.finish_all(tasks, 60)
        for number, task in enumerate(tasks):
            found = self.admin.do(self.admin.get(b"%d" % number))
            expected = b"".join(b"x %d y" % n for n in range(task.result))
            assert (found.value if found is not None else b"") == expected


@seeds(2, 8)
def test_5a_static_shards(seed: int) -> None:
    """With one group stopped, exactly the keys of the other are answered."""
    with ShardedRig(seed) as rig:
        rig.join_gids(1, 2)
        rig.put_keys(rig.admin, 10)
        rig.stop_groups(2)
        served = set(rig.keys_at(1))
        tasks = {key: clerk.spawn(clerk.get(key)) for key, clerk in zip(rig.values, rig.clerks_of(10), strict=True)}
        rig.sleep(2.0)
        assert {key for key, task in tasks.items() if task.done} == served
        assert 0 < len(served) < 10
        rig.start_groups(2)
        rig.finish_all(list(tasks.values()), 10)


@seeds(2, 8)
def test_5b_join_leave(seed: int) -> None:
    """After group 1 has left and its shards have moved, it isn't needed any more."""
    with ShardedRig(seed) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 10)
        rig.join_gids(2)
        rig.round(rig.admin)
        rig.leave(1)
        rig.round(rig.admin)
        rig.settle()
        rig.stop_groups(1)
        rig.round(rig.clerk(), append=False)
        rig.start_groups(1)
        rig.wait_equal()


@seeds(2, 8)
def test_5b_snapshots(seed: int) -> None:
    with ShardedRig(seed, max_raft_state=1000) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 30, 20)
        rig.join_gids(2)
        rig.join_gids(3)
        rig.leave(1)
        rig.round(rig.admin)
        rig.leave(2)
        rig.join_gids(1)
        rig.round(rig.admin)
        rig.settle()
        rig.stop_groups(1, 2, 3)
        rig.sleep(1.0)
        rig.start_groups(1, 2, 3)
        rig.round(rig.clerk(), append=False)
        rig.settle()


@seeds(2, 8)
def test_5b_missed_changes(seed: int) -> None:
    """A replica of each group sleeps through several configurations, and takes them in order afterwards."""
    with ShardedRig(seed, max_raft_state=1000) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 10)
        rig.join_gids(2)

        def without(number: int) -> list[DaemonProcess]:
            missing = [group.processes[number] for group in rig.cluster.groups[1:]]
            for process in missing:
                rig.crash(process)
            return missing

        missing = without(0)
        rig.join_gids(3)
        rig.leave(2)
        rig.leave(1)
        rig.round(rig.admin)
        rig.join_gids(2)
        rig.round(rig.admin)
        for process in missing:
            process.start()
        rig.round(rig.admin)
        rig.sleep(2.0)
        missing = without(1)
        rig.join_gids(1)
        rig.leave(3)
        rig.round(rig.admin)
        for process in missing:
            process.start()
        rig.round(rig.clerk(), append=False)
        rig.settle()


@seeds(1, 9)
def test_5b_concurrent_1(seed: int) -> None:
    """All groups stop one by one while shards move; every append is there once."""
    with ShardedRig(seed, max_raft_state=100) as rig:
        rig.join_gids(1)
        tasks, stop = rig.appenders(10, 0.01)
        rig.sleep(0.15)
        rig.join_gids(2)
        rig.sleep(0.5)
        rig.join_gids(3)
        rig.sleep(0.5)
        rig.leave(1)
        rig.sleep(0.5)
        for gid in (1, 2, 3):
            rig.stop_groups(gid)
            rig.sleep(0.1)
        rig.leave(3)
        rig.start_groups(1, 2, 3)
        rig.sleep(0.1)
        rig.join_gids(1)
        rig.leave(2)
        rig.sleep(0.5)
        rig.join_gids(2)
        rig.sleep(1.0)
        rig.check_appends(tasks, stop)
        rig.settle()


@seeds(1, 9)
def test_5b_concurrent_2(seed: int) -> None:
    """Three full rotations of ownership; two of the groups stop for a second."""
    with ShardedRig(seed) as rig:
        rig.join_gids(1)
        tasks, stop = rig.appenders(10, 0.05)
        for joining, leaving in [((2,), (1,)), ((3,), (2,)), ((1,), (3,))]:
            rig.join_gids(*joining)
            rig.leave(*leaving)
            rig.sleep(3.0)
        rig.stop_groups(2, 3)
        rig.sleep(1.0)
        rig.start_groups(2, 3)
        rig.sleep(2.0)
        rig.check_appends(tasks, stop)
        rig.settle()


@pytest.mark.parametrize("max_raft_state", [300, -1])
@seeds(0, 3)
def test_5b_concurrent_3(seed: int, max_raft_state: int) -> None:
    """Appends flat out, while groups join, all stop, start, and leave."""
    with ShardedRig(seed, max_raft_state=max_raft_state) as rig:
        rig.join_gids(1)
        tasks, stop = rig.appenders(10, 0.002)
        started_s = rig.now
        while rig.now < started_s + 12:
            rig.join_gids(3)
            rig.join_gids(2)
            rig.sleep(rig.rng.random() * 0.9)
            rig.stop_groups(1, 2, 3)
            rig.start_groups(1, 2, 3)
            rig.sleep(rig.rng.random() * 0.9)
            rig.leave(2)
            rig.leave(3)
            rig.sleep(rig.rng.random() * 0.9)
        rig.sleep(2.0)
        rig.check_appends(tasks, stop)
        rig.settle()


@seeds(2, 8)
def test_5b_unreliable(seed: int) -> None:
    with ShardedRig(seed, unreliable=True, max_raft_state=100) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 10)
        tasks, stop = rig.appenders(0, 0)
        rig.join_gids(2)
        rig.join_gids(3)
        rig.leave(1)
        rig.round(rig.admin)
        rig.round(rig.admin)
        rig.join_gids(1)
        rig.leave(2)
        rig.round(rig.admin, append=False)
        rig.check_appends(tasks, stop)


@seeds(2, 8)
def test_5b_unreliable_appends(seed: int) -> None:
    with ShardedRig(seed, unreliable=True, max_raft_state=100) as rig:
        rig.join_gids(1)
        tasks, stop = rig.appenders(10, 0.02)
        rig.sleep(0.15)
        for change, gid in [
            (rig.join_gids, 2),
            (rig.join_gids, 3),
            (rig.leave, 1),
            (rig.leave, 2),
            (rig.join_gids, 2),
            (rig.join_gids, 1),
        ]:
            change(gid)
            rig.sleep(0.5)
        rig.sleep(2.0)
        rig.check_appends(tasks, stop)


@seeds(1, 4)
def test_challenge_1_old_copies_go(seed: int) -> None:
    """Everything moves twice around, with a snapshot after every entry: what is kept is bounded."""
    with ShardedRig(seed, max_raft_state=1) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 30, 1000)
        rig.round(rig.admin, append=False)
        for _ in range(2):
            for joining, leaving in ((2, 1), (3, 2), (1, 3)):
                rig.join_gids(joining)
                rig.leave(leaving)
                rig.sleep(3.0)
        rig.join_gids(2, 3)
        rig.sleep(3.0)
        rig.round(rig.admin, append=False)
        rig.settle()
        processes = [process for group in rig.cluster.groups[1:] for process in group.processes]
        total_bytes = sum(rig.state_bytes(process) + rig.snapshot_bytes(process) for process in processes)
        assert total_bytes <= 3 * (27 * 1000 + 2 * 3 * 1000 + 6000), total_bytes


@seeds(2, 8)
def test_challenge_2_unaffected_shards_are_served(seed: int) -> None:
    """Group 1 is gone and can't hand over: group 2 waits for its shards, says so, and serves what it had."""
    with ShardedRig(seed, unreliable=True, max_raft_state=100) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 10)
        rig.join_gids(2)
        rig.settle()
        owned = rig.keys_at(2)
        rig.sleep(1.0)
        rig.stop_groups(1)
        rig.leave(1)
        rig.sleep(1.0)
        clerk = rig.clerk()
        for key in owned:
            clerk.do(clerk.put(key, b"100"), 5)
            found = clerk.do(clerk.get(key), 5)
            assert found is not None and found.value == b"100"
        silence = "group 1 does not answer at g1r0:7000, g1r1:7000, g1r2:7000"
        five = [(1, 2, "search", silence)] * 5

        def searched() -> list[tuple[Any, ...]]:
            status = status_of(rig.leader(rig.group_of(2)))  # another leader knows it after a look of its own
            return [(move["from"], move["to"], move["phase"], move["waits_for"]) for move in status]

        rig.wait_until(lambda: searched() == five, "word of it", 30)
        rig.start_groups(1)
        rig.settle()
        assert status_of(rig.leader(rig.group_of(2))) == []


@seeds(2, 8)
def test_challenge_2_shards_are_served_as_they_arrive(seed: int) -> None:
    """Groups 1 and 3 leave, of which 1 is gone: group 2 serves what it gets from 3."""
    with ShardedRig(seed, max_raft_state=100) as rig:
        rig.join_gids(1, 2, 3)
        rig.put_keys(rig.admin, 10)
        arriving = rig.keys_at(3)
        assert arriving
        rig.stop_groups(1)
        rig.leave(1, 3)
        rig.sleep(2.0)
        clerk = rig.clerk()
        for key in arriving:
            found = clerk.do(clerk.get(key), 5)
            assert found is not None and found.value == rig.values[key]
            clerk.do(clerk.put(key, b"new"), 5)
        rig.start_groups(1)
        rig.settle()


# ---- ours


@seeds(2, 8)
def test_a_new_owner_that_is_not_there_takes_nothing_down(seed: int) -> None:
    """Configurations freeze nothing: the old owner serves on, and a later configuration forgets the dead one."""
    with ShardedRig(seed) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 10)
        rig.stop_groups(2)
        rig.join_gids(2)
        rig.round(rig.admin)
        rig.sleep(3.0)
        rig.round(rig.clerk())
        rig.leave(2)
        rig.round(rig.admin)
        rig.start_groups(2)
        rig.settle()


@seeds(2, 8)
def test_a_shard_passed_on_past_a_new_owner_that_is_not_there_arrives(seed: int) -> None:
    """It never went to the dead group, which can't say so: the group before it can."""
    with ShardedRig(seed) as rig:
        rig.join_gids(1, 2)
        rig.put_keys(rig.admin, 20)
        rig.stop_groups(3)
        rig.join_gids(3)
        latest = rig.admin.do(rig.admin.controllers.query())
        for shard in latest.shards_of(3):
            owner = rig.admin.do(rig.admin.controllers.query(latest.num - 1)).owner(shard)
            rig.admin.do(rig.admin.controllers.move(shard, 3 - owner))
        rig.round(rig.clerk())
        latest = rig.admin.do(rig.admin.controllers.query())

        def arrived() -> bool:
            leaders = {gid: rig.group_of(gid).leader() for gid in (1, 2)}
            return all(
                leader is not None
                and leader.daemon is not None
                and [shard, "serving"] in leader.daemon.status()["shards"]
                for gid, leader in leaders.items()
                for shard in latest.shards_of(gid)
            )

        rig.wait_until(arrived, "arrival of shards that a dead group never had", 15)
        rig.round(rig.admin)
        rig.start_groups(3)
        rig.leave(3)
        rig.settle()


@seeds(2, 8)
def test_two_groups_that_swap_shards_do_not_wait_for_each_other(seed: int) -> None:
    with ShardedRig(seed) as rig:
        rig.join_gids(1, 2)
        rig.put_keys(rig.admin, 20)
        latest = rig.admin.do(rig.admin.controllers.query())

        async def swap() -> None:
            for one, other in zip(latest.shards_of(1), latest.shards_of(2), strict=True):
                await rig.admin.controllers.move(one, 2)
                await rig.admin.controllers.move(other, 1)

        rig.admin.do(swap())
        rig.round(rig.admin)
        rig.settle()
        assert rig.admin.do(rig.admin.controllers.query()).shards_of(1) == latest.shards_of(2)


@seeds(2, 8)
def test_57_the_old_owner_deletes_only_after_the_new_one_has_it(seed: int) -> None:
    """The release is lost for a while: the frozen copy stays, and goes when the acknowledgement gets through."""
    with ShardedRig(seed) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 10)
        released: list[Any] = []
        patch = pytest.MonkeyPatch()
        patch.setattr(KvMachine, "releases", lambda self: released)
        try:
            rig.join_gids(2)
            rig.wait_until(lambda: len(rig.machine(2).shard_states()) == 5, "imports")
            rig.sleep(1.0)
            states = dict(rig.machine(1).shard_states())
            assert sorted(states.values()) == [ShardState.SERVING] * 5 + [ShardState.EXPORTING] * 5
            rig.round(rig.admin)
        finally:
            patch.undo()
        rig.restart(rig.group_of(2).processes)
        rig.settle()
        rig.round(rig.admin, append=False)


@seeds(2, 8)
def test_55_a_retry_that_crosses_a_move_is_applied_once(seed: int) -> None:
    """Its answer was lost at the old owner; the new one remembers it."""
    with ShardedRig(seed) as rig:
        rig.join_gids(1)
        clerk = rig.clerk()
        clerk.do(clerk.get(b"k"))
        raw = Raw(clerk, rig.leader(rig.group_of(1)))
        command = raw.command(APPEND, b"k", b"once")
        first = clerk.do(raw.write(command))
        rig.join_gids(2)
        rig.leave(1)
        rig.settle()
        again = Raw(clerk, rig.leader(rig.group_of(2)), client_id=raw.client_id)
        assert clerk.do(again.write(command)) == first
        with pytest.raises(RaftKVError):
            clerk.do(raw.write(command))
        found = clerk.do(clerk.kv.get(b"k"))
        assert found is not None and found.value == b"once"


@seeds(2, 8)
def test_without_its_source_a_shard_is_not_served_empty(seed: int) -> None:
    with ShardedRig(seed) as rig:
        rig.join_gids(1)
        rig.put_keys(rig.admin, 5)
        rig.stop_groups(1)
        rig.join_gids(2)
        rig.leave(1)
        rig.sleep(3.0)
        hurried = rig.clerk(timeout_s=2.0)
        for key in rig.values:
            with pytest.raises(Timeout):
                hurried.do(hurried.get(key))
        rig.start_groups(1)
        rig.round(rig.admin)
        rig.settle()


def status_of(process: DaemonProcess) -> list[dict[str, Any]]:
    assert process.daemon is not None
    migrations: list[dict[str, Any]] = process.daemon.status()["migrations"]
    return migrations
