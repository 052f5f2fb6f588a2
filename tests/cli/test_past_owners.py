"""Status finds the shards whose owners don't have them yet, wherever they are: also at groups that have left."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from raftkv.cli.health import cluster_health
from raftkv.cli.past_owners import LOOK_BACK_MAX, look_back
from raftkv.cli.results import ClusterHealth
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import NoSuchConfig
from tests.cli.fakes import FakeControllers
from tests.cli.test_arrival import leader

GROUPS = {gid: (f"g{gid}:1",) for gid in range(1, 6)}


def config(num: int, owners: tuple[int, ...], *gids: int, given_up_ms: int = 0) -> ShardMap:
    return ShardMap(num, owners, {gid: GROUPS[gid] for gid in gids}, given_up_ms)


NONE = ShardMap.initial(4)
TWO = config(1, (1, 1, 2, 2), 1, 2)
JOINED = config(2, (1, 3, 2, 2), 1, 2, 3)
LEFT = config(3, (3, 3, 3, 3), 3)


class History(FakeControllers):
    """Controllers that know several configurations; those of `silent` configurations can't be read."""

    def __init__(self, *configs: ShardMap, **leaders: Mapping[str, Any]) -> None:
        super().__init__(configs[-1])
        self.configs = {each.num: each for each in configs}
        self.statuses = {"g0:1": leader(0, []), **{f"{name}:1": answer for name, answer in leaders.items()}}

    async def query(self, num: int | None = None) -> ShardMap:
        self.calls.append(("query", num))
        if num is None:
            return self.shard_map
        if num not in self.configs:
            raise NoSuchConfig(num)
        return self.configs[num]


def health(client: FakeControllers) -> ClusterHealth:
    return asyncio.run(cluster_health(client, ["g0:1"], 5))


def rows(shown: ClusterHealth) -> list[tuple[int, int, int, int, str, str | None]]:
    return [
        (move.shard, move.source, move.target, move.config_number, move.phase, move.waits_for) for move in shown.moves
    ]


def replicas(shown: ClusterHealth) -> list[tuple[int | None, str, bool]]:
    return [(replica.gid, replica.state, replica.has_left) for replica in shown.replicas if replica.gid]


def test_a_dead_group_took_everything_over() -> None:
    shown = health(History(NONE, TWO, JOINED, LEFT, g1=leader(1, [0, 1]), g2=leader(2, [2, 3])))
    dead = "group 3 does not answer"
    assert rows(shown) == [
        (0, 1, 3, 3, "waiting", dead),
        (1, 1, 3, 2, "waiting", dead),
        (2, 2, 3, 3, "waiting", dead),
        (3, 2, 3, 3, "waiting", dead),
    ]
    assert {(move.size_bytes, move.age_s) for move in shown.moves} == {(0, None)}
    assert replicas(shown) == [(3, "down", False), (1, "leader", True), (2, "leader", True)]
    assert {(shard.gid, shard.state) for shard in shown.shards} == {(3, "waiting")}
    assert shown.problems == [
        "group 3: the replica at g3:1 is down",
        "group 3: no leader",
        "shards 0-1, on their way from group 1 to group 3, wait: group 3 does not answer; group 1 has left, but holds "
        "what it had: don't stop it",
        "shards 2-3, on their way from group 2 to group 3, wait: group 3 does not answer; group 2 has left, but holds "
        "what it had: don't stop it",
    ]


def test_a_group_without_a_leader_and_one_that_has_not_begun() -> None:
    groups = {"g1": leader(1, [0, 1]), "g2": leader(2, [2, 3])}
    shown = health(History(NONE, TWO, JOINED, g3={**leader(3, []), "state": "candidate"}, **groups))
    assert rows(shown) == [(1, 1, 3, 2, "waiting", "group 3 has no leader")]
    assert "shard 1, on its way from group 1 to group 3, waits: group 3 has no leader" in shown.problems
    shown = health(History(NONE, TWO, JOINED, g3=leader(3, []), **groups))
    assert rows(shown) == [(1, 1, 3, 2, "waiting", "group 3 has not begun to fetch it")]
    assert shown.problems == ["shard 1, on its way from group 1 to group 3, waits: group 3 has not begun to fetch it"]
    assert all(not has_left for _, _, has_left in replicas(shown))


def test_a_group_that_has_left_without_a_leader_still_holds_its_shards() -> None:
    follower = {**leader(1, [0, 1]), "state": "follower"}
    shown = health(History(NONE, TWO, JOINED, LEFT, g1=follower, g2=leader(2, [2, 3])))
    assert [row[:3] for row in rows(shown)] == [(0, 1, 3), (1, 1, 3), (2, 2, 3), (3, 2, 3)]
    assert "group 1, which has left: no leader" in shown.problems


