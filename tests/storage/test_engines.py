"""Both engines keep one contract: a stateful comparison with a plain dict, crashes included."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from raftkv.storage.engine import Overlay, Range, StorageEngine, write_through_stalls
from raftkv.storage.errors import EngineFailed, EngineUnreadable, WriteStall
from raftkv.storage.memory import MemoryBacking, MemoryEngine
from raftkv.storage.rocks import RocksEngine
from tests.storage.fake_disk import FakeDisk
from tests.storage.helpers import run

T = TypeVar("T")
Write = tuple[dict[bytes, bytes | None], list[Range]]

keys = st.binary(max_size=2) | st.sampled_from([b"", b"a", b"a\x00", b"b", b"\xff", b"\xff\xff"])
values = st.binary(max_size=8) | st.just(b"")
batches = st.tuples(st.dictionaries(keys, values | st.none(), max_size=6), st.lists(st.tuples(keys, keys), max_size=2))


def apply(state: dict[bytes, bytes], write: Write) -> dict[bytes, bytes]:
    changes, ranges = write
    after = {k: v for k, v in state.items() if not any(start <= k < end for start, end in ranges)}
    for key, value in changes.items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = value
    return after


def content(engine: StorageEngine) -> dict[bytes, bytes]:
    pairs = list(engine.scan(b"", b"\xff" * 9))
    assert pairs == sorted(pairs)
    return dict(pairs)


class EngineContract(RuleBasedStateMachine):
    """`state` is what the engine should hold, `since_flush` the writes a crash may take."""

    engine: StorageEngine

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.state: dict[bytes, bytes] = {}
        self.flushed: dict[bytes, bytes] = {}
        self.since_flush: list[Write] = []
        self.scans: list[tuple[Iterator[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]] = []
        self.names = (f"copy{number}" for number in itertools.count())

    def run(self, scenario: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(scenario)

    # What the two kinds supply.
    def open(self) -> StorageEngine:
        raise NotImplementedError

    def open_copy(self, directory: str) -> StorageEngine:
        raise NotImplementedError

    def directory_for(self, name: str) -> str:
        raise NotImplementedError

    def crash_disk(self) -> None:
        """The engine object is dead; the next `open` is by a new process."""
        raise NotImplementedError

    @initialize()
    def begin(self) -> None:
        self.engine = self.open()

    @rule(write=batches)
    def write(self, write: Write) -> None:
        self.engine.write(*write)
        self.state = apply(self.state, write)
        self.since_flush.append(write)

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        assert self.engine.get(key) == self.state.get(key)

    @rule(start=keys, end=keys)
    def scan(self, start: bytes, end: bytes) -> None:
        expected = sorted((k, v) for k, v in self.state.items() if start <= k < end)
        assert list(self.engine.scan(start, end)) == expected

    @rule(start=keys, end=keys)
    def begin_scan(self, start: bytes, end: bytes) -> None:
        expected = sorted((k, v) for k, v in self.state.items() if start <= k < end)
        self.scans.append((self.engine.scan(start, end), expected))

    @precondition(lambda self: self.scans)
    @rule()
    def end_scan(self) -> None:
        """A scan shows the moment of its call, whatever was written since."""
        scan, expected = self.scans.pop()
        assert list(scan) == expected

    @rule(write=batches, key=keys, value=values, start=keys, end=keys)
    def overlay(self, write: Write, key: bytes, value: bytes, start: bytes, end: bytes) -> None:
        """The commands of one entry see each other; the engine sees nothing until the one write."""
        view, expected = Overlay(self.engine), dict(self.state)
        view.put(key, value)
        expected[key] = value
        for low, high in write[1]:
            view.delete_range(low, high)
            expected = apply(expected, ({}, [(low, high)]))
        for changed, new in write[0].items():
            if new is None:
                view.delete(changed)
            else:
                view.put(changed, new)
        expected = apply(expected, (write[0], []))
        view.delete_range(start, end)
        expected = apply(expected, ({}, [(start, end)]))
        assert view.get(key) == expected.get(key)
        assert list(view.scan(b"", b"\xff" * 9)) == sorted(expected.items())
        assert list(view.scan(start, b"\xff" * 9)) == sorted((k, v) for k, v in expected.items() if k >= start)
        assert content(self.engine) == self.state
        self.write((view.changes, view.range_deletes))
        assert content(self.engine) == expected

    @rule()
    def flush(self) -> None:
        self.run(self.engine.flush())
        self.flushed, self.since_flush = self.state, []

    @rule(key=keys)
    def checkpoint(self, key: bytes) -> None:
        directory = self.directory_for(next(self.names))
        assert self.run(self.engine.checkpoint(directory, (key, b"absent key"))) == [self.state.get(key), None]
        copy = self.open_copy(directory)
        try:
            assert content(copy) == self.state
            copy.write({b"only in the copy": b"1"})
        finally:
            copy.close()
        assert self.engine.get(b"only in the copy") is None

    @rule()
    def crash(self) -> None:
        """It comes back with some prefix of the writes since the last flush, and keeps that."""
        self.scans.clear()
        self.crash_disk()
        self.engine = self.open()
        found = content(self.engine)
        possible = [self.flushed]
        for write in self.since_flush:
            possible.append(apply(possible[-1], write))
        assert found in possible
        self.state, self.since_flush, self.flushed = found, [], found

    @rule(start=keys, end=keys)
    def size(self, start: bytes, end: bytes) -> None:
        assert self.engine.approximate_bytes(start, end) >= 0

    def teardown(self) -> None:
        self.scans.clear()
        if hasattr(self, "engine"):
            self.engine.close()
        self.runner.close()


class MemoryContract(EngineContract):
    def __init__(self) -> None:
        super().__init__()
        self.disk = FakeDisk(random.Random(1))
        self.backing = MemoryBacking(random.Random(2))

    def open(self) -> StorageEngine:
        return MemoryEngine(self.disk, "engine", self.backing)

    def open_copy(self, directory: str) -> StorageEngine:
        self.disk.power_loss()  # a checkpoint is durable
        return MemoryEngine(self.disk, directory)

    def directory_for(self, name: str) -> str:
        return name

    def crash_disk(self) -> None:
        self.disk.power_loss()


def listing(directory: Path) -> list[tuple[str, int, int]]:
    found = []
    for file in sorted(directory.iterdir()):
        try:
            state = file.stat()
        except FileNotFoundError:
            continue
        found.append((file.name, state.st_size, state.st_mtime_ns))
    return found


class RocksContract(EngineContract):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="raftkv-rocks-"))
        self.lives = 0

    def open(self) -> StorageEngine:
        return RocksEngine(f"{self.root}/life{self.lives}", cache_bytes=1 << 20)

    def open_copy(self, directory: str) -> StorageEngine:
        return RocksEngine(directory, cache_bytes=1 << 20)

    def directory_for(self, name: str) -> str:
        return str(self.root / name)

    def crash_disk(self) -> None:
        """The files as they are at an instant, without the close that would flush."""
        before, self.lives = self.root / f"life{self.lives}", self.lives + 1
        after = self.root / f"life{self.lives}"
        while True:  # RocksDB's own threads may be at work
            shutil.rmtree(after, ignore_errors=True)
            seen = listing(before)
            try:
                shutil.copytree(before, after)
            except (FileNotFoundError, shutil.Error):
                continue
            if listing(before) == seen:
                break
        self.engine.close()

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.root)


few = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestMemoryEngine = MemoryContract.TestCase
TestMemoryEngine.settings = settings(few, max_examples=60)
TestRocksEngine = RocksContract.TestCase
TestRocksEngine.settings = few


@pytest.mark.long
@pytest.mark.timeout(300)
def test_rocks_engine_long() -> None:
    run_state_machine_as_test(
        RocksContract, settings=settings(few, max_examples=30, stateful_step_count=40, phases=[Phase.generate])
    )


# -- what is particular to one of them --------------------------------------------------------------


def test_memory_comes_back_at_every_prefix_sooner_or_later() -> None:
    found: set[int] = set()
    for seed in range(60):
        disk = FakeDisk(random.Random(seed))
        backing = MemoryBacking(random.Random(seed))
        engine = MemoryEngine(disk, "e", backing)
        engine.write({b"n": b"0"})
        run(engine.flush())
        for number in range(1, 5):
            engine.write({b"n": b"%d" % number})
        disk.power_loss()
        value = MemoryEngine(disk, "e", backing).get(b"n")
        assert value is not None
        found.add(int(value))
        disk.power_loss()  # what came back once stays
        assert MemoryEngine(disk, "e", backing).get(b"n") == value
    assert found == {0, 1, 2, 3, 4}


def test_memory_without_a_backing_comes_back_at_the_last_flush() -> None:
    disk = FakeDisk(random.Random(1))
    engine = MemoryEngine(disk, "e")
    engine.write({b"a": b"1"})
    run(engine.flush())
    engine.write({b"a": b"2"})
    disk.power_loss()
    assert MemoryEngine(disk, "e").get(b"a") == b"1"


def test_two_flushes_of_memory_at_once_leave_no_gap() -> None:
    for seed in range(20):
        disk = FakeDisk(random.Random(seed))
        backing = MemoryBacking(random.Random(seed))
        engine = MemoryEngine(disk, "e", backing)

        async def scenario(engine: MemoryEngine = engine) -> None:
            engine.write({b"a": b""})
            first = asyncio.ensure_future(engine.flush())
            await asyncio.sleep(0)
            engine.write({b"b": b""})
            second = asyncio.ensure_future(engine.flush())
            await asyncio.sleep(0)
            engine.write({b"c": b""})
            await first
            engine.write({b"d": b""})
            await second

        run(scenario())
        disk.power_loss()
        left = b"".join(key for key, _ in MemoryEngine(disk, "e", backing).scan(b"", b"z"))
        assert left in (b"ab", b"abc", b"abcd")


def test_writes_during_a_flush_of_memory_are_not_taken_for_flushed() -> None:
    disk = FakeDisk(random.Random(1))
    engine = MemoryEngine(disk, "e")

    async def scenario() -> None:
        engine.write({b"a": b"1"})
        flushing = asyncio.ensure_future(engine.flush())
        await asyncio.sleep(0)
        engine.write({b"b": b"2"})
        await flushing
        await engine.flush()

    run(scenario())
    disk.power_loss()
    assert content(MemoryEngine(disk, "e")) == {b"a": b"1", b"b": b"2"}


@pytest.mark.parametrize("offset", [0, 7, 9, 14])
def test_a_damaged_memory_state_is_refused(offset: int) -> None:
    disk = FakeDisk(random.Random(1))
    engine = MemoryEngine(disk, "e")
    engine.write({b"a": b"1"})
    run(engine.flush())
    disk.flip("e/STATE", offset)
    with pytest.raises(EngineUnreadable, match="e/STATE"):
        MemoryEngine(disk, "e")


def test_a_full_disk_fails_the_flush_of_memory_and_keeps_the_old_state() -> None:
    disk = FakeDisk(random.Random(1))
    engine = MemoryEngine(disk, "e")
    engine.write({b"a": b"1"})
    run(engine.flush())
    disk.capacity_bytes = 100
    engine.write({b"b": bytes(200)})
    with pytest.raises(EngineFailed, match="No space left"):
        run(engine.flush())
    disk.power_loss()
    assert content(MemoryEngine(disk, "e")) == {b"a": b"1"}


def damage(path: Path) -> None:
    for file in path.iterdir():
        if file.name.startswith("MANIFEST"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0x55
            file.write_bytes(data)


def test_a_damaged_rocksdb_is_refused_in_one_line(tmp_path: Path) -> None:
    directory = tmp_path / "db"
    engine = RocksEngine(str(directory))
    engine.write({b"a": b"1"})
    run(engine.flush())
    engine.close()
    damage(directory)
    with pytest.raises(EngineUnreadable) as caught:
        RocksEngine(str(directory))
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


def test_a_rocksdb_without_a_table_file_is_refused(tmp_path: Path) -> None:
    engine = RocksEngine(str(tmp_path / "db"))
    engine.write({b"a": b"1"})
    run(engine.flush())
    engine.close()
    for file in (tmp_path / "db").glob("*.sst"):
        file.unlink()
    with pytest.raises(EngineUnreadable):
        RocksEngine(str(tmp_path / "db"))


def test_a_damaged_block_of_rocksdb_fails_the_reads_that_meet_it(tmp_path: Path) -> None:
    """A scan that ended there without an error would be data lost in silence."""
    engine = RocksEngine(str(tmp_path / "db"))
    rng = random.Random(1)
    engine.write({b"%04d" % number: rng.randbytes(100) for number in range(5000)})
    run(engine.flush())
    engine.close()
    (table,) = (tmp_path / "db").glob("*.sst")
    data = bytearray(table.read_bytes())
    data[200_000] ^= 1
    table.write_bytes(data)
    engine = RocksEngine(str(tmp_path / "db"))
    failed = []
    for number in range(5000):
        try:
            assert engine.get(b"%04d" % number) is not None
        except EngineFailed as error:
            assert "\n" not in str(error) and table.name in str(error)
            failed.append(number)
    assert 5 < len(failed) < 100
    with pytest.raises(EngineFailed, match="block checksum mismatch"):
        list(engine.scan(b"", b"z"))
    assert len(list(engine.scan(b"", b"%04d" % (failed[0] - 50)))) == failed[0] - 50
    engine.close()


def test_a_scan_of_rocksdb_is_whole_whatever_else_happens_meanwhile(tmp_path: Path) -> None:
    """Gets, writes, other scans and garbage between two steps: the bound of a scan lives as long as the scan."""
    engine = RocksEngine(str(tmp_path / "db"))
    prefix = b"s\x00\x09" + bytes(12)
    engine.write({prefix + b"k%04d" % number: b"v" for number in range(500)} | {prefix[:-1] + b"\x01": b"beyond"})
    scan = engine.scan(prefix + b"k", prefix + b"l")
    others = []
    found = []
    for key, _ in scan:
        found.append(key)
        engine.get(key[:-1])
        engine.write({b"t%d" % len(found): bytes(100)})
        other = engine.scan(prefix + b"k0499", prefix + b"m" * (len(found) % 40))
        others.append(len(list(other)))
    assert found == [prefix + b"k%04d" % number for number in range(500)]
    assert others[39:] == [int(number % 40 > 0) for number in range(40, 501)]
    engine.close()


def test_a_checkpoint_over_an_existing_directory_fails(tmp_path: Path) -> None:
    engine = RocksEngine(str(tmp_path / "db"))
    (tmp_path / "there").mkdir()
    with pytest.raises(EngineFailed, match="exists"):
        run(engine.checkpoint(str(tmp_path / "there")))
    engine.close()


def test_rocksdb_refuses_writes_when_it_is_behind_and_loses_none(tmp_path: Path) -> None:
    """`write` never waits: it raises WriteStall at once, writes nothing, and works again soon after."""
    engine = RocksEngine(str(tmp_path / "db"), write_buffer_bytes=64 << 10)
    rng = random.Random(1)
    state: dict[bytes, bytes] = {}

    async def scenario() -> None:
        stalls = 0
        for number in range(5000):
            changes: dict[bytes, bytes | None] = {b"%d" % number: rng.randbytes(40_000)}
            try:
                engine.write(changes)
            except WriteStall:
                stalls += 1
                assert engine.get(b"%d" % number) is None
                if stalls == 3:
                    break
                await write_through_stalls(engine, changes, [(b"0", b"1")])
                state.pop(b"0", None)
            state.update({key: value for key, value in changes.items() if value is not None})
        assert stalls == 3

    run(scenario())
    assert content(engine) == state
    engine.close()


class Stalled(MemoryEngine):
    """Refuses a number of writes."""

    left = 0

    def write(self, changes: Mapping[bytes, bytes | None], range_deletes: Sequence[Range] = ()) -> None:
        if self.left > 0:
            self.left -= 1
            raise WriteStall("e")
        super().write(changes, range_deletes)


def test_a_stall_is_waited_for_by_the_writer_alone() -> None:
    engine = Stalled(FakeDisk(random.Random(1)), "e")

    async def scenario() -> None:
        engine.left = 3
        writing = asyncio.ensure_future(write_through_stalls(engine, {b"a": b"1"}))
        turns = 0
        while not writing.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 3 and engine.get(b"a") == b"1"
        engine.left = 1000
        with pytest.raises(WriteStall, match="takes no writes for now"):
            await write_through_stalls(engine, {b"b": b"1"}, timeout_s=0.05)
        assert engine.get(b"b") is None

    run(scenario())


FULL = """
import asyncio, os, resource, signal, sys
from raftkv.storage.errors import EngineFailed
from raftkv.storage.rocks import RocksEngine

