"""A Redis client that shows everything: one socket, bytes out, replies in as they are."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import hiredis

from tests.system.cluster import free_port


class Resp:
    """A connection to a Redis listener on loopback."""

    def __init__(self, port: int, timeout_s: float = 30.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._reader = hiredis.Reader()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self) -> Any:
        """The next one; an error is a hiredis.ReplyError. Raise EOFError when the connection has ended."""
        while (value := self._reader.gets()) is False:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._reader.feed(data)
        return value

    def ask(self, *words: bytes | str | int) -> Any:
        """The reply to one command."""
        self.send(packed(*words))
        return self.reply()

    def rest(self) -> bytes:
        """All that comes until the other end closes."""
        received = b""
        while data := self.socket.recv(1 << 16):
            received += data
        return received

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Resp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def packed(*words: bytes | str | int) -> bytes:
    """A command as Redis' clients send it."""
    encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """A real Redis, without files; its port."""
    port = free_port()
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + 15
        while True:
            try:
                with Resp(port) as resp:
                    assert resp.ask("PING") == b"PONG"
                    break
            except OSError:
                assert time.monotonic() < deadline_s, "redis-server doesn't answer"
                time.sleep(0.02)
        yield port
    finally:
        server.kill()
        server.wait()
