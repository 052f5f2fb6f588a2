"""The log after a crash, and after damage: nothing acknowledged is lost, no garbage is taken for data."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from raftkv.raft.actions import HardState
from raftkv.storage import wal_recovery
from raftkv.storage.disk import DiskFile
from raftkv.storage.errors import Corruption, FormatTooNew
from raftkv.storage.wal import WalState
from raftkv.storage.wal_format import (
    BATCH_HEADER_BYTES,
    BLOCK_BYTES,
    VERSION,
    SegmentHeader,
    decode_batch,
    decode_segment_header,
)
from tests.storage.fake_disk import FakeDisk
from tests.storage.helpers import (
    DIRECTORY,
    MEMBERS,
    SEGMENT_BYTES,
    LogDriver,
    append,
    entries,
    entry,
    open_wal,
    reset,
    run,
    settle,
)

FIRST = f"{DIRECTORY}/000000000001.wal"
SECOND = f"{DIRECTORY}/000000000002.wal"


def written(disk: FakeDisk, *batches: list[int], segment_bytes: int = SEGMENT_BYTES) -> None:
    """A closed log with one sync batch for each list of indices, after the one that begins it."""

    async def scenario() -> None:
        wal, _ = open_wal(disk, segment_bytes=segment_bytes)
        for indices in batches:
            await append(wal, HardState(indices[-1], 1), [entry(index) for index in indices])
        await settle()
        wal.close()

    run(scenario())


def batch_positions(data: bytes) -> list[tuple[int, int]]:
    """(start, end of its bytes) of every batch in a segment."""
    header = decode_segment_header(data)
    found = []
    position = BLOCK_BYTES
    while data[position : position + 4] != bytes(4):
        batch = decode_batch(data, position, header)
        length = int.from_bytes(data[position + BATCH_HEADER_BYTES - 4 : position + BATCH_HEADER_BYTES], "big")
        found.append((position, position + BATCH_HEADER_BYTES + length))
        position = batch.end
        if position >= len(data):
            break
    return found


def put(disk: FakeDisk, path: str, data: bytes) -> None:
    disk.write_durably(path, data)


@pytest.mark.parametrize("tail", ["zeros", "garbage", "old file end"])
def test_the_last_batch_cut_at_every_byte(tail: str) -> None:
    """All earlier batches come back, the cut one is gone whole, and the log goes on."""
    disk = FakeDisk(random.Random(3))
    written(disk, [1], [2, 3], [4, 5, 6])
    image = disk.read(FIRST)
    start, end = batch_positions(image)[-1]
    for cut in range(start, end):
        rest = {
            "zeros": bytes(len(image) - cut),
            "garbage": disk.rng.randbytes(end - cut) + bytes(len(image) - end),
            "old file end": b"",
        }[tail]
        if image[cut:end] == rest[: end - cut]:
            continue  # the cut took zeros from zeros
        put(disk, FIRST, image[:cut] + rest)
        _, state = open_wal(disk)
        if image[:end] == (image[:cut] + rest).ljust(end, b"\0")[:end]:
            assert state.entries == entries(1, 6), cut
            continue
        assert state.entries == entries(1, 3), cut
        assert state.hard_state == HardState(3, 1), cut
        repaired = disk.read(FIRST)
        assert len(repaired) == SEGMENT_BYTES
        assert repaired[:start] == image[:start]
        assert not any(repaired[start:]), cut


def test_a_log_goes_on_after_a_torn_tail() -> None:
    for cut in range(0, 400, 7):
        disk = FakeDisk(random.Random(cut))
        written(disk, [1], [2, 3], [4, 5, 6])
        image = disk.read(FIRST)
        start, _ = batch_positions(image)[-1]
        put(disk, FIRST, image[: start + cut] + bytes(len(image) - start - cut))
        wal, state = open_wal(disk)

        async def scenario(wal=wal, state=state) -> None:  # type: ignore[no-untyped-def]
            first = len(state.entries) + 1
            for index in range(first, 12):
                await append(wal, None, [entry(index, 2)])

        run(scenario())
        disk.power_loss()
        _, again = open_wal(disk)
        assert again.entries == state.entries + entries(len(state.entries) + 1, 11, term=2)


def test_every_bit_of_a_durable_batch_is_guarded() -> None:
    """A flip before the durable offset: refused, with the file and an offset in the damaged batch."""
    disk = FakeDisk(random.Random(4))
    written(disk, [1], [2, 3], [4])
    image = disk.read(FIRST)
    *durable, _last = batch_positions(image)
    assert len(durable) == 3  # the one that begins the segment, and two
    for start, end in durable:
        for offset in range(start, end):
            damaged = bytearray(image)
            damaged[offset] ^= 1 << disk.rng.randrange(8)
            put(disk, FIRST, bytes(damaged))
            with pytest.raises(Corruption) as caught:
                open_wal(disk)
            assert caught.value.path == FIRST
            assert start <= caught.value.offset <= offset
            assert FIRST in str(caught.value) and str(caught.value.offset) in str(caught.value)
    put(disk, FIRST, image)
    assert open_wal(disk)[1].entries == entries(1, 4)


def test_a_refusal_changes_nothing_on_the_disk() -> None:
    disk = FakeDisk(random.Random(5))
    written(disk, [1], [2, 3], [4])
    start, _ = batch_positions(disk.read(FIRST))[1]
    disk.flip(FIRST, start + BATCH_HEADER_BYTES + 12)
    before = disk.read(FIRST)
    for _ in range(2):
        with pytest.raises(Corruption):
            open_wal(disk)
    assert disk.read(FIRST) == before


def test_every_bit_of_the_last_batch_is_guarded() -> None:
    """A flip beyond the durable offset can't be told from a torn write: that batch goes, no other does."""
    disk = FakeDisk(random.Random(6))
    written(disk, [1], [2, 3], [4, 5])
    image = disk.read(FIRST)
    start, end = batch_positions(image)[-1]
    for offset in range(start, end):
        damaged = bytearray(image)
        damaged[offset] ^= 1 << disk.rng.randrange(8)
        put(disk, FIRST, bytes(damaged))
        _, state = open_wal(disk)
        assert state.entries == entries(1, 3), offset


