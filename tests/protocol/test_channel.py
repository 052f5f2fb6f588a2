"""The client's end: handshake, requests told apart by ids, time-outs, and what is known when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest

from raftkv.protocol.channel import Channel
from raftkv.protocol.connection import Connection, Server
from raftkv.protocol.errors import (
    BadVersion,
    ConnectFailed,
    ConnectionLost,
    HandshakeRefused,
    NoAnswer,
    NotLeader,
    RaftKVError,
    ShuttingDown,
    WrongCluster,
)
from raftkv.protocol.frames import encode_frame
from raftkv.protocol.messages import (
    Hello,
    decode_hello,
    decode_request,
    encode_error_reply,
    encode_hello_reply,
    encode_refused,
    encode_reply,
)
from tests.protocol.loops import both_loops, run, until

SERVER_HELLO = Hello(role="controller", replica=1, cluster_id=b"c" * 16, store_id=b"s" * 16)

OnRequest = Callable[[Connection, int, int, list[Any]], None]


class Daemon:
    """Says hello, then hands requests to `on_request`."""

    def __init__(self, on_request: OnRequest, on_hello: Callable[[Connection], None] | None = None) -> None:
        self.on_request = on_request
        self.on_hello = on_hello
        self.hellos: list[Hello] = []
        self.server: Server | None = None

    async def start(self) -> str:
        self.server = await Server.listen("127.0.0.1", 0, self._on_connection)
        return f"127.0.0.1:{self.server.port}"

    async def stop(self) -> None:
        assert self.server is not None
        self.server.abort()
        await until(lambda: not self.server or not self.server.connections)

    def _on_connection(self, connection: Connection) -> None:
        connection.on_frame = self._on_frame
        connection.on_lost = lambda connection, error: None

    def _on_frame(self, connection: Connection, frame: list[Any]) -> None:
        if frame[0] == 1:
            self.hellos.append(decode_hello(frame))
            if self.on_hello is not None:
                self.on_hello(connection)
            else:
                connection.send(encode_hello_reply(SERVER_HELLO))
            return
        self.on_request(connection, *decode_request(frame))


def echo(connection: Connection, request_id: int, verb: int, body: list[Any]) -> None:
    connection.send(encode_reply(request_id, [verb, *body]))


def silent(connection: Connection, request_id: int, verb: int, body: list[Any]) -> None:
    """Never answers."""


async def refusal_of(address: str, timeout_s: float = 1.0) -> RaftKVError:
    with pytest.raises(RaftKVError) as caught:
        await Channel.open(address, Hello.of_client(), timeout_s=timeout_s)
    return caught.value


@both_loops
def test_requests_in_flight_are_told_apart(loop: str) -> None:
    async def main() -> None:
        held: list[tuple[Connection, int, list[Any]]] = []

        def in_reverse(connection: Connection, request_id: int, verb: int, body: list[Any]) -> None:
            held.append((connection, request_id, body))
            if len(held) == 100:
                for waiting, held_id, held_body in reversed(held):
                    waiting.send(encode_reply(held_id, held_body))

        daemon = Daemon(in_reverse)
        channel = await Channel.open(await daemon.start(), Hello.of_client(b"c" * 16))
        assert str(channel.server_hello) == "controller 1"
        assert daemon.hellos[0].cluster_id == b"c" * 16
        replies = await asyncio.gather(*(channel.request(1, [n], timeout_s=5) for n in range(100)))
        assert replies == [[n] for n in range(100)]
        assert channel.in_flight == 0
        channel.close()
        await channel.wait_closed()
        await daemon.stop()

    run(loop, main)


@both_loops
def test_typed_errors(loop: str) -> None:
    async def main() -> None:
        def refuse(connection: Connection, request_id: int, verb: int, body: list[Any]) -> None:
            connection.send(encode_error_reply(request_id, *NotLeader("h:1").to_wire()))

        daemon = Daemon(refuse)
        channel = await Channel.open(await daemon.start(), Hello.of_client())
        with pytest.raises(NotLeader) as caught:
            await channel.request(1, [], timeout_s=5)
        assert caught.value.leader_address == "h:1"
        assert not channel.closed
        channel.abort()
        await daemon.stop()

    run(loop, main)


@both_loops
def test_time_out_and_the_late_reply(loop: str) -> None:
    async def main() -> None:
        held: list[tuple[Connection, int]] = []
        daemon = Daemon(lambda connection, request_id, verb, body: held.append((connection, request_id)))
        channel = await Channel.open(await daemon.start(), Hello.of_client())
        with pytest.raises(NoAnswer):
            await channel.request(1, [], timeout_s=0.05)
        assert channel.in_flight == 0
        connection, request_id = held[0]
        connection.send(encode_reply(request_id, "late"))
        await until(lambda: channel.replies_received == 1)
        daemon.on_request = echo
        assert await channel.request(4, ["next"], timeout_s=5) == [4, "next"]
        channel.abort()
        await daemon.stop()

    run(loop, main)


@both_loops
def test_a_cancelled_request_leaves_nothing(loop: str) -> None:
    async def main() -> None:
        daemon = Daemon(silent)
        channel = await Channel.open(await daemon.start(), Hello.of_client())
        request = asyncio.ensure_future(channel.request(1, [], timeout_s=5))
        await asyncio.sleep(0.01)
        assert channel.in_flight == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert channel.in_flight == 0
        channel.abort()
        await daemon.stop()

    run(loop, main)


@both_loops
@pytest.mark.parametrize("how", ["reset", "close", "refuse", "nonsense", "two replies in one"])
def test_a_broken_connection_ends_every_request_as_unknown(loop: str, how: str) -> None:
    async def main() -> None:
        def break_it(connection: Connection, request_id: int, verb: int, body: list[Any]) -> None:
            if body == [2]:
                if how == "reset":
                    connection.abort()
                elif how == "close":
                    connection.close()
                elif how == "refuse":
                    connection.refuse(ShuttingDown())
                elif how == "nonsense":
                    connection.send(b"\x00\x00\x00\x01\xc1")
                else:
                    connection.send(encode_frame([11, 0, 0, None, None]))

        closed: list[Channel] = []
        daemon = Daemon(break_it)
        channel = await Channel.open(await daemon.start(), Hello.of_client())
        channel.on_closed = closed.append
        requests = [asyncio.ensure_future(channel.request(1, [n], timeout_s=5)) for n in range(3)]
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert all(type(result) is ConnectionLost for result in results), results
        if how == "refuse":
            assert "shutting down" in str(results[0])
        await until(lambda: closed)
        assert closed == [channel]
        assert channel.closed
        with pytest.raises(ConnectFailed):  # nothing was sent: definite
            await channel.request(1, [], timeout_s=5)
        await channel.wait_closed()
        await daemon.stop()

    run(loop, main)


@both_loops
def test_nobody_there(loop: str) -> None:
    async def main() -> None:
        daemon = Daemon(echo)
        address = await daemon.start()
        await daemon.stop()
        error = await refusal_of(address)
        assert isinstance(error, ConnectFailed)
        assert str(error) == f"{address}: connection refused"
        error = await refusal_of("no-such-host.invalid:1", timeout_s=5)
        assert isinstance(error, ConnectFailed)

    run(loop, main)


@both_loops
def test_somebody_who_never_says_hello(loop: str) -> None:
    async def main() -> None:
        daemon = Daemon(echo, on_hello=lambda connection: None)
        error = await refusal_of(await daemon.start(), timeout_s=0.1)
        assert isinstance(error, ConnectFailed)
        assert "no answer to hello within 0.1 s" in str(error)
        await daemon.stop()

    run(loop, main)


@both_loops
def test_refused_hellos(loop: str) -> None:
    async def main() -> None:
        answers: dict[type[RaftKVError], bytes] = {
            WrongCluster: encode_refused(WrongCluster(b"a" * 16, b"b" * 16)),
            BadVersion: encode_frame([2, 99, "something of the future"]),
            HandshakeRefused: b"\x00\x00\x00\x04HTTP",
        }
        for kind, answer in answers.items():

            def on_hello(connection: Connection, answer: bytes = answer) -> None:
                connection.send(answer)

            daemon = Daemon(echo, on_hello=on_hello)
            error = await refusal_of(await daemon.start())
            assert isinstance(error, kind), error
            assert isinstance(error, HandshakeRefused)
            await daemon.stop()

    run(loop, main)


@both_loops
def test_closing_before_hello(loop: str) -> None:
    async def main() -> None:
        daemon = Daemon(echo, on_hello=lambda connection: connection.close())
        error = await refusal_of(await daemon.start())
        assert isinstance(error, ConnectFailed)
        await daemon.stop()

    run(loop, main)


@both_loops
def test_a_server_that_stops_reading_pushes_back(loop: str) -> None:
    """A request waits until the connection isn't congested, and is definite when it was never sent."""

    async def main() -> None:
        daemon = Daemon(silent)
        channel = await Channel.open(await daemon.start(), Hello.of_client())
        assert daemon.server is not None
        await until(lambda: daemon.server is not None and daemon.server.connections)
        [accepted] = daemon.server.connections
        accepted.hold()
        requests = []
        while not (channel._connection is not None and channel._connection.congested):
            requests.append(asyncio.ensure_future(channel.request(1, [b"x" * 500_000], timeout_s=20)))
            await asyncio.sleep(0)
        with pytest.raises(ConnectFailed, match="does not read"):
            await channel.request(1, [b"y"], timeout_s=0.1)
        waiting = asyncio.ensure_future(channel.request(2, [b"z"], timeout_s=10))
        await asyncio.sleep(0.05)
        daemon.on_request = echo
        accepted.release()
        assert await waiting == [2, b"z"]
        daemon.on_request = silent
        late = asyncio.ensure_future(channel.request(3, [], timeout_s=10))
        await asyncio.sleep(0)
        channel.abort("I have had enough")
        with pytest.raises(ConnectionLost, match=r"^127.0.0.1:\d+: I have had enough$"):
            await late
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert all(isinstance(result, (list, ConnectionLost)) for result in results)
        await daemon.stop()

    run(loop, main)


def test_an_opening_given_up_at_any_moment_leaves_no_exception_behind() -> None:
    """It used to print "Future exception was never retrieved" when the time was over before the connection stood."""

    async def scenario() -> list[str]:
        complaints: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(str(context["message"])))
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for turn in range(40):
            with contextlib.suppress(RaftKVError):
                await Channel.open(address, Hello.of_client(), timeout_s=turn * 0.00005)
        await asyncio.sleep(0.05)
        gc.collect()
        server.close()
        await asyncio.sleep(0.01)
        gc.collect()
        return complaints

    assert asyncio.run(scenario()) == []
