"""Reading a WAL back after any crash.

Batches are replayed in order until one can't be read, at global offset *here*. Then:

* if the next segment begins with a batch that says the log was durable through *here*, nothing is
  missing: that segment is the continuation;
* otherwise the rest, later segments included, is searched for batch headers. If any of them, at the
  time it was written, knew the log durable beyond *here*, durable bytes are gone: `Corruption`, with
  file and offset. If none did, *here* is where the last write was torn: the tail is cut and zeroed.

A torn tail was never acknowledged; corruption may have been, so it is never cut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from raftkv.raft.actions import HardState
from raftkv.raft.entry import Entry
from raftkv.storage.disk import TEMPORARY_SUFFIX, Disk, DiskFile, join
from raftkv.storage.errors import Corruption, FormatTooNew
from raftkv.storage.wal_format import (
    BLOCK_BYTES,
    VERSION,
    Bad,
    Batch,
    LogStart,
    SegmentHeader,
    batch_headers,
    decode_batch,
    decode_batch_header,
    decode_segment_header,
)

_NAME = re.compile(r"^([0-9]{12})\.wal$")


def segment_name(number: int) -> str:
    return f"{number:012d}.wal"


@dataclass
class Segment:
    """A segment file; `last_index` is the greatest index that an entry in it ever had (0: none)."""

    path: str
    header: SegmentHeader
    last_index: int = 0

    def read(self, disk: Disk) -> bytes:
        """The whole file; what is missing at its end counts as zeros."""
        size_bytes = self.header.size_bytes
        return disk.read(self.path)[:size_bytes].ljust(size_bytes, b"\0")


@dataclass
class Replay:
    """What the records say, taken in order."""

    hard_state: HardState | None = None
    start: LogStart | None = None
    entries: list[Entry] = field(default_factory=list)

    def take(self, batch: Batch, segment: Segment) -> None:
        for record in batch.records:
            if isinstance(record, Entry):
                self._take_entry(record, batch, segment)
            elif isinstance(record, HardState):
                self.hard_state = record
            else:
                self.start, reset = record
                if reset:
                    self.entries.clear()
                    segment.last_index = 0
        if self.hard_state is None or self.start is None:
            raise Corruption(segment.path, batch.position, "the segment does not begin with the log's state")

    def _take_entry(self, entry: Entry, batch: Batch, segment: Segment) -> None:
        entries = self.entries
        if entries:
            keep = entry.index - entries[0].index
            if keep < 0:  # what lies below was in segments dropped since, when the log start had passed it
                keep = 0
            elif keep > len(entries):
                raise Corruption(segment.path, batch.position, f"entry {entry.index} follows entry {entries[-1].index}")
            del entries[keep:]
        entries.append(entry)
        if entry.index > segment.last_index:
            segment.last_index = entry.index

    def finish(self, segment: Segment, position: int) -> None:
        """Drop what the log start has left behind, and check that the rest follows on it."""
        assert self.start is not None
        start = self.start
        if self.entries:
            first = self.entries[0].index
            if first > start.index + 1:
                raise Corruption(segment.path, position, f"entries {start.index + 1} to {first - 1} are missing")
            behind = start.index - first + 1
            if 0 < behind <= len(self.entries) and self.entries[behind - 1].term != start.term:
                raise Corruption(segment.path, position, f"entry {start.index} is not of term {start.term}")
            del self.entries[:behind]


@dataclass
class Recovered:
    """`active` is open, `position` is where the next batch goes; all before is durable."""

    replay: Replay
    sealed: list[Segment]
    active: Segment
    file: DiskFile
    position: int


def recover(disk: Disk, directory: str) -> Recovered | None:
    """Read, repair and make durable what is there. None: no log was ever begun in `directory`.

    Raises Corruption, FormatTooNew, OSError.
    """
    segments, dropped = _find_segments(disk, directory)
    if not segments:
        return None
    replay = Replay()
    last: Batch | None = None
    current, position = 0, BLOCK_BYTES
    data = segments[0].read(disk)
    while True:
        segment = segments[current]
        try:
            while True:
                last = decode_batch(data, position, segment.header)
                replay.take(last, segment)
                position = last.end
        except Bad as bad:
            here = segment.header.base + position
            if current + 1 < len(segments):
                following = segments[current + 1].read(disk)
                if _continues(following, segments[current + 1].header, here):
                    current, position, data = current + 1, BLOCK_BYTES, following
                    continue
            _refuse_if_durable(disk, segments[current:], data, position, here, bad)
            break
    if last is None:
        if segments[0].header.number == 1:  # the crash came before the first batch was durable
            _remove_backwards(disk, directory, segments)
            return None
        raise Corruption(segments[0].path, BLOCK_BYTES, "the log's first batch can't be read")
    if position == BLOCK_BYTES:
        # The batch that rolled the log was torn. Its segment goes; the one before it is still the last.
        current -= 1
        segment = segments[current]
        data = segment.read(disk)
        position = last.end
    replay.finish(segment, position)
    for path in dropped:
        disk.remove(path)
    _remove_backwards(disk, directory, segments[current + 1 :])
    disk.sync_directory(directory)
    file = disk.open(segment.path)
    _rewrite_tail(file, data, last.position, position)
    return Recovered(replay, segments[:current], segment, file, position)


def _remove_backwards(disk: Disk, directory: str, segments: list[Segment]) -> None:
    """One by one: a gap, which a crash might leave, would make what is before it look dropped."""
    for segment in reversed(segments):
        disk.remove(segment.path)
        disk.sync_directory(directory)


def _find_segments(disk: Disk, directory: str) -> tuple[list[Segment], list[str]]:
    """The segments, ascending and without gaps; and what is left before a gap: it had been dropped."""
    numbers: list[int] = []
    for name in disk.list(directory):
        match = _NAME.match(name)
        if match:
            numbers.append(int(match[1]))
        elif name.endswith(TEMPORARY_SUFFIX):
            disk.remove(join(directory, name))
    first = len(numbers) - 1
    while first > 0 and numbers[first - 1] == numbers[first] - 1:
        first -= 1
    dropped = [join(directory, segment_name(number)) for number in numbers[: max(first, 0)]]
    segments: list[Segment] = []
    for number in numbers[max(first, 0) :]:
        path = join(directory, segment_name(number))
        file = disk.open(path)
        try:
            header = decode_segment_header(file.read(0, BLOCK_BYTES))
        except Bad as bad:
            raise Corruption(path, bad.position, bad.reason) from None
        finally:
            file.close()
        if header.version > VERSION:
            raise FormatTooNew(path, header.version, VERSION)
        if header.number != number or (segments and header.base != segments[-1].header.end):
            raise Corruption(path, 0, f"the header is that of segment {header.number} at {header.base}")
        segments.append(Segment(path, header))
    return segments, dropped


def _continues(data: bytes, header: SegmentHeader, here: int) -> bool:
    try:
        return decode_batch_header(data, BLOCK_BYTES, header)[0] == here
    except Bad:
        return False


def _refuse_if_durable(disk: Disk, segments: list[Segment], data: bytes, position: int, here: int, bad: Bad) -> None:
    for number, segment in enumerate(segments):
        rest = data if number == 0 else segment.read(disk)
        start = position if number == 0 else BLOCK_BYTES
        for _, durable in batch_headers(rest, start, segment.header):
            if durable > here:
                raise Corruption(segments[0].path, bad.position, bad.reason)


def _rewrite_tail(file: DiskFile, data: bytes, last_position: int, position: int) -> None:
    """Write the last batch again, zeros behind it, and sync.

    The last batch was read, perhaps, from the page cache only: a failed sync marks pages clean that are
    not on the disk. All before it was known durable when it was written.
    """
    is_whole = bool(file.read(len(data) - 1, 1))
    used = len(data.rstrip(b"\0")) if is_whole else len(data)
    file.write(last_position, data[last_position:position] + bytes(max(0, used - position)))
    file.sync()