def test_a_flip_in_the_zeros_behind_the_log_harms_nothing() -> None:
    disk = FakeDisk(random.Random(7))
    written(disk, [1], [2])
    _, end = batch_positions(disk.read(FIRST))[-1]
    for offset in (end + 1, SEGMENT_BYTES - 1):
        disk.flip(FIRST, offset)
        _, state = open_wal(disk)
        assert state.entries == entries(1, 2)


def test_a_flip_in_the_unused_end_of_a_sealed_segment_harms_nothing() -> None:
    """The first batch of the next segment says where this one ends, even when it is the only one."""
    disk = FakeDisk(random.Random(8))
    written(disk, *[[index] for index in range(1, 8)])
    _, state = open_wal(disk)
    first = disk.read(FIRST)
    _, end = batch_positions(first)[-1]
    assert len(batch_positions(disk.read(SECOND))) == 1
    if end + 1 < SEGMENT_BYTES:
        disk.flip(FIRST, SEGMENT_BYTES - 1)
    assert open_wal(disk)[1] == state


@pytest.mark.parametrize("part", ["first", "last"])
def test_a_flip_in_an_older_segment_is_refused(part: str) -> None:
    disk = FakeDisk(random.Random(9))
    written(disk, *[[index] for index in range(1, 20)])
    positions = batch_positions(disk.read(FIRST))
    start, end = positions[0 if part == "first" else -1]
    for offset in (start, start + 9, end - 1):
        disk.flip(FIRST, offset)
        with pytest.raises(Corruption) as caught:
            open_wal(disk)
        assert (caught.value.path, start) <= (FIRST, caught.value.offset) <= (FIRST, offset)
        disk.flip(FIRST, offset)
    open_wal(disk)


def test_the_batch_that_rolled_the_log_cut_at_every_byte() -> None:
    disk = FakeDisk(random.Random(10))
    written(disk, *[[index] for index in range(1, 8)])
    first, image = disk.read(FIRST), disk.read(SECOND)
    ((start, end),) = batch_positions(image)
    for cut in range(start, end):
        put(disk, FIRST, first)
        put(disk, SECOND, image[:cut] + bytes(len(image) - cut))
        wal, state = open_wal(disk)
        if any(image[cut:end]):
            assert state.entries == entries(1, 6), cut
            run(append(wal, None, [entry(7, 9)]))
            disk.power_loss()
            _, state = open_wal(disk)
            assert state.entries == [*entries(1, 6), entry(7, 9)], cut


