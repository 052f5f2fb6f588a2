"""The simulated disk: what survives what."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from raftkv.sim.disk import SECTOR_BYTES, DiskProfile, Media, SimDisk
from raftkv.sim.loop import ProcessEnded
from raftkv.storage.disk import BULK_LANE, Job
from raftkv.storage.errors import DirectoryInUse
from tests.sim.support import SmallWorld


class Machine(SmallWorld):
    """One process with a disk, started as often as wanted."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.media = Media(random.Random(seed), DiskProfile(spike=0.0))
        self.disk: SimDisk
        self.results: list[Any] = []

    def begin(self, main: Callable[[SimDisk], Coroutine[Any, Any, None]]) -> None:
        process = self.process("m")
        process.launch(lambda: main(self.disk))
        assert process.loop is not None
        self.disk = SimDisk(self.media, process.loop, self.lose_power)

    def lose_power(self) -> None:
        self.process("m").lose_power()
        self.disk.die(power_loss=True)

    def kill(self) -> None:
        self.process("m").kill()
        self.disk.die(power_loss=False)

    def content(self, path: str) -> bytes | None:
        return next((bytes(file.content) for name, file in self.media.files() if name == path), None)


async def two_files(disk: SimDisk) -> None:
    disk.make_directory("data")
    disk.write_durably("data/safe", b"safe")
    file = disk.open_file("data/unsafe", new=True)
    file.write(0, b"u" * 10 * SECTOR_BYTES)


def test_a_kill_loses_nothing_that_was_written() -> None:
    machine = Machine()
    machine.begin(two_files)
    machine.run(1)
    machine.kill()
    assert machine.content("data/safe") == b"safe"
    assert machine.content("data/unsafe") == b"u" * 10 * SECTOR_BYTES


def test_a_power_loss_keeps_what_was_synced_and_tears_the_rest_at_sectors() -> None:
    kept = set()
    for seed in range(60):
        machine = Machine(seed)
        machine.begin(two_files)
        machine.run(1)
        machine.lose_power()
        assert machine.content("data/safe") == b"safe"
        content = machine.content("data/unsafe")
        if content is not None:
            sectors = [content[at : at + SECTOR_BYTES] for at in range(0, len(content), SECTOR_BYTES)]
            assert all(sector.strip(b"u") in (b"", bytes(SECTOR_BYTES)) for sector in sectors)
            kept.add(sum(sector[:1] == b"u" for sector in sectors))
        else:
            kept.add(-1)
    assert -1 in kept, "its name was never synced"
    assert 0 in kept and 10 in kept and kept & set(range(1, 10))


def test_a_rename_is_whole_or_not_at_all() -> None:
    async def main(disk: SimDisk) -> None:
        disk.make_directory("d")
        disk.write_durably("d/a", b"1")
        disk.write_durably("d/b", b"2")
        disk.move("d/a", "d/b")

    seen = set()
    for seed in range(40):
        machine = Machine(seed)
        machine.begin(main)
        machine.run(1)
        machine.lose_power()
        seen.add((machine.content("d/a"), machine.content("d/b")))
    assert seen == {(b"1", b"2"), (None, b"1")}


def test_jobs_take_time_and_keep_their_order() -> None:
    machine = Machine()

    def done(number: int) -> Callable[[Any, Exception | None], None]:
        return lambda result, error: machine.results.append(number)

    async def main(disk: SimDisk) -> None:
        loop = asyncio.get_running_loop()
        disk.make_directory("d")
        file = disk.open("d/f", create_bytes=4096)
        began = loop.time()
        for number in range(3):
            disk.write_and_sync(file, [(number, b"%d" % number)], done(number))
        assert await disk.run("file_read", file, 0, 3) is not None
        assert loop.time() > began
        await asyncio.sleep(1)
        machine.results.append(await disk.read_async(file, 0, 3))

    machine.begin(main)
    machine.run(0.0005)
    assert machine.results == []
    machine.run(5)
    assert machine.results == [0, 1, 2, b"012"]


