"""The simulated disk: one `Media` per machine, which outlives its processes, and a `SimDisk` per incarnation.

A file has two contents: what a running process reads back (the page cache) and what is on the media. A write goes to
the first, a sync carries it to the second. Names (made, renamed, removed) are the same: a journal of changes, each
atomic, that `sync_directory` makes durable. When the power goes, of what was not synced each 512-byte sector and each
change of a name survives or not, by the generator; a job under way may have got anywhere. When only the process is
killed, the page cache stays.

Jobs of a lane take virtual time: `DiskProfile` says how long, faults stretch it, stall it, or let it fail. A
failed sync is the real thing: the data can still be read back, but is never on the media, whatever a later sync says.

It must never lose what a sync confirmed, unless a fault was asked for by name.
"""

from __future__ import annotations

import copy
import errno
import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from raftkv.sim.loop import ProcessEnded
from raftkv.storage.disk import BULK_LANE, WAL_LANE, Disk, DiskFile, Done, Job, parent_of
from raftkv.storage.errors import DirectoryInUse

if TYPE_CHECKING:
    from raftkv.sim.loop import SimLoop

SECTOR_BYTES = 512
STARTING_TURNS = 3
"""A daemon opens its store within its first turns."""
LANES = (WAL_LANE, BULK_LANE)


@dataclass
class DiskProfile:
    """How long things take without faults, in seconds; jitter is the mean of an exponential part."""

    sync_s: float = 0.0008
    jitter_s: float = 0.0006
    spike: float = 0.002
    """Probability that a sync takes `spike_s` more."""
    spike_s: float = 0.05
    bytes_per_s: float = 200e6
    blocking_s: float = 0.0002
    """One blocking call of the process itself (start-up, identity)."""


@dataclass(eq=False)
class MediaFile:
    content: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(eq=False)
class Directory:
    entries: dict[str, MediaFile | Directory] = field(default_factory=dict)
    durable: dict[str, MediaFile | Directory] = field(default_factory=dict)


_Node = MediaFile | Directory
_Change = list[tuple[Directory, str, _Node | None]]
"""Names set (or, None: removed) in directories, all or none."""


@dataclass
class Flip:
    """A bit that was flipped on the media, so that it can be set right again."""

    file: MediaFile
    offset: int
    mask: int


class Media:
    """What is on a machine's disk, and what is wrong with the disk."""

    def __init__(self, rng: random.Random, profile: DiskProfile) -> None:
        self.rng = rng
        self.profile = profile
        self.root = Directory()
        self.journal: list[_Change] = []
        self.slow_s = 0.0
        """Fault: every job takes that much longer, and up to twice."""
        self.stalled = False
        """Fault: no job ends."""
        self.failing: int | None = None
        """Fault: the next sync fails with this error number."""
        self.capacity_bytes: int | None = None
        """Fault: a full disk."""
        self.loses_syncs = False
        """For ablations only: a sync confirms and does nothing."""
        self.on_event: Callable[[str], None] = lambda event: None
        """Told of rare events, by name: for probes."""

    # ---- faults

    def forget_unsynced(self) -> None:
        """The power was lost."""
        rng = self.rng
        keep = rng.choice((0.0, 0.5, 1.0))
        for change in self.journal:
            if rng.random() < keep:
                _make_durable(change)
        self.journal.clear()
        keep = rng.choice((0.0, 0.5, 0.9, 1.0))
        self._settle(self.root, keep, {})

    def heal(self) -> None:
        self.slow_s = 0.0
        self.stalled = False
        self.failing = None
        self.capacity_bytes = None

    def copy(self) -> Directory:
        """What is durable now, to be brought back later."""
        whole = copy.deepcopy(self.root)
        self._settle(whole, 0.0, {})
        return whole

    def replace(self, root: Directory | None) -> Directory:
        """Put another (or an empty) disk in; the one that was in, with all that its page cache held."""
        before, self.root = self.root, root if root is not None else Directory()
        self.journal.clear()
        return before

    def files(self) -> list[tuple[str, MediaFile]]:
        """All files by path, in order."""
        found: list[tuple[str, MediaFile]] = []

        def walk(directory: Directory, prefix: str) -> None:
            for name in sorted(directory.entries):
                node = directory.entries[name]
                if isinstance(node, Directory):
                    walk(node, f"{prefix}{name}/")
                else:
                    found.append((prefix + name, node))

        walk(self.root, "")
        return found

    def flip(self, file: MediaFile, offset: int, bit: int) -> Flip:
        """Damage a file, in the cache and on the media."""
        flip = Flip(file, offset, 1 << bit)
        self.undo(flip)
        return flip

    @staticmethod
    def undo(flip: Flip) -> None:
        for content in (flip.file.content, flip.file.durable):
            if flip.offset < len(content):
                content[flip.offset] ^= flip.mask

    def used_bytes(self) -> int:
        seen = {id(file): len(file.content) for _, file in self.files()}
        return sum(seen.values())

    # ---- inside

    def _settle(self, directory: Directory, keep: float, settled: dict[int, MediaFile]) -> None:
        directory.entries = dict(directory.durable)
        for _, node in sorted(directory.entries.items()):
            if isinstance(node, Directory):
                self._settle(node, keep, settled)
            elif id(node) not in settled:
                settled[id(node)] = node
                for offset, data in node.unsynced:
                    self._tear(node.durable, offset, data, keep)
                if node.unsynced or node.content != node.durable:
                    node.unsynced.clear()
                    node.content = bytearray(node.durable)

    def _tear(self, durable: bytearray, offset: int, data: bytes, keep: float) -> None:
        """Let each sector of an unsynced write survive with probability `keep`."""
        at = kept = lost = 0
        while at < len(data):
            size = min(SECTOR_BYTES - (offset + at) % SECTOR_BYTES, len(data) - at)
            if keep and self.rng.random() < keep:
                _write(durable, offset + at, data[at : at + size])
                kept += 1
            else:
                lost += 1
            at += size
        if kept and lost:
            self.on_event("write torn by a crash")


