"""What transactions hold in one shard: prepared writes and their locks, explicit locks, fences; and how it is stored.

The rows are the truth, and move with the shard; `ShardLocks` is rebuilt from them (`load_locks`), and follows every
change. A prepared transaction locks the keys that it writes against everybody, and those that it reads against
writers. An explicit lock keeps writers and other transactions out, and lets plain reads pass; it ends with its
transaction, or `LOCK_MS` of map time after its client's last sign of life.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from raftkv.machines.rows import (
    KIND_FENCE,
    KIND_LOCK,
    KIND_OUTCOME,
    KIND_PREPARED,
    UnknownRowFormat,
    pack_u64,
    prefix_end,
    unpack_u64,
)

if TYPE_CHECKING:
    from raftkv.machines.shards import Shard
    from raftkv.storage.engine import Overlay, StorageEngine

LOCK_MS: Final = 6_000
"""How long, of map time, an explicit lock outlives its client's last heartbeat."""

_FORMAT: Final = 0
_OUTCOME = struct.Struct(">BBQQ")
_EXPLICIT = struct.Struct(">B16s16sQ")
_COORDINATOR = struct.Struct(">I")


class Prepared(NamedTuple):
    """A yes. `term` is the coordinator's, `since_ms` the group's map time then; `writes` are [key, value or None]."""

    coordinator: int
    term: int
    since_ms: int
    reads: list[bytes]
    writes: list[list[Any]]


class Explicit(NamedTuple):
    """Who holds a key by an explicit lock, since which first attempt (`age`), and until when in map time."""

    txid: bytes
    age: bytes
    deadline_ms: int


class Outcome(NamedTuple):
    """How a transaction ended in this shard. `revision` is that of its writes, 0 for an abort (a tombstone)."""

    committed: bool
    revision: int
    recorded_ms: int


class ShardLocks:
    """`fences`: by coordinator, the term below which nothing is prepared any more."""

    __slots__ = ("explicit", "fences", "held", "prepared", "readers", "writers")

    def __init__(self) -> None:
        self.prepared: dict[bytes, Prepared] = {}
        self.writers: dict[bytes, bytes] = {}
        self.readers: dict[bytes, set[bytes]] = {}
        self.explicit: dict[bytes, Explicit] = {}
        self.held: dict[bytes, set[bytes]] = {}
        self.fences: dict[int, int] = {}

    # ---- who is in the way

    def of_write(self, key: bytes, map_time_ms: int, txid: bytes = b"") -> bytes | None:
        """The transaction, other than `txid`, that keeps a write to the key out."""
        return self.of_prepared(key, txid) or self.of_explicit(key, map_time_ms, txid)

    def of_read(self, key: bytes, txid: bytes = b"") -> bytes | None:
        """The other transaction whose outcome decides what the key holds."""
        writer = self.writers.get(key)
        return None if writer == txid else writer

    def of_prepared(self, key: bytes, txid: bytes) -> bytes | None:
        """The other prepared transaction that writes or has read the key."""
        writer = self.of_read(key, txid)
        if writer is None and key in self.readers:
            return min((reader for reader in self.readers[key] if reader != txid), default=None)
        return writer

    def of_explicit(self, key: bytes, map_time_ms: int, txid: bytes) -> bytes | None:
        lock = self.explicit.get(key)
        return None if lock is None or lock.txid == txid or lock.deadline_ms < map_time_ms else lock.txid

    # ---- changes

    def prepare(self, txid: bytes, prepared: Prepared) -> None:
        self.prepared[txid] = prepared
        for key, _ in prepared.writes:
            self.writers[key] = txid
        for key in prepared.reads:
            self.readers.setdefault(key, set()).add(txid)

    def unprepare(self, txid: bytes) -> Prepared | None:
        prepared = self.prepared.pop(txid, None)
        if prepared is not None:
            for key, _ in prepared.writes:
                del self.writers[key]
            for key in prepared.reads:
                self.readers[key].discard(txid)
                if not self.readers[key]:
                    del self.readers[key]
        return prepared

    def take(self, key: bytes, lock: Explicit) -> None:
        self.drop(key)
        self.explicit[key] = lock
        self.held.setdefault(lock.txid, set()).add(key)

    def drop(self, key: bytes) -> None:
        lock = self.explicit.pop(key, None)
        if lock is not None:
            self.held[lock.txid].discard(key)
            if not self.held[lock.txid]:
                del self.held[lock.txid]


def load_locks(view: Overlay | StorageEngine, shard: Shard) -> ShardLocks:
    """What the shard's rows say."""
    locks = ShardLocks()
    for txid, row in _rows(view, shard, KIND_PREPARED):
        locks.prepare(txid, unpack_prepared(row))
    for key, row in _rows(view, shard, KIND_LOCK):
        locks.take(key, unpack_explicit(row))
    for coordinator, row in _rows(view, shard, KIND_FENCE):
        locks.fences[_COORDINATOR.unpack(coordinator)[0]] = unpack_u64(row)
    return locks


def _rows(view: Overlay | StorageEngine, shard: Shard, kind: bytes) -> list[tuple[bytes, bytes]]:
    prefix = shard.prefix + kind
    return [(key[len(prefix) :], row) for key, row in view.scan(prefix, prefix_end(prefix))]


def prepared_key(shard: Shard, txid: bytes) -> bytes:
    return shard.prefix + KIND_PREPARED + txid


def explicit_key(shard: Shard, key: bytes) -> bytes:
    return shard.prefix + KIND_LOCK + key


def outcome_key(shard: Shard, txid: bytes) -> bytes:
    return shard.prefix + KIND_OUTCOME + txid


def fence_key(shard: Shard, coordinator: int) -> bytes:
    return shard.prefix + KIND_FENCE + _COORDINATOR.pack(coordinator)


def pack_fence(term: int) -> bytes:
    return pack_u64(term)


def pack_prepared(prepared: Prepared) -> bytes:
    return bytes((_FORMAT,)) + msgpack.packb(prepared)


def unpack_prepared(row: bytes) -> Prepared:
    _check(row, "prepared")
    return Prepared(*msgpack.unpackb(row[1:]))


def pack_explicit(lock: Explicit) -> bytes:
    return _EXPLICIT.pack(_FORMAT, *lock)


def unpack_explicit(row: bytes) -> Explicit:
    _check(row, "lock")
    return Explicit(*_EXPLICIT.unpack(row)[1:])


def pack_outcome(outcome: Outcome) -> bytes:
    return _OUTCOME.pack(_FORMAT, outcome.committed, outcome.revision, outcome.recorded_ms)


def unpack_outcome(row: bytes) -> Outcome:
    _check(row, "outcome")
    _, committed, revision, recorded_ms = _OUTCOME.unpack(row)
    return Outcome(bool(committed), revision, recorded_ms)


def _check(row: bytes, what: str) -> None:
    if row[0] != _FORMAT:
        raise UnknownRowFormat(f"{what} row of format {row[0]}")
