"""A snapshot on the move: a directory of files as one stream of bytes, and the receiver of such a stream.

Stream, integers big-endian: magic 8s (the last byte is the version), manifest length u32, manifest crc32 u32,
manifest, then the files in its order. The manifest is a msgpack array: [index, term, stamp_ms, membership,
[[name, size, crc32], …]]; index, term, stamp and membership were read from the checkpoint itself.

The receiver writes beside the live data, under names that no start-up takes for an engine, and trusts
nothing in the stream: names, sizes and checksums are checked before anything is swapped in.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import msgpack

from raftkv.raft.membership import Membership
from raftkv.storage.boot import Applied
from raftkv.storage.disk import Disk, DiskFile, join
from raftkv.storage.errors import SnapshotDamaged

MAGIC = b"RKVSNAP\x01"
_PREFIX_BYTES = len(MAGIC) + 8
MANIFEST_BYTES_MAX = 8 << 20
"""Some 200,000 files."""
SNAPSHOT_ID_BYTES = 16
CHECKSUM_BYTES_PER_S = 256 << 20
"""Leaves the disk to the log while a large state is read through."""
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_LEFT_OUT = re.compile(r"^(LOG|LOCK$|LOG\.)")
"""RocksDB's text logs and lock: not state."""


class Part(NamedTuple):
    name: str
    size_bytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Manifest:
    applied: Applied
    membership: Membership
    parts: tuple[Part, ...]

    def encode(self) -> bytes:
        """The stream's beginning."""
        applied = self.applied
        body: bytes = msgpack.packb(
            [applied.index, applied.term, applied.stamp_ms, self.membership.encode(), self.parts]
        )
        return b"".join((MAGIC, len(body).to_bytes(4, "big"), zlib.crc32(body).to_bytes(4, "big"), body))

    @classmethod
    def decode(cls, body: bytes) -> Manifest:
        """Raises SnapshotDamaged."""
        try:
            index, term, stamp_ms, membership, parts = msgpack.unpackb(body)
            manifest = cls(
                Applied(int(index), int(term), int(stamp_ms)),
                Membership.decode(membership),
                tuple(Part(str(name), int(size), int(crc)) for name, size, crc in parts),
            )
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise SnapshotDamaged(f"its manifest can't be read: {error}") from error
        for part in manifest.parts:
            if not _NAME.match(part.name) or part.size_bytes < 0:
                raise SnapshotDamaged(f"its manifest names a file {part.name!r} of {part.size_bytes} bytes")
        if len({part.name for part in manifest.parts}) != len(manifest.parts):
            raise SnapshotDamaged("its manifest names a file twice")
        return manifest

    @property
    def files_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


class Checkpoint:
    """A state of the engine, kept in a directory of its own until `release`."""

    def __init__(self, disk: Disk, directory: str, snapshot_id: bytes, manifest: Manifest) -> None:
        self.id = snapshot_id
        self.index = manifest.applied.index
        self.term = manifest.applied.term
        self.stamp_ms = manifest.applied.stamp_ms
        self.membership = manifest.membership
        self._disk = disk
        self._directory = directory
        self._head = manifest.encode()
        self._parts = manifest.parts
        self.total_bytes = len(self._head) + manifest.files_bytes
        self._open: tuple[str, DiskFile] | None = None
        self._reading = asyncio.Lock()
        self._released = False

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the stream; fewer than `length` only at its end. Raises OSError."""
        async with self._reading:
            assert not self._released, "the checkpoint was released"
            pieces = [self._head[offset : offset + length]]
            got = len(pieces[0])
            start = len(self._head)
            for part in self._parts:
                end = start + part.size_bytes
                if got < length and start <= offset + got < end:
                    file = await self._file(part.name)
                    at = offset + got
                    piece = await self._disk.read_async(file, at - start, min(length - got, end - at))
                    if not piece:
                        raise OSError(5, "a file of a checkpoint is shorter than it was", file.path)
                    pieces.append(piece)
                    got += len(piece)
                start = end
            return b"".join(pieces)

    async def _file(self, name: str) -> DiskFile:
        if self._open is None or self._open[0] != name:
            file = await self._disk.run("open", join(self._directory, name))
            if self._open is not None:
                self._open[1].close()
            self._open = name, file
        return self._open[1]

    def release(self) -> None:
        """It isn't needed any more; its files go."""
        if self._released:
            return
        self._released = True
        if self._open is not None:
            self._open[1].close()
            self._open = None
        self._disk.discard([self._directory])


