"""Hard scenarios of pre-vote, check-quorum and transfer: rows 21–28 of the acceptance table."""

from __future__ import annotations

import pytest

from raftkv.raft.actions import RoleChanged, TransferEnded
from raftkv.raft.config import RaftConfig
from raftkv.raft.errors import ChangeRefused, NotLeader, Transferring
from raftkv.raft.messages import AppendEntries, AppendReply, RequestVote, TimeoutNow, VoteReply
from tests.raft.network import Cluster, Faults
from tests.raft.solo import (
    ack,
    append,
    drain,
    follower,
    leader,
    of,
    sent,
    time_out,
    vote_request,
)


def others(cluster: Cluster, *known: int | None) -> list[int]:
    return [replica for replica in cluster.servers if replica not in known]


def test_row_21_with_pre_vote_a_node_that_was_cut_off_returns_without_disturbing_anybody() -> None:
    cluster = Cluster(3)
    leader_id = cluster.elect()
    term = cluster.raft(leader_id).term
    victim = others(cluster, leader_id)[0]
    cluster.isolate(victim)
    cluster.run(20_000)
    assert cluster.raft(victim).term == term
    cluster.heal()
    cluster.run(3000)
    assert (cluster.leader(), cluster.raft(leader_id).term) == (leader_id, term)


def test_row_21_without_pre_vote_there_is_one_disruption_and_then_calm() -> None:
    cluster = Cluster(3, config=lambda replica: RaftConfig(replica, pre_vote=False))
    leader_id = cluster.elect()
    victim = others(cluster, leader_id)[0]
    cluster.isolate(victim)
    cluster.run(5000)
    assert cluster.raft(victim).term > cluster.raft(leader_id).term
    cluster.heal()
    cluster.elect()
    cluster.run(3000)
    term = max(raft.term for raft in cluster.live())
    cluster.run(10_000)
    assert {raft.term for raft in cluster.live()} == {term}


def test_row_22_a_node_behind_that_returns_as_the_leader_goes_does_not_hinder_the_election() -> None:
    cluster = Cluster(3)
    leader_id = cluster.elect()
    behind, other = others(cluster, leader_id)
    cluster.isolate(behind)
    cluster.raft(other).node.rng.seed(5)
    cluster.make_leader(other)  # the term grows without the one that is cut off
    cluster.propose(b"x", other)
    cluster.run(100)
    cluster.heal()
    cluster.isolate(other)
    assert cluster.run(5000, lambda: cluster.leader() == leader_id)
    assert cluster.raft(behind).term == cluster.raft(leader_id).term


def test_row_22_a_granted_pre_vote_echoes_the_requests_term_and_a_refused_one_tells_the_voters() -> None:
    raft = follower(log=(3,), term=3)
    raft.step(vote_request(5, 2, (1, 3), pre=True), 0)
    raft.step(vote_request(2, 3, (9, 9), pre=True), 0)
    granted, refused = sent(drain(raft), VoteReply)
    assert (granted.granted, granted.term) == (True, 5)
    assert (refused.granted, refused.term) == (False, 3), "an answer, not silence"


def test_row_22_a_pre_candidate_learns_the_higher_term_from_a_refusal() -> None:
    raft = follower()
    time_out(raft)
    drain(raft)
    raft.step(VoteReply(6, 2, False, True), 0)
    assert (raft.role, raft.term) == ("follower", 6)


def test_row_23_a_stuck_candidate_of_a_higher_term_frees_itself_by_answering_the_old_leader() -> None:
    stuck = follower(3, term=8)
    stuck.step(append(2, 1, (0, 0)), 0)
    (reply,) = sent(drain(stuck), AppendReply, 1)
    assert (reply.ok, reply.term) == (False, 8)
    old = follower(term=1)
    leader(old)
    old.step(reply, 0)
    assert (old.role, old.term) == ("follower", 8)


def test_row_23_in_a_cluster_the_stuck_candidate_takes_part_again() -> None:
    cluster = Cluster(3)
    leader_id = cluster.elect()
    stuck = others(cluster, leader_id)[0]
    cluster.isolate(stuck)
    for _ in range(3):
        cluster.campaign(stuck)  # real campaigns, as without pre-vote
        cluster.run(10)
    assert cluster.raft(stuck).term > cluster.raft(leader_id).term
    cluster.heal()
    assert cluster.run(5000, lambda: cluster.raft(stuck).leader is not None)
    assert cluster.elect() and cluster.propose(b"x")
    assert cluster.run(1000, cluster.converged)
    assert cluster.raft(stuck).last_index == cluster.checker.commit_index


