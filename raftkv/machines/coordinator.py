"""The coordinators' machine: what became of each transaction over several groups. The first decision wins.

A transaction is `BEGUN`, then `COMMITTED` or `ABORTED`, and *ended* when every shard has heard it. A txid that somebody
asks about and that isn't known is `FENCED` first: nobody can begin it any more, and what the shards know of it decides.
A new leader takes over (`TAKE_OVER`): what is begun and undecided is aborted; a fence isn't, its answers are collected
again.

    BEGIN      txid, digest, shards     → [0, state]; `digest` of what is to be committed: one txid, one content
    DECIDE     txid, commit             → [0, state]
    FENCE      txid, shards             → [0, state]; without shards an unknown txid is aborted at once
    SETTLE     txid, commit             → [0, state]; what the shards of a fenced txid have said
    END        [txid …]                 → [0]
    TAKE_OVER                           → [0]

This module must never do I/O, nor know how votes are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum, unique
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from raftkv.machines.machine import Command, decode_commands
from raftkv.machines.participants import OUTCOME_LIFETIME_MS, SWEEP_ROWS_MAX
from raftkv.machines.results import EXPIRED, OK, Result, bad_request
from raftkv.machines.rows import (
    MAP_TIME_KEY,
    OPEN_PREFIX,
    OUTCOME_CURSOR_KEY,
    RECORD_PREFIX,
    UnknownRowFormat,
    pack_u64,
    prefix_end,
    unpack_u64,
)
from raftkv.machines.txn_commands import are_shards, is_txid, txid_ms
from raftkv.protocol.limits import ARRAY_LEN_MAX, ID_BYTES, NUMBER_MAX
from raftkv.raft.entry import Entry, EntryKind

if TYPE_CHECKING:
    from raftkv.storage.engine import Overlay, StorageEngine

MAP_TIME: Final = 33
BEGIN: Final = 80
DECIDE: Final = 81
FENCE: Final = 82
SETTLE: Final = 83
END: Final = 84
TAKE_OVER: Final = 85

_FORMAT: Final = 0


@unique
class TxnState(IntEnum):
    """Stored in records: the numbers never change."""

    BEGUN = 0
    COMMITTED = 1
    ABORTED = 2
    FENCED = 3


class Record(NamedTuple):
    """`digest`: empty of what never began here. `ended_ms`: the map time when every shard had heard it, 0 before."""

    state: TxnState
    digest: bytes
    shards: tuple[int, ...]
    ended_ms: int


class CoordinatorMachine:
    """The state machine of the coordinators. `open` are the records without an end, by txid."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[Overlay, Command], Result]] = {
            MAP_TIME: self._map_time,
            BEGIN: self._begin,
            DECIDE: self._decide,
            FENCE: self._fence,
            SETTLE: self._settle,
            END: self._end,
            TAKE_OVER: self._take_over,
        }
        self._reset(None)

    def load(self, engine: StorageEngine) -> None:
        self._reset(engine)

    def _reset(self, engine: StorageEngine | None) -> None:
        self.open: dict[bytes, Record] = {}
        row = None if engine is None else engine.get(MAP_TIME_KEY)
        self.map_time_ms = 0 if row is None else unpack_u64(row)
        self.sweep_pending = engine is not None and engine.get(OUTCOME_CURSOR_KEY) is not None
        if engine is None:
            return
        for key, _ in engine.scan(OPEN_PREFIX, prefix_end(OPEN_PREFIX)):
            txid = key[len(OPEN_PREFIX) :]
            record = self.record(engine, txid)
            assert record is not None, "an open transaction has no record"
            self.open[txid] = record

    # ---- what a shell asks

    def decode(self, data: bytes) -> list[Command]:
        return decode_commands(data)

    def dead_ranges(self) -> list[tuple[bytes, bytes]]:
        return []

    def record(self, view: Overlay | StorageEngine, txid: bytes) -> Record | None:
        row = view.get(RECORD_PREFIX + txid)
        return None if row is None else _unpack(row)

    def is_expired(self, txid: bytes) -> bool:
        """Whether a txid without a record may have had one that was dropped."""
        return txid_ms(txid) < self.map_time_ms - OUTCOME_LIFETIME_MS

    # ---- applying

    def apply(self, view: Overlay, entry: Entry, commands: Sequence[Command] | None = None) -> list[Result]:
        if entry.kind != EntryKind.COMMANDS:
            return []
        return [self._run(view, command) for command in (decode_commands(entry.data) if commands is None else commands)]

    def _run(self, view: Overlay, command: Command) -> Result:
        problem = _shape_problem(command)
        return bad_request(problem) if problem is not None else self._handlers[command[0]](view, command)

    def _begin(self, view: Overlay, command: Command) -> Result:
        _, txid, digest, shards = command
        known = self.record(view, txid)
        if known is None:
            if self.is_expired(txid):
                return [EXPIRED, "the transaction is too old"]
            known = self._keep(view, txid, Record(TxnState.BEGUN, digest, tuple(shards), 0))
        elif known.digest not in (digest, b""):
            return bad_request("another content was committed under this transaction id")
        return [OK, known.state]

    def _decide(self, view: Overlay, command: Command) -> Result:
        return self._end_state(view, command, TxnState.BEGUN)

    def _settle(self, view: Overlay, command: Command) -> Result:
        return self._end_state(view, command, TxnState.FENCED)

    def _end_state(self, view: Overlay, command: Command, undecided: TxnState) -> Result:
        _, txid, commit = command
        known = self.record(view, txid)
        if known is None:
            return bad_request("there is no such transaction")
        if known.state == undecided:
            known = self._keep(view, txid, known._replace(state=TxnState.COMMITTED if commit else TxnState.ABORTED))
        return [OK, known.state]

    def _fence(self, view: Overlay, command: Command) -> Result:
        _, txid, shards = command
        known = self.record(view, txid)
        if known is None:
            if self.is_expired(txid) and shards:
                return [EXPIRED, "the transaction is too old"]
            state = TxnState.FENCED if shards else TxnState.ABORTED
            ended_ms = 0 if shards else max(1, self.map_time_ms)
            known = self._keep(view, txid, Record(state, b"", tuple(shards), ended_ms))
        return [OK, known.state]

    def _end(self, view: Overlay, command: Command) -> Result:
        for txid in command[1]:
            known = self.open.get(txid)
            if known is not None and known.state in (TxnState.COMMITTED, TxnState.ABORTED):
                self._keep(view, txid, known._replace(ended_ms=max(1, self.map_time_ms)))
        return [OK]

    def _take_over(self, view: Overlay, command: Command) -> Result:
        for txid, known in sorted(self.open.items()):
            if known.state == TxnState.BEGUN:
                self._keep(view, txid, known._replace(state=TxnState.ABORTED))
        return [OK]

    def _map_time(self, view: Overlay, command: Command) -> Result:
        if command[1] > self.map_time_ms:
            self.map_time_ms = command[1]
            view.put(MAP_TIME_KEY, pack_u64(command[1]))
        self._sweep(view)
        return [OK, self.map_time_ms]

    def _keep(self, view: Overlay, txid: bytes, record: Record) -> Record:
        view.put(RECORD_PREFIX + txid, _pack(record))
        if not record.ended_ms:
            if txid not in self.open:
                view.put(OPEN_PREFIX + txid, b"")
            self.open[txid] = record
        elif self.open.pop(txid, None) is not None:
            view.delete(OPEN_PREFIX + txid)
        return record

    def _sweep(self, view: Overlay) -> None:
        """Drop records whose end, and whose txid, lie behind the horizon; a record without an end never."""
        cursor = view.get(OUTCOME_CURSOR_KEY) or b""
        horizon_ms = self.map_time_ms - OUTCOME_LIFETIME_MS
        stopped_at: bytes | None = None
        old: list[bytes] = []
        for left, (key, row) in enumerate(view.scan(max(RECORD_PREFIX, cursor), prefix_end(RECORD_PREFIX))):
            if left == SWEEP_ROWS_MAX:
                stopped_at = key
                break
            newest_ms = max(_unpack(row).ended_ms, txid_ms(key[len(RECORD_PREFIX) :]))
            if _unpack(row).ended_ms and newest_ms < horizon_ms:
                old.append(key)
        for key in old:
            view.delete(key)
        if stopped_at is not None:
            view.put(OUTCOME_CURSOR_KEY, stopped_at)
        elif cursor:
            view.delete(OUTCOME_CURSOR_KEY)
        self.sweep_pending = stopped_at is not None


