"""Commands on keys that this replica doesn't serve: through the SDK, by whoever serves them.

The SDK finds them, tries again where that is safe, and waits, for a leader or for a lock, until its deadline. Each
command ends with `deliver(token, result)`: its reply, or a RaftKVError. A task each; a connection has one at a time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from raftkv.client.kv import RaftKV
from raftkv.client.tasks import gather_ordered
from raftkv.client.transactions import Transaction
from raftkv.daemons.redis import strings
from raftkv.daemons.redis.lanes import Deliver, Lanes, Run
from raftkv.daemons.redis.parser import Request
from raftkv.daemons.redis.replies import OK, Refusal
from raftkv.daemons.redis.strings import Loaded, View
from raftkv.daemons.redis.table import Kind, Spec
from raftkv.daemons.tasks import Tasks
from raftkv.protocol.errors import Busy, RaftKVError, ShuttingDown, VersionMismatch

if TYPE_CHECKING:
    import ssl

TIMEOUT_S = 10.0
COMMANDS_MAX = 16_384
"""On their way at once; those of clients that have gone away too, until their deadline."""
TRIES_MAX = 6
"""Optimistic ones, of a command that reads and writes one key; then it takes a lock."""
PAUSE_S = 0.005
READS_AT_ONCE = 16


class Forward:
    """The SDK's client of this daemon."""

    def __init__(
        self, controllers: Sequence[str], tasks: Tasks, rng: random.Random, ssl: ssl.SSLContext | None
    ) -> None:
        self.kv = RaftKV(controllers, timeout_s=TIMEOUT_S, ssl=ssl, rng=rng)
        self._tasks = tasks
        self._rng = rng
        self._running = 0
        self._closed = False
        self._lanes = Lanes(self.transact)

    async def close(self) -> None:
        """What is under way fails, what comes is refused."""
        self._closed = True
        await self.kv.close()

    def execute(self, spec: Spec, args: Request, deliver: Deliver, token: Any) -> None:
        """One command on keys."""
        kind = spec.kind_of(args)
        run = spec.bound(args)
        if spec.run is strings.get:
            self.start(self._get(args[1]), deliver, token)
        elif kind is Kind.WRITE and spec.run is strings.set_:
            self.start(self._set(args[1], args[2]), deliver, token)
        elif kind is Kind.WRITE and spec.run is strings.delete:
            self.start(self._delete(args[1]), deliver, token)
        elif spec.run is strings.mset:
            self.start(self._put_all(strings.pairs_of(args)), deliver, token)
        elif kind is Kind.CHANGE:
            self._lanes.add(args[1], run, deliver, token)
        else:
            self.transact(spec.keys(args), run, deliver, token)

    def transact(self, keys: Sequence[bytes], run: Run, deliver: Deliver, token: Any) -> None:
        """Carry out `run` on the keys at one instant."""
        self.start(self._transact(keys, run), deliver, token)

    def start(self, work: Coroutine[Any, Any, Any], deliver: Deliver, token: Any) -> None:
        """`deliver` what it returns or refuses."""
        if self._closed or self._running >= COMMANDS_MAX:
            work.close()
            busy = Busy("too many commands are on their way to other nodes")
            deliver(token, ShuttingDown() if self._closed else busy)
            return
        self._running += 1
        self._tasks.start(self._run(work, deliver, token), "redis-command")

    # ---- inside

    async def _run(self, work: Coroutine[Any, Any, Any], deliver: Deliver, token: Any) -> None:
        try:
            result = await work
        except (RaftKVError, Refusal) as error:
            result = error
        finally:
            self._running -= 1
        deliver(token, result)

    async def _get(self, key: bytes) -> bytes | None:
        found = await self.kv.get(key)
        return None if found is None else found.value

    async def _set(self, key: bytes, value: bytes) -> bytes:
        await self.kv.put(key, value)
        return OK

    async def _delete(self, key: bytes) -> int:
        return int(await self.kv.delete(key))

    async def _put_all(self, pairs: dict[bytes, bytes]) -> bytes:
        async def put(txn: Transaction) -> None:
            for key, value in pairs.items():
                await txn.put(key, value)

        await self.kv.run_transaction(put)
        return OK

    async def _transact(self, keys: Sequence[bytes], run: Run) -> Any:
        keys = list(dict.fromkeys(keys))
        if len(keys) == 1:
            for attempt in range(TRIES_MAX):
                found = await self.kv.get(keys[0])
                view = View({keys[0]: (None, 0) if found is None else (found.value, found.version)})
                reply = run(view)
                value = view.changes.get(keys[0])
                if value is None:
                    if not view.changes:
                        return reply
                    break  # deleting under a condition takes a transaction
                try:
                    await self.kv.put(keys[0], value, if_version=0 if found is None else found.version)
                    return reply
                except VersionMismatch:
                    await asyncio.sleep(PAUSE_S * self._rng.random() * (1 << attempt))
        return await self.kv.run_transaction(partial(_in_transaction, keys, run))


async def _in_transaction(keys: Sequence[bytes], run: Run, txn: Transaction) -> Any:
    async def load(key: bytes) -> tuple[bytes, Loaded]:
        found = await txn.get(key)
        return key, ((None, 0) if found is None else (found.value, found.version))

    view = View(dict(await gather_ordered([load(key) for key in keys], READS_AT_ONCE)))
    reply = run(view)
    for key, value in view.changes.items():
        if value is None:
            await txn.delete(key)
        else:
            await txn.put(key, value)
    return reply
