"""Hard scenarios of snapshots: rows 35–42 of the acceptance table, as far as the core decides them.

Row 42's crashes inside the save are storage's; row 43 is the state machines'.
"""

from __future__ import annotations

from zlib import crc32

import pytest

from raftkv.raft.actions import (
    Commit,
    Persist,
    Send,
    SnapshotChunkReceived,
    SnapshotChunkWanted,
    SnapshotComplete,
    SnapshotReleased,
    SnapshotWanted,
)
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.membership import Membership
from raftkv.raft.messages import AppendEntries, AppendReply, InstallSnapshot, SnapshotReply
from tests.raft.network import Cluster, Faults
from tests.raft.solo import ack, append, drain, entries, follower, leader, of, reject, sent, vote_request

MEMBERS = Membership((1, 2, 3))
SMALL = RaftConfig(1, snapshot_chunk_bytes=10, snapshot_inflight_chunks=2)
BODY = bytes(range(45))


def chunk(
    index: int,
    offset: int,
    *,
    index_term: int = 2,
    term: int = 3,
    snapshot_id: bytes = b"id",
    size: int = 10,
    crc: int | None = None,
    members: Membership = MEMBERS,
) -> InstallSnapshot:
    part = BODY[offset : offset + size]
    return InstallSnapshot(
        term, 2, snapshot_id, index, index_term, members, len(BODY), offset, part, crc32(part) if crc is None else crc
    )


def receive(raft: Raft, index: int, **labels: object) -> None:
    """All chunks, each stored at once."""
    for offset in range(0, len(BODY), 10):
        message = chunk(index, offset, **labels)  # type: ignore[arg-type]
        raft.step(message, 0)
        assert len(of(drain(raft), SnapshotChunkReceived)) == 1
        raft.snapshot_stored(message.snapshot_id, offset + len(message.chunk), 0)
        if offset + 10 < len(BODY):
            drain(raft)


def streaming(config: RaftConfig = SMALL) -> Raft:
    """A leader whose log starts at 5, and follower 2 that needs a snapshot, offered."""
    raft = follower(start=(5, 1), config=config)
    leader(raft, matched=False)
    ack(raft, 3, raft.last_index)
    reject(raft, 2, 5, (0, 0), 0)
    assert of(drain(raft), SnapshotWanted) == [SnapshotWanted(2)]
    raft.snapshot_offered(2, b"id", 6, raft.term, MEMBERS, len(BODY), 0)
    return raft


def answer(
    raft: Raft, next_offset: int, *, done: bool = False, failed: bool = False, match: int = 0, now_ms: int = 0
) -> None:
    raft.step(SnapshotReply(raft.term, 2, b"id", next_offset, done, failed, match), now_ms)


def wanted(raft: Raft) -> list[int]:
    return [action.offset for action in of(drain(raft), SnapshotChunkWanted)]


# ---- 35, 36: old snapshots, conflicting tails


def test_row_35_a_snapshot_older_than_the_commit_index_is_answered_with_it_and_ignored() -> None:
    raft = follower(log=(1, 2, 2, 2), applied=3)
    raft.step(chunk(2, 0), 0)
    actions = drain(raft)
    assert [(r.done, r.match_index) for r in sent(actions, SnapshotReply)] == [(True, 3)]
    assert not of(actions, SnapshotChunkReceived) and raft.last_index == 4


def test_row_35_a_snapshot_that_the_log_agrees_with_only_moves_the_commit_index() -> None:
    raft = follower(log=(1, 2, 2, 2))
    raft.step(chunk(3, 0), 0)
    actions = drain(raft)
    assert [entry.index for commit in of(actions, Commit) for entry in commit.entries] == [1, 2, 3]
    assert raft.last_index == 4, "the tail is kept"
    assert [(r.done, r.match_index) for r in sent(actions, SnapshotReply)] == [(True, 3)]


def test_row_35_its_answer_waits_until_the_log_that_it_vouches_for_is_on_disk() -> None:
    raft = follower(term=2)
    raft.step(append(2, 2, (0, 0), entries(1, 2, 2)), 0)
    raft.step(chunk(3, 0, term=2), 0)
    actions = raft.take_actions()
    (persist,) = of(actions, Persist)
    (reply,) = [a for a in of(actions, Send) if isinstance(a.message, SnapshotReply)]
    assert reply.after == persist.seq


