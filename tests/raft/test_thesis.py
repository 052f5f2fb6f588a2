"""One test for each rule that only Ongaro's thesis has, named by its sentence and its section.

Leadership transfer, corrected membership changes, check-quorum, ReadIndex, leases, pre-vote, parallel writes.
"""

from __future__ import annotations

import pytest

from raftkv.raft.actions import (
    Persist,
    ReadReady,
    Send,
    TransferEnded,
)
from raftkv.raft.changes import AddLearner, Promote, Remove
from raftkv.raft.config import RaftConfig
from raftkv.raft.errors import ChangeRefused, NotLeader, Transferring
from raftkv.raft.messages import (
    AppendEntries,
    RequestVote,
    TimeoutNow,
    VoteReply,
)
from tests.raft.solo import (
    ELECTION_MS_MAX,
    ELECTION_MS_MIN,
    ack,
    append,
    drain,
    entries,
    follower,
    leader,
    of,
    reject,
    sent,
    sync,
    time_out,
    vote_request,
)

# ---- thesis §3.10 leadership transfer


def test_thesis_3_10_the_leader_stops_taking_requests_and_tells_an_up_to_date_target_to_campaign() -> None:
    raft = follower()
    leader(raft)
    raft.transfer(3, 0)
    assert sent(drain(raft), TimeoutNow, 3) and raft.transferring == 3
    with pytest.raises(Transferring):
        raft.propose(b"x", 0)


def test_thesis_3_10_the_targets_log_is_brought_up_to_date_first() -> None:
    raft = follower()
    leader(raft)
    entry = raft.propose(b"x", 0)
    raft.transfer(3, 0)
    assert not sent(drain(raft), TimeoutNow)
    ack(raft, 3, entry.index)
    assert sent(drain(raft), TimeoutNow, 3)


def test_thesis_3_10_the_target_begins_an_election_at_once_and_its_votes_override_stickiness() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 0)
    drain(raft)
    raft.step(TimeoutNow(1, 2), 1)
    requests = sent(drain(raft), RequestVote)
    assert requests and all(r.transfer and not r.pre and r.term == 2 for r in requests)
    voter = follower(3)
    voter.step(append(1, 2, (0, 0)), 0)
    voter.step(requests[0], 2)
    assert (voter.term, voter.vote) == (2, 1)


def test_thesis_3_10_after_an_election_timeout_the_leader_gives_up_and_resumes() -> None:
    raft = follower()
    now_ms = leader(raft)
    raft.transfer(3, now_ms)
    for _ in range(10):
        now_ms += 100
        for source in (2, 3):
            ack(raft, source, raft.last_index, now_ms)
        raft.tick(now_ms)
    assert of(drain(raft), TransferEnded) == [TransferEnded(3)]
    assert raft.transferring is None and raft.propose(b"x", now_ms)


# ---- thesis §4 membership


def test_thesis_4_1_a_change_begins_only_when_the_previous_one_is_committed() -> None:
    raft = follower()
    leader(raft)
    entry = raft.propose_membership(AddLearner(4), 0)
    with pytest.raises(ChangeRefused):
        raft.propose_membership(AddLearner(5), 0)
    drain(raft)
    ack(raft, 2, entry.index)
    assert raft.propose_membership(AddLearner(5), 0)


def test_thesis_4_1_corrected_a_change_begins_only_after_an_entry_of_the_leaders_term_is_committed() -> None:
    raft = follower(log=(1,))
    leader(raft, matched=False)
    with pytest.raises(ChangeRefused):
        raft.propose_membership(Remove(3), 0)
    ack(raft, 2, raft.last_index)
    assert raft.propose_membership(Remove(3), 0)


def test_thesis_4_2_1_a_new_server_is_promoted_once_it_has_caught_up() -> None:
    raft = follower(voters=(1, 2, 3), learners=(4,), log=(1,) * 100)
    leader(raft, matched=False)
    ack(raft, 2, raft.last_index)
    with pytest.raises(ChangeRefused):
        raft.propose_membership(Promote(4), 0)
    reject(raft, 4, 100, (0, 0), 0)
    drain(raft)
    ack(raft, 4, raft.last_index)
    raft.propose_membership(Promote(4), 0)
    assert raft.membership.voters == (1, 2, 3, 4)


def test_thesis_4_2_2_a_server_that_is_not_a_voter_does_not_campaign() -> None:
    raft = follower(4, learners=(4,))
    now_ms = 0
    for _ in range(10):
        now_ms = raft.next_deadline_ms
        raft.tick(now_ms)
    assert (raft.role, raft.term, drain(raft)) == ("learner", 0, [])


# ---- thesis §6.2, §6.4 leaders that are none any more, reads


def test_thesis_6_2_a_leader_that_reaches_no_majority_for_an_election_timeout_steps_down() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5))
    began_ms = now_ms = leader(raft)
    while raft.role == "leader":
        now_ms = raft.next_deadline_ms
        ack(raft, 2, raft.last_index, now_ms)  # one of five is not enough
        raft.tick(now_ms)
        drain(raft)
    assert ELECTION_MS_MIN <= now_ms - began_ms <= ELECTION_MS_MAX + 100
    assert raft.leader is None