def test_a_stalled_disk_ends_nothing_until_it_is_well() -> None:
    machine = Machine()

    async def main(disk: SimDisk) -> None:
        await disk.run("make_directory", "d")
        machine.results.append("done")

    machine.media.stalled = True
    machine.begin(main)
    machine.run(20)
    assert machine.results == []
    machine.media.heal()
    machine.run(1)
    assert machine.results == ["done"]


def test_a_failed_sync_never_reaches_the_media() -> None:
    machine = Machine()

    async def main(disk: SimDisk) -> None:
        disk.make_directory("d")
        file = disk.open("d/f", create_bytes=512)
        file.write(0, b"lost")
        machine.media.failing = errno.EIO
        with pytest.raises(OSError):
            file.sync()
        file.sync()
        machine.results.append(file.read(0, 4))

    machine.begin(main)
    machine.run(1)
    assert machine.results == [b"lost"], "it can still be read back"
    machine.lose_power()
    assert machine.content("d/f") == bytes(512)


def test_a_full_disk_takes_what_fits() -> None:
    machine = Machine()

    async def main(disk: SimDisk) -> None:
        disk.make_directory("d")
        file = disk.open_file("d/f", new=True)
        machine.media.capacity_bytes = 100
        try:
            file.write(0, b"x" * 150)
        except OSError as error:
            machine.results.append(error.errno)
        file.write(0, b"y" * 100)

    machine.begin(main)
    machine.run(1)
    assert machine.results == [errno.ENOSPC]
    assert machine.content("d/f") == b"y" * 100


def test_the_power_may_go_at_any_step() -> None:
    async def main(disk: SimDisk) -> None:
        disk.make_directory("d")
        disk.write_durably("d/f", b"old")
        disk.write_durably("d/f", b"new")

    seen = set()
    steps_of_all = 12
    for seed in range(10):
        for steps in range(steps_of_all):
            machine = Machine(seed)
            machine.begin(main)
            machine.disk.power_lasts_steps = steps
            machine.run(1)
            assert not machine.process("m").running, steps
            seen.add(machine.content("d/f"))
    assert seen == {None, b"old", b"new"}
    machine = Machine()
    machine.begin(main)
    machine.disk.power_lasts_steps = steps_of_all
    machine.run(1)
    assert machine.content("d/f") == b"new"
    assert machine.errors == []


def test_after_its_end_an_incarnation_can_do_nothing() -> None:
    machine = Machine()
    machine.begin(two_files)
    machine.run(1)
    old = machine.disk
    file = old.open_file("data/safe", new=False)
    machine.kill()
    for action in (
        lambda: file.write(0, b"ghost"),
        lambda: file.read(0, 1),
        lambda: old.remove("data/safe"),
        lambda: old.write_durably("data/safe", b"ghost"),
    ):
        with pytest.raises(ProcessEnded):
            action()
    old.submit(BULK_LANE, Job("remove", ("data/safe",)), lambda result, error: None)
    machine.run(1)
    assert machine.content("data/safe") == b"safe"


def test_locks_belong_to_an_incarnation() -> None:
    machine = Machine()

    async def main(disk: SimDisk) -> None:
        disk.lock("L")
        with pytest.raises(DirectoryInUse):
            disk.lock("L")
        machine.results.append("locked")

    for _ in range(2):
        machine.begin(main)
        machine.run(0.1)
        machine.kill()
    assert machine.results == ["locked", "locked"]
    assert machine.errors == []


def test_a_disk_can_be_taken_out_and_put_back_and_a_flip_undone() -> None:
    machine = Machine()
    machine.begin(two_files)
    machine.run(1)
    machine.kill()
    copy = machine.media.copy()
    before = machine.media.replace(None)
    assert machine.media.files() == []
    machine.media.replace(copy)
    assert machine.content("data/safe") == b"safe"
    assert machine.content("data/unsafe") is None, "the copy is of what is durable"
    machine.media.replace(before)
    path, file = machine.media.files()[0]
    flip = machine.media.flip(file, 1, 3)
    assert machine.content(path) == b"s" + bytes([ord("a") ^ 8]) + b"fe"
    machine.media.undo(flip)
    assert machine.content(path) == b"safe"
