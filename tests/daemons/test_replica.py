"""The replica runtime keeps the core's contract: durability before acks, one answer for each request."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import pytest

from raftkv.daemons import replica as runtime
from raftkv.daemons.replica import array_header
from raftkv.machines.machine import decode_commands
from raftkv.protocol.errors import Busy, NotLeader, OutcomeUnknown, ShuttingDown
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.messages import AppendEntries, AppendReply, VoteReply
from raftkv.storage.engine import Range
from raftkv.storage.errors import WriteStall
from tests.daemons.rig import Rig


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 255, 65_535])
def test_array_header_is_that_of_msgpack(count: int) -> None:
    assert decode_commands(array_header(count) + b"\x90" * count) == [[]] * count


def test_all_commands_of_a_turn_share_one_entry_and_get_their_own_answers() -> None:
    async def scenario() -> None:
        rig = await (await Rig().start()).lead()
        before = rig.replica.raft.last_index
        for seq in range(1, 51):
            rig.put(seq, b"k%d" % seq)
        await rig.until(lambda: len(rig.answers) == 50)
        assert rig.replica.raft.last_index == before + 1
        assert rig.answers == [(seq, [0, seq]) for seq in range(1, 51)]

    run(scenario())


def test_a_group_of_one_acknowledges_only_after_its_own_fsync() -> None:
    """etcd issue 14370: the ack of a single-node cluster came before its fsync."""

    async def scenario() -> None:
        rig = await (await Rig().start()).lead()
        rig.disk.held = True
        rig.put(1)
        await asyncio.sleep(0.05)
        assert rig.disk.waiting and not rig.answers
        rig.disk.let_go()
        await rig.until(lambda: rig.answers == [(1, [0, 1])])

    run(scenario())


def test_a_follower_acknowledges_entries_only_after_its_fsync() -> None:
    async def scenario() -> None:
        rig = await Rig(3).start()
        rig.disk.held = True
        entry = Entry.make(1, 1, EntryKind.NOOP, 5, b"")
        rig.replica.step(AppendEntries(1, 1, 0, 0, (entry,), 0, 1))
        await asyncio.sleep(0.05)
        assert not [m for _, m in rig.sent if isinstance(m, AppendReply)]
        rig.disk.let_go()
        await rig.until(lambda: any(isinstance(m, AppendReply) and m.match_index == 1 for _, m in rig.sent))

    run(scenario())


def test_a_vote_leaves_only_after_its_fsync_and_survives() -> None:
    from raftkv.raft.messages import RequestVote

    async def scenario() -> None:
        rig = await Rig(3).start()
        rig.disk.held = True
        rig.replica.step(RequestVote(4, 2, 0, 0, False, True))
        await asyncio.sleep(0.05)
        assert not [m for _, m in rig.sent if isinstance(m, VoteReply)]
        rig.disk.let_go()
        await rig.until(lambda: any(isinstance(m, VoteReply) and m.granted for _, m in rig.sent))
        rig.replica.stop()
        rig.disk.power_loss()
        again = Rig(3)
        again.disk = rig.disk
        await again.start()
        assert (again.replica.raft.term, again.replica.raft.vote) == (4, 2)

    run(scenario())


def test_leadership_lost_ends_every_waiter_with_an_unknown_outcome() -> None:
    async def scenario() -> None:
        rig = await (await Rig(3).start()).lead()
        term = rig.replica.raft.term
        for seq in range(1, 101):
            rig.put(seq)
        await asyncio.sleep(0.02)
        reads: list[Any] = []
        rig.replica.read(lambda token, error: reads.append(error), None)
        await asyncio.sleep(0.02)
        assert not rig.answers and not reads
        rig.replica.step(AppendEntries(term + 1, 2, 0, 0, (), 0, 1))
        await rig.until(lambda: len(rig.answers) == 100 and len(reads) == 1)
        assert all(isinstance(result, OutcomeUnknown) for _, result in rig.answers)
        assert isinstance(reads[0], NotLeader)
        rig.put(101)
        assert isinstance(rig.answers[-1][1], NotLeader)
        assert rig.answers[-1][1].leader_address == "peer:2"
        assert rig.replica.idle

    run(scenario())


def test_another_leaders_entry_at_the_same_index_is_not_taken_for_ours() -> None:
    """Waiters match on (index, term): one of the original system answered OK to a command that was lost."""

    async def scenario() -> None:
        rig = await (await Rig(3).start()).lead()
        raft = rig.replica.raft
        term, index, stamp = raft.term, raft.last_index, raft.stamp_ms
        prev_term = raft.last_term
        rig.put(1)
        await rig.until(lambda: raft.last_index == index + 1)
        other = Entry.make(term + 1, index + 1, EntryKind.NOOP, stamp + 1, b"")
        rig.replica.step(AppendEntries(term + 1, 2, index, prev_term, (other,), index + 1, 1))
        await rig.until(lambda: rig.replica.applied_index == index + 1)
        assert [type(result) for _, result in rig.answers] == [OutcomeUnknown]
        assert rig.replica.machine.get(rig.store.engine, 0, b"k") == (None, 0)  # type: ignore[attr-defined]

    run(scenario())


def test_a_stalled_engine_delays_answers_and_applies_once() -> None:
    async def scenario() -> None:
        rig = await (await Rig().start()).lead()
        engine = rig.store.engine
        write = engine.write
        stalls = 3

        def stalling(changes: Mapping[bytes, bytes | None], range_deletes: Sequence[Range] = ()) -> None:
            nonlocal stalls
            if stalls:
                stalls -= 1
                raise WriteStall("for the test")
            write(changes, range_deletes)

        engine.write = stalling  # type: ignore[method-assign]
        rig.put(1)
        await rig.until(lambda: stalls < 3)
        rig.put(2)
        assert isinstance(rig.answers[-1][1], Busy)
        with pytest.raises(Busy):
            rig.replica.check_readable()
        await rig.until(lambda: (1, [0, 1]) in rig.answers)
        rig.put(3)
        await rig.until(lambda: (3, [0, 2]) in rig.answers)

    run(scenario())


def test_pending_commands_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PENDING_COMMANDS_MAX", 10)
    monkeypatch.setattr(runtime, "PENDING_READS_MAX", 10)

    async def scenario() -> None:
        rig = await (await Rig(3).start()).lead()
        for seq in range(1, 12):
            rig.put(seq)
        assert [token for token, result in rig.answers if isinstance(result, Busy)] == [11]
        refused: list[Any] = []
        for _ in range(11):
            rig.replica.read(lambda token, error: refused.append(error), None)
        assert len(refused) == 1 and isinstance(refused[0], Busy)

    run(scenario())


def test_large_commands_are_split_over_entries_within_the_bound() -> None:
    async def scenario() -> None:
        rig = await (await Rig(snapshot_bytes=1 << 30).start()).lead()
        before = rig.replica.raft.last_index
        for seq in range(1, 11):
            rig.put(seq, b"k%d" % seq, b"x" * 400_000)
        await rig.until(lambda: len(rig.answers) == 10)
        entries = rig.replica.raft.entries_from(before + 1, 1 << 30)
        assert len(entries) == 5
        assert all(entry.size_bytes <= runtime.BATCH_BYTES_MAX + 100 for entry in entries)

    run(scenario())


def test_the_log_is_compacted_behind_a_flush_and_a_restart_goes_on() -> None:
    async def scenario() -> None:
        rig = await (await Rig(snapshot_bytes=5_000).start()).lead()
        for seq in range(1, 101):
            rig.put(seq, b"k%d" % seq, b"x" * 200)
            await rig.until(lambda seq=seq: len(rig.answers) == seq)
        await rig.until(lambda: rig.replica.raft.start_index > 50)
        assert rig.replica.raft.log_bytes < 3 * 5_000
        rig.replica.stop()
        rig.disk.power_loss()
        again = Rig()
        again.disk = rig.disk
        await again.start()
        assert again.replica.raft.start_index > 50
        raft = again.replica.raft
        raft.tick(raft.next_deadline_ms)
        again.replica.wake()
        await again.until(lambda: again.replica.applied_index == raft.last_index and raft.role == "leader")
        for seq in range(1, 101):
            value, _ = again.replica.machine.get(again.store.engine, 0, b"k%d" % seq)  # type: ignore[attr-defined]
            assert value == b"x" * 200
        again.put(100)
        await again.until(lambda: len(again.answers) == 1)
        assert again.answers[0][1] == [0, 100], "a retry after the restart gets the recorded answer"

    run(scenario())


def test_reads_of_a_turn_share_one_round_and_see_what_was_acknowledged() -> None:
    async def scenario() -> None:
        rig = await (await Rig(3).start()).lead()
        rig.sent.clear()
        ready: list[Any] = []
        for number in range(100):
            rig.replica.read(lambda token, error: ready.append((token, error)), number)
        await asyncio.sleep(0.01)
        rounds = {m.round for _, m in rig.sent if isinstance(m, AppendEntries)}
        assert len(rounds) == 1 and not ready
        await rig.commit_all()
        await rig.until(lambda: ready == [(number, None) for number in range(100)])

    run(scenario())


def test_closing_takes_nothing_new_and_stopping_leaves_nobody_waiting() -> None:
    async def scenario() -> None:
        rig = await (await Rig(3).start()).lead()
        rig.put(1)
        await asyncio.sleep(0.01)
        rig.replica.begin_close()
        rig.put(2)
        assert isinstance(rig.answers[-1][1], ShuttingDown)
        assert not rig.replica.idle
        rig.replica.stop()
        assert isinstance(rig.answers[-1][1], OutcomeUnknown) and rig.answers[-1][0] == 1
        assert rig.replica.idle

    run(scenario())


def test_a_failed_fsync_ends_the_process_and_acknowledges_nothing() -> None:
    async def scenario() -> None:
        rig = await (await Rig().start()).lead()
        failures: list[OSError] = []
        rig.store.wal.on_failure = failures.append
        rig.disk.fail("sync", 5)
        rig.put(1)
        await rig.until(lambda: len(failures) == 1)
        rig.put(2)
        await asyncio.sleep(0.05)
        assert len(failures) == 1 and not rig.answers

    run(scenario())
