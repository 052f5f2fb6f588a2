"""What a running program of the command line shares between its commands: settings and connections.

A client is made on first use, inside the running loop, and kept: so a REPL or script has one session
with the servers, and `help` has none. Never prints.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raftkv.cli.exit_codes import UsageError
from raftkv.cli.words import show_word

if TYPE_CHECKING:
    import ssl

    from raftkv.cli.command_table import Call
    from raftkv.client.transactions import TxnPhase
    from raftkv.machines.shard_map import ShardMap

TIMEOUT_S_DEFAULT = 10.0

NO_CONTROLLERS = (
    "no controllers: give --controllers HOST:PORT,… or RAFTKV_CONTROLLERS, "
    "or start a cluster on this machine with `raftkv local up`"
)


class VersionedValue(Protocol):
    """A value and the revision of the write that made it."""

    @property
    def value(self) -> bytes: ...
    @property
    def version(self) -> int: ...


class TransactionClient(Protocol):
    """The part of the SDK's `Transaction` that the commands use."""

    timeout_s: float

    @property
    def txid(self) -> bytes: ...
    @property
    def phase(self) -> TxnPhase: ...
    async def begin(self) -> Any: ...
    async def get(self, key: bytes, *, for_update: bool = False) -> VersionedValue | None: ...
    async def put(self, key: bytes, value: bytes) -> None: ...
    async def append(self, key: bytes, suffix: bytes) -> None: ...
    async def delete(self, key: bytes) -> None: ...
    async def lock(self, *keys: bytes) -> None: ...
    async def commit(self) -> None: ...
    async def abort(self) -> None: ...


class KvClient(Protocol):
    """The part of the SDK's `RaftKV` that the commands use."""

    async def get(self, key: bytes) -> VersionedValue | None: ...
    async def put(self, key: bytes, value: bytes, *, if_version: int | None = None) -> int: ...
    async def append(self, key: bytes, suffix: bytes) -> int: ...
    async def delete(self, key: bytes) -> bool: ...
    async def cas(self, key: bytes, expected: bytes, new: bytes) -> int: ...
    def scan(
        self, prefix: bytes = b"", *, after: bytes | None = None, limit: int | None = None
    ) -> AsyncIterator[tuple[bytes, Any]]: ...
    def transaction(self) -> TransactionClient: ...
    async def txn_status(self, txid: bytes) -> str: ...
    async def resolve_txn(self, txid: bytes) -> str: ...
    def unsettled_writes(self) -> list[str]: ...
    async def close(self) -> None: ...


class ControllersClient(Protocol):
    """The part of the SDK's `Controllers` that the commands use."""

    async def join(self, groups: Mapping[int, Sequence[str]]) -> int: ...
    async def leave(self, gids: Sequence[int], *, force: bool = False) -> int: ...
    async def move(self, shard: int, gid: int) -> int: ...
    async def query(self, num: int | None = None) -> ShardMap: ...
    async def wait_beyond(self, num: int) -> ShardMap: ...
    async def coordinators(self) -> Mapping[int, Sequence[str]]: ...
    async def status_of(self, address: str) -> Mapping[str, Any]: ...
    def unsettled_writes(self) -> list[str]: ...
    async def close(self) -> None: ...


class Connector(Protocol):
    """Makes clients; the tests bring their own."""

    def kv(self, controllers: Sequence[str], timeout_s: float) -> KvClient: ...
    def controllers(self, controllers: Sequence[str], timeout_s: float) -> ControllersClient: ...


