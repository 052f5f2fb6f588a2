"""One test for each rule of the Raft paper (extended version), named by its sentence and its section.

Those of the thesis are in test_thesis.py.
"""

from __future__ import annotations

import pytest

from raftkv.raft.actions import (
    Commit,
    MembershipChanged,
    Persist,
    ReadReady,
    RoleChanged,
    Send,
    SnapshotChunkReceived,
    SnapshotChunkWanted,
    SnapshotComplete,
    SnapshotWanted,
)
from raftkv.raft.changes import AddLearner, Promote, Remove
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import ChangeRefused, NotLeader
from raftkv.raft.membership import Membership
from raftkv.raft.messages import (
    AppendEntries,
    AppendReply,
    InstallSnapshot,
    Message,
    RequestVote,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
)
from tests.raft.solo import (
    ELECTION_MS_MAX,
    ELECTION_MS_MIN,
    ack,
    append,
    candidate,
    drain,
    entries,
    follower,
    leader,
    of,
    reject,
    sent,
    vote_request,
)

# ---- §5.1 terms


@pytest.mark.parametrize("role", ["follower", "candidate", "leader"])
def test_5_1_a_server_that_sees_a_higher_term_adopts_it_and_becomes_follower(role: str) -> None:
    raft = follower()
    if role == "candidate":
        candidate(raft)
    elif role == "leader":
        leader(raft)
    higher = raft.term + 5
    raft.step(append(higher, 2, (0, 0)), 0)
    assert (raft.role, raft.term, raft.vote, raft.leader) == ("follower", higher, None, 2)


def test_5_1_a_request_with_a_stale_term_is_rejected() -> None:
    raft = follower(term=5)
    raft.step(append(4, 2, (0, 0), entries(4)), 0)
    raft.step(vote_request(4, 3, (9, 4)), 0)
    actions = drain(raft)
    assert [reply.ok for reply in sent(actions, AppendReply, 2)] == [False]
    assert [reply.granted for reply in sent(actions, VoteReply, 3)] == [False]
    assert all(action.message.term == 5 for action in of(actions, Send))
    assert (raft.last_index, raft.leader, raft.vote) == (0, None, None)


def test_5_1_no_message_of_a_term_leaves_before_the_term_is_on_disk() -> None:
    raft = follower()
    raft.step(append(7, 2, (0, 0)), 0)
    actions = raft.take_actions()
    (persist,) = of(actions, Persist)
    assert persist.hard_state is not None and persist.hard_state.term == 7
    assert [action.after for action in of(actions, Send)] == [persist.seq]


# ---- §5.2 leader election


def test_5_2_servers_begin_as_followers() -> None:
    assert follower().role == "follower"
    assert follower(voters=(2, 3), learners=(1,)).role == "learner"


def test_5_2_a_follower_that_hears_nothing_over_an_election_timeout_begins_an_election() -> None:
    raft = follower(config=RaftConfig(1, pre_vote=False))
    raft.tick(raft.next_deadline_ms - 1)
    assert raft.role == "follower"
    raft.tick(raft.next_deadline_ms)
    assert raft.role == "candidate"


def test_5_2_a_follower_stays_one_while_it_receives_valid_messages() -> None:
    raft = follower()
    now_ms = 0
    for _ in range(50):
        now_ms += ELECTION_MS_MIN - 1
        raft.step(append(1, 2, (0, 0)), now_ms)
        raft.tick(now_ms)
        drain(raft)
    assert (raft.role, raft.leader) == ("follower", 2)


def test_5_2_to_begin_an_election_a_follower_raises_its_term_votes_for_itself_and_asks_all_others() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5), log=(1, 1, 2))
    candidate(raft)
    actions = raft.take_actions()
    (persist,) = of(actions, Persist)
    assert persist.hard_state is not None
    assert (persist.hard_state.term, persist.hard_state.vote) == (3, 1)
    requests = [action for action in of(actions, Send) if action.after == persist.seq]
    assert [action.to for action in requests] == [2, 3, 4, 5]
    assert all(action.message == RequestVote(3, 1, 3, 2, False, False) for action in requests)