async def describe(disk: Disk, directory: str) -> tuple[Part, ...]:
    """The files of a checkpoint directory, with their checksums: all are read, at a bounded rate.

    Raises OSError.
    """
    parts = []
    for name in disk.list(directory):
        if not _LEFT_OUT.match(name):
            size_bytes, crc = await disk.run("checksum", join(directory, name))
            parts.append(Part(name, size_bytes, crc))
            await asyncio.sleep(size_bytes / CHECKSUM_BYTES_PER_S)
    return tuple(parts)


class Receiver:
    """Writes one stream, in order, as files into `directory`, which start-up removes after a crash."""

    def __init__(self, disk: Disk, directory: str, snapshot_id: bytes, total_bytes: int) -> None:
        self.snapshot_id = snapshot_id
        self.directory = directory
        self.total_bytes = total_bytes
        self.next_offset = 0
        self.manifest: Manifest | None = None
        self._disk = disk
        self._head = bytearray()
        self._part = -1
        self._file: DiskFile | None = None
        self._written = 0
        self._crc = 0

    @property
    def complete(self) -> bool:
        return self.manifest is not None and self.next_offset == self.total_bytes

    async def feed(self, chunk: bytes) -> None:
        """The bytes at `next_offset`. Raises SnapshotDamaged, OSError; the receiver is useless then."""
        if self.next_offset + len(chunk) > self.total_bytes:
            raise SnapshotDamaged("it is longer than announced")
        if self.next_offset == 0:
            await self._disk.run("make_directory", self.directory)
        offset = self.next_offset
        rest = chunk
        if self.manifest is None:
            rest = self._feed_head(chunk)
        while rest and self.manifest is not None:
            rest = await self._feed_files(self.manifest, rest)
        self.next_offset = offset + len(chunk)
        if self.complete:
            await self._finish()

    def _feed_head(self, chunk: bytes) -> bytes:
        """What of the chunk lies behind the manifest."""
        self._head += chunk
        if len(self._head) < _PREFIX_BYTES:
            return b""
        if self._head[: len(MAGIC)] != MAGIC:
            raise SnapshotDamaged("it is not a snapshot of a version that this daemon reads")
        length = int.from_bytes(self._head[len(MAGIC) : len(MAGIC) + 4], "big")
        crc = int.from_bytes(self._head[len(MAGIC) + 4 : _PREFIX_BYTES], "big")
        if length > MANIFEST_BYTES_MAX:
            raise SnapshotDamaged(f"its manifest has {length} bytes")
        end = _PREFIX_BYTES + length
        if len(self._head) < end:
            return b""
        body = bytes(self._head[_PREFIX_BYTES:end])
        if zlib.crc32(body) != crc:
            raise SnapshotDamaged("bad checksum of its manifest")
        self.manifest = Manifest.decode(body)
        if end + self.manifest.files_bytes != self.total_bytes:
            raise SnapshotDamaged("its files are not as long as announced")
        rest = bytes(self._head[end:])
        self._head.clear()
        return rest

    async def _feed_files(self, manifest: Manifest, data: bytes) -> bytes:
        """Write what belongs to the current file; the rest is the next one's."""
        while self._file is None or self._written == manifest.parts[self._part].size_bytes:
            await self._next_file(manifest)
        piece = data[: manifest.parts[self._part].size_bytes - self._written]
        await self._disk.write_async(self._file, self._written, piece)
        self._written += len(piece)
        self._crc = zlib.crc32(piece, self._crc)
        return data[len(piece) :]

    async def _next_file(self, manifest: Manifest) -> None:
        await self._finish_file(manifest)
        self._part += 1
        self._written = self._crc = 0
        path = join(self.directory, manifest.parts[self._part].name)
        self._file = await self._disk.run("create", path, 0, b"")

    async def _finish_file(self, manifest: Manifest) -> None:
        if self._file is None:
            return
        part = manifest.parts[self._part]
        if self._crc != part.crc:
            raise SnapshotDamaged(f"bad checksum of its file {part.name}")
        await self._disk.sync_async(self._file)
        self._file.close()
        self._file = None

    async def _finish(self) -> None:
        """All bytes are here: the rest of the files, which are empty, and everything durable."""
        manifest = self.manifest
        assert manifest is not None
        while self._part + 1 < len(manifest.parts):
            await self._next_file(manifest)
        await self._finish_file(manifest)
        await self._disk.run("sync_tree", self.directory)

    def close(self) -> None:
        """Give up, or be done with it: the files stay where they are."""
        if self._file is not None:
            self._file.close()
            self._file = None
