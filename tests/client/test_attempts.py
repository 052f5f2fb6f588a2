"""`run_transaction` and `txn_status`: running again, never starving, never twice; who is asked what became of one."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from raftkv.client import attempts, replicas
from raftkv.client.kv import RaftKV, Value
from raftkv.client.transactions import Transaction
from raftkv.client.txn_status import TxnStatus
from raftkv.machines import coordinator as coord
from raftkv.machines.txn_commands import TXN_DECIDE, TXN_LOCK, make_txid, txid_ms
from raftkv.protocol import errors
from raftkv.protocol.errors import Aborted, BadRequest, CommitUnknown, Conflict, Expired, Timeout, Unavailable
from raftkv.protocol.messages import ReadOp, Verb
from tests.client.fakes import Asked, apply_and_drop, drop, on_verb
from tests.client.txn_fakes import COORDINATORS, TxnCluster, key_at, put_all, with_txn_cluster

A, B, C = key_at(0), key_at(2), key_at(1)


def client(cluster: TxnCluster, timeout_s: float = 4.0, seed: int = 1) -> RaftKV:
    return RaftKV(cluster.addresses, timeout_s=timeout_s, rng=random.Random(seed))


async def number(txn: Transaction, key: bytes) -> int:
    found = await txn.get(key)
    return 0 if found is None else int(found.value)


# Running again ----------------------------------------------------------------------------------------------


def test_its_result_is_returned_once_it_is_committed() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:

            async def body(txn: Transaction) -> str:
                await txn.put(A, b"1")
                assert cluster.value(A) is None
                return "result"

            assert await kv.run_transaction(body) == "result"
            assert cluster.value(A) == b"1"

    with_txn_cluster(run)


@pytest.mark.parametrize("far", [False, True])
def test_counters_lose_no_increment(far: bool) -> None:
    async def run(cluster: TxnCluster) -> None:
        other = C if far else B

        async def increment(txn: Transaction) -> None:
            a, b = await number(txn, A), await number(txn, other)
            await asyncio.sleep(0.001)
            await txn.put(A, b"%d" % (a + 1))
            await txn.put(other, b"%d" % (b + 2))

        async def work(kv: RaftKV) -> None:
            for _ in range(5):
                await kv.run_transaction(increment)

        clients = [client(cluster, timeout_s=20, seed=seed) for seed in range(8)]
        await asyncio.gather(*(work(kv) for kv in clients))
        for kv in clients:
            await kv.close()
        assert (cluster.value(A), cluster.value(other)) == (b"40", b"80")
        assert cluster.locks() == 0

    with_txn_cluster(run)


def test_against_an_endless_stream_of_writes_it_gets_its_turn_by_locks() -> None:
    """Each optimistic attempt loses; then the keys of the last one are locked, by shard and key, with the first age."""

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv, client(cluster, seed=2, timeout_s=0.2) as rival:
            await put_all(kv, {A: b"0", B: b"0", C: b"0"})
            tries: list[bytes] = []

            async def body(txn: Transaction) -> None:
                tries.append(txn.txid)
                values = [await number(txn, key) for key in (C, B, A)]
                try:
                    await rival.put(A, b"%d" % len(tries))
                except errors.Locked:
                    pass
                await txn.put(C, b"%d" % sum(values))

            await kv.run_transaction(body)
            assert len(tries) == len(set(tries)) == attempts.OPTIMISTIC_MAX + 1
            locked = [command for command in cluster.applied if command[0] == TXN_LOCK]
            assert [command[3:] for command in locked] == [[0, [A]], [1, [C]], [2, [B]]]
            assert {command[1] for command in locked} == {tries[-1]}
            assert len({command[2] for command in locked}) == 1
            assert cluster.value(C) == b"3"
            assert cluster.locks() == 0

    with_txn_cluster(run)


def test_a_read_only_one_turns_to_locks_too() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv, client(cluster, seed=2, timeout_s=0.2) as rival:
            count = 0

            async def body(txn: Transaction) -> tuple[int, int]:
                nonlocal count
                count += 1
                a = await number(txn, A)
                try:
                    await rival.put(A, b"%d" % count)
                    await rival.put(C, b"%d" % count)
                except errors.Locked:
                    pass
                return a, await number(txn, C)

            assert await kv.run_transaction(body) == (3, 3)
            assert len([asked for asked in cluster.asked(Verb.READ) if asked.body[2] == ReadOp.CHECK]) >= 3
            assert cluster.locks() == 0

    with_txn_cluster(run)


def test_it_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "ATTEMPTS_MAX", 4)
    monkeypatch.setattr(attempts, "PAUSE_S_MIN", 0.001)

    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            count = 0

            async def body(txn: Transaction) -> None:
                nonlocal count
                count += 1
                raise Conflict([b"mine"])

            with pytest.raises(Conflict, match="mine"):
                await kv.run_transaction(body)
            assert count == 4

    with_txn_cluster(run)


def test_an_unknown_outcome_is_never_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "SILENT_S", 0.05)

    async def run(cluster: TxnCluster) -> None:
        cluster.everywhere(1, on_verb(Verb.TXN, apply_and_drop))
        async with client(cluster) as kv:
            await kv.get(A)
            kv._cluster.timeout_s = 0.4
            count = 0

            async def body(txn: Transaction) -> None:
                nonlocal count
                count += 1
                await txn.put(A, b"1")

            with pytest.raises(CommitUnknown):
                await kv.run_transaction(body)
            assert count == 1

    with_txn_cluster(run, with_coordinators=False)


def test_what_its_body_raises_aborts_it() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:

            async def body(txn: Transaction) -> None:
                await txn.lock(A)
                raise KeyError("mine")

            with pytest.raises(KeyError):
                await kv.run_transaction(body)
            assert cluster.locks() == 0

            async def commits_itself(txn: Transaction) -> None:
                await txn.put(A, b"once")
                await txn.commit()
                raise Conflict([b"of something else"])

            with pytest.raises(Conflict, match="of something else"):
                await kv.run_transaction(commits_itself)
            assert len([command for command in cluster.applied if command[0] == coord.BEGIN]) == 0
            assert cluster.value(A) == b"once"

            async def gives_up(txn: Transaction) -> str:
                await txn.put(A, b"no")
                await txn.abort()
                return "nothing done"

            assert await kv.run_transaction(gives_up) == "nothing done"
            assert cluster.value(A) == b"once"

    with_txn_cluster(run)


def test_an_old_map_time_is_renewed_once() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            await kv.get(A)
            cluster.tick(4_000_000)
            txids: list[bytes] = []

            async def body(txn: Transaction) -> None:
                txids.append(txn.txid)
                await txn.put(A, b"1")

            await kv.run_transaction(body)
            assert [txid_ms(txid) == cluster.map_time_ms for txid in txids] == [False, True]

            async def ever_older(txn: Transaction) -> None:
                txids.append(txn.txid)
                cluster.tick(4_000_000)
                await txn.put(A, b"2")

            del txids[:]
            with pytest.raises(Aborted, match="too old"):
                await kv.run_transaction(ever_older)
            assert len(txids) == 2

    with_txn_cluster(run)


# Status -----------------------------------------------------------------------------------------------------


def test_the_status_of_every_kind() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            for far in (False, True):
                async with kv.transaction() as txn:
                    assert await kv.txn_status(txn.txid) is TxnStatus.UNKNOWN  # nobody has heard of it yet
                    await txn.lock(B)
                    assert await kv.txn_status(txn.txid) is TxnStatus.PENDING
                    await txn.put(A, b"1")
                    await txn.put(C if far else B, b"1")
                assert await kv.txn_status(txn.txid) is TxnStatus.COMMITTED
                lost = kv.transaction()
                with pytest.raises(Conflict):
                    async with lost:
                        await lost.get(A)
                        await lost.put(C if far else B, b"1")
                        await kv.put(A, b"2")
                assert await kv.txn_status(lost.txid) is TxnStatus.ABORTED
            begun = make_txid(cluster.map_time_ms, b"rrandom8")
            cluster.records.run_one([coord.BEGIN, begun, bytes(16), [0]])
            assert await kv.txn_status(begun) is TxnStatus.PENDING
            assert await kv.txn_status(make_txid(1_000, b"rrandom8")) is TxnStatus.EXPIRED
            assert await kv.txn_status(make_txid(cluster.map_time_ms, b"nobody's")) is TxnStatus.UNKNOWN
            for bad in (b"", b"short", b"\xff" * 16, "0" * 16):
                with pytest.raises(BadRequest, match="a transaction id is 16 bytes"):
                    await kv.txn_status(bad)  # type: ignore[arg-type]

    with_txn_cluster(run)


def test_what_is_resolved_stays_so() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            for far in (False, True):
                async with kv.transaction() as txn:
                    await txn.put(A, b"1")
                    await txn.put(C if far else B, b"1")
                assert await kv.resolve_txn(txn.txid) is TxnStatus.COMMITTED
                given_up = kv.transaction()
                with pytest.raises(Aborted):
                    async with given_up:
                        await given_up.put(A, b"2")
                        await given_up.put(C if far else B, b"2")
                        assert await kv.resolve_txn(given_up.txid) is TxnStatus.ABORTED
                assert await kv.txn_status(given_up.txid) is TxnStatus.ABORTED
            assert (await kv.get(A)) == Value(b"1", 2)
            with pytest.raises(Expired):
                await kv.resolve_txn(make_txid(1_000, b"rrandom8"))
            with pytest.raises(BadRequest, match="a transaction id is 16 bytes"):
                await kv.resolve_txn(b"short")

    with_txn_cluster(run)


def test_without_coordinators_nothing_is_resolved() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            with pytest.raises(Unavailable, match="no coordinator is registered"):
                await kv.resolve_txn(make_txid(cluster.map_time_ms, b"rrandom8"))

    with_txn_cluster(run, with_coordinators=False)


def test_without_coordinators_the_shards_are_asked() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.put(C, b"1")
            assert await kv.txn_status(txn.txid) is TxnStatus.COMMITTED
            asked = [request for request in cluster.asked(Verb.READ) if request.body[2] == ReadOp.OUTCOME]
            assert {request.body[3] for request in asked} == {0, 1, 2, 3}
            aborted = make_txid(cluster.map_time_ms, b"rrandom8")
            cluster.machines[1].run_one([TXN_DECIDE, aborted, False, [2]])
            assert await kv.txn_status(aborted) is TxnStatus.ABORTED

    with_txn_cluster(run, with_coordinators=False)


def test_a_commit_that_one_shard_shows_is_known_though_others_are_silent() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            async with kv.transaction() as txn:
                await txn.put(C, b"1")
            cluster.everywhere(1, drop)
            kv._cluster.timeout_s = 0.5
            assert await kv.txn_status(txn.txid) is TxnStatus.COMMITTED
            with pytest.raises(Timeout, match="outcome of a transaction in shard 0"):
                await kv.txn_status(make_txid(cluster.map_time_ms, b"rrandom8"))

    with_txn_cluster(run, with_coordinators=False)


def test_replies_that_make_no_sense() -> None:
    async def run(cluster: TxnCluster) -> None:
        replies: list[Any] = [None, [], [99], ["x"], 5]

        def nonsense(asked: Asked) -> bool:
            asked.reply(replies.pop())
            return True

        cluster.everywhere(COORDINATORS, on_verb(Verb.COORDINATE, nonsense))
        async with client(cluster) as kv:
            while replies:
                with pytest.raises(errors.ServerError, match="can't be understood"):
                    await kv.txn_status(make_txid(cluster.map_time_ms, b"rrandom8"))

    with_txn_cluster(run)


def test_coordinators_that_moved_are_found() -> None:
    async def run(cluster: TxnCluster) -> None:
        async with client(cluster) as kv:
            txid = make_txid(cluster.map_time_ms, b"rrandom8")
            assert await kv.txn_status(txid) is TxnStatus.UNKNOWN
            for server in cluster.coordinators:
                server.stop()
                server.port = 0
                await server.start()
            assert await kv.txn_status(txid) is TxnStatus.UNKNOWN

    with_txn_cluster(run)


@pytest.mark.parametrize("listed", [5, [5], [[1]], [["x", []]], [[9, "h:1"]], [[9, [5]]]])
def test_a_list_of_coordinators_that_makes_no_sense(listed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(cluster: TxnCluster) -> None:
        monkeypatch.setattr(cluster, "config_extras", lambda: [0, listed])
        async with client(cluster) as kv:
            with pytest.raises(errors.ServerError):
                await kv.get(A)

    with_txn_cluster(run)
