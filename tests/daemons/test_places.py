"""Where a coordinator looks for shards: the map, what groups say, then earlier owners in turn."""

from __future__ import annotations

from raftkv.daemons.places import MAPS_MAX, Places
from raftkv.machines.shard_map import ShardMap
from tests.machines.support import addresses_of


def a_map(num: int, *owners: int, given_up_ms: int = 0) -> ShardMap:
    groups = {gid: tuple(addresses_of(gid)) for gid in sorted(set(owners) - {0})}
    return ShardMap(num, owners, groups, given_up_ms)


def test_before_any_map_nobody_is_asked() -> None:
    places = Places()
    assert places.latest is None and places.group_of(3) == 0 and places.missing() == [] and places.groups() == []


def test_the_owner_then_who_is_named_then_earlier_owners() -> None:
    places = Places()
    for num, owners in enumerate([(1, 1), (2, 1), (3, 1)], 1):
        places.take(a_map(num, *owners))
    assert places.by_group([0, 1]) == {3: [0], 1: [1]}
    places.not_here(0, 3, 2)
    assert places.group_of(0) == 2
    places.not_here(0, 3, 1)
    assert places.group_of(0) == 2, "that was about somebody who isn't asked any more"
    places.not_here(0, 2)
    assert places.group_of(0) == 1
    places.not_here(0, 1)
    assert places.group_of(0) == 3, "all over again"
    places.not_here(0, 3, 99)
    assert places.group_of(0) == 2, "nobody knows where group 99 is"
    places.take(a_map(4, 1, 1))
    assert places.group_of(0) == 1, "a new map, a new search"
    assert places.groups() == [1, 3, 2] and places.is_member(1) and not places.is_member(3)
    assert places.addresses_of(3) == tuple(addresses_of(3)) and places.addresses_of(99) == ()


def test_shards_of_nobody_and_shards_that_there_are_not() -> None:
    places = Places()
    places.take(a_map(1, 0, 0))
    assert places.by_group([0, 1, 7]) == {0: [0, 1, 7]}
    places.not_here(0, 0)
    assert places.group_of(0) == 0
    places.take(a_map(2, 0, 0, given_up_ms=77))
    assert places.given_up_ms == 77
    places.take(a_map(3, 1, 1))
    assert places.given_up_ms == 77


def test_only_the_latest_maps_are_kept() -> None:
    places = Places()
    places.take(a_map(100, 1))
    wanted = places.missing()
    assert wanted == list(range(99, 100 - MAPS_MAX, -1))
    for num in wanted:
        places.take(a_map(num, 2))
    assert places.missing() == [] and places.latest is not None and places.latest.num == 100
    places.take(a_map(101, 1))
    assert places.missing() == []
    places.take(a_map(300, 1))
    assert places.groups() == [1]