def test_row_36_a_conflicting_tail_goes_as_a_whole() -> None:
    raft = follower(log=(1, 1, 1, 1, 1))
    receive(raft, 3)
    assert of(drain(raft), SnapshotComplete) == [SnapshotComplete(b"id", 3, 2, MEMBERS)]
    raft.snapshot_installed(b"id", 0)
    drain(raft)
    assert (raft.start_index, raft.start_term, raft.last_index, raft.applied_index) == (3, 2, 3, 3)
    raft.step(append(3, 2, (3, 2), entries(3, first=4)), 0)
    actions = drain(raft)
    assert [persist.entries for persist in of(actions, Persist)] == [entries(3, first=4)]


# ---- 37: appends around an installation


def test_row_37_while_a_snapshot_is_installed_log_and_commit_stand_still() -> None:
    raft = follower(log=(1, 1), term=3)
    receive(raft, 5)
    assert of(drain(raft), SnapshotComplete)
    raft.step(append(3, 2, (2, 1), entries(3, first=3), commit=3), 0)
    actions = drain(raft)
    assert (raft.last_index, raft.commit_index) == (2, 0)
    assert not of(actions, Persist) and not of(actions, Commit)
    (reply,) = sent(actions, AppendReply)
    assert reply.match_index == 2, "it answers, and vouches for what it has"
    raft.snapshot_installed(b"id", 0)
    drain(raft)
    raft.step(append(3, 2, (2, 1), entries(3, 2, 2, 3, first=3), commit=6), 0)
    actions = drain(raft)
    assert [entry.index for commit in of(actions, Commit) for entry in commit.entries] == [6]


def test_row_37_no_term_or_vote_is_written_while_the_wal_is_swapped() -> None:
    raft = follower(log=(1, 1), term=3)
    receive(raft, 5)
    drain(raft)
    raft.step(vote_request(9, 3, (9, 9), transfer=True), 0)
    actions = raft.take_actions()
    assert raft.vote == 3 and not of(actions, Persist)
    (reply,) = of(actions, Send)
    assert reply.after > raft.node.next_seq - 1, "the vote waits for a Persist still to come"
    raft.snapshot_installed(b"id", 0)
    (persist,) = of(raft.take_actions(), Persist)
    assert persist.hard_state is not None and persist.hard_state.vote == 3 and persist.seq == reply.after


def test_row_37_a_late_append_below_the_snapshot_changes_nothing() -> None:
    raft = follower(start=(9, 2), term=3)
    raft.step(append(3, 2, (3, 1), entries(1, 1, first=4), commit=5), 0)
    actions = drain(raft)
    assert [(r.ok, r.match_index) for r in sent(actions, AppendReply)] == [(True, 9)]
    assert (raft.last_index, raft.commit_index) == (9, 9)


def test_row_37_appends_that_arrive_during_the_stream_can_make_it_needless() -> None:
    raft = follower(log=(1, 1), term=3)
    raft.step(chunk(4, 0), 0)
    drain(raft)
    raft.step(append(3, 2, (2, 1), entries(2, 2, 3, first=3), commit=5), 0)
    drain(raft)
    raft.snapshot_stored(b"id", 10, 0)
    actions = drain(raft)
    assert [(r.done, r.match_index) for r in sent(actions, SnapshotReply)] == [(True, 5)]
    assert raft.last_index == 5 and raft.node.snapshots.reception is None


@pytest.mark.parametrize("commit", [2, 4, 5])
def test_row_37_appends_in_the_turn_of_the_last_chunk_make_it_needless_too(commit: int) -> None:
    """The tail behind the snapshot, which this turn acknowledges, stays."""
    raft = follower(log=(1, 1), term=3)
    raft.step(chunk(4, 0), 0)
    drain(raft)
    while raft.node.snapshots.reception is not None and raft.node.snapshots.reception.received < len(BODY):
        raft.snapshot_stored(b"id", raft.node.snapshots.reception.received, 0)
        drain(raft)
        raft.step(chunk(4, raft.node.snapshots.reception.received), 0)
        drain(raft)
    raft.snapshot_stored(b"id", len(BODY), 0)
    raft.step(append(3, 2, (2, 1), entries(2, 2, 3, first=3), commit=commit), 0)
    actions = drain(raft)
    assert not of(actions, SnapshotComplete)
    assert [(r.done, r.match_index) for r in sent(actions, SnapshotReply)] == [(True, max(4, commit))]
    assert raft.last_index == 5 and raft.commit_index == max(4, commit)


