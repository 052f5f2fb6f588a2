"""Random faults under concurrent transactions: each ends as its client was told, and all of them are serializable.

Requests and replies are lost, requests are carried out long after their client gave up, connections are reset, leaders
change, the coordinators' leader dies in the middle of a commit, shards move. Clients read lists, append to them, take
locks. In the end every transaction is there in all of its keys or in none, as told, and the history passes the checker.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import msgpack
import pytest

from raftkv.client import locking, replicas, retry
from raftkv.client.kv import RaftKV
from raftkv.client.transactions import Transaction
from raftkv.protocol import errors
from raftkv.protocol.errors import OutcomeUnknown, RaftKVError
from raftkv.protocol.messages import Verb
from raftkv.sim.check.history import Kind, Operation, Status, Step
from raftkv.sim.check.transactions import check_transactions
from tests.client.fakes import Asked
from tests.client.txn_fakes import COORDINATORS, SHARDS, Died, TxnCluster, key_at, with_txn_cluster

KEYS = [key_at(shard) for shard in range(SHARDS)] + [key_at(0, 1), key_at(1, 1)]
WORKERS = 6
EACH = 10


class Chaos:
    """A rule for every server, and a task that moves leaders and shards."""

    def __init__(self, cluster: TxnCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.on = True
        self.hits: Counter[str] = Counter()

    def __call__(self, asked: Asked) -> bool:
        if not self.on or asked.verb == Verb.CONFIG or self.rng.random() < 0.75:
            return False
        faults = [self.reset, self.refuse]
        if asked.verb in (Verb.TXN, Verb.COORDINATE):
            faults += [self.lose, self.lose_the_reply, self.apply_late, self.apply_and_reset]
        if asked.verb == Verb.COORDINATE:
            faults += [self.die, self.die]
        fault = self.rng.choice(faults)
        self.hits[fault.__name__] += 1
        fault(asked)
        return True

    def apply(self, asked: Asked) -> None:
        """Carry it out without a word, if this server may."""
        try:
            asked.server._body(asked)
        except RaftKVError:
            pass

    def lose(self, asked: Asked) -> None:
        """Nothing happens, ever."""

    def lose_the_reply(self, asked: Asked) -> None:
        self.apply(asked)

    def apply_late(self, asked: Asked) -> None:
        asyncio.get_running_loop().call_later(self.rng.uniform(0.05, 0.9), self.apply, asked)

    def reset(self, asked: Asked) -> None:
        asked.connection.abort()

    def apply_and_reset(self, asked: Asked) -> None:
        self.apply(asked)
        asked.connection.abort()

    def die(self, asked: Asked) -> None:
        self.cluster.dies_at = self.rng.choice(["begun", "prepared", "decided"])
        try:
            self.apply(asked)
        except Died:
            self.hits["died"] += 1
            self.cluster.take_over()
        self.cluster.dies_at = ""
        asked.connection.abort()

    def refuse(self, asked: Asked) -> None:
        refusals: list[RaftKVError] = [
            errors.Busy("full"),
            errors.NotLeader(None),
            errors.NotLeader(self.rng.choice(self.cluster.servers).address),
            errors.Unavailable("no quorum"),
        ]
        if asked.verb != Verb.COORDINATE:
            refusals += [errors.WrongGroup(1, -1), errors.WrongGroup(self.rng.randrange(3), self.rng.choice([1, 2]))]
        asked.refuse(self.rng.choice(refusals))

    async def move_about(self) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(0.05, 0.2))
            gid = self.rng.choice([*self.cluster.gids, COORDINATORS])
            servers = self.cluster.coordinators if gid == COORDINATORS else self.cluster.groups[gid]
            self.cluster.leaders[gid] = self.rng.choice([*servers, *servers, None])
            if self.rng.random() < 0.3:
                shard = self.rng.randrange(SHARDS)
                self.cluster.move(shard, 3 - self.cluster.holder(shard))
            self.cluster.tick(self.rng.choice([10, 500]))


class Client:
    """One worker and what it knows in the end."""

    def __init__(self, kv: RaftKV, name: int, rng: random.Random, history: list[Operation]) -> None:
        self.kv = kv
        self.name = name
        self.rng = rng
        self.history = history

    async def work(self) -> None:
        for n in range(EACH):
            token = b"%d.%d" % (self.name, n)
            began, steps = time.monotonic_ns(), list[Step]()
            try:
                await self.one(token, steps)
                status = Status.OK
            except OutcomeUnknown:
                status = Status.UNKNOWN
            except RaftKVError:
                status = Status.FAIL
            ended = None if status is Status.UNKNOWN else time.monotonic_ns()
            client = f"{self.name}.{n}"
            self.history.append(Operation(client, Kind.TXN, b"", began, ended, status, steps=tuple(steps)))

    async def one(self, token: bytes, steps: list[Step]) -> None:
        keys = self.rng.sample(KEYS, self.rng.randint(1, 3))
        writes = {key for key in keys if self.rng.random() < 0.7}
        locks = self.rng.random() < 0.2

        async def body(txn: Transaction) -> None:
            steps.clear()
            if locks:
                await txn.lock(*keys)
            for key in keys:
                found = await txn.get(key)
                entries: list[bytes] = [] if found is None else msgpack.unpackb(found.value)
                steps.append(Step.read(key, entries))
                if key in writes:
                    await txn.put(key, msgpack.packb([*entries, token]))
                    steps.append(Step.append(key, token))

        if self.rng.random() < 0.5:
            await self.kv.run_transaction(body)
        else:
            async with self.kv.transaction() as txn:
                await body(txn)


def run_seed(seed: int) -> Counter[str]:
    rng = random.Random(seed)
    history: list[Operation] = []
    hits: Counter[str] = Counter()

    async def run(cluster: TxnCluster) -> None:
        chaos = Chaos(cluster, rng)
        for gid in (0, *cluster.gids, COORDINATORS):
            cluster.everywhere(gid, chaos)
        moving = asyncio.get_running_loop().create_task(chaos.move_about())
        clients = [RaftKV(cluster.addresses, timeout_s=0.8, rng=random.Random(seed * 100 + n)) for n in range(WORKERS)]
        await asyncio.gather(*(Client(kv, n, rng, history).work() for n, kv in enumerate(clients)))
        assert not any(kv.unsettled_writes() for kv in clients)
        chaos.on = False
        moving.cancel()
        await asyncio.gather(moving, *(kv.close() for kv in clients), return_exceptions=True)
        await asyncio.sleep(1.0)  # what was late has arrived
        cluster.take_over()
        cluster.tick(60_000)
        assert cluster.locks() == 0
        lists = {key: msgpack.unpackb(cluster.value(key) or b"\x90") for key in KEYS}
        for operation in history:
            token = operation.client.encode()
            keys = [step.key for step in operation.steps if step.element is not None]
            present = {token in lists[key] for key in keys}
            assert len(present) <= 1, f"seed {seed}: half of {operation}"
            if keys and operation.status is not Status.UNKNOWN:
                told = operation.status is Status.OK
                assert present == {told}, f"seed {seed}: not what its client was told: {operation}"
        for key, entries in lists.items():
            assert len(entries) == len(set(entries)), f"seed {seed}: applied twice {key!r}"
        now = time.monotonic_ns()
        last = tuple(Step.read(key, entries) for key, entries in lists.items())
        final = Operation("last", Kind.TXN, b"", now, now + 1, Status.OK, steps=last)
        verdict = check_transactions([*history, final])
        assert verdict.passed, f"seed {seed}: {verdict}"
        hits.update(chaos.hits)
        hits.update(operation.status.name for operation in history)

    with_txn_cluster(run)
    assert len(history) == WORKERS * EACH
    return hits


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "SILENT_S", 0.1)
    monkeypatch.setattr(locking, "RELEASE_S", 0.2)


@pytest.mark.parametrize("seed", range(2))
def test_each_transaction_ends_as_its_client_was_told(seed: int) -> None:
    hits = run_seed(seed)
    assert hits["OK"] > 5, hits


@pytest.mark.long
def test_without_the_definiteness_rule_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt judged for itself: a refusal after a lost reply then passes for "nothing was written"."""
    rule = retry.judge

    def forgetful(error: RaftKVError, *, is_write: bool, unknown: bool, what: str) -> retry.Verdict:
        return rule(error, is_write=is_write, unknown=False, what=what)

    monkeypatch.setattr(retry, "judge", forgetful)
    with pytest.raises(AssertionError, match="not what its client was told"):
        for seed in range(12):
            run_seed(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 130))
def test_each_transaction_ends_as_its_client_was_told_long(seed: int) -> None:
    run_seed(seed)
