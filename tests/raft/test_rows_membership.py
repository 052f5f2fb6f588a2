"""Hard scenarios of membership: rows 44–51 of the acceptance table (changes are of single servers here)."""

from __future__ import annotations

import pytest

from raftkv.raft.actions import MembershipChanged, SnapshotReleased, SnapshotWanted
from raftkv.raft.changes import AddLearner, Promote, RecordStores, Remove
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import ChangeRefused, NotLeader
from raftkv.raft.membership import Membership
from raftkv.raft.messages import VoteReply
from tests.raft import scenarios
from tests.raft.network import Cluster
from tests.raft.solo import ack, append, drain, entries, follower, leader, of, reject, sent, time_out, vote_request


def change(cluster: Cluster, what: AddLearner | Promote | Remove) -> None:
    leader_id = cluster.leader()
    assert leader_id is not None
    cluster.servers[leader_id].step(lambda raft: raft.propose_membership(what, cluster.now_ms))


def test_row_44_two_leaders_cannot_act_on_memberships_whose_quorums_do_not_meet() -> None:
    cluster = scenarios.two_memberships()
    assert cluster.raft(1).membership.voters == (1, 2, 3, 4, 5)


def test_row_44_a_change_needs_the_previous_one_and_an_entry_of_the_own_term_committed() -> None:
    raft = follower(voters=(1, 2, 3, 4))
    leader(raft, matched=False)
    with pytest.raises(ChangeRefused, match="entry of its term"):
        raft.propose_membership(Remove(4), 0)
    ack(raft, 2, raft.last_index)
    ack(raft, 3, raft.last_index)
    entry = raft.propose_membership(Remove(4), 0)
    with pytest.raises(ChangeRefused, match="previous change"):
        raft.propose_membership(Remove(3), 0)
    ack(raft, 2, entry.index)
    drain(raft)
    assert raft.propose_membership(Remove(3), 0)


def test_row_45_a_change_whose_entry_is_cut_off_is_undone() -> None:
    raft = follower(log=(1,))
    changed = Membership((1, 2, 3, 4))
    raft.step(append(2, 2, (1, 1), (Entry.make(2, 2, EntryKind.MEMBERSHIP, 0, changed.encode()),)), 0)
    drain(raft)
    assert raft.membership == changed
    raft.step(append(3, 3, (1, 1), entries(3, first=2)), 0)
    assert raft.membership == Membership((1, 2, 3))
    assert of(drain(raft), MembershipChanged) == [MembershipChanged(Membership((1, 2, 3)), 0)]


def test_row_45_over_a_restart_and_a_compaction_the_membership_is_that_of_the_log() -> None:
    one, two = Membership((1, 2, 3), (4,)), Membership((1, 2, 3, 4))
    log = (
        *entries(1),
        Entry.make(1, 2, EntryKind.MEMBERSHIP, 0, one.encode()),
        *entries(1, first=3),
        Entry.make(1, 4, EntryKind.MEMBERSHIP, 0, two.encode()),
    )
    raft = follower(log=log, applied=3)
    assert raft.membership == two and raft.start_membership == Membership((1, 2, 3))
    raft.compact(1)
    assert raft.start_membership == Membership((1, 2, 3))
    raft.compact(3)
    assert raft.start_membership == one and raft.membership == two
    raft.step(append(2, 2, (3, 1), entries(2, first=4)), 0)
    assert raft.membership == one


def test_row_46_a_change_in_force_from_its_append_leaves_no_voter_that_does_not_know_it() -> None:
    # Here membership is in force on append: what is in the log counts, applied or not.
    removed = Membership((2, 3))
    raft = follower(log=(Entry.make(1, 1, EntryKind.MEMBERSHIP, 0, removed.encode()),))
    assert raft.applied_index == 0
    time_out(raft)
    assert raft.role == "learner" and raft.term == 1
    grown = Membership((1, 2, 3, 4, 5))
    raft = follower(log=(Entry.make(1, 1, EntryKind.MEMBERSHIP, 0, grown.encode()),))
    time_out(raft)
    raft.step(VoteReply(2, 2, True, True), 0)
    assert raft.role == "precandidate", "two of five are no quorum, as they would have been of three"


