"""The shard map machine: the course's controller scenarios (acceptance §1.5), and what it refuses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from raftkv.machines.balance import moves
from raftkv.machines.controller import COORDINATORS_MAX, INIT, JOIN, LEAVE, MOVE, REGISTER, ShardMapMachine
from raftkv.machines.machine import Machine
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol import errors
from raftkv.raft.entry import EntryKind
from tests.machines.streams import LIFETIME_MS, controller_entries
from tests.machines.support import CLUSTER_ID, Client, Controllers, Replica, addresses_of, check_config

HOUR_MS = 3_600_000


# ---- the course's scenarios


def test_basic_leave_join() -> None:
    controllers = Controllers()
    check_config(controllers.latest, [])
    for change, gid, groups in [
        (controllers.join, 1, [1]),
        (controllers.join, 2, [1, 2]),
        (controllers.leave, 1, [2]),
    ]:
        num = controllers.latest.num
        assert change(gid) == [0, num + 1]
        check_config(controllers.latest, groups)
    assert controllers.leave(2) == [26, 2], "the course lets the last group leave, and lose what it holds"
    check_config(controllers.latest, [2])


def test_basic_historical_queries() -> None:
    controllers = Controllers()
    known = [controllers.latest]
    for change, gid in [(controllers.join, 1), (controllers.join, 2), (controllers.leave, 1)] * 2:
        if change is controllers.join and gid in controllers.latest.groups:
            continue
        change(gid)
        known.append(controllers.latest)
    for _ in range(2):
        for config in known:
            again = controllers.machine.config(config.num)
            assert again == config
            assert str(again) == str(config)
            assert list(again.groups) == list(config.groups)
        controllers.machine.load(controllers.engine)


def test_more_configurations_than_are_cached() -> None:
    controllers = Controllers()
    controllers.join(1, 2)
    for turn in range(200):
        controllers.move(turn % 10, 1 + turn % 2 if turn % 20 < 10 else 2 - turn % 2)
    latest = controllers.latest
    assert latest.num > 100
    texts = [str(controllers.machine.config(num)) for num in range(latest.num + 1)]
    controllers.machine.load(controllers.engine)
    assert texts == [str(controllers.machine.config(num)) for num in range(latest.num + 1)]
    assert controllers.latest == latest


def test_basic_move() -> None:
    controllers = Controllers()
    controllers.join(503)
    controllers.join(504)
    for shard in range(10):
        before = controllers.latest
        gid = 503 if shard < 5 else 504
        result = controllers.move(shard, gid)
        changed = before.owner(shard) != gid
        assert result == [0, before.num + changed]
        assert controllers.latest.num == before.num + changed
    assert controllers.latest.owners == (503,) * 5 + (504,) * 5


def test_a_move_unbalances_until_the_next_join_or_leave() -> None:
    controllers = Controllers()
    controllers.join(1, 2)
    for shard in range(10):
        controllers.move(shard, 2)
    assert controllers.latest.owners == (2,) * 10
    controllers.join(3)
    check_config(controllers.latest, [1, 2, 3])


def interleaved(scripts: list[list[Any]], rng: random.Random) -> Iterator[Any]:
    """The scripts' steps, each script's in its order, otherwise in a random one."""
    left = [list(script) for script in scripts]
    while any(left):
        yield rng.choice([script for script in left if script]).pop(0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("multi", [False, True])
def test_concurrent_leave_join(seed: int, multi: bool) -> None:
    """Ten clerks at once; every retry comes again at random, as a retry after a lost reply would."""
    rng = random.Random(seed)
    controllers = Controllers()
    scripts = []
    gids = range(100, 200, 10)
    for gid in gids:
        clerk = Client(gid)
        groups = [gid, gid + 1000, gid + 2000] if multi else [gid + 1000]
        script = [clerk.command(JOIN, [[g, addresses_of(g)] for g in groups], shard=-1)]
        if not multi:
            script.append(clerk.command(JOIN, [[gid, addresses_of(gid)]], shard=-1))
        script.append(clerk.command(LEAVE, [g for g in groups if g != gid], shard=-1))
        scripts.append(script)
    for command in interleaved(scripts, rng):
        before = controllers.latest
        result = controllers.run_one(command)
        assert result == [0, before.num + 1]
        check_config(controllers.latest, controllers.latest.groups)
        while rng.random() < 0.3:
            assert controllers.run_one(command) == result
            assert controllers.latest.num == before.num + 1
    check_config(controllers.latest, gids)
    assert all(len(controllers.latest.shards_of(gid)) == 1 for gid in gids)


@pytest.mark.parametrize("multi", [False, True])
def test_minimal_transfer_after_join_and_leave(multi: bool) -> None:
    """A group that stays receives nothing from another that stays; over the groups that exist."""
    controllers = Controllers()
    controllers.join(*range(100, 105))
    steps: list[tuple[Any, tuple[int, ...]]] = []
    five = tuple(range(200, 205))
    for change in (controllers.join, controllers.leave):
        steps += [(change, five)] if multi else [(change, (gid,)) for gid in five]
    for change, gids in steps:
        before = controllers.latest
        assert change(*gids)[0] == 0
        after = controllers.latest
        check_config(after, after.groups)
        stay = set(before.groups) & set(after.groups)
        assert stay
        assert all(old not in stay or new not in stay for _, old, new in moves(before.owners, after.owners))


def test_minimal_again() -> None:
    controllers = Controllers()
    controllers.join(1)
    controllers.join(2)
    before = controllers.latest
    controllers.join(3)
    joined = moves(before.owners, controllers.latest.owners)
    assert all(new == 3 for _, _, new in joined)
    assert 0 < len(joined) <= 4
    before = controllers.latest
    controllers.leave(1)
    left = moves(before.owners, controllers.latest.owners)
    assert all(old == 1 for _, old, _ in left)
    assert 0 < len(left) <= 4


def test_multi_leave_join() -> None:
    controllers = Controllers()
    controllers.join(1, 2)
    check_config(controllers.latest, [1, 2])
    controllers.join(3)
    check_config(controllers.latest, [1, 2, 3])
    controllers.leave(1, 3)
    check_config(controllers.latest, [2])


def test_more_groups_than_shards_and_other_numbers_of_shards() -> None:
    for shards in (1, 7, 10, 12, 16384):
        controllers = Controllers(shards)
        for gid in range(1, 15):
            assert controllers.join(gid) == [0, gid]
            check_config(controllers.latest, range(1, gid + 1))
        for gid in range(1, 14):
            controllers.leave(gid)
            check_config(controllers.latest, range(gid + 1, 15))


def test_replicas_agree_whatever_the_order_in_a_command() -> None:
    one, other = Controllers(), Controllers()
    one.join(5, 3, 9)
    other.join(9, 5, 3)
    assert one.engine.rows == other.engine.rows


# ---- refusals: a typed error, never a configuration

ADDRESS = ["h:1"]


def refused(controllers: Controllers, op: int, *args: Any) -> list[Any]:
    """Send the command, and check that nothing changed."""
    rows = dict(controllers.engine.rows)
    result = controllers.run_one(controllers.client.command(op, *args, shard=-1))
    assert result[0] != 0
    assert controllers.engine.rows == rows
    return result


@pytest.mark.parametrize(
    ("op", "args", "result"),
    [
        (JOIN, ([[1, ADDRESS]],), [19, 1]),
        (JOIN, ([[7, ADDRESS], [2, ADDRESS]],), [19, 2]),
        (JOIN, ([[7, ADDRESS], [7, ADDRESS]],), [8, "a gid is named twice"]),
        (JOIN, ([],), [8, "no group is named"]),
        (JOIN, ([[7, []]],), [8, "group 7 has no addresses"]),
        (JOIN, ([[7, "h:1"]],), [8, "group 7 has no addresses"]),
        (JOIN, ([[7, ["h:1", "h:1"]]],), [8, "group 7 has an address twice"]),
        (JOIN, ([[7, [f"h:{port}" for port in range(1, 18)]]],), [8, "group 7 has more than 16 addresses"]),
        (JOIN, ([[0, ADDRESS]],), [8, "a gid must be in 1 … 2147483647"]),
        (JOIN, ([[-3, ADDRESS]],), [8, "a gid must be in 1 … 2147483647"]),
        (JOIN, ([[2**31, ADDRESS]],), [8, "a gid must be in 1 … 2147483647"]),
        (JOIN, ([["7", ADDRESS]],), [8, "a gid is not a number"]),
        (JOIN, ([[True, ADDRESS]],), [8, "a gid is not a number"]),
        (JOIN, ([[7]],), [8, "the groups are not an array of [gid, addresses]"]),
        (JOIN, (7,), [8, "the groups are not an array of [gid, addresses]"]),
        (LEAVE, ([9],), [18, 9]),
        (LEAVE, ([1, 9],), [18, 9]),
        (LEAVE, ([0],), [18, 0]),
        (LEAVE, ([-1],), [18, -1]),
        (LEAVE, ([1, 1],), [8, "a gid is named twice"]),
        (LEAVE, ([],), [8, "no group is named"]),
        (LEAVE, (["1"],), [8, "a gid is not a number"]),
        (LEAVE, (1,), [8, "no group is named"]),
        (MOVE, (99, 1), [20, 99, 10]),
        (MOVE, (10, 1), [20, 10, 10]),
        (MOVE, (-1, 1), [20, -1, 10]),
        (MOVE, (3, 9), [18, 9]),
        (MOVE, (3, 0), [18, 0]),
        (MOVE, ("3", 1), [8, "the shard or the gid is not a number"]),
        (MOVE, (3, None), [8, "the shard or the gid is not a number"]),
        (REGISTER, (0, ADDRESS), [8, "a gid must be in 1 … 2147483647"]),
        (REGISTER, ("1", ADDRESS), [8, "a gid is not a number"]),
        (REGISTER, (1, []), [8, "group 1 has no addresses"]),
        (REGISTER, (1, ["nowhere"]), [8, "an address of group 1 is not HOST:PORT"]),
    ],
)
def test_refusals(op: int, args: tuple[Any, ...], result: list[Any]) -> None:
    controllers = Controllers()
    controllers.join(1, 2)
    assert refused(controllers, op, *args) == result
    assert controllers.join(3) == [0, 2], "and the machine goes on"


# ---- where coordinators are


def test_registration_makes_no_configuration() -> None:
    controllers = Controllers()
    controllers.join(1)
    assert controllers.machine.coordinators == {}
    command = controllers.client.command(REGISTER, 2, ["t:1", "t:2"], shard=-1)
    assert controllers.run_one(command) == [0, 2]
    assert controllers.run_one(controllers.client.command(REGISTER, 1, ["s:1"], shard=-1)) == [0, 1]
    assert list(controllers.machine.coordinators.items()) == [(1, ("s:1",)), (2, ("t:1", "t:2"))]
    assert controllers.machine.config_num == 1
    assert controllers.run_one(controllers.client.command(REGISTER, 2, ["t:3"], shard=-1)) == [0, 2]
    assert controllers.machine.coordinators[2] == ("t:3",), "elsewhere from now on"
    controllers.machine.load(controllers.engine)
    assert list(controllers.machine.coordinators.items()) == [(1, ("s:1",)), (2, ("t:3",))]


def test_there_are_only_so_many_groups_of_coordinators() -> None:
    controllers = Controllers()
    for gid in range(1, COORDINATORS_MAX + 1):
        assert controllers.run_one(controllers.client.command(REGISTER, gid, ADDRESS, shard=-1)) == [0, gid]
    assert refused(controllers, REGISTER, 99, ADDRESS) == [8, "there would be more than 16 groups of coordinators"]
    assert controllers.run_one(controllers.client.command(REGISTER, 3, ["g:9"], shard=-1)) == [0, 3]


@pytest.mark.parametrize(
    "address",
    ["", "h", "h:", ":1", "h:0", "h:65536", "h:1x", "h:-1", "h 1:1", "h:1 ", "h\n:1", "a:b:1", "[::1]", "ä:1",
     "h:\u0661", "h,i:1", "h:999999999", "x" * 254 + ":1", b"h:1", None, 7],
)  # fmt: skip
def test_malformed_addresses(address: object) -> None:
    controllers = Controllers()
    assert refused(controllers, JOIN, [[7, ["h:1", address]]]) == [8, "an address of group 7 is not HOST:PORT"]


@pytest.mark.parametrize("address", ["h:1", "10.0.0.1:65535", "[::1]:7000", "raft_kv-1.example.org:80"])
def test_good_addresses(address: str) -> None:
    controllers = Controllers()
    assert controllers.run_one(controllers.client.command(JOIN, [[7, [address]]], shard=-1)) == [0, 1]
    assert controllers.latest.groups == {7: (address,)}


def test_the_number_of_groups_is_bounded() -> None:
    controllers = Controllers()
    groups = [[gid, ADDRESS] for gid in range(1, 1025)]
    assert controllers.run_one(controllers.client.command(JOIN, groups, shard=-1)) == [0, 1]
    assert refused(controllers, JOIN, [[2000, ADDRESS]]) == [8, "there would be more than 1024 groups"]
    assert refused(controllers, JOIN, [[gid, ADDRESS] for gid in range(1, 1026)])[0] == 8


def test_refusals_that_depend_on_the_state_are_not_made_before_the_log() -> None:
    """`validate` may be asked of a deposed leader, so it judges only what will never change."""
    controllers = Controllers()
    controllers.join(1)
    for command in (
        controllers.client.command(JOIN, [[1, ADDRESS]], shard=-1),
        controllers.client.command(LEAVE, [9], shard=-1),
        controllers.client.command(MOVE, 99, 9, shard=-1),
    ):
        controllers.machine.validate(command)
    with pytest.raises(errors.BadRequest):
        controllers.machine.validate(controllers.client.command(JOIN, [], shard=-1))


def test_a_header_with_a_shard_is_refused() -> None:
    controllers = Controllers()
    assert controllers.run_one(controllers.client.command(LEAVE, [1], shard=0))[0] == 8


# ---- the last group keeps the data


def test_the_last_group_stays() -> None:
    controllers = Controllers()
    assert controllers.join(1, 2) == [0, 1]
    assert refused(controllers, LEAVE, [2, 1]) == [26, 1]
    assert controllers.leave(2) == [0, 2]
    assert refused(controllers, LEAVE, [1]) == [26, 1]
    assert refused(controllers, LEAVE, [9]) == [18, 9], "what is wrong anyway is said first"
    check_config(controllers.latest, [1])


def test_the_last_group_leaves_by_force() -> None:
    controllers = Controllers()
    controllers.join(1, 2)
    assert controllers.leave(9, force=True) == [18, 9]
    assert controllers.leave(2, force=True) == [0, 2]
    assert controllers.latest.given_up_ms == 0, "another group is there to take the shards"
    check_config(controllers.latest, [1])
    controllers.tick(7_000)
    assert controllers.leave(1, force=True) == [0, 3]
    check_config(controllers.latest, [])
    assert controllers.latest.given_up_ms == 7_000
    assert controllers.join(1) == [0, 4]
    assert controllers.latest.given_up_ms == 0


def history(controllers: Replica[ShardMapMachine]) -> list[ShardMap]:
    return [controllers.machine.config(num) for num in range(controllers.machine.config_num + 1)]


@pytest.mark.parametrize("seed", range(8))
def test_every_configuration_of_a_random_log_is_sound(seed: int) -> None:
    """Numbers without gaps, each shard on a group that exists."""
    controllers = Replica(ShardMapMachine(session_lifetime_ms=LIFETIME_MS))
    for entry in controller_entries(seed, 200):
        controllers.apply(entry)
    configs = history(controllers)
    assert len(configs) > 30
    for before, after in itertools.pairwise(configs):
        assert after.num == before.num + 1
        assert list(after.groups) == sorted(after.groups)
        assert set(after.owners) <= (set(after.groups) or {0})
        for gid in set(before.groups) & set(after.groups):
            assert before.groups[gid] == after.groups[gid]
        if before.groups == after.groups:
            assert len(moves(before.owners, after.owners)) == 1, "a Move"
        else:
            check_config(after, after.groups)


# ---- founding, time, sessions, reload


def test_before_it_is_formed() -> None:
    controllers = Controllers(init=False)
    assert controllers.machine.latest is None
    assert controllers.machine.cluster_id == b""
    assert controllers.machine.config_num == 0
    for num in (-1, 0, 1):
        with pytest.raises(errors.Unavailable):
            controllers.machine.config(num)
    assert controllers.join(1)[0] == 10
    assert not controllers.engine.rows
    assert controllers.run_one([INIT, CLUSTER_ID, 10]) == [0, 0]
    assert controllers.run_one(controllers.client.command(JOIN, [[1, ADDRESS]], shard=-1, seq=1)) == [0, 1]


def test_the_first_init_founds_the_cluster() -> None:
    controllers = Controllers(12)
    controllers.join(1)
    rows = dict(controllers.engine.rows)
    assert controllers.run_one([INIT, b"other-cluster-id", 10]) == [0, 1]
    assert controllers.engine.rows == rows
    for _ in range(2):
        assert controllers.machine.cluster_id == CLUSTER_ID
        assert controllers.machine.config(0) == ShardMap.initial(12)
        controllers.machine.load(controllers.engine)


@pytest.mark.parametrize("arguments", [[], [CLUSTER_ID], [b"short", 10], [CLUSTER_ID, 0], [CLUSTER_ID, 16385],
                                       [CLUSTER_ID, None], [None, 10], [CLUSTER_ID, 10, 1]])  # fmt: skip
def test_a_bad_init_founds_nothing(arguments: list[Any]) -> None:
    controllers = Controllers(init=False)
    assert controllers.run_one([INIT, *arguments])[0] == 8
    assert not controllers.engine.rows


def test_clients_may_not_init() -> None:
    with pytest.raises(errors.BadRequest):
        Controllers(init=False).machine.validate([INIT, CLUSTER_ID, 10])


def test_unknown_configurations() -> None:
    controllers = Controllers()
    controllers.join(1)
    for num in (2, 10**9, -2):
        with pytest.raises(errors.NoSuchConfig):
            controllers.machine.config(num)
    assert controllers.machine.config(-1) == controllers.machine.latest == controllers.machine.config(1)


def test_map_time_is_the_stamp_of_what_was_applied_last() -> None:
    controllers = Controllers()
    for advance_ms in (10_000, 0, 10_000):
        controllers.tick(advance_ms)
    assert controllers.machine.map_time_ms == 20_000
    controllers.stamp_ms = 15_000
    controllers.join(1)
    assert controllers.machine.map_time_ms == 20_000, "it never goes back"
    controllers.stamp_ms = 25_000
    controllers.apply(controllers.entry([], EntryKind.NOOP))
    controllers.machine.load(controllers.engine)
    assert controllers.machine.map_time_ms == 25_000


def test_a_retry_is_answered_from_the_session_until_it_expires() -> None:
    controllers = Controllers()
    join = controllers.client.command(JOIN, [[1, ADDRESS]], shard=-1)
    assert controllers.run_one(join) == [0, 1]
    controllers.join(2)
    assert controllers.run_one(join)[0] == 9, "acknowledged by the client's next request"
    rows = len(controllers.engine.rows)
    controllers.tick(HOUR_MS + 1)
    assert len(controllers.engine.rows) == rows, "map time came, the session row went"
    assert controllers.run_one(join)[0] == 9
    fresh = Client(2, stamp_ms=HOUR_MS)
    assert controllers.run_one(fresh.command(JOIN, [[3, ADDRESS]], shard=-1)) == [0, 3]


def test_the_machine_is_what_the_runtime_expects() -> None:
    machine: Machine = ShardMapMachine()
    assert machine.decode(b"\x90") == []
