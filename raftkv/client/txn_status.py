"""What became of a transaction: the coordinators are asked, and, when none of them knows it, every shard.

Asking changes nothing: what is open may be committed a moment later. Resolving does: afterwards it can't.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from raftkv.client.calls import Route
from raftkv.client.cluster import Cluster, bad_reply
from raftkv.client.retry import Call
from raftkv.client.tasks import gather_ordered
from raftkv.machines.txn_commands import is_txid, txid_ms
from raftkv.protocol.errors import BadRequest, Expired, Malformed, RaftKVError, Unavailable
from raftkv.protocol.messages import ReadOp, Verb
from raftkv.protocol.transactions import CoordinateOp, State, decode_state_reply

if TYPE_CHECKING:
    from raftkv.client.transactions import ReadAt

SHARDS_AT_ONCE = 16
NO_TXID = "a transaction id is 16 bytes, the first half of them a time"

LIFETIME_MS = 3_600_000
"""Of map time: so long a transaction's outcome is kept at least."""


class TxnStatus(StrEnum):
    """`EXPIRED`: so old that it may have been forgotten. `UNKNOWN`: nobody has heard of it; it may be open still."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    PENDING = "pending"
    EXPIRED = "expired"
    UNKNOWN = "unknown"


_BY_STATE = {
    State.COMMITTED: TxnStatus.COMMITTED,
    State.ABORTED: TxnStatus.ABORTED,
    State.BEGUN: TxnStatus.PENDING,
    State.EXPIRED: TxnStatus.EXPIRED,
}


async def txn_status(cluster: Cluster, read: ReadAt, txid: bytes) -> TxnStatus:
    """See `RaftKV.txn_status`. Raise BadRequest, and Timeout if somebody who may know it doesn't answer."""
    if not is_txid(txid):
        raise BadRequest(NO_TXID)
    call = cluster.call("status of a transaction")
    expired = False
    for gid in await cluster.router.find_coordinators(call):
        state = await _ask_coordinators(cluster, gid, txid)
        if state == State.EXPIRED:
            expired = True
        elif state in _BY_STATE:
            return _BY_STATE[state]
    found = await _ask_shards(cluster, read, txid, (await cluster.router.shard_map(call)).shards)
    if found is not None:
        return found
    expired |= txid_ms(txid) < cluster.router.map_time_ms - LIFETIME_MS
    return TxnStatus.EXPIRED if expired else TxnStatus.UNKNOWN


async def resolve_txn(cluster: Cluster, txid: bytes) -> TxnStatus:
    """See `RaftKV.resolve_txn`: COMMITTED or ABORTED."""
    if not is_txid(txid):
        raise BadRequest(NO_TXID)
    call = cluster.caller.call(f"outcome of transaction {txid.hex()}", None, is_write=True, timeout_s=cluster.timeout_s)
    gids = await cluster.router.find_coordinators(call)
    if not gids:
        raise Unavailable("no coordinator is registered that could find out; start some with `raftkv coordinator`")
    shards = (await cluster.router.shard_map(call)).shards
    state = await resolve_at(cluster, call, coordinators_of(txid, gids), txid, range(shards))
    return _BY_STATE[state]


def coordinators_of(txid: bytes, gids: Sequence[int]) -> int:
    """Which of several groups of coordinators a transaction belongs to: all that is asked about it must go there."""
    return gids[txid[-1] % len(gids)]


async def resolve_at(cluster: Cluster, call: Call, gid: int, txid: bytes, shards: Sequence[int]) -> State:
    """COMMITTED or ABORTED, for ever, once the coordinators have found out. Raise Expired if nobody knows any more."""

    async def route(call: Call) -> Route:
        return await cluster.router.coordinators_route(call, gid)

    body = [CoordinateOp.RESOLVE, txid, list(shards)]
    return await cluster.caller.ask(call, route, Verb.COORDINATE, body, _resolved)


def _resolved(body: Any) -> State:
    state = _state(body)
    if state not in (State.COMMITTED, State.ABORTED):
        raise Expired("nobody knows any more")
    return state


async def _ask_coordinators(cluster: Cluster, gid: int, txid: bytes) -> State:
    async def route(call: Call) -> Route:
        return await cluster.router.coordinators_route(call, gid)

    call = cluster.call("status of a transaction")
    body = [CoordinateOp.STATUS, txid]
    return await cluster.caller.ask(call, route, Verb.COORDINATE, body, _state, any_replica=True)


async def _ask_shards(cluster: Cluster, read: ReadAt, txid: bytes, shards: int) -> TxnStatus | None:
    """A commit in any shard decides; for anything else every shard has to answer. None if it left nothing there."""

    async def one(shard: int) -> TxnStatus | RaftKVError | None:
        call = cluster.call(f"outcome of a transaction in shard {shard}")
        try:
            found: TxnStatus | None = await read(call, shard, ReadOp.OUTCOME, [txid], _outcome)
        except RaftKVError as error:
            return error
        return found

    outcomes = await gather_ordered([one(shard) for shard in range(shards)], SHARDS_AT_ONCE)
    if TxnStatus.COMMITTED in outcomes:
        return TxnStatus.COMMITTED
    for outcome in outcomes:
        if isinstance(outcome, RaftKVError):
            raise outcome
    ranked = (TxnStatus.ABORTED, TxnStatus.PENDING, TxnStatus.EXPIRED)
    return next((known for known in ranked if known in outcomes), None)


def _state(body: Any) -> State:
    try:
        return decode_state_reply(body)
    except Malformed:
        raise bad_reply("the status of a transaction") from None


def _outcome(body: Any) -> TxnStatus | None:
    """What has become of it in one shard; None if it has left nothing there."""
    if body is None:
        return None
    if type(body) is not list or not body or type(body[0]) is not int or body[0] not in _BY_STATE:
        raise bad_reply("the outcome of a transaction")
    return _BY_STATE[State(body[0])]
