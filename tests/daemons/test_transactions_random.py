"""Clients that read lists, append to them and commit, while processes die, links break and shards move.

At the end: one outcome of each transaction, that which its client was told; no lock is left; and what was read and
appended is strictly serializable.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgpack
import pytest

from raftkv.daemons.failpoints import NAMES
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import TXN_COMMIT, TXN_LOCK
from raftkv.protocol.errors import Aborted, Conflict, RaftKVError, WrongGroup
from raftkv.protocol.transactions import CoordinateOp, State, decode_state_reply
from raftkv.sim.check.history import Kind, Operation, Status, Step
from raftkv.sim.check.transactions import check_transactions
from raftkv.sim.cluster import shards_of
from raftkv.sim.process import DaemonProcess
from tests.acceptance.kv_rig import seeds
from tests.daemons.transaction_rig import AGAIN, TxnClient, TxnRig

CLIENTS = 6
KEYS = 6
ROUNDS = 25
PATIENCE_S = 6.0
NAME_BYTES = 16


class ListClient(TxnClient):
    """One transaction after the other, until it is told to stop."""

    def __init__(self, rig: TxnRig, keys: list[bytes], hits: Counter[str]) -> None:
        super().__init__(rig)
        self.keys = keys
        self.hits = hits
        self.history: list[Operation] = []
        self.stopping = False

    async def run(self) -> None:
        while not self.stopping:
            await self._transaction()
            await asyncio.sleep(self.rng.random() * 0.2)

    async def _transaction(self) -> None:
        rng = self.rng
        began_ns = int(self.rig.now * 1e9)
        keys = sorted(rng.sample(self.keys, rng.randint(1, 3)))
        if rng.random() < 0.4:  # all of one shard
            keys = [key for key in keys if shard_of(key, self.rig.shards) == shard_of(keys[0], self.rig.shards)]
        txid = self.txid()
        if rng.random() < 0.1:
            await self._lock(txid, keys)
        try:
            found = {key: await self.clerk.kv.get(key) for key in keys}
        except RaftKVError:
            self.hits["not read"] += 1
            return
        lists: dict[bytes, tuple[list[bytes], int]] = {}
        for key, value in found.items():
            assert value is not None
            lists[key] = (msgpack.unpackb(value.value), value.version)
        writes = [key for key in keys if rng.random() < 0.7]
        parts = self.rig.part(
            {key: msgpack.packb([*lists[key][0], txid]) for key in writes}, {key: lists[key][1] for key in keys}
        )
        committed = await self._commit(txid, parts)
        self.hits[f"{'one shard' if len(parts) == 1 else 'several'}: {committed}"] += 1
        steps: list[Step] = []
        for key in keys:
            steps.append(Step.read(key, lists[key][0]))
            if key in writes:
                steps.append(Step.append(key, txid))
        status = {True: Status.OK, False: Status.FAIL, None: Status.UNKNOWN}[committed]
        ended_ns = None if committed is None else int(self.rig.now * 1e9)
        self.history.append(Operation(txid.hex(), Kind.TXN, b"", began_ns, ended_ns, status, steps=tuple(steps)))

    async def _lock(self, txid: bytes, keys: list[bytes]) -> None:
        """As many as there are to be had. Nobody beats for them, and who gives up leaves them behind."""
        for key in keys:
            shard = shard_of(key, self.rig.shards)
            try:
                await self.txn(self.rig.group_of_shard(shard).gid, [TXN_LOCK, txid, txid, shard, [key]])
                self.hits["locked"] += 1
            except RaftKVError as error:
                self.hits[f"not locked: {type(error).__name__}"] += 1

    async def _commit(self, txid: bytes, parts: list[list[Any]]) -> bool | None:
        """Some attempts, then a question, until it is certain; None: the client lost its interest."""
        if len(parts) == 1 and self.rng.random() < 0.7:
            gid = self.rig.group_of_shard(parts[0][0]).gid
            try:
                async with asyncio.timeout(self._patience_s()):
                    await self.txn(gid, [TXN_COMMIT, txid, parts])
                return True
            except (Conflict, Aborted):
                return False
            except WrongGroup:
                pass  # certainly not done: the coordinators find the shard
            except (*AGAIN, TimeoutError):
                return await self._resolve(txid, parts)
        deadline_s = self.rig.now + PATIENCE_S
        while self.rig.now < deadline_s:
            try:
                async with asyncio.timeout(self._patience_s()):
                    answer = await self.coordinate([CoordinateOp.COMMIT, txid, parts])
                return decode_state_reply(answer) is State.COMMITTED
            except TimeoutError:
                break
            except (Conflict, Aborted):
                return False
            except AGAIN:
                self.hits["again"] += 1
                await asyncio.sleep(self.rng.random() * 0.3)
        return await self._resolve(txid, parts)

    def _patience_s(self) -> float:
        """Sometimes it doesn't wait for the answer."""
        return self.rng.random() * 0.02 if self.rng.random() < 0.15 else PATIENCE_S

    async def _resolve(self, txid: bytes, parts: list[list[Any]]) -> bool | None:
        self.hits["resolved"] += 1
        if self.rng.random() < 0.2:
            return None
        return await self.resolve(txid, [part[0] for part in parts]) is State.COMMITTED


