"""The little HTTP server: what it answers, and that nobody can hold it up or make it hold much."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

import pytest
import uvloop

from raftkv.daemons import http_server
from raftkv.daemons.http_server import CONNECTIONS_MAX, REQUEST_BYTES_MAX, Answer, HttpServer

BIG = b"x" * (8 << 20)


def boom(query: str) -> Answer:
    raise RuntimeError("secret")


PATHS: dict[str, Callable[[str], Answer]] = {
    "/hello": lambda query: Answer(HTTPStatus.OK, f"hello {query}\n".encode()),
    "/big": lambda query: Answer(HTTPStatus.OK, BIG),
    "/boom": boom,
}


@pytest.fixture(autouse=True, params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def on_both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.run_loop", request.param)


run_loop: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run


def serve(client: Callable[[HttpServer, int], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        server = HttpServer(PATHS)
        await server.listen("127.0.0.1", 0)
        assert server._server is not None
        try:
            async with asyncio.timeout(10):
                await client(server, server._server.sockets[0].getsockname()[1])
        finally:
            server.close()

    run_loop(run())


def ask(*pieces: bytes) -> bytes:
    """What comes back, to the connection's end, for a request that is sent in these pieces."""
    got = b""

    async def client(server: HttpServer, port: int) -> None:
        nonlocal got
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.001)
        got = await reader.read()
        writer.close()

    serve(client)
    return got


def request(line: str, *headers: str) -> bytes:
    return "\r\n".join([line, "Host: x", *headers, "Connection: close", "", ""]).encode()


def test_get_and_head() -> None:
    answer = ask(request("GET /hello?you HTTP/1.1"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 200 OK"
    assert b"Content-Length: 10" in head and b"text/plain; charset=utf-8" in head and b"Connection: close" in head
    assert body == b"hello you\n"
    assert ask(request("HEAD /hello?you HTTP/1.1")) == head + b"\r\n\r\n"


def test_byte_by_byte_and_several_at_once() -> None:
    whole = request("GET /hello?a HTTP/1.1")
    assert ask(*(whole[at : at + 1] for at in range(len(whole)))) == ask(whole)
    first = b"GET /hello?a HTTP/1.1\r\n\r\nGET /hello?b HTTP/1.1\r\n\r\n"
    assert ask(first + request("GET /hello?c HTTP/1.1")).count(b"HTTP/1.1 200 OK") == 3
    assert ask(b"GET /hello?a HTTP/1.0\r\n\r\nGET /hello?b HTTP/1.0\r\n\r\n").count(b"200 OK") == 1


@pytest.mark.parametrize(
    ("sent", "line", "text"),
    [
        (request("GET /other HTTP/1.1"), "404 Not Found", "there is /hello, /big, /boom"),
        (request("GET /hello/ HTTP/1.1"), "404 Not Found", ""),
        (request("POST /hello HTTP/1.1"), "405 Method Not Allowed", "only GET and HEAD"),
        (request("GET /hello HTTP/1.1", "Content-Length: 5") + b"hello", "400 Bad Request", "a request has no body"),
        (request("GET /hello HTTP/1.1", "Transfer-Encoding: chunked"), "400 Bad Request", "a request has no body"),
        (request("GET /hello HTTP/1.1", "no header"), "400 Bad Request", "not a header"),
        (request("GET /hello HTTP/1.1", "folded: a", " b: c"), "400 Bad Request", "not a header"),
        (request("GET /hello HTTP/2"), "400 Bad Request", "not a request of HTTP/1.1"),
        (request("GET  /hello HTTP/1.1"), "400 Bad Request", ""),
        (b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", "400 Bad Request", "not a request of HTTP/1.1"),
        (request("GET /hello HTTP/1.1", "X: " + "y" * REQUEST_BYTES_MAX), "431", "more than 8192 bytes"),
        (b"GET /" + b"a" * (REQUEST_BYTES_MAX + 1), "431", "more than 8192 bytes"),
        (request("GET /boom HTTP/1.1"), "500", "a bug in raftkv"),
    ],
)
def test_what_can_t_be_served_is_one_line_of_text(sent: bytes, line: str, text: str) -> None:
    answer = ask(sent)
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {line}") and "text/plain" in head
    assert text in body and body.count("\n") == 1
    assert "Traceback" not in body and "secret" not in body
    assert ("Allow: GET, HEAD" in head) == line.startswith("405")


def test_connections_are_kept_and_bounded() -> None:
    async def client(server: HttpServer, port: int) -> None:
        many = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS_MAX)]
        reader, writer = many[0]
        for name in (b"a", b"b"):
            writer.write(b"GET /hello?%b HTTP/1.1\r\n\r\n" % name)
            assert b"keep-alive" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readline() == b"hello %b\n" % name
        one_more, _ = await asyncio.open_connection("127.0.0.1", port)
        assert b"503 Service Unavailable" in await one_more.read()
        writer.close()
        while len(server.connections) >= CONNECTIONS_MAX:
            await asyncio.sleep(0.001)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("GET /hello?z HTTP/1.1"))
        assert (await reader.read()).endswith(b"hello z\n")

    serve(client)


@pytest.mark.parametrize("sent", [b"", b"GET /hello HTT", b"GET /big HTTP/1.1\r\n\r\nGET /big HTTP/1.1\r\n\r\n"])
def test_who_is_too_slow_is_cut_off(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """One that says nothing, one that doesn't finish, one that doesn't read its answer."""
    monkeypatch.setattr(http_server, "REQUEST_TIMEOUT_S", 0.1)

    async def client(server: HttpServer, port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(sent)
        while not server.connections:
            await asyncio.sleep(0.001)
        while server.connections:
            await asyncio.sleep(0.01)
        writer.close()

    serve(client)


def test_who_dribbles_gains_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REQUEST_TIMEOUT_S", 0.2)

    async def client(server: HttpServer, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for _ in range(100):
            writer.write(b"a")
            await asyncio.sleep(0.02)
            if reader.at_eof() or reader.exception() is not None or not server.connections:
                break
        assert loop.time() - began_s < 1.0

    serve(client)
