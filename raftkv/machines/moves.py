"""The commands that move a shard from group to group: numbers and shapes. What they do is in `imports`, `exports`.

They are the groups' own; no client may send one. In a log they may stand malformed all the same, so their shape is
checked at apply like that of any other.

    IMPORT_START     shard, config_num, attempt, source_gid, list_id
    IMPORT_CHUNK     shard, config_num, attempt, list_id, chunk number, rows, cursor or nil at a pass's end,
                     source's index
    IMPORT_ASK       shard, config_num, attempt, list_id
    IMPORT_INSTALL   shard, config_num, attempt, list_id, chunk number, rows, revision, last-delete revision,
                     stamp floor, map time
    IMPORT_DROP      shard, config_num, attempt, list_id
    IMPORT_RELEASED  shard, config_num
    EXPORT_LIST      shard, to_gid, config_num, attempt
    EXPORT_ASK       shard, to_gid, config_num, attempt, list_id, base index
    EXPORT_RELEASE   shard, to_gid, config_num

A row is [suffix, bytes or nil if deleted]; a suffix is what follows the shard's incarnation prefix in a key. The
configuration number is that at which the importer got the shard; times are in ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from raftkv.machines.rows import KIND_TOUCHED
from raftkv.protocol.limits import ARRAY_LEN_MAX, GID_MAX, NUMBER_MAX, SHARDS_MAX
from raftkv.protocol.migration import ATTEMPT_MAX

IMPORT_START: Final = 34
IMPORT_CHUNK: Final = 35
IMPORT_ASK: Final = 36
IMPORT_INSTALL: Final = 37
IMPORT_DROP: Final = 38
IMPORT_RELEASED: Final = 39
EXPORT_LIST: Final = 40
EXPORT_ASK: Final = 41
EXPORT_RELEASE: Final = 42


def _number_up_to(limit: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 <= value <= limit


def _is_gid(value: Any) -> bool:
    return type(value) is int and 0 < value <= GID_MAX


def _is_attempt(value: Any) -> bool:
    return type(value) is int and 0 < value <= ATTEMPT_MAX


def _is_cursor(value: Any) -> bool:
    return value is None or type(value) is bytes


def _are_rows(value: Any) -> bool:
    return type(value) is list and len(value) <= ARRAY_LEN_MAX and all(map(_is_row, value))


def _is_row(row: Any) -> bool:
    """What is touched at the source stays there: its list is none of the shard's data."""
    if type(row) is not list or len(row) != 2 or type(row[0]) is not bytes:
        return False
    return row[0][:1] not in (b"", KIND_TOUCHED) and (row[1] is None or type(row[1]) is bytes)


_SHARD = ("the shard", _number_up_to(SHARDS_MAX - 1))
_CONFIG_NUM = ("the configuration number", _number_up_to(NUMBER_MAX))
_ATTEMPT = ("the attempt", _is_attempt)
_GID = ("the gid", _is_gid)
_COUNT = ("a number", _number_up_to(NUMBER_MAX))
_ROWS = ("the rows", _are_rows)
_CURSOR = ("the cursor", _is_cursor)

_SHAPES: Final[dict[int, tuple[tuple[str, Callable[[Any], bool]], ...]]] = {
    IMPORT_START: (_SHARD, _CONFIG_NUM, _ATTEMPT, _GID, _COUNT),
    IMPORT_CHUNK: (_SHARD, _CONFIG_NUM, _ATTEMPT, _COUNT, _COUNT, _ROWS, _CURSOR, _COUNT),
    IMPORT_ASK: (_SHARD, _CONFIG_NUM, _ATTEMPT, _COUNT),
    IMPORT_INSTALL: (_SHARD, _CONFIG_NUM, _ATTEMPT, _COUNT, _COUNT, _ROWS, _COUNT, _COUNT, _COUNT, _COUNT),
    IMPORT_DROP: (_SHARD, _CONFIG_NUM, _ATTEMPT, _COUNT),
    IMPORT_RELEASED: (_SHARD, _CONFIG_NUM),
    EXPORT_LIST: (_SHARD, _GID, _CONFIG_NUM, _ATTEMPT),
    EXPORT_ASK: (_SHARD, _GID, _CONFIG_NUM, _ATTEMPT, _COUNT, _COUNT),
    EXPORT_RELEASE: (_SHARD, _GID, _CONFIG_NUM),
}

MOVE_OPS: Final = frozenset(_SHAPES)


def shape_problem(command: list[Any]) -> str | None:
    """What is wrong with the command, whose number is one of MOVE_OPS, or None."""
    shape = _SHAPES[command[0]]
    if len(command) != len(shape) + 1:
        return "wrong number of items in the command"
    for value, (name, good) in zip(command[1:], shape, strict=True):
        if not good(value):
            return f"{name}: not what it must be"
    return None
