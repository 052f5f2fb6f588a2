"""Clients, coordinators and groups that commit transactions with each other, without a network, a disk or a clock.

One machine stands for each group and one for the coordinators, since a group's replicas are equal. Messages are lost,
repeated and delivered in any order, however late; machines begin again from their rows at any moment; a coordinators'
leader is replaced at any moment, forgets the votes that it has collected, and what it has sent goes on its way. Shards
move between the groups: all rows at once here, the copying has a world of its own. Clients read lists, append to
them, and commit; they ask again, or have the outcome resolved.

At the end everything is delivered. Then: every transaction ended in one way everywhere, that of its client's answer; no
lock is left; and what was read and appended is strictly serializable.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgpack

from raftkv.machines import coordinator as coord
from raftkv.machines.coordinator import CoordinatorMachine, TxnState
from raftkv.machines.kv import KvMachine
from raftkv.machines.participants import COMMITTED, NOT_HERE, YES
from raftkv.machines.results import ABORTED, CONFLICT, OK, WRONG_GROUP
from raftkv.machines.rows import Incarnation, shard_prefix
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.shard_states import ShardEvent, ShardState
from raftkv.machines.shards import Shard
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import (
    TXN_BEAT,
    TXN_COMMIT,
    TXN_DECIDE,
    TXN_LOCK,
    TXN_PREPARE,
    TXN_RESOLVE,
    make_txid,
)
from raftkv.protocol.errors import RaftKVError
from raftkv.sim.check.history import Kind, Operation, Status, Step
from raftkv.sim.check.transactions import check_transactions
from raftkv.storage.engine import Overlay
from tests.machines.support import Replica, addresses_of, config_command, map_time_command

SHARDS = 4
GIDS = (1, 2)
COORDINATORS = 9
KEYS = [next(b"%d" % n for n in range(100) if shard_of(b"%d" % n, SHARDS) == shard) for shard in range(SHARDS)]
KEYS += [next(b"x%d" % n for n in range(100) if shard_of(b"x%d" % n, SHARDS) == 0)]

Message = Callable[[], None]


@dataclass
class Txn:
    """One transaction and what its client knows. `answer` is None until somebody has told the client."""

    txid: bytes
    age: bytes
    began_ns: int
    one_group: bool
    reads: dict[bytes, tuple[list[bytes], int]] = field(default_factory=dict)
    writes: set[bytes] = field(default_factory=set)
    locked: set[bytes] = field(default_factory=set)
    sent: bool = False
    resolving: bool = False
    answer: bool | None = None
    ended_ns: int | None = None

    def parts(self) -> list[list[Any]]:
        shards = sorted({shard_of(key, SHARDS) for key in self.reads})
        return [[shard, *self._part(shard)] for shard in shards]

    def _part(self, shard: int) -> tuple[list[Any], list[Any]]:
        keys = sorted(key for key in self.reads if shard_of(key, SHARDS) == shard)
        return (
            [[key, self.reads[key][1]] for key in keys],
            [[key, msgpack.packb([*self.reads[key][0], self.txid])] for key in keys if key in self.writes],
        )


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.time_ns = 0
        self.map_time_ms = 10_000_000
        self.groups = {gid: Replica(KvMachine(gid)) for gid in GIDS}
        self.num = 0
        self.owners = [1, 1, 2, 2]
        self._configure()
        self.coordinators = Replica(CoordinatorMachine())
        self.term = 1
        self.votes: dict[bytes, tuple[list[list[Any]], set[int], Txn]] = {}
        self.collected: dict[bytes, dict[int, int]] = {}
        self.messages: list[Message] = []
        self.open: list[Txn] = []
        self.all: list[Txn] = []
        self.hits: Counter[str] = Counter()
        self.tick()

    # ---- the map and time

    def _configure(self) -> None:
        self.num += 1
        config = ShardMap(self.num, tuple(self.owners), {gid: tuple(addresses_of(gid)) for gid in GIDS})
        for group in self.groups.values():
            assert group.run_one(config_command(config))[0] == 0

    def tick(self) -> None:
        self.map_time_ms += self.rng.choice([10, 500, 4_000])
        for group in self.groups.values():
            group.run_one(map_time_command(self.map_time_ms))
        self.coordinators.run_one([coord.MAP_TIME, self.map_time_ms])

    def move(self) -> None:
        """A shard goes to the other group, with every row."""
        number = self.rng.randrange(SHARDS)
        source, target = self.owners[number], 3 - self.owners[number]
        self.owners[number] = target
        self._configure()
        old, new = self.groups[source], self.groups[target]
        shards: Any = old.machine._shards
        shard: Shard = shards.here[number]
        meta = shard.meta()._replace(incarnation=Incarnation(self.num, 1), state=ShardState.IMPORTING)
        prefix = shard_prefix(number, meta.incarnation)
        rows = [(key[len(shard.prefix) :], row) for key, row in old.engine.rows.items() if key.startswith(shard.prefix)]
        view = Overlay(new.engine)
        arrived = new.machine._shards.arrive(view, number, ShardEvent.IMPORT_STARTED, meta)
        for suffix, row in rows:
            view.put(prefix + suffix, row)
        new.machine._shards.change(view, arrived, ShardEvent.INSTALLED)
        new.machine._participants.arrived(view, arrived)
        new.engine.write(view.changes, view.range_deletes)
        view = Overlay(old.engine)
        shards.change(view, shard, ShardEvent.FROZEN)
        shards.leave(view, shard, ShardEvent.RELEASED)
        old.engine.write(view.changes, view.range_deletes)
        self.hits["moved with prepared"] += bool(arrived.locks.prepared)

    def crash(self) -> None:
        """Everything is rebuilt from rows, at one group or at the coordinators."""
        gid = self.rng.choice([*GIDS, COORDINATORS])
        if gid == COORDINATORS:
            self.coordinators.machine = CoordinatorMachine()
            self.coordinators.machine.load(self.coordinators.engine)
        else:
            self.groups[gid].machine = KvMachine(gid)
            self.groups[gid].machine.load(self.groups[gid].engine)

    def take_over(self) -> None:
        self.term += 1
        self.votes.clear()
        self.collected.clear()
        self.coordinators.run_one([coord.TAKE_OVER])
        for gid in GIDS:
            self.send(partial(self.resolve_group, gid, self.term))

    def resolve_group(self, gid: int, term: int) -> None:
        result = self.groups[gid].run_one([TXN_RESOLVE, COORDINATORS, term])
        assert result[0] == OK
        for txid, shards in result[1]:
            self.send(partial(self.abort_stray, txid, shards))

    def abort_stray(self, txid: bytes, shards: list[int]) -> None:
        """Whatever a group asks about: an outcome that is logged, if need be an abort."""
        state = self.coordinators.run_one([coord.FENCE, txid, []])[1]
        if state in (TxnState.COMMITTED, TxnState.ABORTED):
            self.send(lambda: self.decide_at(txid, state == TxnState.COMMITTED, shards))

    # ---- messages

    def send(self, message: Message) -> None:
        if self.rng.random() < 0.9:
            self.messages.append(message)

    def deliver(self) -> None:
        if self.messages:
            place = self.rng.randrange(len(self.messages))
            message = self.messages[place] if self.rng.random() < 0.1 else self.messages.pop(place)
            message()

    # ---- clients

    def begin(self) -> None:
        if len(self.open) >= 6:
            return
        txid = make_txid(self.map_time_ms - self.rng.randrange(1_000), self.rng.randbytes(8))
        age = self.rng.choice([txid, make_txid(self.map_time_ms - 5_000, txid[8:])])
        txn = Txn(txid, age, self.time_ns, one_group=self.rng.random() < 0.4)
        self.open.append(txn)
        self.all.append(txn)

    def read(self) -> None:
        txn = self._some(lambda txn: not txn.sent and len(txn.reads) < 3)
        if txn is None:
            return
        held = [shard for shard in range(SHARDS) if self.owners[shard] == self._home(txn)]
        here = [key for key in KEYS if not txn.one_group or shard_of(key, SHARDS) in held]
        key = self.rng.choice(here or KEYS)
        if key in txn.reads:
            return
        try:
            group = self.groups[self.owners[shard_of(key, SHARDS)]]
            value, version = group.machine.get(group.engine, shard_of(key, SHARDS), key)
        except RaftKVError:
            self.hits["read waited"] += 1
            return
        txn.reads[key] = ([] if value is None else msgpack.unpackb(value), version)
        if self.rng.random() < 0.7:
            txn.writes.add(key)

    def _home(self, txn: Txn) -> int:
        return self.owners[shard_of(min(txn.reads), SHARDS)] if txn.reads else self.rng.choice(GIDS)

    def lock(self) -> None:
        txn = self._some(lambda txn: bool(txn.reads) and not txn.sent)
        if txn is None:
            return
        key = self.rng.choice(sorted(txn.reads))
        shard = shard_of(key, SHARDS)
        result = self.groups[self.owners[shard]].run_one([TXN_LOCK, txn.txid, txn.age, shard, [key]])
        self.hits[f"lock {result[0]}"] += 1
        if result[0] == OK:
            txn.locked.add(key)
        elif result[0] == ABORTED:
            self._answer(txn, False)
        if txn.locked and self.rng.random() < 0.3:
            shards = sorted({shard_of(key, SHARDS) for key in txn.locked})
            gid = self.owners[shards[0]]
            assert self.groups[gid].run_one([TXN_BEAT, txn.txid, shards[:1]])[0] in (OK, ABORTED)

    def commit(self) -> None:
        """For the first time, or again."""
        txn = self._some(lambda txn: bool(txn.reads) and not txn.resolving)
        if txn is None:
            return
        if not txn.sent:
            gids = {self.owners[part[0]] for part in txn.parts()}
            txn.one_group = len(gids) == 1 and txn.one_group
            txn.sent = True
        if txn.one_group:
            self.send(lambda: self.commit_at_group(txn))
        else:
            self.send(lambda: self.commit_at_coordinator(txn))

    def resolve(self) -> None:
        """The client has lost its patience: it will never send the commit again."""
        txn = self._some(lambda txn: txn.sent and self.rng.random() < 0.2)
        if txn is None:
            return
        txn.resolving = True
        self.send(lambda: self.fence(txn))

    def forget(self) -> None:
        """The client dies."""
        txn = self._some(lambda txn: self.rng.random() < 0.1)
        if txn is not None:
            self.open.remove(txn)

    def _some(self, condition: Callable[[Txn], bool]) -> Txn | None:
        some = [txn for txn in self.open if condition(txn)]
        return self.rng.choice(some) if some else None

    def _answer(self, txn: Txn, committed: bool) -> None:
        if txn.answer is None:
            txn.answer = committed
            txn.ended_ns = self.time_ns
            if txn in self.open:
                self.open.remove(txn)
        assert txn.answer == committed, "a client was told both"

    # ---- one group

    def commit_at_group(self, txn: Txn) -> None:
        parts = txn.parts()
        group = self.groups[self.owners[parts[0][0]]]
        result = group.run_one([TXN_COMMIT, txn.txid, parts])
        self.hits[f"one group {result[0]}"] += 1
        if result[0] == OK:
            self.send(lambda: self._answer(txn, True))
        elif result[0] in (CONFLICT, ABORTED):
            self.send(lambda: self._answer(txn, False))
        else:
            assert result[0] == WRONG_GROUP, result

    # ---- the coordinators' leader

    def commit_at_coordinator(self, txn: Txn) -> None:
        parts = txn.parts()
        state = self.coordinators.run_one([coord.BEGIN, txn.txid, txn.txid, [part[0] for part in parts]])[1]
        if state == TxnState.BEGUN and txn.txid not in self.votes:
            self.votes[txn.txid] = (parts, set(), txn)
        if state == TxnState.BEGUN:
            for part in parts:
                if part[0] not in self.votes[txn.txid][1]:
                    self.send(partial(self.prepare, txn.txid, part, self.term))
        else:
            self.tell(txn, state)

    def prepare(self, txid: bytes, part: list[Any], term: int) -> None:
        group = self.groups[self.rng.choice([self.owners[part[0]], self.owners[part[0]], self.rng.choice(GIDS)])]
        result = group.run_one([TXN_PREPARE, txid, COORDINATORS, term, [part]])
        self.hits[f"prepare {result[0]}"] += 1
        if result[0] != WRONG_GROUP:
            self.send(lambda: self.voted(txid, part[0], term, result))

    def voted(self, txid: bytes, shard: int, term: int, result: list[Any]) -> None:
        if term != self.term or txid not in self.votes:
            return
        parts, yes, txn = self.votes[txid]
        if result[0] != OK:
            self.end(txn, False)
        elif result[1] in (YES, COMMITTED):
            yes.add(shard)
            if len(yes) == len(parts):
                self.end(txn, True)

    def lose_patience(self) -> None:
        """Not all votes within the deadline."""
        if self.votes and self.rng.random() < 0.2:
            self.end(self.votes[self.rng.choice(sorted(self.votes))][2], False)

    def end(self, txn: Txn, commit: bool) -> None:
        del self.votes[txn.txid]
        self.tell(txn, self.coordinators.run_one([coord.DECIDE, txn.txid, commit])[1])

    def tell(self, txn: Txn, state: int) -> None:
        if state in (TxnState.COMMITTED, TxnState.ABORTED):
            self.hits[f"coordinator {TxnState(state).name}"] += 1
            self.send(lambda: self._answer(txn, state == TxnState.COMMITTED))

    def drive(self) -> None:
        """Send a decision, or the question of a fence, to the shards that have to hear it."""
        records = self.coordinators.machine.open
        if not records:
            return
        txid = self.rng.choice(sorted(records))
        record = records[txid]
        if record.state == TxnState.BEGUN:
            return
        for shard in record.shards:
            self.send(partial(self.decide_at, txid, record.state == TxnState.COMMITTED, [shard]))

    def decide_at(self, txid: bytes, commit: bool, shards: list[int]) -> None:
        for shard in shards:
            group = self.groups[self.rng.choice([self.owners[shard], self.owners[shard], self.rng.choice(GIDS)])]
            result = group.run_one([TXN_DECIDE, txid, commit, [shard]])
            assert result[0] == OK
            number, state, _ = result[1][0]
            if state != NOT_HERE:
                self.send(partial(self.heard, txid, number, state))

    def heard(self, txid: bytes, shard: int, state: int) -> None:
        record = self.coordinators.machine.open.get(txid)
        if record is None or record.state == TxnState.BEGUN:
            return
        heard = self.collected.setdefault(txid, {})
        heard[shard] = state
        if not set(record.shards) <= set(heard):
            return
        if record.state == TxnState.FENCED:
            committed = any(state == YES for state in heard.values())
            self.hits[f"fence {committed}"] += 1
            self.coordinators.run_one([coord.SETTLE, txid, committed])
            heard.clear()  # the shards that said no hear the outcome
        else:
            self.coordinators.run_one([coord.END, [txid]])
            del self.collected[txid]

    def fence(self, txn: Txn) -> None:
        shards = [part[0] for part in txn.parts()]
        self.tell(txn, self.coordinators.run_one([coord.FENCE, txn.txid, shards])[1])

    def ask_in_doubt(self) -> None:
        gid = self.rng.choice(GIDS)
        doubts = self.groups[gid].machine.in_doubt()
        if doubts and self.rng.random() < 0.3:
            txid, coordinators, shard, _ = self.rng.choice(doubts)
            assert coordinators == COORDINATORS
            self.send(lambda: self.abort_stray(txid, [shard]))

    # ---- running

    def step(self) -> None:
        self.time_ns += 1
        rare = [self.tick, self.move, self.crash, self.take_over, self.forget]
        often = [
            self.begin,
            self.read,
            self.read,
            self.lock,
            self.commit,
            self.commit,
            self.resolve,
            self.lose_patience,
        ]
        often += [self.drive, self.drive, self.ask_in_doubt, *[self.deliver] * 10]
        self.rng.choice(rare if self.rng.random() < 0.03 else often)()

    def settle(self) -> None:
        """Nothing is lost any more: every transaction that was sent comes to its end."""
        self.take_over()
        for _ in range(4_000):
            self.time_ns += 1
            if self.messages:
                self.messages.pop(self.rng.randrange(len(self.messages)))()
                continue
            for _, _, txn in list(self.votes.values()):
                self.end(txn, False)  # the deadline passes
            for txn in self.open:
                if txn.sent:
                    txn.resolving = True
                    self.fence(txn)
            self.drive()
            for gid in GIDS:
                for txid, _, shard, _ in self.groups[gid].machine.in_doubt():
                    self.abort_stray(txid, [shard])
            waiting = any(txn.sent for txn in self.open) or self.coordinators.machine.open or self.messages
            if not waiting and not any(group.machine.in_doubt() for group in self.groups.values()):
                return
        raise AssertionError("not settled")

    def check(self) -> None:
        self.map_time_ms += 60_000
        for group in self.groups.values():
            group.run_one(map_time_command(self.map_time_ms))
            assert group.machine.explicit_locks == 0
        lists = {}
        for key in KEYS:
            group = self.groups[self.owners[shard_of(key, SHARDS)]]
            value, _ = group.machine.get(group.engine, shard_of(key, SHARDS), key)
            lists[key] = [] if value is None else msgpack.unpackb(value)
        for txn in self.all:
            present = [txn.txid in lists[key] for key in txn.writes] if txn.sent else [False]
            assert len(set(present)) <= 1, "half a transaction"
            if txn.answer is not None and txn.writes:
                assert present[0] == txn.answer, "not what the client was told"
        for key, entries in lists.items():
            assert len(set(entries)) == len(entries), "applied twice"
            assert all(key in txn.writes for txn in self.all if txn.txid in entries)
        verdict = check_transactions([self._operation(txn) for txn in self.all if txn.sent] + self._last_reads(lists))
        assert verdict.passed, verdict

    def _operation(self, txn: Txn) -> Operation:
        steps = []
        for key, (entries, _) in sorted(txn.reads.items()):
            steps.append(Step.read(key, entries))
            if key in txn.writes:
                steps.append(Step.append(key, txn.txid))
        status = {True: Status.OK, False: Status.FAIL, None: Status.UNKNOWN}[txn.answer]
        return Operation(
            txn.txid.hex(), Kind.TXN, b"", txn.began_ns, txn.ended_ns if txn.answer is not None else None, status,
            steps=tuple(steps),
        )  # fmt: skip

    def _last_reads(self, lists: dict[bytes, list[bytes]]) -> list[Operation]:
        steps = tuple(Step.read(key, entries) for key, entries in lists.items())
        return [Operation("last", Kind.TXN, b"", self.time_ns + 1, self.time_ns + 2, Status.OK, steps=steps)]


def run_world(seed: int, steps: int = 1_500) -> World:
    world = World(seed)
    try:
        for _ in range(steps):
            world.step()
        world.settle()
        world.check()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    return world
