"""A commit that is cancelled, at each point where it waits: whatever the transaction says of itself then is true.

Found by chaos: a commit whose caller gave up while its heartbeat was being stopped, after the answer that it is
committed, ended with a time out although it was committed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Generator
from typing import Any

import pytest

from raftkv.client.kv import RaftKV
from raftkv.client.transactions import Transaction, TxnPhase
from raftkv.client.txn_status import TxnStatus
from raftkv.machines.locks import LOCK_MS
from raftkv.protocol.messages import Verb
from tests.client.fakes import apply_and_reset, first, on_verb
from tests.client.txn_fakes import COORDINATORS, TxnCluster, key_at, with_txn_cluster

A, B, C = key_at(0), key_at(2), key_at(1)
"""A and B are at group 1, C is at group 2."""
STEPS_MAX = 200


class CancelledAt:
    """Awaits `inner`, and cancels it the `at`-th time that it waits: at once, or, if `late`, when it would go on.

    `reached`: whether it waited so often.
    """

    def __init__(self, inner: Awaitable[None], at: int, *, late: bool) -> None:
        self._inner = inner
        self._at = at
        self._late = late
        self.reached = False

    def __await__(self) -> Generator[Any, Any, None]:
        steps = self._inner.__await__()
        waits = 0
        error: BaseException | None = None
        while True:
            try:
                waited_for = next(steps) if error is None else steps.throw(error)
            except StopIteration:
                return
            error = None
            waits += 1
            if waits == self._at:
                self.reached = True
                error = asyncio.CancelledError()
                if not self._late:
                    if waited_for is not None:
                        waited_for._asyncio_future_blocking = False
                        waited_for.cancel()
                    continue
            try:
                yield waited_for
            except BaseException as thrown:
                error = thrown


def lost_answer(cluster: TxnCluster) -> None:
    """The first answer to a commit is lost, so that it has to be found out."""
    for verb, gids in ((Verb.TXN, cluster.gids), (Verb.COORDINATE, (COORDINATORS,))):
        for gid in gids:
            cluster.everywhere(gid, first(1, on_verb(verb, apply_and_reset)))


async def cancelled(cluster: TxnCluster, at: int, keys: list[bytes], locks: bool, late: bool, lossy: bool) -> bool:
    """Whether the commit waited so often."""
    async with RaftKV(cluster.addresses, timeout_s=4.0, rng=random.Random(at)) as kv:
        txn: Transaction = await kv.transaction().begin()
        if locks:
            await txn.lock(*keys)
        for key in keys:
            await txn.put(key, b"%d" % at)
        if lossy:
            lost_answer(cluster)
        committing = CancelledAt(txn.commit(), at, late=late)
        try:
            await committing
            assert txn.phase is TxnPhase.COMMITTED
        except asyncio.CancelledError:
            assert committing.reached
            assert txn.phase in (TxnPhase.ABORTED, TxnPhase.UNKNOWN)
        for server in cluster.servers:
            server.rules.clear()
        cluster.tick(2 * LOCK_MS)  # locks of one that nobody ends
        if txn.phase is not TxnPhase.UNKNOWN:
            committed = await kv.txn_status(txn.txid) is TxnStatus.COMMITTED
            assert committed == (txn.phase is TxnPhase.COMMITTED)
            for key in keys:
                assert (cluster.value(key) == b"%d" % at) == committed
        return committing.reached


@pytest.mark.parametrize("lossy", [False, True], ids=["", "an answer is lost"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "when it would go on"])
@pytest.mark.parametrize("locks", [False, True], ids=["", "with locks"])
@pytest.mark.parametrize("keys", [[A, B], [A, C]], ids=["one group", "two groups"])
def test_whatever_it_says_of_itself_is_true(keys: list[bytes], locks: bool, late: bool, lossy: bool) -> None:
    async def run(cluster: TxnCluster) -> None:
        at = 1
        while await cancelled(cluster, at, keys, locks, late, lossy):
            at += 1
            assert at < STEPS_MAX
        assert at > 1

    with_txn_cluster(run)
