"""Majority arithmetic, and nothing else: pure functions of plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum


def quorum_size(voters: int) -> int:
    """The smallest majority of `voters` replicas."""
    return voters // 2 + 1


def quorum_value(values: list[int]) -> int:
    """The greatest value that a majority has reached: `values` holds one per voter (sorted in place).

    No voters reach nothing: an empty list gives -1, below any index, round or time in use.
    """
    if not values:
        return -1
    values.sort()
    return values[(len(values) - 1) // 2]


class VoteResult(Enum):
    WON = "won"
    LOST = "lost"
    PENDING = "pending"


def vote_result(voters: Collection[int], votes: Mapping[int, bool]) -> VoteResult:
    """Where an election stands; votes of replicas that aren't voters don't count."""
    quorum = quorum_size(len(voters))
    granted = refused = 0
    for voter in voters:
        vote = votes.get(voter)
        if vote is True:
            granted += 1
        elif vote is False:
            refused += 1
    if voters and granted >= quorum:
        return VoteResult.WON
    if len(voters) - refused < quorum:
        return VoteResult.LOST
    return VoteResult.PENDING
