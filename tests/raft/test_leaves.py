"""The leaves of the core, each on its own: log, quorum arithmetic, progress, membership, entries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.raft.config import RaftConfig
from raftkv.raft.entry import ENTRY_HEADER_BYTES, Entry, EntryKind
from raftkv.raft.log import Log
from raftkv.raft.membership import Membership
from raftkv.raft.progress import PROBE, REPLICATE, SNAPSHOT, Progress
from raftkv.raft.quorum import VoteResult, quorum_size, quorum_value, vote_result
from tests.raft.solo import entries

TERMS = st.lists(st.integers(1, 6), max_size=12).map(sorted)


# ---- log


@given(TERMS, st.integers(0, 15), st.integers(0, 7), st.integers(0, 5))
def test_the_last_entry_not_beyond_a_hint_is_what_a_scan_finds(
    terms: list[int], index: int, term: int, start: int
) -> None:
    log = Log(start, 0, 0, entries(*terms, first=start + 1))
    found = log.last_not_beyond(index, term)
    if index < start:
        assert found == index
        return
    expected = max(i for i in range(start, min(index, log.last_index) + 1) if (log.term_at(i) or 0) <= term)
    assert found == expected


def test_a_start_of_a_higher_term_than_the_hint_is_passed_over() -> None:
    log = Log(5, 4, 0, entries(4, 5, first=6))
    assert log.last_not_beyond(7, 3) == 4
    assert log.last_not_beyond(7, 4) == 6


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 3)),
            st.tuples(st.just("cut"), st.integers(1, 4)),
            st.tuples(st.just("queue"), st.just(0)),
            st.tuples(st.just("complete"), st.just(0)),
            st.tuples(st.just("compact"), st.integers(1, 2)),
        ),
        max_size=40,
    )
)
def test_what_a_log_calls_stable_is_on_disk(steps: list[tuple[str, int]]) -> None:
    """Against a model: a disk that is written in order, and compared entry by entry."""
    log = Log(0, 0, 0, ())
    term = 1
    seq = 0
    queue: list[tuple[int, tuple[Entry, ...]]] = []
    disk: dict[int, Entry] = {}
    for step, count in steps:
        if step == "append":
            for _ in range(count):
                log.append(entries(term, first=log.last_index + 1)[0])
        elif step == "cut" and log.last_index - count >= log.start_index:
            term += 1
            log.truncate(log.last_index - count + 1)
        elif step == "queue":
            seq += 1
            written = log.queue(seq)
            if written:
                queue.append((seq, written))
        elif step == "complete" and queue:
            done, written = queue.pop(0)
            for index in [index for index in disk if index >= written[0].index]:
                del disk[index]
            disk |= {entry.index: entry for entry in written}
            log.persisted(done)
        elif step == "compact":
            log.compact(min(log.start_index + count, log.stable_index))
        for index in range(log.start_index + 1, log.stable_index + 1):
            assert disk[index] is log.entry_at(index)
        assert log.bytes == sum(entry.size_bytes for entry in log.entries)
        assert log.stable_index <= log.queued_index <= log.last_index
        last = log.entries[-1] if log.entries else None
        assert (log.last_index, log.last_term) == (
            (last.index, last.term) if last else (log.start_index, log.start_term)
        )


def test_slices_by_bytes_hold_one_entry_at_least() -> None:
    log = Log(0, 0, 0, entries(1, 1, 1, 1, size=75))  # of 100 bytes each
    assert [entry.index for entry in log.slice_bytes(2, 250)] == [2, 3]
    assert [entry.index for entry in log.slice_bytes(2, 1)] == [2]
    assert [entry.index for entry in log.slice_bytes(2, 300)] == [2, 3, 4]
    assert log.slice_bytes(5, 100) == ()


def test_a_log_can_be_reset_behind_a_snapshot() -> None:
    log = Log(0, 0, 7, entries(1, 1))
    log.append(entries(1, first=3)[0])
    log.queue(1)
    log.reset(10, 4, 99)
    assert (log.start_index, log.last_index, log.last_term, log.last_stamp_ms) == (10, 10, 4, 99)
    log.persisted(1)
    assert log.stable_index == 10 and log.bytes == 0 and log.queue(2) == ()


@pytest.mark.parametrize("broken", [lambda log: log.extend(entries(1, first=9)), lambda log: log.truncate(9)])
def test_a_log_refuses_what_makes_no_sense(broken: object) -> None:
    log = Log(0, 0, 0, entries(1, 1))
    with pytest.raises(AssertionError):
        broken(log)  # type: ignore[operator]


# ---- quorum


@pytest.mark.parametrize(("voters", "size"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4)])
def test_quorum_sizes(voters: int, size: int) -> None:
    assert quorum_size(voters) == size == Membership(tuple(range(voters))).quorum


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_a_quorum_has_reached_the_quorum_value_and_none_a_higher_one(values: list[int]) -> None:
    found = quorum_value(list(values))
    size = quorum_size(len(values))
    assert sum(value >= found for value in values) >= size
    assert sum(value > found for value in values) < size


def test_nobody_reaches_nothing() -> None:
    assert quorum_value([]) == -1
    assert vote_result((), {}) is VoteResult.LOST


@given(st.integers(1, 7), st.dictionaries(st.integers(0, 9), st.booleans()))
def test_a_vote_is_won_by_a_quorum_and_lost_when_none_is_left(count: int, votes: dict[int, bool]) -> None:
    voters = range(count)
    granted = sum(votes.get(voter) is True for voter in voters)
    open_ = sum(voter not in votes for voter in voters)
    size = quorum_size(count)
    expected = VoteResult.WON if granted >= size else VoteResult.LOST if granted + open_ < size else VoteResult.PENDING
    assert vote_result(voters, votes) is expected


# ---- progress


def test_progress_moves_through_its_states() -> None:
    p = Progress(2, 11, 0)
    assert (p.state, p.next, p.match) == (PROBE, 11, 0)
    p.sent(12, 50)
    assert p.next == 11, "a probe's next waits for the answer"
    assert p.acked(10, 1)
    p.become_replicate(0)
    assert (p.state, p.next) == (REPLICATE, 13), "the probe's entries are under way"
    p.sent(15, 70)
    assert (p.next, p.inflight_bytes) == (16, 120)
    assert p.acked(12, 1) and p.inflight_bytes == 70
    assert not p.acked(11, 1), "old news"
    p.become_snapshot()
    assert (p.state, p.inflight_bytes) == (SNAPSHOT, 0)
    p.become_probe(3)
    assert p.next == 13, "never below the match"


def test_a_lost_probe_is_sent_again() -> None:
    p = Progress(2, 11, 0)
    p.probe_round = 4
    p.sent(12, 50)
    p.acked(10, 5)
    p.become_replicate(5)
    assert (p.next, p.inflight_bytes) == (11, 0)


# ---- entries, membership, config


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from(EntryKind), st.binary(max_size=50))
def test_an_entry_survives_its_encoding(term: int, index: int, kind: EntryKind, data: bytes) -> None:
    entry = Entry.make(term, index, kind, 5, data, memo=object())
    again = Entry.decode(entry.encoded)
    assert again == entry and hash(again) == hash(entry) and again.memo is None
    assert (again.term, again.index, again.kind, again.stamp_ms, again.data) == (term, index, kind, 5, data)
    assert entry.size_bytes == ENTRY_HEADER_BYTES + len(data)


@pytest.mark.parametrize("encoded", [b"", bytes(ENTRY_HEADER_BYTES - 1), Entry.make(1, 1, 9, 0, b"").encoded])
def test_what_is_no_entry_is_refused(encoded: bytes) -> None:
    with pytest.raises(ValueError):
        Entry.decode(encoded)


def test_the_golden_bytes_of_an_entry() -> None:
    assert Entry.make(1, 2, EntryKind.TICK, 3, b"data").encoded.hex() == (
        "0000000000000001000000000000000203000000000000000364617461"
    )


@given(st.sets(st.integers(0, 20), max_size=5), st.sets(st.integers(21, 40), max_size=3), st.binary(max_size=16))
def test_a_membership_survives_its_encoding(voters: set[int], learners: set[int], store: bytes) -> None:
    stores = tuple((replica, store) for replica in sorted(voters | learners))
    membership = Membership(tuple(sorted(voters)), tuple(sorted(learners)), stores)
    assert Membership.decode(membership.encode()) == membership
    for replica in voters:
        assert membership.store_of(replica) == store
    assert membership.store_of(99) is None


@pytest.mark.parametrize("encoded", [b"", b"\x01", b"\x93\x91\x01\x91\x01\x90", b"\x92\x90\x90", b"\x93\xa1x\x90\x90"])
def test_what_is_no_membership_is_refused(encoded: bytes) -> None:
    with pytest.raises(ValueError):
        Membership.decode(encoded)


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_ms": 500},
        {"election_timeout_ms_min": 900, "election_timeout_ms_max": 800},
        {"snapshot_inflight_chunks": 5},
        {"append_bytes_max": 0},
        {"lease_reads": True, "check_quorum": False},
    ],
)
def test_a_config_that_cannot_work_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        RaftConfig(1, **wrong)  # type: ignore[arg-type]
