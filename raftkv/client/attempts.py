"""Running a transaction again until it commits: what `RaftKV.run_transaction` decides between two attempts.

The first attempts are optimistic. Then the keys of the last one are locked first, all of them in one order (by shard,
then by key), and since the age is that of the first attempt with locks, everybody younger gives way in the end: it
can't starve.
Never runs an attempt after one whose outcome is unknown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from raftkv.client.cluster import Cluster
from raftkv.client.transactions import ReadAt, Transaction, TxnPhase
from raftkv.protocol.errors import Aborted, Conflict, TooOld

T = TypeVar("T")

OPTIMISTIC_MAX = 3
ATTEMPTS_MAX = 32
"""Far more than locks should need; then the last error is raised."""

PAUSE_S_MIN = 0.01
PAUSE_S_MAX = 0.5


class Attempts:
    """One application of `run_transaction`."""

    def __init__(self, cluster: Cluster, read: ReadAt) -> None:
        self._cluster = cluster
        self._read = read
        self._age: bytes | None = None
        self._keys: list[bytes] = []
        self._failures = 0
        self._renewed = False
        self._ran = False

    @property
    def failures(self) -> int:
        """Attempts that lost against other transactions, so far."""
        return self._failures

    def next(self) -> Transaction:
        """Of the age of the first one with locks; when it has begun, `prepare` must follow."""
        self._ran = False
        return Transaction(self._cluster, self._read, age=self._age)

    async def prepare(self, txn: Transaction) -> None:
        """Take its locks if it is time for them. May raise Conflict and Aborted as any attempt."""
        if self._failures >= OPTIMISTIC_MAX and self._keys:
            await txn.lock(*self._keys)
        self._ran = True

    async def failed(self, txn: Transaction, error: Conflict | Aborted) -> None:
        """Pause before the next one; raise `error` if there is to be none."""
        if txn.phase is not TxnPhase.ABORTED:
            raise error  # it comes from somewhere else, and this one has ended
        self._age = txn.age
        if self._ran:  # an attempt that got no further than its locks has seen no keys of its own
            self._keys = txn.keys
        self._failures += 1
        if isinstance(error, TooOld):
            if self._renewed:
                raise error
            self._renewed = True
            await self._cluster.router.renew_map_time(self._cluster.call("map time"))
            return
        if self._failures >= ATTEMPTS_MAX:
            raise error
        pause_s = min(PAUSE_S_MAX, PAUSE_S_MIN * 2 ** min(self._failures, 10))
        await asyncio.sleep(pause_s * (0.5 + self._cluster.rng.random() / 2))


async def run_transaction(attempts: Attempts, body: Callable[[Transaction], Awaitable[T]]) -> T:
    """See `RaftKV.run_transaction`."""
    while True:
        txn = attempts.next()
        try:
            async with txn:
                await attempts.prepare(txn)
                return await body(txn)
        except (Conflict, Aborted) as error:
            await attempts.failed(txn, error)
