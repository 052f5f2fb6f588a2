"""The engine in memory: for the simulator and for tests.

Its state is in memory, and in one file of its directory from the last flush. It may lose what it is
allowed to lose: with a `MemoryBacking` (which, like the disk, survives the process) it comes back from
a crash at a *random* prefix of the writes since the last flush, as RocksDB may, which flushes of its own
accord. Without one it comes back at the last flush.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence

import msgpack
from sortedcontainers import SortedDict

from raftkv.storage.disk import Disk, join
from raftkv.storage.engine import Range
from raftkv.storage.errors import EngineFailed, EngineUnreadable

STATE_FILE = "STATE"
MAGIC = b"RKVMEM\x00\x01"
"""The last byte is the format's version."""

Write = tuple[int, dict[bytes, bytes | None], tuple[Range, ...]]
"""Its number, counted from 1 over the life of the state; changes; range deletes."""


class MemoryBacking:
    """The writes that a machine's engines hold in memory, by directory; `rng` picks what a crash keeps."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.unflushed: dict[str, list[Write]] = {}


class MemoryEngine:
    """See `StorageEngine`."""

    def __init__(self, disk: Disk, directory: str, backing: MemoryBacking | None = None) -> None:
        self._disk = disk
        self._directory = directory
        self._path = join(directory, STATE_FILE)
        self._state: SortedDict = SortedDict()
        self._number = 0
        """Of the last write in the state."""
        self._unflushed: list[Write] = []
        self._flushing = asyncio.Lock()
        self._closed = False
        try:
            disk.make_directory(directory)
            if disk.exists(self._path):
                self._number, self._state = _decode(self._path, disk.read(self._path))
        except OSError as error:
            raise EngineUnreadable(directory, error.strerror or str(error)) from error
        if backing is not None:
            # A flush may have reached the disk without the dead process having heard of it.
            survivors = [w for w in backing.unflushed.pop(directory, []) if w[0] > self._number]
            kept = survivors[: backing.rng.randint(0, len(survivors))]
            for write in kept:
                self._apply(write)
            if kept:  # what came back once must not be lost by the next crash
                disk.write_durably(self._path, self._encoded())
            backing.unflushed[directory] = self._unflushed

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._state.get(key)
        return value

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        state = self._state
        return iter([(key, state[key]) for key in state.irange(start, end, inclusive=(True, False))])

    def write(self, changes: Mapping[bytes, bytes | None], range_deletes: Sequence[Range] = ()) -> None:
        assert not self._closed
        write = (self._number + 1, dict(changes), tuple(range_deletes))
        self._unflushed.append(write)
        self._apply(write)

    async def flush(self) -> None:
        async with self._flushing:  # a later state is never replaced by an earlier one
            if not self._unflushed:
                return
            number = self._number
            try:
                await self._disk.run("write_durably", self._path, self._encoded())
            except OSError as error:
                raise EngineFailed(self._directory, error.strerror or str(error)) from error
            self._unflushed[:] = [write for write in self._unflushed if write[0] > number]

    async def checkpoint(self, directory: str, keys: Sequence[bytes] = ()) -> list[bytes | None]:
        encoded = self._encoded()
        values = [self.get(key) for key in keys]
        try:
            await self._disk.run("make_directory", directory)
            await self._disk.run("write_durably", join(directory, STATE_FILE), encoded)
        except OSError as error:
            raise EngineFailed(self._directory, error.strerror or str(error)) from error
        return values

    async def reclaim(self, ranges: Sequence[Range]) -> None:
        """Nothing: what is deleted takes no room."""

    def close(self) -> None:
        self._closed = True

    async def abandon(self) -> None:
        self.close()

    def approximate_bytes(self, start: bytes, end: bytes) -> int:
        return sum(len(key) + len(value) for key, value in self.scan(start, end))

    def _apply(self, write: Write) -> None:
        self._number, changes, range_deletes = write
        state = self._state
        for start, end in range_deletes:
            for key in list(state.irange(start, end, inclusive=(True, False))):
                del state[key]
        for key, value in changes.items():
            if value is None:
                state.pop(key, None)
            else:
                state[key] = value

    def _encoded(self) -> bytes:
        pairs = sorted(dict.items(self._state))  # in C: SortedDict's own items() are made one by one in Python
        body: bytes = msgpack.packb([self._number, pairs])
        return MAGIC + zlib.crc32(body).to_bytes(4, "big") + body


def _decode(path: str, data: bytes) -> tuple[int, SortedDict]:
    body = data[len(MAGIC) + 4 :]
    if data[: len(MAGIC)] != MAGIC:
        raise EngineUnreadable(path, "not a state file of this version")
    if zlib.crc32(body) != int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "big"):
        raise EngineUnreadable(path, "bad checksum")
    number, pairs = msgpack.unpackb(body)
    return number, SortedDict(dict(pairs))