def test_row_37_one_that_installs_does_not_campaign() -> None:
    raft = follower(term=3)
    receive(raft, 5)
    drain(raft)
    for _ in range(5):
        raft.tick(raft.next_deadline_ms)
    assert raft.role == "follower"


# ---- 38: leaving the snapshot state


def test_row_38_a_snapshot_up_to_the_last_entry_leads_straight_back_to_replication() -> None:
    raft = streaming()
    answer(raft, 45, done=True, match=raft.last_index)
    actions = drain(raft)
    assert of(actions, SnapshotReleased) == [SnapshotReleased(2, b"id")]
    (probe,) = sent(actions, AppendEntries, 2)
    assert probe.prev_index == raft.last_index and probe.entries == ()
    ack(raft, 2, raft.last_index)
    assert raft.peer_progress()[2][2] == "replicate"


def test_row_38_a_lost_answer_is_made_good_by_the_next_heartbeats_reply() -> None:
    raft = streaming()
    drain(raft)
    now_ms = raft.next_deadline_ms
    raft.tick(now_ms)
    (beat,) = sent(drain(raft), AppendEntries, 2)
    assert (beat.prev_index, beat.prev_term, beat.entries) == (5, 1, ()), "it asks at the log's start"
    ack(raft, 2, 6, now_ms)
    actions = drain(raft)
    assert of(actions, SnapshotReleased) == [SnapshotReleased(2, b"id")]
    assert raft.peer_progress()[2][:3] == (6, 7, "replicate"), "no stall until the next write"


def test_row_38_a_snapshot_older_than_the_log_start_by_now_is_followed_by_another() -> None:
    raft = streaming()
    for _ in range(5):
        raft.propose(b"x", 0)
    drain(raft)
    ack(raft, 3, raft.last_index)
    drain(raft)
    raft.compact(10)
    answer(raft, 45, done=True, match=6)
    actions = drain(raft)
    assert of(actions, SnapshotReleased) and of(actions, SnapshotWanted) == [SnapshotWanted(2)]


def test_row_38_an_offer_older_than_the_log_start_is_given_back_and_asked_for_again() -> None:
    raft = follower(start=(5, 1), config=SMALL)
    leader(raft, matched=False)
    reject(raft, 2, 5, (0, 0), 0)
    drain(raft)
    raft.snapshot_offered(2, b"old", 4, 1, MEMBERS, 9, 0)
    assert of(drain(raft), SnapshotReleased) == [SnapshotReleased(2, b"old")]
    raft.tick(raft.next_deadline_ms)
    raft.tick(raft.node.now_ms + 500)
    assert SnapshotWanted(2) in drain(raft)


# ---- 39: chunks lost, doubled, reordered; receivers that start over


def test_row_39_the_window_moves_with_the_followers_offset() -> None:
    raft = streaming()
    assert wanted(raft) == [0, 10]
    answer(raft, 10)
    assert wanted(raft) == [20]
    answer(raft, 30)
    assert wanted(raft) == [30, 40]
    answer(raft, 45)
    assert wanted(raft) == []


def test_row_39_a_lost_chunk_is_sent_again_once_for_many_complaints() -> None:
    raft = streaming()
    drain(raft)
    answer(raft, 10)
    drain(raft)
    answer(raft, 10)
    assert wanted(raft) == [10, 20]
    answer(raft, 10)
    assert wanted(raft) == []


def test_row_39_without_any_answer_the_window_is_sent_again_after_a_while() -> None:
    raft = streaming()
    drain(raft)
    again: list[int] = []
    for step in range(1, 7):
        now_ms = raft.node.now_ms + 100
        ack(raft, 3, raft.last_index, now_ms)
        raft.tick(now_ms)
        again += wanted(raft)
        assert bool(again) is (step >= 5), (step, again)
    assert again == [0, 10]


def test_row_39_a_receiver_that_starts_over_is_followed_back() -> None:
    raft = streaming()
    drain(raft)
    answer(raft, 30)
    drain(raft)
    answer(raft, 0)
    assert wanted(raft) == [0, 10]


