"""The explicit locks of one transaction: taken shard by shard, kept alive by a heartbeat, let go of in the end.

A lock whose answer was lost counts as held: what may be held is let go of too. Letting go is best effort, since a
group lets go by itself when the heartbeat stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from raftkv.client.cluster import Cluster, bad_reply, result_of
from raftkv.client.retry import Call
from raftkv.client.tasks import gather_ordered
from raftkv.machines.txn_commands import TXN_BEAT, TXN_DECIDE, TXN_LOCK
from raftkv.protocol.errors import Aborted, RaftKVError, WrongGroup
from raftkv.protocol.frames import encode_body
from raftkv.protocol.messages import Verb

BEAT_S = 2.0
"""A third of what a group waits for the next one."""
WAITING_BEAT_S = 0.5
"""While it waits for a lock: whoever waits for one of its own may be older, and takes it; then its waiting is over."""
RELEASE_S = 1.0
"""So long the end of a transaction waits for its locks to be gone."""
SHARDS_AT_ONCE = 16

_NOT_HERE = -1


class Locks:
    """Of the transaction `txid`. `on_lost(error)` is called once when it has lost one of them."""

    def __init__(self, cluster: Cluster, txid: bytes, on_lost: Callable[[RaftKVError], None]) -> None:
        self._cluster = cluster
        self._txid = txid
        self._on_lost = on_lost
        self._held: dict[int, None] = {}
        self._maybe: dict[int, None] = {}
        self._waiting: dict[asyncio.Task[list[int]], None] = {}
        self._lost: RaftKVError | None = None
        self._beating: asyncio.Task[None] | None = None

    @property
    def shards(self) -> list[int]:
        """Where locks are, or may be, held."""
        return sorted(self._maybe)

    async def take(self, shard: int, keys: Sequence[bytes], age: bytes, timeout_s: float) -> list[int]:
        """Their versions, once they are locked. Raise Locked if that takes too long, Aborted, Expired, Timeout.

        Aborted too if another lock is lost meanwhile, to an older transaction.
        """
        call = self._cluster.caller.call("lock", keys[0], is_write=False, timeout_s=timeout_s)
        self._maybe[shard] = None
        command = [TXN_LOCK, self._txid, age, shard, list(keys)]
        asking = self._ask(call, shard, command, lambda body: _versions(body, len(keys)))
        task: asyncio.Task[list[int]] = asyncio.get_running_loop().create_task(asking, name="lock")
        self._waiting[task] = None
        try:
            versions = await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._lost is None or (current is not None and current.cancelling()):
                raise
            raise self._lost from None
        finally:
            del self._waiting[task]
            task.cancel()
        self._held[shard] = None
        if self._beating is None:
            self._cluster.on_close[self.stop] = None
            self._beating = asyncio.get_running_loop().create_task(self._beat(), name="heartbeat of a transaction")
        return versions

    async def release(self) -> None:
        """The transaction ends without a commit: let the groups know, if they can be reached."""
        self.stop()
        shards = self.shards
        self._held.clear()
        self._maybe.clear()
        await gather_ordered([self._release(shard) for shard in shards], SHARDS_AT_ONCE)

    def stop(self) -> None:
        """No more heartbeats. Never waits: whoever is cancelled right after a commit has to hear that it is one."""
        self._cluster.on_close.pop(self.stop, None)
        task, self._beating = self._beating, None
        if task is not None:
            task.cancel()

    async def _release(self, shard: int) -> None:
        call = self._cluster.caller.call("release of locks", None, is_write=False, timeout_s=RELEASE_S)
        try:
            await self._ask(call, shard, [TXN_DECIDE, self._txid, False, [shard]], _heard)
        except RaftKVError:
            pass  # they end by themselves

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        beat_s = loop.time()
        while True:
            await asyncio.sleep(min(WAITING_BEAT_S, BEAT_S))
            if not self._waiting and loop.time() < beat_s + BEAT_S:
                continue
            beat_s = loop.time()
            lost = await gather_ordered([self._beat_at(shard) for shard in sorted(self._held)], SHARDS_AT_ONCE)
            self._lost = next((error for error in lost if error is not None), None)
            if self._lost is not None:
                self._on_lost(self._lost)
                for task in self._waiting:
                    task.cancel()
                return

    async def _beat_at(self, shard: int) -> RaftKVError | None:
        """What says that the locks there are lost."""
        call = self._cluster.caller.call("heartbeat of a transaction", None, is_write=False, timeout_s=BEAT_S)
        try:
            await self._ask(call, shard, [TXN_BEAT, self._txid, [shard]], result_of(int))
        except Aborted as error:
            return error
        except RaftKVError:
            pass  # if it stays so, the commit will say it
        return None

    async def _ask(self, call: Call, shard: int, command: list[Any], decode: Callable[[Any], Any]) -> Any:
        encoded = encode_body(command)
        cluster = self._cluster
        return await cluster.caller.ask(
            call,
            lambda call: cluster.router.route(call, shard),
            Verb.TXN,
            lambda route: [route.config_num, encoded],
            decode,
        )


def _versions(body: Any, count: int) -> list[int]:
    versions: list[Any] = result_of(list)(body)
    if len(versions) != count or not all(type(version) is int for version in versions):
        raise bad_reply("a lock")
    return versions


def _heard(body: Any) -> None:
    states: list[Any] = result_of(list)(body)
    if not all(type(state) is list and len(state) > 1 for state in states):
        raise bad_reply("the end of a transaction")
    if any(state[1] == _NOT_HERE for state in states):
        raise WrongGroup(-1)