def test_5_2_a_candidate_counts_its_own_vote_once_it_is_on_disk() -> None:
    raft = follower()
    candidate(raft)
    (persist,) = of(raft.take_actions(), Persist)
    raft.step(VoteReply(raft.term, 2, True, False), 0)
    assert raft.role == "candidate"
    raft.persisted(persist.seq)
    assert raft.role == "leader"


@pytest.mark.parametrize(("voters", "grants"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_5_2_a_candidate_wins_with_votes_from_a_majority(voters: int, grants: int) -> None:
    raft = follower(voters=range(1, voters + 1), config=RaftConfig(1, pre_vote=False))
    candidate(raft)
    drain(raft)
    for number in range(grants):
        assert raft.role == "candidate"
        raft.step(VoteReply(raft.term, 2 + number, True, False), 0)
    assert raft.role == "leader"


def test_5_2_a_candidate_refused_by_a_majority_returns_to_follower() -> None:
    raft = follower()
    candidate(raft)
    drain(raft)
    for voter in (2, 3):
        raft.step(VoteReply(raft.term, voter, False, False), 0)
    assert (raft.role, raft.term) == ("follower", 1)


def test_5_2_one_voter_answers_twice_and_counts_once() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5))
    candidate(raft)
    drain(raft)
    for _ in range(4):
        raft.step(VoteReply(raft.term, 2, True, False), 0)
    assert raft.role == "candidate"


def test_5_2_each_server_votes_for_at_most_one_candidate_in_a_term_first_come_first_served() -> None:
    raft = follower()
    for source, expected in ((2, True), (3, False), (2, True)):
        raft.step(vote_request(1, source, (0, 0)), 0)
        (reply,) = sent(drain(raft), VoteReply)
        assert reply.granted is expected
    raft.step(vote_request(2, 3, (0, 0)), 0)
    (reply,) = sent(drain(raft), VoteReply)
    assert reply.granted and raft.vote == 3


def test_5_2_a_vote_leaves_once_it_is_on_disk() -> None:
    raft = follower()
    raft.step(vote_request(1, 2, (0, 0)), 0)
    actions = raft.take_actions()
    (persist,) = of(actions, Persist)
    assert persist.hard_state is not None and persist.hard_state.vote == 2
    assert [action.after for action in of(actions, Send)] == [persist.seq]


def test_5_2_a_candidate_that_hears_from_a_leader_of_its_term_returns_to_follower() -> None:
    raft = follower()
    candidate(raft)
    raft.step(append(raft.term, 3, (0, 0)), 0)
    assert (raft.role, raft.term, raft.leader) == ("follower", 1, 3)


def test_5_2_a_candidate_that_hears_from_a_leader_of_an_older_term_goes_on() -> None:
    raft = follower(term=4)
    candidate(raft)
    raft.step(append(4, 3, (0, 0)), 0)
    assert (raft.role, raft.term) == ("candidate", 5)


def test_5_2_a_candidate_whose_election_times_out_begins_another_in_a_higher_term() -> None:
    raft = follower(config=RaftConfig(1, pre_vote=False))
    candidate(raft)
    drain(raft)
    raft.tick(raft.next_deadline_ms)
    assert (raft.role, raft.term) == ("candidate", 2)
    assert len(sent(drain(raft), RequestVote)) == 2


def test_5_2_election_timeouts_are_chosen_randomly_from_a_fixed_interval() -> None:
    seen = {follower(seed=seed).next_deadline_ms for seed in range(300)}
    assert min(seen) >= ELECTION_MS_MIN and max(seen) <= ELECTION_MS_MAX
    assert len(seen) > 150 and max(seen) - min(seen) > 400


def test_5_2_a_new_leader_tells_all_others_at_once() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5))
    candidate(raft)
    drain(raft)
    raft.step(VoteReply(1, 2, True, False), 0)
    raft.step(VoteReply(1, 3, True, False), 0)
    actions = drain(raft)
    assert [action.to for action in of(actions, Send)] == [2, 3, 4, 5]
    assert of(actions, RoleChanged)[-1] == RoleChanged("leader", 1, 1)


def test_5_2_a_leader_sends_heartbeats_to_all_followers() -> None:
    raft = follower()
    now_ms = leader(raft)
    for _ in range(5):
        assert raft.next_deadline_ms <= now_ms + 100
        now_ms = raft.next_deadline_ms
        raft.tick(now_ms)
        beats = [action for action in of(drain(raft), Send) if isinstance(action.message, AppendEntries)]
        assert [action.to for action in beats] == [2, 3]
        for follower_id in (2, 3):
            ack(raft, follower_id, raft.last_index, now_ms)


