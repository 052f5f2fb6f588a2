"""`Transaction`: what it reads and remembers, its limits, its locks, and what it refuses."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from raftkv.client import locking, replicas, transactions
from raftkv.client.kv import RaftKV, Value
from raftkv.client.transactions import TxnPhase
from raftkv.machines.locks import LOCK_MS
from raftkv.machines.txn_commands import TXN_BEAT, TXN_COMMIT, TXN_DECIDE, TXN_LOCK, TXN_PREPARE, make_txid
from raftkv.protocol import errors
from raftkv.protocol.errors import Aborted, BadRequest, Conflict, Locked, Timeout, TooLarge
from raftkv.protocol.limits import KEY_BYTES_MAX, TXN_BYTES_MAX, TXN_KEYS_MAX, VALUE_BYTES_MAX
from raftkv.protocol.messages import ReadOp, Verb
from tests.client.fakes import Asked, apply_and_drop, drop, first, on_verb
from tests.client.txn_fakes import COORDINATORS, TxnCluster, key_at, put_all, with_txn_cluster

A, B, C = key_at(0), key_at(2), key_at(1)
"""A and B are at group 1, C is at group 2."""


def client(cluster: TxnCluster, timeout_s: float = 4.0, seed: int = 1) -> RaftKV:
    return RaftKV(cluster.addresses, timeout_s=timeout_s, rng=random.Random(seed))


def commands(cluster: TxnCluster, *ops: int) -> list[list[Any]]:
    return [command for command in cluster.applied if command[0] in ops]


# Reads and writes -------------------------------------------------------------------------------------------


def test_it_reads_its_own_writes_and_each_key_once() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            version = await kv.put(A, b"1")
            async with kv.transaction() as txn:
                assert await txn.get(A) == Value(b"1", version)
                assert await txn.get(B) is None
                await txn.put(A, b"2")
                assert await txn.get(A) == Value(b"2", 0)
                await txn.append(A, b"3")
                await txn.append(B, b"new")
                await txn.delete(C)
                assert await txn.get(C) is None
                await txn.put(C, b"again")
                assert await txn.get(C) == Value(b"again", 0)
                await txn.delete(A)
                assert await txn.get(A) is None
                await txn.append(A, b"4")
                assert txn.keys == sorted([A, B, C])
            values = [await kv.get(key) for key in (A, B, C)]
            assert [found.value for found in values if found] == [b"4", b"new", b"again"]
            gets = [asked for asked in cluster.asked(Verb.READ) if asked.body[2] == ReadOp.GET]
            assert [asked.body[4] for asked in gets[:2]] == [A, B]
            assert len({asked.body[4] for asked in gets}) == 3  # C only afterwards

    with_txn_cluster(run)


def test_a_key_is_as_it_was_first_read() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            await kv.put(A, b"1")
            txn = await kv.transaction().begin()
            before = await txn.get(A)
            await kv.put(A, b"2")
            assert await txn.get(A) == before
            await txn.put(B, b"x")
            with pytest.raises(Conflict):
                await txn.commit()

    with_txn_cluster(run)


@pytest.mark.parametrize("key", [b"", b"\x00\xff", b"{tag}x", b"k" * KEY_BYTES_MAX])
def test_any_bytes(key: bytes) -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.put(key, bytes(range(256)))
            assert cluster.value(key) == bytes(range(256))

    with_txn_cluster(run)


def test_an_empty_transaction_costs_nothing() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                pass
            assert txn.phase is TxnPhase.COMMITTED
            assert cluster.asked(Verb.TXN) == cluster.asked(Verb.READ) == []

    with_txn_cluster(run)


def test_reads_at_once_are_remembered_too() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            await put_all(kv, {A: b"1", C: b"2"})
            async with kv.transaction() as txn:
                found = await asyncio.gather(*(txn.get(key) for key in (A, C, A, C)))
                assert found[:2] == found[2:]

    with_txn_cluster(run)


# Read only ------------------------------------------------------------------------------------------------


def test_read_only_is_checked_and_logs_nothing() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            await put_all(kv, {A: b"1", B: b"2", C: b"3"})
            async with kv.transaction() as txn:
                await asyncio.gather(txn.get(A), txn.get(B), txn.get(C), txn.get(key_at(3)))
            checks = [asked.body[3:] for asked in cluster.asked(Verb.READ) if asked.body[2] == ReadOp.CHECK]
            assert sorted(checks) == [[0, [A]], [1, [C]], [2, [B]], [3, [key_at(3)]]]
            assert cluster.asked(Verb.TXN) == cluster.asked(Verb.COORDINATE) == []

    with_txn_cluster(run)


def test_keys_of_one_shard_are_checked_too_but_one_key_needs_none() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.get(A)
            assert [asked.body[2] for asked in cluster.asked(Verb.READ)] == [ReadOp.GET] * len(cluster.asked(Verb.READ))
            with pytest.raises(Conflict) as caught:
                async with kv.transaction() as txn:
                    await txn.get(A)
                    await kv.put(A, b"2")
                    await kv.put(key_at(0, 1), b"2")
                    assert await txn.get(key_at(0, 1)) is not None  # together they never were
            assert caught.value.keys == [A]

    with_txn_cluster(run)


def test_an_absent_key_that_came_and_went_is_a_conflict() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            with pytest.raises(Conflict) as caught:
                async with kv.transaction() as txn:
                    assert await txn.get(A) is None
                    await txn.get(C)
                    await kv.put(A, b"x")
                    await kv.delete(A)
            assert caught.value.keys == [A]

    with_txn_cluster(run)


def test_a_check_waits_for_who_has_prepared() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster, timeout_s=1.0) as kv:
            other = make_txid(cluster.map_time_ms, b"prepared")

            async def read(prepare: bool) -> None:
                async with kv.transaction() as txn:
                    await txn.get(A)
                    await txn.get(C)
                    if prepare:
                        cluster.machines[1].run_one([TXN_PREPARE, other, COORDINATORS, 1, [[0, [], [[A, b"x"]]]]])

            with pytest.raises(Locked):
                await read(prepare=True)
            waiting = asyncio.get_running_loop().create_task(read(prepare=False))
            await asyncio.sleep(0.05)
            cluster.machines[1].run_one([TXN_DECIDE, other, False, [0]])
            await waiting

    with_txn_cluster(run)


@pytest.mark.parametrize("reply", [[1, 2], ["x"], None, 7, [None]])
def test_a_check_that_makes_no_sense_is_no_yes(reply: Any) -> None:
    async def run(cluster: TxnCluster) -> None:
        def nonsense(asked: Asked) -> bool:
            if asked.verb != Verb.READ or asked.body[2] != ReadOp.CHECK:
                return False
            asked.reply(reply)
            return True

        cluster.everywhere(1, nonsense)
        async with client(cluster) as kv:
            with pytest.raises(errors.ServerError, match="can't be understood"):
                async with kv.transaction() as txn:
                    await txn.get(A)
                    await txn.get(B)

    with_txn_cluster(run)


# Limits and bad input ---------------------------------------------------------------------------------------


def test_limits_are_checked_at_once_and_leave_it_usable() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                with pytest.raises(TooLarge, match=f"larger than the limit of {KEY_BYTES_MAX} bytes"):
                    await txn.get(b"k" * (KEY_BYTES_MAX + 1))
                with pytest.raises(TooLarge):
                    await txn.put(A, b"v" * (VALUE_BYTES_MAX + 1))
                await txn.put(A, b"v" * VALUE_BYTES_MAX)
                with pytest.raises(TooLarge, match="the value with the suffix"):
                    await txn.append(A, b"x")
                with pytest.raises(TypeError):
                    await txn.put("text", b"x")  # type: ignore[arg-type]
                with pytest.raises(TypeError):
                    await txn.put(A, "text")  # type: ignore[arg-type]
                await txn.put(A, b"small")
            assert cluster.value(A) == b"small"

    with_txn_cluster(run)


def test_the_bytes_of_a_transaction_are_bounded() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv, kv.transaction() as txn:
            keys = [b"%08d" % n for n in range(8)]
            for key in keys[:-1]:
                await txn.put(key, b"v" * (VALUE_BYTES_MAX - 8))
            with pytest.raises(TooLarge, match="the transaction"):
                await txn.put(keys[-1], b"v" * (VALUE_BYTES_MAX - 7))
            await txn.put(keys[-1], b"v" * (VALUE_BYTES_MAX - 8))
            assert txn._bytes == TXN_BYTES_MAX
            with pytest.raises(TooLarge):
                await txn.get(b"another")
            with pytest.raises(TooLarge):
                await txn.lock(b"another")
            await txn.delete(keys[-1])
            assert await txn.get(b"another") is None

    with_txn_cluster(run)


def test_the_keys_of_a_transaction_are_bounded() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                for n in range(TXN_KEYS_MAX):
                    await txn.put(b"%d" % n, b"")
                with pytest.raises(TooLarge, match=f"number of the transaction's keys is larger .* {TXN_KEYS_MAX}$"):
                    await txn.put(b"more", b"")
                with pytest.raises(TooLarge):
                    await txn.get(b"more")
                await txn.put(b"0", b"again")
            assert cluster.value(b"0") == b"again"

    with_txn_cluster(run)


def test_after_its_end_nothing_more_can_be_done() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            txn = kv.transaction()
            with pytest.raises(BadRequest, match="has not begun"):
                _ = txn.txid
            with pytest.raises(BadRequest, match="not begun"):
                await txn.get(A)
            async with txn:
                with pytest.raises(BadRequest, match="has begun already"):
                    await txn.begin()
                await txn.put(A, b"1")
                await txn.commit()  # by hand: leaving has nothing left to do
            for operation in (
                txn.get(A),
                txn.put(A, b""),
                txn.delete(A),
                txn.append(A, b""),
                txn.lock(A),
                txn.commit(),
            ):
                with pytest.raises(BadRequest, match="the transaction is committed: nothing more"):
                    await operation
            with pytest.raises(BadRequest, match="can't be aborted: it is committed"):
                await txn.abort()
            async with kv.transaction() as aborted:
                await aborted.put(A, b"2")
                await aborted.abort()
                await aborted.abort()
            assert cluster.value(A) == b"1"

    with_txn_cluster(run)


# Locks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [False, True])
def test_locks_keep_writers_out_until_the_end(far: bool) -> None:
    async def run(cluster: TxnCluster) -> None:
        other = C if far else B
        async with client(cluster) as kv, client(cluster, timeout_s=0.3, seed=2) as writer:
            await put_all(kv, {A: b"1", other: b"2"})
            async with kv.transaction() as txn:
                assert await txn.get(A, for_update=True) == await writer.get(A)  # plain reads pass
                await txn.lock(other, A)
                with pytest.raises(Locked) as caught:
                    await writer.put(A, b"x")
                assert caught.value.txn == txn.txid
                await txn.put(other, b"3")
            await writer.put(A, b"x")
            assert (cluster.value(A), cluster.value(other)) == (b"x", b"3")
            assert cluster.locks() == 0
            assert [command[3:] for command in commands(cluster, TXN_LOCK)] == [[0, [A]], [1 if far else 2, [other]]]

    with_txn_cluster(run)


def test_locks_alone_are_let_go_of_by_commit_and_abort() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.lock(A)
                assert cluster.locks() == 1
            assert cluster.locks() == 0
            txn = await kv.transaction().begin()
            await txn.lock(A, C)
            await txn.abort()
            assert cluster.locks() == 0
            assert sorted(command[3] for command in commands(cluster, TXN_DECIDE)) == [[0], [1]]

    with_txn_cluster(run)


def test_a_lock_is_waited_for() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv, client(cluster, timeout_s=0.3, seed=2) as impatient:
            first_txn = await kv.transaction().begin()
            await first_txn.lock(A)
            cluster.tick(1)  # so that the next ones are younger
            late = await impatient.transaction().begin()
            with pytest.raises(Locked) as caught:
                await late.lock(A)
            assert caught.value.txn == first_txn.txid
            assert late.phase is TxnPhase.OPEN  # it may try again
            kv._cluster.router._map_time_ms += 1
            second = await kv.transaction().begin()
            waiting = asyncio.get_running_loop().create_task(second.lock(A))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await first_txn.abort()
            await waiting
            await second.commit()
            await late.lock(A)
            await late.abort()
            assert cluster.locks() == 0

    with_txn_cluster(run)


def test_an_older_one_wounds_and_the_victim_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "BEAT_S", 0.1)

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            older = await kv.transaction().begin()
            await older.lock(key_at(3))
            kv._cluster.router._map_time_ms += 1
            quiet, beating = await kv.transaction().begin(), await kv.transaction().begin()
            await quiet.lock(A)
            await beating.lock(B, C)
            await older.lock(A, B)
            with pytest.raises(Aborted, match="lost its locks"):
                await quiet.lock(A, key_at(0, 1))
            assert quiet.phase is TxnPhase.ABORTED
            async with asyncio.timeout(2):
                while beating.phase is TxnPhase.OPEN:
                    await asyncio.sleep(0.01)
            for operation in (beating.put(C, b"x"), beating.get(C), beating.commit()):
                with pytest.raises(Aborted, match="lost its locks"):
                    await operation
            await beating.abort()
            await older.put(A, b"older")
            await older.commit()
            assert cluster.locks() == 0

    with_txn_cluster(run)


def test_a_wounded_transaction_can_not_commit_and_lets_go_of_its_other_locks() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            older = await kv.transaction().begin()
            await older.lock(key_at(3))
            kv._cluster.router._map_time_ms += 1
            with pytest.raises(Aborted):
                async with kv.transaction() as txn:
                    await txn.lock(A, B)
                    await txn.put(A, b"x")
                    await older.lock(A)
            assert cluster.locks() == 2
            await older.abort()
            assert cluster.value(A) is None

    with_txn_cluster(run)


def test_whoever_waits_is_told_that_it_lost_another_lock() -> None:
    """Two that wait for each other at different groups: the younger one gives way, long before its deadline."""

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv, client(cluster, seed=2) as other:
            older = await kv.transaction().begin()
            await older.lock(A)
            cluster.tick(1)
            await other._cluster.router.renew_map_time(other._cluster.call("map time"))
            younger = await other.transaction().begin()
            await younger.lock(B)
            waiting = asyncio.create_task(younger.lock(A))
            await asyncio.sleep(0.05)
            await older.lock(B)
            async with asyncio.timeout(4 * locking.WAITING_BEAT_S):
                with pytest.raises(Aborted, match="lost its locks"):
                    await waiting
            assert younger.phase is TxnPhase.ABORTED
            await older.commit()
            assert cluster.locks() == 0

    with_txn_cluster(run)


def test_age_counts_from_the_first_lock_by_a_fresh_map_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has known the map time for long takes no lock from whoever locked since."""
    monkeypatch.setattr(transactions, "AGE_STEP_S", 0.05)

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster, timeout_s=1.0) as idle, client(cluster, seed=2) as kv:
            late = await idle.transaction().begin()
            await late.get(A)
            cluster.tick(5_000)
            holder = await kv.transaction().begin()
            await holder.lock(A)
            await asyncio.sleep(2 * transactions.AGE_STEP_S)
            with pytest.raises(Locked):
                await late.lock(A)
            await holder.put(A, b"1")
            await holder.commit()
            await late.abort()
            assert cluster.locks() == 0

    with_txn_cluster(run)