def test_row_39_a_snapshot_that_the_receiver_cannot_use_is_replaced_after_a_pause() -> None:
    raft = streaming()
    drain(raft)
    answer(raft, 0, failed=True)
    actions = drain(raft)
    assert of(actions, SnapshotReleased) == [SnapshotReleased(2, b"id")] and not of(actions, SnapshotWanted)
    now_ms = raft.node.now_ms + 500
    ack(raft, 3, raft.last_index, now_ms)
    raft.tick(now_ms)
    assert SnapshotWanted(2) in drain(raft)


def test_row_39_a_chunk_that_cannot_be_read_starts_it_over_too() -> None:
    raft = streaming()
    drain(raft)
    raft.snapshot_unavailable(2, 0)
    assert of(drain(raft), SnapshotReleased) == [SnapshotReleased(2, b"id")]


def test_row_39_an_unreachable_target_releases_its_checkpoint_in_the_end() -> None:
    raft = streaming()
    released: list[SnapshotReleased] = []
    for step in range(110):
        now_ms = raft.node.now_ms + 100
        ack(raft, 3, raft.last_index, now_ms)
        raft.tick(now_ms)
        released += of(drain(raft), SnapshotReleased)
        assert raft.role == "leader"
        if step == 90:
            assert not released
    assert released == [SnapshotReleased(2, b"id")]
    assert raft.snapshot_pins() == raft.last_index + 1 or raft.peer_progress()[3][0] < raft.last_index


@pytest.mark.parametrize("offset", [10, 20])
def test_row_39_a_chunk_ahead_of_its_turn_is_refused_with_the_offset_wanted(offset: int) -> None:
    raft = follower(term=3)
    raft.step(chunk(5, offset), 0)
    actions = drain(raft)
    assert not of(actions, SnapshotChunkReceived)
    assert [r.next_offset for r in sent(actions, SnapshotReply)] == [0]


def test_row_39_doubled_and_damaged_chunks_are_not_stored() -> None:
    raft = follower(term=3)
    raft.step(chunk(5, 0, crc=1), 0)
    actions = drain(raft)
    assert not of(actions, SnapshotChunkReceived)
    assert [r.next_offset for r in sent(actions, SnapshotReply)] == [0]
    raft.step(chunk(5, 0), 0)
    raft.step(chunk(5, 0), 0)
    assert len(of(drain(raft), SnapshotChunkReceived)) == 1
    raft.snapshot_stored(b"id", 10, 0)
    drain(raft)
    raft.step(chunk(5, 0), 0)
    actions = drain(raft)
    assert not of(actions, SnapshotChunkReceived)
    assert [r.next_offset for r in sent(actions, SnapshotReply)] == [10], "it resumes where it was"


def test_row_39_pipelined_chunks_are_stored_in_order_and_answered_as_they_are() -> None:
    raft = follower(term=3)
    for offset in (0, 10, 20):
        raft.step(chunk(5, offset), 0)
    assert [a.message.offset for a in of(drain(raft), SnapshotChunkReceived)] == [0, 10, 20]
    for end in (10, 20, 30):
        raft.snapshot_stored(b"id", end, 0)
        assert [r.next_offset for r in sent(drain(raft), SnapshotReply)] == [end]


def test_row_39_a_second_snapshot_takes_the_place_of_the_first() -> None:
    raft = follower(term=3)
    raft.step(chunk(5, 0), 0)
    drain(raft)
    raft.step(chunk(7, 0, snapshot_id=b"new"), 0)
    assert len(of(drain(raft), SnapshotChunkReceived)) == 1
    raft.snapshot_stored(b"id", 10, 0)
    assert not sent(drain(raft), SnapshotReply), "news of the first one"
    raft.snapshot_stored(b"new", 10, 0)
    (reply,) = sent(drain(raft), SnapshotReply)
    assert (reply.snapshot_id, reply.next_offset) == (b"new", 10)


def test_row_39_a_failed_installation_leaves_log_and_state_as_they_were() -> None:
    raft = follower(log=(1, 1), term=3)
    receive(raft, 5)
    drain(raft)
    raft.snapshot_failed(b"id", 0)
    actions = drain(raft)
    assert [(r.failed, r.done) for r in sent(actions, SnapshotReply)] == [(True, False)]
    raft.step(append(3, 2, (2, 1), entries(3, first=3)), 0)
    assert raft.last_index == 3


