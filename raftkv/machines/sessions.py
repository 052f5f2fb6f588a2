"""Sessions: a retried write is applied once, and a session that is gone is never taken for a new one.

One row per (client, shard) holds the replies that the client hasn't acknowledged, the watermark below
which it has acknowledged all, and the highest first-sent stamp it was given. Everything here is decided
from replicated state. A command may only be executed after `Session.recall` returned None, and its final
reply is recorded in the same entry.

Why it is safe to drop a row: it goes only when its highest stamp is behind the horizon (map time −
session lifetime). Any request it knew has a stamp that isn't higher, so its retry is refused as expired
by the stamp alone. (After Ongaro's thesis §6.3, with a watermark as in LogCabin.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgpack

from raftkv.machines.results import BUSY, EXPIRED, OK, Result
from raftkv.machines.rows import SWEEP_CURSOR_KEY, UnknownRowFormat

if TYPE_CHECKING:
    from raftkv.storage.engine import Overlay, StorageEngine

SESSION_REPLIES_MAX: Final = 256
"""Unacknowledged replies of one client in one shard; the row is rewritten with each of its writes."""
SESSION_REPLY_BYTES_MAX: Final = 16 * 1024
"""Their bytes, beyond which nothing more is recorded: a row is at most this and one reply."""
SESSION_LIFETIME_MS: Final = 3_600_000
SESSION_CACHE_WEIGHT: Final = 8192
"""Rows and replies per generation of the cache (a few MB): memory doesn't grow with the clients."""
SWEEP_ROWS_MAX: Final = 4096
"""Rows examined by one sweep; it bounds the time that one entry takes."""

_ROW = struct.Struct(">BQQ")
_ROW_FORMAT = 0
_REPLY = struct.Struct(">QH")
_REPLY_BYTES = _REPLY.size
# A reply [0, version] is a write's most frequent one: the same bytes as above, then msgpack's array of two,
# fixint 0 and uint64.
_OK_VERSION = struct.Struct(">QH3sQ")
_OK_VERSION_HEAD = b"\x92\x00\xcf"
_OK_VERSION_BYTES = 11


class Session:
    """A session row in memory. One that was never recorded to is the same as none.

    `replies` maps seq to the reply as it stands in the row; in the order in which they were recorded.
    """

    __slots__ = ("first_unacked", "highest_stamp_ms", "replies", "reply_bytes")

    def __init__(self) -> None:
        self.first_unacked = 0
        self.highest_stamp_ms = 0
        self.replies: dict[int, bytes] = {}
        self.reply_bytes = 0

    @classmethod
    def decode(cls, row: bytes) -> Session:
        """Raise UnknownRowFormat."""
        if row[0] != _ROW_FORMAT:
            raise UnknownRowFormat(f"session row of format {row[0]}")
        session = cls()
        _, session.first_unacked, session.highest_stamp_ms = _ROW.unpack_from(row)
        at = _ROW.size
        session.reply_bytes = len(row) - at
        while at < len(row):
            seq, length = _REPLY.unpack_from(row, at)
            end = at + _REPLY_BYTES + length
            session.replies[seq] = row[at:end]
            at = end
        assert at == len(row), "a session row ends inside a reply"
        return session

    def encode(self) -> bytes:
        return _ROW.pack(_ROW_FORMAT, self.first_unacked, self.highest_stamp_ms) + b"".join(self.replies.values())

    def recall(self, seq: int, first_unacked: int, stamp_ms: int, horizon_ms: int) -> Result | None:
        """The answer to a request that must not be executed, or None: execute it, and `record`.

        Expired (its stamp is behind the horizon, or its reply was acknowledged), the recorded reply, or
        Busy. None of these changes the session.
        """
        if stamp_ms < horizon_ms:
            return [EXPIRED, "first sent longer ago than a session lives"]
        if seq < self.first_unacked:
            return [EXPIRED, "its reply was acknowledged before"]
        replies = self.replies
        if replies:
            recorded = replies.get(seq)
            if recorded is not None:
                result: Result = msgpack.unpackb(recorded[_REPLY_BYTES:])
                return result
            if len(replies) >= SESSION_REPLIES_MAX or self.reply_bytes >= SESSION_REPLY_BYTES_MAX:
                kept = [len(reply) for known, reply in replies.items() if known >= first_unacked]
                if len(kept) >= SESSION_REPLIES_MAX or sum(kept) >= SESSION_REPLY_BYTES_MAX:
                    return [BUSY, "too many unacknowledged writes of one client in one shard"]
        return None

    def record(self, seq: int, first_unacked: int, stamp_ms: int, result: Result) -> None:
        """Keep the final reply, and prune what the client has acknowledged."""
        if first_unacked > self.first_unacked:
            self.first_unacked = first_unacked
            replies = self.replies
            if replies:
                self.replies = replies = {k: reply for k, reply in replies.items() if k >= first_unacked}
                self.reply_bytes = sum(map(len, replies.values())) if replies else 0
        if stamp_ms > self.highest_stamp_ms:
            self.highest_stamp_ms = stamp_ms
        if result[0] == OK and len(result) == 2:
            reply = _OK_VERSION.pack(seq, _OK_VERSION_BYTES, _OK_VERSION_HEAD, result[1])
        else:
            packed = msgpack.packb(result)
            reply = _REPLY.pack(seq, len(packed)) + packed
        self.replies[seq] = reply
        self.reply_bytes += len(reply)


