"""When a new group is formed, and who is kept out."""

from __future__ import annotations

import pytest

from raftkv.daemons.formation import Formation
from raftkv.protocol.errors import ReplicaMustBeReplaced
from raftkv.protocol.messages import Hello
from raftkv.raft.membership import Membership

A, B, C, WIPED = (letter * 16 for letter in (b"a", b"b", b"c", b"w"))
FIRST = Membership((0, 1, 2), (), ((0, A), (1, B), (2, C)))


def fresh(replica: int, store_id: bytes) -> Hello:
    return Hello(role="shardkv", gid=1, replica=replica, store_id=store_id, purpose="peer", peers=[0, 1, 2])


def formed(replica: int, stores: dict[int, bytes]) -> Hello:
    hello = fresh(replica, stores[replica])
    hello.formed = True
    hello.stores = sorted(stores.items())
    return hello


def test_a_group_forms_when_all_are_fresh_and_everywhere_alike() -> None:
    stores = {0: A, 1: B, 2: C}
    for me in stores:
        formation = Formation(me, stores[me], stores)
        others = [peer for peer in stores if peer != me]
        assert formation.heard(fresh(others[0], stores[others[0]])) is None
        assert formation.missing == (others[1],)
        assert formation.heard(fresh(others[1], stores[others[1]])) == FIRST


def test_one_replica_alone_is_a_group_at_once() -> None:
    assert Formation(0, A, [0]).alone() == Membership((0,), (), ((0, A),))


def test_a_majority_of_fresh_ones_is_not_enough() -> None:
    formation = Formation(0, A, [0, 1, 2])
    for _ in range(3):
        assert formation.heard(fresh(1, B)) is None


def test_one_that_missed_the_moment_adopts_what_names_its_own_store() -> None:
    assert Formation(2, C, [0, 1, 2]).heard(formed(0, {0: A, 1: B, 2: C})) == FIRST


def test_a_wiped_one_is_told_so() -> None:
    with pytest.raises(ReplicaMustBeReplaced, match="replace the replica"):
        Formation(2, WIPED, [0, 1, 2]).heard(formed(0, {0: A, 1: B, 2: C}))


def test_a_peer_wiped_before_the_group_formed_counts_with_its_new_store() -> None:
    formation = Formation(0, A, [0, 1, 2])
    formation.heard(fresh(1, WIPED))
    formation.heard(fresh(1, B))
    assert formation.heard(fresh(2, C)) == FIRST
