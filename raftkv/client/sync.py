"""The SDK without await: `SyncRaftKV` and `SyncControllers`, each with an event loop of its own.

For programs and threads that don't run asyncio; one object belongs to one thread at a time. Ctrl-C ends the
request, not the connection: `Interrupted` says that the write may have applied; KeyboardInterrupt, that
there was none or it can't have. The object stays usable after both.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from raftkv.client.cluster import TIMEOUT_S_DEFAULT
from raftkv.client.controllers import Controllers, Status
from raftkv.client.kv import RaftKV, Value
from raftkv.protocol.errors import Interrupted, RaftKVError, Unavailable

if TYPE_CHECKING:
    import ssl

    from raftkv.client.sync_transactions import SyncTransaction
    from raftkv.client.txn_status import TxnStatus
    from raftkv.machines.shard_map import ShardMap

T = TypeVar("T")


class _Client(Protocol):
    def unsettled_writes(self) -> list[str]: ...
    async def close(self) -> None: ...


class _Runner:
    """Runs one coroutine at a time in its own loop, which stands still in between."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._interrupted = False
        self._unsettled: list[str] = []

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise Unavailable("the client is closed")
        task = self._loop.create_task(coroutine)
        self._interrupted = False
        restore = self._catch_sigint(task)
        try:
            result = self._loop.run_until_complete(task)
            if self._interrupted:  # too late to stop it; but Ctrl-C must not get lost
                raise self._verdict()
            return result
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
            raise self._verdict() from None
        except KeyboardInterrupt:  # from a signal handler of the program's own, or the one above
            if self._interrupted:
                raise
            self._note_interrupt(task)
            self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise self._verdict() from None
        finally:
            restore()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        try:
            self._loop.run_until_complete(self._client.close())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    def _verdict(self) -> BaseException:
        """What an interrupted request ends with."""
        return Interrupted(", ".join(self._unsettled)) if self._unsettled else KeyboardInterrupt()

    def _note_interrupt(self, task: asyncio.Task[Any]) -> None:
        """Cancel the request, having noted what was out at this moment."""
        if not self._interrupted:
            self._interrupted = True
            self._unsettled = self._client.unsettled_writes()
        task.cancel()

    def _catch_sigint(self, task: asyncio.Task[Any]) -> Callable[[], None]:
        """Take Ctrl-C as a cancellation of the task, so that it can't strike in the middle of the protocol.

        Only in the main thread, and only if nobody else has asked for it.
        """
        if threading.current_thread() is not threading.main_thread():
            return _nothing
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return _nothing

        def on_sigint(number: int, frame: FrameType | None) -> None:
            self._note_interrupt(task)
            self._loop.call_soon_threadsafe(_nothing)  # wakes the loop

        signal.signal(signal.SIGINT, on_sigint)
        return _set_default_sigint


def _set_default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _nothing() -> None:
    """What there is to do."""


class SyncRaftKV:
    """`RaftKV` without await."""

    def __init__(
        self,
        controllers: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        ssl: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
        reads: Literal["leader", "follower"] = "leader",
    ) -> None:
        self._kv = RaftKV(controllers, timeout_s=timeout_s, ssl=ssl, rng=rng, reads=reads)
        self._runner = _Runner(self._kv)

    def get(self, key: bytes) -> Value | None:
        """As `RaftKV.get`."""
        return self._runner.run(self._kv.get(key))

    def put(self, key: bytes, value: bytes, *, if_version: int | None = None) -> int:
        """As `RaftKV.put`."""
        return self._runner.run(self._kv.put(key, value, if_version=if_version))

    def append(self, key: bytes, suffix: bytes) -> int:
        """As `RaftKV.append`."""
        return self._runner.run(self._kv.append(key, suffix))

    def delete(self, key: bytes) -> bool:
        """As `RaftKV.delete`."""
        return self._runner.run(self._kv.delete(key))

    def cas(self, key: bytes, expected: bytes, new: bytes) -> int:
        """As `RaftKV.cas`."""
        return self._runner.run(self._kv.cas(key, expected, new))

    def scan(
        self, prefix: bytes = b"", *, after: bytes | None = None, limit: int | None = None
    ) -> Iterator[tuple[bytes, Value]]:
        """As `RaftKV.scan`; other requests may be made between two pairs."""
        pairs = self._kv.scan(prefix, after=after, limit=limit)

        async def following() -> tuple[bytes, Value] | None:
            return await anext(pairs, None)

        try:
            while (pair := self._runner.run(following())) is not None:
                yield pair
        finally:
            if not self._runner.closed:
                self._runner.run(pairs.aclose())

    def transaction(self) -> SyncTransaction:
        """`with kv.transaction() as txn:` as `RaftKV.transaction`."""
        from raftkv.client.sync_transactions import SyncTransaction

        return SyncTransaction(self._kv.transaction(), self._runner)

    def run_transaction(self, body: Callable[[SyncTransaction], T]) -> T:
        """As `RaftKV.run_transaction`, with a `body` that doesn't await."""
        from raftkv.client.sync_transactions import run_transaction

        return run_transaction(self._kv.attempts(), self._runner, body)

    def txn_status(self, txid: bytes) -> TxnStatus:
        """As `RaftKV.txn_status`."""
        return self._runner.run(self._kv.txn_status(txid))

    def resolve_txn(self, txid: bytes) -> TxnStatus:
        """As `RaftKV.resolve_txn`."""
        return self._runner.run(self._kv.resolve_txn(txid))

    def close(self) -> None:
        """Close the connections; the object can't be used any more."""
        self._runner.close()

    def __enter__(self) -> SyncRaftKV:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


class SyncControllers:
    """`Controllers` without await."""

    def __init__(
        self,
        controllers: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        ssl: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._controllers = Controllers(controllers, timeout_s=timeout_s, ssl=ssl, rng=rng)
        self._runner = _Runner(self._controllers)

    def join(self, groups: Mapping[int, Sequence[str]]) -> int:
        """As `Controllers.join`."""
        return self._runner.run(self._controllers.join(groups))

    def leave(self, gids: Sequence[int], *, force: bool = False) -> int:
        """As `Controllers.leave`."""
        return self._runner.run(self._controllers.leave(gids, force=force))

    def move(self, shard: int, gid: int) -> int:
        """As `Controllers.move`."""
        return self._runner.run(self._controllers.move(shard, gid))

    def query(self, num: int | None = None) -> ShardMap:
        """As `Controllers.query`."""
        return self._runner.run(self._controllers.query(num))

    def coordinators(self) -> dict[int, tuple[str, ...]]:
        """As `Controllers.coordinators`."""
        return self._runner.run(self._controllers.coordinators())

    def status(self) -> dict[str, Status | RaftKVError]:
        """As `Controllers.status`."""
        return self._runner.run(self._controllers.status())

    def status_of(self, address: str) -> Status:
        """As `Controllers.status_of`."""
        return self._runner.run(self._controllers.status_of(address))

    def close(self) -> None:
        """Close the connections; the object can't be used any more."""
        self._runner.close()

    def __enter__(self) -> SyncControllers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
