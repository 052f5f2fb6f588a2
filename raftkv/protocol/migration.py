"""The bodies of the verb SHARD, by which the leader of one group asks that of another one for a shard.

    LIST     [op, shard, to_gid, config_num, attempt]                         → [0, list_id]
    PULL     [op, shard, to_gid, config_num, attempt, list_id, cursor]        → [index, rows, cursor or nil]
    CHANGES  [op, shard, to_gid, config_num, attempt, list_id, since, cursor] → the same, and final or nil
    ASK      [op, shard, to_gid, config_num, attempt, list_id, since]         → [0]
    RELEASE  [op, shard, to_gid, config_num]                                  → [0, bool]

`to_gid` is the group that asks, `config_num` the configuration that gave it the shard, `index` the log index of the
state that was read. Rows are [suffix, bytes or nil]; an empty cursor begins, nil ends. `final` is [revision,
last-delete revision, stamp floor in ms, map time in ms] of a shard that is frozen. This module must never do I/O, nor
know what a row means.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from raftkv.protocol.errors import Malformed, show_value
from raftkv.protocol.limits import GID_MAX, KEY_BYTES_MAX, NUMBER_MAX, SHARDS_MAX

ATTEMPT_MAX = 2**32 - 1
"""What the key of a row has room for."""
CURSOR_BYTES_MAX = KEY_BYTES_MAX + 64
"""A suffix is a kind and a user's key, or less."""

Row = list[Any]


class ShardOp(IntEnum):
    LIST = 1
    PULL = 2
    CHANGES = 3
    ASK = 4
    RELEASE = 5


class ShardBody(NamedTuple):
    """A SHARD request; what an operation doesn't have is 0 or empty."""

    op: int
    shard: int
    to_gid: int
    config_num: int
    attempt: int = 0
    list_id: int = 0
    since: int = 0
    cursor: bytes = b""


class ShardPage(NamedTuple):
    """The answer to PULL and CHANGES; `read_index` is the log index of the state that was read."""

    read_index: int
    rows: list[Row]
    cursor: bytes | None
    final: list[int] | None = None


_FIELDS: dict[int, tuple[str, ...]] = {
    ShardOp.LIST: ("attempt",),
    ShardOp.PULL: ("attempt", "list_id", "cursor"),
    ShardOp.CHANGES: ("attempt", "list_id", "since", "cursor"),
    ShardOp.ASK: ("attempt", "list_id", "since"),
    ShardOp.RELEASE: (),
}
"""What follows [op, shard, to_gid, config_num]."""

_LIMITS = {"attempt": (1, ATTEMPT_MAX), "list_id": (1, NUMBER_MAX), "since": (0, NUMBER_MAX)}
_FINAL_ITEMS = 4


def encode_shard_body(body: ShardBody) -> list[Any]:
    """The request's body, with what its operation has."""
    return [*body[:4], *(getattr(body, name) for name in _FIELDS[body.op])]


def decode_shard_body(body: list[Any]) -> ShardBody:
    """Raise Malformed."""
    op: Any = body[0] if body else None
    fields = _FIELDS.get(op) if type(op) is int else None
    if fields is None:
        raise Malformed(f"SHARD: unknown operation {show_value(op)}")
    if len(body) != 4 + len(fields):
        raise Malformed(f"SHARD: {len(body)} items instead of {4 + len(fields)}")
    _, shard, to_gid, config_num, *rest = body
    _require(_is_number(shard, 0, SHARDS_MAX - 1), "shard", shard)
    _require(_is_number(to_gid, 1, GID_MAX), "gid", to_gid)
    _require(_is_number(config_num, 1, NUMBER_MAX), "configuration number", config_num)
    for name, value in zip(fields, rest, strict=True):
        if name == "cursor":
            _require(type(value) is bytes and len(value) <= CURSOR_BYTES_MAX, name, value)
        else:
            _require(_is_number(value, *_LIMITS[name]), name, value)
    return ShardBody(op, shard, to_gid, config_num, **dict(zip(fields, rest, strict=True)))


def decode_list_reply(body: Any) -> int:
    """The list's id. Raise Malformed."""
    if type(body) is not list or len(body) < 2 or not _is_number(body[1], 1, NUMBER_MAX):
        raise Malformed("not the answer to a LIST")
    list_id: int = body[1]
    return list_id


def decode_page_reply(body: Any) -> ShardPage:
    """The answer to a PULL or a CHANGES; further items, of a newer release, are ignored. Raise Malformed."""
    if type(body) is not list or len(body) < 3:
        raise Malformed("not a page of a shard")
    index, rows, cursor = body[:3]
    final = body[3] if len(body) > 3 else None
    _require(_is_number(index, 1, NUMBER_MAX), "index", index)
    _require(type(rows) is list and all(map(_is_row, rows)), "rows", rows)
    _require(cursor is None or (type(cursor) is bytes and 0 < len(cursor) <= CURSOR_BYTES_MAX), "cursor", cursor)
    if final is not None:
        good = type(final) is list and len(final) == _FINAL_ITEMS
        _require(good and all(_is_number(count, 0, NUMBER_MAX) for count in final), "counters", final)
    return ShardPage(index, rows, cursor, final)


def _is_row(row: Any) -> bool:
    if type(row) is not list or len(row) != 2 or type(row[0]) is not bytes or not row[0]:
        return False
    return row[1] is None or type(row[1]) is bytes


def _is_number(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _require(good: bool, what: str, value: Any) -> None:
    if not good:
        raise Malformed(f"SHARD: bad {what} {show_value(value)}")
