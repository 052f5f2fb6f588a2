"""Balance is even, moves as little as can be, and doesn't depend on the order of anything."""

from __future__ import annotations

import random
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from raftkv.machines.balance import moves, rebalance


def check_even(owners: tuple[int, ...], gids: set[int]) -> None:
    if not gids:
        assert set(owners) <= {0}
        return
    assert set(owners) <= gids
    counts = [owners.count(gid) for gid in gids]
    assert max(counts) - min(counts) <= 1


def least_moves(owners: tuple[int, ...], gids: set[int]) -> int:
    """By trying every assignment."""
    best = len(owners)
    for candidate in product(sorted(gids), repeat=len(owners)):
        counts = [candidate.count(gid) for gid in gids]
        if max(counts) - min(counts) <= 1:
            best = min(best, sum(old != new for old, new in zip(owners, candidate, strict=True)))
    return best


small = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=6).map(tuple), st.sets(st.integers(1, 5), max_size=4)
)


@given(small)
def test_even_with_the_fewest_moves(case: tuple[tuple[int, ...], set[int]]) -> None:
    owners, gids = case
    balanced = rebalance(owners, gids)
    check_even(balanced, gids)
    if gids:
        assert len(moves(owners, balanced)) == least_moves(owners, gids)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=100),
    st.sets(st.integers(1, 40), max_size=30),
    st.randoms(),
)
def test_deterministic_and_stable(owners: list[int], gids: set[int], rng: random.Random) -> None:
    shuffled = list(gids)
    rng.shuffle(shuffled)
    balanced = rebalance(owners, shuffled)
    check_even(balanced, gids)
    assert balanced == rebalance(owners, sorted(gids))
    assert rebalance(balanced, gids) == balanced, "what is balanced already doesn't move"


@given(st.integers(1, 60), st.sets(st.integers(1, 30), min_size=1, max_size=20), st.data())
def test_a_group_that_stays_gains_nothing_from_another_that_stays(
    shards: int, gids: set[int], data: st.DataObject
) -> None:
    before = rebalance((0,) * shards, gids)
    other = data.draw(st.sets(st.integers(1, 30), min_size=1, max_size=20))
    after = rebalance(before, other)
    for _, old, new in moves(before, after):
        assert not (old in other and new in gids), (old, new)


def test_first_assignment_gives_contiguous_shards() -> None:
    assert rebalance((0,) * 10, [2, 1]) == (1,) * 5 + (2,) * 5
    assert rebalance((0,) * 10, [3, 1, 2]) == (1, 1, 1, 1, 2, 2, 2, 3, 3, 3)


def test_free_shards_go_out_in_ascending_order() -> None:
    assert rebalance((3, 3, 3, 2, 2, 2), [2, 3, 4, 5]) == (3, 3, 4, 2, 2, 5)
    assert rebalance((9, 3, 3, 3, 3, 9), [3, 4, 5]) == (4, 3, 3, 4, 5, 5)
