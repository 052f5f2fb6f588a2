"""The shardkv's side of the runtime: reads, writes and transactions on the shards that its group serves, and what other
groups ask about those that move."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import msgpack

from raftkv.daemons.doubts import Doubts
from raftkv.daemons.failpoints import Failpoints
from raftkv.daemons.lock_waits import LockWaits
from raftkv.daemons.map_follower import MapFollower
from raftkv.daemons.migration import Migrations
from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.replica import Deliver, Replica
from raftkv.daemons.service import Session, Verb
from raftkv.daemons.tasks import Tasks
from raftkv.machines import moves as op
from raftkv.machines.kv import DRAIN, MAP_TIME, KvMachine
from raftkv.machines.machine import Command, decode_command
from raftkv.machines.results import ABORTED, CONFLICT, LOCKED, OK, raise_if_refused
from raftkv.machines.txn_commands import (
    TXN_BEAT,
    TXN_COMMIT,
    TXN_DECIDE,
    TXN_LOCK,
    TXN_OPS,
    TXN_PREPARE,
    refuse_txn_shape,
)
from raftkv.protocol import messages
from raftkv.protocol.errors import BadRequest, Locked, RaftKVError, Unavailable
from raftkv.protocol.messages import (
    FOLLOWER_OK,
    CheckBody,
    GetBody,
    OutcomeBody,
    ReadBody,
    ScanBody,
    decode_drain_body,
    decode_read_body,
    decode_write_body,
)
from raftkv.protocol.migration import ShardBody, ShardOp, decode_shard_body
from raftkv.protocol.transactions import State, decode_txn_body
from raftkv.storage.engine import StorageEngine
from raftkv.storage.store import Store

Reading = tuple[Session, int, ReadBody, float]
"""A READ on its way; the last is when it has waited enough for a lock, in loop time, 0 before it has met one."""

Writing = tuple[Session, int, bytes, Command, float]
"""A WRITE, or a request for an explicit lock, in the same way, with its command encoded and decoded."""


LOCKS_SHOWN_MAX = 100
"""Holders in a status, and keys of each."""


class ShardKvRole:
    """What a shardkv does beyond being a replica."""

    def __init__(
        self, options: DaemonOptions, store: Store, tasks: Tasks, rng: random.Random, failpoints: Failpoints
    ) -> None:
        self.machine = KvMachine(options.gid)
        self._store = store
        self._tasks = tasks
        self._replica: Replica | None = None
        self._follower = MapFollower(options, store, self.machine, rng)
        self._following: asyncio.Task[None] | None = None
        self._migrations = Migrations(options, store, self.machine, tasks, rng)
        self._doubts = Doubts(options, store, self.machine, self._follower, rng, failpoints)
        self._doubting: asyncio.Task[None] | None = None
        self._waits = LockWaits(self.machine)
        self._failpoints = failpoints
        self.commits: Counter[str] = Counter()
        """Transactions of this group alone, by how the COMMIT was answered: committed, aborted or failed."""
        self.verbs: dict[int, Verb] = {
            messages.Verb.WRITE: self._write,
            messages.Verb.READ: self._read,
            messages.Verb.SHARD: self._shard,
            messages.Verb.DRAIN: self._drain,
            messages.Verb.TXN: self._txn,
        }

    def attach(self, replica: Replica) -> None:
        self._replica = replica
        self._follower.replica = replica
        self._migrations.replica = replica
        self._doubts.replica = replica

    def stop(self) -> None:
        self._waits.clear()
        self._stop_leading()

    def status(self) -> dict[str, Any]:
        machine = self.machine
        return {
            "config_num": machine.config_num,
            "map_time_ms": machine.map_time_ms,
            "shards": [[shard, state.name.lower()] for shard, state in machine.shard_states()],
            "migrations": self._migrations.status(),
            "prepared": len(self.machine.in_doubt()),
            "locks": [
                {"txid": txid, "shard": shard, "kind": kind, "keys": keys, "age_ms": age_ms}
                for txid, shard, kind, keys, age_ms in machine.held_locks(LOCKS_SHOWN_MAX)
            ],
            "explicit_locks": self.machine.explicit_locks,
            "waiting_for_locks": len(self._waits),
        }

    @property
    def migrations(self) -> Migrations:
        return self._migrations

    @property
    def waiting_for_locks(self) -> int:
        """Requests that wait for a lock to go."""
        return len(self._waits)

    # ---- what the Redis gateway needs

    @property
    def replica(self) -> Replica | None:
        """None while the group isn't formed."""
        return self._replica

    @property
    def map_time_ms(self) -> int:
        """The latest that this replica knows of: what stamps a write that begins here."""
        return max(self._follower.map_time_ms, self.machine.map_time_ms)

    def is_waited_for(self, shard: int, key: bytes) -> bool:
        """Whether writers wait for a lock on the key."""
        return bool(self._waits) and self._waits.has_queue((shard, key))

    def count_commit(self, result: Any) -> None:
        """A transaction of this group alone was answered so."""
        if type(result) is not list:
            outcome = "failed"
        elif result[0] == OK:
            outcome = "committed"
        else:
            outcome = "aborted" if result[0] in (CONFLICT, ABORTED) else "failed"
        self.commits[outcome] += 1

    # ---- events of the replica

    def role_changed(self, role: str, term: int, leader: int | None) -> None:
        if role == "leader":
            if self._following is None:
                self._following = self._tasks.start(self._follower.follow(), "map-follower")
                self._doubting = self._tasks.start(self._doubts.watch(), "doubts")
                self._migrations.start()
        elif self._following is not None:
            self._stop_leading()
        self._waits.clear()

    def applied(self) -> None:
        self._migrations.applied()
        self._waits.applied()

    def _stop_leading(self) -> None:
        for task in (self._following, self._doubting):
            if task is not None:
                task.cancel()
        self._following = self._doubting = None
        self._migrations.stop()
        self._doubts.stop()

    # ---- verbs

    def _write(self, session: Session, request_id: int, body: list[Any]) -> None:
        replica = self._ready()
        if not replica.is_leader:
            raise replica.not_leader()
        _, raw = decode_write_body(body)
        command = decode_command(raw)
        self.machine.validate(command)
        shard = command[1]
        if not self.machine.serves(shard):
            raise self.machine.wrong_group(shard)
        writing = (session, request_id, raw, command, 0.0)
        if self._waits and self._waits.has_queue((shard, command[6])):
            self._wait_to_write(writing, None)  # behind those that came before
        else:
            replica.submit(raw, command, self._written, writing)

    def _written(self, writing: Writing, result: Any) -> None:
        if type(result) is list and result[0] == LOCKED:
            self._wait_to_write(writing, result[1])
        else:
            writing[0].deliver(writing[1], result)

    def _wait_to_write(self, writing: Writing, holder: bytes | None) -> None:
        session, request_id, raw, command, deadline_s = writing
        shard, key = command[1], command[6]

        def go_on() -> None:
            if not session.closed:
                self._ready().submit(raw, command, self._written, (session, request_id, raw, command, deadline_s))

        def give_up() -> None:
            now_by = self.machine.writer_blocked_by(shard, key) or holder
            session.refuse(request_id, Locked(now_by or b""))

        deadline_s = deadline_s or self._waits.deadline_s()
        is_blocked = partial(self.machine.writer_blocked_by, shard, key)
        self._waits.wait((shard, key), deadline_s, lambda: is_blocked() is not None, go_on, give_up)

    def _read(self, session: Session, request_id: int, body: list[Any]) -> None:
        request = decode_read_body(body)
        reading = (session, request_id, request, 0.0)
        self._ready().read(self._readable, reading, follower_ok=bool(request.flags & FOLLOWER_OK))

    def _txn(self, session: Session, request_id: int, body: list[Any]) -> None:
        replica = self._ready()
        if not replica.is_leader:
            raise replica.not_leader()
        raw = decode_txn_body(body)
        command = decode_command(raw)
        if not command or type(command[0]) is not int or command[0] not in TXN_OPS:
            raise BadRequest("the command is not one of a transaction")
        raise_if_refused(refuse_txn_shape(command, self.machine.shard_count))
        self._check_served(command)
        op = command[0]
        if op == TXN_LOCK and not self._follower.map_time_ms:  # it would end at once when the time is known
            raise Unavailable("no controller has told this leader yet by which time a lock ends")
        if op in (TXN_LOCK, TXN_BEAT) and self._follower.map_time_ms > self.machine.map_time_ms:
            # what they set the end of counts from now, not from the last map time that was logged
            time = [MAP_TIME, self._follower.map_time_ms]
            replica.submit(msgpack.packb(time), time, _ignore, None)
        if op == TXN_LOCK:
            replica.submit(raw, command, self._lock_answered, (session, request_id, raw, command, 0.0))
        elif op == TXN_COMMIT:
            self._commit((session, request_id, raw, command, 0.0))
        else:
            self._submit_txn(op, raw, command, session.deliver, request_id)

    def _submit_txn(self, op: int, raw: bytes, command: Command, answer: Deliver, token: Any) -> None:
        before, after = _PLACES.get(op, (None, None))
        if before is None or after is None:
            self._ready().submit(raw, command, answer, token)
        else:
            deliver = partial(self._failpoints.pass_by, after, answer)
            self._failpoints.pass_by(before, self._ready().submit, raw, command, deliver, token)

    def _commit(self, writing: Writing) -> None:
        """Not while one of its keys waits for the decision on another transaction, like a plain operation: that may be
        the client's own one before, committed as it knows, of which this group hasn't heard yet. It holds nothing
        meanwhile, so nobody waits for it; whoever has waited long enough gets the log's answer."""
        session, request_id, raw, command, deadline_s = writing
        if session.closed:
            return
        submit = partial(self._submit_txn, TXN_COMMIT, raw, command, partial(self._committed, session), request_id)
        holder = self.machine.commit_blocked_by(command)
        if holder is None:
            submit()
            return
        deadline_s = deadline_s or self._waits.deadline_s()
        again = partial(self._commit, (session, request_id, raw, command, deadline_s))
        self._waits.wait((*holder, "commit"), deadline_s, partial(self.machine.is_prepared, *holder), again, submit)

    def _committed(self, session: Session, request_id: int, result: Any) -> None:
        self.count_commit(result)
        session.deliver(request_id, result)

    def _check_served(self, command: Command) -> None:
        """Raise WrongGroup where the log would say the same: of a decision only if it is about nothing here."""
        op = command[0]
        if op in (TXN_COMMIT, TXN_PREPARE):
            shards = [part[0] for part in command[-1]]
        elif op in (TXN_BEAT, TXN_DECIDE):
            shards = command[-1]
        else:
            shards = [command[3]] if op == TXN_LOCK else []
        elsewhere = [shard for shard in shards if not self.machine.serves(shard)]
        if elsewhere and (op != TXN_DECIDE or len(elsewhere) == len(shards)):
            raise self.machine.wrong_group(elsewhere[0])

    def _lock_answered(self, writing: Writing, result: Any) -> None:
        """Whoever asks for locks that others hold waits like any writer, for all that this holder has in the shard."""
        session, request_id, raw, command, deadline_s = writing
        if type(result) is not list or result[0] != LOCKED:
            session.deliver(request_id, result)
            return
        shard, holder = command[3], result[1]
        deadline_s = deadline_s or self._waits.deadline_s()

        def go_on() -> None:
            if not session.closed:
                again = (session, request_id, raw, command, deadline_s)
                self._ready().submit(raw, command, self._lock_answered, again)

        is_blocked = partial(self.machine.holds_locks, shard, holder)
        self._waits.wait(
            (shard, holder), deadline_s, is_blocked, go_on, partial(session.refuse, request_id, Locked(holder))
        )

    def _shard(self, session: Session, request_id: int, body: list[Any]) -> None:
        """Another group's leader asks for a shard: only the leader of this one answers."""
        replica = self._ready()
        if not replica.is_leader:
            raise replica.not_leader()
        request = decode_shard_body(body)
        if request.op in (ShardOp.PULL, ShardOp.CHANGES):
            replica.read(self._page, (session, request_id, request))
            return
        if request.op == ShardOp.LIST:
            self.machine.check_export(request.shard, request.to_gid, request.config_num)
        command = _EXPORT_COMMANDS[request.op](request)
        replica.submit(msgpack.packb(command), command, session.deliver, request_id)

    def _drain(self, session: Session, request_id: int, body: list[Any]) -> None:
        """Whoever wants this group to leave as the last one asks it to stop serving, if it is empty."""
        replica = self._ready()
        if not replica.is_leader:
            raise replica.not_leader()
        command = [DRAIN, *decode_drain_body(body)]
        replica.submit(msgpack.packb(command), command, session.deliver, request_id)

    def _page(self, token: tuple[Session, int, ShardBody], error: RaftKVError | None) -> None:
        session, request_id, _ = token
        if error is not None:
            session.refuse(request_id, error)
        else:
            session.when_writable(self._answer_page, token)

    def _answer_page(self, token: tuple[Session, int, ShardBody]) -> None:
        session, request_id, request = token
        machine, engine = self.machine, self._store.engine
        claim = (request.to_gid, request.config_num, request.attempt, request.list_id)
        try:
            replica = self._ready()
            replica.check_readable()
            if request.op == ShardOp.PULL:
                (rows, cursor), final = machine.pull(engine, request.shard, claim, request.cursor), None
            else:
                (rows, cursor), final = machine.changed_rows(
                    engine, request.shard, claim, request.since, request.cursor
                )
        except RaftKVError as refusal:
            session.refuse(request_id, refusal)
        else:
            session.reply(request_id, [replica.applied_index, rows, cursor, final])

    def _ready(self) -> Replica:
        if self._replica is None:
            raise Unavailable("this replica waits for the rest of its group to start")
        return self._replica

    def _readable(self, reading: Reading, error: RaftKVError | None) -> None:
        session = reading[0]
        if error is not None:
            session.refuse(reading[1], error)
        else:
            session.when_writable(self._answer_read, reading)

    def _answer_read(self, reading: Reading) -> None:
        """From the state applied by now: at or beyond the read index, however late it is."""
        session, request_id, request, _ = reading
        try:
            self._ready().check_readable()
            answer = _LOOKUPS[type(request)](self.machine, self._store.engine, request)
        except Locked as refusal:
            self._wait_to_read(reading, refusal)
        except RaftKVError as refusal:
            session.refuse(request_id, refusal)
        else:
            session.reply(request_id, answer)

    def _wait_to_read(self, reading: Reading, refusal: Locked) -> None:
        """Until that transaction has ended here; another one may be in the way then."""
        session, request_id, request, deadline_s = reading
        deadline_s = deadline_s or self._waits.deadline_s()
        again = (session, request_id, request, deadline_s)
        is_blocked = partial(self.machine.is_prepared, request.shard, refusal.txn)
        go_on = partial(session.when_writable, self._answer_read, again)
        give_up = partial(session.refuse, request_id, refusal)
        self._waits.wait((request.shard, refusal.txn, "read"), deadline_s, is_blocked, go_on, give_up)


