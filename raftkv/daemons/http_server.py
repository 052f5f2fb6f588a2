"""A small HTTP/1.1 server on the daemon's own loop, for probes and scrapers: GET and HEAD of a few fixed paths.

Everything is bounded: a request's bytes, the time it may take to come and its answer to be read, the number of
connections. A request has no body. What can't be understood gets one line of plain text and the connection's end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple, cast

log = logging.getLogger(__name__)

REQUEST_BYTES_MAX = 8 * 1024
CONNECTIONS_MAX = 64
REQUEST_TIMEOUT_S = 10.0
"""From a connection's beginning, or a request's first byte, to its last; and for the answer to be taken."""
IDLE_TIMEOUT_S = 120.0
"""Between an answer and the next request: scrapers come back on the same connection."""
TEXT = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    status: HTTPStatus
    body: bytes
    content_type: str = TEXT


Handler = Callable[[str], Answer]
"""Called with the query, the part after the question mark."""


class HttpServer:
    """Serves `paths` at one address."""

    def __init__(self, paths: Mapping[str, Handler]) -> None:
        self.paths = paths
        self.connections: dict[_HttpConnection, None] = {}
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> None:
        """Raise OSError if the address can't be had."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _HttpConnection(self), host, port)

    def close(self) -> None:
        """Stop listening, and cut all connections."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()


class _BadRequest(Exception):
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _HttpConnection(asyncio.Protocol):
    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._data = bytearray()
        self._is_paused = False

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---- what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections[self] = None
        self._transport.set_write_buffer_limits(high=0)  # paused until an answer is all with the system
        self._give_time(REQUEST_TIMEOUT_S)
        if len(self._server.connections) > CONNECTIONS_MAX:
            self._complain(HTTPStatus.SERVICE_UNAVAILABLE, f"{CONNECTIONS_MAX} connections are open")

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.pop(self, None)
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if not self._data:
            self._give_time(REQUEST_TIMEOUT_S)
        self._data += data
        self._serve()

    def pause_writing(self) -> None:
        self._is_paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            self._give_time(REQUEST_TIMEOUT_S if self._data else IDLE_TIMEOUT_S)
            self._serve()

    # ---- inside

    def _give_time(self, timeout_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(timeout_s, self.abort)

    def _serve(self) -> None:
        """Answer the requests that are there, one after the other."""
        while self._data and not self._is_paused and self._transport is not None and not self._transport.is_closing():
            end = self._data.find(b"\r\n\r\n")
            if (end if end >= 0 else len(self._data)) > REQUEST_BYTES_MAX:
                self._complain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {REQUEST_BYTES_MAX} bytes")
                return
            if end < 0:
                return
            head = bytes(self._data[:end])
            del self._data[: end + 4]
            try:
                self._answer(head)
            except _BadRequest as error:
                self._complain(error.status, str(error))

    def _answer(self, head: bytes) -> None:
        method, target, is_last = _parse(head)
        path, _, query = target.partition("?")
        handler = self._server.paths.get(path)
        if method not in ("GET", "HEAD"):
            self._send(
                _text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD"), method, is_last, "Allow: GET, HEAD\r\n"
            )
        elif handler is None:
            known = ", ".join(self._server.paths)
            self._send(_text(HTTPStatus.NOT_FOUND, f"there is {known}"), method, is_last)
        else:
            self._send(self._ask(handler, path, query), method, is_last)

    def _ask(self, handler: Handler, path: str, query: str) -> Answer:
        try:
            return handler(query)
        except Exception:  # a bug in what only looks must not end the daemon
            log.exception("%s could not be answered", path)
            return _text(HTTPStatus.INTERNAL_SERVER_ERROR, "a bug in raftkv; its log has the details")

    def _complain(self, status: HTTPStatus, reason: str) -> None:
        self._send(_text(status, reason), "GET", True)

    def _send(self, answer: Answer, method: str, is_last: bool, more: str = "") -> None:
        assert self._transport is not None
        self._give_time(REQUEST_TIMEOUT_S if self._data else IDLE_TIMEOUT_S)
        head = (
            f"HTTP/1.1 {answer.status} {answer.status.phrase}\r\nContent-Type: {answer.content_type}\r\n"
            f"Content-Length: {len(answer.body)}\r\nCache-Control: no-store\r\n{more}"
            f"{'Connection: close' if is_last else 'Connection: keep-alive'}\r\n\r\n"
        )
        self._transport.write(head.encode("latin-1") + (b"" if method == "HEAD" else answer.body))
        if is_last:
            self._give_time(REQUEST_TIMEOUT_S)
            self._data.clear()
            self._transport.close()
        elif self._is_paused:
            self._give_time(REQUEST_TIMEOUT_S)


def _parse(head: bytes) -> tuple[str, str, bool]:
    """(method, target, whether the connection ends with the answer) of a request's head; raise _BadRequest."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[0].isalpha() or words[2] not in ("HTTP/1.0", "HTTP/1.1"):
        raise _BadRequest(HTTPStatus.BAD_REQUEST, "not a request of HTTP/1.1")
    is_last = words[2] == "HTTP/1.0"
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip().lower()
        if not colon or not name or name != name.strip():
            raise _BadRequest(HTTPStatus.BAD_REQUEST, "not a header of HTTP/1.1")
        if name == "connection":
            is_last = is_last or "close" in value
        elif name == "transfer-encoding" or (name == "content-length" and value != "0"):
            raise _BadRequest(HTTPStatus.BAD_REQUEST, "a request has no body")
    return words[0], words[1], is_last


def _text(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, f"{status.phrase.lower()}: {text}\n".encode())
