"""The bytes of a WAL segment: how they are made and how they are read. Pure.

A segment is a file of fixed size, filled with zeros when made. All integers are big-endian.

    segment   block 0: segment header; from block 1 on: batches, each at the start of a block; zeros
    header    magic 8s, version u16, number u64, base u64, size u64, salt u64, crc32 of all that
    batch     magic 4s, crc32 of the rest of this header (seeded with the salt), offset u64, durable u64,
              length u32; then `length` bytes of records
    record    length u32, crc32 of the payload, payload: kind u8, body
    bodies    HARD_STATE: term u64, vote i64 (-1: none)
              START: index u64, term u64, reset u8, encoded membership (empty: none)
              ENTRY: exactly `Entry.encoded`

A batch is what one write and one sync make durable together. Offsets are *global*: a segment's base plus
the position in its file; the next segment's base is the end of this one. A batch's `offset` is its own,
so it can't be taken for another; its `durable` is the global offset up to which the log was durable
when it was written. One batch is in flight at a time, so that is the end of the batch before it: the
batches form a chain, which shows across segments that nothing is missing between them.

The salt is random and new with each segment, so no client can write a value that passes for a batch.
The segment header's layout holds for every version.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from raftkv.raft.actions import HardState
from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership

VERSION = 1
BLOCK_BYTES = 512
"""The smallest unit that a disk writes whole: batches never share one, so a torn write hurts only its own."""

SEGMENT_MAGIC = b"RaftKVwl"
SEGMENT_HEADER = struct.Struct(">8sHQQQQI")
BATCH_MAGIC = b"\xf5WB\xa1"
BATCH_HEADER = struct.Struct(">4sIQQI")
BATCH_HEADER_BYTES = BATCH_HEADER.size
_BATCH_TAIL = struct.Struct(">QQI")
_RECORD = struct.Struct(">IIB")
_RECORD_PREFIX_BYTES = 8

HARD_STATE = 1
START = 2
ENTRY = 3
_HARD_STATE_BODY = struct.Struct(">Qq")
_START_BODY = struct.Struct(">QQB")
_SEEDS = tuple(zlib.crc32(bytes([kind])) for kind in range(256))
"""The crc of a payload begins with that of its kind."""
_ENTRY_SEED = _SEEDS[ENTRY]


class SegmentHeader(NamedTuple):
    version: int
    number: int
    base: int
    size_bytes: int
    salt: int

    def encode(self) -> bytes:
        head = SEGMENT_HEADER.pack(SEGMENT_MAGIC, *self, 0)[:-4]
        return head + zlib.crc32(head).to_bytes(4, "big")

    @property
    def seed(self) -> int:
        """What the crc of this segment's batch headers starts from."""
        return zlib.crc32(self.salt.to_bytes(8, "big"))

    @property
    def end(self) -> int:
        """The base of the next segment."""
        return self.base + self.size_bytes


@dataclass(frozen=True, slots=True)
class LogStart:
    """The log begins just after `index`; `membership` is the one in force there."""

    index: int = 0
    term: int = 0
    membership: Membership | None = None


class Batch(NamedTuple):
    """A batch as found: positions are in the file."""

    position: int
    end: int
    durable: int
    records: tuple[HardState | tuple[LogStart, bool] | Entry, ...]


class Bad(Exception):
    """No batch can be read at `position` of the file."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


def align(position: int) -> int:
    return -(-position // BLOCK_BYTES) * BLOCK_BYTES


def decode_segment_header(data: bytes) -> SegmentHeader:
    """Raises Bad."""
    if len(data) < SEGMENT_HEADER.size:
        raise Bad(0, f"the file has {len(data)} bytes, too few for a segment header")
    magic, version, number, base, size_bytes, salt, crc = SEGMENT_HEADER.unpack_from(data)
    if magic != SEGMENT_MAGIC:
        raise Bad(0, "not a log segment")
    if zlib.crc32(data[: SEGMENT_HEADER.size - 4]) != crc:
        raise Bad(0, "bad checksum of the segment header")
    return SegmentHeader(version, number, base, size_bytes, salt)


def encode_entry(parts: list[bytes], entry: Entry) -> int:
    """Append the record's pieces to `parts`; the number of bytes."""
    encoded = entry.encoded
    length = len(encoded) + 1
    parts.append(_RECORD.pack(length, zlib.crc32(encoded, _ENTRY_SEED), ENTRY))
    parts.append(encoded)
    return length + _RECORD_PREFIX_BYTES


