"""Connections: frames over the running loop's transports, for both ends.

`Connection` is an asyncio Protocol (no streams): it cuts what arrives into frames, joins what is sent in
one turn of the loop into one write, and follows the transport's water marks. `Server` accepts
connections. Sockets come only from the loop; nothing here starts a task or knows what a message means.

Back-pressure: an accepted connection whose peer doesn't read what it is sent isn't read from either,
until it has drained; so a slow reader hurts only itself, and what it can make us hold is bounded by
what it had asked for.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from raftkv.protocol.addresses import format_address
from raftkv.protocol.errors import Busy, Malformed, RaftKVError
from raftkv.protocol.frames import FrameParser
from raftkv.protocol.limits import (
    CLOSE_TIMEOUT_S,
    CONNECTIONS_MAX,
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    WRITE_HIGH_WATER_BYTES,
    WRITE_LOW_WATER_BYTES,
)
from raftkv.protocol.messages import encode_refused

if TYPE_CHECKING:
    import ssl

OnFrame = Callable[["Connection", list[Any]], None]
OnLost = Callable[["Connection", Exception | None], None]
OnMade = Callable[["Connection"], None]


class Connection(asyncio.Protocol):
    """One end of a connection.

    `on_made` is called once it is open; `on_frame` for each frame, in order; `on_lost` exactly once if it was
    made, with None for an orderly end, Malformed if the other end sent nonsense. `on_frame` may raise a
    RaftKVError: the other end is told (Refused) and the connection closed, as for a malformed frame.
    `reads_when_congested` is for the end that waits for replies: it must read in order to drain.
    """

    def __init__(
        self,
        on_frame: OnFrame,
        on_lost: OnLost,
        *,
        on_made: OnMade | None = None,
        label: str = "",
        reads_when_congested: bool = False,
    ) -> None:
        self.on_frame = on_frame
        self.on_lost = on_lost
        self.on_made = on_made
        self.label = label
        self.frames_received = 0
        self.peername = ""
        """HOST:PORT of the other end, for logs; kept when the connection is lost."""
        self.closing = False
        self._loop = asyncio.get_running_loop()
        self._parser = FrameParser(FRAME_BYTES_MAX, HELLO_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._queued_bytes = 0
        self._paused_by_transport = False
        self._held = False
        self._reads_when_congested = reads_when_congested
        self._drained: list[asyncio.Future[None]] = []
        self.on_drained: Callable[[], None] | None = None
        """Called whenever a write has left the connection uncongested."""
        self._failure: RaftKVError | None = None
        self._abort_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Connection {self.label} {self.peername}>"

    # ---- what the owner uses

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self.closing

    @property
    def out_bytes(self) -> int:
        """Bytes that were sent but not yet taken by the system."""
        written = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._queued_bytes + written

    @property
    def congested(self) -> bool:
        return self._paused_by_transport or self._queued_bytes > WRITE_HIGH_WATER_BYTES

    def send(self, frame: bytes) -> None:
        """Queue a frame; one write goes out per turn of the loop. Dropped once closing."""
        if self.closing or self._transport is None:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame)
        self._queued_bytes += len(frame)

    def hold(self) -> None:
        """Stop reading until `release`: the owner has as much work from here as it wants."""
        self._held = True
        self._steer_reading()

    def release(self) -> None:
        self._held = False
        self._steer_reading()

    async def drained(self) -> None:
        """Wait while congested. Returns at once, or when the connection is lost."""
        while self.congested and self.usable:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._drained.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._drained:
                    self._drained.remove(waiter)

    def refuse(self, error: RaftKVError) -> None:
        """Tell the other end why, and close. `on_lost` gets the error."""
        if not self.closing:
            self._failure = error
            self.send(encode_refused(error))
            self.close()

    def close(self) -> None:
        """Send what is queued, then close; cut after CLOSE_TIMEOUT_S if the other end doesn't read."""
        if self.closing:
            return
        self._flush()
        self.closing = True
        if self._transport is not None:
            self._transport.close()
            self._abort_timer = self._loop.call_later(CLOSE_TIMEOUT_S, self._transport.abort)

    def abort(self) -> None:
        """Close at once; what is queued is lost."""
        self.closing = True
        self._out.clear()
        self._queued_bytes = 0
        if self._transport is not None:
            self._transport.abort()

    def set_user_timeout(self, timeout_ms: int) -> None:
        """Have TCP give up when what it sent stays unacknowledged for so long, where there is a TCP."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if sock is not None and option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, timeout_ms)

    # ---- what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        name = transport.get_extra_info("peername")
        if isinstance(name, tuple) and len(name) >= 2:
            self.peername = format_address(name[0], name[1])
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES, low=WRITE_LOW_WATER_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # ends half-open ones, some day
        if self.closing:
            self._transport.abort()
        elif self.on_made is not None:
            self.on_made(self)

    def data_received(self, data: bytes) -> None:
        if not self.usable:
            return
        frames = self._parser.feed(data)
        self.frames_received += len(frames)
        on_frame = self.on_frame
        try:
            for frame in frames:
                on_frame(self, frame)
                if self.closing:
                    return
            if self._parser.error is not None:
                raise self._parser.error
        except RaftKVError as error:
            self.refuse(error)
        except RecursionError:  # of a handler that looked too closely: decoding allows 1,023 levels
            self.refuse(Malformed("nested too deeply"))

    def eof_received(self) -> bool:
        return False  # the transport closes: half-open connections are of no use here

    def pause_writing(self) -> None:
        self._paused_by_transport = True
        self._steer_reading()

    def resume_writing(self) -> None:
        self._paused_by_transport = False
        self._steer_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        self._out.clear()
        self._queued_bytes = 0
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        self._transport = None
        self._wake()
        self.on_lost(self, self._failure if self._failure is not None else error)

    # ---- inside

    def _flush(self) -> None:
        if not self._out or self._transport is None or self.closing:
            return
        joined = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        self._queued_bytes = 0
        self._transport.write(joined)
        if not self.congested:
            self._wake()

    def _wake(self) -> None:
        for waiter in self._drained:
            if not waiter.done():
                waiter.set_result(None)
        if self.on_drained is not None and self.usable:
            self.on_drained()

    def _steer_reading(self) -> None:
        if self._transport is None or self.closing:
            return
        if self._held or (self._paused_by_transport and not self._reads_when_congested):
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()


class Server:
    """A listening socket and the connections that it accepted.

    The handshake is the owner's job: `on_connection(connection)` is called for each new one and sets its
    `on_frame` and `on_lost`.
    """

    def __init__(self, on_connection: OnMade, *, label: str, connections_max: int = CONNECTIONS_MAX) -> None:
        self._on_connection = on_connection
        self._label = label
        self._connections_max = connections_max
        self._server: asyncio.Server | None = None
        self.connections: dict[Connection, None] = {}

    @classmethod
    async def listen(
        cls,
        host: str,
        port: int,
        on_connection: OnMade,
        *,
        ssl: ssl.SSLContext | None = None,
        label: str = "server",
        connections_max: int = CONNECTIONS_MAX,
    ) -> Server:
        """Raise OSError if the address can't be had. Port 0 takes a free one: see `port`.

        With `ssl` a connection whose handshake fails is lost with a TlsRefused.
        """
        server = cls(on_connection, label=label, connections_max=connections_max)
        factory: Callable[[], asyncio.Protocol] = server._factory
        if ssl is not None:
            from raftkv.protocol.tls_layer import TlsLayer

            def factory() -> asyncio.Protocol:
                return TlsLayer(server._factory(), ssl)

        loop = asyncio.get_running_loop()
        server._server = await loop.create_server(factory, host, port, backlog=1024)
        return server

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()

    def close(self) -> None:
        """Stop listening, flush and close every connection."""
        self.stop_listening()
        for connection in list(self.connections):
            connection.close()

    def abort(self) -> None:
        self.stop_listening()
        for connection in list(self.connections):
            connection.abort()

    def _factory(self) -> Connection:
        return _Accepted(self, self._label)

    def _made(self, connection: Connection) -> None:
        if len(self.connections) >= self._connections_max:
            connection.refuse(Busy(f"{self._connections_max} connections are open"))
            return
        self.connections[connection] = None
        self._on_connection(connection)


class _Accepted(Connection):
    """A connection that its server keeps track of."""

    def __init__(self, server: Server, label: str) -> None:
        super().__init__(_unexpected_frame, _ignore_loss, on_made=server._made, label=label)
        self._server = server

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.pop(self, None)
        super().connection_lost(error)


def _unexpected_frame(connection: Connection, frame: list[Any]) -> None:
    raise Malformed("nobody expects messages on this connection")


def _ignore_loss(connection: Connection, error: Exception | None) -> None:
    """The connection was refused before it had an owner."""
