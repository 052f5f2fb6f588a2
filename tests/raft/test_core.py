"""The public face of the core: replicated time, what shells read from it, and the corners of its contract."""

from __future__ import annotations

import pytest

from raftkv.raft.actions import (
    Commit,
    HardState,
    Persist,
    ReadFailed,
    ReadReady,
    Send,
    SnapshotChunkReceived,
    SnapshotComplete,
    SnapshotReleased,
    TransferEnded,
)
from raftkv.raft.changes import Remove
from raftkv.raft.config import RaftConfig
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import Busy, ChangeRefused, NotLeader, RaftRefusal, SafetyViolation, Transferring
from raftkv.raft.membership import Membership
from raftkv.raft.messages import (
    AppendEntries,
    AppendReply,
    InstallSnapshot,
    ReadIndexReply,
    ReadIndexRequest,
    SnapshotReply,
    VoteReply,
)
from tests.raft.solo import ack, append, candidate, drain, entries, follower, leader, of, reject, sent

# ---- replicated time


def test_stamps_go_on_from_the_logs_last_by_the_leaders_monotonic_clock() -> None:
    last = Entry.make(1, 1, EntryKind.TICK, 5_000_000, b"")
    raft = follower(log=(last,))
    now_ms = leader(raft)
    taken_over_ms = raft.node.replication.base_ms
    assert raft.stamp_ms >= 5_000_000
    entry = raft.propose(b"x", now_ms + 700)
    assert entry.stamp_ms == 5_000_000 + now_ms + 700 - taken_over_ms
    assert raft.stamp_now(now_ms + 900) == 5_000_000 + now_ms + 900 - taken_over_ms
    assert raft.propose(b"y", now_ms).stamp_ms >= entry.stamp_ms, "never backwards"


def test_stamps_do_not_run_while_nobody_leads_and_are_the_logs_on_followers() -> None:
    raft = follower(log=(Entry.make(1, 1, EntryKind.TICK, 77, b""),))
    assert raft.stamp_now(10_000) == 77


def test_stamps_never_fall_below_the_snapshots() -> None:
    raft = follower(term=1)
    raft.step(InstallSnapshot(1, 2, b"id", 5, 1, Membership((1, 2, 3)), 1, 0, b"x", 2363233923), 0)
    drain(raft)
    raft.snapshot_stored(b"id", 1, 0)
    drain(raft)
    raft.snapshot_installed(b"id", 0, stamp_ms=123_456)
    drain(raft)
    leader(raft, matched=False)
    assert raft.entries_from(6, 1)[0].stamp_ms >= 123_456


def test_a_tick_entry_and_a_memo() -> None:
    raft = follower()
    leader(raft)
    memo = object()
    assert raft.propose(b"", 0, kind=EntryKind.TICK).kind == EntryKind.TICK
    entry = raft.propose(b"data", 0, memo=memo)
    drain(raft)
    ack(raft, 2, entry.index)
    (commit,) = of(drain(raft), Commit)
    assert commit.entries[-1].memo is memo, "the leader's shell finds what it had decoded"
    with pytest.raises(AssertionError):
        raft.propose(b"", 0, kind=EntryKind.MEMBERSHIP)


# ---- what is read from it


def test_what_a_replica_says_about_itself() -> None:
    raft = follower(2, log=(1, 1, 2), start=(4, 1), applied=5, term=3, vote=1)
    assert (raft.replica, raft.role, raft.term, raft.vote, raft.leader) == (2, "follower", 3, 1, None)
    assert raft.hard_state == HardState(3, 1)
    assert (raft.start_index, raft.start_term, raft.first_index) == (4, 1, 5)
    assert (raft.last_index, raft.last_term, raft.commit_index, raft.applied_index) == (7, 2, 5, 5)
    assert raft.log_bytes == sum(entry.size_bytes for entry in raft.entries_from(5, 1 << 20))
    assert (raft.uncommitted_bytes, raft.transferring, raft.peer_progress()) == (0, None, {})
    assert raft.snapshot_pins() == 8 and not raft.has_committed_in_term