def test_thesis_6_2_a_leader_that_reaches_a_majority_stays() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5))
    now_ms = leader(raft)
    for _ in range(50):
        now_ms = raft.next_deadline_ms
        for source in (2, 3):
            ack(raft, source, raft.last_index, now_ms)
        raft.tick(now_ms)
        drain(raft)
    assert raft.role == "leader"


def test_thesis_6_4_reads_that_came_in_together_share_one_round() -> None:
    raft = follower()
    leader(raft)
    ids = [raft.read(0) for _ in range(10)]
    assert len(sent(drain(raft), AppendEntries)) == 2
    ack(raft, 2, raft.last_index)
    assert of(drain(raft), ReadReady) == [ReadReady(ids[0], ids[-1], raft.commit_index)]


def test_thesis_6_4_a_confirmed_read_waits_until_the_state_machine_has_reached_its_index() -> None:
    raft = follower()
    leader(raft)
    entry = raft.propose(b"x", 0)
    sync(raft, [a for a in raft.take_actions() if isinstance(a, Persist)])
    ack(raft, 2, entry.index)
    raft.read(0)
    raft.take_actions()
    ack(raft, 2, entry.index)
    assert not of(raft.take_actions(), ReadReady)
    raft.applied(entry.index)
    assert of(raft.take_actions(), ReadReady) == [ReadReady(1, 1, entry.index)]


def test_thesis_6_4_a_follower_asks_the_leader_for_a_read_index() -> None:
    from raftkv.raft.messages import ReadIndexReply, ReadIndexRequest

    raft = follower()
    raft.step(append(1, 2, (0, 0), entries(1)), 0)
    drain(raft)
    with pytest.raises(NotLeader):
        raft.read(0)
    read = raft.read(0, forward=True)
    (request,) = sent(drain(raft), ReadIndexRequest, 2)
    raft.step(ReadIndexReply(1, 2, request.context, 1), 0)
    assert not of(drain(raft), ReadReady), "the follower has not applied it yet"
    raft.step(append(1, 2, (1, 1), commit=1), 0)
    assert of(drain(raft), ReadReady) == [ReadReady(read, read, 1)]


def test_thesis_6_4_1_a_lease_counts_from_the_sending_of_a_round_and_ends_before_an_election_can() -> None:
    raft = follower(config=RaftConfig(1, lease_reads=True))
    now_ms = leader(raft)
    round_sent_ms = now_ms + 100
    raft.tick(round_sent_ms)
    drain(raft)
    ack(raft, 2, raft.last_index, round_sent_ms + 90)
    read = raft.read(round_sent_ms + 300)
    assert of(drain(raft), ReadReady) == [ReadReady(read, read, raft.commit_index)]
    assert not raft.lease_valid(round_sent_ms + ELECTION_MS_MIN - 1)


# ---- thesis §9.6 pre-vote


def test_thesis_9_6_a_candidate_raises_its_term_only_after_a_majority_would_vote_for_it() -> None:
    raft = follower(log=(3,))
    time_out(raft)
    actions = drain(raft)
    assert (raft.role, raft.term, raft.vote) == ("precandidate", 3, None)
    assert not of(actions, Persist)
    assert sent(actions, RequestVote) == [RequestVote(4, 1, 1, 3, True, False)] * 2
    raft.step(VoteReply(4, 2, True, True), 0)
    assert (raft.role, raft.term, raft.vote) == ("candidate", 4, 1)


def test_thesis_9_6_a_server_grants_pre_votes_to_any_number_of_candidates_and_remembers_none() -> None:
    raft = follower()
    for source in (2, 3):
        raft.step(vote_request(1, source, (0, 0), pre=True), 0)
    actions = drain(raft)
    assert [reply.granted for reply in sent(actions, VoteReply)] == [True, True]
    assert (raft.term, raft.vote) == (0, None) and not of(actions, Persist)


def test_thesis_9_6_a_server_that_heard_from_a_leader_grants_no_pre_vote() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 1000)
    drain(raft)
    raft.step(vote_request(2, 3, (9, 1), pre=True), 1000 + ELECTION_MS_MIN - 1)
    assert drain(raft) == []


# ---- thesis §10.2


def test_thesis_10_2_1_the_leader_writes_to_its_disk_in_parallel_with_the_followers() -> None:
    raft = follower()
    leader(raft)
    entry = raft.propose(b"x", 0)
    actions = raft.take_actions()
    appends = [action for action in of(actions, Send) if isinstance(action.message, AppendEntries)]
    assert [action.after for action in appends] == [0, 0]
    (persist,) = of(actions, Persist)
    ack(raft, 2, entry.index)
    assert raft.commit_index < entry.index, "one of three: the leader's own copy isn't on disk"
    raft.persisted(persist.seq)
    assert raft.commit_index == entry.index


def test_thesis_10_2_1_followers_can_commit_before_the_leaders_disk_is_done() -> None:
    raft = follower()
    leader(raft)
    entry = raft.propose(b"x", 0)
    raft.take_actions()
    for source in (2, 3):
        ack(raft, source, entry.index)
    assert raft.commit_index == entry.index


def test_thesis_10_2_2_appends_are_pipelined() -> None:
    raft = follower()
    leader(raft)
    for number in range(5):
        entry = raft.propose(b"%d" % number, 0)
        (message,) = sent(raft.take_actions(), AppendEntries, 2)
        assert message.entries == (entry,), "sent without waiting for the one before"
