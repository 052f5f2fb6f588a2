"""Transactions at one group: votes, decisions, one-group commits, explicit locks, outcomes.

Everything is decided when it is applied, per shard: ownership, versions, locks. What a transaction did in a shard is
kept there as its *outcome* (an abort's is called a tombstone), and moves with the shard; a txid with an outcome never
takes a lock again. Nothing is guessed of a txid that is older than the horizon and has left no record: it is `Expired`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from raftkv.machines.locks import (
    LOCK_MS,
    Explicit,
    Outcome,
    Prepared,
    explicit_key,
    fence_key,
    load_locks,
    outcome_key,
    pack_explicit,
    pack_fence,
    pack_outcome,
    pack_prepared,
    prepared_key,
    unpack_outcome,
)
from raftkv.machines.machine import Command
from raftkv.machines.results import (
    ABORTED,
    CONFLICT,
    EXPIRED,
    LOCKED,
    OK,
    Result,
    bad_request,
)
from raftkv.machines.rows import (
    FENCE_PREFIX,
    KIND_OUTCOME,
    OUTCOME_CURSOR_KEY,
    VALUE_HEADER,
    pack_u64,
    prefix_end,
    unpack_u64,
    unpack_value,
)
from raftkv.machines.shard_states import ShardState
from raftkv.machines.txn_commands import TXN_BEAT, TXN_COMMIT, TXN_DECIDE, TXN_LOCK, TXN_PREPARE, TXN_RESOLVE, txid_ms

if TYPE_CHECKING:
    from raftkv.machines.shards import Shard, Shards
    from raftkv.storage.engine import Overlay, StorageEngine

OUTCOME_LIFETIME_MS: Final = 3_600_000
"""Of map time: how long an outcome is kept at least, and how old a transaction without one may be."""
SWEEP_ROWS_MAX: Final = 1_000
CONFLICT_KEYS_MAX: Final = 100
"""Keys that a Conflict names."""

YES: Final = 1
"""A vote, and the state of a shard where it is committed."""
NO: Final = 0
"""The state of a shard where it is aborted."""
NOT_HERE: Final = -1
"""The state of a shard that isn't served here."""
COMMITTED: Final = 2
"""Instead of a vote: it was committed before."""

_GONE = "it was given up, or lost its locks"
_COORDINATOR = struct.Struct(">I")


