"""The bodies of the verbs TXN, which a group gets, and COORDINATE, which the coordinators get.

    TXN         [config_num, command]          → the command's result; `command` is bin: an array of `txn_commands`
    COORDINATE  [COMMIT, txid, parts]          → [state]: COMMITTED; refused with Conflict, Aborted, Expired, BadRequest
                [RESOLVE, txid, shards]        → [state]: COMMITTED or ABORTED, by now and for ever; or Expired
                [STATUS, txid]                 → [state]: also BEGUN (or fenced), UNKNOWN, EXPIRED; any replica answers
                [DOUBT, [txid …]]              → [[txid, state] …]: BEGUN, COMMITTED or ABORTED

Expired, of a COMMIT and of a RESOLVE, is the error of that name; of a STATUS it is the state EXPIRED.
A commit may be repeated; with other contents it is a BadRequest. DOUBT comes from groups: a txid without record is
aborted, in the log, before it is answered. This module must never do I/O, nor know what a part means.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from raftkv.protocol.errors import Malformed
from raftkv.protocol.limits import ARRAY_LEN_MAX, ID_BYTES, NUMBER_MAX, SHARDS_MAX


class CoordinateOp(IntEnum):
    COMMIT = 1
    RESOLVE = 2
    STATUS = 3
    DOUBT = 4


class State(IntEnum):
    """What the coordinators say of a transaction."""

    EXPIRED = -2
    UNKNOWN = -1
    BEGUN = 0
    COMMITTED = 1
    ABORTED = 2


class CoordinateBody(NamedTuple):
    """A COORDINATE request; what an operation doesn't have is empty. `parts` is as it came."""

    op: int
    txid: bytes = b""
    parts: list[Any] | None = None
    shards: tuple[int, ...] = ()
    txids: tuple[bytes, ...] = ()


def decode_coordinate_body(body: list[Any]) -> CoordinateBody:
    """Raise Malformed."""
    op: Any = body[0] if body else None
    items = {CoordinateOp.COMMIT: 3, CoordinateOp.RESOLVE: 3, CoordinateOp.STATUS: 2, CoordinateOp.DOUBT: 2}
    if type(op) is not int or len(body) != items.get(op):  # type: ignore[call-overload]
        raise Malformed("the body of a COORDINATE is [operation, …]")
    if op == CoordinateOp.DOUBT:
        txids = body[1]
        if type(txids) is not list or not 0 < len(txids) <= ARRAY_LEN_MAX or not all(map(_is_txid, txids)):
            raise Malformed("COORDINATE: not an array of transaction ids")
        return CoordinateBody(op, txids=tuple(txids))
    if not _is_txid(body[1]):
        raise Malformed("COORDINATE: not a transaction id")
    if op == CoordinateOp.STATUS:
        return CoordinateBody(op, body[1])
    if op == CoordinateOp.COMMIT:
        if type(body[2]) is not list:
            raise Malformed("COORDINATE: the parts are not an array")
        return CoordinateBody(op, body[1], parts=body[2])
    shards = body[2]
    good = type(shards) is list and 0 < len(shards) <= SHARDS_MAX and len(set(map(repr, shards))) == len(shards)
    if not good or not all(type(shard) is int and 0 <= shard < SHARDS_MAX for shard in shards):
        raise Malformed("COORDINATE: not an array of shards, each once")
    return CoordinateBody(op, body[1], shards=tuple(shards))


def decode_txn_body(body: list[Any]) -> bytes:
    """The command of a TXN. Raise Malformed."""
    good = len(body) == 2 and type(body[0]) is int and -1 <= body[0] <= NUMBER_MAX and type(body[1]) is bytes
    if not good:
        raise Malformed("the body of a TXN is [config_num, command]")
    command: bytes = body[1]
    return command


def decode_state_reply(body: Any) -> State:
    """The answer to COMMIT, RESOLVE or STATUS. Raise Malformed."""
    if type(body) is not list or not body or type(body[0]) is not int or body[0] not in State._value2member_map_:
        raise Malformed("not a transaction's state")
    return State(body[0])


def decode_states_reply(body: Any) -> dict[bytes, State]:
    """The answer to DOUBT. Raise Malformed."""
    if type(body) is not list or not all(type(pair) is list and len(pair) == 2 and _is_txid(pair[0]) for pair in body):
        raise Malformed("not states of transactions")
    return {txid: decode_state_reply([state]) for txid, state in body}


def decode_decide_reply(body: Any) -> dict[int, int]:
    """How a transaction ended in each shard: [0, [[shard, state, revision] …]]. Raise Malformed."""
    if not _is_result(body) or not all(_is_ints(row) and len(row) == 3 for row in body[1]):
        raise Malformed("not the answer to a decision")
    return {shard: state for shard, state, _ in body[1]}


def decode_resolve_reply(body: Any) -> dict[bytes, list[int]]:
    """What earlier terms have prepared: [0, [[txid, shards] …]]. Raise Malformed."""
    good = _is_result(body) and all(type(row) is list and len(row) == 2 for row in body[1])
    if not good or not all(_is_txid(txid) and _is_ints(shards) for txid, shards in body[1]):
        raise Malformed("not the answer to a TXN_RESOLVE")
    return dict(body[1])


def _is_result(body: Any) -> bool:
    return type(body) is list and len(body) == 2 and body[0] == 0 and type(body[1]) is list


def _is_ints(value: Any) -> bool:
    return type(value) is list and all(type(number) is int for number in value)


def _is_txid(value: Any) -> bool:
    return type(value) is bytes and len(value) == ID_BYTES
