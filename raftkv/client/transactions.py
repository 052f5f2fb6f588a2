"""`Transaction`: reads that are remembered, writes that wait, and one commit that takes all of it or nothing.

    async with kv.transaction() as txn:
        a, b = await txn.get(b"a"), await txn.get(b"b")
        await txn.put(b"a", b.value)
        await txn.put(b"b", a.value)

It commits when the block is left, and aborts when that is by an exception. Strictly serializable: if it commits, all of
it happened at one instant between its beginning and its end. Until then its reads may be of several instants. Conflict
or Aborted say that others were faster; nothing was written, and `RaftKV.run_transaction` begins again by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from types import TracebackType
from typing import Any

from raftkv.client.cluster import Cluster, bad_reply
from raftkv.client.commit import Commit
from raftkv.client.kv import Value, check_key, check_value, decode_value
from raftkv.client.locking import Locks
from raftkv.client.retry import Call
from raftkv.client.tasks import gather_ordered
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import make_txid
from raftkv.protocol.errors import (
    Aborted,
    BadRequest,
    CommitUnknown,
    Conflict,
    Expired,
    RaftKVError,
    Timeout,
    TooLarge,
    TooOld,
)
from raftkv.protocol.limits import ID_BYTES, TXN_BYTES_MAX, TXN_KEYS_MAX, VALUE_BYTES_MAX
from raftkv.protocol.messages import ReadOp

CONFLICT_KEYS_MAX = 100
CHECKS_AT_ONCE = 16
AGE_STEP_S = 1.0
"""The order in which two transactions first asked for a lock counts if it was longer apart than this."""

ReadAt = Callable[[Call, int, int, list[Any], Any], Awaitable[Any]]
"""read(call, shard, operation, arguments, decode)"""


class TxnPhase(Enum):
    """Of a transaction, as its client knows it."""

    NEW = "not begun"
    OPEN = "open"
    COMMITTING = "being committed"
    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "ended, and nobody knows how"


class Transaction:
    """One transaction; made by `RaftKV.transaction`. `timeout_s` is the deadline of each of its requests.

    `age` is that of an earlier attempt, if this isn't the first one that locks: of two that want the same lock the
    older one gets it.
    """

    def __init__(self, cluster: Cluster, read: ReadAt, *, age: bytes | None = None) -> None:
        self._cluster = cluster
        self._read_at = read
        self._age = age
        self._txid = b""
        self._shards = 0
        self._phase = TxnPhase.NEW
        self._error: RaftKVError | None = None
        """Why it was aborted, if not by its owner."""
        self._versions: dict[bytes, int] = {}
        """Of each key as it was first read or locked."""
        self._values: dict[bytes, bytes | None] = {}
        self._writes: dict[bytes, bytes | None] = {}
        self._bytes = 0
        self._locked: dict[bytes, None] = {}
        self._locks: Locks | None = None
        self.timeout_s = cluster.timeout_s

    @property
    def txid(self) -> bytes:
        """16 bytes: what `RaftKV.txn_status` wants to know."""
        if not self._txid:
            raise BadRequest("the transaction has not begun")
        return self._txid

    @property
    def age(self) -> bytes | None:
        """16 bytes, as a txid: the map time of its first lock; None if it has asked for none."""
        return self._age

    @property
    def phase(self) -> TxnPhase:
        return self._phase

    @property
    def writes(self) -> bool:
        """Whether it writes anything, so far."""
        return bool(self._writes)

    @property
    def keys(self) -> list[bytes]:
        """All keys read, written or locked, ascending."""
        return sorted({*self._versions, *self._writes})

    async def begin(self) -> Transaction:
        """Make its id. Raise Timeout when no controller answers."""
        if self._phase is not TxnPhase.NEW:
            raise BadRequest("the transaction has begun already")
        router = self._cluster.router
        call = self._call("begin of a transaction", None)
        self._shards = (await router.shard_map(call)).shards
        await router.freshen_map_time(call)
        self._txid = make_txid(router.map_time_ms, self._cluster.rng.getrandbits(64).to_bytes(8))
        self._locks = Locks(self._cluster, self._txid, self._lost)
        self._phase = TxnPhase.OPEN
        return self

    # ---- operations

    async def get(self, key: bytes, *, for_update: bool = False) -> Value | None:
        """As it was when this transaction first read it, or as it has written it since (with version 0).

        With `for_update` the key is locked first. Raise Conflict if it changed since it was read or locked.
        """
        check_key(key)
        self._check_open()
        if for_update:
            await self.lock(key)
        if key in self._writes:
            written = self._writes[key]
            return None if written is None else Value(written, 0)
        if key not in self._values:
            await self._read(key)
        value = self._values[key]
        return None if value is None else Value(value, self._versions[key])

    async def put(self, key: bytes, value: bytes) -> None:
        """Written when the transaction commits. Raise TooLarge."""
        check_key(key)
        check_value("the value", value)
        self._write(key, value)

    async def append(self, key: bytes, suffix: bytes) -> None:
        """A read and a put."""
        check_value("the suffix", suffix)
        found = await self.get(key)
        value = suffix if found is None else found.value + suffix
        if len(value) > VALUE_BYTES_MAX:
            raise TooLarge("the value with the suffix", VALUE_BYTES_MAX)
        self._write(key, value)

    async def delete(self, key: bytes) -> None:
        """Whether there is such a key or not."""
        check_key(key)
        self._write(key, None)

    async def lock(self, *keys: bytes) -> None:
        """Keep everybody else from writing these keys, until the transaction ends. Waits for whoever holds them.

        Raise Locked if that takes too long, Aborted if the transaction lost its locks to an older one, Conflict if a
        key changed since this transaction read it.
        """
        for key in keys:
            check_key(key)
        self._check_open()
        by_shard: dict[int, list[bytes]] = {}
        for key in sorted({*keys} - self._locked.keys()):
            by_shard.setdefault(shard_of(key, self._shards), []).append(key)
        new = [key for keys_there in by_shard.values() for key in keys_there if key not in self._versions]
        self._check_room(len(new), sum(map(len, new)))
        if self._age is None and by_shard:
            self._age = await self._make_age()
        for shard in sorted(by_shard):
            await self._lock_at(shard, by_shard[shard])

    async def commit(self) -> None:
        """Do it all, or nothing. Raise Conflict or Aborted: nothing was written, run it again; CommitUnknown: nobody
        could say; anything else: nothing was written."""
        self._check_open()
        locks = self._locks
        assert locks is not None
        self._phase = TxnPhase.COMMITTING
        ending: Commit | None = None
        try:
            if self._writes or locks.shards:
                ending = Commit(self._cluster, self._txid, self._parts(), self.timeout_s)
                await self._run(ending)
            elif len(self._versions) > 1:  # one key alone was read at one instant
                await self._check_reads()
        except CommitUnknown:
            self._phase = TxnPhase.UNKNOWN
            locks.stop()
            raise
        except BaseException as error:
            if ending is not None and ending.may_have_applied:  # cancelled, for instance: nothing may abort it now
                self._phase = TxnPhase.UNKNOWN
                locks.stop()
            else:
                await self._fail(error)
            raise
        self._phase = TxnPhase.COMMITTED
        locks.stop()

    async def abort(self) -> None:
        """Forget it all. Nothing is left to do if it is aborted already."""
        if self._phase in (TxnPhase.COMMITTING, TxnPhase.COMMITTED, TxnPhase.UNKNOWN):
            raise BadRequest(f"the transaction can't be aborted: it is {self._phase.value}")
        self._phase = TxnPhase.ABORTED
        if self._locks is not None:
            await self._locks.release()

    async def __aenter__(self) -> Transaction:
        return await self.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            if self._phase is TxnPhase.OPEN or self._error is not None:
                await self.commit()
        elif self._phase in (TxnPhase.OPEN, TxnPhase.ABORTED):
            await self.abort()

    # ---- inside

    def _call(self, name: str, key: bytes | None) -> Call:
        return self._cluster.caller.call(name, key, is_write=False, timeout_s=self.timeout_s)

    def _check_open(self) -> None:
        if self._phase is TxnPhase.OPEN:
            return
        if self._error is not None:
            raise self._error
        raise BadRequest(f"the transaction is {self._phase.value}: nothing more can be done in it")

    def _check_room(self, keys: int, size_bytes: int) -> None:
        """Raise TooLarge unless so much more fits in. A key that is read and written counts twice, as it does on the
        servers."""
        if len(self._versions) + len(self._writes) + keys > TXN_KEYS_MAX:
            raise TooLarge("the number of the transaction's keys", TXN_KEYS_MAX)
        if self._bytes + size_bytes > TXN_BYTES_MAX:
            raise TooLarge("the transaction", TXN_BYTES_MAX)

    def _write(self, key: bytes, value: bytes | None) -> None:
        self._check_open()
        size_bytes = len(value or b"")
        if key in self._writes:
            size_bytes -= len(self._writes[key] or b"")
            self._check_room(0, size_bytes)
        else:
            size_bytes += len(key)
            self._check_room(1, size_bytes)
        self._writes[key] = value
        self._bytes += size_bytes

    async def _read(self, key: bytes) -> None:
        if key not in self._versions:
            self._check_room(1, len(key))
        call = self._call("get", key)
        value, version = await self._read_at(call, shard_of(key, self._shards), ReadOp.GET, [key], decode_value)
        self._check_open()  # it may have ended meanwhile
        if key not in self._values:  # else somebody else has read it meanwhile
            await self._note_version(key, version)
            self._values[key] = value

    async def _note_version(self, key: bytes, version: int) -> None:
        """The first counts; another one would be found at the commit, and is said now."""
        if key not in self._versions:
            self._check_room(1, len(key))
            self._bytes += len(key)
            self._versions[key] = version
        elif self._versions[key] != version:
            error = Conflict([key])
            await self._fail(error)
            raise error

    async def _make_age(self) -> bytes:
        """By a map time that isn't older than a second: who has begun earlier, or idled, is no older for it."""
        router = self._cluster.router
        await router.freshen_map_time(self._call("age of a transaction", None), AGE_STEP_S)
        return make_txid(router.map_time_ms, self._txid[ID_BYTES // 2 :])

    async def _lock_at(self, shard: int, keys: list[bytes]) -> None:
        assert self._locks is not None
        assert self._age is not None
        try:
            versions = await self._locks.take(shard, keys, self._age, self.timeout_s)
        except Aborted as error:
            await self._fail(error)
            raise
        except Expired as error:
            too_old = TooOld(error.reason)
            await self._fail(too_old)
            raise too_old from None
        self._check_open()
        for key, version in zip(keys, versions, strict=True):
            self._locked[key] = None
            await self._note_version(key, version)

    def _lost(self, error: RaftKVError) -> None:
        """The heartbeat found out that the locks are lost."""
        if self._phase is TxnPhase.OPEN:
            self._phase = TxnPhase.ABORTED
            self._error = error

    async def _fail(self, error: BaseException) -> None:
        """It ends here, certainly without having written anything."""
        self._phase = TxnPhase.ABORTED
        if isinstance(error, RaftKVError):
            self._error = error
        assert self._locks is not None
        await self._locks.release()

    async def _run(self, ending: Commit) -> None:
        try:
            await ending.run()
        except CommitUnknown as error:
            if self._writes:
                raise
            raise Timeout(f"commit of transaction {self._txid.hex()}, which writes nothing: {error.problem}") from None

    def _parts(self) -> list[list[Any]]:
        """By shard; those where nothing but a lock may be held have empty parts, which let go of it."""
        assert self._locks is not None
        parts: dict[int, list[Any]] = {shard: [shard, [], []] for shard in self._locks.shards}
        for position, pairs in ((1, self._versions), (2, self._writes)):
            for key, item in sorted(pairs.items()):
                shard = shard_of(key, self._shards)
                parts.setdefault(shard, [shard, [], []])[position].append([key, item])
        return [parts[shard] for shard in sorted(parts)]

    async def _check_reads(self) -> None:
        """Read only: if no version has changed since, all values stood together at one instant; nothing is logged."""
        by_shard: dict[int, list[bytes]] = {}
        for key in sorted(self._versions):
            by_shard.setdefault(shard_of(key, self._shards), []).append(key)

        async def changed(shard: int, keys: list[bytes]) -> list[bytes]:
            call = self._call("check of a transaction's reads", None)
            versions = await self._read_at(call, shard, ReadOp.CHECK, [keys], lambda body: _versions(body, len(keys)))
            return [key for key, version in zip(keys, versions, strict=True) if version != self._versions[key]]

        found = await gather_ordered([changed(shard, by_shard[shard]) for shard in sorted(by_shard)], CHECKS_AT_ONCE)
        conflicts = sorted(key for keys in found for key in keys)
        if conflicts:
            raise Conflict(conflicts[:CONFLICT_KEYS_MAX])


def _versions(body: Any, count: int) -> list[int]:
    if type(body) is not list or len(body) != count or not all(type(version) is int for version in body):
        raise bad_reply("a check of versions")
    return body