# ---- §5.3 log replication


def test_5_3_the_leader_appends_a_command_and_sends_it_in_parallel_to_all_others() -> None:
    raft = follower()
    leader(raft)
    entry = raft.propose(b"x", 0)
    actions = raft.take_actions()
    messages = sent(actions, AppendEntries)
    assert [message.entries for message in messages] == [(entry,), (entry,)]
    assert messages[0] is messages[1], "the same object: it is encoded once"
    assert [persist.entries for persist in of(actions, Persist)] == [(entry,)]


def test_5_3_an_entry_is_committed_once_the_leader_has_it_on_a_majority() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5))
    leader(raft)
    entry = raft.propose(b"x", 0)
    drain(raft)
    ack(raft, 2, entry.index)
    assert raft.commit_index == entry.index - 1
    ack(raft, 3, entry.index)
    assert raft.commit_index == entry.index
    assert [commit.entries for commit in of(drain(raft), Commit)] == [(entry,)]


def test_5_3_committing_an_entry_commits_all_before_it_those_of_earlier_leaders_too() -> None:
    raft = follower(log=(1, 1, 2))
    leader(raft, matched=False)
    assert raft.commit_index == 0
    ack(raft, 2, raft.last_index)
    (commit,) = of(drain(raft), Commit)
    assert [entry.index for entry in commit.entries] == [1, 2, 3, 4]


def test_5_3_the_leader_includes_its_commit_index_and_followers_apply_up_to_it() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0), entries(1, 1), commit=1), 0)
    actions = drain(raft)
    assert [commit.entries for commit in of(actions, Commit)] == [entries(1)]
    raft.step(append(1, 2, (2, 1), commit=2), 0)
    (commit,) = of(drain(raft), Commit)
    assert [entry.index for entry in commit.entries] == [2]


def test_5_3_leader_commit_is_taken_no_further_than_the_last_new_entry() -> None:
    raft = follower(log=(1, 1, 1))
    raft.step(append(2, 2, (1, 1), commit=3), 0)
    assert raft.commit_index == 1


def test_5_3_the_next_index_begins_just_after_the_leaders_last_entry() -> None:
    raft = follower(log=(1, 1, 2))
    candidate(raft)
    drain(raft)
    raft.step(VoteReply(3, 2, True, False), 0)
    for message in sent(drain(raft), AppendEntries):
        assert (message.prev_index, message.prev_term) == (3, 2)


@pytest.mark.parametrize(
    ("prev", "refused"),
    [((0, 0), False), ((1, 1), False), ((2, 2), False), ((1, 2), True), ((2, 1), True), ((3, 3), True)],
)
def test_5_3_a_follower_refuses_entries_unless_it_has_the_previous_one(prev: tuple[int, int], refused: bool) -> None:
    raft = follower(log=(1, 2))
    raft.step(append(3, 2, prev), 0)
    (reply,) = sent(drain(raft), AppendReply)
    assert reply.ok is not refused
    assert raft.last_index == 2


