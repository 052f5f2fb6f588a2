"""`RaftKV`: the key-value store, asynchronously.

    async with RaftKV(["10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000"]) as kv:
        version = await kv.put(b"greeting", b"hello")
        found = await kv.get(b"greeting")            # Value(value=b'hello', version=1), or None

Every method may be called any number of times at once; requests share one connection per server. Keys and
values are bytes. Reads are linearizable; a write applies exactly once, however often it had to be sent.
What can be raised is in `raftkv.protocol.errors`; most often:

    Timeout          nothing was done before the deadline
    OutcomeUnknown   a write may have applied, or may still: read before you try again
    CasMismatch, VersionMismatch, TooLarge

Several keys at once are a transaction: `raftkv.client.transactions`.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from raftkv.client.cluster import TIMEOUT_S_DEFAULT, Cluster, bad_reply
from raftkv.client.retry import Call
from raftkv.client.scan import PAGE_BYTES_MAX, Page, Pair, merged
from raftkv.machines.slots import shard_of
from raftkv.protocol.errors import BadRequest, RaftKVError, TooLarge
from raftkv.protocol.limits import KEY_BYTES_MAX, VALUE_BYTES_MAX
from raftkv.protocol.messages import FOLLOWER_OK, ReadOp, Verb

if TYPE_CHECKING:
    import ssl

    from raftkv.client.attempts import Attempts
    from raftkv.client.transactions import Transaction
    from raftkv.client.txn_status import TxnStatus

T = TypeVar("T")

PUT = 1
APPEND = 2
DELETE = 3
CAS = 4


class Value(NamedTuple):
    """A value and its version: the shard's revision at which it was written."""

    value: bytes
    version: int


class RaftKV:
    """A client of the store, found through its controllers ("HOST:PORT" each).

    `timeout_s` is the deadline of each request, of each page for a scan. `reads`: 'follower' spreads the
    reads over all replicas; they are as linearizable as the leader's, and somewhat slower. `rng` is for
    tests: it must be unpredictable otherwise, since it makes the client's id.
    """

    def __init__(
        self,
        controllers: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        ssl: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
        reads: Literal["leader", "follower"] = "leader",
    ) -> None:
        if reads not in ("leader", "follower"):
            raise BadRequest(f"reads must be 'leader' or 'follower', not {reads!r}")
        self._cluster = Cluster(controllers, timeout_s=timeout_s, ssl=ssl, rng=rng)
        self._any_replica = reads == "follower"
        self._flags = FOLLOWER_OK if self._any_replica else 0

    async def get(self, key: bytes) -> Value | None:
        """None if there is no such key."""
        check_key(key)
        call = self._cluster.call("get", key)
        value, version = await self._read(call, await self._shard_of(call, key), ReadOp.GET, [key], decode_value)
        return None if value is None else Value(value, version)

    async def put(self, key: bytes, value: bytes, *, if_version: int | None = None) -> int:
        """Return the new version.

        With `if_version` the key must be at that version, or absent if it is 0: else VersionMismatch.
        """
        check_key(key)
        check_value("the value", value)
        if if_version is not None and (type(if_version) is not int or if_version < 0):
            raise BadRequest(f"if_version must be a version or 0, not {if_version!r}")
        return await self._write("put", PUT, key, [value, if_version], int)

    async def append(self, key: bytes, suffix: bytes) -> int:
        """Append to the value, or to nothing if there is no such key. Return the new version."""
        check_key(key)
        check_value("the suffix", suffix)
        return await self._write("append", APPEND, key, [suffix], int)

    async def delete(self, key: bytes) -> bool:
        """Whether the key existed."""
        check_key(key)
        return await self._write("delete", DELETE, key, [], bool)

    async def cas(self, key: bytes, expected: bytes, new: bytes) -> int:
        """Set the value to `new` if it is `expected`, else raise CasMismatch. Return the new version."""
        check_key(key)
        check_value("the expected value", expected)
        check_value("the new value", new)
        return await self._write("cas", CAS, key, [expected, new], int)

    async def scan(
        self, prefix: bytes = b"", *, after: bytes | None = None, limit: int | None = None
    ) -> AsyncGenerator[tuple[bytes, Value], None]:
        """The pairs whose key begins with `prefix` and comes after the key `after`, in key order over all shards.

        Fetched page by page, as they are consumed: each page shows its shard at one instant, the whole
        does not.
        """
        check_key(prefix)
        if after is not None:
            check_key(after)
        if limit is not None and limit < 0:
            raise BadRequest(f"the limit must not be negative, not {limit}")
        first = self._cluster.call("scan", prefix or None)
        shards = (await self._cluster.router.shard_map(first)).shards
        wanted = [shard_of(prefix, shards)] if _has_tag(prefix) else range(shards)

        async def page(shard: int, last: bytes | None, pairs_max: int, bytes_max: int) -> Page:
            call = self._cluster.call("scan", prefix or None)
            args = [prefix, last, pairs_max, bytes_max]
            got: Page = await self._read(call, shard, ReadOp.SCAN, args, lambda body: _page(body, prefix, last))
            return got

        async for key, value, version in merged(page, wanted, limit, after):
            yield key, Value(value, version)

    async def scan_shard(
        self, shard: int, prefix: bytes = b"", *, after: bytes | None = None, limit: int
    ) -> tuple[list[tuple[bytes, Value]], bool]:
        """One page of a scan of one shard, and whether there is more: for those who keep the place themselves."""
        check_key(prefix)
        call = self._cluster.call("scan", prefix or None)
        args = [prefix, after, limit, PAGE_BYTES_MAX]
        page: Page = await self._read(call, shard, ReadOp.SCAN, args, lambda body: _page(body, prefix, after))
        return [(key, Value(value, version)) for key, value, version in page.pairs], page.more

    async def shard_count(self) -> int:
        """The cluster's number of shards, which never changes."""
        return (await self._cluster.router.shard_map(self._cluster.call("the shard map"))).shards

    def transaction(self) -> Transaction:
        """`async with kv.transaction() as txn:` — see `raftkv.client.transactions`."""
        from raftkv.client.transactions import Transaction

        return Transaction(self._cluster, self._read)

    async def run_transaction(self, body: Callable[[Transaction], Awaitable[T]]) -> T:
        """`await body(txn)` in a transaction that is committed afterwards; again while it loses against others.

        So `body` may run several times, and should do nothing but read and write in `txn`. After some failures its keys
        are locked first: it will get its turn. What it returns when it is committed is returned. It is never run
        again when it isn't certain that nothing was written: CommitUnknown. What `body` raises aborts it.
        """
        from raftkv.client.attempts import run_transaction

        return await run_transaction(self.attempts(), body)

    def attempts(self) -> Attempts:
        """The parts of `run_transaction`, for those that can't give it a coroutine."""
        from raftkv.client.attempts import Attempts

        return Attempts(self._cluster, self._read)

    async def txn_status(self, txid: bytes) -> TxnStatus:
        """What became of a transaction, by whoever knows. It doesn't end it: what is open may still be committed."""
        from raftkv.client.txn_status import txn_status

        return await txn_status(self._cluster, self._read, txid)

    async def resolve_txn(self, txid: bytes) -> TxnStatus:
        """After CommitUnknown: see to it that a transaction is committed or aborted for ever, and say which.

        One that nobody has committed yet is given up, also if its client is alive. Every shard has to answer. Raise
        Expired if it is so old that nobody knows any more, Unavailable if no coordinator is registered, Timeout.
        """
        from raftkv.client.txn_status import resolve_txn

        return await resolve_txn(self._cluster, txid)

    @property
    def retries(self) -> int:
        """How often this client has sent a request again, or asked another server, since it was made."""
        return self._cluster.caller.retries

    def unsettled_writes(self) -> list[str]:
        """The writes in progress that may have applied already: what to say when one is cancelled."""
        return self._cluster.unsettled_writes()

    async def close(self) -> None:
        """Close the connections. Requests in progress fail."""
        await self._cluster.close()

    async def __aenter__(self) -> RaftKV:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    # ---- inside

    async def _shard_of(self, call: Call, key: bytes) -> int:
        return shard_of(key, (await self._cluster.router.shard_map(call)).shards)

    async def _write(self, name: str, op: int, key: bytes, args: list[Any], result_type: type[T]) -> T:
        call = self._cluster.call(name, key, is_write=True)
        shard = await self._shard_of(call, key)
        return await self._cluster.write(call, shard, op, [key, *args], result_type)

    async def _read(self, call: Call, shard: int, op: int, args: list[Any], decode: Any) -> Any:
        cluster = self._cluster
        return await cluster.caller.ask(
            call,
            lambda call: cluster.router.route(call, shard),
            Verb.READ,
            lambda route: [route.config_num, self._flags, op, shard, *args],
            decode,
            any_replica=self._any_replica,
        )