def hurt(rig: TxnRig, hits: Counter[str]) -> None:
    """Something goes wrong for a while."""
    rng, scheduler = rig.rng, rig.scheduler
    groups = [rig.coordinators, rig.coordinators, *rig.cluster.serving_groups]
    group = rng.choice(groups)
    victim = rng.choice(group.processes)
    leader = group.leader()
    if leader is not None and rng.random() < 0.6:
        victim = leader
    kind = rng.choice(["kill", "kill", "power", "pause", "cut", "all", "move", "move", "step", "step", "step"])
    hits[kind] += 1
    later_s = rng.uniform(0.1, 2.5)

    def revive(process: DaemonProcess) -> None:
        process.resume()
        if not process.running:
            process.start()

    if kind == "kill":
        victim.kill()
    elif kind == "power":
        victim.lose_power()
    elif kind == "pause":
        victim.pause()
    elif kind == "step":
        ours = "coordinator" if group is rig.coordinators else "group"
        rig.crash_at(group, rng.choice([name for name in NAMES if name.startswith(ours)]))
    elif kind == "all":
        for process in group.processes:
            process.lose_power()
            scheduler.after(later_s, revive, process)
    elif kind == "cut":
        rig.cut([victim.host], [host for host in rig.cluster.all_hosts if host != victim.host])
        scheduler.after(later_s, rig.heal)
    else:
        shard = rng.randrange(rig.shards)
        gid = rng.choice(rig.cluster.serving_groups).gid
        clerk = rig.clerks[0]
        clerk.spawn(clerk.controllers.move(shard, gid))
    scheduler.after(later_s, revive, victim)


def run(seed: int) -> Counter[str]:
    hits: Counter[str] = Counter()
    with TxnRig(seed, shards=4) as rig:
        keys = rig.keys(KEYS)
        clients = [ListClient(rig, keys, hits) for _ in range(CLIENTS)]
        for key in keys:
            clients[0].do(clients[0].clerk.kv.put(key, msgpack.packb([])))
        tasks = [client.clerk.spawn(client.run()) for client in clients]
        for _ in range(ROUNDS):
            rig.sleep(rig.rng.uniform(0.2, 1.2))
            hurt(rig, hits)
        rig.sleep(3.0)
        rig.heal()
        rig.start_dead()
        for client in clients:
            client.stopping = True
        rig.finish_all(tasks, 60.0)
        rig.wait_clean(60.0)
        rig.wait_until(lambda: not explicit_locks(rig), "no explicit lock is left", 30.0)
        rig.wait_equal(30.0)
        check(rig, clients, keys)
    return hits


def explicit_locks(rig: TxnRig) -> int:
    return sum(shards_of(rig.leader(group)).explicit_locks for group in rig.cluster.serving_groups)


def check(rig: TxnRig, clients: list[ListClient], keys: list[bytes]) -> None:
    last = {}
    for key in keys:
        value = clients[0].do(clients[0].clerk.kv.get(key))
        last[key] = msgpack.unpackb(value.value)
        assert len(set(last[key])) == len(last[key]), "applied twice"
    history = [operation for client in clients for operation in client.history]
    for operation in history:
        txid = bytes.fromhex(operation.client)
        present = {txid in last[step.key] for step in operation.steps if step.is_append}
        assert len(present) <= 1, f"half a transaction: {operation}"
        if present and operation.status is not Status.UNKNOWN:
            assert present == {operation.status is Status.OK}, f"not what its client was told: {operation}"
    now_ns = int(rig.now * 1e9)
    steps = tuple(Step.read(key, entries) for key, entries in last.items())
    history.append(Operation("last", Kind.TXN, b"", now_ns, now_ns + 1, Status.OK, steps=steps))
    verdict = check_transactions(history)
    assert verdict.passed, f"seed {rig.seed}: {verdict}"


@seeds(2, 20)
def test_whatever_goes_wrong(seed: int) -> None:
    hits = run(seed)
    assert hits["several: True"] > 10 and hits["one shard: True"] > 10, hits


@pytest.mark.long
def test_the_rare_things_happen() -> None:
    hits: Counter[str] = Counter()
    for seed in range(1_000, 1_010):
        hits += run(seed)
    assert all(hits[name] for name in ("several: False", "again", "resolved", "several: None")), hits