def test_row_47_a_learner_votes_when_asked_for_it_may_have_been_promoted_since() -> None:
    raft = follower(4, learners=(4,))
    raft.step(vote_request(1, 2, (0, 0), pre=True), 0)
    raft.step(vote_request(1, 2, (0, 0)), 0)
    assert [reply.granted for reply in sent(drain(raft), VoteReply)] == [True, True]


def test_row_47_in_a_cluster_a_promoted_learner_elects_with_the_rest() -> None:
    cluster = Cluster(3, voters=(1, 2))
    for server in cluster.servers.values():
        server.crash()
        server.disk.start_membership = Membership((1, 2), (3,))
        server.disk.engine = [(0, 0, 0, b"", server.disk.start_membership)]
        server.boot()
    leader_id = cluster.elect()
    cluster.run(200)
    other = 3 - leader_id
    cluster.isolate(3)  # the learner does not see its promotion
    change(cluster, Promote(3))
    cluster.run(300)
    assert cluster.raft(other).membership.voters == (1, 2, 3)
    assert cluster.raft(3).membership.voters == (1, 2)
    cluster.heal()
    cluster.servers[leader_id].crash()
    assert cluster.run(5000, lambda: cluster.leader() == other), "elected with the vote of 3"


def test_row_48_a_removed_leader_does_not_count_itself_leaves_on_commit_and_another_follows() -> None:
    cluster = Cluster(3)
    leader_id = cluster.elect()
    cluster.propose(b"x")
    cluster.run(200)
    rest = tuple(replica for replica in cluster.servers if replica != leader_id)
    change(cluster, Remove(leader_id))
    assert cluster.run(300, lambda: cluster.leader() in rest), "no election timeout is waited for"
    cluster.run(300)
    assert cluster.raft(leader_id).role == "learner"
    assert all(cluster.raft(replica).membership.voters == rest for replica in rest)
    assert cluster.propose(b"y")
    term = cluster.raft(rest[0]).term
    cluster.run(20_000)
    assert cluster.raft(rest[0]).term == term, "the removed one disturbs nobody"


@pytest.mark.parametrize("victim_leads", [True, False])
def test_row_48_from_two_nodes_one_can_be_removed(victim_leads: bool) -> None:
    cluster = Cluster(2)
    leader_id = cluster.elect()
    cluster.run(200)
    victim = leader_id if victim_leads else 3 - leader_id
    remaining = 3 - victim
    change(cluster, Remove(victim))
    assert cluster.run(3000, lambda: cluster.leader() == remaining)
    cluster.run(2000)
    assert cluster.propose(b"x") and cluster.run(1000, lambda: b"x" in cluster.payloads)


def test_row_48_a_removed_follower_that_does_not_know_it_cannot_disrupt() -> None:
    cluster = Cluster(4)
    leader_id = cluster.elect()
    victim = next(replica for replica in cluster.servers if replica != leader_id)
    cluster.isolate(victim)
    change(cluster, Remove(victim))
    cluster.run(100)
    cluster.heal()
    term = cluster.raft(leader_id).term
    cluster.run(20_000)
    assert (cluster.leader(), cluster.raft(leader_id).term) == (leader_id, term)
    assert cluster.raft(victim).term == term


def test_row_48_the_last_voter_cannot_be_removed() -> None:
    raft = follower(voters=(1,), learners=(2,))
    leader(raft, matched=False)
    with pytest.raises(ChangeRefused):
        raft.propose_membership(Remove(1), 0)


def test_row_49_a_new_node_is_learner_first_and_weakens_no_quorum() -> None:
    cluster = Cluster(3)
    leader_id = cluster.elect()
    for number in range(50):
        cluster.propose(b"%d" % number)
    cluster.run(300)
    cluster.servers[leader_id].flush_and_compact()
    cluster.add_server(4, Membership(()))
    cluster.run(1000)
    assert (cluster.raft(4).role, cluster.raft(4).last_index) == ("learner", 0)
    change(cluster, AddLearner(4, b"store-of-4"))
    cluster.isolate(4)
    cluster.run(100)
    assert cluster.propose(b"goes on")
    cluster.run(100)
    assert b"goes on" in cluster.payloads
    with pytest.raises(ChangeRefused, match="caught up"):
        cluster.raft(leader_id).propose_membership(Promote(4), cluster.now_ms)
    cluster.heal()
    assert cluster.run(5000, cluster.converged)
    assert cluster.raft(4).start_index > 0, "by a snapshot"
    cluster.run(200)
    change(cluster, Promote(4))
    cluster.run(300)
    assert cluster.raft(4).role == "follower"
    assert cluster.raft(4).membership == Membership((1, 2, 3, 4), (), ((4, b"store-of-4"),))


