"""A TCP proxy on loopback that can be told to misbehave: the network between real processes.

Nodes have names. A `Flow` is what travels from one node to another, in either role of a connection, and carries the
faults; connections look at it before each piece they pass on. Whoever dials a public port is known by the port, or by
its hello. The proxy never invents, changes or reorders bytes: a connection whose bytes were lost ends with a reset.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass

from raftkv.protocol.errors import Malformed
from raftkv.protocol.frames import LENGTH, LENGTH_BYTES, decode_body
from raftkv.protocol.limits import HELLO_BYTES_MAX
from raftkv.protocol.messages import KIND_HELLO, decode_hello

CLIENT = "client"
PIECE_BYTES = 64 * 1024
TRICKLE_TURN_S = 0.05
_RST = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close sends RST


class Reset(Exception):
    """The connection is to end with RST; `server_hears`: its server gets what was passed on, then an orderly end."""

    def __init__(self, server_hears: bool = False) -> None:
        super().__init__()
        self.server_hears = server_hears


@dataclass(eq=False)
class Flow:
    """What happens to bytes from `source` to `target`. Change it, then call `Network.changed`.

    `cut`: they wait, as TCP's would for an acknowledgement; what ends the connection waits too. `swallow`: they are
    taken and lost. `refuse`: connections that `source` dials are reset at once. `delay_s`: mean, per piece.
    `bytes_per_s`: 0 is no limit. The `reset_…` are probabilities per piece that a dialler sends: before it is passed
    on, in the middle of it, after it, or when the answer to it arrives.
    """

    source: str
    target: str
    cut: bool = False
    swallow: bool = False
    refuse: bool = False
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    reset_before: float = 0.0
    reset_midway: float = 0.0
    reset_after: float = 0.0
    reset_at_answer: float = 0.0

    def heal(self) -> None:
        """Let everything pass."""
        self.cut = self.swallow = self.refuse = False
        self.delay_s = self.bytes_per_s = 0.0
        self.reset_before = self.reset_midway = self.reset_after = self.reset_at_answer = 0.0


@dataclass(eq=False)
class Relay:
    """One connection through the proxy."""

    source: str
    target: str
    task: asyncio.Task[None]
    server_heard: asyncio.StreamWriter | None = None
    swallowed: bool = False
    doomed: bool = False  # by `reset_at_answer`


class Network:
    """All flows, listeners and connections."""

    def __init__(self, rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._rng = rng
        self._flows: dict[tuple[str, str], Flow] = {}
        self._servers: list[asyncio.Server] = []
        self._relays: dict[Relay, None] = {}
        self._change = asyncio.Event()

    # ---- set up and take down

    async def listen(self, public_port: int, private_port: int, target: str, source: str | None = None) -> None:
        """Pass connections to `public_port` on to `target` at `private_port`; `source` None: its hello says who."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._accept(reader, writer, private_port, target, source)

        self._servers.append(await asyncio.start_server(accept, "127.0.0.1", public_port))

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = [relay.task for relay in self._relays]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- faults

    def flow(self, source: str, target: str) -> Flow:
        flow = self._flows.get((source, target))
        if flow is None:
            flow = self._flows[source, target] = Flow(source, target)
        return flow

    def changed(self) -> None:
        """Flows have changed: whoever waits looks again."""
        self._change.set()
        self._change = asyncio.Event()
        for relay in list(self._relays):
            forward = self.flow(relay.source, relay.target)
            backward = self.flow(relay.target, relay.source)
            if forward.refuse or (relay.swallowed and not forward.swallow and not backward.swallow):
                self._end(relay)

    def cut(self, source: str, target: str) -> None:
        """One way; call `changed` when all are cut."""
        self.flow(source, target).cut = True

    def reset_all(self, source: str, target: str) -> None:
        """RST for every connection that `source` has dialled to `target`."""
        for relay in list(self._relays):
            if (relay.source, relay.target) == (source, target):
                self._end(relay)

    def heal(self) -> None:
        """Let everything pass everywhere."""
        for flow in self._flows.values():
            flow.heal()
        self.changed()

    @property
    def connections(self) -> int:
        return len(self._relays)

    # ---- inside

    def _end(self, relay: Relay) -> None:
        self.counts["reset"] += 1
        relay.task.cancel()  # which resets both sides

    async def _accept(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        port: int,
        target: str,
        source: str | None,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        relay = Relay(source or CLIENT, target, task)
        self._relays[relay] = None
        self.counts["accepted"] += 1
        orderly = server_hears = False
        try:
            hello, dialler = await _first_frame(reader)
            relay.source = source or dialler
            if self.flow(relay.source, target).refuse:
                raise Reset
            orderly = await self._relay(relay, hello, reader, writer, port)
        except Reset as reset:
            self.counts["reset"] += 1
            server_hears = reset.server_hears
        except (OSError, asyncio.IncompleteReadError):
            pass  # one end is gone: so is the other
        except asyncio.CancelledError:
            pass  # by us
        finally:
            del self._relays[relay]
            _close(writer, orderly)
            if relay.server_heard is not None:
                _close(relay.server_heard, orderly or server_hears)

    async def _relay(
        self,
        relay: Relay,
        hello: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        port: int,
    ) -> bool:
        """Whether it ended in order."""
        forward = self.flow(relay.source, relay.target)
        while forward.cut:
            await self._change.wait()
        if forward.swallow:
            relay.swallowed = True
            while await reader.read(PIECE_BYTES):
                self.counts["swallowed"] += 1
            return True
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        relay.server_heard = server_writer
        ways = [
            asyncio.ensure_future(self._pump(relay, forward, reader, server_writer, hello, True)),
            asyncio.ensure_future(
                self._pump(relay, self.flow(relay.target, relay.source), server_reader, writer, b"", False)
            ),
        ]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in done:
                way.result()  # raises what ended it
            return True
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pump(
        self,
        relay: Relay,
        flow: Flow,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        piece: bytes,
        from_dialler: bool,
    ) -> None:
        """Until the end of what `reader` has, or Reset."""
        while True:
            if piece:
                await self._carry(relay, flow, writer, piece, from_dialler)
            piece = await reader.read(PIECE_BYTES)
            if not piece:
                while flow.cut:
                    await self._change.wait()
                return

    async def _carry(
        self, relay: Relay, flow: Flow, writer: asyncio.StreamWriter, piece: bytes, from_dialler: bool
    ) -> None:
        if flow.delay_s:
            self.counts["delayed"] += 1
            await asyncio.sleep(flow.delay_s * self._rng.uniform(0.5, 1.5))
        while flow.cut:
            await self._change.wait()
        if flow.swallow:
            relay.swallowed = True
            self.counts["swallowed"] += 1
            return
        if relay.swallowed or (relay.doomed and not from_dialler):
            raise Reset
        chance = self._rng.random
        if from_dialler and flow.reset_before and chance() < flow.reset_before:
            raise Reset
        if from_dialler and flow.reset_midway and chance() < flow.reset_midway:
            writer.write(piece[: len(piece) // 2])
            raise Reset(server_hears=True)
        relay.doomed = relay.doomed or (from_dialler and chance() < flow.reset_at_answer)
        while flow.bytes_per_s and piece:
            step = max(1, int(flow.bytes_per_s * TRICKLE_TURN_S))
            writer.write(piece[:step])
            piece = piece[step:]
            self.counts["trickled"] += 1
            await asyncio.sleep(TRICKLE_TURN_S)
        writer.write(piece)
        await writer.drain()
        if from_dialler and flow.reset_after and chance() < flow.reset_after:
            raise Reset(server_hears=True)


async def _first_frame(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    """The dialler's hello as it came, and the name of the node that it is from."""
    head = await reader.readexactly(LENGTH_BYTES)
    (length,) = LENGTH.unpack(head)
    if length > HELLO_BYTES_MAX:
        raise Reset
    body = await reader.readexactly(length)
    try:
        array = decode_body(body)
        if array[0] != KIND_HELLO:
            return head + body, CLIENT
        hello = decode_hello(array)
    except Malformed:
        return head + body, CLIENT  # that's for the daemon to say
    return head + body, node_name(hello.role, hello.gid, hello.replica)


def node_name(role: str, gid: int, replica: int) -> str:
    if role == "client":
        return CLIENT
    return f"group{gid}-{replica}" if role == "shardkv" else f"{role}-{replica}"


def _close(writer: asyncio.StreamWriter, orderly: bool) -> None:
    if orderly:
        writer.close()
        return
    sock = writer.get_extra_info("socket")
    try:
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    except OSError:
        pass  # it is closed already
    writer.transport.abort()