def test_row_24_vote_requests_are_ignored_while_a_leader_lives_save_for_a_transfer() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 0)
    drain(raft)
    raft.step(vote_request(5, 3, (9, 4)), 100)
    assert (raft.term, raft.leader, drain(raft)) == (1, 2, [])
    raft.step(vote_request(5, 3, (9, 4), transfer=True), 100)
    assert (raft.term, raft.vote) == (5, 3)
    head = follower()
    leader(head)
    head.step(vote_request(9, 3, (9, 8)), 0)
    assert head.role == "leader"


def test_row_25_a_leader_cut_off_steps_down_within_two_election_timeouts_and_acknowledges_nothing() -> None:
    cluster = Cluster(5)
    leader_id = cluster.elect()
    cluster.run(500)
    commit = cluster.raft(leader_id).commit_index
    cluster.partition([leader_id, others(cluster, leader_id)[0]], others(cluster, leader_id)[1:])
    cut_ms = cluster.now_ms
    cluster.propose(b"lost", leader_id)
    cluster.read(leader_id)
    assert cluster.run(5000, lambda: cluster.raft(leader_id).role != "leader")
    assert 500 <= cluster.now_ms - cut_ms <= 2 * 1000
    assert cluster.raft(leader_id).commit_index == commit and cluster.reads_done == 0
    assert not cluster.servers[leader_id].read_floor, "the read has failed, it does not hang"


def test_row_26_after_a_split_vote_the_next_round_elects() -> None:
    cluster = Cluster(4, 3)
    leader_id = cluster.elect()
    cluster.servers[leader_id].crash()
    cluster.run(1)
    first, second, _ = others(cluster, leader_id)
    cluster.campaign(first)
    cluster.campaign(second)
    cluster.run(20)
    assert {cluster.raft(first).role, cluster.raft(second).role} <= {"candidate", "follower", "leader"}
    assert cluster.run(5000, lambda: cluster.leader() not in (None, leader_id))


def test_row_26_two_rivals_whose_timers_agree_do_not_split_for_ever() -> None:
    for seed in range(20):
        cluster = Cluster(3, seed, config=lambda replica: RaftConfig(replica, 500, 505))
        cluster.elect(10_000)


@pytest.mark.parametrize("with_pre_vote", [{1}, {1, 2}, {3}])
def test_row_27_nodes_with_and_without_pre_vote_elect_together(with_pre_vote: set[int]) -> None:
    def config(replica: int) -> RaftConfig:
        return RaftConfig(replica, pre_vote=replica in with_pre_vote, check_quorum=replica != 2)

    cluster = Cluster(3, config=config, faults=Faults(drop=0.05, delay_ms_max=20))
    for _ in range(5):
        leader_id = cluster.elect()
        cluster.isolate(leader_id)
        assert cluster.run(10_000, lambda old=leader_id: cluster.leader() not in (None, old))  # type: ignore[misc]
        cluster.heal()
        assert cluster.run(10_000, lambda: cluster.propose(b"%d" % cluster.now_ms) is not None)


# ---- row 28: transfer


def test_row_28_transfer_in_a_cluster_takes_no_election_timeout() -> None:
    cluster = Cluster(3)
    leader_id = cluster.elect()
    cluster.run(200)
    target = others(cluster, leader_id)[1]
    began_ms = cluster.now_ms
    cluster.servers[leader_id].step(lambda raft: raft.transfer(target, cluster.now_ms))
    assert cluster.run(1000, lambda: cluster.leader() == target and cluster.raft(target).has_committed_in_term)
    assert cluster.now_ms - began_ms < 50


def test_row_28_without_a_name_the_most_up_to_date_voter_is_chosen() -> None:
    raft = follower(learners=(4,))
    leader(raft)
    entry = raft.propose(b"x", 0)
    drain(raft)
    ack(raft, 4, entry.index)
    ack(raft, 3, entry.index)
    raft.transfer(None, 0)
    assert raft.transferring == 3


