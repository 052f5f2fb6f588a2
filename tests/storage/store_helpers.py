"""A store over the disk in memory, driven as a replica drives it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from raftkv.raft.actions import HardState
from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership
from raftkv.storage.checkpoint import Checkpoint
from raftkv.storage.engine import Changes, EngineFactory, StorageEngine
from raftkv.storage.identity import Identity
from raftkv.storage.memory import MemoryBacking, MemoryEngine
from raftkv.storage.store import Store
from tests.storage.fake_disk import FakeDisk
from tests.storage.helpers import MEMBERS, SEGMENT_BYTES, entry

IDENTITY = Identity("shardkv", 100, 1, (1, 2, 3))


@dataclass
class Machine:
    """A disk, and what survives on it besides files."""

    disk: FakeDisk
    backing: MemoryBacking
    directory: str = "data"
    identity: Identity = IDENTITY
    acknowledged: dict[int, int] = field(default_factory=dict)
    """Index to term of every entry that was acknowledged and not replaced."""

    @classmethod
    def make(cls, seed: int = 1) -> Machine:
        return cls(FakeDisk(random.Random(seed)), MemoryBacking(random.Random(seed + 1)))

    @property
    def factory(self) -> EngineFactory:
        def open_engine(directory: str) -> StorageEngine:
            return MemoryEngine(self.disk, directory, self.backing)

        return open_engine

    def open(self) -> Store:
        return Store.open(self.disk, self.directory, self.factory, self.identity, wal_segment_bytes=SEGMENT_BYTES)

    # -- what a replica does ------------------------------------------------------------------

    async def form(self, store: Store, membership: Membership = MEMBERS) -> None:
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        store.form(membership, HardState(1), lambda: durable.set_result(None))
        await durable

    async def append(self, store: Store, hard_state: HardState | None, new: list[Entry]) -> None:
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if new:  # what it replaces is no longer promised, from now on
            self.acknowledged = {i: t for i, t in self.acknowledged.items() if i < new[0].index}
        store.wal.append(hard_state, new, lambda: durable.set_result(None))
        await durable
        self.acknowledged |= {e.index: e.term for e in new}

    def apply(self, store: Store, new: list[Entry], membership: Membership | None = None) -> None:
        """Each entry sets one key of its own and one that all share."""
        for e in new:
            changes: Changes = {b"k%06d" % e.index: e.encoded, b"last": b"%d" % e.index}
            store.meta_changes(changes, e.index, e.term, e.stamp_ms, membership)
            store.engine.write(changes)

    async def log_and_apply(self, store: Store, first: int, last: int, term: int = 1) -> None:
        for index in range(first, last + 1):
            await self.append(store, None, [entry(index, term)])
            self.apply(store, [entry(index, term)])

    def check(self, store: Store) -> None:
        """Engine and log fit together, and nothing acknowledged is lost."""
        applied = store.applied
        last = store.entries[-1].index if store.entries else store.start_index
        assert store.start_index <= applied.index <= last
        assert [e.index for e in store.entries] == list(range(store.start_index + 1, last + 1))
        terms = {e.index: e.term for e in store.entries} | {store.start_index: store.start_term}
        assert terms[applied.index] == applied.term
        assert store.hard_state.term >= applied.term
        expected = {b"k%06d" % index for index in range(1, applied.index + 1)}
        assert {key for key, _ in store.engine.scan(b"k", b"l")} == expected
        assert store.engine.get(b"last") == (b"%d" % applied.index if applied.index else None)
        for index, term in self.acknowledged.items():
            assert index <= applied.index or terms.get(index) == term, f"entry {index} is lost"
        for name in ("incoming", "checkpoints"):
            assert self.disk.list(f"{self.directory}/{name}") == []
        assert len(self.disk.list(f"{self.directory}/engine")) == 1


async def stream(checkpoint: Checkpoint, store: Store, chunk_bytes: int = 700) -> None:
    """Send a whole checkpoint, as the leader does."""
    offset = 0
    while offset < checkpoint.total_bytes:
        chunk = await checkpoint.read(offset, chunk_bytes)
        offset = await store.receive_chunk(checkpoint.id, checkpoint.total_bytes, offset, chunk)
