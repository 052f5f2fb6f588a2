"""The only way to files: `Disk`, and `OsDisk` for the real ones.

The simulator implements the same class over memory and virtual time, so everything asked of a disk
is *data* (an operation's name and its arguments), never a closure. A subclass supplies primitives;
what must be durable step by step (`write_durably`, `create`, `rename`, …) is composed here, once, so
that the crash tests run the very steps that production runs.

Two kinds of calls: blocking ones for start-up and rare moments, and asynchronous ones that run in a
lane. Jobs of one lane run in order; the WAL has a lane of its own and never waits for bulk work.
Completions arrive in the loop that was running at the call; after that loop is closed they are dropped.

It must never: retry a failed sync, report a write as done before it is, or touch a file from the loop
while a lane may be using it (so `close` goes through the lanes as well).
"""

# Paths are plain strings, and this is the one module that touches files.
# ruff: noqa: PTH108, PTH103, PTH104, PTH106, PTH116, PTH120, PTH208

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import stat
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

from raftkv.storage.errors import DirectoryInUse

WAL_LANE = 0
BULK_LANE = 1

FILL_BYTES = 1 << 20
"""Files are filled and read through in pieces of this size: a bound on memory and on one system call."""
ZEROS = bytes(FILL_BYTES)
TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of a file that isn't whole yet. Whoever finds one at start-up may remove it."""

_sync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
"""macOS has no fdatasync."""

Done = Callable[[Any, Exception | None], None]
"""(result, None) or (None, error)."""


class DiskFile(ABC):
    """An open file. All methods block and raise OSError."""

    path: str

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """All of `data`, or raise."""

    @abstractmethod
    def sync(self) -> None:
        """What was written is durable, with as much metadata as reading it back needs."""

    @abstractmethod
    def close(self) -> None:
        """Close once all jobs submitted so far have ended."""


class Job(NamedTuple):
    """An operation of `Disk`, by name, with its arguments: for a lane to run."""

    operation: str
    arguments: tuple[Any, ...]


