"""The exporter's side of a migration: log entries and reads of the group that a shard leaves.

    Serving ── list ──> Serving, with a list ── ask ──> Exporting ── release ──> Absent

From the entry that makes the list on, every key of the shard that an entry changes is noted in it, deletes included,
rows of all kinds, with the entry's index. So whoever copied the rows from a state at or after that entry can ask for
what has changed since. The ask freezes the shard, and is refused, with nothing frozen, when the list isn't there any
more. The shard is then kept, frozen, until the importer has it durably and releases it.

Which ask is right is decided by the history of owners, at apply: the importer must be the last owner as of the latest
configuration that this group has logged, by the very configuration that it names. Hence a shard that was frozen
for a group can't be frozen for another one, and an ask that was once refused as superseded is never granted.

Nothing here may freeze a shard by a configuration alone, or drop a frozen one without its importer's release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from raftkv.machines.machine import Command
from raftkv.machines.results import BUSY, LIST_LOST, NOT_HOLDER, OK, SUPERSEDED, UNAVAILABLE, Result, bad_request
from raftkv.machines.rows import (
    KIND_TOUCHED,
    META_END,
    META_PREFIX,
    ExportList,
    export_key,
    pack_export,
    pack_u64,
    prefix_end,
    unpack_export,
    unpack_u64,
)
from raftkv.machines.shard_states import ShardEvent, ShardState
from raftkv.machines.shards import META_KEY_BYTES, Shard, Shards
from raftkv.protocol import errors

if TYPE_CHECKING:
    from raftkv.storage.engine import Overlay, StorageEngine

LIST_ROWS_MAX: Final = 1_000_000
LIST_BYTES_MAX: Final = 128 * 1024 * 1024
"""Touched keys of one shard. Beyond either bound the list is dropped, and the importer copies again."""
LIST_IDLE_MS: Final = 600_000
"""A list that nobody asked for in this time (of map time) goes. Importers ask again every few minutes."""
PAGE_ROWS_MAX: Final = 1_000
PAGE_BYTES_MAX: Final = 64 * 1024
"""One page, beyond which no further row is added: small enough that serving goes on between pages."""
PAGE_EXAMINED_MAX: Final = 4_000
"""Touched keys looked at for one page: most of them may be older than what is asked for."""

_PREFIX_BYTES: Final = 15
_ID_BYTES: Final = 8

Page = tuple[list[list[bytes | None]], bytes | None]
"""Rows [suffix, row or None], and the cursor to go on from; None after the last page."""


class Exports:
    """The lists and the frozen shards of one group."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.lists: dict[int, ExportList] = {}
        self._by_prefix: dict[bytes, Shard] = {}

    def load(self, engine: StorageEngine | None) -> None:
        """After `Shards.load`."""
        self.lists.clear()
        self._by_prefix.clear()
        if engine is None:
            return
        for key, row in engine.scan(META_PREFIX, META_END):
            if key[META_KEY_BYTES:] == b"x":
                shard = self._shards.here[int.from_bytes(key[1:META_KEY_BYTES])]
                self.lists[shard.number] = unpack_export(row)
                self._by_prefix[shard.prefix] = shard

    # ---- what goes on beside the commands

    def note_changes(self, view: Overlay, index: int) -> None:
        """At the end of entry `index`: note in the lists which keys it has changed."""
        if not self.lists:
            return
        stamp = pack_u64(index)
        for key in [key for key in view.changes if key[:_PREFIX_BYTES] in self._by_prefix]:
            shard = self._by_prefix.get(key[:_PREFIX_BYTES])
            suffix = key[_PREFIX_BYTES:]
            if shard is None or suffix[:1] == KIND_TOUCHED:
                continue  # its list has overflowed just now; or this is the list itself
            known = self.lists[shard.number]
            touched_key = shard.prefix + KIND_TOUCHED + pack_u64(known.list_id) + suffix
            if view.get(touched_key) is None:
                known = known._replace(rows=known.rows + 1, size_bytes=known.size_bytes + len(suffix))
                self._keep(view, shard, known)
            view.put(touched_key, stamp)
            too_long = known.rows > LIST_ROWS_MAX or known.size_bytes > LIST_BYTES_MAX
            if too_long and shard.state == ShardState.SERVING:  # not if this very entry has frozen it
                self._drop(view, shard)

    def config_taken(self, view: Overlay) -> None:
        """Drop the lists whose importer isn't the owner any more; a frozen shard stays as it is."""
        for number, known in sorted(self.lists.items()):
            last, _, since = self._shards.owner(number)
            if number in self._shards.serving and (last, since) != (known.to_gid, known.config_num):
                self._drop(view, self._shards.here[number])

    def map_time_taken(self, view: Overlay, map_time_ms: int) -> None:
        """Drop the lists that nobody has asked for in a long time."""
        for number, known in sorted(self.lists.items()):
            if number in self._shards.serving and known.asked_ms + LIST_IDLE_MS < map_time_ms:
                self._drop(view, self._shards.here[number])

    def give_up(self, view: Overlay) -> None:
        """All shards are given up: nobody will come for one."""
        for number in self.lists:
            view.delete(export_key(number))
        self.lists.clear()
        self._by_prefix.clear()

    # ---- commands

    def open_list(self, view: Overlay, command: Command, index: int, map_time_ms: int) -> Result:
        """[0, list id]. Asked again, the same attempt gets the same list."""
        _, number, to_gid, config_num, attempt = command
        refusal = self.refusal(number, to_gid, config_num)
        if refusal is not None:
            return refusal
        shard = self._shards.serving[number]
        known = self.lists.get(number)
        if known is not None and known[:2] == (to_gid, config_num) and attempt <= known.attempt:
            if attempt < known.attempt:
                return [LIST_LOST, known.attempt]
            self._keep(view, shard, known._replace(asked_ms=map_time_ms))
            return [OK, known.list_id]
        if known is not None:
            self._drop(view, shard)
        self._by_prefix[shard.prefix] = shard
        self._keep(view, shard, ExportList(to_gid, config_num, attempt, index, 0, 0, map_time_ms))
        return [OK, index]

    def ask(self, view: Overlay, command: Command) -> Result:
        """[0]: the shard is frozen for this ask, now or since an earlier time."""
        _, number, to_gid, config_num, attempt, list_id, base_index = command
        known = self.lists.get(number)
        frozen = known is not None and number not in self._shards.serving
        if not (frozen and known is not None and known[:2] == (to_gid, config_num)):
            refusal = self.refusal(number, to_gid, config_num)
            if refusal is not None:
                return refusal
        if known is None or known[:4] != (to_gid, config_num, attempt, list_id) or base_index < list_id:
            return [LIST_LOST, attempt if known is None else known.attempt]
        if not frozen:
            self._shards.change(view, self._shards.here[number], ShardEvent.FROZEN)
        return [OK]

    def release(self, view: Overlay, command: Command) -> Result:
        """[0, whether there was anything to release]: acknowledged in any case, since the importer asks only
        when the shard has arrived there."""
        _, number, to_gid, config_num = command
        known = self.lists.get(number)
        if known is None or number in self._shards.serving or known[:2] != (to_gid, config_num):
            return [OK, False]
        shard = self._shards.here[number]
        del self.lists[number]
        del self._by_prefix[shard.prefix]
        view.delete(export_key(number))
        self._shards.leave(view, shard, ShardEvent.RELEASED)
        return [OK, True]

    def refusal(self, number: int, to_gid: int, config_num: int) -> Result | None:
        """Why the shard can't be given to `to_gid` as of configuration `config_num`, or not now.

        What is said for ever (superseded, not the holder) is right even if it is said of an old state: the last
        owner doesn't get a shard back by the same configuration.
        """
        shards = self._shards
        if shards.config_num < config_num:
            return [UNAVAILABLE, f"group {shards.gid} has not taken configuration {config_num} yet"]
        last, _, since = shards.owner(number)
        if since > config_num:
            return [SUPERSEDED, since]
        if (last, since) != (to_gid, config_num) or to_gid == shards.gid:
            return bad_request(f"configuration {config_num} did not give shard {number} to group {to_gid}")
        shard = shards.here.get(number)
        if shard is None:
            return [NOT_HOLDER, -1]
        if shard.state == ShardState.IMPORTING:
            return [BUSY, f"shard {number} is still on its way to group {shards.gid}"]
        if shard.state == ShardState.EXPORTING:
            return [NOT_HOLDER, self.lists[number].to_gid]
        return None

    # ---- reads

    def pull(self, engine: StorageEngine, number: int, claim: tuple[int, int, int, int], cursor: bytes) -> Page:
        """The rows after `cursor`, in the order of their suffixes. `claim` is (to_gid, configuration number,
        attempt, list id); raise ListLost unless the list of just that is kept in this state."""
        shard = self._claimed(number, claim)
        rows: list[list[bytes | None]] = []
        size_bytes = 0
        after_lists = shard.prefix + bytes((KIND_TOUCHED[0] + 1,))
        start = shard.prefix + cursor + b"\x00" if cursor else shard.prefix
        for begin, end in (
            (start, shard.prefix + KIND_TOUCHED),
            (max(start, after_lists), prefix_end(shard.prefix)),
        ):
            if begin >= end:
                continue
            for key, row in engine.scan(begin, end):
                if len(rows) >= PAGE_ROWS_MAX or size_bytes >= PAGE_BYTES_MAX:
                    return rows, rows[-1][0]
                rows.append([key[_PREFIX_BYTES:], row])
                size_bytes += len(key) - _PREFIX_BYTES + len(row)
        return rows, None

    def changes(
        self, engine: StorageEngine, number: int, claim: tuple[int, int, int, int], since: int, cursor: bytes
    ) -> Page:
        """What was touched by entries after `since`, as it is now (None: deleted); otherwise as `pull`."""
        shard = self._claimed(number, claim)
        rows: list[list[bytes | None]] = []
        size_bytes = 0
        list_prefix = shard.prefix + KIND_TOUCHED + pack_u64(claim[3])
        start = list_prefix + cursor + b"\x00" if cursor else list_prefix
        last_suffix = cursor
        for examined, (key, stamp) in enumerate(engine.scan(start, prefix_end(list_prefix))):
            if examined >= PAGE_EXAMINED_MAX or len(rows) >= PAGE_ROWS_MAX or size_bytes >= PAGE_BYTES_MAX:
                return rows, last_suffix
            last_suffix = key[_PREFIX_BYTES + 1 + _ID_BYTES :]
            if unpack_u64(stamp) > since:
                row = engine.get(shard.prefix + last_suffix)
                rows.append([last_suffix, row])
                size_bytes += len(last_suffix) + len(row or b"")
        return rows, None

    def counters(self, number: int) -> list[Any] | None:
        """[revision, last-delete revision, stamp floor] of a frozen shard: they don't change any more."""
        shard = self._shards.here.get(number)
        if shard is None or shard.state != ShardState.EXPORTING:
            return None
        return [shard.revision, shard.last_delete_revision, shard.stamp_floor_ms]

    # ---- inside

    def _claimed(self, number: int, claim: tuple[int, int, int, int]) -> Shard:
        known = self.lists.get(number)
        if known is None or known[:4] != claim:
            raise errors.ListLost(claim[2] if known is None else known.attempt)
        return self._shards.here[number]

    def _keep(self, view: Overlay, shard: Shard, known: ExportList) -> None:
        self.lists[shard.number] = known
        view.put(export_key(shard.number), pack_export(known))

    def _drop(self, view: Overlay, shard: Shard) -> None:
        """Nobody follows what is touched any more."""
        del self.lists[shard.number]
        del self._by_prefix[shard.prefix]
        view.delete(export_key(shard.number))
        lists = shard.prefix + KIND_TOUCHED
        view.delete_range(lists, prefix_end(lists))
