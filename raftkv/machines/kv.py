"""The key-value machine of one group: the shards that it serves, their keys, versions and sessions.

What a command does is decided when it is applied, ownership included: a command that was in the log
before a shard froze is refused after it. Nothing here may depend on anything but the rows and the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from raftkv.machines.drains import Drain
from raftkv.machines.exports import Exports, Page
from raftkv.machines.imports import Imports
from raftkv.machines.kv_reads import read_page
from raftkv.machines.locks import Outcome
from raftkv.machines.machine import Command, SessionedMachine, header_problem
from raftkv.machines.moves import (
    EXPORT_ASK,
    EXPORT_LIST,
    EXPORT_RELEASE,
    IMPORT_ASK,
    IMPORT_CHUNK,
    IMPORT_DROP,
    IMPORT_INSTALL,
    IMPORT_RELEASED,
    IMPORT_START,
    MOVE_OPS,
    shape_problem,
)
from raftkv.machines.participants import Participants
from raftkv.machines.results import (
    CAS_MISMATCH,
    LOCKED,
    OK,
    TOO_LARGE,
    VERSION_MISMATCH,
    WRONG_GROUP,
    Result,
    bad_request,
    raise_if_refused,
)
from raftkv.machines.rows import (
    MAP_TIME_KEY,
    VALUE_HEADER,
    ImportProgress,
    Incarnation,
    ShardMeta,
    meta_key,
    pack_u64,
    prefix_end,
    unpack_u64,
    unpack_value,
)
from raftkv.machines.sessions import SESSION_CACHE_WEIGHT, SESSION_LIFETIME_MS
from raftkv.machines.shard_map import NO_GROUP, ShardMap
from raftkv.machines.shard_states import ShardEvent, ShardState
from raftkv.machines.shards import Shard, Shards
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import TXN_OPS, refuse_txn_shape
from raftkv.protocol import errors
from raftkv.protocol.limits import GID_MAX, KEY_BYTES_MAX, NUMBER_MAX, VALUE_BYTES_MAX

if TYPE_CHECKING:
    from raftkv.raft.entry import Entry
    from raftkv.storage.engine import Overlay, StorageEngine

PUT: Final = 1
APPEND: Final = 2
DELETE: Final = 3
CAS: Final = 4
CONFIG: Final = 32
MAP_TIME: Final = 33
DRAIN: Final = 43
LIFT: Final = 44

_ITEMS: Final = {PUT: 9, APPEND: 8, DELETE: 7, CAS: 9}

CAS_CURRENT_BYTES_MAX: Final = 128
"""A CasMismatch shows the current value up to this size, because the reply is kept in the session row.
A longer one is left out: current None beside a version that isn't 0."""