def _get(machine: KvMachine, engine: StorageEngine, request: GetBody) -> Any:
    return machine.get(engine, request.shard, request.key)


def _scan(machine: KvMachine, engine: StorageEngine, request: ScanBody) -> Any:
    return machine.scan(
        engine,
        request.shard,
        request.prefix,
        request.after_key,
        request.max_pairs,
        request.max_bytes,
    )


def _outcome(machine: KvMachine, engine: StorageEngine, request: OutcomeBody) -> Any:
    outcome = machine.outcome(engine, request.shard, request.txid)
    if outcome is None and machine.holds_locks(request.shard, request.txid):
        return [int(State.BEGUN), 0]
    if outcome is None:
        return [int(State.EXPIRED), 0] if machine.is_expired(request.shard, request.txid) else None
    return [int(State.COMMITTED if outcome.committed else State.ABORTED), outcome.revision]


def _check(machine: KvMachine, engine: StorageEngine, request: CheckBody) -> Any:
    return machine.check(engine, request.shard, request.keys)


_LOOKUPS: dict[type, Callable[[KvMachine, StorageEngine, Any], Any]] = {
    GetBody: _get,
    ScanBody: _scan,
    OutcomeBody: _outcome,
    CheckBody: _check,
}

_PLACES = {
    TXN_PREPARE: ("group got prepare", "group logged prepare"),
    TXN_DECIDE: ("group got decision", "group logged decision"),
    TXN_COMMIT: ("group got commit", "group logged commit"),
}
"""Failpoints before and after the log."""


def _ignore(token: Any, result: Any) -> None:
    """For commands whose effect, not whose answer, is wanted."""


_EXPORT_COMMANDS: dict[int, Callable[[ShardBody], list[Any]]] = {
    ShardOp.LIST: lambda body: [op.EXPORT_LIST, *body[1:5]],
    ShardOp.ASK: lambda body: [op.EXPORT_ASK, *body[1:7]],
    ShardOp.RELEASE: lambda body: [op.EXPORT_RELEASE, *body[1:4]],
}