def test_what_a_leader_says_about_its_peers() -> None:
    raft = follower(learners=(4,))
    now_ms = leader(raft, matched=False)
    ack(raft, 2, 1, now_ms + 5)
    progress = raft.peer_progress()
    assert set(progress) == {2, 3, 4}
    assert progress[2] == (1, 2, "replicate", now_ms + 5)
    assert progress[3][:3] == (0, 1, "probe")
    assert raft.has_committed_in_term


def test_a_stream_pins_the_log_behind_its_snapshot() -> None:
    raft = follower(start=(5, 1))
    leader(raft, matched=False)
    ack(raft, 3, raft.last_index)
    reject(raft, 2, 5, (0, 0), 0)
    drain(raft)
    for _ in range(3):
        raft.propose(b"x", 0)
    drain(raft)
    ack(raft, 3, raft.last_index)
    raft.snapshot_offered(2, b"id", 6, raft.term, raft.membership, 9, 0)
    assert raft.snapshot_pins() == 7


def test_refusals_tell_what_to_do() -> None:
    assert str(NotLeader(None)) == "no leader is known" and "3" in str(NotLeader(3))
    for refusal in (NotLeader(1), Busy(5), Transferring(2), ChangeRefused("no")):
        assert isinstance(refusal, RaftRefusal)
    assert not issubclass(SafetyViolation, RaftRefusal)


# ---- corners


def test_two_leaders_of_one_term_stop_the_one_that_notices() -> None:
    raft = follower()
    leader(raft)
    with pytest.raises(SafetyViolation):
        raft.step(append(raft.term, 2, (0, 0)), 0)


def test_messages_of_strangers_and_of_itself_do_nothing() -> None:
    raft = follower()
    leader(raft)
    before = raft.peer_progress()
    raft.step(AppendReply(raft.term, 9, True, 1, 1, 0, 1, 0, 1), 0)
    raft.step(AppendReply(raft.term, 1, True, 1, 1, 0, 1, 0, 1), 0)
    raft.step(SnapshotReply(raft.term, 9, b"id", 0, True, False, 1), 0)
    raft.step(ReadIndexReply(raft.term, 2, 123, 1), 0)
    raft.peer_unreachable(9)
    raft.peer_reachable(9)
    assert drain(raft) == [] and raft.peer_progress() == before


def test_a_stranger_may_ask_for_a_vote_it_may_have_been_added_since() -> None:
    raft = follower()
    from tests.raft.solo import vote_request

    raft.step(vote_request(3, 9, (0, 0)), 0)
    assert [reply.granted for reply in sent(drain(raft), VoteReply)] == [True]


def test_acknowledgements_of_one_turn_are_one_message() -> None:
    raft = follower(term=1)
    raft.step(append(1, 2, (0, 0)), 0)
    drain(raft)
    for index in range(10):
        raft.step(append(1, 2, (index, 1 if index else 0), entries(1, first=index + 1)), 0)
    actions = drain(raft)
    (persist,) = of(actions, Persist)
    assert len(persist.entries) == 10
    (reply,) = sent(actions, AppendReply)
    assert reply.match_index == 10


def test_a_new_round_is_echoed_before_the_disk_is_done() -> None:
    raft = follower(term=1)
    raft.step(append(1, 2, (0, 0), entries(1), round_number=7), 0)
    actions = raft.take_actions()
    (persist,) = of(actions, Persist)
    early, late = [a for a in of(actions, Send) if isinstance(a.message, AppendReply)]
    assert isinstance(early.message, AppendReply) and isinstance(late.message, AppendReply)
    assert (early.after, early.message.match_index, early.message.round) == (0, 0, 7)
    assert (late.after, late.message.match_index) == (persist.seq, 1)