def test_a_migration_row_brings_the_group_that_it_comes_from() -> None:
    coming = {"shard": 2, "from": 2, "to": 1, "config_num": 2, "phase": "copy", "bytes": 9, "age_s": 1.0}
    after = config(2, (1, 1, 1, 1), 1)
    owner = leader(1, [0, 1, 3], [{**coming, "waits_for": None}])
    shown = health(History(NONE, TWO, after, g1=owner, g2=leader(2, [2])))
    assert (shown.problems, rows(shown)) == ([], [(2, 2, 1, 2, "copy", None)])
    assert replicas(shown) == [(1, "leader", False), (2, "leader", True)]
    assert {shard.state for shard in shown.shards} == {"serving", "arriving"}


def test_a_frozen_shard_is_held_and_a_half_copied_one_is_not() -> None:
    configs = (NONE, config(1, (1,) * 4, 1), config(2, (2,) * 4, 2), config(3, (3,) * 4, 3))
    frozen = {**leader(1, []), "shards": [[shard, "exporting"] for shard in range(4)]}
    half = {**leader(2, []), "shards": [[shard, "importing"] for shard in range(4)]}
    assert {row[1] for row in rows(health(History(*configs, g1=frozen, g2=half)))} == {1}


def test_an_earlier_owner_that_does_not_answer_is_named() -> None:
    shown = health(History(NONE, TWO, JOINED, LEFT, g2=leader(2, [2, 3])))
    assert [row[0] for row in rows(shown)] == [2, 3]
    both = "group 3, the owner, does not answer; nor does group 1, an earlier one that may hold them"
    assert f"shards 0-1: {both}" in shown.problems
    shown = health(History(NONE, TWO, JOINED, LEFT, g2=leader(2, [2, 3]), g3=leader(3, [])))
    assert "shards 0-1: group 1, an earlier owner, may hold what is missing, and does not answer" in shown.problems


def test_a_stranger_at_an_address_of_a_group_that_has_left_holds_nothing() -> None:
    assert rows(health(History(NONE, TWO, JOINED, LEFT, g1=leader(9, [0, 1]), g2=leader(9, [2, 3])))) == []


def test_a_dead_group_that_has_its_shards_is_only_dead() -> None:
    shown = health(History(NONE, TWO, g1=leader(1, [0, 1])))
    assert rows(shown) == []
    assert shown.problems == ["group 2: the replica at g2:1 is down", "group 2: no leader"]
    assert [shard.state for shard in shown.shards] == ["serving", "serving", "unknown", "unknown"]


def test_a_healthy_cluster_is_not_asked_for_its_past() -> None:
    client = History(NONE, TWO, g1=leader(1, [0, 1]), g2=leader(2, [2, 3]))
    assert health(client).problems == []
    assert client.calls == [("query", None)]


def test_what_was_given_up_is_nowhere() -> None:
    given_up = config(2, (0,) * 4, given_up_ms=5)
    client = History(NONE, TWO, given_up, config(3, (3,) * 4, 3), g1=leader(1, [0, 1]))
    assert rows(health(client)) == []
    assert client.calls == [("query", None), ("query", 2)]


def test_it_looks_back_so_far_and_says_so() -> None:
    many = [config(num, (3,) * 4, 3) for num in range(2, LOOK_BACK_MAX + 5)]
    client = History(NONE, TWO, *many)
    shown = health(client)
    assert len(client.calls) == 1 + LOOK_BACK_MAX
    assert shown.problems[-1] == (
        f"shards 0-3: no group is known to hold what is missing; only the owners of the last {LOOK_BACK_MAX} "
        "configurations were asked"
    )


def test_a_past_that_cannot_be_read_is_a_problem() -> None:
    shown = health(History(LEFT))
    assert shown.problems[-1].startswith("the earlier configurations can't be read, so groups that have left are not")


@pytest.mark.parametrize(("shard", "owners", "since"), [(0, [1], 3), (1, [1], 2), (2, [2], 3)])
def test_looking_back(shard: int, owners: list[int], since: int) -> None:
    past = asyncio.run(look_back(History(NONE, TWO, JOINED, LEFT), LEFT, [shard]))
    assert (past.owners, past.since, past.is_whole) == ({shard: owners}, {shard: since}, True)
    assert past.addresses == {owners[0]: GROUPS[owners[0]]}