def check_key(key: bytes) -> None:
    if type(key) is not bytes:
        raise TypeError(f"a key must be bytes, not {type(key).__name__}")
    if len(key) > KEY_BYTES_MAX:
        raise TooLarge("the key", KEY_BYTES_MAX)


def check_value(what: str, value: bytes) -> None:
    if type(value) is not bytes:
        raise TypeError(f"{what} must be bytes, not {type(value).__name__}")
    if len(value) > VALUE_BYTES_MAX:
        raise TooLarge(what, VALUE_BYTES_MAX)


def _has_tag(prefix: bytes) -> bool:
    """Whether every key that begins with `prefix` has its hash tag in it: then one shard has them all."""
    opened = prefix.find(b"{")
    return opened >= 0 and prefix.find(b"}", opened + 1) > opened + 1


def decode_value(body: Any) -> tuple[bytes | None, int]:
    if type(body) is list and len(body) >= 2 and type(body[1]) is int:
        value = body[0]
        if value is None or type(value) is bytes:
            return value, body[1]
    raise bad_reply("a get")


def _page(body: Any, prefix: bytes, after: bytes | None) -> Page:
    """Check a page: its keys ascend, and so will the merge's."""
    problem: RaftKVError = bad_reply("a scan")
    if type(body) is not list or len(body) < 2 or type(body[0]) is not list or type(body[1]) is not bool:
        raise problem
    pairs: list[Pair] = []
    for item in body[0]:
        if type(item) is not list or len(item) < 3:
            raise problem
        key, value, version = item[:3]
        if type(key) is not bytes or type(value) is not bytes or type(version) is not int:
            raise problem
        if not key.startswith(prefix) or (after is not None and key <= after):
            raise problem
        pairs.append((key, value, version))
        after = key
    if body[1] and not pairs:
        raise problem  # it would never end
    return Page(pairs, body[1])