def test_seqs_that_complete_together_or_twice() -> None:
    raft = follower(voters=(1,))
    leader(raft)
    seqs = []
    for _ in range(3):
        raft.propose(b"x", 0)
        seqs += [persist.seq for persist in of(raft.take_actions(), Persist)]
    raft.persisted(seqs[2])
    raft.persisted(seqs[0])
    assert raft.commit_index == raft.last_index
    with pytest.raises(AssertionError):
        raft.persisted(seqs[2] + 1)


def test_reports_of_what_is_applied_may_repeat_but_not_run_ahead() -> None:
    raft = follower(voters=(1,))
    leader(raft)
    raft.applied(1)
    with pytest.raises(AssertionError):
        raft.applied(2)


def test_a_read_in_a_group_of_one_needs_nobody() -> None:
    raft = follower(voters=(1,))
    leader(raft)
    read = raft.read(0)
    assert of(drain(raft), ReadReady) == [ReadReady(read, read, 1)]


def test_a_follower_that_loses_its_leader_before_it_could_ask_fails_the_read() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 0)
    drain(raft)
    read = raft.read(0, forward=True)
    raft.tick(2000)
    assert of(drain(raft), ReadFailed) == [ReadFailed(read, read)]


def test_a_confirmed_index_that_a_follower_cannot_reach_fails_in_the_end() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 0)
    read = raft.read(0, forward=True)
    (request,) = sent(drain(raft), ReadIndexRequest)
    raft.step(ReadIndexReply(1, 2, request.context, 99), 0)
    assert raft.next_deadline_ms <= 1000
    for now_ms in (400, 800, 1000):
        raft.step(append(1, 2, (0, 0)), now_ms)
        raft.tick(now_ms)
    assert of(drain(raft), ReadFailed) == [ReadFailed(read, read)]


def test_transfer_to_a_replica_that_lost_its_log_is_refused() -> None:
    raft = follower()
    now_ms = leader(raft) + 100
    raft.tick(now_ms)
    drain(raft)
    reject(raft, 3, 1, (0, 0), 0, now_ms)
    with pytest.raises(ChangeRefused, match="lost part"):
        raft.transfer(3, now_ms)
    raft.transfer(None, now_ms)
    assert raft.transferring == 2


def test_a_transfer_ends_when_its_target_is_removed_by_a_change_under_way() -> None:
    raft = follower(voters=(1, 2, 3, 4))
    leader(raft)
    raft.node.transfer.target = 3  # as if the order of events had been the other way round
    raft.node.transfer.deadline_ms = 1 << 40
    entry = Entry.make(raft.term, raft.last_index + 1, EntryKind.MEMBERSHIP, 0, Membership((1, 2, 4)).encode())
    raft.node.log.append(entry)
    raft.node.changes.appended(entry)
    raft.node.replication.uncommitted_bytes += entry.size_bytes
    assert TransferEnded(3) in drain(raft)
    assert raft.transferring is None


def test_a_campaigner_does_not_give_its_log_away() -> None:
    raft = follower(term=1)
    raft.step(InstallSnapshot(1, 2, b"id", 5, 1, Membership((1, 2, 3)), 1, 0, b"x", 2363233923), 0)
    assert of(drain(raft), SnapshotChunkReceived)
    candidate(raft)
    drain(raft)
    raft.snapshot_stored(b"id", 1, 0)
    assert not of(drain(raft), SnapshotComplete) and not raft.node.installing
    raft.step(append(2, 3, (0, 0)), 0)
    assert of(drain(raft), SnapshotComplete), "once it follows again"


def test_a_leader_drops_what_was_arriving_before() -> None:
    raft = follower(term=1)
    raft.step(InstallSnapshot(1, 2, b"id", 5, 1, Membership((1, 2, 3)), 2, 0, b"x", 2363233923), 0)
    drain(raft)
    leader(raft)
    raft.snapshot_stored(b"id", 1, 0)
    raft.snapshot_failed(b"id", 0)
    assert drain(raft) == [] and raft.node.snapshots.reception is None