class SimFile(DiskFile):
    """An open file of one incarnation."""

    def __init__(self, disk: SimDisk, path: str, file: MediaFile) -> None:
        self.path = path
        self._disk = disk
        self._file = file

    def read(self, offset: int, length: int) -> bytes:
        self._disk.check()
        return bytes(self._file.content[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._disk.step()
        file = self._file
        growth = offset + len(data) - len(file.content)
        full = False
        if growth > 0:
            room_bytes = self._disk.room_bytes()
            full = growth > room_bytes
            if full:
                data = data[: max(0, len(data) - (growth - room_bytes))]
        if data:
            _write(file.content, offset, data)
            file.unsynced.append((offset, bytes(data)))
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)

    def sync(self) -> None:
        self._disk.step()
        media = self._disk.media
        file = self._file
        if media.failing is not None:
            number, media.failing = media.failing, None
            file.unsynced.clear()  # the pages are marked clean, and are not on the disk
            raise OSError(number, os.strerror(number), self.path)
        if media.loses_syncs:
            return
        for offset, data in file.unsynced:
            _write(file.durable, offset, data)
        file.unsynced.clear()

    def close(self) -> None:
        """Nothing is kept open."""


class SimDisk(Disk):
    """The disk as one incarnation of a process sees it; when that has ended, it does nothing any more."""

    def __init__(self, media: Media, loop: SimLoop, on_power_loss: Callable[[], None]) -> None:
        self.media = media
        self.loop = loop
        self.alive = True
        self.power_lasts_steps: int | None = None
        """Fault: the power goes after so many changes of the disk."""
        self._on_power_loss = on_power_loss
        self._locks: set[str] = set()
        self._lanes: tuple[deque[tuple[Job, Done]], ...] = (deque(), deque())

    # ---- life

    def die(self, *, power_loss: bool) -> None:
        """The process has ended. What it had asked for may be done in part."""
        if not self.alive:
            return
        self.power_lasts_steps = None
        for lane in LANES:
            if self._lanes[lane]:
                if lane == WAL_LANE:
                    self.media.on_event("crash with a write in flight")
                self._interrupt(self._lanes[lane][0][0])
            self._lanes[lane].clear()
        self.alive = False
        if power_loss:
            self.media.forget_unsynced()

    def _interrupt(self, job: Job) -> None:
        """A job under way may have got anywhere."""
        self.power_lasts_steps = self.media.rng.randint(0, 4)
        failing, self.media.failing = self.media.failing, None
        try:
            self.perform(job)
        except (OSError, _Interrupted):
            pass
        self.media.failing = failing
        self.power_lasts_steps = None

    def check(self) -> None:
        """Raise unless the process lives."""
        if not self.alive:
            raise ProcessEnded

    def step(self) -> None:
        """A change of the disk is about to happen."""
        self.check()
        if self.power_lasts_steps is not None:
            if self.power_lasts_steps == 0:
                self._lose_power()
            self.power_lasts_steps -= 1

    def _lose_power(self) -> NoReturn:
        if not self.loop.alive:
            raise _Interrupted
        starting = self.loop.turns < STARTING_TURNS
        self.media.on_event("power lost while starting" if starting else "power lost while writing")
        self._on_power_loss()
        raise ProcessEnded

    def _block(self) -> None:
        """A blocking call takes the process's time."""
        self.check()
        self.loop.spend(self.media.profile.blocking_s)

    def room_bytes(self) -> int:
        capacity_bytes = self.media.capacity_bytes
        return 1 << 60 if capacity_bytes is None else max(0, capacity_bytes - self.media.used_bytes())

    # ---- primitives

    def read(self, path: str) -> bytes:
        self._block()
        return bytes(self._file(path).content)

    def exists(self, path: str) -> bool:
        self.check()
        return self._find(path) is not None

    def is_directory(self, path: str) -> bool:
        self.check()
        return isinstance(self._find(path), Directory)

    def list(self, path: str) -> list[str]:
        self.check()
        return sorted(self._directory(path).entries)

    def size(self, path: str) -> int:
        self.check()
        return len(self._file(path).content)

    def make_one_directory(self, path: str) -> None:
        self.step()
        self._change([self._entry(path, Directory())])

    def sync_directory(self, path: str) -> None:
        self.step()
        self._block()
        if self.media.loses_syncs:
            return
        touched = {id(self._directory(path))}
        durable: list[_Change] = []
        waiting: list[_Change] = []
        for change in reversed(self.media.journal):
            if any(id(directory) in touched for directory, _, _ in change):
                touched.update(id(directory) for directory, _, _ in change)
                durable.append(change)
            else:
                waiting.append(change)
        for change in reversed(durable):
            _make_durable(change)
        self.media.journal[:] = waiting[::-1]

    def remove(self, path: str) -> None:
        self._file(path)
        self.step()
        self._change([self._entry(path, None)])

    def remove_directory(self, path: str) -> None:
        if self._directory(path).entries:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self.step()
        self._change([self._entry(path, None)])

    def move(self, source: str, target: str) -> None:
        node = self._find(source)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
        self.step()
        self._change([self._entry(source, None), self._entry(target, node)])

    def link(self, source: str, target: str) -> None:
        node = self._file(source)
        self.step()
        self._change([self._entry(target, node)])

    def open_file(self, path: str, *, new: bool) -> SimFile:
        self.check()
        if new:
            self.step()
            self._change([self._entry(path, MediaFile())])
        return SimFile(self, path, self._file(path))

    def lock(self, path: str) -> None:
        self.check()
        if path in self._locks:
            raise DirectoryInUse(parent_of(path))
        self._locks.add(path)

    def unlock(self, path: str) -> None:
        self._locks.discard(path)

    def free_bytes(self, path: str) -> int:
        return self.room_bytes()

    def entropy(self, count: int) -> bytes:
        return self.media.rng.randbytes(count)

    def close(self) -> None:
        """Nothing to wait for: jobs run in virtual time."""

    # ---- lanes

    def submit(self, lane: int, job: Job, done: Done) -> None:
        if not self.alive:
            return
        jobs = self._lanes[lane]
        jobs.append((job, done))
        if len(jobs) == 1:
            self._start(lane)

    def _start(self, lane: int) -> None:
        job, _ = self._lanes[lane][0]
        self.loop.scheduler.after(self._duration_s(job), self._finish_first, lane)

    def _duration_s(self, job: Job) -> float:
        media = self.media
        profile = media.profile
        rng = media.rng
        duration_s = profile.sync_s + rng.expovariate(1 / profile.jitter_s)
        if job.operation == "write_all_and_sync":
            duration_s += sum(len(data) for _, data in job.arguments[1]) / profile.bytes_per_s
        if profile.spike and rng.random() < profile.spike:
            duration_s += profile.spike_s
        if media.slow_s:
            duration_s += media.slow_s * (1 + rng.random())
        return duration_s

    def _finish_first(self, lane: int) -> None:
        if not self.alive:
            return
        if self.media.stalled:
            self.loop.scheduler.after(0.01, self._finish_first, lane)
            return
        job, done = self._lanes[lane][0]
        result, failure = None, None
        try:
            result = self.perform(job)
        except OSError as error:
            failure = error
        except ProcessEnded:
            return
        self.loop.scheduler.note(job.operation.encode())
        self._lanes[lane].popleft()
        if self._lanes[lane]:
            self._start(lane)
        self.loop.post(done, result, failure)

    # ---- inside

    def _find(self, path: str) -> MediaFile | Directory | None:
        node: MediaFile | Directory | None = self.media.root
        for name in path.split("/"):
            if name in ("", "."):
                continue
            if not isinstance(node, Directory):
                return None
            node = node.entries.get(name)
        return node

    def _file(self, path: str) -> MediaFile:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(node, Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node

    def _directory(self, path: str) -> Directory:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def _entry(self, path: str, node: _Node | None) -> tuple[Directory, str, _Node | None]:
        return self._directory(parent_of(path)), path.rsplit("/", 1)[-1], node

    def _change(self, change: _Change) -> None:
        for directory, name, node in change:
            if node is None:
                directory.entries.pop(name, None)
            else:
                directory.entries[name] = node
        self.media.journal.append(change)


class _Interrupted(BaseException):
    """Ends a job that the end of its process has cut short."""


def _make_durable(change: _Change) -> None:
    for directory, name, node in change:
        if node is None:
            directory.durable.pop(name, None)
        else:
            directory.durable[name] = node


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data