def test_row_39_the_installation_is_asked_after_without_sending_data() -> None:
    raft = streaming()
    drain(raft)
    answer(raft, 45)
    drain(raft)
    seen: list[InstallSnapshot] = []
    for _ in range(5):
        now_ms = raft.node.now_ms + 100
        ack(raft, 3, raft.last_index, now_ms)
        raft.tick(now_ms)
        seen += sent(drain(raft), InstallSnapshot, 2)
    assert [(message.offset, message.chunk) for message in seen] == [(45, b"")]
    late = follower(2, log=(1,), start=(9, 1), applied=9)
    late.step(seen[0], 0)
    assert [r.done for r in sent(drain(late), SnapshotReply)] == [True]


@pytest.mark.parametrize("seed", range(10))
def test_row_39_snapshots_arrive_over_a_bad_net(seed: int) -> None:
    def config(replica: int) -> RaftConfig:
        return RaftConfig(replica, snapshot_chunk_bytes=16, snapshot_inflight_chunks=4)

    faults = Faults(drop=0.2, duplicate=0.2, delay_ms_max=30)
    cluster = Cluster(3, seed, faults=faults, config=config)
    leader_id = cluster.elect()
    behind = next(replica for replica in cluster.servers if replica != leader_id)
    cluster.servers[behind].crash()
    for number in range(30):
        cluster.propose(b"%d" % number)
        cluster.run(60)
    cluster.run(3000)
    cluster.servers[cluster.elect()].flush_and_compact()
    cluster.servers[behind].boot()
    assert cluster.run(30_000, lambda: cluster.raft(behind).start_index > 0)


# ---- 40, 41: the leader meanwhile


def test_row_40_a_leader_that_compacts_past_a_slow_follower_turns_to_a_snapshot() -> None:
    raft = follower()
    now_ms = leader(raft)
    for _ in range(5):
        raft.propose(b"x", now_ms)
    drain(raft)
    ack(raft, 2, raft.last_index, now_ms)
    drain(raft)
    assert raft.snapshot_pins() == 2, "a follower that answers is waited for"
    now_ms += 1001
    ack(raft, 2, raft.last_index, now_ms)
    raft.tick(now_ms)
    drain(raft)
    assert raft.snapshot_pins() == raft.last_index + 1, "one that does not is not"
    raft.compact(raft.commit_index)
    reject(raft, 3, 6, (1, 1), 1, now_ms)
    actions = drain(raft)
    assert of(actions, SnapshotWanted) == [SnapshotWanted(3)]
    assert raft.peer_progress()[3][2] == "snapshot"


def test_row_40_a_log_that_grows_too_large_is_kept_for_nobody() -> None:
    raft = follower(config=RaftConfig(1, pin_log_bytes_max=1000))
    leader(raft)
    for _ in range(5):
        raft.propose(bytes(500), 0)
    assert raft.snapshot_pins() == raft.last_index + 1


def test_row_41_a_slow_snapshot_stops_neither_heartbeats_nor_appends_nor_commits() -> None:
    raft = streaming()
    drain(raft)
    now_ms = raft.node.now_ms
    for _ in range(4):
        now_ms += 100
        entry = raft.propose(b"x", now_ms)
        raft.tick(now_ms)
        actions = drain(raft)
        assert sent(actions, AppendEntries, 3) and sent(actions, AppendEntries, 2)
        ack(raft, 3, entry.index, now_ms)
        assert raft.commit_index == entry.index


def test_row_42_a_restart_in_mid_reception_begins_it_anew() -> None:
    raft = follower(term=3, log=(1,))
    raft.step(chunk(5, 10), 0)
    assert [r.next_offset for r in sent(drain(raft), SnapshotReply)] == [0]
    assert raft.last_index == 1


def test_row_51_the_membership_comes_with_the_snapshot() -> None:
    raft = follower(term=3)
    receive(raft, 5, members=Membership((2, 3), (1,)))
    drain(raft)
    raft.snapshot_installed(b"id", 0)
    drain(raft)
    assert raft.role == "learner" and raft.membership == Membership((2, 3), (1,))