def test_a_missing_segment_is_refused() -> None:
    disk = FakeDisk(random.Random(11))
    written(disk, *[[index] for index in range(1, 30)])
    names = disk.list(DIRECTORY)
    assert len(names) >= 4
    disk.remove(f"{DIRECTORY}/{names[1]}")
    with pytest.raises(Corruption, match=r"entries 1 to \d+ are missing"):
        open_wal(disk)


def test_segments_before_a_gap_are_left_over_from_dropping() -> None:
    """Removals are not synced one by one: after a crash any of them may be back."""
    disk = FakeDisk(random.Random(12))

    async def scenario() -> WalState:
        wal, _ = open_wal(disk)
        await reset(wal, HardState(1, 1), 0, 0)
        for index in range(1, 30):
            await append(wal, None, entries(index, index))
        await settle()
        image = {name: disk.read(f"{DIRECTORY}/{name}") for name in disk.list(DIRECTORY)}
        wal.compact(29, 1, MEMBERS)
        await settle()
        wal.close()
        left = disk.list(DIRECTORY)
        assert len(left) < len(image) - 2
        put(disk, f"{DIRECTORY}/000000000001.wal", image["000000000001.wal"])
        return WalState(HardState(1, 1), 29, 1, MEMBERS, [])

    expected = run(scenario())
    for _ in range(2):
        assert open_wal(disk)[1] == expected
    assert "000000000001.wal" not in disk.list(DIRECTORY)


@pytest.mark.parametrize("size_bytes", [0, 1, 20, BLOCK_BYTES - 500])
def test_a_segment_without_its_header_is_refused(size_bytes: int) -> None:
    """A segment gets its name when it is whole, so no crash leaves one like that."""
    disk = FakeDisk(random.Random(13))
    written(disk, [1], [2])
    put(disk, FIRST, disk.read(FIRST)[:size_bytes])
    with pytest.raises(Corruption) as caught:
        open_wal(disk)
    assert (caught.value.path, caught.value.offset) == (FIRST, 0)


def test_every_bit_of_a_segment_header_is_guarded() -> None:
    disk = FakeDisk(random.Random(14))
    written(disk, [1], [2])
    image = disk.read(FIRST)
    for offset in range(50):
        if offset >= len(decode_segment_header(image).encode()):
            break
        damaged = bytearray(image)
        damaged[offset] ^= 1 << disk.rng.randrange(8)
        put(disk, FIRST, bytes(damaged))
        with pytest.raises(Corruption):
            open_wal(disk)


def test_a_later_format_is_refused() -> None:
    disk = FakeDisk(random.Random(15))
    written(disk, [1])
    header = SegmentHeader(VERSION + 1, 1, 0, SEGMENT_BYTES, 5).encode()
    put(disk, FIRST, header.ljust(SEGMENT_BYTES, b"\0"))
    with pytest.raises(FormatTooNew, match="format 2"):
        open_wal(disk)


def test_a_segment_under_another_name_is_refused() -> None:
    disk = FakeDisk(random.Random(16))
    written(disk, [1])
    disk.move(FIRST, f"{DIRECTORY}/000000000007.wal")
    with pytest.raises(Corruption, match="segment 1"):
        open_wal(disk)


def test_a_crash_while_the_log_is_made_leaves_a_new_log() -> None:
    for steps in range(20):
        disk = FakeDisk(random.Random(steps))
        disk.lose_power_after(steps)
        try:
            open_wal(disk)
        except BaseException as error:
            assert type(error).__name__ == "PowerLost"
        disk.power_loss()
        _, state = open_wal(disk)
        assert state == WalState(HardState(), 0, 0, None, [])


def test_unfinished_files_are_removed() -> None:
    disk = FakeDisk(random.Random(17))
    written(disk, [1])
    put(disk, f"{DIRECTORY}/000000000002.wal.tmp", b"half")
    _, state = open_wal(disk)
    assert state.entries == entries(1, 1)
    assert disk.list(DIRECTORY) == ["000000000001.wal"]


