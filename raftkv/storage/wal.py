"""The write-ahead log: Raft's hard state and entries, durable before anything is said about them.

Group commit: one write and sync is in flight at a time; all that is appended meanwhile goes out with
the next. Segments are filled with zeros ahead of need, so that a sync writes data and no metadata, and the
hot path waits for a file only if the log outruns the disk that fills them.

It must never: call `done` before the bytes are durable, retry a write or sync that failed (nobody knows
what the disk holds then: `on_failure` ends the process), or drop a segment that the log start still needs.
Formats are in `wal_format`, recovery in `wal_recovery`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from raftkv.raft.actions import HardState
from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership
from raftkv.storage.disk import Disk, DiskFile, join
from raftkv.storage.errors import Corruption, DiskFailed
from raftkv.storage.wal_format import (
    BATCH_HEADER_BYTES,
    BLOCK_BYTES,
    VERSION,
    LogStart,
    SegmentHeader,
    align,
    encode_batch_header,
    encode_entry,
    encode_hard_state,
    encode_start,
)
from raftkv.storage.wal_recovery import Segment, recover, segment_name

SEGMENT_BYTES = 16 << 20
BATCH_BYTES_MAX = 4 << 20
"""A batch that has grown beyond this takes no more appends: bounds one write, and so the time of a sync."""


@dataclass
class WalState:
    """What the log said when it was opened. `membership` is that at the log start."""

    hard_state: HardState
    start_index: int
    start_term: int
    membership: Membership | None
    entries: list[Entry]


@dataclass(slots=True)
class _Batch:
    """What becomes durable together; `hard_state` and `start` are the last ones in it, if any."""

    parts: list[bytes] = field(default_factory=list)
    length: int = 0
    done: list[Callable[[], None]] = field(default_factory=list)
    last_index: int = 0
    hard_state: HardState | None = None
    start: LogStart | None = None
    resets: bool = False
    end: int = 0


class Wal:
    """See the module. Make it with `open`; all methods are for the loop's thread."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        segment_bytes: int,
        state: WalState,
        sealed: list[Segment],
        active: Segment,
        file: DiskFile,
        position: int,
    ) -> None:
        self.on_failure: Callable[[OSError], None] = _raise
        """Called once, when a write failed: end the process."""
        self._disk = disk
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._batch_bytes_max = min(BATCH_BYTES_MAX, segment_bytes // 4)
        self._sealed = deque(sealed)
        self._active = active
        self._file = file
        self._position = position
        self._durable = active.header.base + position
        self._next: tuple[Segment, DiskFile] | None = None
        self._preparing = False
        self._no_room_ahead = False
        self._pending: deque[_Batch] = deque()
        self._in_flight: _Batch | None = None
        self._ended = False
        # As the records submitted so far say: what the next segment begins with.
        self._hard_state = state.hard_state
        self._start = LogStart(state.start_index, state.start_term, state.membership)
        # As all calls so far say.
        self._latest_hard_state = state.hard_state
        self._start_index = state.start_index
        self._last_index = state.entries[-1].index if state.entries else state.start_index

    @classmethod
    def open(
        cls, disk: Disk, directory: str, *, segment_bytes: int = SEGMENT_BYTES, may_create: bool = True
    ) -> tuple[Wal, WalState]:
        """Recover the log in `directory`, or begin one.

        What it answers is durable. Raises Corruption (`may_create` false and no log there is one),
        FormatTooNew, OSError.
        """
        segment_bytes = align(segment_bytes)
        assert segment_bytes >= 4 * BLOCK_BYTES
        if may_create:
            disk.make_directory(directory)
        found = recover(disk, directory) if disk.is_directory(directory) else None
        if found is None:
            if not may_create:
                raise Corruption(directory, 0, "the log is missing")
            header = SegmentHeader(VERSION, 1, 0, segment_bytes, _salt(disk))
            active = Segment(join(directory, segment_name(1)), header)
            file = disk.create(active.path, segment_bytes, header.encode())
            state = WalState(HardState(), 0, 0, None, [])
            wal = cls(disk, directory, segment_bytes, state, [], active, file, BLOCK_BYTES)
            wal._write_now(_Batch())
            return wal, state
        replay = found.replay
        assert replay.hard_state is not None and replay.start is not None
        start = replay.start
        state = WalState(replay.hard_state, start.index, start.term, start.membership, replay.entries)
        wal = cls(disk, directory, segment_bytes, state, found.sealed, found.active, found.file, found.position)
        return wal, state

    # -- what the shell calls -----------------------------------------------------------------

    def append(self, hard_state: HardState | None, entries: Sequence[Entry], done: Callable[[], None]) -> None:
        """Make the hard state and the entries durable, then call `done`, in the loop.

        An entry at or below the last index replaces it and all after it. After a failure or `close` nothing
        is written and `done` is not called any more.
        """
        if self._ended:
            return
        pending = self._pending
        batch = pending[-1] if pending and pending[-1].length < self._batch_bytes_max else self._new_batch()
        parts = batch.parts
        if hard_state is not None:
            batch.hard_state = self._latest_hard_state = hard_state
            record = encode_hard_state(hard_state)
            parts.append(record)
            batch.length += len(record)
        if entries:
            assert self._start_index < entries[0].index <= self._last_index + 1, (
                self._start_index,
                entries[0].index,
                self._last_index,
            )
            length = 0
            for entry in entries:
                length += encode_entry(parts, entry)
            batch.length += length
            self._last_index = last_index = entry.index
            if last_index > batch.last_index:
                batch.last_index = last_index
        batch.done.append(done)
        if self._in_flight is None:
            self._submit_next()

    def compact(self, index: int, term: int, membership: Membership | None) -> None:
        """The log starts after `index` from now on; whole old segments go once that is durable."""
        assert self._start_index <= index <= self._last_index, (self._start_index, index, self._last_index)
        self._start_index = index
        self._append_start(None, LogStart(index, term, membership), False, _nothing)

    def reset(
        self,
        hard_state: HardState,
        index: int,
        term: int,
        membership: Membership | None,
        done: Callable[[], None],
    ) -> None:
        """Void all that was: an empty log after `index`. For forming a group and for an installed snapshot.

        The hard state may not be behind the last one: no term and no vote is taken back.
        """
        self._note_reset(hard_state, index)
        self._append_start(hard_state, LogStart(index, term, membership), True, done)

    def reset_now(self, hard_state: HardState, index: int, term: int, membership: Membership | None) -> None:
        """`reset`, blocking, for start-up: nothing may be in flight. Raises OSError."""
        assert self._in_flight is None and not self._pending
        self._note_reset(hard_state, index)
        batch = _Batch()
        self._fill_start(batch, hard_state, LogStart(index, term, membership), True)
        self._write_now(batch)
        self._disk.discard_all(self._droppable(index))

    def close(self) -> None:
        """Stop. What is in flight may become durable, but no `done` is called any more."""
        if not self._ended:
            self._ended = True
            self._close_files()

    @property
    def start_index(self) -> int:
        return self._start_index

    @property
    def last_index(self) -> int:
        """Of the log as appended: not all of it need be durable yet."""
        return self._last_index

    @property
    def bytes_on_disk(self) -> int:
        following = self._next[0].header.size_bytes if self._next is not None else 0
        return sum(segment.header.size_bytes for segment in (*self._sealed, self._active)) + following

    @property
    def ended(self) -> bool:
        """Closed or failed: nothing is written or acknowledged any more."""
        return self._ended

    @property
    def segments(self) -> int:
        """How many hold records."""
        return len(self._sealed) + 1

    def _note_reset(self, hard_state: HardState, index: int) -> None:
        last = self._latest_hard_state
        assert hard_state.term > last.term or (hard_state.term == last.term and last.vote in (None, hard_state.vote)), (
            hard_state,
            last,
        )
        self._latest_hard_state = hard_state
        self._start_index = self._last_index = index

    # -- batches ------------------------------------------------------------------------------

    def _new_batch(self) -> _Batch:
        batch = _Batch()
        self._pending.append(batch)
        return batch

    def _append_start(
        self, hard_state: HardState | None, start: LogStart, resets: bool, done: Callable[[], None]
    ) -> None:
        if self._ended:
            return
        batch = self._new_batch()
        self._fill_start(batch, hard_state, start, resets)
        batch.done.append(done)
        if self._in_flight is None:
            self._submit_next()

    @staticmethod
    def _fill_start(batch: _Batch, hard_state: HardState | None, start: LogStart, resets: bool) -> None:
        batch.start = start
        batch.resets = resets
        if hard_state is not None:
            batch.hard_state = hard_state
            batch.parts.append(encode_hard_state(hard_state))
        batch.parts.append(encode_start(start, reset=resets))
        batch.length = sum(map(len, batch.parts))

    def _encode(self, batch: _Batch) -> bytes | None:
        """The batch's bytes, for the active segment's position. None: they don't fit in."""
        length = batch.length
        head = b""
        if self._position == BLOCK_BYTES:
            head = self._head()
            length += len(head)
        if self._position + BATCH_HEADER_BYTES + length > self._active.header.size_bytes:
            return None
        header = self._active.header
        offset = header.base + self._position
        prefix = encode_batch_header(header.seed, offset, self._durable, length)
        batch.end = header.base + align(self._position + BATCH_HEADER_BYTES + length)
        return b"".join((prefix, head, *batch.parts))

    def _head(self) -> bytes:
        """What every segment begins with, so that the ones before it can be dropped."""
        return encode_hard_state(self._hard_state) + encode_start(self._start, reset=False)

    def _note_submitted(self, batch: _Batch) -> None:
        self._position = batch.end - self._active.header.base
        if batch.hard_state is not None:
            self._hard_state = batch.hard_state
        if batch.start is not None:
            self._start = batch.start
        if batch.resets:
            for segment in (*self._sealed, self._active):
                segment.last_index = 0
        if batch.last_index > self._active.last_index:
            self._active.last_index = batch.last_index

    def _submit_next(self) -> None:
        """Send the oldest pending batch on its way, if there is one and there is room."""
        if not self._pending or self._ended:
            return
        batch = self._pending[0]
        data = self._encode(batch)
        if data is None:
            if not self._roll(batch):
                return
            data = self._encode(batch)
            assert data is not None
        self._pending.popleft()
        self._in_flight = batch
        writes = ((self._position, data),)
        self._note_submitted(batch)
        self._disk.write_and_sync(self._file, writes, self._written)
        if self._next is None and 2 * self._position > self._active.header.size_bytes and not self._no_room_ahead:
            self._prepare(self._segment_bytes)

    def _written(self, result: Any, error: Exception | None) -> None:
        if self._ended:
            return
        if error is not None:
            self._fail(error)
            return
        batch = self._in_flight
        assert batch is not None
        self._in_flight = None
        self._durable = batch.end
        if batch.start is not None:
            dropped = self._droppable(batch.start.index)
            if dropped:
                self._disk.discard(dropped)
        if self._pending:
            self._submit_next()
        for done in batch.done:
            if self.ended:  # a callback may have closed it
                return
            done()

    def _write_now(self, batch: _Batch) -> None:
        data = self._encode(batch)
        if data is None:
            size_bytes = max(self._segment_bytes, self._size_for(batch))
            segment = self._following(size_bytes)
            file = self._disk.create(segment.path, size_bytes, segment.header.encode())
            self._activate(segment, file)
            data = self._encode(batch)
            assert data is not None
        self._file.write(self._position, data)
        self._file.sync()
        self._note_submitted(batch)
        self._durable = batch.end

    def _fail(self, error: Exception) -> None:
        """Nothing is acknowledged any more: what the disk holds is unknown."""
        self._ended = True
        self._close_files()
        failure = error if isinstance(error, OSError) else OSError(5, repr(error))
        self.on_failure(DiskFailed.of(failure, self._file.path))

    # -- segments -----------------------------------------------------------------------------

    def _roll(self, batch: _Batch) -> bool:
        """Go on in the prepared segment. False: it must be made first; `_prepared` continues."""
        needed_bytes = self._size_for(batch)
        if self._next is not None and self._next[0].header.size_bytes < needed_bytes:
            self._next[1].close()
            self._next = None  # the larger one takes its name
        if self._next is None:
            self._prepare(max(self._segment_bytes, needed_bytes))
            return False
        self._activate(*self._next)
        self._next = None
        return True

    def _activate(self, segment: Segment, file: DiskFile) -> None:
        self._sealed.append(self._active)
        self._file.close()
        self._active, self._file, self._position = segment, file, BLOCK_BYTES
        self._no_room_ahead = False

    def _size_for(self, batch: _Batch) -> int:
        return align(BLOCK_BYTES + BATCH_HEADER_BYTES + len(self._head()) + batch.length)

    def _following(self, size_bytes: int) -> Segment:
        number = self._active.header.number + 1
        header = SegmentHeader(VERSION, number, self._active.header.end, size_bytes, _salt(self._disk))
        return Segment(join(self._directory, segment_name(number)), header)

    def _prepare(self, size_bytes: int) -> None:
        if self._preparing:
            return
        self._preparing = True
        segment = self._following(size_bytes)
        self._disk.create_in_background(
            segment.path, size_bytes, segment.header.encode(), partial(self._prepared, segment)
        )

    def _prepared(self, segment: Segment, file: DiskFile | None, error: Exception | None) -> None:
        self._preparing = False
        if self._ended:
            if file is not None:
                file.close()
            return
        waiting = self._in_flight is None and bool(self._pending)
        if error is not None:
            self._no_room_ahead = True  # it is tried again, for the last time, when it is needed
            if waiting:
                self._fail(error)
            return
        assert file is not None
        self._next = segment, file
        if waiting:
            self._submit_next()

    def _droppable(self, start_index: int) -> list[str]:
        """Take the segments off the log that a log start at `start_index` leaves without any use."""
        dropped: list[str] = []
        while self._sealed and self._sealed[0].last_index <= start_index:
            dropped.append(self._sealed.popleft().path)
        return dropped

    def _close_files(self) -> None:
        self._file.close()
        if self._next is not None:
            self._next[1].close()
            self._next = None


def _salt(disk: Disk) -> int:
    return int.from_bytes(disk.entropy(8), "big")


def _raise(error: OSError) -> None:
    raise error


def _nothing() -> None:
    pass
