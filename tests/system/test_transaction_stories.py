"""The four stories of transactions over several groups, on real processes.

What was asked of the systems that this one grew out of: several puts are one; of two that conflict one wins; a
coordinator that dies holds nobody up; whatever machine dies comes back into a state that makes sense.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raftkv.client.kv import RaftKV
from raftkv.client.sync import SyncRaftKV
from raftkv.client.sync_transactions import SyncTransaction
from raftkv.client.txn_status import TxnStatus
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.slots import shard_of
from raftkv.protocol.errors import Conflict, OutcomeUnknown, RaftKVError
from tests.system.cluster import Cluster, Process, running

ACCOUNTS = 6
BALANCE = 100
LOCKED_TRANSACTIONS = 500
KEYS_EACH = 10
HANGS_AFTER_S = 20.0
"""Far beyond what the test prints: the bar is for people to judge, on a machine that is theirs."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def keys_at(cluster: Cluster, gid: int, count: int, prefix: bytes = b"k") -> list[bytes]:
    with cluster.admin() as admin:
        latest: ShardMap = admin.query()
    numbers = (prefix + b"%d" % number for number in range(10_000))
    return [key for key in numbers if latest.owner(shard_of(key, latest.shards)) == gid][:count]


def test_three_puts_over_two_groups_commit_together(folder: Path) -> None:
    with running(Cluster(folder, groups=2, replicas=1, controllers=1, coordinators=3)) as cluster:
        first, second = keys_at(cluster, 1, 2)
        third = keys_at(cluster, 2, 1)[0]
        with cluster.client() as kv, cluster.client() as other:
            with kv.transaction() as txn:
                txn.put(first, b"1")
                txn.put(second, b"2")
                txn.put(third, b"3")
                assert [other.get(key) for key in (first, second, third)] == [None] * 3
            found = [other.get(key) for key in (first, second, third)]
            assert [value.value for value in found if value is not None] == [b"1", b"2", b"3"]
            assert kv.txn_status(txn.txid) is TxnStatus.COMMITTED


def test_of_two_that_conflict_exactly_one_commits(folder: Path) -> None:
    with running(Cluster(folder, groups=2, replicas=1, controllers=1, coordinators=1)) as cluster:
        one, two = keys_at(cluster, 1, 1)[0], keys_at(cluster, 2, 1)[0]
        for turn in range(10):
            ends = both_write(cluster, one, two, turn)
            assert sorted(ends) == ["Conflict", "committed"], ends
            with cluster.client() as kv:
                values = {value.value for key in (one, two) if (value := kv.get(key)) is not None}
            assert values == {b"%d of %d" % (ends.index("committed"), turn)}


