"""The log while it runs: group commit, segments, compaction, failure."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from raftkv.raft.actions import HardState
from raftkv.raft.membership import Membership
from raftkv.storage.disk import Job
from raftkv.storage.errors import Corruption, DiskFailed
from raftkv.storage.wal import Wal
from tests.storage.fake_disk import FakeDisk
from tests.storage.helpers import (
    DIRECTORY,
    MEMBERS,
    SEGMENT_BYTES,
    append,
    entries,
    entry,
    open_wal,
    reset,
    run,
    settle,
)


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk(random.Random(1))


def segment_files(disk: FakeDisk) -> list[str]:
    return disk.list(DIRECTORY)


def test_a_new_log_is_empty_and_has_no_membership(disk: FakeDisk) -> None:
    for _ in range(2):
        wal, state = open_wal(disk)
        assert (state.hard_state, state.start_index, state.start_term) == (HardState(0, None), 0, 0)
        assert state.membership is None and state.entries == []
        wal.close()


def test_what_was_acknowledged_comes_back(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        await append(wal, HardState(3, 2), [])
        await append(wal, None, entries(1, 3))
        await append(wal, HardState(4, None), entries(4, 4, term=4))

    run(scenario())
    disk.power_loss()
    _, state = open_wal(disk)
    assert state.hard_state == HardState(4, None)
    assert state.entries == entries(1, 3) + entries(4, 4, term=4)


def test_entries_are_stored_as_their_own_bytes(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        await append(wal, None, [entry(1, 1, b"\x00binary\xff")])

    run(scenario())
    assert entry(1, 1, b"\x00binary\xff").encoded in disk.read(f"{DIRECTORY}/000000000001.wal")


def test_appends_of_one_flight_go_out_together_and_are_acknowledged_in_order(disk: FakeDisk) -> None:
    jobs: list[Job] = []

    def latency_s(job: Job) -> float:
        jobs.append(job)
        return 0.0

    async def scenario() -> list[int]:
        wal, _ = open_wal(disk, segment_bytes=64 * 1024)
        disk.latency_s = latency_s
        order: list[int] = []
        for index in range(1, 11):
            wal.append(None, entries(index, index), lambda index=index: order.append(index))  # type: ignore[misc]
        assert order == []
        await settle()
        return order

    assert run(scenario()) == list(range(1, 11))
    assert [job.operation for job in jobs] == ["write_all_and_sync"] * 2  # the first alone, nine with the next


def test_the_next_flight_leaves_before_the_callbacks_of_the_last(disk: FakeDisk) -> None:
    """The disk stays busy while the loop works on what was acknowledged."""
    in_flight: list[str] = []

    def latency_s(job: Job) -> float:
        in_flight.append(job.operation)
        return 0.0

    async def scenario() -> None:
        wal, _ = open_wal(disk)
        disk.latency_s = latency_s
        seen: list[int] = []
        wal.append(None, entries(1, 1), lambda: seen.append(len(in_flight)))
        wal.append(None, entries(2, 2), lambda: None)
        await settle()
        assert seen == [2]

    run(scenario())


@pytest.mark.parametrize("crash", ["kill", "power_loss"])
def test_a_lower_index_replaces_the_tail(disk: FakeDisk, crash: str) -> None:
    """Leaders A, B, A rewrite the same indices while earlier syncs are in flight (Part 2, row 11)."""

    async def scenario() -> None:
        wal, _ = open_wal(disk)
        order: list[str] = []
        wal.append(HardState(1, 1), entries(1, 5, term=1), lambda: order.append("A"))
        wal.append(HardState(2, 2), entries(3, 6, term=2), lambda: order.append("B"))
        wal.append(HardState(3, 1), entries(3, 4, term=3), lambda: order.append("A again"))
        assert wal.last_index == 4
        await settle()
        assert order == ["A", "B", "A again"]

    run(scenario())
    getattr(disk, crash)()
    _, state = open_wal(disk)
    assert state.entries == entries(1, 2, term=1) + entries(3, 4, term=3)
    assert state.hard_state == HardState(3, 1)


def test_an_index_beyond_the_end_or_behind_the_start_is_a_bug_of_the_caller(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        await append(wal, None, entries(1, 3))
        with pytest.raises(AssertionError):
            wal.append(None, entries(5, 5), lambda: None)
        wal.compact(2, 1, MEMBERS)
        with pytest.raises(AssertionError):
            wal.append(None, entries(2, 2), lambda: None)
        with pytest.raises(AssertionError):
            wal.compact(1, 1, MEMBERS)

    run(scenario())


def test_segments_roll_and_are_filled_ahead_of_need(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        await append(wal, HardState(1, 1), entries(1, 1))
        assert segment_files(disk) == ["000000000001.wal"]
        while wal.segments == 1:
            await append(wal, None, entries(wal.last_index + 1, wal.last_index + 1))
            if 2 * wal.last_index > 6:  # more than half of the segment's blocks
                await settle()
                assert len(segment_files(disk)) == 2
        assert disk.size(f"{DIRECTORY}/000000000002.wal") == SEGMENT_BYTES
        for _ in range(40):
            await append(wal, None, entries(wal.last_index + 1, wal.last_index + 1))
        await settle()
        assert wal.segments > 5
        assert wal.bytes_on_disk == sum(disk.size(f"{DIRECTORY}/{name}") for name in segment_files(disk))

    run(scenario())
    disk.power_loss()
    wal, state = open_wal(disk)
    assert state.entries == entries(1, wal.last_index)
    assert state.hard_state == HardState(1, 1)


def test_a_batch_larger_than_a_segment_gets_a_segment_of_its_size(disk: FakeDisk) -> None:
    big = entry(2, 1, b"x" * (5 * SEGMENT_BYTES))

    async def scenario() -> None:
        wal, _ = open_wal(disk)
        await append(wal, None, entries(1, 1))
        await append(wal, None, [big])
        await append(wal, None, entries(3, 3))
        for index in range(4, 12):
            await append(wal, None, entries(index, index))

    run(scenario())
    disk.power_loss()
    _, state = open_wal(disk)
    assert state.entries == [*entries(1, 1), big, *entries(3, 11)]


def test_compaction_drops_whole_segments_only(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        await append(wal, HardState(1, 1), [])
        await reset(wal, HardState(1, 1), 0, 0)
        ends: list[int] = []  # the last index of each segment
        for index in range(1, 41):
            segments = wal.segments
            await append(wal, None, entries(index, index))
            if wal.segments > segments:
                ends.append(index - 1)
        await settle()
        before = segment_files(disk)
        wal.compact(ends[2] - 1, 1, MEMBERS)  # the third segment still has an entry above it
        await settle()
        assert segment_files(disk) == before[2:]
        wal.compact(ends[2], 1, MEMBERS)
        await settle()
        assert segment_files(disk) == before[3:]
        assert wal.start_index == ends[2]

    run(scenario())
    disk.power_loss()
    _, state = open_wal(disk)
    assert state.entries == entries(state.start_index + 1, 40)
    assert (state.membership, state.start_term, state.hard_state) == (MEMBERS, 1, HardState(1, 1))


def test_nothing_is_dropped_before_the_new_start_is_durable(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        for index in range(1, 21):
            await append(wal, None, entries(index, index))
        await settle()
        before = segment_files(disk)
        wal.compact(20, 1, MEMBERS)
        assert segment_files(disk) == before

    run(scenario())
    disk.power_loss()
    _, state = open_wal(disk)
    assert state.start_index in (0, 20)
    assert state.entries == entries(state.start_index + 1, 20)


def test_compaction_to_the_end_leaves_an_empty_log_that_goes_on(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        await append(wal, HardState(2, 1), entries(1, 9, term=2))
        wal.compact(9, 2, MEMBERS)
        await append(wal, None, entries(10, 10, term=2))

    run(scenario())
    disk.power_loss()
    _, state = open_wal(disk)
    assert (state.start_index, state.start_term, state.entries) == (9, 2, entries(10, 10, term=2))


def test_every_segment_begins_with_the_membership_of_its_log_start(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        for index in range(1, 30):
            await append(wal, HardState(index, 1), entries(index, index, term=index))
            if index % 5 == 0:
                wal.compact(index, index, Membership((1, index + 1)))
        await settle()
        assert wal.segments == 2 or wal.segments == 1

    run(scenario())
    disk.power_loss()
    _, state = open_wal(disk)
    assert (state.start_index, state.membership) == (25, Membership((1, 26)))
    assert state.hard_state == HardState(29, 1)


def test_reset_voids_everything_before(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        for index in range(1, 30):
            await append(wal, HardState(5, 1), entries(index, index, term=5))
        await reset(wal, HardState(6, None), 20, 6)
        assert (wal.start_index, wal.last_index) == (20, 20)
        await settle()
        assert len(segment_files(disk)) <= 2
        await append(wal, None, entries(21, 22, term=6))

    run(scenario())
    disk.power_loss()
    _, state = open_wal(disk)
    assert (state.start_index, state.start_term, state.hard_state) == (20, 6, HardState(6, None))
    assert state.entries == entries(21, 22, term=6)
    assert state.membership == MEMBERS


def test_reset_takes_no_term_and_no_vote_back(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        await append(wal, HardState(5, 2), [])
        for behind in (HardState(4, 2), HardState(5, None), HardState(5, 3)):
            with pytest.raises(AssertionError):
                wal.reset(behind, 9, 5, MEMBERS, lambda: None)
        await reset(wal, HardState(5, 2), 9, 5)
        await reset(wal, HardState(6, None), 9, 5)

    run(scenario())


def test_reset_at_start_up_blocks_and_is_durable(disk: FakeDisk) -> None:
    wal, _ = open_wal(disk)
    for index in range(1, 10):  # over more than one segment
        wal.reset_now(HardState(index), index, index, Membership(tuple(range(index * 20))))
    wal.close()
    disk.power_loss()
    _, state = open_wal(disk)
    assert (state.hard_state, state.start_index, state.start_term) == (HardState(9), 9, 9)
    assert state.membership == Membership(tuple(range(180)))


@pytest.mark.parametrize(("step", "number"), [("sync", errno.EIO), ("write", errno.EIO), ("write", errno.ENOSPC)])
def test_a_failed_write_or_sync_is_reported_once_and_never_retried(disk: FakeDisk, step: str, number: int) -> None:
    failures: list[OSError] = []
    acknowledged: list[int] = []

    async def scenario() -> None:
        wal, _ = open_wal(disk)
        wal.on_failure = failures.append
        await append(wal, None, entries(1, 1))
        disk.fail(step, number, path_part=".wal")
        wal.append(None, entries(2, 2), lambda: acknowledged.append(2))
        wal.append(None, entries(3, 3), lambda: acknowledged.append(3))
        await settle()
        steps = disk.steps
        wal.append(None, entries(4, 4), lambda: acknowledged.append(4))
        wal.compact(1, 1, MEMBERS)
        await settle()
        assert disk.steps == steps
        wal.close()

    run(scenario())
    assert acknowledged == []
    assert len(failures) == 1 and failures[0].errno == number
    assert isinstance(failures[0], DiskFailed)
    assert f"{DIRECTORY}/000000000001.wal" in str(failures[0])
    assert ("free some space" in str(failures[0])) == (number == errno.ENOSPC)
    disk.power_loss()
    _, state = open_wal(disk)
    assert entries(1, 1) == state.entries[:1]


def test_after_a_failed_sync_a_restart_does_not_trust_the_page_cache(disk: FakeDisk) -> None:
    """The batch can be read back after the process died, but it is not on the disk: it is written again."""

    async def scenario() -> None:
        wal, _ = open_wal(disk)
        wal.on_failure = lambda error: None
        await append(wal, None, entries(1, 1))
        disk.fail("sync", errno.EIO, path_part=".wal")
        wal.append(None, entries(2, 2), lambda: None)
        await settle()

    run(scenario())
    disk.kill()
    wal, state = open_wal(disk)
    assert state.entries == entries(1, 2)  # read, and so it may be acknowledged now
    wal.close()
    disk.power_loss()
    _, state = open_wal(disk)
    assert state.entries == entries(1, 2)


def test_no_room_for_the_next_segment_hurts_only_when_it_is_needed() -> None:
    disk = FakeDisk(random.Random(2), capacity_bytes=SEGMENT_BYTES + 1000)
    failures: list[OSError] = []

    async def scenario() -> int:
        wal, _ = open_wal(disk)
        wal.on_failure = failures.append
        acknowledged: list[int] = []
        for index in range(1, 20):
            if failures:
                break
            wal.append(None, entries(index, index), lambda index=index: acknowledged.append(index))  # type: ignore[misc]
            await settle()
        return acknowledged[-1]

    creations: list[str] = []
    disk.latency_s = lambda job: float(creations.append(job.operation) or 0)  # type: ignore[func-returns-value]
    last = run(scenario())
    assert last >= 5
    assert creations.count("create") == 2  # ahead of need, and when it was needed
    assert [failure.errno for failure in failures] == [errno.ENOSPC]
    disk.power_loss()
    disk.capacity_bytes = None
    _, state = open_wal(disk)
    assert state.entries == entries(1, last)


def test_a_closed_log_calls_nobody(disk: FakeDisk) -> None:
    async def scenario() -> list[int]:
        wal, _ = open_wal(disk)
        called: list[int] = []
        wal.append(None, entries(1, 1), lambda: called.append(1))
        wal.close()
        wal.close()
        await settle()
        return called

    assert run(scenario()) == []


def test_a_log_closed_by_a_callback_calls_nobody_else(disk: FakeDisk) -> None:
    async def scenario() -> list[int]:
        wal, _ = open_wal(disk)
        called: list[int] = []
        wal.append(None, entries(1, 1), lambda: None)
        wal.append(None, entries(2, 2), wal.close)
        wal.append(None, entries(3, 3), lambda: called.append(3))
        await settle()
        return called

    assert run(scenario()) == []


def test_a_missing_log_is_not_replaced_unless_asked(disk: FakeDisk) -> None:
    with pytest.raises(Corruption, match="missing"):
        Wal.open(disk, DIRECTORY, may_create=False)
    assert not disk.exists(DIRECTORY)


def test_a_slow_disk_holds_up_nothing_but_the_acknowledgements(disk: FakeDisk) -> None:
    async def scenario() -> None:
        wal, _ = open_wal(disk)
        disk.latency_s = lambda job: 0.05
        order: list[int] = []
        started_s = asyncio.get_running_loop().time()
        for index in range(1, 100):
            wal.append(None, entries(index, index), lambda index=index: order.append(index))  # type: ignore[misc]
        assert asyncio.get_running_loop().time() - started_s < 0.05
        assert order == []
        while len(order) < 99:
            await asyncio.sleep(0.01)
        assert order == list(range(1, 100))

    run(scenario())