def _pack(record: Record) -> bytes:
    return bytes((_FORMAT,)) + msgpack.packb(record)


def _unpack(row: bytes) -> Record:
    if row[0] != _FORMAT:
        raise UnknownRowFormat(f"transaction record of format {row[0]}")
    state, digest, shards, ended_ms = msgpack.unpackb(row[1:])
    return Record(TxnState(state), digest, tuple(shards), ended_ms)


def _shape_problem(command: Any) -> str | None:
    if type(command) is not list or not command or type(command[0]) is not int or command[0] not in _ITEMS:
        return "unknown command"
    op = command[0]
    if len(command) != _ITEMS[op]:
        return "wrong number of items in the command"
    if op == MAP_TIME:
        good = type(command[1]) is int and 0 <= command[1] <= NUMBER_MAX
        return None if good else "the map time is not a number"
    if op == TAKE_OVER:
        return None
    if op == END:
        good = type(command[1]) is list and len(command[1]) <= ARRAY_LEN_MAX and all(map(is_txid, command[1]))
        return None if good else "not an array of transaction ids"
    if not is_txid(command[1]):
        return "the transaction id is not 16 bytes that begin with a time"
    if op in (DECIDE, SETTLE):
        return None if type(command[2]) is bool else "the outcome is neither true nor false"
    if op == BEGIN and (type(command[2]) is not bytes or len(command[2]) != ID_BYTES):
        return "the digest is not 16 bytes"
    shards = command[-1]
    return None if are_shards(shards) or (op == FENCE and shards == []) else "the shards are not an array of shards"


_ITEMS: Final = {MAP_TIME: 2, BEGIN: 4, DECIDE: 3, FENCE: 3, SETTLE: 3, END: 2, TAKE_OVER: 1}