def both_write(cluster: Cluster, one: bytes, two: bytes, turn: int) -> list[str]:
    """Two clients read both keys, and then write both of them at the same time."""
    barrier = threading.Barrier(2)
    ends = ["", ""]

    def client(number: int) -> None:
        with cluster.client() as kv:
            txn = kv.transaction().begin()
            for key in (one, two):
                txn.get(key)
                txn.put(key, b"%d of %d" % (number, turn))
            barrier.wait(30)
            try:
                txn.commit()
                ends[number] = "committed"
            except RaftKVError as error:
                ends[number] = type(error).__name__

    threads = [threading.Thread(target=client, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


def test_the_next_leader_clears_the_locks_of_a_coordinator_that_died(folder: Path) -> None:
    cluster = Cluster(folder, groups=2, controllers=1, coordinators=3, shards=2)
    with running(cluster, environment=STOPS_BEFORE_IT_DECIDES):
        keys = [*keys_at(cluster, 1, 1), *keys_at(cluster, 2, 1)]
        told = asyncio.run(kill_the_one_that_holds_locks(cluster, [keys]))
        assert set(told) <= {"Aborted", "CommitUnknown"}
        with cluster.client() as kv:
            assert [kv.get(key) for key in keys] == [None, None]
            kv.put(keys[0], b"free")


@pytest.mark.long
def test_thousands_of_locks_of_a_dead_coordinator_are_cleared(folder: Path) -> None:
    cluster = Cluster(folder, groups=2, controllers=1, coordinators=3, shards=2)
    with running(cluster, environment=STOPS_BEFORE_IT_DECIDES):
        half = KEYS_EACH // 2
        ours, theirs = (keys_at(cluster, gid, LOCKED_TRANSACTIONS * half, b"t") for gid in (1, 2))
        sets = [
            [*ours[half * n : half * (n + 1)], *theirs[half * n : half * (n + 1)]] for n in range(LOCKED_TRANSACTIONS)
        ]
        told = asyncio.run(kill_the_one_that_holds_locks(cluster, sets))
        assert set(told) <= {"Aborted", "CommitUnknown"}


STOPS_BEFORE_IT_DECIDES = {"RAFTKV_FAILPOINTS": "coordinator got all votes=stall:120"}


async def kill_the_one_that_holds_locks(cluster: Cluster, sets: Sequence[Sequence[bytes]]) -> list[str]:
    """Have each set of keys be written by a transaction of its own; when all of them are prepared, kill the
    coordinators' leader, and wait until nothing is. What their clients are told."""
    async with RaftKV(cluster.controller_addresses, timeout_s=60) as kv:
        commits = [asyncio.create_task(commit(kv, keys)) for keys in sets]
        await asyncio.to_thread(wait_prepared, cluster, at_least=len(sets))
        leader = await asyncio.to_thread(cluster.leader_of, cluster.coordinators, "the coordinators")
        leader.kill()
        killed_s = time.monotonic()
        await asyncio.to_thread(cluster.leader_of, cluster.coordinators, "the coordinators")
        elected_s = time.monotonic()
        await asyncio.to_thread(wait_prepared, cluster, at_most=0)
        cleared_s = time.monotonic()
        locks = sum(map(len, sets))
        print(f"{locks} locks: elected after {elected_s - killed_s:.2f} s, clear {cleared_s - elected_s:.2f} s later")
        return list(await asyncio.gather(*commits))


async def commit(kv: RaftKV, keys: Sequence[bytes]) -> str:
    txn = await kv.transaction().begin()
    for key in keys:
        await txn.put(key, b"v")
    try:
        await txn.commit()
    except RaftKVError as error:
        return type(error).__name__
    return "committed"


def wait_prepared(cluster: Cluster, *, at_least: int = 0, at_most: int = 1_000_000) -> None:
    """Until so many transactions are prepared at the leader of every group, which has one shard."""
    deadline_s = time.monotonic() + HANGS_AFTER_S
    leaders = [cluster.leader(gid) for gid in cluster.groups]
    while True:
        counts = [prepared_at(leader) for leader in leaders]
        if all(at_least <= count <= at_most for count in counts):
            return
        assert time.monotonic() < deadline_s, f"{counts} transactions are prepared"
        time.sleep(0.02)


def prepared_at(process: Process) -> int:
    return int(process.status()["prepared"])


@pytest.mark.long
def test_any_machine_that_crashes_comes_back_into_a_state_that_makes_sense(folder: Path) -> None:
    """Money is handed on all the while that one machine after the other dies and comes back from its log."""
    with running(Cluster(folder, groups=2, controllers=3, coordinators=3)) as cluster:
        tellers = [Teller(cluster, number) for number in range(3)]
        for teller in tellers:
            teller.start()
        for process in cluster.processes:
            process.kill()
            time.sleep(0.3)
            process.start()
            process.wait_ready()
        for teller in tellers:
            teller.finish()
        with cluster.client(timeout_s=60) as kv:
            assert sum(balances(kv)) == ACCOUNTS * BALANCE
            assert sum(teller.committed for teller in tellers) > 10
        print(f"{sum(teller.committed for teller in tellers)} transfers, of unknown outcome "
              f"{sum(teller.unknown for teller in tellers)}")  # fmt: skip


class Teller(threading.Thread):
    """Hands money on, and now and then counts it all."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(name=f"teller-{number}")
        self.cluster = cluster
        self.number = number
        self.committed = 0
        self.unknown = 0
        self.failure: BaseException | None = None
        self._stop_asked = threading.Event()

    def run(self) -> None:
        try:
            with self.cluster.client(timeout_s=60) as kv:
                for step in range(self.number, 1_000_000):
                    if self._stop_asked.is_set():
                        return
                    self._act(kv, step)
        except BaseException as error:
            self.failure = error

    def _act(self, kv: SyncRaftKV, step: int) -> None:
        giver, taker = step % ACCOUNTS, (step * 5 + 1) % ACCOUNTS
        try:
            if step % 5 == 0:
                assert sum(balances(kv)) == ACCOUNTS * BALANCE
            elif giver != taker:
                kv.run_transaction(lambda txn: hand_on(txn, giver, taker))
                self.committed += 1
        except OutcomeUnknown:
            self.unknown += 1
        except Conflict:
            pass  # thirty-two times in a row

    def finish(self) -> None:
        self._stop_asked.set()
        self.join(90)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.failure is not None:
            raise self.failure


def balance(txn: SyncTransaction, number: int) -> int:
    found = txn.get(b"account-%d" % number)
    return BALANCE if found is None else int(found.value)


def balances(kv: SyncRaftKV) -> list[int]:
    result: list[int] = kv.run_transaction(lambda txn: [balance(txn, number) for number in range(ACCOUNTS)])
    return result


def hand_on(txn: SyncTransaction, giver: int, taker: int) -> Any:
    has, gets = balance(txn, giver), balance(txn, taker)
    txn.put(b"account-%d" % giver, b"%d" % (has - 1))
    txn.put(b"account-%d" % taker, b"%d" % (gets + 1))
