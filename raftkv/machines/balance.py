"""Spreading shards over groups: pure, deterministic, with the fewest moves.

Must never depend on the order in which gids are given: every controller replica computes the same map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raftkv.machines.shard_map import NO_GROUP


def rebalance(owners: Sequence[int], gids: Iterable[int]) -> tuple[int, ...]:
    """New owners for the shards, evenly over `gids`: most − fewest ≤ 1.

    `owners` are the present owners (0, or a gid that has left: the shard has to move). A shard moves
    only if it must. With n shards and g groups, n mod g groups own one more than the others; giving
    that one more to those that own most already is what keeps the number of moves least. Ties go to
    the lower gid, a group with too many gives up its highest shards, and free shards are handed out in
    ascending order to gids in ascending order.
    """
    members = sorted(set(gids))
    assert not members or members[0] > NO_GROUP, members
    if not members:
        return (NO_GROUP,) * len(owners)
    held: dict[int, list[int]] = {gid: [] for gid in members}
    free: list[int] = []
    for shard, owner in enumerate(owners):
        held.get(owner, free).append(shard)
    least, with_one_more = divmod(len(owners), len(members))
    by_most_held = sorted(members, key=lambda gid: (-len(held[gid]), gid))
    target = {gid: least + (rank < with_one_more) for rank, gid in enumerate(by_most_held)}
    for gid in members:
        free += held[gid][target[gid] :]
    free.sort()
    balanced = list(owners)
    unplaced = iter(free)
    for gid in members:
        for _ in range(target[gid] - len(held[gid])):
            balanced[next(unplaced)] = gid
    assert next(unplaced, None) is None
    return tuple(balanced)


def moves(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, int]]:
    """The shards whose owner differs, as (shard, from gid, to gid), by shard."""
    assert len(before) == len(after)
    return [(shard, old, new) for shard, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