class Disk(ABC):
    """See the module. Paths are strings with `/`; errors are OSError."""

    # -- primitives ---------------------------------------------------------------------------

    @abstractmethod
    def read(self, path: str) -> bytes: ...

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def is_directory(self, path: str) -> bool: ...

    @abstractmethod
    def list(self, path: str) -> list[str]:
        """Names in the directory, ascending."""

    @abstractmethod
    def size(self, path: str) -> int: ...

    @abstractmethod
    def make_one_directory(self, path: str) -> None: ...

    @abstractmethod
    def sync_directory(self, path: str) -> None:
        """Names made, renamed and removed in `path` so far are durable."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file's name; durable after `sync_directory`."""

    @abstractmethod
    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Atomic rename, replacing a file; durable after `sync_directory`."""

    @abstractmethod
    def link(self, source: str, target: str) -> None:
        """A second name for a file; durable after `sync_directory`."""

    @abstractmethod
    def open_file(self, path: str, *, new: bool) -> DiskFile:
        """`new`: make it, or empty it; otherwise it must exist."""

    @abstractmethod
    def lock(self, path: str) -> None:
        """Take the lock file until `unlock`, or the end of the process. Raises DirectoryInUse."""

    @abstractmethod
    def unlock(self, path: str) -> None: ...

    @abstractmethod
    def free_bytes(self, path: str) -> int: ...

    @abstractmethod
    def entropy(self, count: int) -> bytes: ...

    @abstractmethod
    def submit(self, lane: int, job: Job, done: Done) -> None:
        """Run `self.perform(job)` in the lane; then `done` in the loop that is running now."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was submitted; nothing may be submitted afterwards."""

    # -- composed, blocking -------------------------------------------------------------------

    def make_directory(self, path: str) -> None:
        """With its parents; all durable. Does nothing if it is there."""
        if path in ("", ".", "/") or self.is_directory(path):
            return
        parent = parent_of(path)
        self.make_directory(parent)
        self.make_one_directory(path)
        self.sync_directory(parent)

    def write_durably(self, path: str, data: bytes) -> None:
        """The file is the old one or the new one at every instant, and the new one afterwards."""
        self.create(path, len(data), data).close()

    def create(self, path: str, size_bytes: int, head: bytes) -> DiskFile:
        """A new file that holds `head` and then zeros; whole and durable before it has its name."""
        temporary = path + TEMPORARY_SUFFIX
        file = self.open_file(temporary, new=True)
        try:
            if head:
                file.write(0, head)
            for offset in range(len(head), size_bytes, FILL_BYTES):
                file.write(offset, ZEROS[: min(FILL_BYTES, size_bytes - offset)])
            file.sync()
            self.move(temporary, path)
            self.sync_directory(parent_of(path))
        except OSError:
            file.close()
            self._remove_failed(temporary)
            raise
        file.path = path
        return file

    def _remove_failed(self, path: str) -> None:
        """Give the room back that an unfinished file takes, if that can be done."""
        try:
            self.remove(path)
        except OSError:
            pass  # it stays until the next start-up

    def open(self, path: str, *, create_bytes: int | None = None) -> DiskFile:
        """An existing file; or, with `create_bytes`, a new one of zeros."""
        if create_bytes is None:
            return self.open_file(path, new=False)
        return self.create(path, create_bytes, b"")

    def rename(self, source: str, target: str) -> None:
        """`move`, and durable."""
        self.move(source, target)
        self.sync_directory(parent_of(target))
        if parent_of(source) != parent_of(target):
            self.sync_directory(parent_of(source))

    def remove_tree(self, path: str) -> None:
        """Remove a directory, or a file, with all that is in it. Does nothing if it isn't there.

        Not durable by itself: after a crash a part may be back.
        """
        if not self.exists(path):
            return
        if not self.is_directory(path):
            self.remove(path)
            return
        for name in self.list(path):
            self.remove_tree(join(path, name))
        self.remove_directory(path)

    def sync_tree(self, path: str) -> None:
        """Every directory at and below `path` is durable (the files' bytes are their writer's concern)."""
        for name in self.list(path):
            if self.is_directory(join(path, name)):
                self.sync_tree(join(path, name))
        self.sync_directory(path)

    def checksum(self, path: str) -> tuple[int, int]:
        """(size in bytes, crc32) of a file."""
        size = crc = 0
        file = self.open_file(path, new=False)
        try:
            while piece := file.read(size, FILL_BYTES):
                crc = zlib.crc32(piece, crc)
                size += len(piece)
        finally:
            file.close()
        return size, crc

    # -- the operations of a job --------------------------------------------------------------

    def perform(self, job: Job) -> Any:
        """Run a job here and now; for the lanes."""
        return getattr(self, job.operation)(*job.arguments)

    def write_all_and_sync(self, file: DiskFile, writes: Sequence[tuple[int, bytes]]) -> None:
        for offset, data in writes:
            file.write(offset, data)
        file.sync()

    def file_read(self, file: DiskFile, offset: int, length: int) -> bytes:
        return file.read(offset, length)

    def file_write(self, file: DiskFile, offset: int, data: bytes) -> None:
        file.write(offset, data)

    def file_sync(self, file: DiskFile) -> None:
        file.sync()

    def discard_all(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.remove_tree(path)

    # -- asynchronous -------------------------------------------------------------------------

    def write_and_sync(
        self, file: DiskFile, writes: Sequence[tuple[int, bytes]], done: Done, *, lane: int = WAL_LANE
    ) -> None:
        self.submit(lane, Job("write_all_and_sync", (file, writes)), done)

    def create_in_background(self, path: str, size_bytes: int, head: bytes, done: Done) -> None:
        """`create`, in the bulk lane; the result is the open file."""
        self.submit(BULK_LANE, Job("create", (path, size_bytes, head)), done)

    def discard(self, paths: Sequence[str]) -> None:
        """Remove trees some time later, in order; what fails stays until the next start-up."""
        self.submit(BULK_LANE, Job("discard_all", (tuple(paths),)), _ignore)

    async def read_async(self, file: DiskFile, offset: int, length: int) -> bytes:
        data: bytes = await self.run("file_read", file, offset, length)
        return data

    async def write_async(self, file: DiskFile, offset: int, data: bytes) -> None:
        await self.run("file_write", file, offset, data)

    async def sync_async(self, file: DiskFile) -> None:
        await self.run("file_sync", file)

    def run(self, operation: str, *arguments: Any) -> asyncio.Future[Any]:
        """Any blocking operation of this class, in the bulk lane."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any, error: Exception | None) -> None:
            settle(future, result, error)

        self.submit(BULK_LANE, Job(operation, arguments), done)
        return future


def parent_of(path: str) -> str:
    return os.path.dirname(path) or "."


def join(directory: str, *names: str) -> str:
    return "/".join((directory, *names))


def settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return  # cancelled while the job ran
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _ignore(result: Any, error: Exception | None) -> None:
    """For work whose failure costs space only."""


class Worker:
    """One thread that runs calls in order and reports each in the loop it came from."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[tuple[Any, Callable[..., Any], tuple[Any, ...], Done] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[..., Any], arguments: tuple[Any, ...], done: Done) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put((asyncio.get_running_loop(), call, arguments, done))

    def run(self, call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any, error: Exception | None) -> None:
            settle(future, result, error)

        self.submit(call, arguments, done)
        return future

    def put(self, call: Callable[..., Any], *arguments: Any) -> bool:
        """Run after everything submitted, nobody is told. False: there is no thread to run it."""
        if self._thread is None:
            return False
        self._queue.put((None, call, arguments, _ignore))
        return True

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            loop, call, arguments, done = item
            result, failure = None, None
            try:
                result = call(*arguments)
            except Exception as error:  # every failure is the caller's to see
                failure = error
            if loop is not None:
                try:
                    loop.call_soon_threadsafe(done, result, failure)
                except RuntimeError:
                    pass  # the loop is closed: nobody waits any more
            del item, loop, call, arguments, done, result, failure


class OsFile(DiskFile):
    def __init__(self, disk: OsDisk, path: str, descriptor: int) -> None:
        self.path = path
        self._disk = disk
        self._descriptor = descriptor

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        while len(data) < length:
            more = os.pread(self._descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def write(self, offset: int, data: bytes) -> None:
        written = os.pwrite(self._descriptor, data, offset)
        while written < len(data):  # a short write: the next call tells why (a full disk)
            count = os.pwrite(self._descriptor, data[written:], offset + written)
            if count == 0:
                raise OSError(errno.ENOSPC, "short write", self.path)
            written += count

    def sync(self) -> None:
        _sync(self._descriptor)

    def close(self) -> None:
        self._disk.close_descriptor(self)

    def close_now(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class OsDisk(Disk):
    """Real files. Its two threads start when first needed."""

    def __init__(self) -> None:
        self._lanes = (Worker("wal"), Worker("bulk-io"))
        self._locks: dict[str, int] = {}

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def is_directory(self, path: str) -> bool:
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except FileNotFoundError:
            return False

    def list(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def size(self, path: str) -> int:
        return os.stat(path).st_size

    def make_one_directory(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: str) -> None:
        os.unlink(path)

    def remove_directory(self, path: str) -> None:
        os.rmdir(path)

    def move(self, source: str, target: str) -> None:
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def open_file(self, path: str, *, new: bool) -> OsFile:
        flags = os.O_RDWR | os.O_CLOEXEC | ((os.O_CREAT | os.O_TRUNC) if new else 0)
        return OsFile(self, path, os.open(path, flags, 0o644))

    def lock(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise DirectoryInUse(parent_of(path), holder) from None
        except OSError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        self._locks[path] = descriptor

    def unlock(self, path: str) -> None:
        descriptor = self._locks.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def free_bytes(self, path: str) -> int:
        return shutil.disk_usage(path).free

    def entropy(self, count: int) -> bytes:
        return os.urandom(count)

    def submit(self, lane: int, job: Job, done: Done) -> None:
        self._lanes[lane].submit(getattr(self, job.operation), job.arguments, done)

    def close_descriptor(self, file: OsFile) -> None:
        """Through both lanes, so that no job is left that could write to a reused descriptor."""
        if not self._lanes[WAL_LANE].put(self._close_after_bulk, file):
            self._close_after_bulk(file)

    def _close_after_bulk(self, file: OsFile) -> None:
        if not self._lanes[BULK_LANE].put(file.close_now):
            file.close_now()

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        for path in list(self._locks):
            self.unlock(path)