@pytest.mark.parametrize(
    ("prev", "new", "expected"),
    [
        ((2, 2), (3,), (1, 2, 3)),
        ((1, 1), (3, 4), (1, 3, 4)),
        ((0, 0), (1,), (1, 2)),
        ((0, 0), (3,), (3,)),
        ((2, 2), (), (1, 2)),
    ],
)
def test_5_3_conflicting_entries_and_all_after_them_are_replaced_others_are_kept(
    prev: tuple[int, int], new: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    raft = follower(log=(1, 2))
    raft.step(append(4, 2, prev, entries(*new, first=prev[0] + 1)), 0)
    actions = drain(raft)
    assert tuple(entry.term for entry in raft.entries_from(1, 1 << 30)) == expected
    written = [entry for persist in of(actions, Persist) for entry in persist.entries]
    assert len(written) == (0 if expected == (1, 2) else len(expected) - prev[0])


def test_5_3_after_a_refusal_the_leader_goes_back_by_term_and_tries_again() -> None:
    raft = follower(log=(1, 1, 1, 4, 4, 5, 5, 6, 6, 6))
    leader(raft, matched=False)
    # Paper's Figure 7, follower f: terms 1 1 1 2 2 2 3 3 3 3 3.
    reject(raft, 2, 10, (10, 3), 11)
    (probe,) = sent(drain(raft), AppendEntries, 2)
    assert (probe.prev_index, probe.prev_term) == (3, 1), "one step: nothing above 3 can match"
    ack(raft, 2, raft.last_index)
    assert raft.peer_progress()[2][:3] == (11, 12, "replicate")


def test_5_3_a_leader_never_overwrites_or_deletes_entries_of_its_own_log() -> None:
    raft = follower(log=(1, 2))
    leader(raft)
    before = raft.entries_from(1, 1 << 30)
    raft.step(AppendReply(raft.term, 2, False, 2, 0, 0, 0, 0, raft.node.round), 0)
    raft.step(append(1, 3, (0, 0), entries(1, 1, 1, 1)), 0)
    drain(raft)
    assert raft.entries_from(1, 1 << 30)[: len(before)] == before


def test_5_3_receiving_the_same_append_twice_does_no_harm() -> None:
    raft = follower()
    message = append(1, 2, (0, 0), entries(1, 1, 1), commit=1)
    for _ in range(2):
        raft.step(message, 0)
        replies = sent(drain(raft), AppendReply)
        assert replies[-1].ok and replies[-1].match_index == 3
    assert raft.last_index == 3


def test_5_3_a_follower_acknowledges_entries_once_they_are_on_disk() -> None:
    raft = follower(term=1)
    raft.step(append(1, 2, (0, 0), entries(1, 1)), 0)
    actions = raft.take_actions()
    (persist,) = of(actions, Persist)
    acks = [action for action in of(actions, Send) if isinstance(action.message, AppendReply)]
    for action in acks:
        assert isinstance(action.message, AppendReply)
        assert action.after == persist.seq or action.message.match_index == 0


# ---- §5.4 safety


@pytest.mark.parametrize(
    ("log", "last", "granted"),
    [
        ((1,), (1, 1), True),
        ((1,), (2, 1), True),
        ((1, 1), (1, 1), False),
        ((1,), (1, 2), True),
        ((1, 1, 1), (1, 2), True),
        ((2,), (5, 1), False),
        ((), (0, 0), True),
    ],
)
@pytest.mark.parametrize("pre", [False, True])
def test_5_4_1_a_vote_is_refused_to_a_candidate_whose_log_is_less_up_to_date(
    log: tuple[int, ...], last: tuple[int, int], granted: bool, pre: bool
) -> None:
    raft = follower(log=log)
    raft.step(vote_request(3, 2, last, pre=pre), 0)
    (reply,) = sent(drain(raft), VoteReply)
    assert reply.granted is granted


def test_5_4_2_only_entries_of_the_leaders_own_term_are_committed_by_counting_replicas() -> None:
    raft = follower(log=(1, 2))
    leader(raft, matched=False)
    for source in (2, 3):
        ack(raft, source, 2)
    assert raft.commit_index == 0
    ack(raft, 2, 3)
    assert raft.commit_index == 3


def test_5_5_a_message_to_a_crashed_server_is_repeated_until_it_answers() -> None:
    raft = follower()
    now_ms = leader(raft)
    entry = raft.propose(b"x", now_ms)
    drain(raft)
    for _ in range(3):
        now_ms += 100
        raft.tick(now_ms)
        (beat,) = sent(drain(raft), AppendEntries, 3)
        assert beat.prev_index == entry.index
        ack(raft, 2, entry.index, now_ms)
    reject(raft, 3, entry.index, (entry.index - 1, 1), entry.index - 1, now_ms)
    (again,) = sent(drain(raft), AppendEntries, 3)
    assert again.entries == (entry,)


# ---- §6 membership


def test_6_a_server_uses_the_latest_membership_in_its_log_committed_or_not() -> None:
    raft = follower()
    grown = Membership((1, 2, 3, 4))
    entry = Entry.make(1, 1, EntryKind.MEMBERSHIP, 0, grown.encode())
    raft.step(append(1, 2, (0, 0), (entry,)), 0)
    assert raft.commit_index == 0 and raft.membership == grown
    assert of(drain(raft), MembershipChanged) == [MembershipChanged(grown, 1)]


def test_6_new_servers_join_as_non_voting_members_first() -> None:
    raft = follower()
    leader(raft)
    with pytest.raises(ChangeRefused):
        raft.propose_membership(Promote(4), 0)
    entry = raft.propose_membership(AddLearner(4, b"store"), 0)
    drain(raft)
    assert raft.membership == Membership((1, 2, 3), (4,), ((4, b"store"),))
    ack(raft, 4, entry.index)
    assert raft.commit_index < entry.index, "a learner does not count"
    ack(raft, 2, entry.index)
    assert raft.commit_index == entry.index


def test_6_a_leader_that_is_not_part_of_the_new_membership_does_not_count_itself_and_steps_down() -> None:
    raft = follower()
    leader(raft)
    entry = raft.propose_membership(Remove(1), 0)
    drain(raft)
    assert raft.role == "leader"
    ack(raft, 2, entry.index)
    assert raft.commit_index < entry.index, "2 of {2, 3} are needed"
    ack(raft, 3, entry.index)
    actions = drain(raft)
    assert raft.commit_index == entry.index
    assert raft.role == "learner"
    assert all(message.commit == entry.index for message in sent(actions, AppendEntries))
    assert len(sent(actions, AppendEntries)) == 2 and sent(actions, TimeoutNow, 2)
    now_ms = raft.next_deadline_ms
    raft.tick(now_ms)
    assert raft.role == "learner", "and never campaigns again"


def test_6_servers_disregard_vote_requests_while_they_believe_a_leader_lives() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 1000)
    drain(raft)
    raft.step(vote_request(9, 3, (9, 8)), 1000 + ELECTION_MS_MIN - 1)
    assert (raft.term, drain(raft)) == (1, [])
    raft.step(vote_request(9, 3, (9, 8)), 1000 + ELECTION_MS_MIN)
    assert raft.term == 9 and raft.vote == 3


