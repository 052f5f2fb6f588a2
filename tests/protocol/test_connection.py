"""Connections under asyncio and uvloop: joined writes, bad input, back-pressure, closing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from raftkv.protocol.connection import Connection, Server
from raftkv.protocol.errors import Busy, Malformed, RaftKVError, WrongPeer, from_wire
from raftkv.protocol.frames import FrameParser, encode_frame
from raftkv.protocol.limits import HELLO_BYTES_MAX, WRITE_HIGH_WATER_BYTES
from tests.protocol.loops import both_loops, run, until


class Accepting:
    """A server that keeps what arrives; `answer` is called for each frame."""

    def __init__(self, answer: Callable[[Connection, list[Any]], None] | None = None) -> None:
        self.answer = answer
        self.frames: list[list[Any]] = []
        self.connections: list[Connection] = []
        self.lost: list[Exception | None] = []
        self.server: Server | None = None

    async def start(self, **options: Any) -> Server:
        self.server = await Server.listen("127.0.0.1", 0, self._on_connection, **options)
        return self.server

    def _on_connection(self, connection: Connection) -> None:
        self.connections.append(connection)
        connection.on_frame = self._on_frame
        connection.on_lost = lambda connection, error: self.lost.append(error)

    def _on_frame(self, connection: Connection, frame: list[Any]) -> None:
        self.frames.append(frame)
        if self.answer is not None:
            self.answer(connection, frame)


class Dialled:
    """The other end."""

    def __init__(self) -> None:
        self.frames: list[list[Any]] = []
        self.lost: list[Exception | None] = []

    async def connect(self, port: int) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(
                lambda connection, frame: self.frames.append(frame),
                lambda connection, error: self.lost.append(error),
                reads_when_congested=True,
            ),
            "127.0.0.1",
            port,
        )
        return connection


async def raw(port: int, data: bytes, *, until_closed: bool = True) -> bytes:
    """Send bytes; return what comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await reader.read() if until_closed else b""
    finally:
        writer.close()


def refusal(data: bytes) -> RaftKVError:
    """The error in a Refused frame, the only frame in `data`."""
    [frame] = FrameParser().feed(data)
    assert frame[0] == 3
    return from_wire(frame[1], frame[2])


@both_loops
def test_frames_both_ways(loop: str) -> None:
    async def main() -> None:
        accepting = Accepting(lambda connection, frame: connection.send(encode_frame([*frame, "seen"])))
        server = await accepting.start()
        dialled = Dialled()
        connection = await dialled.connect(server.port)
        for n in range(100):
            connection.send(encode_frame([n]))
        await until(lambda: len(dialled.frames) == 100)
        assert dialled.frames == [[n, "seen"] for n in range(100)]
        assert connection.peername == f"127.0.0.1:{server.port}"
        connection.close()
        await until(lambda: dialled.lost and accepting.lost)
        assert dialled.lost == [None]
        assert accepting.lost == [None]
        assert not server.connections
        server.close()

    run(loop, main)


@both_loops
def test_what_is_sent_in_one_turn_leaves_in_one_write(loop: str) -> None:
    async def main() -> None:
        accepting = Accepting()
        server = await accepting.start()
        connection = await Dialled().connect(server.port)
        transport = connection._transport
        assert transport is not None
        writes: list[bytes] = []

        class Spy:
            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

            def write(self, data: bytes) -> None:
                writes.append(data)
                assert transport is not None
                transport.write(data)

        connection._transport = Spy()  # type: ignore[assignment]
        for n in range(10):
            connection.send(encode_frame([n]))
        assert connection.out_bytes == 60
        assert writes == []
        await until(lambda: len(accepting.frames) == 10)
        assert len(writes) == 1
        connection.send(encode_frame([11]))
        connection.close()  # flushes
        await until(lambda: len(accepting.frames) == 11)
        assert len(writes) == 2
        await until(lambda: accepting.lost)
        server.close()

    run(loop, main)


@both_loops
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x03abc",
        encode_frame([1])[:-1] + b"\xc1",
        encode_frame([1, b"x" * (HELLO_BYTES_MAX + 1)])[:8],
        b"\x00\x00\xff\xff" + b"\x91" * 65_535,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
    ],
)
def test_bad_bytes_are_refused_and_the_server_lives(loop: str, data: bytes) -> None:
    async def main() -> None:
        accepting = Accepting(lambda connection, frame: connection.send(encode_frame(frame)))
        server = await accepting.start()
        dialled = Dialled()
        good = await dialled.connect(server.port)
        assert isinstance(refusal(await raw(server.port, data)), Malformed)
        assert isinstance(accepting.lost[0], Malformed)
        good.send(encode_frame(["still here"]))
        await until(lambda: dialled.frames)
        good.abort()
        server.close()
        await until(lambda: len(accepting.lost) == 2)

    run(loop, main)


@both_loops
def test_good_frames_before_a_bad_one_are_handled(loop: str) -> None:
    async def main() -> None:
        accepting = Accepting()
        server = await accepting.start()
        data = encode_frame([1]) + encode_frame([2]) + b"\x00\x00\x00\x01\xc1"
        await raw(server.port, data + encode_frame([3]))
        assert accepting.frames == [[1], [2]]
        server.close()

    run(loop, main)


@both_loops
def test_a_handler_may_refuse(loop: str) -> None:
    async def main() -> None:
        def refuse(connection: Connection, frame: list[Any]) -> None:
            raise WrongPeer("not you")

        accepting = Accepting(refuse)
        server = await accepting.start()
        got = await raw(server.port, encode_frame([1]) + encode_frame([2]))
        assert str(refusal(got)) == "wrong peer: not you"
        assert accepting.frames == [[1]]
        assert isinstance(accepting.lost[0], WrongPeer)
        server.close()

    run(loop, main)


