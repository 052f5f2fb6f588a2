"""What became of a transaction: the coordinators are asked, and, when none of them knows it, every shard.

Asking changes nothing: what is open may be committed a moment later.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from raftkv.client.calls import Route
from raftkv.client.cluster import Cluster, bad_reply
from raftkv.client.retry import Call
from raftkv.client.tasks import gather_ordered
from raftkv.machines.txn_commands import is_txid, txid_ms
from raftkv.protocol.errors import BadRequest, Malformed, RaftKVError
from raftkv.protocol.messages import ReadOp, Verb
from raftkv.protocol.transactions import CoordinateOp, State, decode_state_reply

if TYPE_CHECKING:
    from raftkv.client.transactions import ReadAt

SHARDS_AT_ONCE = 16

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
}


async def txn_status(cluster: Cluster, read: ReadAt, txid: bytes) -> TxnStatus:
    """See `RaftKV.txn_status`. Raise BadRequest, and Timeout if somebody who may know it doesn't answer."""
    if not is_txid(txid):
        raise BadRequest("a transaction id is 16 bytes, the first half of them a time")
    call = cluster.call("status of a transaction")
    expired = False
    for gid in await cluster.router.find_coordinators(call):
        state = await _ask_coordinators(cluster, gid, txid)
        if state in _BY_STATE:
            return _BY_STATE[state]
        expired |= state == State.EXPIRED
    found = await _ask_shards(cluster, read, txid, (await cluster.router.shard_map(call)).shards)
    if found is not None:
        return found
    expired |= txid_ms(txid) < cluster.router.map_time_ms - LIFETIME_MS
    return TxnStatus.EXPIRED if expired else TxnStatus.UNKNOWN


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
    return next((known for known in (TxnStatus.ABORTED, TxnStatus.PENDING) if known in outcomes), None)


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
