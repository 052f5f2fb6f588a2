"""What makes a retried write apply once: the client's id, and per shard its seqs.

A seq is taken when a write begins and given back when it ends, in whatever way; everything below the
first one still out is acknowledged to the server, which then refuses it for ever. So a write that was given
up can't apply after a later one of the same shard did. The window bounds how many replies
a server must keep for us. Nothing here grows with the number of keys.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque

from raftkv.protocol.limits import ID_BYTES

WINDOW = 64
"""Seqs between the first one still out and the next; a quarter of the replies that a server keeps."""


class ShardSession:
    """The seqs of one client in one shard, from 1."""

    __slots__ = ("_next_seq", "_out", "_waiters")

    def __init__(self) -> None:
        self._next_seq = 1
        self._out: dict[int, None] = {}  # ascending: seqs are handed out in order
        self._waiters: deque[asyncio.Future[int]] = deque()

    @property
    def first_unacked(self) -> int:
        return next(iter(self._out), self._next_seq)

    @property
    def in_flight(self) -> int:
        return len(self._out)

    def try_begin(self) -> int | None:
        """The next seq if it is within the window and nobody waits. `end` must follow."""
        return self._take() if not self._waiters and self._has_room else None

    async def begin(self) -> int:
        """The next seq, once it is within the window; first come, first served. `end` must follow."""
        seq = self.try_begin()
        if seq is not None:
            return seq
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.end(waiter.result())  # it was our turn already
            elif waiter in self._waiters:  # else `end` has come across it already
                self._waiters.remove(waiter)
            raise

    def end(self, seq: int) -> None:
        """The reply has arrived, or nobody waits for it any more."""
        del self._out[seq]
        while self._waiters and self._has_room:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(self._take())

    @property
    def _has_room(self) -> bool:
        return self._next_seq - self.first_unacked < WINDOW

    def _take(self) -> int:
        seq = self._next_seq
        self._next_seq += 1
        self._out[seq] = None
        return seq


class Sessions:
    """All sessions of one client, one for each shard it wrote to."""

    def __init__(self, rng: random.Random) -> None:
        self.client_id = rng.getrandbits(8 * ID_BYTES).to_bytes(ID_BYTES, "big")
        self._shards: dict[int, ShardSession] = {}

    def of_shard(self, shard: int) -> ShardSession:
        session = self._shards.get(shard)
        if session is None:
            session = self._shards[shard] = ShardSession()
        return session