class SdkConnector:
    """Clients of the SDK, imported on first use."""

    def __init__(self, ssl: ssl.SSLContext | None = None) -> None:
        self._ssl = ssl

    def kv(self, controllers: Sequence[str], timeout_s: float) -> KvClient:
        """A client of the key-value store."""
        from raftkv.client.kv import RaftKV

        return RaftKV(controllers, timeout_s=timeout_s, ssl=self._ssl)

    def controllers(self, controllers: Sequence[str], timeout_s: float) -> ControllersClient:
        """A client of the controllers."""
        from raftkv.client.controllers import Controllers

        return Controllers(controllers, timeout_s=timeout_s, ssl=self._ssl)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line and the environment said."""

    program: str
    controllers: tuple[str, ...]
    timeout_s: float = TIMEOUT_S_DEFAULT
    output: str = "plain"


class Session:
    """The settings and the clients made so far; one for each timeout that was asked for."""

    def __init__(self, settings: Settings, connector: Connector | None = None) -> None:
        self.settings = settings
        self._connector = connector or SdkConnector()
        self._kv: dict[float, KvClient] = {}
        self._controllers: dict[float, ControllersClient] = {}
        self.one_shot = False
        """There is one command only: nothing can be begun."""
        self.transaction: TransactionClient | None = None
        self.broken: str | None = None
        """Why the lines up to the next Commit or Abort must not be carried out, though no transaction is open."""
        self.unsettled_at_interrupt: list[str] = []
        """The writes that had been sent and not been answered when Ctrl-C came."""
        self.config_made: int | None = None
        """The configuration that a Join, Leave or Move has made, while it waits for the shards; kept at Ctrl-C."""
        self.go_on: str | None = None
        """How a transfer that Ctrl-C ended goes on."""

    def timeout_s(self, options: Mapping[str, Any]) -> float:
        """The timeout of a call: its own, or the program's."""
        return float(options.get("timeout", self.settings.timeout_s))

    def kv(self, options: Mapping[str, Any]) -> KvClient:
        """The key-value client for a call with these options. Raises UsageError without controllers."""
        timeout_s = self.timeout_s(options)
        if timeout_s not in self._kv:
            self._kv[timeout_s] = self._connector.kv(self._addresses(), timeout_s)
        return self._kv[timeout_s]

    def controllers(self, options: Mapping[str, Any]) -> ControllersClient:
        """The client of the controllers for a call with these options. Raises UsageError without any."""
        timeout_s = self.timeout_s(options)
        if timeout_s not in self._controllers:
            self._controllers[timeout_s] = self._connector.controllers(self._addresses(), timeout_s)
        return self._controllers[timeout_s]

    def own_controllers(self, timeout_s: float) -> ControllersClient:
        """A client that no command uses; whoever asks for it closes it. Raises UsageError without controllers."""
        return self._connector.controllers(self._addresses(), timeout_s)

    def _addresses(self) -> tuple[str, ...]:
        if not self.settings.controllers:
            raise UsageError(NO_CONTROLLERS)
        return self.settings.controllers

    # ---- the transaction that Begin has opened

    @property
    def in_transaction(self) -> bool:
        """Whether the lines up to a Commit or Abort belong together."""
        return self.transaction is not None or self.broken is not None

    def transaction_of(self, call: Call) -> TransactionClient | None:
        """The transaction that a call belongs to. Raises Aborted if that one can't go on."""
        if self.broken is not None:
            from raftkv.protocol.errors import Aborted

            raise Aborted(self.broken)
        if self.transaction is not None:
            self.transaction.timeout_s = self.timeout_s(call.options)
        return self.transaction

    def refuse_inside(self, call: Call) -> None:
        """Raises UsageError for what no transaction can take in."""
        if self.in_transaction:
            raise UsageError(f"{call.command.name} is not allowed inside a transaction; Commit or Abort it first")

    async def end_transaction(self) -> None:
        """Abort it, if there is one. Nothing of it is written."""
        txn, self.transaction, self.broken = self.transaction, None, None
        if txn is not None:
            await txn.abort()

    def interrupt(self, task: asyncio.Task[Any]) -> None:
        """Ctrl-C: remember which writes may have applied, then cancel the task that waits for them."""
        if task.cancelling():
            return  # it ends already, and its writes have been remembered
        clients: list[KvClient | ControllersClient] = [*self._kv.values(), *self._controllers.values()]
        self.unsettled_at_interrupt = [name for client in clients for name in client.unsettled_writes()]
        task.cancel()

    async def close(self) -> None:
        """Abort what is open, and close every client."""
        await self.end_transaction()
        clients: list[KvClient | ControllersClient] = [*self._kv.values(), *self._controllers.values()]
        self._kv.clear()
        self._controllers.clear()
        for client in clients:
            await client.close()


def with_values(call: Call, *, on_a_line: bool, read_stdin: Callable[[int], bytes] | None = None) -> Call:
    """The call with the bytes that its values stand for.

    `-` is standard input, `@FILE` a file, `@@…` a literal @. On a line a bare `-` is an error: standard input
    is where the line came from. A quoted one is a dash. Raises UsageError.
    """
    arguments = call.command.arguments
    if not any(argument.is_value for argument in arguments):
        return call
    words = list(call.words)
    from_stdin = [i for i, argument in enumerate(arguments) if argument.is_value and words[i] == b"-"]
    for position, argument in enumerate(arguments):
        if argument.is_value:
            words[position] = _value(words[position])
    if on_a_line and any(not call.quoted[i] for i in from_stdin):
        raise UsageError(
            f'{call.command.name}: a value - is standard input, where this line came from: "-" in quotes is a dash'
        )
    if from_stdin and not on_a_line:
        if len(from_stdin) > 1:
            raise UsageError(f"{call.command.name}: only one value can be read from standard input")
        if read_stdin is None and sys.stdin is None:
            raise UsageError(f"{call.command.name}: the value - is standard input, which is closed")
        words[from_stdin[0]] = (read_stdin or sys.stdin.buffer.read)(_value_bytes_max() + 1)  # as for a file
    return replace(call, words=tuple(words))


def _value(word: bytes) -> bytes:
    if word.startswith(b"@@"):
        return word[1:]
    if not word.startswith(b"@"):
        return word
    name = word[1:]
    try:
        with Path(os.fsdecode(name)).open("rb") as file:
            return file.read(_value_bytes_max() + 1)  # one more than allowed: the refusal is the SDK's
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = show_word(name)
        raise UsageError(f"can't read the value's file {shown}: {reason}; @@ is a literal @") from None


def _value_bytes_max() -> int:
    """The greatest value that the servers take, in bytes."""
    from raftkv.protocol.limits import VALUE_BYTES_MAX

    return VALUE_BYTES_MAX