@both_loops
def test_a_handler_that_recurses_into_hostile_nesting(loop: str) -> None:
    async def main() -> None:
        accepting = Accepting(lambda connection, frame: connection.send(encode_frame([repr(frame)])))
        server = await accepting.start()
        nested = b"\x91" * 1000 + b"\x00"
        got = await raw(server.port, len(nested).to_bytes(4, "big") + nested)
        assert "nested too deeply" in str(refusal(got))
        server.close()

    run(loop, main)


@both_loops
def test_a_slow_reader_stops_being_read_and_hurts_nobody_else(loop: str) -> None:
    """Replies larger than the requests: a client that doesn't read must not make the server hold them."""

    reply = encode_frame([b"x" * 20_000])

    async def main() -> None:
        accepting = Accepting(lambda connection, frame: connection.send(reply))
        server = await accepting.start()
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        slow.connect(("127.0.0.1", server.port))
        slow.setblocking(False)
        requests = encode_frame([b"y" * 1000]) * 2000
        event_loop = asyncio.get_running_loop()
        sending = event_loop.create_task(event_loop.sock_sendall(slow, requests))
        await until(lambda: accepting.connections and accepting.connections[0].congested)
        connection = accepting.connections[0]
        await asyncio.sleep(0.1)
        handled = len(accepting.frames)
        held = connection.out_bytes
        assert held < 100 * WRITE_HIGH_WATER_BYTES
        await asyncio.sleep(0.1)
        assert len(accepting.frames) == handled, "it is still read from"
        assert connection.out_bytes <= held

        dialled = Dialled()
        other = await dialled.connect(server.port)
        other.send(encode_frame([1]))
        await until(lambda: dialled.frames)

        received = 0
        while received < 2000 * len(reply):  # it reads again, and all is answered
            received += len(await event_loop.sock_recv(slow, 1 << 20))
        await sending
        assert not connection.congested
        slow.close()
        other.abort()
        server.close()
        await until(lambda: len(accepting.lost) == 2)

    run(loop, main, timeout_s=40)


async def fill(connection: Connection) -> None:
    """Send until it is congested."""
    while not connection.congested:
        connection.send(encode_frame([b"x" * 60_000]))
        await asyncio.sleep(0)


@both_loops
def test_drained_waits_for_the_other_end(loop: str) -> None:
    async def main() -> None:
        accepting = Accepting()
        server = await accepting.start()
        connection = await Dialled().connect(server.port)
        await connection.drained()  # at once
        await until(lambda: accepting.connections)
        accepting.connections[0].hold()
        await fill(connection)
        waiting = asyncio.ensure_future(connection.drained())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        accepting.connections[0].release()
        await waiting
        assert connection.out_bytes < WRITE_HIGH_WATER_BYTES

        accepting.connections[0].hold()
        await fill(connection)
        waiting = asyncio.ensure_future(connection.drained())
        await asyncio.sleep(0)
        connection.abort()
        await waiting  # a lost connection has nothing to drain
        server.abort()
        await until(lambda: accepting.lost)

    run(loop, main)


@both_loops
def test_close_cuts_a_peer_that_does_not_read(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftkv.protocol.connection.CLOSE_TIMEOUT_S", 0.1)

    async def main() -> None:
        accepting = Accepting()
        server = await accepting.start()
        sock = socket.socket()
        sock.connect(("127.0.0.1", server.port))
        await until(lambda: accepting.connections)
        connection = accepting.connections[0]
        for _ in range(400):
            connection.send(encode_frame([b"x" * 60_000]))
        connection.close()
        connection.close()
        connection.send(encode_frame([1]))  # dropped
        await until(lambda: accepting.lost)
        assert connection.out_bytes == 0
        sock.close()
        server.close()

    run(loop, main)


@both_loops
def test_too_many_connections(loop: str) -> None:
    async def main() -> None:
        accepting = Accepting()
        server = await accepting.start(connections_max=2)
        kept = [await Dialled().connect(server.port) for _ in range(2)]
        await until(lambda: len(server.connections) == 2)
        assert isinstance(refusal(await raw(server.port, b"")), Busy)
        kept[0].close()
        await until(lambda: len(server.connections) == 1)
        third = await Dialled().connect(server.port)
        await until(lambda: len(server.connections) == 2)
        third.abort()
        kept[1].abort()
        server.close()
        await until(lambda: not server.connections)

    run(loop, main)


@both_loops
def test_an_address_in_use_is_an_os_error(loop: str) -> None:
    async def main() -> None:
        server = await Accepting().start()
        with pytest.raises(OSError, match="in use"):
            await Server.listen("127.0.0.1", server.port, lambda connection: None)
        server.close()

    run(loop, main)


@both_loops
def test_four_hundred_connections(loop: str) -> None:
    async def main() -> None:
        accepting = Accepting(lambda connection, frame: connection.send(encode_frame(frame)))
        server = await accepting.start()
        ends = [Dialled() for _ in range(400)]
        connections = [await end.connect(server.port) for end in ends]
        for n, connection in enumerate(connections):
            connection.send(encode_frame([n]))
        await until(lambda: all(end.frames for end in ends))
        assert [end.frames for end in ends] == [[[n]] for n in range(400)]
        server.close()
        await until(lambda: all(end.lost for end in ends))

    run(loop, main)