class KvMachine(SessionedMachine):
    """The state machine of group `gid`."""

    def __init__(
        self,
        gid: int,
        *,
        session_lifetime_ms: int = SESSION_LIFETIME_MS,
        cache_weight: int = SESSION_CACHE_WEIGHT,
    ) -> None:
        assert 0 < gid <= GID_MAX, gid
        super().__init__(session_lifetime_ms, cache_weight)
        self.gid = gid
        self._shards = Shards(gid)
        self._serving = self._shards.serving
        self._imports = Imports(self._shards)
        self._exports = Exports(self._shards)
        self._drain = Drain(self._shards)
        self._participants = Participants(self._shards, self._refuse_shard)
        self._index = 0
        self._system_ops = frozenset((CONFIG, MAP_TIME, DRAIN, LIFT, *MOVE_OPS, *TXN_OPS))
        self._writes = {PUT: self._put, APPEND: self._append, DELETE: self._delete, CAS: self._cas}
        self._handlers = dict.fromkeys(self._writes, self._execute_unlocked)
        self._moves = {
            IMPORT_START: self._imports.start,
            IMPORT_CHUNK: self._imports.chunk,
            IMPORT_ASK: self._imports.ask,
            IMPORT_INSTALL: self._install,
            IMPORT_DROP: self._imports.drop,
            IMPORT_RELEASED: self._imports.released,
            EXPORT_LIST: self._export_list,
            EXPORT_ASK: self._exports.ask,
            EXPORT_RELEASE: self._exports.release,
        }
        self._reset(None)

    def dead_ranges(self) -> list[tuple[bytes, bytes]]:
        return self._shards.dead_ranges()

    def _reset(self, engine: StorageEngine | None) -> None:
        self._shards.load(engine)
        self._imports.load(engine)
        self._exports.load(engine)
        self._drain.load(engine)
        self._sessions.clear(engine)
        row = None if engine is None else engine.get(MAP_TIME_KEY)
        self._set_map_time(0 if row is None else unpack_u64(row))
        self._participants.load(engine, self._map_time_ms)

    def load(self, engine: StorageEngine) -> None:
        self._reset(engine)

    def apply(self, view: Overlay, entry: Entry, commands: Sequence[Command] | None = None) -> list[Result]:
        results = super().apply(view, entry, commands)
        self._exports.note_changes(view, entry.index)
        return results

    # ---- what a shell asks

    @property
    def config(self) -> ShardMap | None:
        """The latest configuration applied; None before the first."""
        return self._shards.config

    @property
    def config_num(self) -> int:
        return self._shards.config_num

    @property
    def shard_count(self) -> int:
        """The cluster's number of shards; 0 before the first configuration."""
        return self._shards.count

    def serves(self, shard: int) -> bool:
        return shard in self._serving

    def shard_states(self) -> list[tuple[int, ShardState]]:
        """Every shard that isn't absent, ascending."""
        return [(number, shard.state) for number, shard in sorted(self._shards.here.items())]

    def owns(self, shard: int) -> bool:
        """Whether this group is the shard's latest owner, whoever serves it now."""
        return self._shards.owner(shard).last == self.gid

    def prefixes(self) -> list[bytes]:
        """Of all keys that belong to the shards that are here: their rows, and those that say what they are."""
        here = self._shards.here.values()
        return [prefix for shard in here for prefix in (shard.prefix, meta_key(shard.number))]

    def awaited_shards(self) -> list[int]:
        """Shards whose latest owner is this group and that have to come yet, ascending."""
        return [
            number
            for number, owner in enumerate(self._shards.owners)
            if owner.last == self.gid and number not in self._serving and not self._drain.is_drained(number)
        ]

    def holder(self, shard: int) -> int:
        """The gid to ask for a shard that isn't served here; -1 when nobody is known.

        Of a shard that is on its way from here the group that gets it, of one that is on its way to here the
        group that it comes from; else its last owner, or, when that is this group, the one before it.
        """
        importing, exporting = self._imports.progress.get(shard), self._exports.lists.get(shard)
        last, before, _ = self._shards.owner(shard)
        if self._drain.is_drained(shard):
            gid = NO_GROUP
        elif importing is not None:
            gid = importing.source_gid
        elif exporting is not None:
            gid = exporting.to_gid
        else:
            gid = before if last == self.gid else last
        return -1 if gid == NO_GROUP else gid

    def get(self, engine: StorageEngine, shard: int, key: bytes) -> tuple[bytes | None, int]:
        """The key's value and version; for an absent key None and the shard's last-delete revision.

        Raise WrongGroup unless the shard is served here, Locked while a prepared transaction decides what the key
        holds. `engine` holds what was applied last.
        """
        here = self._serving.get(shard)
        if here is None:
            raise self.wrong_group(shard)
        writer = here.locks.writers.get(key)
        if writer is not None:
            raise errors.Locked(writer)
        row = engine.get(here.value_prefix + key)
        return (None, here.last_delete_revision) if row is None else unpack_value(row)

    def scan(
        self,
        engine: StorageEngine,
        shard: int,
        prefix: bytes,
        after_key: bytes | None,
        max_pairs: int,
        max_bytes: int,
    ) -> tuple[list[list[Any]], bool]:
        """A page of the shard's keys that begin with `prefix` and lie after `after_key`, ascending, as
        [key, value, version], and whether there are more. Raise WrongGroup unless the shard is served,
        Locked while a prepared transaction decides what is on the page.

        Both bounds are cut to the protocol's; one pair always fits.
        """
        here = self._serving.get(shard)
        if here is None:
            raise self.wrong_group(shard)
        page, more = read_page(engine, here.value_prefix, prefix, after_key, max_pairs, max_bytes)
        if here.locks.writers:
            writer = _writer_on_page(here, prefix, after_key, page[-1][0] if more else None)
            if writer is not None:
                raise errors.Locked(writer)
        return page, more

    def wrong_group(self, shard: int) -> errors.WrongGroup:
        return errors.WrongGroup(self.config_num, self.holder(shard))

    @property
    def drain_num(self) -> int:
        """The drain for which this group has stopped to serve; 0 if there is none."""
        return self._drain.num

    def in_doubt(self) -> list[tuple[bytes, int, int, int]]:
        """What waits for a coordinator's decision; see `Participants.in_doubt`."""
        return self._participants.in_doubt()

    def held_locks(self, at_most: int) -> list[tuple[bytes, int, str, list[bytes], int]]:
        """What transactions hold here; see `Participants.held`."""
        return self._participants.held(at_most)

    @property
    def explicit_locks(self) -> int:
        return self._participants.explicit_locks

    @property
    def sweep_pending(self) -> bool:
        return self._sessions.sweep_pending or self._participants.sweep_pending

    @property
    def unlocks(self) -> int:
        """Differs from an earlier value when something has ceased to be locked or served since."""
        return self._participants.releases + self._shards.changes

    def outcome(self, engine: StorageEngine, shard: int, txid: bytes) -> Outcome | None:
        """How the transaction ended in the shard, if that is recorded. Raise WrongGroup unless it is served here."""
        here = self._serving.get(shard)
        if here is None:
            raise self.wrong_group(shard)
        return self._participants.outcome(engine, here, txid)

    def is_expired(self, shard: int, txid: bytes) -> bool:
        """Whether a transaction that has left nothing in the shard, which is served here, may have been forgotten."""
        return self._participants.is_expired(self._serving[shard], txid)

    def check(self, engine: StorageEngine, shard: int, keys: Sequence[bytes]) -> list[int]:
        """The keys' versions, all of one state. Raise WrongGroup unless the shard is served here, Locked while a
        prepared transaction writes one of them."""
        return [self.get(engine, shard, key)[1] for key in keys]

    def is_prepared(self, shard: int, txid: bytes) -> bool:
        """Whether the transaction is prepared in a shard that is served here."""
        here = self._serving.get(shard)
        return here is not None and txid in here.locks.prepared

    def holds_locks(self, shard: int, txid: bytes) -> bool:
        """Whether the transaction holds any lock in a shard that is served here."""
        here = self._serving.get(shard)
        return here is not None and (txid in here.locks.prepared or txid in here.locks.held)

    def commit_blocked_by(self, command: Command) -> tuple[int, bytes] | None:
        """(shard, txid) of another transaction, prepared here, that holds a key which this TXN_COMMIT uses; or None."""
        return self._participants.awaited_by(command)

    def writer_blocked_by(self, shard: int, key: bytes) -> bytes | None:
        """The transaction that keeps plain writes to the key out; None too if the shard isn't served here."""
        here = self._serving.get(shard)
        return None if here is None else here.locks.of_write(key, self._map_time_ms)

    # ---- what those ask who move shards

    @property
    def changes(self) -> int:
        """Differs from an earlier value when shards, configuration or releases have changed since."""
        return self._shards.changes

    def importing(self) -> list[int]:
        """The shards that are being imported, ascending."""
        return sorted(self._imports.progress)

    def import_of(self, shard: int) -> tuple[Incarnation, ImportProgress] | None:
        """The import of the shard that is under way, and how far it is."""
        progress = self._imports.progress.get(shard)
        return None if progress is None else (self._shards.here[shard].incarnation, progress)

    def state(self, shard: int) -> ShardState:
        here = self._shards.here.get(shard)
        return ShardState.ABSENT if here is None else here.state

    def owned_since(self, shard: int) -> int:
        """The number of the configuration that gave the shard to its latest owner."""
        return self._shards.owner(shard).since

    def past_owners(self, engine: StorageEngine, shard: int) -> Iterator[int]:
        """Whom to ask for the shard: the other groups that ever owned it, the latest first, once each."""
        return self._shards.past_owners(engine, shard)

    def addresses_of(self, engine: StorageEngine, gid: int) -> tuple[str, ...]:
        """Where the group is, or was when it left; empty if no configuration has it."""
        return self._shards.addresses_of(engine, gid)

    def releases(self) -> list[tuple[int, int, int]]:
        """(shard, configuration number, source gid) of what has arrived and isn't acknowledged as released."""
        return [(*key, gid) for key, gid in sorted(self._imports.releases.items())]

    def release_source(self, shard: int, config_num: int) -> int:
        """The group that holds what arrived by that configuration; -1 when it has acknowledged the release."""
        return self._imports.releases.get((shard, config_num), -1)

    def check_export(self, shard: int, to_gid: int, config_num: int) -> None:
        """Raise what a request for a list would be refused with; it may be said without the log, by any replica."""
        raise_if_refused(self._exports.refusal(shard, to_gid, config_num))

    def pull(self, engine: StorageEngine, shard: int, claim: tuple[int, int, int, int], cursor: bytes) -> Page:
        """A page of all rows of the shard; see `Exports.pull`."""
        return self._exports.pull(engine, shard, claim, cursor)

    def changed_rows(
        self, engine: StorageEngine, shard: int, claim: tuple[int, int, int, int], since: int, cursor: bytes
    ) -> tuple[Page, list[int] | None]:
        """A page of what was touched after entry `since` (see `Exports.changes`); and, when the shard is frozen,
        its counters and the map time: [revision, last-delete revision, stamp floor in ms, map time in ms]."""
        page = self._exports.changes(engine, shard, claim, since, cursor)
        counters = self._exports.counters(shard)
        return page, None if counters is None else [*counters, self._map_time_ms]

    # ---- shape: the same before the log and at apply

    def _refuse_shape(self, command: Command) -> Result | None:
        if type(command) is not list or not command or type(command[0]) is not int:
            return bad_request("the command is not an array that begins with its number")
        op = command[0]
        items = _ITEMS.get(op)
        if items is None:
            return self._refuse_system_shape(command)
        problem = header_problem(command, items)
        if problem is not None:
            return bad_request(problem)
        key = command[6]
        if type(key) is not bytes:
            return bad_request("the key is not bytes")
        if len(key) > KEY_BYTES_MAX:
            return [TOO_LARGE, "the key", KEY_BYTES_MAX]
        shards = self._shards.count
        if shards and command[1] != shard_of(key, shards):
            return bad_request("the key is not of this shard")
        if op == DELETE:
            return None
        value = command[7]
        if type(value) is not bytes:
            return bad_request("the value is not bytes")
        if len(value) > VALUE_BYTES_MAX:
            return [TOO_LARGE, "the value", VALUE_BYTES_MAX]
        if op == PUT:
            version = command[8]
            if version is not None and (type(version) is not int or not 0 <= version <= NUMBER_MAX):
                return bad_request("the version is neither absent nor a number")
        elif op == CAS:
            if type(command[8]) is not bytes:
                return bad_request("the new value is not bytes")
            if len(command[8]) > VALUE_BYTES_MAX:
                return [TOO_LARGE, "the new value", VALUE_BYTES_MAX]
        return None

    def _refuse_system_shape(self, command: Command) -> Result | None:
        if command[0] in MOVE_OPS:
            problem = shape_problem(command)
            return None if problem is None else bad_request(problem)
        if command[0] in TXN_OPS:
            return refuse_txn_shape(command, self._shards.count)
        if command[0] not in self._system_ops:
            return bad_request("unknown command")
        if len(command) != (3 if command[0] == DRAIN else 2):
            return bad_request("wrong number of items in the command")
        argument = command[1]
        if command[0] in (DRAIN, LIFT):
            good = all(type(number) is int and 0 < number <= NUMBER_MAX for number in command[1:])
            return None if good else bad_request("the drain or the configuration is not a number")
        if command[0] == CONFIG and type(argument) is not bytes:
            return bad_request("the configuration is not bytes")
        if command[0] == MAP_TIME and (type(argument) is not int or not 0 <= argument <= NUMBER_MAX):
            return bad_request("the map time is not a number")
        return None

    # ---- client writes

    def _execute_once(self, view: Overlay, command: Command) -> Result:
        shard = self._serving.get(command[1])
        if shard is None:
            return self._refuse_shard(command[1])
        session_key = shard.session_prefix + command[2]
        return self._answer_once(view, session_key, shard.stamp_floor_ms, command, shard)

    def _refuse_shard(self, shard: int) -> Result:
        return [WRONG_GROUP, self.config_num, self.holder(shard)]

    def _execute_unlocked(self, view: Overlay, shard: Shard, command: Command) -> Result:
        """A write to one key, unless a transaction holds it; that refusal isn't the request's last answer."""
        holder = shard.locks.of_write(command[6], self._map_time_ms)
        return [LOCKED, holder] if holder is not None else self._writes[command[0]](view, shard, command)

    def _write(self, view: Overlay, shard: Shard, row_key: bytes, value: bytes) -> Result:
        revision = shard.revision + 1
        shard.revision = revision
        self._shards.counted(shard)
        view.put(row_key, VALUE_HEADER.pack(0, revision) + value)
        return [OK, revision]

    def _put(self, view: Overlay, shard: Shard, command: Command) -> Result:
        row_key = shard.value_prefix + command[6]
        if_version = command[8]
        if if_version is not None:
            row = view.get(row_key)
            version = 0 if row is None else unpack_value(row)[1]
            if version != if_version:
                return [VERSION_MISMATCH, version]
        return self._write(view, shard, row_key, command[7])

    def _append(self, view: Overlay, shard: Shard, command: Command) -> Result:
        row_key = shard.value_prefix + command[6]
        row = view.get(row_key)
        value: bytes = command[7] if row is None else unpack_value(row)[0] + command[7]
        if len(value) > VALUE_BYTES_MAX:
            return [TOO_LARGE, "the value with the suffix", VALUE_BYTES_MAX]
        return self._write(view, shard, row_key, value)

    def _delete(self, view: Overlay, shard: Shard, command: Command) -> Result:
        row_key = shard.value_prefix + command[6]
        if view.get(row_key) is None:
            return [OK, False, shard.last_delete_revision]
        shard.revision = shard.last_delete_revision = shard.revision + 1
        self._shards.counted(shard)
        view.delete(row_key)
        return [OK, True, shard.revision]

    def _cas(self, view: Overlay, shard: Shard, command: Command) -> Result:
        row_key = shard.value_prefix + command[6]
        row = view.get(row_key)
        if row is None:
            return [CAS_MISMATCH, None, 0]
        current, version = unpack_value(row)
        if current != command[7]:
            return [CAS_MISMATCH, current if len(current) <= CAS_CURRENT_BYTES_MAX else None, version]
        return self._write(view, shard, row_key, command[8])

    # ---- the system's commands

    def _execute_system(self, view: Overlay, command: Command) -> Result:
        op = command[0]
        if op == CONFIG:
            return self._apply_config(view, command[1])
        if op == DRAIN:
            return self._drain.begin(view, command[1], command[2], len(self._exports.lists))
        if op == LIFT:
            return self._drain.lift(view, command[1])
        if op in TXN_OPS:
            return self._participants.handlers[op](view, command)
        if op != MAP_TIME:
            return self._moves[op](view, command)
        self._advance_map_time(view, command[1])
        ranges = [
            (self._serving[number].session_prefix, prefix_end(self._serving[number].session_prefix))
            for number in sorted(self._serving)
        ]
        self._sessions.sweep(view, ranges, self._horizon_ms)
        self._exports.map_time_taken(view, self._map_time_ms)
        self._participants.map_time_taken(view, self._map_time_ms)
        return [OK, self._map_time_ms]

    def _advance_map_time(self, view: Overlay, map_time_ms: int) -> None:
        if map_time_ms > self._map_time_ms:
            self._set_map_time(map_time_ms)
            self._participants.set_map_time(map_time_ms)
            view.put(MAP_TIME_KEY, pack_u64(map_time_ms))

    def _apply_config(self, view: Overlay, encoded: bytes) -> Result:
        """Configurations are taken strictly in order; one that is known already changes nothing.

        None takes a shard that is served away, only its next owner's ask does; but one may give up all shards.
        """
        try:
            config = ShardMap.decode(encoded)
        except ValueError:
            return bad_request("the configuration can't be decoded")
        shards = self._shards
        if config.num <= shards.config_num:
            return [OK, shards.config_num]
        if config.num != shards.config_num + 1:
            return bad_request("a configuration before this one is missing")
        if shards.count not in (0, config.shards):
            return bad_request("the configuration has another number of shards")
        self._drain.config_taken(view)
        if config.given_up_ms:
            self._imports.give_up(view)
            self._exports.give_up(view)
            shards.give_up(view)
        for number in shards.take_config(view, config, encoded):
            meta = ShardMeta(ShardState.SERVING, Incarnation(config.num, 0), 0, 0, shards.floor_ms)
            shards.arrive(view, number, ShardEvent.FIRST_ASSIGNED, meta)
        self._imports.config_taken(view)
        self._exports.config_taken(view)
        return [OK, config.num]

    def _install(self, view: Overlay, command: Command) -> Result:
        """The map time moves with the shard: what had expired there must not be executed here."""
        result = self._imports.install(view, command)
        if result[1]:
            self._advance_map_time(view, command[-1])
            self._participants.arrived(view, self._shards.here[command[1]])
        return result

    def _export_list(self, view: Overlay, command: Command) -> Result:
        return self._exports.open_list(view, command, self._index, self._map_time_ms)

    def _begin_entry(self, view: Overlay, entry: Entry) -> None:
        """A group's map time comes by MAP_TIME and with shards only, never by an entry's stamp."""
        self._index = entry.index

    def _flush(self, view: Overlay) -> None:
        self._sessions.flush(view)
        self._shards.flush(view)


def _writer_on_page(shard: Shard, prefix: bytes, after_key: bytes | None, last_key: bytes | None) -> bytes | None:
    """The prepared transaction that writes a key of the page: up to `last_key`, or to the end."""
    return next(
        (
            txid
            for key, txid in shard.locks.writers.items()
            if key.startswith(prefix)
            and (after_key is None or key > after_key)
            and (last_key is None or key <= last_key)
        ),
        None,
    )