def test_row_49_a_learner_is_not_elected_while_its_snapshot_is_pending() -> None:
    raft = follower(start=(5, 1), learners=(4,))
    leader(raft, matched=False)
    ack(raft, 2, raft.last_index)
    reject(raft, 4, 5, (0, 0), 0)
    assert SnapshotWanted(4) in drain(raft)
    with pytest.raises(ChangeRefused):
        raft.propose_membership(Promote(4), 0)
    with pytest.raises(ChangeRefused):
        raft.transfer(4, 0)


def test_row_49_a_promoted_learner_is_in_the_check_of_the_quorum() -> None:
    raft = follower(voters=(1, 2), learners=(3, 4))
    leader(raft)
    raft.propose_membership(Promote(3), 0)
    assert len(raft.node.election.counted) == 2 and raft.membership.quorum == 2


def test_row_50_the_next_leader_finishes_a_change_that_it_finds_in_its_log() -> None:
    cluster = Cluster(4)
    leader_id = cluster.elect()
    rest = [replica for replica in cluster.servers if replica != leader_id]
    cluster.partition([leader_id, rest[0]], rest[1:])
    change(cluster, Remove(rest[2]))
    cluster.run(50)
    cluster.servers[leader_id].crash()
    cluster.heal()
    assert cluster.raft(rest[0]).membership.voters != (1, 2, 3, 4)
    found = cluster.elect()
    cluster.run(500)
    assert cluster.raft(found).membership.voters == tuple(r for r in (1, 2, 3, 4) if r != rest[2])
    assert found == rest[0], "only it has the entry"


@pytest.mark.parametrize(
    "refused",
    [AddLearner(2), AddLearner(4), Promote(2), Promote(9), Remove(9), RecordStores(((1, b"a"),))],
)
def test_row_50_changes_that_make_no_sense_are_refused(refused: AddLearner | Promote | Remove) -> None:
    raft = follower(learners=(4,))
    leader(raft)
    last = raft.last_index
    with pytest.raises(ChangeRefused):
        raft.propose_membership(refused, 0)
    assert raft.last_index == last
    with pytest.raises(NotLeader):
        follower().propose_membership(AddLearner(5), 0)


def test_store_ids_are_recorded_without_changing_anybodys_rights() -> None:
    raft = follower()
    leader(raft)
    stores = ((1, b"one"), (2, b"two"), (3, b"three"))
    raft.propose_membership(RecordStores(stores), 0)
    assert raft.membership == Membership((1, 2, 3), (), stores)
    assert raft.membership.store_of(2) == b"two"


def test_removing_a_follower_ends_its_stream() -> None:
    raft = follower(start=(5, 1))
    leader(raft, matched=False)
    ack(raft, 2, raft.last_index)
    reject(raft, 3, 5, (0, 0), 0)
    drain(raft)
    raft.snapshot_offered(3, b"id", 6, raft.term, raft.membership, 9, 0)
    drain(raft)
    raft.propose_membership(Remove(3), 0)
    assert SnapshotReleased(3, b"id") in drain(raft)
    assert set(raft.peer_progress()) == {2}


def test_row_51_a_voter_takes_a_snapshot_that_makes_it_a_learner_or_lacks_it() -> None:
    from zlib import crc32

    from raftkv.raft.messages import InstallSnapshot

    for members in (Membership((2, 3), (1,)), Membership((2, 3))):
        raft = follower()
        raft.step(InstallSnapshot(1, 2, b"id", 5, 1, members, 1, 0, b"x", crc32(b"x")), 0)
        drain(raft)
        raft.snapshot_stored(b"id", 1, 0)
        drain(raft)
        raft.snapshot_installed(b"id", 0)
        drain(raft)
        assert (raft.role, raft.membership, raft.last_index) == ("learner", members, 5)
        time_out(raft)
        assert raft.role == "learner"
