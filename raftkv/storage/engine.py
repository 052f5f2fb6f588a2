"""What the state machines need from a storage engine, and the view in which one entry is applied.

An engine is an ordered map from bytes to bytes. A write is atomic; it survives a crash only after
`flush`, and a crash leaves the state after some prefix of the writes since then: the Raft log is what
makes up for the rest. No engine waits for the disk in `get`, `scan` or `write`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from raftkv.storage.errors import WriteStall

Changes = dict[bytes, bytes | None]
"""Key to new value; None deletes."""
Range = tuple[bytes, bytes]
"""[start, end)"""

STALL_PAUSE_S = 0.002
STALL_PAUSE_S_MAX = 0.05


class StorageEngine(Protocol):
    def get(self, key: bytes) -> bytes | None:
        """Raises EngineFailed if what is stored can't be read."""
        ...

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Pairs of [start, end), ascending; a stable view of the moment of the call.

        Raises EngineFailed, on the way, if what is stored can't be read.
        """
        ...

    def write(self, changes: Mapping[bytes, bytes | None], range_deletes: Sequence[Range] = ()) -> None:
        """Atomic; the range deletes come first. Raises WriteStall (nothing was written), EngineFailed."""
        ...

    async def flush(self) -> None:
        """All that was written before the call survives a crash. Raises EngineFailed."""
        ...

    async def checkpoint(self, directory: str, keys: Sequence[bytes] = ()) -> list[bytes | None]:
        """Copy the state, durably, as files into `directory`, which must not exist.

        The answer is what `keys` hold *in the copy*. Raises EngineFailed.
        """
        ...

    async def reclaim(self, ranges: Sequence[Range]) -> None:
        """Give back the room of what was deleted in the ranges, as far as that is flushed; no data changes.

        A hint: it may be cut short by `close`, and it takes nothing that a scan still needs.
        """
        ...

    def close(self) -> None:
        """Blocking. Scans that are still open keep the files open."""
        ...

    async def abandon(self) -> None:
        """`close`, without blocking the loop, for an engine that another has replaced."""
        ...

    def approximate_bytes(self, start: bytes, end: bytes) -> int:
        """About how much room [start, end) takes."""
        ...


class EngineFactory(Protocol):
    def __call__(self, directory: str) -> StorageEngine:
        """Open the engine in `directory`, made if missing. Raises EngineUnreadable."""
        ...


async def write_through_stalls(
    engine: StorageEngine,
    changes: Mapping[bytes, bytes | None],
    range_deletes: Sequence[Range] = (),
    *,
    timeout_s: float = 5.0,
) -> None:
    """`engine.write`, tried again while the engine stalls; WriteStall after `timeout_s`.

    The pauses are the loop's, so a stall holds up whoever waits for it and nothing else.
    """
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    pause_s = STALL_PAUSE_S
    while True:
        try:
            return engine.write(changes, range_deletes)
        except WriteStall:
            if asyncio.get_running_loop().time() + pause_s > deadline_s:
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, STALL_PAUSE_S_MAX)


class Overlay:
    """The engine as the commands of one entry see it: with the effects of those before.

    `changes` and `range_deletes` go to `StorageEngine.write` afterwards: there the range deletes come
    first, so a range delete here also takes the earlier changes in its range away.
    """

    __slots__ = ("_engine", "changes", "range_deletes")

    def __init__(self, engine: StorageEngine) -> None:
        self._engine = engine
        self.changes: Changes = {}
        self.range_deletes: list[Range] = []

    def get(self, key: bytes) -> bytes | None:
        try:
            return self.changes[key]
        except KeyError:
            if self.range_deletes and self._is_deleted(key):
                return None
            return self._engine.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        self.changes[key] = value

    def delete(self, key: bytes) -> None:
        self.changes[key] = None

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Delete all of [start, end) that exists by now; later puts there stand."""
        if start >= end:
            return
        for key in [key for key in self.changes if start <= key < end]:
            del self.changes[key]
        self.range_deletes.append((start, end))

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Merged pairs of [start, end), ascending; a stable view of the moment of the call."""
        below = self._engine.scan(start, end)
        changed = sorted((key, value) for key, value in self.changes.items() if start <= key < end)
        if not changed and not self.range_deletes:
            return below
        return self._merge(below, changed, tuple(self.range_deletes))

    @staticmethod
    def _merge(
        below: Iterator[tuple[bytes, bytes]],
        changed: list[tuple[bytes, bytes | None]],
        range_deletes: tuple[Range, ...],
    ) -> Iterator[tuple[bytes, bytes]]:
        position = 0
        for key, value in below:
            while position < len(changed) and changed[position][0] < key:
                new_key, new_value = changed[position]
                position += 1
                if new_value is not None:
                    yield new_key, new_value
            if position < len(changed) and changed[position][0] == key:
                continue  # it comes from `changed`, next turn or after the loop
            if any(start <= key < end for start, end in range_deletes):
                continue
            yield key, value
        for new_key, new_value in changed[position:]:
            if new_value is not None:
                yield new_key, new_value

    def _is_deleted(self, key: bytes) -> bool:
        return any(start <= key < end for start, end in self.range_deletes)
