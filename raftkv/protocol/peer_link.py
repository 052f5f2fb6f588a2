"""A one-way link to a Raft peer: dials until it succeeds, and again when it breaks.

Messages are sent or dropped, never kept for later: Raft repeats what matters. Silence is detected by
TCP alone (heartbeats are Raft's). A link must never be the reason that memory grows: beyond a limit it
drops.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raftkv.protocol.channel import dial
from raftkv.protocol.connection import Connection
from raftkv.protocol.errors import ConnectFailed, ConnectionLost, Malformed, RaftKVError
from raftkv.protocol.limits import CONNECT_TIMEOUT_S, PEER_QUEUE_BYTES_MAX, PEER_UNACKED_TIMEOUT_MS
from raftkv.protocol.messages import (
    KIND_HELLO_REPLY,
    KIND_REFUSED,
    Hello,
    decode_hello,
    decode_refused,
    encode_hello,
)

if TYPE_CHECKING:
    import ssl

BACKOFF_S_MIN = 0.05
BACKOFF_S_MAX = 1.0


class PeerLink:
    """One outgoing link.

    `hello()` is asked before each dial. `on_up(reply)`: the peer said hello back; `on_down()`: an up link
    broke; `on_refused(error)`: the peer refuses us, at the hello or later; then it is tried again, slowly.
    If `on_up` raises a RaftKVError the link is cut and `on_refused` gets it.
    """

    def __init__(
        self,
        address: str,
        hello: Callable[[], Hello],
        *,
        rng: random.Random,
        on_up: Callable[[Hello], None],
        on_down: Callable[[], None],
        on_refused: Callable[[RaftKVError], None],
        ssl: ssl.SSLContext | None = None,
        queue_bytes_max: int = PEER_QUEUE_BYTES_MAX,
    ) -> None:
        self.address = address
        self.dropped = 0
        self._hello = hello
        self._rng = rng
        self._on_up = on_up
        self._on_down = on_down
        self._on_refused = on_refused
        self._ssl = ssl
        self._queue_bytes_max = queue_bytes_max
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._greeting: asyncio.Future[Hello] | None = None
        self._lost: asyncio.Future[None] | None = None
        self._refusal: RaftKVError | None = None
        self._pause: asyncio.Future[None] | None = None
        self._generation = 0

    @property
    def up(self) -> bool:
        return self._connection is not None

    @property
    def out_bytes(self) -> int:
        return self._connection.out_bytes if self._connection is not None else 0

    def start(self) -> None:
        """Begin to dial. The link owns its one task until `close`."""
        assert self._task is None, "a link is started once"
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"link to {self.address}")

    def send(self, frame: bytes) -> bool:
        """False if it was dropped: the link is down, or too much is queued."""
        connection = self._connection
        if connection is None or connection.out_bytes + len(frame) > self._queue_bytes_max:
            self.dropped += 1
            return False
        connection.send(frame)
        return True

    def hurry(self) -> None:
        """The peer has given a sign of life: if the link waits before the next dial, it dials now."""
        if self._pause is not None and not self._pause.done():
            self._pause.set_result(None)

    def reconnect(self) -> None:
        """Dial again, with a new hello; what is queued still leaves."""
        self._generation += 1
        if self._connection is not None:
            self._connection.close()

    def close(self) -> None:
        """Send what is queued and end; no callback comes any more."""
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # ---- inside

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_S_MIN
        while True:
            self._greeting = loop.create_future()
            self._lost = loop.create_future()
            self._refusal = None
            generation = self._generation
            try:
                connection = await dial(
                    self.address,
                    self._make_connection,
                    lambda: encode_hello(self._hello()),
                    self._greeting,
                    ssl=self._ssl,
                    timeout_s=CONNECT_TIMEOUT_S,
                )
                if generation != self._generation:
                    connection.abort()  # `reconnect` was called meanwhile: our hello is outdated
                elif connection.closing:
                    await self._lost  # it said hello and something else; why it broke is known then
                else:
                    await self._use(connection, self._greeting.result(), self._lost)
                    backoff_s = BACKOFF_S_MIN
            except ConnectFailed:
                pass  # nobody there (yet): try again
            except RaftKVError as error:
                self._refusal = error
            if self._refusal is not None:
                self._on_refused(self._refusal)
                backoff_s = BACKOFF_S_MAX
            self._pause = loop.create_future()
            await asyncio.wait([self._pause], timeout=backoff_s * (0.5 + self._rng.random() / 2))
            backoff_s = BACKOFF_S_MIN if self._pause.done() else min(2 * backoff_s, BACKOFF_S_MAX)
            self._pause = None

    async def _use(self, connection: Connection, reply: Hello, lost: asyncio.Future[None]) -> None:
        """The link is up until `lost`. Raise RaftKVError if the owner doesn't want this peer."""
        connection.set_user_timeout(PEER_UNACKED_TIMEOUT_MS)
        self._connection = connection
        try:
            self._on_up(reply)
            await lost
        except RaftKVError:
            connection.abort()
            raise
        finally:
            was_up = self._connection is not None  # None: `close` was called, and says nothing more
            self._connection = None
        if was_up:
            self._on_down()

    def _make_connection(self) -> Connection:
        return Connection(
            self._on_frame, self._connection_lost, label=f"link to {self.address}", reads_when_congested=True
        )

    def _on_frame(self, connection: Connection, frame: list[Any]) -> None:
        if frame[0] == KIND_REFUSED:
            self._refusal = decode_refused(frame)
            connection.close()
        elif frame[0] == KIND_HELLO_REPLY and self._greeting is not None and not self._greeting.done():
            self._greeting.set_result(decode_hello(frame))
        else:
            raise Malformed("a Raft peer answers nothing but hello on this link")

    def _connection_lost(self, connection: Connection, error: Exception | None) -> None:
        if self._refusal is None and isinstance(error, RaftKVError):
            self._refusal = error  # ours: what came isn't what a peer says
        if self._greeting is not None and not self._greeting.done():
            reason = self._refusal or ConnectionLost(str(error or "the connection was closed"))
            self._greeting.set_exception(reason)
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)
