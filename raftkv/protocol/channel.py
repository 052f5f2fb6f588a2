"""The client's end: dial, say hello, then any number of requests in flight, told apart by their ids.

A request ends in exactly one of three ways: its reply, a typed error, or ConnectionLost when the
connection broke after the request was handed to it (its fate is then unknown). Nothing is ever sent
twice from here: retrying is the SDK's business, which knows what may be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raftkv.protocol.addresses import parse_address
from raftkv.protocol.connection import Connection
from raftkv.protocol.errors import (
    ConnectFailed,
    ConnectionLost,
    HandshakeRefused,
    Malformed,
    NoAnswer,
    RaftKVError,
    TlsRefused,
)
from raftkv.protocol.limits import CONNECT_TIMEOUT_S
from raftkv.protocol.messages import (
    KIND_HELLO_REPLY,
    KIND_REFUSED,
    Hello,
    decode_hello,
    decode_refused,
    decode_reply,
    encode_hello,
    encode_request,
)

if TYPE_CHECKING:
    import ssl


async def dial(
    address: str,
    factory: Callable[[], Connection],
    hello: Callable[[], bytes],
    greeting: asyncio.Future[Hello],
    *,
    ssl: ssl.SSLContext | None,
    timeout_s: float,
) -> Connection:
    """Connect, send the hello frame, wait until `greeting` (set by the connection's owner) has the answer.

    Raise ConnectFailed, HandshakeRefused, or whatever error the other end refused with. The connection
    is closed unless it is returned.
    """
    loop = asyncio.get_running_loop()
    host, port = parse_address(address)
    connection: Connection | None = None
    try:
        async with asyncio.timeout(timeout_s):
            if ssl is None:
                _, connection = await loop.create_connection(factory, host, port)
            else:
                connection = await _connect_with_tls(factory(), host, port, ssl)
            connection.send(hello())
            await greeting
    except TimeoutError:
        step = "no connection" if connection is None else "no answer to hello"
        raise ConnectFailed(address, f"{step} within {timeout_s:g} s") from None
    except OSError as error:
        raise ConnectFailed(address, _os_reason(error)) from None
    except UnicodeError:
        raise ConnectFailed(address, "this can't be the name of a host") from None
    except ConnectionLost as error:
        raise ConnectFailed(address, error.reason) from None
    finally:
        good = greeting.done() and not greeting.cancelled() and greeting.exception() is None
        if not good:
            greeting.cancel()  # nobody waits for it any more, whatever may still come
        if connection is not None and not good:
            connection.abort()
    return connection


async def _connect_with_tls(connection: Connection, host: str, port: int, context: ssl.SSLContext) -> Connection:
    """Connect; what is sent leaves when the handshake has ended."""
    from raftkv.protocol.tls_layer import TlsLayer

    await asyncio.get_running_loop().create_connection(lambda: TlsLayer(connection, context, host), host, port)
    return connection


def _os_reason(error: Exception) -> str:
    """What the system said, without the numbers and addresses that asyncio puts around it."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].lower()


class Channel:
    """One connection to one server. Make it with `open`; once `closed` it is over, and a new one is needed.

    `server_hello` is how the server introduced itself, `opened_s` when (loop time). `replies_received` counts what
    came back, late replies too. `on_closed(channel)` is called when it is over.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.server_hello = Hello()
        self.opened_s = 0.0
        self.replies_received = 0
        self._loop = asyncio.get_running_loop()
        self._greeting: asyncio.Future[Hello] | None = self._loop.create_future()
        self._connection: Connection | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._next_id = 0
        self._lost: RaftKVError | None = None
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self.on_closed: Callable[[Channel], None] | None = None

    @classmethod
    async def open(
        cls,
        address: str,
        hello: Hello,
        *,
        ssl: ssl.SSLContext | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Channel:
        """Raise ConnectFailed (nobody there, or no hello back in time) or the error it was refused with."""
        channel = cls(address)
        greeting = channel._greeting
        assert greeting is not None
        channel._connection = await dial(
            address,
            channel._make_connection,
            lambda: encode_hello(hello),
            greeting,
            ssl=ssl,
            timeout_s=timeout_s,
        )
        channel.server_hello = greeting.result()
        channel.opened_s = channel._loop.time()
        return channel

    @property
    def closed(self) -> bool:
        return self._connection is None or self._connection.closing

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    async def request(self, verb: int, body: list[Any], *, timeout_s: float) -> Any:
        """The reply's body.

        Raise the typed error that the server answered; ConnectFailed if nothing was sent because the
        channel is closed or stuck; NoAnswer (the request may still arrive) after `timeout_s`;
        ConnectionLost if the connection broke meanwhile.
        """
        connection = self._connection
        if connection is not None and connection.congested:
            deadline = self._loop.time() + timeout_s
            try:
                async with asyncio.timeout_at(deadline):
                    await connection.drained()
            except TimeoutError:
                raise ConnectFailed(self.address, "it does not read what it is sent") from None
            timeout_s = max(deadline - self._loop.time(), 0)
        if connection is None or connection.closing:
            raise ConnectFailed(self.address, str(self._lost) if self._lost is not None else "closed")
        request_id = self._next_id
        frame = encode_request(request_id, verb, body)
        self._next_id += 1
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._pending[request_id] = reply
        timer = self._loop.call_later(timeout_s, self._time_out, reply, timeout_s)
        connection.send(frame)
        try:
            return await reply
        finally:
            timer.cancel()
            self._pending.pop(request_id, None)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    async def wait_closed(self) -> None:
        """Wait until nothing is left of a connection that was closed (at most CLOSE_TIMEOUT_S)."""
        if not self._gone.done():
            await asyncio.shield(self._gone)

    def abort(self, reason: str = "closed") -> None:
        """Cut it; requests in flight end with ConnectionLost."""
        if self._lost is None:
            self._lost = ConnectionLost(reason)
        if self._connection is not None:
            self._connection.abort()

    # ---- inside

    def _time_out(self, reply: asyncio.Future[Any], timeout_s: float) -> None:
        if not reply.done():
            reply.set_exception(NoAnswer(f"{self.address}: no answer within {timeout_s:.3g} s"))

    def _make_connection(self) -> Connection:
        return Connection(self._on_frame, self._on_lost, label=self.address, reads_when_congested=True)

    def _on_frame(self, connection: Connection, frame: list[Any]) -> None:
        if frame[0] == KIND_REFUSED:
            self._lost = decode_refused(frame)
            connection.close()
            return
        if self._greeting is not None:
            if frame[0] != KIND_HELLO_REPLY:
                raise Malformed("expected the answer to hello")
            hello = decode_hello(frame)
            if not self._greeting.done():
                self._greeting.set_result(hello)
            self._greeting = None
            return
        request_id, error, body = decode_reply(frame)
        self.replies_received += 1
        reply = self._pending.pop(request_id, None)
        if reply is None or reply.done():
            return  # given up meanwhile
        if error is None:
            reply.set_result(body)
        else:
            reply.set_exception(error)

    def _on_lost(self, connection: Connection, error: Exception | None) -> None:
        if self._lost is None and isinstance(error, RaftKVError):
            self._lost = error
        elif self._lost is None:
            self._lost = ConnectionLost(_os_reason(error) if error is not None else "the connection was closed")
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_exception(_as_refusal(self.address, self._lost))
        self._greeting = None
        for reply in self._pending.values():
            if not reply.done():
                reply.set_exception(ConnectionLost(f"{self.address}: {self._lost}"))
        self._pending.clear()
        if not self._gone.done():
            self._gone.set_result(None)
        if self.on_closed is not None:
            self.on_closed(self)


def _as_refusal(address: str, error: RaftKVError) -> RaftKVError:
    """Nonsense in place of a hello isn't a lost connection: somebody else lives there."""
    if isinstance(error, TlsRefused):
        return TlsRefused(error.reason, address)
    if isinstance(error, Malformed):
        return HandshakeRefused(f"{address} doesn't speak RaftKV's protocol ({error}); check the address")
    return error
