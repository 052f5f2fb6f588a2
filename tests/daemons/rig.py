"""A replica on a disk in memory whose syncs finish only when the test says so, and peers that are the test."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgpack

from raftkv.daemons.replica import Replica
from raftkv.daemons.tasks import Tasks
from raftkv.machines.kv import CONFIG, PUT, KvMachine
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.frames import FrameParser
from raftkv.protocol.messages import decode_raft
from raftkv.raft.actions import HardState
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.membership import Membership
from raftkv.raft.messages import AppendEntries, AppendReply, Message, RequestVote, VoteReply
from raftkv.storage.disk import BULK_LANE, Done, Job
from raftkv.storage.identity import Identity
from raftkv.storage.memory import MemoryEngine
from raftkv.storage.store import Store
from tests.storage.fake_disk import FakeDisk

CLIENT = b"c" * 16


class HeldDisk(FakeDisk):
    """While `held`, jobs of the WAL's lane wait in `waiting`."""

    def __init__(self) -> None:
        super().__init__(random.Random(1))
        self.held = False
        self.waiting: list[tuple[int, Job, Done]] = []

    def submit(self, lane: int, job: Job, done: Done) -> None:
        if self.held and lane != BULK_LANE:
            self.waiting.append((lane, job, done))
        else:
            super().submit(lane, job, done)

    def let_go(self) -> None:
        self.held = False
        waiting, self.waiting = self.waiting, []
        for lane, job, done in waiting:
            super().submit(lane, job, done)


class Rig:
    """Replica 0 of a group with voters 0 … `voters` - 1, and all that it says and answers."""

    def __init__(self, voters: int = 1, *, snapshot_bytes: int = 1 << 20, snapshot_entries: int = 100_000) -> None:
        self.disk = HeldDisk()
        self.sent: list[tuple[int, Message]] = []
        self.answers: list[tuple[Any, Any]] = []
        self.ended: list[str] = []
        self.voters = voters
        self._snapshot = (snapshot_bytes, snapshot_entries)
        self.store: Store
        self.replica: Replica

    async def start(self) -> Rig:
        members = tuple(range(self.voters))
        identity = Identity("shardkv", 1, 0, members)
        store = Store.open(self.disk, "data", lambda path: MemoryEngine(self.disk, path), identity)
        self.store = store
        if store.is_fresh:
            formed = asyncio.get_running_loop().create_future()
            membership = Membership(members, (), tuple((m, b"%16d" % m) for m in members))
            store.form(membership, HardState(), lambda: formed.set_result(None))
            await formed
        assert store.membership is not None
        raft = Raft(
            RaftConfig(replica=0),
            random.Random(3),
            int(asyncio.get_running_loop().time() * 1000),
            hard_state=store.hard_state,
            start_index=store.start_index,
            start_term=store.start_term,
            start_membership=store.membership,
            entries=store.entries,
            applied_index=store.applied.index,
            stamp_ms=store.applied.stamp_ms,
        )
        self.replica = Replica(
            name="rig",
            raft=raft,
            store=store,
            machine=KvMachine(1),
            send=self._sent,
            address_of=lambda peer: f"peer:{peer}",
            tasks=Tasks(lambda name, error: self.ended.append(f"{name}: {error!r}")),
            fatal=self.ended.append,
            snapshot_bytes=self._snapshot[0],
            snapshot_entries=self._snapshot[1],
        )
        self.replica.start()
        return self

    async def lead(self) -> Rig:
        """Win an election (the peers vote for it), commit the no-op and a configuration that owns all shards."""
        raft = self.replica.raft
        raft.tick(raft.next_deadline_ms)
        self.replica.wake()
        await self.until(lambda: raft.role == "leader" or self.voters > 1)
        for pre in (True, False):
            if raft.role != "leader":
                await self.until(lambda pre=pre: any(isinstance(m, RequestVote) and m.pre == pre for _, m in self.sent))
                term = raft.term + 1 if pre else raft.term
                for peer in range(1, self.voters):
                    self.replica.step(VoteReply(term, peer, True, pre))
                await asyncio.sleep(0)
        await self.until(lambda: raft.role == "leader")
        config = ShardMap(1, (1,), {1: ("a:1",)})
        self.submit_raw([CONFIG, config.encode()], "config")
        await self.commit_all()
        await self.until(lambda: self.replica.machine.config_num == 1)  # type: ignore[attr-defined]
        self.answers.clear()
        return self

    async def commit_all(self) -> None:
        """The peers acknowledge whatever the log holds."""
        for _ in range(20):
            await asyncio.sleep(0.001)
            raft = self.replica.raft
            for peer in range(1, self.voters):
                if raft.role == "leader":
                    last, heard = raft.last_index, self._last_round(peer)
                    self.replica.step(AppendReply(raft.term, peer, True, last, 0, 0, last, 0, heard))

    def _last_round(self, peer: int) -> int:
        return max((m.round for to, m in self.sent if to == peer and isinstance(m, AppendEntries)), default=0)

    async def until(self, condition: Any, timeout_s: float = 5.0) -> None:
        end_s = asyncio.get_running_loop().time() + timeout_s
        while not condition():
            assert asyncio.get_running_loop().time() < end_s, "it did not happen in time"
            assert not self.ended, self.ended
            await asyncio.sleep(0.001)

    def put(self, seq: int, key: bytes = b"k", value: bytes = b"v") -> None:
        self.submit_raw([PUT, 0, CLIENT, seq, 1, 1 << 50, key, value, None], seq)

    def submit_raw(self, command: list[Any], token: Any) -> None:
        self.replica.submit(msgpack.packb(command), command, self.answer, token)

    def answer(self, token: Any, result: Any) -> None:
        self.answers.append((token, result))

    def _sent(self, peer: int, frame: bytes) -> None:
        (array,) = FrameParser().feed(frame)
        self.sent.append((peer, decode_raft(array)))