class Participants:
    """The transactions of one group. `wrong_group(shard)` makes the refusal of a shard that isn't served here.

    `releases` counts what may have let go of a key.
    """

    def __init__(self, shards: Shards, wrong_group: Callable[[int], Result]) -> None:
        self._shards = shards
        self._wrong_group = wrong_group
        self.handlers: dict[int, Callable[[Overlay, Command], Result]] = {
            TXN_COMMIT: self._commit,
            TXN_PREPARE: self._prepare,
            TXN_DECIDE: self._decide,
            TXN_RESOLVE: self._resolve,
            TXN_LOCK: self._lock,
            TXN_BEAT: self._beat,
        }
        self.releases = 0
        self.load(None, 0)

    def load(self, engine: StorageEngine | None, map_time_ms: int) -> None:
        """After `Shards.load`."""
        self._fences: dict[int, int] = {}
        self.releases += 1
        self.set_map_time(map_time_ms)
        self.sweep_pending = False
        if engine is None:
            return
        self.sweep_pending = engine.get(OUTCOME_CURSOR_KEY) is not None
        for key, row in engine.scan(FENCE_PREFIX, prefix_end(FENCE_PREFIX)):
            self._fences[_COORDINATOR.unpack(key[len(FENCE_PREFIX) :])[0]] = unpack_u64(row)
        for shard in self._shards.here.values():
            if shard.state != ShardState.IMPORTING:
                shard.locks = load_locks(engine, shard)

    def arrived(self, view: Overlay, shard: Shard) -> None:
        """The shard is served here from now on, with what was held in it where it comes from."""
        shard.locks = load_locks(view, shard)

    def set_map_time(self, map_time_ms: int) -> None:
        self._map_time_ms = map_time_ms
        self._horizon_ms = map_time_ms - OUTCOME_LIFETIME_MS

    # ---- what a shell asks

    def is_expired(self, shard: Shard, txid: bytes) -> bool:
        """Whether a txid that has left nothing in the shard may have been forgotten: nothing of it is done any more."""
        return txid_ms(txid) < max(self._horizon_ms, shard.stamp_floor_ms)

    def outcome(self, view: Overlay | StorageEngine, shard: Shard, txid: bytes) -> Outcome | None:
        row = view.get(outcome_key(shard, txid))
        return None if row is None else unpack_outcome(row)

    def in_doubt(self) -> list[tuple[bytes, int, int, int]]:
        """(txid, coordinator, shard, map time since when) of all that is prepared in shards that are served here."""
        return [
            (txid, prepared.coordinator, number, prepared.since_ms)
            for number, shard in sorted(self._shards.serving.items())
            for txid, prepared in shard.locks.prepared.items()
        ]

    def held(self, at_most: int) -> list[tuple[bytes, int, str, list[bytes], int]]:
        """(txid, shard, "prepared" or "explicit", keys, age in ms of map time) of what is locked in shards that are
        served here; so many at most, with as many keys each."""
        found: list[tuple[bytes, int, str, list[bytes], int]] = []
        for number, shard in sorted(self._shards.serving.items()):
            for txid, prepared in shard.locks.prepared.items():
                keys = sorted({*prepared.reads, *(key for key, _ in prepared.writes)})
                found.append((txid, number, "prepared", keys[:at_most], self._map_time_ms - prepared.since_ms))
            for txid, held in shard.locks.held.items():
                keys = sorted(held)
                age_ms = max(0, self._map_time_ms - txid_ms(shard.locks.explicit[keys[0]].age))
                found.append((txid, number, "explicit", keys[:at_most], age_ms))
        return found[:at_most]

    def awaited_by(self, command: Command) -> tuple[int, bytes] | None:
        """(shard, txid) of a prepared transaction, not yet decided here, with which a TXN_COMMIT would conflict."""
        _, txid, parts = command
        for number, reads, writes in parts:
            shard = self._shards.serving.get(number)
            if shard is None or not shard.locks.prepared:
                continue
            holders = [shard.locks.of_read(key, txid) for key, _ in reads]
            holders += [shard.locks.of_prepared(key, txid) for key, _ in writes]
            for holder in holders:
                if holder is not None:
                    return number, holder
        return None

    @property
    def explicit_locks(self) -> int:
        """How many keys are held by explicit locks: while there are any, map time has to advance."""
        return sum(len(shard.locks.explicit) for shard in self._shards.serving.values())

    # ---- commands

    def _commit(self, view: Overlay, command: Command) -> Result:
        """[0, [[shard, revision] …]]. Whatever it answers is the transaction's end in all its shards."""
        _, txid, parts = command
        shards = self._served(number for number, _, _ in parts)
        if isinstance(shards, list):
            return shards
        known = self._known(view, txid, shards)
        if known is not None:
            return known
        if any(txid in shard.locks.prepared for shard in shards.values()):
            return bad_request("a coordinator has prepared this transaction: only that one ends it")
        conflicts = self._conflicts(view, txid, parts)
        if conflicts:
            for shard in shards.values():
                self._end(view, shard, txid, None)
            return [CONFLICT, conflicts]
        return [OK, [[number, self._end(view, shards[number], txid, writes)] for number, _, writes in parts]]

    def _prepare(self, view: Overlay, command: Command) -> Result:
        """[0, YES] or [0, COMMITTED]; a no, for whatever reason, takes no lock."""
        _, txid, coordinator, term, parts = command
        shards = self._served(number for number, _, _ in parts)
        if isinstance(shards, list):
            return shards
        known = self._known(view, txid, shards)
        if known is not None:
            return [OK, COMMITTED] if known[0] == OK else known
        fences = [self._fences, *(shard.locks.fences for shard in shards.values())]
        if any(fence.get(coordinator, 0) > term for fence in fences):
            return [ABORTED, "its coordinator has been replaced"]
        fresh = []
        for part in parts:
            number, reads, writes = part
            before = shards[number].locks.prepared.get(txid)
            if before is None:
                fresh.append(part)
            elif before.writes != writes or before.reads != [key for key, _ in reads]:
                return bad_request("another content was prepared under this transaction id")
        conflicts = self._conflicts(view, txid, fresh)
        if conflicts:
            return [CONFLICT, conflicts]
        for number, reads, writes in fresh:
            shard = shards[number]
            prepared = Prepared(coordinator, term, self._map_time_ms, [key for key, _ in reads], writes)
            shard.locks.prepare(txid, prepared)
            view.put(prepared_key(shard, txid), pack_prepared(prepared))
        return [OK, YES]

    def _decide(self, view: Overlay, command: Command) -> Result:
        """[0, [[shard, YES, NO or NOT_HERE, revision] …]]: how it ended there; a shard that has an outcome keeps it.

        Only NOT_HERE is no acknowledgement.
        """
        _, txid, commit, numbers = command
        states: list[list[int]] = []
        for number in numbers:
            shard = self._shards.serving.get(number)
            if shard is None:
                states.append([number, NOT_HERE, 0])
                continue
            known = self.outcome(view, shard, txid)
            if known is not None:
                states.append([number, YES if known.committed else NO, known.revision])
            elif not commit:
                self._end(view, shard, txid, None)
                states.append([number, NO, 0])
            else:  # without a prepare it was committed so long ago that the outcome has been dropped
                prepared = shard.locks.prepared.get(txid)
                states.append([number, YES, 0 if prepared is None else self._end(view, shard, txid, prepared.writes)])
        return [OK, states]

    def _resolve(self, view: Overlay, command: Command) -> Result:
        """[0, [[txid, shards] …]] of what earlier terms have prepared in shards in any state."""
        _, coordinator, term = command
        if self._fences.get(coordinator, 0) < term:
            self._fences[coordinator] = term
            view.put(FENCE_PREFIX + _COORDINATOR.pack(coordinator), pack_u64(term))
        found: dict[bytes, list[int]] = {}
        for number, shard in sorted(self._shards.here.items()):
            if shard.state == ShardState.SERVING and shard.locks.fences.get(coordinator, 0) < term:
                shard.locks.fences[coordinator] = term
                view.put(fence_key(shard, coordinator), pack_fence(term))
            for txid, prepared in shard.locks.prepared.items():
                if prepared.coordinator == coordinator and prepared.term < term:
                    found.setdefault(txid, []).append(number)
        return [OK, [[txid, numbers] for txid, numbers in sorted(found.items())]]

    def _lock(self, view: Overlay, command: Command) -> Result:
        """[0, [version …]] of the keys, which the transaction holds now; Locked by whom it can't wound."""
        _, txid, age, number, keys = command
        shard = self._shards.serving.get(number)
        if shard is None:
            return self._wrong_group(number)
        known = self._known(view, txid, {number: shard})
        if known is not None:
            return bad_request("the transaction is committed") if known[0] == OK else known
        locks = shard.locks
        victims: set[bytes] = set()
        for key in keys:
            holder = locks.of_prepared(key, txid)
            if holder is None and locks.of_explicit(key, self._map_time_ms, txid) is not None:
                lock = locks.explicit[key]
                if lock.txid in locks.prepared or lock.age <= age:
                    holder = lock.txid
                else:
                    victims.add(lock.txid)
            if holder is not None:
                return [LOCKED, holder]
        for victim in sorted(victims):
            self._end(view, shard, victim, None)
        lock = Explicit(txid, age, self._map_time_ms + LOCK_MS)
        for key in keys:
            if key in locks.explicit and locks.explicit[key].txid != txid:
                self._drop(view, shard, key)
            locks.take(key, lock)
            view.put(explicit_key(shard, key), pack_explicit(lock))
        return [OK, [_version(view, shard, key) for key in keys]]

    def _beat(self, view: Overlay, command: Command) -> Result:
        """[0, map time until which the locks are held]; Aborted when the transaction has lost its locks in a shard."""
        _, txid, numbers = command
        shards = self._served(numbers)
        if isinstance(shards, list):
            return shards
        if any(txid not in shard.locks.held for shard in shards.values()):
            return [ABORTED, _GONE]
        deadline_ms = self._map_time_ms + LOCK_MS
        for shard in shards.values():
            for key in sorted(shard.locks.held[txid]):
                lock = shard.locks.explicit[key]._replace(deadline_ms=deadline_ms)
                shard.locks.explicit[key] = lock
                view.put(explicit_key(shard, key), pack_explicit(lock))
        return [OK, deadline_ms]

    # ---- time

    def map_time_taken(self, view: Overlay, map_time_ms: int) -> None:
        """Drop explicit locks of clients that have gone silent, and outcomes behind the horizon, so many at a time."""
        self.set_map_time(map_time_ms)
        for _, shard in sorted(self._shards.serving.items()):
            silent = [key for key, lock in shard.locks.explicit.items() if lock.deadline_ms < map_time_ms]
            for key in silent:
                if shard.locks.explicit[key].txid not in shard.locks.prepared:
                    self._drop(view, shard, key)
        self._sweep(view)

    def _sweep(self, view: Overlay) -> None:
        cursor = view.get(OUTCOME_CURSOR_KEY) or b""
        stopped_at: bytes | None = None
        old: list[bytes] = []
        left = SWEEP_ROWS_MAX
        for _, shard in sorted(self._shards.serving.items()):
            start = shard.prefix + KIND_OUTCOME
            end = prefix_end(start)
            if end <= cursor or stopped_at is not None:
                continue
            for key, row in view.scan(max(start, cursor), end):
                if left == 0:
                    stopped_at = key
                    break
                left -= 1
                newest_ms = max(unpack_outcome(row).recorded_ms, txid_ms(key[len(start) :]))
                if newest_ms < self._horizon_ms:
                    old.append(key)
        for key in old:
            view.delete(key)
        if stopped_at is not None:
            view.put(OUTCOME_CURSOR_KEY, stopped_at)
        elif cursor:
            view.delete(OUTCOME_CURSOR_KEY)
        self.sweep_pending = stopped_at is not None

    # ---- inside

    def _served(self, numbers: Iterable[int]) -> dict[int, Shard] | Result:
        """The shards by number; the refusal if one of them isn't served here."""
        shards: dict[int, Shard] = {}
        for number in numbers:
            shard = self._shards.serving.get(number)
            if shard is None:
                return self._wrong_group(number)
            shards[number] = shard
        return shards

    def _known(self, view: Overlay, txid: bytes, shards: dict[int, Shard]) -> Result | None:
        """How the transaction has ended, or that nobody can know it; None if it hasn't. A recorded commit decides."""
        outcomes = {number: self.outcome(view, shard, txid) for number, shard in shards.items()}
        committed = [[number, known.revision] for number, known in outcomes.items() if known and known.committed]
        if committed:
            return [OK, committed]
        if any(known is not None for known in outcomes.values()):
            return [ABORTED, _GONE]
        horizon_ms = max(self._horizon_ms, *(shard.stamp_floor_ms for shard in shards.values()))
        if txid_ms(txid) < horizon_ms and not any(txid in shard.locks.prepared for shard in shards.values()):
            return [EXPIRED, "the transaction is too old"]
        return None

    def _conflicts(self, view: Overlay, txid: bytes, parts: list[list[Any]]) -> list[bytes]:
        """Keys that others hold, or that aren't as they were read."""
        conflicts: list[bytes] = []
        for number, reads, writes in parts:
            shard = self._shards.serving[number]
            locks, now = shard.locks, self._map_time_ms
            for key, version in reads:
                held = locks.of_read(key, txid) or locks.of_explicit(key, now, txid)
                if held is not None or _version(view, shard, key) != version:
                    conflicts.append(key)
            conflicts += [key for key, _ in writes if locks.of_write(key, now, txid) is not None]
        return sorted(set(conflicts))[:CONFLICT_KEYS_MAX]

    def _end(self, view: Overlay, shard: Shard, txid: bytes, writes: list[list[Any]] | None) -> int:
        """Commit `writes`, or abort if they are None: record it, let go of everything. The revision of the writes."""
        locks, revision = shard.locks, 0
        self.releases += 1
        if writes is not None:
            revision = self._write(view, shard, writes)
        if locks.unprepare(txid) is not None:
            view.delete(prepared_key(shard, txid))
        for key in sorted(locks.held.get(txid, ())):
            self._drop(view, shard, key)
        view.put(outcome_key(shard, txid), pack_outcome(Outcome(writes is not None, revision, self._map_time_ms)))
        return revision

    def _write(self, view: Overlay, shard: Shard, writes: list[list[Any]]) -> int:
        """All at one revision; none is used up if nothing changes."""
        changes = [(shard.value_prefix + key, value) for key, value in writes]
        changes = [(row_key, value) for row_key, value in changes if value is not None or view.get(row_key) is not None]
        if not changes:
            return shard.revision
        shard.revision += 1
        self._shards.counted(shard)
        for row_key, value in changes:
            if value is None:
                view.delete(row_key)
                shard.last_delete_revision = shard.revision
            else:
                view.put(row_key, VALUE_HEADER.pack(0, shard.revision) + value)
        return shard.revision

    def _drop(self, view: Overlay, shard: Shard, key: bytes) -> None:
        self.releases += 1
        shard.locks.drop(key)
        view.delete(explicit_key(shard, key))


def _version(view: Overlay, shard: Shard, key: bytes) -> int:
    row = view.get(shard.value_prefix + key)
    return shard.last_delete_revision if row is None else unpack_value(row)[1]
