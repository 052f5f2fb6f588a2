"""The controller scenarios of the course, on three simulated controllers through the SDK.

No group runs: the last one leaves by force, because nobody can say that it is empty.
`tests/machines/test_controller.py` has the same scenarios on the machine alone, with many more orders.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest

from raftkv.client.controllers import Controllers
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import GroupExists, LastGroup, NoSuchGroup
from raftkv.sim.process import DaemonProcess
from tests.acceptance.kv_rig import Rig, seeds
from tests.acceptance.rigs import BaseClerk, BaseRig, Task
from tests.machines.support import addresses_of, check_config

NEW_LEADER_S = 3.0

Record = Callable[[str, object], None]
P = TypeVar("P")


class Administered(BaseRig[P]):
    """A rig of controllers alone, and what its administrator does."""

    admin: BaseClerk

    def ask(self, work: Coroutine[Any, Any, int]) -> int:
        return self.admin.do(work)

    def join(self, groups: dict[int, list[str]]) -> None:
        self.ask(self.admin.controllers.join(groups))

    def join_gids(self, *gids: int) -> None:
        self.join({gid: addresses_of(gid) for gid in gids})

    def leave(self, *gids: int) -> None:
        """The last ones by force."""
        if not self.query().groups.keys() - set(gids):
            with pytest.raises(LastGroup):
                self.ask(self.admin.controllers.leave(gids))
        self.ask(self.admin.controllers.leave(gids, force=True))

    def query(self, num: int | None = None) -> ShardMap:
        return self.admin.do(self.admin.controllers.query(num))

    def at_once(self, scripts: Sequence[Callable[[Controllers], Coroutine[Any, Any, None]]]) -> None:
        """Each by an administrator of its own."""
        clerks = self.clerks_of(len(scripts))
        tasks: list[Task[None]] = [
            clerk.spawn(script(clerk.controllers)) for clerk, script in zip(clerks, scripts, strict=True)
        ]
        self.finish_all(tasks, 30)
        for task in tasks:
            assert task.result is None

    def await_cluster(self) -> None:
        """Until it is founded."""
        self.admin = self.clerk()
        self.wait_until(self._is_known, "cluster", 10)

    def _is_known(self) -> bool:
        task = self.admin.spawn(self.admin.controllers.query())
        self.finish_all([task], 10)
        return task.error is None


class ControllersRig(Administered[DaemonProcess], Rig):
    """Three controllers, and an administrator."""

    def __init__(self, seed: int, *, shards: int = 10, unreliable: bool = False) -> None:
        super().__init__(1, seed, groups=0, controllers=3, shards=shards, unreliable=unreliable)
        self.await_cluster()


def check_minimal(before: ShardMap, after: ShardMap) -> None:
    """No group that was there and stays has got a shard from another that was there and stays."""
    kept = before.groups.keys() & after.groups.keys()
    for shard, (old, new) in enumerate(zip(before.owners, after.owners, strict=True)):
        assert old == new or not {old, new} <= kept, f"shard {shard} went from {old} to {new}"


def basic_leave_join(rig: Administered[P]) -> None:
    """12 shards: as in 2025, where a second Join of a group and a Leave of an absent one are refused."""
    check_config(rig.query(), [])
    for change, gid, groups in [
        (rig.join_gids, 1, [1]),
        (rig.join_gids, 2, [1, 2]),
        (rig.leave, 1, [2]),
        (rig.leave, 2, []),
    ]:
        before = rig.query()
        change(gid)
        latest = rig.query()
        assert latest.num == before.num + 1
        check_config(latest, groups)
        check_minimal(before, latest)
        refused = GroupExists if change == rig.join_gids else NoSuchGroup
        with pytest.raises(refused):
            change(gid)
        assert rig.query() == latest
    rig.wait_equal()


@seeds(2, 10)
@pytest.mark.parametrize("shards", [10, 12])
def test_basic_leave_join(seed: int, shards: int) -> None:
    with ControllersRig(seed, shards=shards) as rig:
        basic_leave_join(rig)


def historical_queries(rig: Administered[P], changes: Sequence[Callable[[], None]]) -> None:
    known = [rig.query()]
    for change in changes:
        change()
        known.append(rig.query())
    assert len(known) == 6

    def check() -> None:
        for config in known:
            again = rig.query(config.num)
            assert again == config and list(again.groups) == list(config.groups) and str(again) == str(config)

    for process in rig.servers:
        rig.crash(process)
        check()
        rig.start(process)
        check()
    rig.wait_equal()


@seeds(2, 10)
def test_basic_historical_queries(seed: int) -> None:
    with ControllersRig(seed) as rig:
        changes = [(rig.join_gids, 1), (rig.join_gids, 2), (rig.leave, 1), (rig.join_gids, 1), (rig.leave, 2)]
        historical_queries(rig, [partial(change, gid) for change, gid in changes])


def basic_move(rig: Administered[P]) -> None:
    rig.join_gids(503)
    rig.join_gids(504)
    for shard in range(10):
        gid = 503 if shard < 5 else 504
        before = rig.query()
        rig.ask(rig.admin.controllers.move(shard, gid))
        after = rig.query()
        assert after.owner(shard) == gid
        assert after.num == before.num + (before.owner(shard) != gid)
    assert rig.query().owners == (503,) * 5 + (504,) * 5
    rig.wait_equal()


@seeds(2, 10)
def test_basic_move(seed: int) -> None:
    with ControllersRig(seed) as rig:
        basic_move(rig)


def concurrent_leave_join(rig: Administered[P]) -> None:
    """ConcurrentLeaveJoin, then MinimalTransfer and MinimalTransferAfterLeave from where it ends."""
    gids = list(range(100, 200, 10))

    def script(gid: int) -> Callable[[Controllers], Coroutine[Any, Any, None]]:
        async def main(controllers: Controllers) -> None:
            await controllers.join({gid + 1000: addresses_of(gid + 1000)})
            await controllers.join({gid: addresses_of(gid)})
            await controllers.leave([gid + 1000])

        return main

    rig.at_once([script(gid) for gid in gids])
    before = rig.query()
    check_config(before, gids)
    assert before.num == 30

    more = list(range(1, 6))
    for gid in more:
        rig.join_gids(gid)
    joined = rig.query()
    check_config(joined, [*more, *gids])
    check_minimal(before, joined)
    for gid in more:
        rig.leave(gid)
    left = rig.query()
    check_config(left, gids)
    check_minimal(joined, left)
    rig.wait_equal()


@pytest.mark.parametrize("unreliable", [False, True], ids=["reliable", "unreliable"])
@seeds(2, 10)
def test_basic_concurrent_leave_join_and_minimal_transfer(seed: int, unreliable: bool) -> None:
    with ControllersRig(seed, unreliable=unreliable) as rig:
        concurrent_leave_join(rig)


def minimal_again(rig: Administered[P]) -> None:
    rig.join_gids(1)
    rig.join_gids(2)
    before = rig.query()
    rig.join_gids(3)
    joined = rig.query()
    moved = [shard for shard in range(10) if joined.owner(shard) != before.owner(shard)]
    assert all(joined.owner(shard) == 3 for shard in moved) and 0 < len(moved) <= 10 // 3 + 1
    rig.leave(1)
    left = rig.query()
    moved = [shard for shard in range(10) if left.owner(shard) != joined.owner(shard)]
    assert all(joined.owner(shard) == 1 for shard in moved) and 0 < len(moved) <= 10 // 3 + 1
    rig.wait_equal()


@seeds(2, 10)
def test_minimal_again(seed: int) -> None:
    with ControllersRig(seed) as rig:
        minimal_again(rig)


def multi_leave_join(rig: Administered[P]) -> None:
    for change, gids, groups in [
        (rig.join_gids, (1, 2), [1, 2]),
        (rig.join_gids, (3,), [1, 2, 3]),
        (rig.leave, (1, 3), [2]),
        (rig.leave, (2,), []),
    ]:
        before = rig.query()
        change(*gids)
        latest = rig.query()
        assert latest.num == before.num + 1, "one configuration for one call"
        check_config(latest, groups)
        check_minimal(before, latest)
    rig.wait_equal()


@seeds(2, 10)
def test_multi_leave_join(seed: int) -> None:
    with ControllersRig(seed) as rig:
        multi_leave_join(rig)


def multi_concurrent_leave_join(rig: Administered[P]) -> None:
    """The same with some groups in each call."""
    gids = list(range(100, 200, 10))

    def script(gid: int) -> Callable[[Controllers], Coroutine[Any, Any, None]]:
        async def main(controllers: Controllers) -> None:
            joining = (gid, gid + 1000, gid + 2000)
            await controllers.join({each: addresses_of(each) for each in joining})
            await controllers.leave([gid + 1000, gid + 2000])

        return main

    rig.at_once([script(gid) for gid in gids])
    before = rig.query()
    check_config(before, gids)
    assert before.num == 20

    more = list(range(1, 6))
    rig.join_gids(*more)
    joined = rig.query()
    check_config(joined, [*more, *gids])
    check_minimal(before, joined)
    rig.leave(*more)
    left = rig.query()
    check_config(left, gids)
    check_minimal(joined, left)
    rig.wait_equal()


@pytest.mark.parametrize("unreliable", [False, True], ids=["reliable", "unreliable"])
@seeds(2, 10)
def test_multi_concurrent_leave_join_and_minimal_transfer(seed: int, unreliable: bool) -> None:
    with ControllersRig(seed, unreliable=unreliable) as rig:
        multi_concurrent_leave_join(rig)


def agree_config(rig: Administered[P], end: str, gids: Sequence[int], more: int, record: Record) -> None:
    """The leader goes away, in any way: another one shows the same configuration within 3 s."""
    known = rig.query()
    check_config(known, gids)
    leader = rig.leader()
    started_s = rig.now
    if end == "isolate":
        rig.isolate(leader)
    else:
        rig.end(leader, end)
    again = rig.admin.do(rig.admin.controllers.query(), NEW_LEADER_S)
    assert again == known and list(again.groups) == list(known.groups)
    record("answered after", rig.now - started_s)
    rig.wait_until(lambda: rig.leader_now() not in (None, leader), "new leader", NEW_LEADER_S)
    rig.join_gids(more)
    check_config(rig.query(), [*gids, more])
    rig.heal()
    rig.revive(leader)
    rig.wait_equal()


@pytest.mark.parametrize("end", ["stop", "kill", "lose_power", "isolate", "pause"])
@seeds(2, 10)
def test_multi_agree_config(seed: int, end: str, record_property: Record) -> None:
    with ControllersRig(seed) as rig:
        rig.join_gids(1, 2, 3)
        rig.leave(2)
        agree_config(rig, end, [1, 3], 2, record_property)
