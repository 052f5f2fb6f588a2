"""When the engine is flushed and the log cut behind it, and when the room of what was deleted is given back.

The log is compacted only below what the engine has flushed: until then the log *is* the durable copy. A
follower that is a little behind keeps its entries, within a bound; one further behind gets a snapshot.

A shard that has moved away is deleted as a range, which alone frees no room: the engine drops tables when it compacts
them, and a group that is seldom written never does. So the range is compacted, once no more of them come for a while.
What was not given back when the process ended, or came with a snapshot, is found by where nothing lives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raftkv.daemons.tasks import Tasks
from raftkv.storage.engine import Range

if TYPE_CHECKING:
    from raftkv.daemons.replica import Replica

log = logging.getLogger(__name__)

RECLAIM_CALM_S = 5.0
"""Shards leave in groups; one compaction for all of them is cheaper, and clients notice less of it."""
RECLAIM_DELAY_S_MAX = 60.0


class Compaction:
    """Flush by log bytes or entries since the last flush, then drop what is no longer needed."""

    def __init__(self, replica: Replica, tasks: Tasks, bytes_max: int, entries_max: int) -> None:
        self._replica = replica
        self._tasks = tasks
        self._bytes_max = bytes_max
        self._entries_max = entries_max
        self._running = False
        self._kept_bytes = 0
        self._flushed_index = replica.store.applied.index
        self._deleted: dict[Range, None] = {}
        self._deleted_s = 0.0
        self._reclaiming = False
        self.flushes = 0

    def consider(self) -> None:
        """Called after each apply; starts a flush when the log has outgrown its bound."""
        raft = self._replica.raft
        if self._running or self._replica.snapshots.installing:
            return
        entries = self._replica.applied_index - self._flushed_index
        grown_bytes = raft.log_bytes - self._kept_bytes
        if entries <= 0 or (grown_bytes <= self._bytes_max and entries <= self._entries_max):
            return
        self._running = True
        self._tasks.start(self._flush_and_compact(), "compaction")

    def deleted(self, ranges: Sequence[Range]) -> None:
        """Nothing is in these ranges any more: give back their room, soon."""
        self._deleted.update(dict.fromkeys(ranges))
        self._deleted_s = asyncio.get_running_loop().time()
        if self._deleted and not self._reclaiming:
            self._reclaiming = True
            self._tasks.start(self._reclaim(), "reclaim")

    async def _flush_and_compact(self) -> None:
        try:
            flushed = await self._replica.store.flush()
            self.flushes += 1
            self._flushed_index = flushed
            if not self._replica.snapshots.installing:
                self._compact(flushed)
            self._kept_bytes = self._replica.raft.log_bytes
        finally:
            self._running = False

    async def _reclaim(self) -> None:
        try:
            while self._deleted:
                await self._until_calm()
                ranges = sorted(self._deleted)
                self._deleted.clear()
                store = self._replica.store
                await store.flush()  # a range delete in memory drops no table
                await store.engine.reclaim(ranges)
                log.debug("%s: gave back the room of %d ranges", self._replica.name, len(ranges))
        finally:
            self._reclaiming = False

    async def _until_calm(self) -> None:
        loop = asyncio.get_running_loop()
        latest_s = loop.time() + RECLAIM_DELAY_S_MAX
        while (due_s := min(self._deleted_s + RECLAIM_CALM_S, latest_s)) > loop.time():  # noqa: ASYNC110 - for a time
            await asyncio.sleep(due_s - loop.time())

    def _compact(self, flushed: int) -> None:
        replica = self._replica
        raft = replica.raft
        index = min(flushed, raft.snapshot_pins() - 1)
        if index > raft.start_index:
            raft.compact(index)
            replica.store.compact(raft.start_index, raft.start_term, raft.start_membership)
            log.debug("%s: log compacted through %d", replica.name, index)
