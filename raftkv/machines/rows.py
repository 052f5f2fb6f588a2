"""Keys and rows in the engine: the format on disk, and what moves with a shard.

All integers are big-endian, so that keys sort by number. Reasons and the whole table are in
docs/decisions/0001-row-formats.md. Formats here must never change meaning: a new one gets a new format
number, a new kind byte or a flag.

    \\x00…                                              the store's own rows
    g r COORDINATOR                                    term below which nothing of its is prepared in any shard here
    g o                                                cursor of the sweep of outcomes
    g k                                                the groups of coordinators, at the controllers
    g c NUM                                            configuration NUM, encoded
    g h | g n | g s | g t | g i | g f | g d            history of owners, latest number, sweep cursor,
                                                       map time, cluster identity, stamp floor, drain
    m SHARD                                            the shard's meta row
    m SHARD i | m SHARD x | m SHARD r CONFIG_NUM       progress of an import, an export's list of touched
                                                       keys, a release that the source owes an answer to
    t TXID | u TXID                                    the coordinators' record; it is there while it has no end
    s SHARD CONFIG_NUM ATTEMPT kind …                  a shard's data, under its incarnation:
        k KEY        value row                             c CLIENT     session row
        l KEY        explicit lock                         p TXID       prepared transaction
        o TXID       outcome                               d LIST …     touched keys: index of the last touch
        f COORDINATOR                                      term below which nothing of its is prepared
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from raftkv.machines.shard_states import ShardState

CONFIG_PREFIX: Final = b"gc"
HISTORY_KEY: Final = b"gh"
CONFIG_NUM_KEY: Final = b"gn"
SWEEP_CURSOR_KEY: Final = b"gs"
MAP_TIME_KEY: Final = b"gt"
FLOOR_KEY: Final = b"gf"
CLUSTER_KEY: Final = b"gi"
RECORD_PREFIX: Final = b"t"
OPEN_PREFIX: Final = b"u"
FENCE_PREFIX: Final = b"gr"
OUTCOME_CURSOR_KEY: Final = b"go"
COORDINATORS_KEY: Final = b"gk"
DRAIN_KEY: Final = b"gd"
META_PREFIX: Final = b"m"
META_END: Final = b"n"
DATA_PREFIX: Final = b"s"
DATA_END: Final = b"t"

KIND_VALUE: Final = b"k"
KIND_SESSION: Final = b"c"
KIND_LOCK: Final = b"l"
KIND_PREPARED: Final = b"p"
KIND_OUTCOME: Final = b"o"
KIND_FENCE: Final = b"f"
KIND_TOUCHED: Final = b"d"

CONTROLLER_SHARD: Final = 0xFFFF
"""The pseudo-shard of the controllers' sessions; beyond any real shard (at most 16384 of them)."""

_U64 = struct.Struct(">Q")
_SHARD_PREFIX = struct.Struct(">cHQI")
_META_KEY = struct.Struct(">cH")
_META = struct.Struct(">BBQIQQQ")
_META_FORMAT = 0
_HISTORY = struct.Struct(">IIQ")
_RELEASE = struct.Struct(">cHcQ")
_GID = struct.Struct(">I")
_IMPORT = struct.Struct(">BIQBIQQQQ")
_EXPORT = struct.Struct(">BIQIQQQQ")
_MIGRATION_FORMAT = 0
VALUE_HEADER: Final = struct.Struct(">BQ")
"""flags u8, version u64; the value's bytes follow."""
VALUE_HEADER_BYTES: Final = VALUE_HEADER.size
VALUE_FLAG_EXPIRES: Final = 0x01
"""Reserved: an expiry in ms of replicated time, u64, stands between the version and the value."""


class UnknownRowFormat(Exception):
    """A row was written by a newer version of this program."""


class Incarnation(NamedTuple):
    """One stay of a shard at a group: the configuration that brought it, and the attempt to import it.

    A shard that comes back has another incarnation, so that the background drop of the earlier one
    can't touch it.
    """

    config_num: int
    attempt: int


class OwnerHistory(NamedTuple):
    """A shard's last owner, the last other one before it (gid 0: there was none), and the number of the
    configuration that gave it to the last one."""

    last: int
    before: int
    since: int

    def then(self, owner: int, config_num: int) -> OwnerHistory:
        """The history after configuration `config_num`, in which `owner` (0: nobody) has the shard."""
        return self if owner in (0, self.last) else OwnerHistory(owner, self.last, config_num)


NO_OWNER: Final = OwnerHistory(0, 0, 0)


class ShardMeta(NamedTuple):
    """A shard's meta row. `revision` counts the writes ever applied to the shard; `stamp_floor_ms`:
    requests first sent before it are expired (set when a shard begins again empty)."""

    state: ShardState
    incarnation: Incarnation
    revision: int
    last_delete_revision: int
    stamp_floor_ms: int


class ImportProgress(NamedTuple):
    """How far the import of a shard is. What is copied from `source_gid` is tracked there by list `list_id`.

    The copy is made in passes: pass 0 pulls every row, each later one what was touched after entry `since` of the
    source's log. Within a pass `cursor` is the last row's suffix (empty: none yet), and `next_since` the source's
    index at the pass's first page (0: none yet). `chunks` and `size_bytes` count what was accepted. `asked`: the ask is
    logged, and this group is bound to it; the pass under way is then the last one.
    """

    source_gid: int
    list_id: int
    asked: bool
    passes: int
    chunks: int
    since: int
    next_since: int
    size_bytes: int
    cursor: bytes


