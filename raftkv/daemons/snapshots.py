"""Snapshots between replicas: checkpoints streamed out, streams stored and installed.

The core says what to send and when; this reads and writes the bytes. One checkpoint serves all followers
that want one at the time. Reading is paced, so that a catch-up doesn't take the disk and the
network from the clients.

While a received snapshot takes the place of the engine, `installing` is set: nothing is applied and nothing
is read then. The core goes on answering its leader, and asks for nothing to be persisted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from raftkv.daemons.tasks import Tasks
from raftkv.raft import actions as act
from raftkv.raft.actions import HardState
from raftkv.storage.checkpoint import Checkpoint
from raftkv.storage.errors import SnapshotDamaged, StorageError

if TYPE_CHECKING:
    from raftkv.daemons.replica import Replica

log = logging.getLogger(__name__)

STREAM_BYTES_PER_S = 64 * 1024 * 1024
"""Pace of one stream: about half of what a cheap disk reads."""
CHECKPOINT_IDLE_S = 5.0
"""How long an unused checkpoint is kept for a follower that comes back for it."""


class SnapshotTransfers:
    """Both ends of a snapshot transfer, for one replica."""

    def __init__(self, replica: Replica, tasks: Tasks) -> None:
        self._replica = replica
        self._tasks = tasks
        self._checkpoint: Checkpoint | None = None
        self._users: set[int] = set()
        self._released: set[int] = set()
        """Followers that were through with the present checkpoint, one way or the other."""
        self._readers: dict[Checkpoint, int] = {}
        """Chunks being read: a checkpoint that is dropped meanwhile is released after them."""
        self._making = False
        self._waiting: list[int] = []
        self._received: deque[act.SnapshotChunkReceived | act.SnapshotComplete] = deque()
        self._receiving = False
        self._release_timer: asyncio.TimerHandle | None = None
        self.installing = False
        self.sent = 0
        self.installed = 0

    # ---- sending

    def wanted(self, action: act.SnapshotWanted) -> None:
        self._waiting.append(action.to)
        if not self._making:
            self._making = True
            self._tasks.start(self._offer(), "snapshot-offer")

    async def _offer(self) -> None:
        replica = self._replica
        try:
            while self._waiting:
                to = self._waiting.pop(0)
                try:
                    checkpoint = await self._usable_checkpoint(to)
                except (StorageError, OSError) as error:
                    log.warning("%s: no snapshot for replica %d: %s", replica.name, to, error)
                    replica.raft.snapshot_unavailable(to, replica.now_ms())
                else:
                    self._users.add(to)
                    log.info("%s: snapshot at index %d goes to replica %d", replica.name, checkpoint.index, to)
                    replica.raft.snapshot_offered(
                        to,
                        checkpoint.id,
                        checkpoint.index,
                        checkpoint.term,
                        checkpoint.membership,
                        checkpoint.total_bytes,
                        replica.now_ms(),
                    )
                replica.wake()
        finally:
            self._making = False

    async def _usable_checkpoint(self, to: int) -> Checkpoint:
        """The present checkpoint if the log still goes on from it, else a new one.

        A new one also for a follower that had this one: it asks again because it could not use it.
        """
        present = self._checkpoint
        if present is not None:
            if present.index >= self._replica.raft.start_index and to not in self._released:
                return present
            if self._users:
                # Its streams end as useless: the core asks again for each of them.
                self._users.clear()
            self._drop_checkpoint()
        self._checkpoint = await self._replica.store.make_checkpoint()
        return self._checkpoint

    def chunk_wanted(self, action: act.SnapshotChunkWanted) -> None:
        self._tasks.start(self._send_chunk(action), "snapshot-chunk")

    async def _send_chunk(self, action: act.SnapshotChunkWanted) -> None:
        replica = self._replica
        await asyncio.sleep(action.length / STREAM_BYTES_PER_S)
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.id != action.snapshot_id:
            replica.raft.snapshot_unavailable(action.to, replica.now_ms(), snapshot_id=action.snapshot_id)
        else:
            try:
                chunk = await self._read(checkpoint, action)
            except (StorageError, OSError) as error:
                log.warning("%s: snapshot for replica %d can't be read: %s", replica.name, action.to, error)
                replica.raft.snapshot_unavailable(action.to, replica.now_ms(), snapshot_id=action.snapshot_id)
            else:
                replica.raft.snapshot_chunk(action.to, action.snapshot_id, action.offset, chunk, replica.now_ms())
        replica.wake()

    async def _read(self, checkpoint: Checkpoint, action: act.SnapshotChunkWanted) -> bytes:
        self._readers[checkpoint] = self._readers.get(checkpoint, 0) + 1
        try:
            return await checkpoint.read(action.offset, action.length)
        finally:
            self._readers[checkpoint] -= 1
            if not self._readers[checkpoint]:
                del self._readers[checkpoint]
                if checkpoint is not self._checkpoint:
                    checkpoint.release()

    def released(self, action: act.SnapshotReleased) -> None:
        self._users.discard(action.to)
        if self._checkpoint is not None and self._checkpoint.id == action.snapshot_id:
            self._released.add(action.to)
        self.sent += 1
        if not self._users and self._checkpoint is not None:
            if self._release_timer is not None:
                self._release_timer.cancel()
            loop = asyncio.get_running_loop()
            self._release_timer = loop.call_later(CHECKPOINT_IDLE_S, self._release_if_idle)

    def _release_if_idle(self) -> None:
        self._release_timer = None
        if not self._users and not self._making:
            self._drop_checkpoint()

    def _drop_checkpoint(self) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        self._released.clear()
        if checkpoint is not None and checkpoint not in self._readers:
            checkpoint.release()

    def close(self) -> None:
        """Give up all transfers and the checkpoint."""
        if self._release_timer is not None:
            self._release_timer.cancel()
        self._drop_checkpoint()

    # ---- receiving

    def chunk_received(self, action: act.SnapshotChunkReceived) -> None:
        self._received.append(action)
        self._receive()

    def complete(self, action: act.SnapshotComplete) -> None:
        self._received.append(action)
        self._receive()

    def _receive(self) -> None:
        if not self._receiving:
            self._receiving = True
            self._tasks.start(self._store_received(), "snapshot-receive")

    async def _store_received(self) -> None:
        try:
            while self._received:
                step = self._received.popleft()
                if isinstance(step, act.SnapshotComplete):
                    await self._install(step)
                else:
                    await self._store_chunk(step)
                self._replica.wake()
        finally:
            self._receiving = False

    async def _store_chunk(self, action: act.SnapshotChunkReceived) -> None:
        replica = self._replica
        message = action.message
        try:
            next_offset = await replica.store.receive_chunk(
                message.snapshot_id, message.total_bytes, message.offset, message.chunk
            )
        except (StorageError, OSError) as error:
            log.warning("%s: snapshot from replica %d is refused: %s", replica.name, message.source, error)
            replica.raft.snapshot_failed(message.snapshot_id, replica.now_ms())
        else:
            replica.raft.snapshot_stored(message.snapshot_id, next_offset, replica.now_ms())

    async def _install(self, action: act.SnapshotComplete) -> None:
        replica = self._replica
        self.installing = True
        try:
            hard_state = HardState(replica.raft.term, replica.raft.vote)
            try:
                await replica.store.install(
                    action.snapshot_id, action.index, action.index_term, action.membership, hard_state
                )
            except SnapshotDamaged as error:
                log.warning("%s: snapshot at index %d is refused: %s", replica.name, action.index, error)
                replica.raft.snapshot_failed(action.snapshot_id, replica.now_ms())
                return
            except StorageError as error:
                replica.fatal(f"{replica.name}: a snapshot could not be installed: {error}")
                return
            replica.state_replaced(action.index)
            stamp_ms = replica.store.applied.stamp_ms
            replica.raft.snapshot_installed(action.snapshot_id, replica.now_ms(), stamp_ms=stamp_ms)
            self.installed += 1
            log.info("%s: snapshot at index %d is installed", replica.name, action.index)
        finally:
            self.installing = False
            replica.resume_applying()