async def main():
    engine = RocksEngine(sys.argv[1], write_buffer_bytes=1 << 20)
    engine.write({b"a": b"1"})
    await engine.flush()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    written = 0
    try:
        while True:
            engine.write({b"k%06d" % written: os.urandom(1000)})
            written += 1
    except EngineFailed as error:
        print(error)
    for call in (engine.flush, lambda: engine.checkpoint(sys.argv[1] + "-copy")):
        try:
            await call()
        except EngineFailed as error:
            print(error)
    engine.close()

asyncio.run(main())
"""


def test_rocksdb_on_a_disk_that_takes_no_more_fails_clearly_and_keeps_what_was_flushed(tmp_path: Path) -> None:
    directory = str(tmp_path / "db")
    done = subprocess.run([sys.executable, "-c", FULL, directory], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("File too large" in line and line.endswith("then start the daemon again") for line in lines)
    engine = RocksEngine(directory)
    assert engine.get(b"a") == b"1"
    rest = [key for key, _ in engine.scan(b"k", b"l")]
    assert rest == [b"k%06d" % number for number in range(len(rest))]  # a prefix
    engine.close()


def test_rocksdb_tells_about_how_much_a_range_takes(tmp_path: Path) -> None:
    engine = RocksEngine(str(tmp_path / "db"))
    rng = random.Random(1)
    engine.write({b"a%d" % number: rng.randbytes(1000) for number in range(1000)})
    run(engine.flush())
    assert 500_000 < engine.approximate_bytes(b"a", b"b") < 2_000_000
    assert engine.approximate_bytes(b"b", b"c") == 0
    engine.close()


def test_rocksdb_gives_back_the_room_of_what_was_deleted_and_nothing_else(tmp_path: Path) -> None:
    def room() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "db").glob("*.sst"))

    engine = RocksEngine(str(tmp_path / "db"))
    rng = random.Random(1)
    engine.write({b"%c%d" % (letter, number): rng.randbytes(1000) for letter in b"abc" for number in range(1000)})
    run(engine.flush())
    before = room()
    engine.write({}, [(b"b", b"c")])
    run(engine.flush())
    open_scan = engine.scan(b"a", b"d")
    next(open_scan)
    assert room() > 0.95 * before  # a range delete alone gives back nothing
    run(engine.reclaim([(b"b", b"c"), (b"x", b"y")]))
    assert len(list(open_scan)) == 1_999
    assert len(list(engine.scan(b"a", b"d"))) == 2_000
    assert [(start, end) for start, end in engine._with_deletes()] == []
    del open_scan
    engine.close()
    engine = RocksEngine(str(tmp_path / "db"))
    assert 0.6 * before < room() < 0.75 * before
    assert len(list(engine.scan(b"a", b"d"))) == 2_000
    engine.close()


def test_rocksdb_is_closed_while_it_gives_back_room(tmp_path: Path) -> None:
    async def main() -> None:
        for number in range(5):
            engine = RocksEngine(str(tmp_path / "db"))
            rng = random.Random(number)
            engine.write({b"%d" % key: rng.randbytes(1000) for key in range(5000)}, [(b"", b"a")])
            await engine.flush()
            engine.write({}, [(b"3", b"6")])
            await engine.flush()
            reclaiming = asyncio.ensure_future(engine.reclaim([(b"3", b"6")]))
            await asyncio.sleep(0.002 * number)
            if number % 2:
                await engine.abandon()
            else:
                engine.close()
            await reclaiming
            await engine.reclaim([(b"3", b"6")])  # too late: nothing happens

    asyncio.run(main())
    engine = RocksEngine(str(tmp_path / "db"))
    assert len(list(engine.scan(b"", b"a"))) == sum(not b"3" <= b"%d" % key < b"6" for key in range(5000))
    engine.close()


def test_a_flush_of_rocksdb_leaves_the_loop_alone(tmp_path: Path) -> None:
    engine = RocksEngine(str(tmp_path / "db"), write_buffer_bytes=256 << 20)
    rng = random.Random(1)
    for _ in range(100):
        engine.write({rng.randbytes(16): rng.randbytes(1000) for _ in range(300)})

    async def scenario() -> int:
        flushing = asyncio.ensure_future(engine.flush())
        turns = 0
        while not flushing.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert run(scenario()) > 20
    engine.close()


def test_scans_of_rocksdb_that_are_open_at_the_same_time_keep_to_their_ends(tmp_path: Path) -> None:
    """Also while others are opened and rows are read: each has a bound of its own."""
    engine = RocksEngine(str(tmp_path / "engine"))
    prefixes = [b"prefix-of-24-bytes-no-%02d/" % number for number in range(40)]
    engine.write({prefix + b"%d" % row: bytes(8) for prefix in prefixes for row in range(5)})
    scans = [engine.scan(prefix, prefix[:-1] + b"0") for prefix in prefixes]
    for prefix, scan in zip(prefixes, scans, strict=True):
        found = []
        for key, _ in scan:
            found.append(key)
            engine.get(key)
        assert found == [prefix + b"%d" % row for row in range(5)]
    engine.close()