class SessionTable:
    """The sessions of one machine: a bounded cache over the rows, and what this entry has changed.

    The cache has two generations: a row found in the old one moves to the young one; when the young one
    is full it becomes the old one. So a hit costs one look-up, and the least recently used go first.
    What is cached never changes what is answered.
    """

    def __init__(self, cache_weight: int = SESSION_CACHE_WEIGHT) -> None:
        assert cache_weight > 0
        self._cache_weight = cache_weight
        self._changed: dict[bytes, Session] = {}
        self.clear()

    def clear(self, engine: StorageEngine | None = None) -> None:
        """Forget what is cached, and begin with the rows of `engine`; between entries only."""
        assert not self._changed
        self.sweep_pending = engine is not None and engine.get(SWEEP_CURSOR_KEY) is not None
        self._young: dict[bytes, Session] = {}
        self._old: dict[bytes, Session] = {}
        self._room = self._cache_weight

    @property
    def cached_rows(self) -> int:
        return len(self._young) + len(self._old)

    def find(self, view: Overlay | StorageEngine, key: bytes) -> Session:
        """The session under this row key; a blank one if there is no row."""
        session = self._young.get(key)
        if session is not None:
            return session
        session = self._old.pop(key, None) or self._changed.get(key)
        if session is None:
            row = view.get(key)
            session = Session() if row is None else Session.decode(row)
        if self._room <= 0:
            self._old = self._young
            self._young = {}
            self._room = self._cache_weight
        self._room -= 1 + len(session.replies)
        self._young[key] = session
        return session

    def changed(self, key: bytes, session: Session) -> None:
        """The session has recorded something: its row is written with this entry."""
        self._changed[key] = session
        self._room -= 1

    def flush(self, view: Overlay) -> None:
        """Write the changed rows into the entry's batch."""
        for key, session in self._changed.items():
            view.put(key, session.encode())
        self._changed.clear()

    def sweep(
        self,
        view: Overlay,
        ranges: Iterable[tuple[bytes, bytes]],
        horizon_ms: int,
        rows_max: int = SWEEP_ROWS_MAX,
    ) -> None:
        """Drop rows whose highest stamp is behind the horizon; examine at most `rows_max` of them.

        `ranges` are the session rows' key ranges, ascending. The pass goes on where the last one stopped:
        the cursor is replicated state.
        """
        assert not self._changed, "flush first: the sweep looks at rows"
        cursor = view.get(SWEEP_CURSOR_KEY) or b""
        stopped_at: bytes | None = None
        expired: list[bytes] = []
        left = rows_max
        for start, end in ranges:
            if end <= cursor or stopped_at is not None:
                continue
            for key, row in view.scan(max(start, cursor), end):
                if left == 0:
                    stopped_at = key
                    break
                left -= 1
                if _ROW.unpack_from(row)[2] < horizon_ms:
                    expired.append(key)
        for key in expired:
            view.delete(key)
            self._young.pop(key, None)
            self._old.pop(key, None)
        if stopped_at is not None:
            view.put(SWEEP_CURSOR_KEY, stopped_at)
        elif cursor:
            view.delete(SWEEP_CURSOR_KEY)
        self.sweep_pending = stopped_at is not None
