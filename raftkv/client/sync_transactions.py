"""`SyncTransaction`: `Transaction` without await, for `SyncRaftKV`.

The event loop runs during calls only, and with it the heartbeat of explicit locks: between two calls of a transaction
that holds some, at most a few seconds should pass (`LOCK_MS` in `machines.locks`), or they may be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol, TypeVar

from raftkv.client.attempts import Attempts
from raftkv.client.kv import Value
from raftkv.client.transactions import Transaction
from raftkv.protocol.errors import Aborted, Conflict

T = TypeVar("T")


class Runner(Protocol):
    """Runs one coroutine at a time."""

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T: ...


class SyncTransaction:
    """As `Transaction`; `with` begins it, and commits or aborts it in the end."""

    def __init__(self, txn: Transaction, runner: Runner) -> None:
        self._txn = txn
        self._runner = runner

    @property
    def txid(self) -> bytes:
        """As `Transaction.txid`."""
        return self._txn.txid

    def begin(self) -> SyncTransaction:
        """As `Transaction.begin`."""
        self._runner.run(self._txn.begin())
        return self

    def get(self, key: bytes, *, for_update: bool = False) -> Value | None:
        """As `Transaction.get`."""
        return self._runner.run(self._txn.get(key, for_update=for_update))

    def put(self, key: bytes, value: bytes) -> None:
        """As `Transaction.put`."""
        self._runner.run(self._txn.put(key, value))

    def append(self, key: bytes, suffix: bytes) -> None:
        """As `Transaction.append`."""
        self._runner.run(self._txn.append(key, suffix))

    def delete(self, key: bytes) -> None:
        """As `Transaction.delete`."""
        self._runner.run(self._txn.delete(key))

    def lock(self, *keys: bytes) -> None:
        """As `Transaction.lock`."""
        self._runner.run(self._txn.lock(*keys))

    def commit(self) -> None:
        """As `Transaction.commit`."""
        self._runner.run(self._txn.commit())

    def abort(self) -> None:
        """As `Transaction.abort`."""
        self._runner.run(self._txn.abort())

    def __enter__(self) -> SyncTransaction:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._runner.run(self._txn.__aexit__(kind, error, where))


def run_transaction(attempts: Attempts, runner: Runner, body: Callable[[SyncTransaction], T]) -> T:
    """See `RaftKV.run_transaction`."""
    while True:
        txn = attempts.next()
        try:
            with SyncTransaction(txn, runner) as sync_txn:
                runner.run(attempts.prepare(txn))
                return body(sync_txn)
        except (Conflict, Aborted) as error:
            runner.run(attempts.failed(txn, error))
