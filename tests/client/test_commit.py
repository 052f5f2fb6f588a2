"""Commits against groups and coordinators that are real machines: which way they go, and what a lost answer does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from raftkv.client import commit, replicas
from raftkv.client.kv import RaftKV
from raftkv.client.transactions import Transaction, TxnPhase
from raftkv.machines.txn_commands import TXN_COMMIT, TXN_DECIDE, txid_ms
from raftkv.protocol import errors
from raftkv.protocol.errors import Aborted, BadRequest, CommitUnknown, Conflict, RaftKVError, Timeout, Unavailable
from raftkv.protocol.messages import Verb
from raftkv.protocol.transactions import CoordinateOp
from tests.client.fakes import (
    Asked,
    Rule,
    apply_and_drop,
    apply_and_reset,
    drop,
    first,
    on_verb,
    refusing,
    reset,
)
from tests.client.txn_fakes import COORDINATORS, NOW_MS, Died, TxnCluster, key_at, put_all, with_txn_cluster

A, B, C = key_at(0), key_at(2), key_at(1)
"""A and B are at group 1, C is at group 2."""


@pytest.fixture(autouse=True)
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of silence: so that a test needn't wait until a silent server is asked again."""
    monkeypatch.setattr(replicas, "SILENT_S", 0.05)


def client(cluster: TxnCluster, timeout_s: float = 4.0, **options: Any) -> RaftKV:
    return RaftKV(cluster.addresses, timeout_s=timeout_s, rng=random.Random(1), **options)


def commits(cluster: TxnCluster) -> tuple[int, int]:
    """How many commits went to a group, and to the coordinators."""
    at_groups = [asked for asked in at_leaders(cluster, Verb.TXN) if asked.command[0] == TXN_COMMIT]
    return len(at_groups), len(coordinated(cluster, CoordinateOp.COMMIT))


def at_leaders(cluster: TxnCluster, verb: int) -> list[Asked]:
    return [asked for asked in cluster.asked(verb) if cluster.leaders[asked.server.hello.gid] is asked.server]


def coordinated(cluster: TxnCluster, op: CoordinateOp) -> list[Asked]:
    return [asked for asked in at_leaders(cluster, Verb.COORDINATE) if asked.body[0] == op]


def only(op: CoordinateOp, rule: Rule) -> Rule:
    return lambda asked: asked.verb == Verb.COORDINATE and asked.body[0] == op and rule(asked)


def dying(asked: Asked) -> bool:
    """The coordinators' leader dies in the middle of it, if it is told to; another one takes over."""
    cluster = asked.server.cluster
    assert isinstance(cluster, TxnCluster)
    try:
        asked.server._body(asked)
    except Died:
        cluster.take_over()
        asked.connection.abort()
        return True
    except RaftKVError:
        pass
    return False


# Which way ----------------------------------------------------------------------------------------------


def test_one_group_needs_no_coordinator() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            await kv.put(A, b"1")
            async with kv.transaction() as txn:
                assert len(txn.txid) == 16
                assert txid_ms(txn.txid) == NOW_MS
                assert await txn.get(A) is not None
                await txn.put(A, b"2")
                await txn.put(B, b"3")
                assert cluster.value(A) == b"1"
            assert txn.phase is TxnPhase.COMMITTED
            assert (cluster.value(A), cluster.value(B)) == (b"2", b"3")
            assert commits(cluster) == (1, 0)

    with_txn_cluster(run)


def test_several_groups_go_to_the_coordinators() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.put(A, b"1")
                await txn.put(C, b"2")
            assert (cluster.value(A), cluster.value(C)) == (b"1", b"2")
            assert commits(cluster) == (0, 1)
            assert cluster.locks() == 0

    with_txn_cluster(run)