def test_the_heartbeat_keeps_locks_while_map_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "BEAT_S", 0.02)

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.lock(A, C)
                for _ in range(5):
                    beats = len(commands(cluster, TXN_BEAT))
                    cluster.tick(LOCK_MS * 4 // 5)
                    while len(commands(cluster, TXN_BEAT)) < beats + 4:
                        await asyncio.sleep(0.01)
                assert cluster.locks() == 2
            ended = len(commands(cluster, TXN_BEAT))
            await asyncio.sleep(0.1)
            assert len(commands(cluster, TXN_BEAT)) == ended

    with_txn_cluster(run)


def test_closing_the_client_ends_the_heartbeat() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            txn = await kv.transaction().begin()
            await txn.lock(A)  # the harness finds a task that is left

    with_txn_cluster(run)


def test_a_lock_on_a_key_that_changed_since_it_was_read_is_a_conflict() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            await kv.put(A, b"1")
            txn = await kv.transaction().begin()
            await txn.get(A)
            await kv.put(A, b"2")
            with pytest.raises(Conflict):
                await txn.get(A, for_update=True)
            assert txn.phase is TxnPhase.ABORTED
            assert cluster.locks() == 0

    with_txn_cluster(run)


def test_a_lock_that_was_lost_shows_at_the_commit() -> None:
    """Its client was silent for too long, and somebody else wrote."""

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            with pytest.raises(Conflict):
                async with kv.transaction() as txn:
                    await txn.lock(A)
                    cluster.tick(20_000)
                    await kv.put(A, b"x")

    with_txn_cluster(run)


def test_a_lock_whose_answer_was_lost_is_let_go_of_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "SILENT_S", 0.05)

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            await kv.get(A)
            for end in ("commit", "abort"):
                txn = await kv.transaction().begin()
                rule = on_verb(Verb.TXN, first(20, apply_and_drop))
                cluster.everywhere(1, rule)
                txn.timeout_s = 0.4
                with pytest.raises(Timeout):
                    await txn.lock(A)
                for server in cluster.groups[1]:
                    server.rules.clear()
                assert cluster.locks() == 1
                txn.timeout_s = 4
                await txn.put(C, b"x")
                await (txn.commit() if end == "commit" else txn.abort())
                assert cluster.locks() == 0
            assert cluster.value(C) == b"x"

    with_txn_cluster(run)


def test_an_abort_does_not_wait_for_a_dead_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "RELEASE_S", 0.1)

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            txn = await kv.transaction().begin()
            await txn.lock(A)
            cluster.everywhere(1, drop)
            async with asyncio.timeout(1):
                await txn.abort()

    with_txn_cluster(run)


def test_locks_follow_a_shard_that_moves() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.lock(A)
                cluster.move(0, 2)
                await txn.lock(A, key_at(0, 1))
                await txn.put(A, b"moved")
            assert cluster.value(A) == b"moved"
            assert cluster.locks() == 0
            (commit,) = [command for command in commands(cluster, TXN_COMMIT) if command[1] == txn.txid][-1:]
            assert [part[0] for part in commit[2]] == [0]

    with_txn_cluster(run)
