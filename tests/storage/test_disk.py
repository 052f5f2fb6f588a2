"""The disk: real files and the one in memory behave alike; the one in memory forgets as it should."""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from raftkv.storage.disk import BULK_LANE, WAL_LANE, Disk, Job, OsDisk
from raftkv.storage.errors import DirectoryInUse, DiskFailed
from raftkv.storage.rocks import RocksEngine
from tests.storage.fake_disk import FakeDisk, PowerLost
from tests.storage.helpers import run, settle


@pytest.fixture(params=["os", "fake"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Disk, str]:
    """A disk and a directory on it."""
    if request.param == "os":
        return OsDisk(), str(tmp_path)
    disk = FakeDisk(random.Random(1))
    disk.make_directory("root")
    return disk, "root"


def test_files_and_directories(place: tuple[Disk, str]) -> None:
    disk, root = place
    disk.make_directory(f"{root}/a/b/c")
    disk.make_directory(f"{root}/a/b/c")
    assert disk.list(root) == ["a"] and disk.is_directory(f"{root}/a/b")
    disk.write_durably(f"{root}/a/x", b"one")
    disk.write_durably(f"{root}/a/x", b"three")
    assert disk.read(f"{root}/a/x") == b"three" and disk.size(f"{root}/a/x") == 5
    assert disk.list(f"{root}/a") == ["b", "x"]
    assert disk.exists(f"{root}/a/x") and not disk.exists(f"{root}/a/y")
    assert not disk.is_directory(f"{root}/a/x") and not disk.is_directory(f"{root}/nothing")
    disk.link(f"{root}/a/x", f"{root}/a/b/y")
    disk.rename(f"{root}/a/x", f"{root}/a/b/x")
    disk.rename(f"{root}/a/b", f"{root}/d")
    assert disk.list(f"{root}/d") == ["c", "x", "y"] and disk.read(f"{root}/d/y") == b"three"
    assert disk.checksum(f"{root}/d/y") == (5, zlib.crc32(b"three"))
    disk.sync_tree(f"{root}/d")
    disk.remove(f"{root}/d/y")
    disk.remove_tree(f"{root}/d")
    disk.remove_tree(f"{root}/d")
    assert disk.list(root) == ["a"]
    assert disk.free_bytes(root) > 0
    assert len(disk.entropy(16)) == 16 and disk.entropy(16) != disk.entropy(16)


def test_created_files_have_their_head_and_zeros(place: tuple[Disk, str]) -> None:
    disk, root = place
    file = disk.create(f"{root}/f", (2 << 20) + 5, b"head")
    assert file.path == f"{root}/f"
    assert disk.read(f"{root}/f") == b"head".ljust((2 << 20) + 5, b"\0")
    file.write(2, b"XX")
    assert file.read(0, 6) == b"heXX\0\0"
    assert file.read((2 << 20) + 3, 100) == b"\0\0"
    file.close()
    disk.open(f"{root}/g", create_bytes=3).close()
    assert disk.read(f"{root}/g") == b"\0\0\0"
    with pytest.raises(FileNotFoundError):
        disk.open(f"{root}/h")
    disk.close()


def test_errors_are_the_systems_own(place: tuple[Disk, str]) -> None:
    disk, root = place
    for call in (disk.read, disk.list, disk.size, disk.remove, disk.checksum):
        with pytest.raises(FileNotFoundError):
            call(f"{root}/nothing")
    disk.write_durably(f"{root}/file", b"")
    with pytest.raises(NotADirectoryError):
        disk.list(f"{root}/file")
    disk.make_directory(f"{root}/d/e")
    with pytest.raises(OSError) as caught:
        disk.remove_directory(f"{root}/d")
    assert caught.value.errno == errno.ENOTEMPTY


def test_a_lock_is_exclusive_until_it_is_given_back(place: tuple[Disk, str]) -> None:
    disk, root = place
    disk.lock(f"{root}/LOCK")
    with pytest.raises(DirectoryInUse):
        disk.lock(f"{root}/LOCK")
    disk.unlock(f"{root}/LOCK")
    disk.unlock(f"{root}/LOCK")
    disk.lock(f"{root}/LOCK")
    disk.close()


def test_jobs_of_a_file_run_in_order_and_report_in_the_loop(place: tuple[Disk, str]) -> None:
    disk, root = place

    async def scenario() -> None:
        file = disk.open(f"{root}/f", create_bytes=100)
        thread = threading.get_ident()
        seen: list[int] = []

        def done(number: int) -> None:
            assert threading.get_ident() == thread
            seen.append(number)

        for number in range(50):
            disk.write_and_sync(file, [(0, b"%02d" % number)], lambda r, e, n=number: done(n))  # type: ignore[misc]
        while len(seen) < 50:
            await asyncio.sleep(0.001)
        assert seen == list(range(50))
        assert await disk.read_async(file, 0, 3) == b"49\0"
        await disk.write_async(file, 10, b"bulk")
        await disk.sync_async(file)
        assert await disk.run("checksum", f"{root}/f") == disk.checksum(f"{root}/f")
        with pytest.raises(FileNotFoundError):
            await disk.run("open", f"{root}/nothing")
        disk.discard([f"{root}/nothing", f"{root}/f"])
        file.close()
        while disk.exists(f"{root}/f"):
            await asyncio.sleep(0.001)

    run(scenario())
    disk.close()


def test_a_failed_job_reports_its_error(place: tuple[Disk, str]) -> None:
    disk, root = place

    async def scenario() -> None:
        failed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        disk.create_in_background(f"{root}/no/where", 10, b"", lambda r, e: failed.set_result(e))
        assert isinstance(await failed, FileNotFoundError)

    run(scenario())
    disk.close()


# -- real files -------------------------------------------------------------------------------------


def test_the_wal_lane_does_not_wait_for_bulk_work(tmp_path: Path) -> None:
    class SlowBulk(OsDisk):
        gate = threading.Event()

        def wait(self) -> None:
            assert self.gate.wait(20)

    disk = SlowBulk()

    async def scenario() -> None:
        file = disk.open(f"{tmp_path}/f", create_bytes=10)
        slow = disk.run("wait")
        synced = asyncio.Event()
        disk.write_and_sync(file, [(0, b"x")], lambda r, e: synced.set())
        await synced.wait()
        assert not slow.done()
        disk.gate.set()
        await slow

    run(scenario())
    disk.close()


def test_a_file_is_closed_after_its_jobs(tmp_path: Path) -> None:
    """Or the descriptor's next owner would be written to."""
    disk = OsDisk()

    async def scenario() -> None:
        file = disk.open(f"{tmp_path}/f", create_bytes=1 << 16)
        failures: list[Exception | None] = []
        for number in range(200):
            disk.write_and_sync(file, [(number, b"x")], lambda r, e: failures.append(e))
        file.close()
        other = disk.open(f"{tmp_path}/g", create_bytes=1 << 16)
        while len(failures) < 200:
            await asyncio.sleep(0.001)
        assert failures == [None] * 200
        other.close()

    run(scenario())
    disk.close()
    assert (tmp_path / "f").read_bytes() == (b"x" * 200).ljust(1 << 16, b"\0")
    assert not any((tmp_path / "g").read_bytes())


def test_completions_after_the_loop_is_closed_are_dropped(tmp_path: Path) -> None:
    class Slow(OsDisk):
        gate = threading.Event()

        def wait(self) -> None:
            self.gate.wait(20)

    disk = Slow()

    async def scenario() -> None:
        disk.submit(WAL_LANE, Job("wait", ()), lambda r, e: None)
        disk.submit(BULK_LANE, Job("wait", ()), lambda r, e: None)

    run(scenario())
    disk.gate.set()
    disk.close()  # joins the threads: neither died of it
    run(scenario())
    disk.close()


def test_a_full_device_is_an_error_with_its_number() -> None:
    file = OsDisk().open_file("/dev/full", new=False)
    with pytest.raises(OSError) as caught:
        file.write(0, b"x")
    assert caught.value.errno == errno.ENOSPC
    failed = DiskFailed.of(caught.value, "/data/wal/1")
    assert isinstance(failed, OSError) and failed.errno == errno.ENOSPC
    assert str(failed) == (
        "disk operation on /data/wal/1 failed: No space left on device; free some space, then start the daemon again"
    )
    assert DiskFailed.of(failed, "/other") is failed


WRITER = """
import asyncio, sys
from raftkv.storage.rocks import RocksEngine

async def main():
    engine = RocksEngine(sys.argv[1], write_buffer_bytes=1 << 16)
    number = 0
    while True:
        for _ in range(50):
            number += 1
            row = b"%d" % number
            engine.write({b"number": row, b"k%d" % (number % 97): row, b"pad%d" % number: bytes(300)})
        await engine.flush()
        print(number, flush=True)

asyncio.run(main())
"""


def test_rocksdb_after_kill_9_holds_a_whole_prefix_at_or_after_the_last_flush(tmp_path: Path) -> None:
    for attempt in range(3):
        directory = f"{tmp_path}/db{attempt}"
        writer = subprocess.Popen([sys.executable, "-c", WRITER, directory], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(4 + 3 * attempt):
            flushed = int(writer.stdout.readline())
        writer.kill()
        writer.wait()
        engine = RocksEngine(directory)
        row = engine.get(b"number")
        assert row is not None
        number = int(row)
        assert number >= flushed
        for key in range(97):
            newest = number - (number - key) % 97
            assert engine.get(b"k%d" % key) == (b"%d" % newest if newest > 0 else None)
        assert len(list(engine.scan(b"pad", b"pae"))) == number
        engine.close()


# -- the one in memory ------------------------------------------------------------------------------


def outcomes(prepare: bool, act: str) -> set[object]:
    """What `power_loss` may leave of an action, over many seeds."""
    found: set[object] = set()
    for seed in range(60):
        disk = FakeDisk(random.Random(seed))
        disk.make_directory("d")
        if prepare:
            disk.write_durably("d/f", b"old")
        if act == "write":
            disk.open_file("d/f", new=False).write(0, b"new")
        elif act == "write and sync":
            file = disk.open_file("d/f", new=False)
            file.write(0, b"new")
            file.sync()
        elif act == "create":
            file = disk.open_file("d/f", new=True)
            file.write(0, b"new")
            file.sync()
        elif act == "create and sync directory":
            disk.open_file("d/f", new=True).write(0, b"new")
            disk.sync_directory("d")
        elif act == "write durably":
            disk.write_durably("d/f", b"new")
        elif act == "move":
            disk.move("d/f", "d/g")
        elif act == "rename":
            disk.rename("d/f", "d/g")
        elif act == "remove":
            disk.remove("d/f")
        disk.power_loss()
        found.add(tuple((name, disk.read(f"d/{name}")) for name in disk.list("d")))
    return found


OLD, NEW = (("f", b"old"),), (("f", b"new"),)


@pytest.mark.parametrize(
    ("prepare", "act", "expected"),
    [
        (True, "write", {OLD, NEW}),
        (True, "write and sync", {NEW}),
        (False, "create", {(), NEW}),  # a file that was synced, without its name
        (False, "create and sync directory", {(("f", b""),), NEW}),  # and the other way round
        (False, "write durably", {NEW}),
        (True, "write durably", {NEW}),
        (True, "move", {OLD, (("g", b"old"),)}),
        (True, "rename", {(("g", b"old"),)}),
        (True, "remove", {OLD, ()}),
    ],
)
def test_what_a_power_loss_may_leave(prepare: bool, act: str, expected: set[object]) -> None:
    assert outcomes(prepare, act) == expected


def test_writes_are_torn_between_sectors_only() -> None:
    found: set[bytes] = set()
    for seed in range(100):
        disk = FakeDisk(random.Random(seed))
        file = disk.create("f", 2048, b"a" * 2048)
        file.write(256, b"b" * 1024)  # the ends of two sectors, and one whole
        disk.power_loss()
        found.add(disk.read("f"))
    pieces = [(256, 512), (512, 1024), (1024, 1280)]
    for content in found:
        assert all(content[low:high] in (b"a" * (high - low), b"b" * (high - low)) for low, high in pieces)
    assert len(found) == 8


def test_a_failed_sync_loses_the_data_whatever_a_later_one_says() -> None:
    disk = FakeDisk(random.Random(1))
    file = disk.create("f", 3, b"old")
    file.write(0, b"new")
    disk.fail("sync", errno.EIO)
    with pytest.raises(OSError):
        file.sync()
    file.sync()
    assert disk.read("f") == b"new"  # from the page cache
    disk.kill()
    assert disk.read("f") == b"new"
    disk.power_loss()
    assert disk.read("f") == b"old"


def test_a_dead_process_does_nothing_any_more() -> None:
    disk = FakeDisk(random.Random(1))

    async def scenario() -> None:
        file = disk.create("f", 3, b"old")
        called: list[int] = []
        disk.lock("LOCK")
        disk.write_and_sync(file, [(0, b"new")], lambda r, e: called.append(1))
        disk.kill()
        await settle()
        assert called == [] and disk.read("f") == b"old"
        with pytest.raises(PowerLost):
            file.write(0, b"new")
        disk.lock("LOCK")

    run(scenario())


def test_the_power_goes_after_the_given_number_of_steps() -> None:
    for steps in range(5):  # create, write, sync, move, sync_directory
        disk = FakeDisk(random.Random(steps))
        disk.lose_power_after(steps)
        with pytest.raises(PowerLost):
            disk.write_durably("f", b"x")
        assert disk.steps == steps and disk.lost
        with pytest.raises(PowerLost):
            disk.exists("f")
    disk = FakeDisk(random.Random(5))
    disk.lose_power_after(5)
    disk.write_durably("f", b"x")


def test_a_file_that_could_not_be_made_gives_its_room_back() -> None:
    disk = FakeDisk(random.Random(1), capacity_bytes=100)
    disk.write_durably("f", b"old")
    with pytest.raises(OSError):
        disk.write_durably("f", bytes(200))
    assert disk.list("") == ["f"] and disk.read("f") == b"old" and disk.room_bytes() == 97


def test_a_full_disk_takes_what_fits_in() -> None:
    disk = FakeDisk(random.Random(1), capacity_bytes=10)
    file = disk.open_file("f", new=True)
    file.write(0, b"12345678")
    with pytest.raises(OSError) as caught:
        file.write(8, b"9abcdef")
    assert caught.value.errno == errno.ENOSPC
    assert disk.read("f") == b"123456789a" and disk.room_bytes() == 0
    file.write(0, b"over")  # in place: needs no room
    assert disk.read("f") == b"over56789a"
