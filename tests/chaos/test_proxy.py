"""The proxy does what it is told: each fault on its own, with plain sockets at both ends."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from raftkv.protocol.messages import Hello, encode_hello
from tests.chaos.cluster import free_port
from tests.chaos.proxy import CLIENT, Network

HELLO = encode_hello(Hello.of_client())
PEER_HELLO = encode_hello(Hello(role="shardkv", gid=3, replica=1, purpose="peer", store_id=b"s" * 16, peers=[0, 1]))
SERVER = "group3-0"
PATIENCE_S = 10.0
SILENCE_S = 0.3

End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo:
    """A server that answers each piece with itself, and remembers what it heard."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65_536):
                self.heard += piece
                writer.write(piece)
            self.ended.append("orderly")
        except ConnectionResetError:
            self.ended.append("reset")
        finally:
            writer.close()


@asynccontextmanager
async def network() -> AsyncIterator[tuple[Network, Echo, int]]:
    """A network with one server behind it; and its public port."""
    echo = Echo()
    public, private = free_port(), free_port()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", private)
    net = Network(random.Random(1))
    await net.listen(public, private, SERVER)
    try:
        yield net, echo, public
    finally:
        server.close()
        await net.close()
        assert net.connections == 0


async def connected(port: int, hello: bytes = HELLO) -> End:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(hello)
    return reader, writer


async def hears(end: End, wanted: bytes) -> None:
    async with asyncio.timeout(PATIENCE_S):
        assert await end[0].readexactly(len(wanted)) == wanted


async def hears_nothing(end: End) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SILENCE_S):
            await end[0].read(1)


async def is_reset(end: End) -> None:
    with pytest.raises(ConnectionResetError):
        async with asyncio.timeout(PATIENCE_S):
            while await end[0].read(65_536):
                pass


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def in_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 60))

    run.__name__ = getattr(test, "__name__", "test")
    run.__doc__ = test.__doc__
    return run


@in_loop
async def test_all_passes_both_ways_and_the_end_too() -> None:
    async with network() as (_, echo, port):
        end = await connected(port)
        end[1].write(b"x" * 300_000)
        await hears(end, HELLO + b"x" * 300_000)
        end[1].close()
        await eventually(lambda: echo.ended == ["orderly"])
        assert echo.heard == HELLO + b"x" * 300_000


@in_loop
async def test_a_cut_holds_bytes_and_the_end_back_until_it_is_healed() -> None:
    async with network() as (net, echo, port):
        end = await connected(port)
        await hears(end, HELLO)
        net.cut(CLIENT, SERVER)
        net.changed()
        end[1].write(b"late")
        late = await connected(port)
        await hears_nothing(end)
        await hears_nothing(late)
        assert echo.heard == HELLO
        net.heal()
        await hears(end, b"late")
        await hears(late, HELLO)


@in_loop
async def test_a_cut_is_one_way() -> None:
    async with network() as (net, echo, port):
        end = await connected(port)
        await hears(end, HELLO)
        net.cut(SERVER, CLIENT)
        net.changed()
        end[1].write(b"heard")
        await eventually(lambda: echo.heard == HELLO + b"heard")
        await hears_nothing(end)
        net.heal()
        await hears(end, b"heard")


@in_loop
async def test_a_peer_is_known_by_its_hello() -> None:
    async with network() as (net, _, port):
        net.cut("group3-1", SERVER)
        net.changed()
        peer, client = await connected(port, PEER_HELLO), await connected(port)
        await hears(client, HELLO)
        await hears_nothing(peer)
        net.heal()
        await hears(peer, PEER_HELLO)


@in_loop
async def test_refused_connections_are_reset_and_old_ones_too() -> None:
    async with network() as (net, echo, port):
        old = await connected(port)
        await hears(old, HELLO)
        net.flow(CLIENT, SERVER).refuse = True
        net.changed()
        await is_reset(old)
        await is_reset(await connected(port))
        assert echo.heard == HELLO
        net.heal()
        await hears(await connected(port), HELLO)


@in_loop
async def test_half_open_swallows_and_ends_with_a_reset() -> None:
    async with network() as (net, echo, port):
        old = await connected(port)
        await hears(old, HELLO)
        net.flow(CLIENT, SERVER).swallow = True
        net.changed()
        new = await connected(port)
        old[1].write(b"lost")
        await hears_nothing(old)
        await hears_nothing(new)
        net.heal()
        await is_reset(old)
        await is_reset(new)
        assert echo.heard == HELLO


@in_loop
async def test_a_reset_before_a_piece_is_passed_on() -> None:
    async with network() as (net, echo, port):
        end = await connected(port)
        await hears(end, HELLO)
        net.flow(CLIENT, SERVER).reset_before = 1.0
        end[1].write(b"request")
        await is_reset(end)
        await eventually(lambda: bool(echo.ended))
        assert echo.heard == HELLO


@in_loop
async def test_a_reset_in_the_middle_of_a_piece() -> None:
    async with network() as (net, echo, port):
        end = await connected(port)
        await hears(end, HELLO)
        net.flow(CLIENT, SERVER).reset_midway = 1.0
        end[1].write(b"request!")
        await is_reset(end)
        await eventually(lambda: bool(echo.ended))
        assert echo.heard == HELLO + b"requ"


@in_loop
async def test_a_reset_after_a_piece_was_passed_on() -> None:
    async with network() as (net, echo, port):
        end = await connected(port)
        await hears(end, HELLO)
        net.flow(CLIENT, SERVER).reset_after = 1.0
        end[1].write(b"request")
        await is_reset(end)
        await eventually(lambda: bool(echo.ended))
        assert echo.heard == HELLO + b"request"


@in_loop
async def test_a_reset_when_the_answer_comes() -> None:
    async with network() as (net, echo, port):
        end = await connected(port)
        await hears(end, HELLO)
        net.flow(CLIENT, SERVER).reset_at_answer = 1.0
        end[1].write(b"request")
        await is_reset(end)
        assert echo.heard == HELLO + b"request"


@in_loop
async def test_delay_and_trickle_take_their_time_and_lose_nothing() -> None:
    async with network() as (net, _, port):
        end = await connected(port)
        await hears(end, HELLO)
        net.flow(CLIENT, SERVER).delay_s = 0.4
        start_s = time.monotonic()
        end[1].write(b"slow")
        await hears(end, b"slow")
        assert time.monotonic() - start_s >= 0.2
        net.heal()
        net.flow(SERVER, CLIENT).bytes_per_s = 1_000
        end[1].write(b"y" * 400)
        start_s = time.monotonic()
        await hears(end, b"y" * 400)
        assert time.monotonic() - start_s >= 0.3


@in_loop
async def test_a_server_that_is_down_is_a_reset() -> None:
    async with network() as (net, _, _port):
        public = free_port()
        await net.listen(public, free_port(), "group3-2")
        await is_reset(await connected(public))


@in_loop
async def test_a_server_that_resets_is_a_reset_for_the_dialler() -> None:
    async with network() as (net, echo, port):
        end = await connected(port)
        await hears(end, HELLO)
        net.reset_all(CLIENT, SERVER)
        await is_reset(end)
        await eventually(lambda: bool(echo.ended))
        assert echo.ended == ["reset"]
