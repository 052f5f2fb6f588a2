"""A log entry and its one encoding.

An entry is encoded once, by the leader that makes it. The same bytes go into the leader's WAL, over
the wire to every follower, and into their WALs. `Entry` therefore carries its encoded form; the data
is a slice of it.

Encoding (big-endian): term u64, index u64, kind u8, stamp_ms u64, then the data.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum

ENTRY_HEADER = struct.Struct(">QQBQ")
ENTRY_HEADER_BYTES = ENTRY_HEADER.size


class EntryKind(IntEnum):
    """What an entry's data is."""

    COMMANDS = 0
    """A msgpack array of client commands, for the state machine."""
    NOOP = 1
    """The empty entry with which a leader opens its term (Raft §8)."""
    MEMBERSHIP = 2
    """An encoded `Membership`; active from append on (Raft §6)."""
    TICK = 3
    """Nothing but its stamp: lets replicated time advance."""


@dataclass(slots=True, eq=False)
class Entry:
    """One log entry; immutable by convention.

    `stamp_ms` is replicated time, in ms. `memo` is the shell's, on the leader only: what it already
    decoded from the data. It is never encoded and takes no part in equality.
    """

    term: int
    index: int
    kind: int
    stamp_ms: int
    encoded: bytes
    memo: object | None = field(default=None, repr=False)

    @classmethod
    def make(cls, term: int, index: int, kind: int, stamp_ms: int, data: bytes, memo: object | None = None) -> Entry:
        return cls(term, index, kind, stamp_ms, ENTRY_HEADER.pack(term, index, kind, stamp_ms) + data, memo)

    @classmethod
    def decode(cls, encoded: bytes) -> Entry:
        """Raise ValueError if `encoded` is shorter than a header or names an unknown kind."""
        if len(encoded) < ENTRY_HEADER_BYTES:
            raise ValueError(f"entry of {len(encoded)} bytes is shorter than its header")
        term, index, kind, stamp_ms = ENTRY_HEADER.unpack_from(encoded)
        if kind > EntryKind.TICK:
            raise ValueError(f"entry {index} has unknown kind {kind}")
        return cls(term, index, kind, stamp_ms, encoded)

    @property
    def data(self) -> bytes:
        return self.encoded[ENTRY_HEADER_BYTES:]

    @property
    def size_bytes(self) -> int:
        return len(self.encoded)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and self.encoded == other.encoded

    def __hash__(self) -> int:
        return hash(self.encoded)