class ExportList(NamedTuple):
    """The keys of a shard that were touched since entry `list_id`, kept for attempt (config_num, attempt) of
    group `to_gid`. While the shard is Exporting, it is also what the shard is frozen for.

    `rows` and `size_bytes` (of the keys) are the list's size, `asked_ms` the map time of the last request to make it.
    """

    to_gid: int
    config_num: int
    attempt: int
    list_id: int
    rows: int
    size_bytes: int
    asked_ms: int


def shard_prefix(shard: int, incarnation: Incarnation) -> bytes:
    """The 15 bytes before the kind byte of every row of the shard's data."""
    return _SHARD_PREFIX.pack(DATA_PREFIX, shard, incarnation.config_num, incarnation.attempt)


def prefix_end(prefix: bytes) -> bytes:
    """The least key greater than every key that begins with `prefix` (which isn't all 0xff)."""
    trimmed = prefix.rstrip(b"\xff")
    assert trimmed, prefix
    return trimmed[:-1] + bytes((trimmed[-1] + 1,))


def meta_key(shard: int) -> bytes:
    return _META_KEY.pack(META_PREFIX, shard)


def shard_of_meta_key(key: bytes) -> int:
    shard: int = _META_KEY.unpack(key)[1]
    return shard


def pack_meta(meta: ShardMeta) -> bytes:
    return _META.pack(
        _META_FORMAT,
        meta.state,
        meta.incarnation.config_num,
        meta.incarnation.attempt,
        meta.revision,
        meta.last_delete_revision,
        meta.stamp_floor_ms,
    )


def unpack_meta(row: bytes) -> ShardMeta:
    """Raise UnknownRowFormat."""
    if row[0] != _META_FORMAT or len(row) != _META.size:
        raise UnknownRowFormat(f"shard meta row of format {row[0]}, {len(row)} bytes")
    _, state, config_num, attempt, revision, last_delete_revision, floor_ms = _META.unpack(row)
    incarnation = Incarnation(config_num, attempt)
    return ShardMeta(ShardState(state), incarnation, revision, last_delete_revision, floor_ms)


def import_key(shard: int) -> bytes:
    return meta_key(shard) + b"i"


def export_key(shard: int) -> bytes:
    return meta_key(shard) + b"x"


def release_key(shard: int, config_num: int) -> bytes:
    """Of the row that names the group which has to be told that what it exported has arrived."""
    return _RELEASE.pack(META_PREFIX, shard, b"r", config_num)


def split_release_key(key: bytes) -> tuple[int, int]:
    """Shard and configuration number."""
    _, shard, _, config_num = _RELEASE.unpack(key)
    return shard, config_num


def pack_gid(gid: int) -> bytes:
    return _GID.pack(gid)


def unpack_gid(row: bytes) -> int:
    gid: int = _GID.unpack(row)[0]
    return gid


def pack_import(progress: ImportProgress) -> bytes:
    return _IMPORT.pack(_MIGRATION_FORMAT, *progress[:-1]) + progress.cursor


def unpack_import(row: bytes) -> ImportProgress:
    """Raise UnknownRowFormat."""
    if row[0] != _MIGRATION_FORMAT:
        raise UnknownRowFormat(f"import row of format {row[0]}")
    _, source_gid, list_id, asked, passes, chunks, since, next_since, size_bytes = _IMPORT.unpack_from(row)
    cursor = row[_IMPORT.size :]
    return ImportProgress(source_gid, list_id, bool(asked), passes, chunks, since, next_since, size_bytes, cursor)


def pack_export(export: ExportList) -> bytes:
    return _EXPORT.pack(_MIGRATION_FORMAT, *export)


def unpack_export(row: bytes) -> ExportList:
    """Raise UnknownRowFormat."""
    if row[0] != _MIGRATION_FORMAT:
        raise UnknownRowFormat(f"export row of format {row[0]}")
    return ExportList(*_EXPORT.unpack(row)[1:])


def config_key(num: int) -> bytes:
    return CONFIG_PREFIX + _U64.pack(num)


def pack_u64(number: int) -> bytes:
    return _U64.pack(number)


def unpack_u64(row: bytes) -> int:
    number: int = _U64.unpack(row)[0]
    return number


def pack_history(owners: Sequence[OwnerHistory]) -> bytes:
    return b"".join(_HISTORY.pack(*history) for history in owners)


def unpack_history(row: bytes) -> list[OwnerHistory]:
    return [OwnerHistory(*owners) for owners in _HISTORY.iter_unpack(row)]


def pack_value(version: int, value: bytes) -> bytes:
    return VALUE_HEADER.pack(0, version) + value


def unpack_value(row: bytes) -> tuple[bytes, int]:
    """The value and its version. Raise UnknownRowFormat if the row has flags this version doesn't know."""
    if row[0]:
        raise UnknownRowFormat(f"value row with flags {row[0]:#04x}")
    return row[VALUE_HEADER_BYTES:], int.from_bytes(row[1:VALUE_HEADER_BYTES])