# ---- §7 log compaction


def snapshot(
    index: int, term: int, *, message_term: int = 3, offset: int = 0, chunk: bytes = b"abc", total: int = 3
) -> InstallSnapshot:
    from zlib import crc32

    return InstallSnapshot(
        message_term, 2, b"id", index, term, Membership((1, 2, 3)), total, offset, chunk, crc32(chunk)
    )


def test_7_the_leader_sends_a_snapshot_when_it_has_discarded_the_next_entry_to_send() -> None:
    raft = follower(start=(5, 1))
    leader(raft, matched=False)
    reject(raft, 2, 5, (0, 0), 0)
    actions = drain(raft)
    assert of(actions, SnapshotWanted) == [SnapshotWanted(2)]
    raft.snapshot_offered(2, b"id", 5, 1, raft.membership, 300 * 1024, 0)
    assert of(drain(raft), SnapshotChunkWanted) == [
        SnapshotChunkWanted(2, b"id", 0, 256 * 1024),
        SnapshotChunkWanted(2, b"id", 256 * 1024, 44 * 1024),
    ]
    raft.snapshot_chunk(2, b"id", 0, b"x" * 10, 0)
    (message,) = sent(drain(raft), InstallSnapshot, 2)
    assert (message.index, message.index_term, message.offset, message.chunk) == (5, 1, 0, b"x" * 10)


def test_7_a_snapshot_of_a_stale_term_is_refused() -> None:
    raft = follower(term=4)
    raft.step(snapshot(5, 1, message_term=3), 0)
    actions = drain(raft)
    assert not of(actions, SnapshotChunkReceived)
    assert [reply.term for reply in sent(actions, AppendReply)] == [4]


def test_7_chunks_are_stored_in_order_and_the_state_is_reset_with_the_last_one() -> None:
    raft = follower(log=(1, 1))
    raft.step(snapshot(5, 2, chunk=b"ab"), 0)
    assert len(of(drain(raft), SnapshotChunkReceived)) == 1
    raft.snapshot_stored(b"id", 2, 0)
    (reply,) = sent(drain(raft), SnapshotReply)
    assert (reply.next_offset, reply.done) == (2, False)
    raft.step(snapshot(5, 2, chunk=b"c", offset=2), 0)
    assert len(of(drain(raft), SnapshotChunkReceived)) == 1
    raft.snapshot_stored(b"id", 3, 0)
    assert of(drain(raft), SnapshotComplete) == [SnapshotComplete(b"id", 5, 2, Membership((1, 2, 3)))]
    raft.snapshot_installed(b"id", 0, stamp_ms=77)
    (reply,) = sent(drain(raft), SnapshotReply)
    assert reply.done and reply.match_index == 5
    assert (raft.start_index, raft.start_term, raft.last_index, raft.commit_index) == (5, 2, 5, 5)
    assert raft.stamp_ms == 77


