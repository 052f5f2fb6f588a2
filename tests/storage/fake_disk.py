"""A disk in memory that forgets what a real one may forget.

It implements the primitives of `Disk`; what is composed of them there runs as in production. Two ends:

* `kill()`: the process dies. What it wrote stays, synced or not; its jobs and locks are gone.
* `power_loss()`: of what was not synced, each 512-byte sector and each change of a name survives or not, by
  the generator. A rename is one change: it happens or it doesn't.

After either, everything of the old incarnation (files, jobs, completions) is dead, and the disk can be used by
the next process. Every mutating primitive is a *step*; `lose_power_after(k)` lets k steps happen and then none:
the blocking caller gets `PowerLost`, an asynchronous one never hears again and `lost` is set.

Faults: `fail` (an error number for a kind of step), `capacity_bytes`, `flip`. A failed sync is the real thing: the data
can still be read, but it will not be on the disk, whatever a later sync says.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from raftkv.storage.disk import Disk, DiskFile, Done, Job, parent_of
from raftkv.storage.errors import DirectoryInUse

SECTOR_BYTES = 512
UNBOUNDED_BYTES = 1 << 60


class PowerLost(BaseException):
    """Not an Exception: no handler for failures may go on after it."""


@dataclass(eq=False)
class _File:
    content: bytearray = field(default_factory=bytearray)
    """As a running process sees it."""
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(eq=False)
class _Directory:
    entries: dict[str, _File | _Directory] = field(default_factory=dict)
    durable: dict[str, _File | _Directory] = field(default_factory=dict)


_Change = list[tuple[_Directory, str, "_File | _Directory | None"]]
"""Names set (or, None: removed) in directories, all or none."""


@dataclass
class _Fault:
    operation: str
    path_part: str
    number: int
    skip: int
    times: int


class FakeFile(DiskFile):
    def __init__(self, disk: FakeDisk, path: str, node: _File) -> None:
        self.path = path
        self._disk = disk
        self._node = node
        self._incarnation = disk.incarnation
        self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        self._check()
        return bytes(self._node.content[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._check()
        self._disk.step("write", self.path)
        node = self._node
        end = offset + len(data)
        growth = max(0, end - len(node.content))
        room = self._disk.room_bytes() if self._disk.capacity_bytes is not None else growth
        if growth > room:
            data = data[: max(0, len(data) - (growth - room))]
        if data:
            if offset + len(data) > len(node.content):
                node.content.extend(bytes(offset + len(data) - len(node.content)))
            node.content[offset : offset + len(data)] = data
            node.unsynced.append((offset, bytes(data)))
        if growth > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)

    def sync(self) -> None:
        self._check()
        node = self._node
        try:
            self._disk.step("sync", self.path)
        except OSError:
            node.unsynced.clear()  # the pages are marked clean, and are not on the disk
            raise
        for offset, data in node.unsynced:
            _write(node.durable, offset, data)
        node.unsynced.clear()

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self._disk.incarnation != self._incarnation:
            raise PowerLost


class FakeDisk(Disk):
    """See the module."""

    def __init__(self, rng: random.Random, *, capacity_bytes: int | None = None) -> None:
        self.rng = rng
        self.capacity_bytes = capacity_bytes
        self.incarnation = 0
        self.steps = 0
        """Mutating primitives so far."""
        self.latency_s: Callable[[Job], float] = lambda job: 0.0
        self.lost = False
        self.on_lost: Callable[[], None] = lambda: None
        self._root = _Directory()
        self._journal: list[_Change] = []
        self._locks: set[str] = set()
        self._faults: list[_Fault] = []
        self._steps_left: int | None = None
        self._lanes: tuple[deque[tuple[asyncio.AbstractEventLoop, Job, Done]], ...] = (deque(), deque())

    # -- faults -------------------------------------------------------------------------------

    def fail(self, operation: str, number: int, *, path_part: str = "", skip: int = 0, times: int = 1) -> None:
        """Let the step `operation` on a matching path raise OSError(number), after `skip` good ones."""
        self._faults.append(_Fault(operation, path_part, number, skip, times))

    def heal(self) -> None:
        self._faults.clear()

    def flip(self, path: str, offset: int, bit: int = 0) -> None:
        """Damage a file, durably."""
        node = self._file(path)
        for content in (node.content, node.durable):
            if offset < len(content):
                content[offset] ^= 1 << bit

    def lose_power_after(self, steps: int) -> None:
        self._steps_left = steps

    def kill(self) -> None:
        """The process dies; what it wrote stays in the page cache."""
        self._die()

    def power_loss(self) -> None:
        """The machine dies: see the module."""
        self._interrupt_jobs()
        self._die()
        rng = self.rng
        keep = rng.choice((0.0, 0.5, 1.0))
        for change in self._journal:
            if rng.random() < keep:
                _make_durable(change)
        self._journal.clear()
        keep = rng.choice((0.0, 0.5, 0.9, 1.0))
        settled: set[int] = set()
        self._settle(self._root, keep, settled)

    # -- primitives ---------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        self._alive()
        return bytes(self._file(path).content)

    def exists(self, path: str) -> bool:
        self._alive()
        return self._find(path) is not None

    def is_directory(self, path: str) -> bool:
        self._alive()
        return isinstance(self._find(path), _Directory)

    def list(self, path: str) -> list[str]:
        self._alive()
        return sorted(self._directory(path).entries)

    def size(self, path: str) -> int:
        self._alive()
        return len(self._file(path).content)

    def make_one_directory(self, path: str) -> None:
        self.step("make_directory", path)
        self._change([self._set(path, _Directory())])

    def sync_directory(self, path: str) -> None:
        self.step("sync_directory", path)
        touched = [self._directory(path)]
        durable: list[_Change] = []
        waiting: list[_Change] = []
        for change in reversed(self._journal):
            if any(directory in touched for directory, _, _ in change):
                touched.extend(directory for directory, _, _ in change)
                durable.append(change)
            else:
                waiting.append(change)
        for change in reversed(durable):
            _make_durable(change)
        self._journal = waiting[::-1]

    def remove(self, path: str) -> None:
        self._file(path)
        self.step("remove", path)
        self._change([self._set(path, None)])

    def remove_directory(self, path: str) -> None:
        if self._directory(path).entries:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self.step("remove", path)
        self._change([self._set(path, None)])

    def move(self, source: str, target: str) -> None:
        node = self._find(source)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
        self.step("move", target)
        self._change([self._set(source, None), self._set(target, node)])

    def link(self, source: str, target: str) -> None:
        node = self._file(source)
        self.step("link", target)
        self._change([self._set(target, node)])

    def open_file(self, path: str, *, new: bool) -> FakeFile:
        self._alive()
        if new:
            self.step("create", path)
            self._change([self._set(path, _File())])
        return FakeFile(self, path, self._file(path))

    def lock(self, path: str) -> None:
        self._alive()
        if path in self._locks:
            raise DirectoryInUse(parent_of(path))
        self._locks.add(path)

    def unlock(self, path: str) -> None:
        self._locks.discard(path)

    def free_bytes(self, path: str) -> int:
        return self.room_bytes()

    def entropy(self, count: int) -> bytes:
        return self.rng.randbytes(count)

    def close(self) -> None:
        """Nothing to wait for: jobs run in the loop."""

    # -- lanes --------------------------------------------------------------------------------

    def submit(self, lane: int, job: Job, done: Done) -> None:
        if self.lost:
            return  # the machine is off: nobody will hear of it
        jobs = self._lanes[lane]
        jobs.append((asyncio.get_running_loop(), job, done))
        if len(jobs) == 1:
            self._start(lane)

    def _start(self, lane: int) -> None:
        loop, job, _ = self._lanes[lane][0]
        loop.call_later(self.latency_s(job), self._run_first, lane, self.incarnation)

    def _run_first(self, lane: int, incarnation: int) -> None:
        if incarnation != self.incarnation or self.lost:
            return
        _, job, done = self._lanes[lane][0]
        result, failure = None, None
        try:
            result = self.perform(job)
        except OSError as error:
            failure = error
        except PowerLost:
            return
        self._lanes[lane].popleft()
        if self._lanes[lane]:
            self._start(lane)
        done(result, failure)

    def _interrupt_jobs(self) -> None:
        """The first job of each lane may have got anywhere."""
        for jobs in self._lanes:
            if jobs and not self.lost:
                self._steps_left = self.rng.randint(0, 4)
                try:
                    self.perform(jobs[0][1])
                except (OSError, PowerLost):
                    pass
                self.lost = False

    # -- inside -------------------------------------------------------------------------------

    def step(self, operation: str, path: str) -> None:
        """Count a mutating primitive; it fails, or the power does."""
        self._alive()
        if self._steps_left is not None:
            if self._steps_left == 0:
                self.lost = True
                self.on_lost()
                raise PowerLost
            self._steps_left -= 1
        self.steps += 1
        for fault in self._faults:
            if fault.operation == operation and fault.path_part in path:
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    raise OSError(fault.number, os.strerror(fault.number), path)

    def room_bytes(self) -> int:
        """What is free of the capacity, or of a very large one."""
        seen: dict[int, int] = {}

        def walk(directory: _Directory) -> None:
            for node in directory.entries.values():
                if isinstance(node, _Directory):
                    walk(node)
                else:
                    seen[id(node)] = len(node.content)

        walk(self._root)
        capacity_bytes = UNBOUNDED_BYTES if self.capacity_bytes is None else self.capacity_bytes
        return max(0, capacity_bytes - sum(seen.values()))

    def _die(self) -> None:
        self.incarnation += 1
        self.lost = False
        self._steps_left = None
        self._locks.clear()
        self._faults.clear()
        for jobs in self._lanes:
            jobs.clear()

    def _alive(self) -> None:
        if self.lost:
            raise PowerLost

    def _find(self, path: str) -> _File | _Directory | None:
        node: _File | _Directory | None = self._root
        for name in path.split("/"):
            if name in ("", "."):
                continue
            if not isinstance(node, _Directory):
                return None
            node = node.entries.get(name)
        return node

    def _file(self, path: str) -> _File:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(node, _Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node

    def _directory(self, path: str) -> _Directory:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not isinstance(node, _Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def _set(self, path: str, node: _File | _Directory | None) -> tuple[_Directory, str, _File | _Directory | None]:
        return self._directory(parent_of(path)), path.rsplit("/", 1)[-1], node

    def _change(self, change: _Change) -> None:
        for directory, name, node in change:
            if node is None:
                directory.entries.pop(name, None)
            else:
                directory.entries[name] = node
        self._journal.append(change)

    def _settle(self, directory: _Directory, keep: float, settled: set[int]) -> None:
        directory.entries = dict(directory.durable)
        for _, node in sorted(directory.entries.items()):
            if isinstance(node, _Directory):
                self._settle(node, keep, settled)
            elif id(node) not in settled:
                settled.add(id(node))
                for offset, data in node.unsynced:
                    self._tear(node.durable, offset, data, keep)
                node.unsynced.clear()
                node.content = bytearray(node.durable)

    def _tear(self, durable: bytearray, offset: int, data: bytes, keep: float) -> None:
        at = 0
        while at < len(data):
            size = min(SECTOR_BYTES - (offset + at) % SECTOR_BYTES, len(data) - at)
            if self.rng.random() < keep:
                _write(durable, offset + at, data[at : at + size])
            at += size


def _make_durable(change: _Change) -> None:
    for directory, name, node in change:
        if node is None:
            directory.durable.pop(name, None)
        else:
            directory.durable[name] = node


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if offset + len(data) > len(content):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data
