"""The simulated network: what TCP promises, and what it does not when things break."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest

from raftkv.sim.network import LATENCY_S_MIN, WINDOW_BYTES, NetworkProfile, SimTransport, cut_between
from tests.sim.support import SmallWorld

PORT = 7000


class Peer(asyncio.Protocol):
    """Remembers all that happens to it."""

    def __init__(self) -> None:
        self.data = b""
        self.chunks = 0
        self.lost: list[Exception | None] = []
        self.made = False
        self.eof = False
        self.pauses: list[bool] = []
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made = True
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.chunks += 1

    def eof_received(self) -> bool:
        self.eof = True
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.append(error)

    def pause_writing(self) -> None:
        self.pauses.append(True)

    def resume_writing(self) -> None:
        self.pauses.append(False)


class Pair(SmallWorld):
    """Process `a` dials process `b`; `near` and `far` are the ends."""

    def __init__(self, profile: NetworkProfile | None = None) -> None:
        super().__init__(profile)
        self.near = Peer()
        self.accepted: list[Peer] = []
        self.dial_error: Exception | None = None
        self.launch("b", self._serve)
        self.run(0.01)

    async def _serve(self) -> None:
        await asyncio.get_running_loop().create_server(self._accept, "b", PORT)

    def _accept(self) -> Peer:
        self.accepted.append(Peer())
        return self.accepted[-1]

    @property
    def far(self) -> Peer:
        return self.accepted[-1]

    def connect(self, wait_s: float = 0.1) -> None:
        async def main() -> None:
            try:
                await asyncio.get_running_loop().create_connection(lambda: self.near, "b", PORT)
            except OSError as error:
                self.dial_error = error

        process = self.process("a")
        if process.running:
            assert process.loop is not None
            process.loop.post(lambda: self._tasks.append(process.loop.create_task(main())))  # type: ignore[union-attr]
        else:
            self._tasks: list[Any] = []
            process.launch(main)
        self.run(wait_s)


def test_bytes_arrive_in_order_after_the_latency() -> None:
    pair = Pair(NetworkProfile(jitter_s=0.01, split=0.3))
    pair.connect()
    for number in range(200):
        pair.near.transport.write(b"%d," % number)
    pair.run(LATENCY_S_MIN * 0.9)
    assert pair.far.data == b""
    pair.run(1)
    assert pair.far.data == b"".join(b"%d," % number for number in range(200))
    assert pair.far.transport.get_extra_info("peername")[0] == "a"


def test_close_sends_what_was_written_then_the_end() -> None:
    pair = Pair()
    pair.connect()
    pair.near.transport.write(b"bye")
    pair.near.transport.close()
    pair.run(0.1)
    assert pair.far.data == b"bye"
    assert pair.far.eof
    assert pair.far.lost == [None]
    assert pair.near.lost == [None]
    assert pair.network.connections() == []


def test_nobody_listens() -> None:
    world = Pair()
    world.process("b").kill()
    world.connect()
    assert isinstance(world.dial_error, ConnectionRefusedError)


def test_a_host_without_power_does_not_answer() -> None:
    world = Pair()
    world.process("b").lose_power()
    world.connect(30)
    assert not world.near.made
    world.run(60)
    assert isinstance(world.dial_error, TimeoutError)


def test_dialling_goes_on_until_the_network_is_mended() -> None:
    pair = Pair()
    mend = cut_between(pair.network, ["a"], ["b"])
    pair.connect(2)
    assert pair.accepted == []
    mend()
    pair.run(2)
    assert pair.near.made and pair.far.made


def test_a_cancelled_dial_leaves_nothing_behind() -> None:
    pair = Pair()
    outcome: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(LATENCY_S_MIN * 1.5):
                await loop.create_connection(Peer, "b", PORT)
        except TimeoutError:
            outcome.append("timeout")

    pair.launch("a", main)
    pair.run(1)
    assert outcome == ["timeout"]
    assert pair.network.connections() == []
    assert pair.far.lost != []


def test_a_cut_holds_bytes_back_and_mending_lets_them_through() -> None:
    pair = Pair()
    pair.connect()
    mend = cut_between(pair.network, ["a"], ["b"], one_way=True)
    pair.near.transport.write(b"question")
    pair.far.transport.write(b"hello")
    pair.run(5)
    assert pair.far.data == b""
    assert pair.near.data == b"hello", "the other direction is open"
    mend()
    pair.run(3)
    assert pair.far.data == b"question"
    assert pair.near.lost == [] and pair.far.lost == []


@pytest.mark.parametrize("direction", ["there", "back"])
def test_the_user_timeout_ends_a_connection_whose_bytes_stay_unacknowledged(direction: str) -> None:
    pair = Pair()
    pair.connect()
    sock = pair.near.transport.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 3000)
    ends = (["a"], ["b"]) if direction == "there" else (["b"], ["a"])
    cut_between(pair.network, *ends, one_way=True)
    pair.near.transport.write(b"x")
    pair.run(2.9)
    assert pair.near.lost == []
    pair.run(0.5)
    assert isinstance(pair.near.lost[0], TimeoutError)
    assert pair.near.lost[0].errno == errno.ETIMEDOUT
    assert pair.far.lost == [], "nobody tells the other end"


def test_a_killed_process_tells_its_peers_and_one_without_power_does_not() -> None:
    killed = Pair()
    killed.connect()
    killed.process("b").kill()
    killed.run(0.1)
    assert killed.near.lost == [None]
    dark = Pair()
    dark.connect()
    dark.process("b").lose_power()
    dark.run(10)
    assert dark.near.lost == []
    assert dark.far.lost == [], "nothing runs there"


def test_a_host_that_is_back_resets_old_connections() -> None:
    pair = Pair()
    pair.connect()
    pair.process("b").lose_power()
    pair.near.transport.write(b"are you there?")
    pair.run(1)
    pair.process("b").launch(pair._serve)
    pair.run(5)
    assert isinstance(pair.near.lost[0], ConnectionResetError)
    assert len(pair.accepted) == 1


def test_reset_loses_what_is_under_way_at_both_ends() -> None:
    pair = Pair()
    pair.connect()
    pair.near.transport.write(b"lost")
    pair.network.reset(pair.near.transport)
    pair.run(1)
    assert pair.far.data == b""
    assert isinstance(pair.near.lost[0], ConnectionResetError)
    assert isinstance(pair.far.lost[0], ConnectionResetError)


def test_a_half_open_connection_swallows_everything() -> None:
    pair = Pair()
    pair.connect()
    pair.network.half_open(pair.near.transport)
    pair.near.transport.write(b"x")
    pair.far.transport.write(b"y")
    pair.run(100)
    assert (pair.near.data, pair.far.data, pair.near.lost, pair.far.lost) == (b"", b"", [], [])


def test_a_reader_that_stops_makes_the_writer_stop() -> None:
    pair = Pair()
    pair.connect()
    pair.far.transport.pause_reading()
    transport: SimTransport = pair.near.transport
    transport.set_write_buffer_limits(high=100_000, low=10_000)
    data = bytes(range(256)) * 4000
    for at in range(0, len(data), 10_000):
        transport.write(data[at : at + 10_000])
    pair.run(1)
    assert pair.far.data == b""
    assert pair.near.pauses == [True]
    assert transport.get_write_buffer_size() == len(data) - WINDOW_BYTES
    pair.far.transport.resume_reading()
    pair.run(5)
    assert pair.far.data == data
    assert pair.near.pauses == [True, False]
    assert transport.get_write_buffer_size() == 0


def test_a_paused_process_is_still_connected_to_and_sent_to() -> None:
    pair = Pair()
    pair.process("b").pause()
    pair.connect()
    assert pair.near.made, "its kernel answers"
    pair.near.transport.write(b"hello")
    pair.run(1)
    assert pair.accepted == []
    pair.process("b").resume()
    pair.run(0.1)
    assert pair.far.data == b"hello"


def test_an_address_is_taken_once() -> None:
    pair = Pair()
    errors: list[int | None] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Peer, "c", PORT)
        for host in ("c", "elsewhere"):
            try:
                await loop.create_server(Peer, host, PORT)
            except OSError as error:
                errors.append(error.errno)
        server.close()
        await loop.create_server(Peer, "c", PORT)

    pair.launch("c", main)
    pair.run(0.1)
    assert errors == [errno.EADDRINUSE, errno.EADDRNOTAVAIL]
    assert pair.errors == []


def test_a_clogged_link_is_slow_and_keeps_the_order() -> None:
    pair = Pair()
    pair.connect()
    pair.network.link("a", "b").extra_s = 1.0
    pair.near.transport.write(b"1")
    pair.network.link("a", "b").extra_s = 0.0
    pair.near.transport.write(b"2")
    pair.run(0.9)
    assert pair.far.data == b""
    pair.run(2)
    assert pair.far.data == b"12"