def test_7_entries_after_a_snapshot_that_the_log_agrees_with_are_kept() -> None:
    raft = follower(log=(1, 2, 2, 2))
    raft.step(snapshot(3, 2), 0)
    actions = drain(raft)
    assert not of(actions, SnapshotChunkReceived)
    (reply,) = sent(actions, SnapshotReply)
    assert reply.done and reply.match_index == 3
    assert (raft.last_index, raft.commit_index) == (4, 3)


def test_7_the_whole_log_is_discarded_for_a_snapshot_it_does_not_agree_with() -> None:
    raft = follower(log=(1, 2, 2, 2))
    raft.step(snapshot(3, 3), 0)
    drain(raft)
    raft.snapshot_stored(b"id", 3, 0)
    drain(raft)
    raft.snapshot_installed(b"id", 0)
    assert (raft.start_index, raft.last_index, raft.log_bytes) == (3, 3, 0)


def test_7_each_server_compacts_its_log_by_itself() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0), entries(1, 1, 1), commit=2), 0)
    drain(raft)
    raft.compact(2)
    assert (raft.start_index, raft.start_term, raft.first_index, raft.last_index) == (2, 1, 3, 3)
    assert raft.term_at(1) is None and raft.term_at(2) == 1
    with pytest.raises(AssertionError):
        raft.compact(3)  # not applied


# ---- §8 client interaction


def test_8_a_leader_opens_its_term_with_a_no_op() -> None:
    raft = follower(log=(1, 1))
    leader(raft, matched=False)
    (entry,) = raft.entries_from(3, 1)
    assert (entry.term, entry.kind, entry.data) == (2, EntryKind.NOOP, b"")


def test_8_a_follower_refuses_commands_and_names_the_leader() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 0)
    with pytest.raises(NotLeader) as refusal:
        raft.propose(b"x", 0)
    assert refusal.value.leader == 2


def test_8_a_read_waits_for_a_heartbeat_exchange_with_a_majority() -> None:
    raft = follower()
    leader(raft)
    read = raft.read(0)
    actions = drain(raft)
    assert not of(actions, ReadReady)
    assert len(sent(actions, AppendEntries)) == 2
    ack(raft, 2, raft.last_index)
    assert of(drain(raft), ReadReady) == [ReadReady(read, read, raft.commit_index)]


def test_8_a_read_waits_until_the_leader_has_committed_an_entry_of_its_term() -> None:
    raft = follower(log=(1, 1))
    leader(raft, matched=False)
    raft.read(0)
    drain(raft)
    ack(raft, 2, 2)  # the round is echoed, the no-op is not there yet
    assert not of(drain(raft), ReadReady)
    ack(raft, 2, 3)
    drain(raft)
    ack(raft, 3, 2)
    (ready,) = of(drain(raft), ReadReady)
    assert ready.index == 3


def test_every_message_of_an_older_term_is_without_effect() -> None:
    raft = follower(term=9)
    leader(raft)
    before = (raft.role, raft.term, raft.last_index, raft.commit_index)
    old: list[Message] = [
        AppendReply(3, 2, True, 1, 1, 0, 1, 0, 1),
        VoteReply(3, 2, True, False),
        SnapshotReply(3, 2, b"id", 0, True, False, 1),
        TimeoutNow(3, 2),
    ]
    for message in old:
        raft.step(message, 0)
    assert drain(raft) == []
    assert (raft.role, raft.term, raft.last_index, raft.commit_index) == before


def test_the_core_is_built_of_plain_classes_with_slots() -> None:
    raft = follower()
    assert isinstance(raft, Raft)
    for thing in (raft, raft.node, raft.node.log, raft.node.replication, raft.node.reads, raft.node.election):
        assert not hasattr(thing, "__dict__"), thing
