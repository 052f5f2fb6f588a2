"""The log in memory: what is kept of it, its bytes, and how much of it is known to be on disk.

It never does I/O: `queue` hands entries out for a `Persist`, `persisted` reports its completion. It never
judges: whether an entry may be cut off is the caller's question.

The *start* (index, term) is the last entry no longer kept. An fsync completion counts only for what is still
in the log as it was written: cutting the log lowers every completion that is still to come to below the cut, or
else a late one could vouch for entries that have been replaced meanwhile (the A → B → A race).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from raftkv.raft.entry import Entry

_term = attrgetter("term")


class Log:
    """Entries `start_index + 1` … `last_index`."""

    __slots__ = (
        "bytes",
        "entries",
        "last_index",
        "last_stamp_ms",
        "last_term",
        "pending",
        "queued_index",
        "stable_index",
        "start_index",
        "start_stamp_ms",
        "start_term",
    )

    def __init__(self, start_index: int, start_term: int, stamp_ms: int, entries: Sequence[Entry]) -> None:
        """`entries` are on disk already; they follow the start without a gap."""
        self.start_index = start_index
        self.start_term = start_term
        self.start_stamp_ms = stamp_ms
        self.entries: list[Entry] = []
        self.bytes = 0
        self.last_index = start_index
        self.last_term = start_term
        self.last_stamp_ms = stamp_ms
        self.pending: deque[list[int]] = deque()
        """[seq, last index that its completion vouches for], one for each Persist under way."""
        self.extend(entries)
        self.queued_index = self.stable_index = self.last_index

    # ---- reading

    @property
    def first_index(self) -> int:
        return self.start_index + 1

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`; None below the start or beyond the end."""
        offset = index - self.start_index
        if offset > 0:
            return self.entries[offset - 1].term if index <= self.last_index else None
        return self.start_term if offset == 0 else None

    def entry_at(self, index: int) -> Entry:
        assert self.start_index < index <= self.last_index, (index, self.start_index, self.last_index)
        return self.entries[index - self.start_index - 1]

    def slice(self, first: int, last: int) -> tuple[Entry, ...]:
        """Entries `first` … `last`, both included."""
        assert self.start_index < first and last <= self.last_index, (first, last)
        return tuple(self.entries[first - self.start_index - 1 : last - self.start_index])

    def slice_bytes(self, first: int, bytes_max: int) -> tuple[Entry, ...]:
        """Entries from `first` on, as many as fit into `bytes_max`, one at least (if there is one)."""
        assert self.start_index < first, (first, self.start_index)
        begin = end = first - self.start_index - 1
        entries = self.entries
        count = len(entries)
        while end < count:
            bytes_max -= len(entries[end].encoded)
            if bytes_max < 0 and end > begin:
                break
            end += 1
        return tuple(entries[begin:end])

    def is_up_to_date(self, last_index: int, last_term: int) -> bool:
        """Whether a log that ends so is at least as up to date as this one (Raft §5.4.1)."""
        return last_term > self.last_term or (last_term == self.last_term and last_index >= self.last_index)

    def last_not_beyond(self, index: int, term: int) -> int:
        """The last index at or below `index` whose term is at most `term`.

        Terms never fall along a log, so all later entries are of higher terms: two logs can't match there
        (Raft §5.3, end). `start_index - 1` when not even the start qualifies.
        """
        if index < self.start_index:
            return index
        upto = min(index, self.last_index) - self.start_index
        found = bisect_right(self.entries, term, 0, upto, key=_term)
        if found == 0 and self.start_term > term:
            return self.start_index - 1
        return self.start_index + found

    # ---- writing

    def append(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.bytes += len(entry.encoded)
        self.last_index = entry.index
        self.last_term = entry.term
        self.last_stamp_ms = entry.stamp_ms

    def extend(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        assert entries[0].index == self.last_index + 1, (entries[0].index, self.last_index)
        self.entries.extend(entries)
        last = entries[-1]
        self.last_index = last.index
        self.last_term = last.term
        self.last_stamp_ms = last.stamp_ms
        self.bytes += sum([len(entry.encoded) for entry in entries])
        assert len(self.entries) == self.last_index - self.start_index, "entries are not consecutive"

    def truncate(self, index: int) -> None:
        """Cut off the entry at `index` and all after it."""
        assert self.start_index < index <= self.last_index, (index, self.start_index, self.last_index)
        offset = index - self.start_index - 1
        self.bytes -= sum([len(entry.encoded) for entry in self.entries[offset:]])
        del self.entries[offset:]
        self._set_end()
        below = index - 1
        self.queued_index = min(self.queued_index, below)
        self.stable_index = min(self.stable_index, below)
        for completion in self.pending:
            completion[1] = min(completion[1], below)

    def compact(self, index: int) -> None:
        """Forget everything up to `index`."""
        if index <= self.start_index:
            return
        start = self.entry_at(index)
        count = index - self.start_index
        self.bytes -= sum([len(entry.encoded) for entry in self.entries[:count]])
        del self.entries[:count]
        self.start_index, self.start_term, self.start_stamp_ms = index, start.term, start.stamp_ms
        # What is not yet on disk here but covered by the state machine needs no fsync to be safe.
        self.queued_index = max(self.queued_index, index)
        self._set_end()

    def reset(self, index: int, term: int, stamp_ms: int) -> None:
        """Start anew after a snapshot that ends at `index`; it is on disk, and the WAL restarted there."""
        self.entries.clear()
        self.bytes = 0
        self.start_index, self.start_term, self.start_stamp_ms = index, term, stamp_ms
        self._set_end()
        self.queued_index = self.stable_index = index
        self.pending.clear()

    def _set_end(self) -> None:
        if self.entries:
            last = self.entries[-1]
            self.last_index, self.last_term, self.last_stamp_ms = last.index, last.term, last.stamp_ms
        else:
            self.last_index, self.last_term = self.start_index, self.start_term
            self.last_stamp_ms = self.start_stamp_ms

    # ---- durability

    def queue(self, seq: int) -> tuple[Entry, ...]:
        """The entries not yet handed out, which Persist `seq` is to write."""
        if self.queued_index == self.last_index:
            return ()
        entries = tuple(self.entries[self.queued_index - self.start_index :])
        self.queued_index = self.last_index
        self.pending.append([seq, self.last_index])
        return entries

    def persisted(self, seq: int) -> None:
        """Persist `seq` and all before it are durable."""
        pending = self.pending
        while pending and pending[0][0] <= seq:
            index = pending.popleft()[1]
            if index > self.stable_index:
                self.stable_index = index
