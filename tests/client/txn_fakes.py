"""A scripted cluster that knows transactions: the groups and the coordinators are the real machines, one for each.

There is no log behind them: a request is applied when it arrives. The coordinators' leader does all of a transaction at
once, and may be told to die in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from raftkv.client.kv import RaftKV
from raftkv.machines import coordinator as coord
from raftkv.machines.coordinator import CoordinatorMachine, TxnState
from raftkv.machines.kv import KvMachine
from raftkv.machines.participants import NOT_HERE, YES
from raftkv.machines.rows import Incarnation, shard_prefix
from raftkv.machines.shard_states import ShardEvent, ShardState
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import TXN_DECIDE, TXN_PREPARE
from raftkv.protocol import errors
from raftkv.protocol.messages import ReadOp
from raftkv.protocol.transactions import CoordinateOp, State, decode_coordinate_body
from raftkv.storage.engine import Overlay
from tests.client.fakes import Asked, FakeCluster, FakeServer, with_cluster
from tests.machines.support import Replica, config_command, map_time_command

COORDINATORS = 9
SHARDS = 4
NOW_MS = 50_000_000


class Died(Exception):
    """The coordinators' leader is gone before it has answered."""


@dataclass
class TxnCluster(FakeCluster):
    """Shards go round the groups 1 and 2. `dies_at`: 'begun', 'prepared' or 'decided', once."""

    map_time_ms: int = NOW_MS
    with_coordinators: bool = True
    coordinators: list[FakeServer] = field(default_factory=list)
    machines: dict[int, Replica[KvMachine]] = field(default_factory=dict)
    records: Replica[CoordinatorMachine] = field(default_factory=lambda: Replica(CoordinatorMachine()))
    refusals: dict[bytes, errors.RaftKVError] = field(default_factory=dict)
    term: int = 1
    dies_at: str = ""

    async def start(self) -> None:
        await super().start()
        self.coordinators = [FakeServer(self, "coordinator", COORDINATORS, replica) for replica in range(3)]
        for server in self.coordinators:
            await server.start()
        self.leaders[COORDINATORS] = self.coordinators[0]
        self.groups_and_time()

    def groups_and_time(self) -> None:
        """Every group takes the map; all of them the map time."""
        for gid in self.gids:
            if gid not in self.machines:
                self.machines[gid] = Replica(KvMachine(gid))
            assert self.machines[gid].run_one(config_command(self.shard_map))[0] == 0
        self.tick(0)

    def tick(self, advance_ms: int) -> None:
        self.map_time_ms += advance_ms
        for machine in self.machines.values():
            machine.run_one(map_time_command(self.map_time_ms))
        self.records.run_one([coord.MAP_TIME, self.map_time_ms])

    @property
    def servers(self) -> list[FakeServer]:
        return [*super().servers, *self.coordinators]

    def everywhere(self, gid: int, rule: Callable[[Asked], bool]) -> None:
        if gid == COORDINATORS:
            for server in self.coordinators:
                server.rules.append(rule)
        else:
            super().everywhere(gid, rule)

    def config_extras(self) -> list[Any]:
        if not self.with_coordinators:
            return [0]
        return [0, [[COORDINATORS, [server.address for server in self.coordinators]]]]

    # ---- groups

    def write(self, gid: int, command: list[Any]) -> list[Any]:
        return self._result(self.machines[gid].run_one(command))

    def txn(self, gid: int, command: list[Any]) -> list[Any]:
        self.applied.append(command)
        return self._result(self.machines[gid].run_one(command))

    def read(self, gid: int, body: list[Any]) -> Any:
        replica = self.machines[gid]
        _, _, op, shard, *rest = body
        if op == ReadOp.GET:
            return list(replica.machine.get(replica.engine, shard, rest[0]))
        if op == ReadOp.CHECK:
            return [replica.machine.get(replica.engine, shard, key)[1] for key in rest[0]]
        assert op == ReadOp.OUTCOME
        if not replica.machine.serves(shard):
            raise replica.machine.wrong_group(shard)
        machine: Any = replica.machine
        outcome = machine._participants.outcome(replica.engine, machine._shards.serving[shard], rest[0])
        if outcome is None:
            return [State.BEGUN, 0] if machine.holds_locks(shard, rest[0]) else None
        return [State.COMMITTED if outcome.committed else State.ABORTED, outcome.revision]

    def _result(self, result: list[Any]) -> list[Any]:
        """As a daemon answers it."""
        if result[0] != 0:
            raise errors.from_result(result)
        return result

    def value(self, key: bytes) -> bytes | None:
        """What is stored, whoever may see it."""
        shard = shard_of(key, self.shards)
        replica = self.machines[self.holder(shard)]
        machine: Any = replica.machine
        row = replica.engine.get(machine._shards.serving[shard].value_prefix + key)
        return None if row is None else row[9:]

    def holder(self, shard: int) -> int:
        return next(gid for gid, replica in self.machines.items() if replica.machine.serves(shard))

    def locks(self) -> int:
        """Keys that are held by explicit locks, and prepared transactions."""
        return sum(r.machine.explicit_locks + len(r.machine.in_doubt()) for r in self.machines.values())

    def move(self, shard: int, target: int, *, quietly: bool = False) -> None:
        """A shard goes to another group with all its rows; `quietly`: the controllers don't say so yet."""
        owners = list(self.shard_map.owners)
        source, owners[shard] = self.holder(shard), target
        after = self.make_map(self.shard_map.num + 1, tuple(owners))
        for replica in self.machines.values():
            assert replica.run_one(config_command(after))[0] == 0
        if not quietly:
            self.shard_map = after
        old, new = self.machines[source], self.machines[target]
        old_machine: Any = old.machine
        new_machine: Any = new.machine
        held = old_machine._shards.here[shard]
        meta = held.meta()._replace(incarnation=Incarnation(after.num, 1), state=ShardState.IMPORTING)
        prefix = shard_prefix(shard, meta.incarnation)
        rows = [(key[len(held.prefix) :], row) for key, row in old.engine.rows.items() if key.startswith(held.prefix)]
        view = Overlay(new.engine)
        arrived = new_machine._shards.arrive(view, shard, ShardEvent.IMPORT_STARTED, meta)
        for suffix, row in rows:
            view.put(prefix + suffix, row)
        new_machine._shards.change(view, arrived, ShardEvent.INSTALLED)
        new_machine._participants.arrived(view, arrived)
        new.engine.write(view.changes, view.range_deletes)
        view = Overlay(old.engine)
        old_machine._shards.change(view, held, ShardEvent.FROZEN)
        old_machine._shards.leave(view, held, ShardEvent.RELEASED)
        old.engine.write(view.changes, view.range_deletes)

    # ---- coordinators

    def coordinate(self, body: list[Any]) -> list[Any]:
        asked = decode_coordinate_body(body)
        if asked.op == CoordinateOp.STATUS:
            record = self.records.machine.record(self.records.engine, asked.txid)
            if record is None:
                return [State.EXPIRED if self.records.machine.is_expired(asked.txid) else State.UNKNOWN]
            return [State.BEGUN if record.state == TxnState.FENCED else record.state]
        if asked.op == CoordinateOp.COMMIT:
            assert asked.parts is not None
            return self._commit(asked.txid, asked.parts)
        assert asked.op == CoordinateOp.RESOLVE
        return self._resolve(asked.txid, list(asked.shards))

    def take_over(self) -> None:
        """Another leader: what was undecided is aborted."""
        self.term += 1
        self.records.run_one([coord.TAKE_OVER])
        for txid in list(self.records.machine.open):
            self._tell(txid)

    def _commit(self, txid: bytes, parts: list[Any]) -> list[Any]:
        digest = hashlib.md5(msgpack.packb(parts), usedforsecurity=False).digest()
        (_, state) = self._result(self.records.run_one([coord.BEGIN, txid, digest, [part[0] for part in parts]]))
        if state == TxnState.BEGUN:
            self._die("begun")
            refusal = self._prepare(txid, parts)
            self._die("prepared")
            (_, state) = self._result(self.records.run_one([coord.DECIDE, txid, refusal is None]))
            self._die("decided")
            self._tell(txid)
            if refusal is not None:
                raise refusal
        if state != TxnState.COMMITTED:
            raise errors.Aborted("it was aborted before")
        return [State.COMMITTED]

    def _prepare(self, txid: bytes, parts: list[Any]) -> errors.RaftKVError | None:
        for part in parts:
            group = self.machines[self.holder(part[0])]
            result = group.run_one([TXN_PREPARE, txid, COORDINATORS, self.term, [part]])
            if result[0] != 0:
                return errors.from_result(result)
        return None

    def _die(self, where: str) -> None:
        if self.dies_at == where:
            self.dies_at = ""
            raise Died

    def _tell(self, txid: bytes) -> list[int]:
        """The outcome, to all shards; their states."""
        record = self.records.machine.open[txid]
        states = []
        for shard in record.shards:
            group = self.machines[self.holder(shard)]
            result = group.run_one([TXN_DECIDE, txid, record.state == TxnState.COMMITTED, [shard]])
            assert result[1][0][1] != NOT_HERE
            states.append(result[1][0][1])
        if record.state != TxnState.FENCED:
            self.records.run_one([coord.END, [txid]])
        return states

    def _resolve(self, txid: bytes, shards: list[int]) -> list[Any]:
        (_, state) = self._result(self.records.run_one([coord.FENCE, txid, shards]))
        if state == TxnState.BEGUN:
            raise errors.Unavailable("it is being committed")
        if state == TxnState.FENCED:
            committed = YES in self._tell(txid)
            (_, state) = self.records.run_one([coord.SETTLE, txid, committed])
            self._tell(txid)
        return [state]


def with_txn_cluster(test: Callable[[TxnCluster], Awaitable[None]], **options: Any) -> None:
    """As `with_cluster`."""

    async def run(cluster: FakeCluster) -> None:
        assert isinstance(cluster, TxnCluster)
        await test(cluster)

    with_cluster(run, TxnCluster, shards=SHARDS, **options)


def key_at(shard: int, n: int = 0) -> bytes:
    """The nth key of that shard; shards 0 and 2 are at group 1, 1 and 3 at group 2."""
    keys = (key for key in (b"k%d" % number for number in range(10_000)) if shard_of(key, SHARDS) == shard)
    return [next(keys) for _ in range(n + 1)][n]


async def put_all(kv: RaftKV, pairs: dict[bytes, bytes]) -> None:
    for key, value in pairs.items():
        await kv.put(key, value)