def test_several_groups_without_a_coordinator_are_refused() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            with pytest.raises(Unavailable, match="no coordinator is registered; nothing was written"):
                async with kv.transaction() as txn:
                    await txn.put(A, b"1")
                    await txn.put(C, b"2")
            assert txn.phase is TxnPhase.ABORTED
            assert (cluster.value(A), cluster.value(C)) == (None, None)
            async with kv.transaction() as txn:  # one group does without
                await txn.put(A, b"1")
            cluster.with_coordinators = True  # and they are found when they have come
            async with kv.transaction() as txn:
                await txn.put(A, b"2")
                await txn.put(C, b"2")
            assert cluster.value(C) == b"2"

    with_txn_cluster(run, with_coordinators=False)


def test_a_certain_refusal_may_change_the_way() -> None:
    """The map in hand says one group; the shard has moved since."""

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.put(A, b"1")
                await txn.put(B, b"2")
                cluster.move(2, 2)
            assert (cluster.value(A), cluster.value(B)) == (b"1", b"2")
            assert commits(cluster) == (1, 1)

    with_txn_cluster(run)


def test_all_shards_at_another_group_are_still_one_group() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.put(A, b"1")
                await txn.put(B, b"2")
                cluster.move(0, 2)
                cluster.move(2, 2)
            assert (cluster.value(A), cluster.value(B)) == (b"1", b"2")
            assert commits(cluster) == (2, 0)

    with_txn_cluster(run, with_coordinators=False)


def test_a_shard_on_its_way_sends_it_to_the_coordinators() -> None:
    """The controllers' map says one group, the group that it isn't there any more."""

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.put(A, b"1")
                await txn.put(B, b"2")
                cluster.move(2, 2, quietly=True)
            assert (cluster.value(A), cluster.value(B)) == (b"1", b"2")
            assert commits(cluster)[1] == 1

    with_txn_cluster(run)


def test_the_way_never_changes_while_an_attempt_may_have_applied() -> None:
    """The first answer is lost, then the shards part: the coordinators resolve it, and no commit goes to them."""

    for applied in (True, False):

        async def run(cluster: TxnCluster, applied: bool = applied) -> None:
            def lost(asked: Asked) -> bool:
                if asked.verb != Verb.TXN:
                    return False
                if applied:
                    asked.server._body(asked)
                cluster.move(2, 2)
                asked.connection.abort()
                return True

            cluster.everywhere(1, first(1, lost))
            async with client(cluster) as kv:
                if applied:
                    await swap(kv)
                else:
                    with pytest.raises(Aborted, match="given up"):
                        await swap(kv)
                assert [cluster.value(A), cluster.value(B)] == ([b"1", b"2"] if applied else [None, None])
                assert commits(cluster)[1] == 0
                assert len(coordinated(cluster, CoordinateOp.RESOLVE)) == 1

        with_txn_cluster(run)


async def swap(kv: RaftKV, *, far: bool = False) -> Transaction:
    txn = kv.transaction()
    async with txn:
        await txn.put(A, b"1")
        await txn.put(C if far else B, b"2")
    return txn


# Lost answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [drop, apply_and_drop, apply_and_reset, reset, refusing(errors.Busy("full"))])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_a_commit_is_repeated_until_it_is_answered(rule: Rule, far: bool, times: int) -> None:
    async def run(cluster: TxnCluster) -> None:
        if far:
            cluster.everywhere(COORDINATORS, only(CoordinateOp.COMMIT, first(times, rule)))
        else:
            cluster.everywhere(1, on_verb(Verb.TXN, first(times, rule)))
        async with client(cluster) as kv:
            await kv.get(A)
            kv._cluster.timeout_s = 2.4  # an attempt is waited for a quarter of it
            await swap(kv, far=far)
            assert (cluster.value(A), cluster.value(C if far else B)) == (b"1", b"2")
            assert coordinated(cluster, CoordinateOp.RESOLVE) == []
            assert commits(cluster)[not far] == 0
            txids = {asked.command[1] for asked in cluster.asked(Verb.TXN)}
            assert len(txids | {asked.body[1] for asked in coordinated(cluster, CoordinateOp.COMMIT)}) == 1

    with_txn_cluster(run)


