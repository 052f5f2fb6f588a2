"""TLS between a transport of the loop and a `Connection`: the one's protocol, the other's transport.

The loops' own TLS tells neither end why a handshake failed: they close before OpenSSL's alert has left, and look at
nothing that isn't TLS. Here an alert always leaves, plain text is answered with a refusal in plain text, and what went
wrong comes as a `TlsRefused` to the `on_lost` of the connection. Closing waits for nobody: frames have lengths, so an
end of the stream that TLS didn't announce can't pass for a shorter message.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterable
from typing import Any, cast

from raftkv.protocol.errors import TlsRefused
from raftkv.protocol.messages import encode_refused
from raftkv.protocol.tls import CAME_WITHOUT_TLS, SPEAKS_NO_TLS, SPEAKS_TLS, refusal

HANDSHAKE_RECORDS = (0x15, 0x16)
"""The first byte of an alert and of a hello (RFC 8446, 5.1). A frame of ours begins with 0."""
READ_BYTES = 64 * 1024
"""More than a record holds."""


class TlsLayer(asyncio.Transport, asyncio.Protocol):
    """One connection. `host`, on the end that dials, is what the other's certificate must be for.

    The connection is made when TCP's is; what it writes before the handshake has ended leaves right after.
    """

    def __init__(self, connection: asyncio.Protocol, context: ssl.SSLContext, host: str | None = None) -> None:
        super().__init__()
        self._connection = connection
        self._host = host
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=host is None, server_hostname=host)
        self._raw: asyncio.Transport | None = None
        self._heard = False
        self._up = False
        self._closing = False
        self._early: list[bytes] = []
        self._refusal: TlsRefused | None = None

    # ---- what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._connection.connection_made(self)
        if self._host is not None and not self._closing:
            self._shake_hands()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if not self._heard:
            self._heard = True
            if data[0] not in HANDSHAKE_RECORDS:
                self._refuse_plain_text()
                return
        self._incoming.write(data)
        if not self._up and not self._shake_hands():
            return
        pieces, ended = self._decrypt()
        self._send()
        if pieces:
            self._connection.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if ended:
            self.close()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._up and not self._closing and error is None:
            error = ConnectionResetError("the connection was closed in the TLS handshake")
        self._closing = True
        self._connection.connection_lost(self._refusal or error)

    # ---- what the connection calls

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._closing:
            return
        if not self._up:
            self._early.append(bytes(data))
            return
        try:
            self._encrypt(data)
        except ssl.SSLError as error:
            self._break_off(error)
        else:
            self._send()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._up:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()  # our farewell; the other's isn't waited for
        self._send()
        self._transport.close()

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + sum(map(len, self._early))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    # ---- inside

    @property
    def _transport(self) -> asyncio.Transport:
        assert self._raw is not None, "a connection has no transport before it is made"
        return self._raw

    def _shake_hands(self) -> bool:
        """Go on with the handshake; whether it has ended well."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return False
        except ssl.SSLError as error:
            self._refusal = refusal(error, self._host)
            self._closing = True
            self._send()  # the alert: so the other end knows too
            self._transport.close()
            return False
        self._up = True
        for data in self._early:
            self._encrypt(data)
        self._early.clear()
        self._send()
        return True

    def _refuse_plain_text(self) -> None:
        self._closing = True
        if self._host is None:
            self._refusal = TlsRefused(CAME_WITHOUT_TLS)
            self._transport.write(encode_refused(TlsRefused(SPEAKS_TLS)))
        else:
            self._refusal = TlsRefused(SPEAKS_NO_TLS)
        self._transport.close()

    def _decrypt(self) -> tuple[list[bytes], bool]:
        """What has arrived, and whether the other end said farewell. Aborts for what isn't TLS of this session."""
        pieces: list[bytes] = []
        try:
            while piece := self._tls.read(READ_BYTES):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            return pieces, False
        except ssl.SSLZeroReturnError:
            pass
        except ssl.SSLError as error:
            self._break_off(error)
        return pieces, True

    def _break_off(self, error: ssl.SSLError) -> None:
        self._refusal = refusal(error, self._host)
        self._closing = True
        self._send()  # the alert, if it goes at once
        self._transport.abort()

    def _encrypt(self, data: bytes | bytearray | memoryview[Any]) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest) :]

    def _send(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())