@pytest.mark.parametrize("target", [1, 4, 9])
def test_row_28_to_itself_a_learner_or_a_stranger_is_refused(target: int) -> None:
    raft = follower(learners=(4,))
    leader(raft)
    with pytest.raises(ChangeRefused):
        raft.transfer(target, 0)
    assert raft.propose(b"x", 0)


def test_row_28_alone_there_is_nobody_to_hand_over_to() -> None:
    raft = follower(voters=(1,))
    leader(raft)
    with pytest.raises(ChangeRefused):
        raft.transfer(None, 0)
    with pytest.raises(NotLeader):
        follower().transfer(2, 0)


def test_row_28_to_a_removed_node_ends() -> None:
    raft = follower()
    leader(raft)
    raft.transfer(3, 0)
    from raftkv.raft.changes import Remove

    with pytest.raises(Transferring):
        raft.propose_membership(Remove(3), 0)


def test_row_28_a_second_transfer_elsewhere_is_refused_the_same_again_changes_nothing() -> None:
    raft = follower()
    now_ms = leader(raft)
    raft.transfer(3, now_ms)
    raft.transfer(3, now_ms + 500)
    raft.transfer(None, now_ms + 500)
    with pytest.raises(ChangeRefused):
        raft.transfer(2, now_ms + 500)
    ack(raft, 2, raft.last_index, now_ms + 500)
    raft.tick(now_ms + 1000)
    assert raft.transferring is None, "the first one's time counts"


def test_row_28_to_a_slow_node_it_is_caught_up_first_and_else_given_up() -> None:
    cluster = Cluster(3)
    leader_id = cluster.elect()
    slow, other = others(cluster, leader_id)
    cluster.isolate(slow)
    cluster.propose(b"x", leader_id)
    cluster.run(100)
    cluster.servers[leader_id].step(lambda raft: raft.transfer(slow, cluster.now_ms))
    assert cluster.propose(b"refused", leader_id) is None
    cluster.run(1200)
    assert cluster.probes["TransferEnded"] == 1
    assert cluster.leader() == leader_id and cluster.propose(b"accepted again", leader_id)
    cluster.servers[leader_id].step(lambda raft: raft.transfer(slow, cluster.now_ms))
    cluster.heal()
    assert cluster.run(1000, lambda: cluster.leader() == slow), "caught up, then told"
    assert other != slow


def test_row_28_timeout_now_skips_the_pre_vote_and_is_repeated_while_unanswered() -> None:
    raft = follower()
    now_ms = leader(raft)
    raft.transfer(3, now_ms)
    assert len(sent(drain(raft), TimeoutNow, 3)) == 1
    raft.tick(now_ms + 100)
    assert len(sent(drain(raft), TimeoutNow, 3)) == 1


@pytest.mark.parametrize("voters", [(2, 3), (2, 3, 4)])
def test_row_28_a_non_member_ignores_timeout_now(voters: tuple[int, ...]) -> None:
    raft = follower(voters=voters)
    raft.step(append(1, 2, (0, 0)), 0)
    drain(raft)
    raft.step(TimeoutNow(1, 2), 0)
    assert not sent(drain(raft), RequestVote) and raft.term == 1


def test_row_28_timeout_now_from_one_that_does_not_lead_is_ignored() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 0)
    drain(raft)
    raft.step(TimeoutNow(1, 3), 0)
    assert not sent(drain(raft), RequestVote)


def test_row_28_the_lease_is_dropped_before_the_order_to_campaign_and_stays_so() -> None:
    raft = follower(config=RaftConfig(1, lease_reads=True))
    now_ms = leader(raft)
    assert raft.lease_valid(now_ms)
    raft.transfer(3, now_ms)
    assert not raft.lease_valid(now_ms)
    for _ in range(12):
        now_ms += 100
        raft.tick(now_ms)
        drain(raft)
        for source in (2, 3):
            ack(raft, source, raft.last_index, now_ms)
    assert raft.transferring is None and raft.role == "leader"
    assert not raft.lease_valid(now_ms), "the order may still be under way"


def test_row_28_leadership_lost_during_a_transfer_ends_it_quietly() -> None:
    raft = follower()
    leader(raft)
    raft.transfer(3, 0)
    raft.step(vote_request(2, 3, (1, 1), transfer=True), 0)
    actions = drain(raft)
    assert raft.transferring is None and not of(actions, TransferEnded)
    assert of(actions, RoleChanged)[-1].role == "follower"
    assert not sent(actions, AppendEntries)