def test_an_offer_that_nobody_waits_for_is_given_back() -> None:
    raft = follower()
    leader(raft)
    raft.snapshot_offered(2, b"id", 1, 1, raft.membership, 10, 0)
    raft.snapshot_chunk(2, b"id", 0, b"x", 0)
    raft.snapshot_unavailable(2, 0)
    assert drain(raft) == [SnapshotReleased(2, b"id")]


def test_an_empty_snapshot_is_one_empty_chunk() -> None:
    raft = follower(start=(5, 1))
    leader(raft, matched=False)
    reject(raft, 2, 5, (0, 0), 0)
    drain(raft)
    raft.snapshot_offered(2, b"id", 5, 1, raft.membership, 0, 0)
    (message,) = sent(drain(raft), InstallSnapshot)
    assert (message.offset, message.chunk, message.total_bytes) == (0, b"", 0)


def test_a_follower_catching_up_by_snapshot_can_complete_a_quorum() -> None:
    raft = follower(start=(5, 1))
    leader(raft, matched=False)
    reject(raft, 2, 5, (0, 0), 0)
    drain(raft)
    raft.snapshot_offered(2, b"id", 5, 1, raft.membership, 9, 0)
    drain(raft)
    raft.step(SnapshotReply(raft.term, 2, b"other", 0, True, False, 6), 0)
    assert raft.commit_index == 5, "another snapshot's answer"
    raft.step(SnapshotReply(raft.term, 2, b"id", 99, False, False, 0), 0)
    raft.step(SnapshotReply(raft.term, 2, b"id", 9, True, False, 6), 0)
    assert raft.commit_index == 6


def test_when_the_last_other_voter_is_gone_a_removed_leader_has_nobody_to_order() -> None:
    raft = follower(voters=(1, 2))
    leader(raft)
    entry = raft.propose_membership(Remove(1), 0)
    drain(raft)
    ack(raft, 2, entry.index)
    raft.node.election.counted[0].regressed = True
    raft.node.election.recount()
    actions = drain(raft)
    assert raft.role == "learner" and sent(actions, AppendEntries)


def test_hints_below_the_commit_index_are_raised_to_it() -> None:
    raft = follower(log=(1, 3, 3, 3), applied=3)
    raft.step(append(5, 2, (4, 2)), 0)
    (reply,) = sent(drain(raft), AppendReply)
    assert (reply.ok, reply.hint_index, reply.hint_term) == (False, 3, 3)


def test_time_never_runs_backwards_inside() -> None:
    raft = follower(config=RaftConfig(1, pre_vote=False))
    raft.step(append(1, 2, (0, 0)), 5000)
    deadline_ms = raft.next_deadline_ms
    raft.tick(10)
    assert raft.role == "follower" and raft.next_deadline_ms == deadline_ms


def test_while_a_disk_is_silent_one_acknowledgement_waits_for_it_not_one_a_heartbeat() -> None:
    raft = follower(term=1)
    raft.step(append(1, 2, (0, 0), entries(1)), 0)
    raft.take_actions()
    for round_number in range(2, 20):
        raft.step(append(1, 2, (1, 1), round_number=round_number), 0)
        (echo,) = raft.take_actions()
        assert isinstance(echo, Send) and isinstance(echo.message, AppendReply)
        assert (echo.after, echo.message.match_index, echo.message.round) == (0, 0, round_number)


def test_after_an_installation_a_whole_election_timeout_is_waited() -> None:
    raft = follower(term=1)
    raft.step(InstallSnapshot(1, 2, b"id", 5, 1, Membership((1, 2, 3)), 1, 0, b"x", 2363233923), 0)
    drain(raft)
    raft.snapshot_stored(b"id", 1, 0)
    drain(raft)
    raft.snapshot_installed(b"id", 60_000)
    raft.tick(60_000)
    assert raft.role == "follower" and raft.next_deadline_ms >= 60_500