def encode_hard_state(state: HardState) -> bytes:
    vote = -1 if state.vote is None else state.vote
    return _record(bytes([HARD_STATE]) + _HARD_STATE_BODY.pack(state.term, vote))


def encode_start(start: LogStart, *, reset: bool) -> bytes:
    membership = start.membership.encode() if start.membership is not None else b""
    return _record(bytes([START]) + _START_BODY.pack(start.index, start.term, reset) + membership)


def encode_batch_header(seed: int, offset: int, durable: int, length: int) -> bytes:
    crc = zlib.crc32(_BATCH_TAIL.pack(offset, durable, length), seed)
    return BATCH_HEADER.pack(BATCH_MAGIC, crc, offset, durable, length)


def _record(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + zlib.crc32(payload).to_bytes(4, "big") + payload


def decode_batch_header(data: bytes, position: int, header: SegmentHeader) -> tuple[int, int]:
    """(durable, length) of the batch whose header is at `position`. Raises Bad."""
    if position + BATCH_HEADER_BYTES > len(data):
        raise Bad(position, "the file ends")
    magic, crc, offset, durable, length = BATCH_HEADER.unpack_from(data, position)
    if magic != BATCH_MAGIC:
        raise Bad(position, "no batch")
    if zlib.crc32(data[position + 8 : position + BATCH_HEADER_BYTES], header.seed) != crc:
        raise Bad(position, "bad checksum of a batch header")
    if offset != header.base + position:
        raise Bad(position, f"a batch of offset {offset}")
    return durable, length


def decode_batch(data: bytes, position: int, header: SegmentHeader) -> Batch:
    """The batch at `position`, every record checked. Raises Bad with the record's position."""
    durable, length = decode_batch_header(data, position, header)
    at = position + BATCH_HEADER_BYTES
    end = at + length
    if end > len(data):
        raise Bad(position, "a batch longer than the file")
    records: list[HardState | tuple[LogStart, bool] | Entry] = []
    while at < end:
        if at + _RECORD.size > end:
            raise Bad(at, "a record longer than its batch")
        size, crc, kind = _RECORD.unpack_from(data, at)
        after = at + _RECORD_PREFIX_BYTES + size
        if size == 0 or after > end:
            raise Bad(at, f"a record of {size} bytes")
        body = data[at + _RECORD.size : after]
        if zlib.crc32(body, _SEEDS[kind]) != crc:
            raise Bad(at, "bad checksum of a record")
        try:
            records.append(Entry.decode(body) if kind == ENTRY else _decode_state(kind, body))
        except (ValueError, struct.error) as error:
            raise Bad(at, f"a record that can't be read: {error}") from error
        at = after
    return Batch(position, align(end), durable, tuple(records))


def _decode_state(kind: int, body: bytes) -> HardState | tuple[LogStart, bool]:
    if kind == HARD_STATE:
        term, vote = _HARD_STATE_BODY.unpack(body)
        return HardState(term, None if vote < 0 else vote)
    if kind == START:
        index, term, reset = _START_BODY.unpack_from(body)
        encoded = body[_START_BODY.size :]
        return LogStart(index, term, Membership.decode(encoded) if encoded else None), bool(reset)
    raise ValueError(f"kind {kind}")


def batch_headers(data: bytes, position: int, header: SegmentHeader) -> Iterator[tuple[int, int]]:
    """(position, durable) of every batch header from `position` on, whatever became of its records."""
    at = data.find(BATCH_MAGIC, position)
    while at >= 0:
        if at % BLOCK_BYTES == 0:
            try:
                yield at, decode_batch_header(data, at, header)[0]
            except Bad:
                pass
        at = data.find(BATCH_MAGIC, at + 1)