@pytest.mark.parametrize("where", ["begun", "prepared", "decided"])
def test_the_coordinators_leader_dies_at_every_step(where: str) -> None:
    async def run(cluster: TxnCluster) -> None:
        cluster.dies_at = where
        cluster.everywhere(COORDINATORS, only(CoordinateOp.COMMIT, first(1, dying)))
        async with client(cluster) as kv:
            if where == "decided":
                await swap(kv, far=True)
            else:
                with pytest.raises(Aborted):
                    await swap(kv, far=True)
            expected = [b"1", b"2"] if where == "decided" else [None, None]
            assert [cluster.value(A), cluster.value(C)] == expected
            assert cluster.locks() == 0

    with_txn_cluster(run)


@pytest.mark.parametrize("rule", [drop, apply_and_drop])
@pytest.mark.parametrize("far", [False, True])
def test_a_commit_that_is_never_answered_is_resolved(rule: Rule, far: bool) -> None:
    async def run(cluster: TxnCluster) -> None:
        if far:
            cluster.everywhere(COORDINATORS, only(CoordinateOp.COMMIT, rule))
        else:
            cluster.everywhere(1, on_verb(Verb.TXN, rule))
        async with client(cluster) as kv:
            await kv.get(A)
            kv._cluster.timeout_s = 1.0
            if rule is apply_and_drop:
                txn = await swap(kv, far=far)
                assert txn.phase is TxnPhase.COMMITTED
            else:
                with pytest.raises(Aborted):
                    await swap(kv, far=far)
                assert cluster.value(A) is None
            (resolved,) = coordinated(cluster, CoordinateOp.RESOLVE)
            assert resolved.body[2] == ([0, 1] if far else [0, 2])
            assert commits(cluster)[not far] == 0

    with_txn_cluster(run)


@pytest.mark.parametrize("with_coordinators", [False, True])
def test_when_nobody_can_resolve_it_the_error_names_it(with_coordinators: bool) -> None:
    async def run(cluster: TxnCluster) -> None:
        cluster.everywhere(1, on_verb(Verb.TXN, apply_and_drop))
        cluster.everywhere(COORDINATORS, drop)
        async with client(cluster) as kv:
            await kv.get(A)
            kv._cluster.timeout_s = 0.5
            txn = kv.transaction()
            with pytest.raises(CommitUnknown) as caught:
                async with txn:
                    await txn.put(A, b"1")
            assert caught.value.txid == txn.txid
            assert f"`Txn resolve {txn.txid.hex()}` settles" in str(caught.value)
            assert ("no coordinator is registered" in str(caught.value)) == (not with_coordinators)
            assert txn.phase is TxnPhase.UNKNOWN
            for operation in (txn.commit(), txn.get(A), txn.abort()):
                with pytest.raises(BadRequest, match="nobody knows how"):
                    await operation
            assert kv.unsettled_writes() == []

    with_txn_cluster(run, with_coordinators=with_coordinators)


def test_a_timeout_means_that_nothing_was_sent() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            await kv.get(A)
            for server in cluster.groups[1]:
                server.stop()
            await asyncio.sleep(0.05)
            kv._cluster.timeout_s = 0.5
            with pytest.raises(Timeout, match=r"commit of transaction [0-9a-f]{32}: no replica of group 1 answered"):
                await swap(kv)

    with_txn_cluster(run, with_coordinators=False)


def test_a_reply_that_is_none_leaves_it_unknown() -> None:
    def nonsense(asked: Asked) -> bool:
        asked.server._body(asked)
        asked.reply(["?"])
        return True

    async def run(cluster: TxnCluster) -> None:
        cluster.everywhere(1, on_verb(Verb.TXN, first(1, nonsense)))
        cluster.everywhere(COORDINATORS, only(CoordinateOp.COMMIT, first(1, nonsense)))
        async with client(cluster) as kv:
            await swap(kv)  # resolved: it is committed
            await swap(kv, far=True)
            assert len(coordinated(cluster, CoordinateOp.RESOLVE)) == 2

    with_txn_cluster(run)