def test_a_value_that_looks_like_a_batch_is_not_one() -> None:
    """A client can write what it likes; the salt keeps it from passing for the log's own."""
    disk = FakeDisk(random.Random(18))
    written(disk, [1], [2], segment_bytes=16 * 1024)
    image = disk.read(FIRST)
    blocks = image[: 4 * BLOCK_BYTES]  # aligned copies of true batches, at places where they don't belong

    async def scenario() -> None:
        wal, _ = open_wal(disk, segment_bytes=16 * 1024)
        for pad in (0, BLOCK_BYTES - 100):
            await append(wal, None, [entry(wal.last_index + 1, 1, bytes(pad) + blocks)])

    run(scenario())
    image = disk.read(FIRST)
    start, _ = batch_positions(image)[-1]
    put(disk, FIRST, image[: start + 40] + bytes(60) + image[start + 100 :])
    _, state = open_wal(disk)
    assert [e.index for e in state.entries] == [1, 2, 3]


def crash_rounds(seed: int, rounds: int, kind: type[FakeDisk] = FakeDisk) -> None:
    rng = random.Random(seed)
    disk = kind(random.Random(seed + 1))
    driver: LogDriver | None = None
    for _ in range(rounds):
        if rng.random() < 0.3:
            disk.lose_power_after(rng.randrange(8))  # in the middle of the recovery
            try:
                open_wal(disk)
            except BaseException as error:
                assert type(error).__name__ == "PowerLost"
            disk.power_loss()
        wal, state = open_wal(disk)
        if driver is not None:
            driver.check(state)
        driver = current = LogDriver(wal, state, rng)

        async def scenario(driver: LogDriver = current) -> None:
            disk.latency_s = lambda job: rng.choice((0.0, 0.0, 0.0005))
            for _ in range(rng.randrange(30)):
                driver.call()
                for _ in range(rng.choice((0, 0, 1, 4))):
                    await asyncio.sleep(rng.choice((0, 0, 0.001)))
            if rng.random() < 0.3:
                disk.lose_power_after(rng.randrange(12))
                await settle()

        run(scenario())
        if rng.random() < 0.3:
            disk.kill()
        else:
            disk.power_loss()


@pytest.mark.parametrize("seed", range(40))
def test_random_crashes_lose_nothing_acknowledged(seed: int) -> None:
    crash_rounds(seed, 6)


@pytest.mark.parametrize("seed", range(15))
def test_one_flipped_bit_anywhere_is_refused_or_costs_no_more_than_the_last_batch(seed: int) -> None:
    rng = random.Random(seed)
    disk = FakeDisk(random.Random(seed + 1))
    wal, state = open_wal(disk)
    driver = LogDriver(wal, state, rng)

    async def scenario() -> None:
        for _ in range(40):
            driver.call()
            await settle()
        wal.close()

    run(scenario())
    images = {name: disk.read(f"{DIRECTORY}/{name}") for name in disk.list(DIRECTORY)}
    refused = 0
    for _ in range(60):
        name = rng.choice(list(images))
        used = len(images[name].rstrip(b"\0"))
        disk.flip(f"{DIRECTORY}/{name}", rng.randrange(used), rng.randrange(8))
        try:
            _, found = open_wal(disk)
        except Corruption:
            refused += 1
        else:
            assert found in driver.model.states[-3:]  # a compaction is two calls
        for present in disk.list(DIRECTORY):
            disk.remove(f"{DIRECTORY}/{present}")
        for present, image in images.items():
            put(disk, f"{DIRECTORY}/{present}", image)
    assert refused > 2  # most of the bytes are zeros between batches
    assert open_wal(disk)[1] == driver.model.state


class Unsynced(FakeDisk):
    """Ablation: acknowledges without a sync."""

    def write_all_and_sync(self, file: DiskFile, writes: Sequence[tuple[int, bytes]]) -> None:
        for offset, data in writes:
            file.write(offset, data)


def test_the_crash_test_notices_a_missing_sync() -> None:
    noticed = 0
    for seed in range(20):
        try:
            crash_rounds(seed, 6, Unsynced)
        except (AssertionError, Corruption):
            noticed += 1
    assert noticed > 5


def test_the_crash_test_notices_batches_cut_too_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ablation: a segment's end is taken for the log's end."""
    monkeypatch.setattr(wal_recovery, "_continues", lambda *arguments: False)
    monkeypatch.setattr(wal_recovery, "_refuse_if_durable", lambda *arguments: None)
    noticed = 0
    for seed in range(20):
        try:
            crash_rounds(seed, 6)
        except (AssertionError, Corruption):
            noticed += 1
    assert noticed > 5


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1020))
def test_many_random_crashes_lose_nothing_acknowledged(seed: int) -> None:
    for offset in range(50):
        crash_rounds(seed * 100 + offset, 8)