def test_cancelled_in_the_middle_of_a_commit_it_says_what_is_unsettled() -> None:
    async def run(cluster: TxnCluster) -> None:
        cluster.everywhere(1, on_verb(Verb.TXN, apply_and_drop))
        async with client(cluster) as kv:
            txn = kv.transaction()
            await txn.begin()
            await txn.put(A, b"1")
            committing = asyncio.get_running_loop().create_task(txn.commit())
            while not at_leaders(cluster, Verb.TXN):
                await asyncio.sleep(0.01)
            assert kv.unsettled_writes() == [f"commit of transaction {txn.txid.hex()}"]
            committing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await committing
            assert txn.phase is TxnPhase.UNKNOWN
            assert kv.unsettled_writes() == []
            assert len(at_leaders(cluster, Verb.TXN)) == 1  # and nothing aborts what may be committed

    with_txn_cluster(run)


def test_a_bug_after_the_sending_aborts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a commit that may be under way: its locks must not be let go of as if it were aborted."""

    def broken(body: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(commit, "_committed", broken)

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            txn = await kv.transaction().begin()
            await txn.lock(A)
            await txn.put(C, b"1")
            with pytest.raises(RuntimeError):
                await txn.commit()
            assert txn.phase is TxnPhase.UNKNOWN
            assert not [asked for asked in cluster.asked(Verb.TXN) if asked.command[0] == TXN_DECIDE]

    with_txn_cluster(run)


def test_locks_are_let_go_of_once_it_is_resolved_as_aborted() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            txn = await kv.transaction().begin()
            await txn.lock(A, C)
            cluster.everywhere(COORDINATORS, only(CoordinateOp.COMMIT, drop))
            txn.timeout_s = 1.0
            with pytest.raises(Aborted, match="given up"):
                await txn.commit()
            assert txn.phase is TxnPhase.ABORTED
            assert cluster.locks() == 0

    with_txn_cluster(run)


# Conflicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [False, True])
def test_a_conflict_names_the_keys_and_nothing_is_written(far: bool) -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            other = C if far else B
            await put_all(kv, {A: b"1", other: b"2"})
            txn = kv.transaction()
            with pytest.raises(Conflict) as caught:
                async with txn:
                    await txn.get(A)
                    await txn.get(other)
                    await txn.put(A, b"x")
                    await kv.put(other, b"3")
            assert caught.value.keys == [other]
            assert (cluster.value(A), cluster.value(other)) == (b"1", b"3")
            assert cluster.locks() == 0
            with pytest.raises(Conflict):  # whoever goes on with it hears the same
                await txn.get(A)
            await txn.abort()

    with_txn_cluster(run)


def test_a_lost_conflict_stays_no() -> None:
    async def run(cluster: TxnCluster) -> None:
        def lost(asked: Asked) -> bool:
            with pytest.raises(Conflict):
                asked.server._body(asked)
            asked.connection.abort()
            return True

        cluster.everywhere(1, on_verb(Verb.TXN, first(1, lost)))
        async with client(cluster) as kv:
            txn = kv.transaction()
            with pytest.raises(Aborted):
                async with txn:
                    await txn.get(A)
                    await txn.put(A, b"x")
                    await kv.put(A, b"3")
            assert txn.phase is TxnPhase.ABORTED
            assert cluster.value(A) == b"3"

    with_txn_cluster(run)


def test_a_txid_behind_the_horizon_is_aborted_and_the_map_time_was_never_trusted() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            txn = kv.transaction()
            with pytest.raises(Aborted, match="too old"):
                async with txn:
                    await txn.put(A, b"x")
                    cluster.tick(4_000_000)
            assert cluster.value(A) is None

    with_txn_cluster(run)


@pytest.mark.parametrize("end", [asyncio.CancelledError, KeyError])
def test_an_exception_aborts_it(end: Callable[[], BaseException]) -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            txn = kv.transaction()
            with pytest.raises((asyncio.CancelledError, KeyError)):
                async with txn:
                    await txn.put(A, b"x")
                    raise end()
            assert txn.phase is TxnPhase.ABORTED
            assert cluster.asked(Verb.TXN) == []  # nobody has heard of it
            with pytest.raises(BadRequest, match="the transaction is aborted: nothing more can be done in it"):
                await txn.commit()

    with_txn_cluster(run)
