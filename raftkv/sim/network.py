"""The simulated network: TCP as far as a process can tell, between hosts that are named, not resolved.

A connection is two one-way pipes. What a process writes leaves in order, is delayed by the link's latency, is held
back while the link is cut (TCP sends it again and again) and arrives some time after it is mended, unless
the sender's user timeout cuts the connection before. The kernel of a paused process goes on accepting and
receiving; that of a killed process tells its peers; a machine without power tells nobody, and answers what
reaches it after its return with a reset.

Links are directed, so that a partition may be one-way. Nothing arrives sooner than after half a millisecond: with
no latency, virtual time would stand still under a closed loop of clients.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raftkv.sim.scheduler import Scheduler

if TYPE_CHECKING:
    from raftkv.sim.loop import SimLoop

LATENCY_S_MIN = 0.0005
WINDOW_BYTES = 256 * 1024
"""Sent and not yet read by the receiving process: beyond it, bytes stay with the sender."""
SYN_AGAIN_S = (1.0, 3.0, 7.0, 15.0, 31.0)
"""When TCP tries again to connect, after the first attempt."""
CONNECT_TIMEOUT_S = 63.0
RETRANSMIT_S_MAX = 2.0
"""TCP's back-off doubles: what a cut held back arrives up to as long after its end as it lasted, at most this."""


@dataclass
class NetworkProfile:
    """What the network is like without faults. Delays in seconds; probabilities per segment."""

    latency_s: float = LATENCY_S_MIN
    jitter_s: float = 0.0005
    """Mean of the exponential part."""
    loss: float = 0.0
    """Of being lost, and sent again after a retransmission timeout."""
    split: float = 0.02
    """Of arriving in two parts."""


class Link:
    """One direction between two hosts."""

    __slots__ = ("blocked", "blocked_since", "extra_s", "held", "loss")

    def __init__(self) -> None:
        self.blocked = 0
        """How many faults cut it."""
        self.blocked_since = 0.0
        self.extra_s = 0.0
        """Clogged: that much slower, and up to twice."""
        self.loss = 0.0
        self.held: dict[Pipe, None] = {}


class Listener:
    """A listening socket; also what asyncio calls a server."""

    def __init__(self, interface: Interface, factory: Callable[[], Any], host: str, port: int) -> None:
        self.interface = interface
        self.factory = factory
        self.address = (host, port)
        self.sockets = [self]

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def close(self) -> None:
        self.interface.close_listener(self)

    def is_serving(self) -> bool:
        return self.interface.listeners.get(self.address[1]) is self


class _Socket:
    """What a transport shows of its socket: it takes options."""

    def __init__(self, transport: SimTransport) -> None:
        self._transport = transport

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if level == socket.IPPROTO_TCP and option == getattr(socket, "TCP_USER_TIMEOUT", None):
            self._transport.user_timeout_s = value / 1000


class Pipe:
    """One direction of one connection. A segment is bytes, or None for the end of the stream.

    `held` are the segments that a cut keeps from arriving.
    """

    __slots__ = (
        "arrives_at",
        "back_link",
        "held",
        "held_since",
        "lost",
        "number",
        "receiver",
        "sender",
        "sender_link",
        "unread_bytes",
        "watched",
    )

    def __init__(self, number: int, sender: SimTransport, receiver: SimTransport, link: Link, back: Link) -> None:
        self.number = number
        self.sender = sender
        self.receiver = receiver
        self.sender_link = link
        self.back_link = back
        self.arrives_at = 0.0
        self.unread_bytes = 0
        self.held: deque[bytes | None] = deque()
        self.held_since = 0.0
        self.lost = False
        """A half-open connection: nothing arrives any more, and nobody is told."""
        self.watched = False


class SimTransport(asyncio.Transport):
    """One end of a connection, that of one incarnation of a process."""

    def __init__(self, network: Network, loop: SimLoop, interface: Interface, peer: tuple[str, int]) -> None:
        super().__init__()
        self.network = network
        self.loop = loop
        self.interface = interface
        self.peer = peer
        self.protocol: Any = None
        self.out: Pipe
        self.into: Pipe
        self.gone = False
        """The kernel has no such connection any more."""
        self.user_timeout_s: float | None = None
        self._buffer: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._closing = False
        self._finished = False
        self._reading = True
        self._inbox: deque[bytes | None] = deque()
        self._high_bytes = 64 * 1024
        self._low_bytes = 16 * 1024
        self._writing_paused = False

    # ---- what the process calls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self.peer
        if name == "socket":
            return _Socket(self)
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = 64 * 1024 if high is None else high
        self._low_bytes = self._high_bytes // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._buffered_bytes

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self.protocol
        return protocol

    def is_closing(self) -> bool:
        return self._closing or self.gone

    def is_reading(self) -> bool:
        return self._reading

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.gone or self._closing or not data:
            return
        if self._buffer or self.out.unread_bytes + len(data) > WINDOW_BYTES:
            self._buffer.append(bytes(data))
            self._buffered_bytes += len(data)
            self._send_buffered()
            if self._buffered_bytes > self._high_bytes and not self._writing_paused:
                self._writing_paused = True
                self.network.on_event("connection congested")
                self.protocol.pause_writing()
        else:
            self.network.send(self.out, bytes(data))

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            if self._inbox and not self.gone:
                self.loop.call_soon(self._read_inbox)

    def close(self) -> None:
        if self.gone or self._closing:
            return
        self._closing = True
        if not self._buffer:
            self._finish(None)

    def abort(self) -> None:
        if self.gone or self._finished:
            return
        self._closing = True
        unsent = bool(self._buffer) or bool(self._inbox)
        self._drop_buffer()
        self._finish(None, reset=unsent)

    # ---- what the kernel does

    def _finish(self, error: Exception | None, *, reset: bool = False) -> None:
        """The process has let go of its end: tell the other one, and the protocol."""
        if self._finished:
            return
        self._finished = True
        self.gone = True
        if reset:
            self.network.send_reset(self.out)
        else:
            self.network.send(self.out, None)
        self.interface.transports.pop(self, None)
        self.loop.call_soon(self.protocol.connection_lost, error)

    def broken(self, error: OSError) -> None:
        """A reset, or a timeout of the kernel's: the connection ends here and now."""
        if self.gone:
            return
        self.gone = self._closing = self._finished = True
        self._drop_buffer()
        self._inbox.clear()
        self.interface.transports.pop(self, None)
        if self.protocol is not None:
            self.loop.post(self.protocol.connection_lost, error)

    def received(self, data: bytes | None) -> None:
        """By the kernel, for the process."""
        self._inbox.append(data)
        if len(self._inbox) == 1 and self._reading:
            self.loop.post(self._read_inbox)

    def _read_inbox(self) -> None:
        inbox = self._inbox
        if self.protocol is None:
            return  # `connect` will see to it
        while inbox and self._reading and not self._closing:
            data = inbox.popleft()
            if data is None:
                if not self.protocol.eof_received():
                    self.close()
            else:
                self.into.unread_bytes -= len(data)
                self.network.read(self.into)
                self.protocol.data_received(data)

    def window_opened(self) -> None:
        """The other end has read something."""
        if self._buffer and not self.gone:
            self._send_buffered()
            if self._writing_paused and self._buffered_bytes <= self._low_bytes:
                self._writing_paused = False
                self.loop.post(self._resume_writing)
            if self._closing and not self._buffer:
                self.loop.post(self._finish, None)

    def _resume_writing(self) -> None:
        if not self.gone and not self._writing_paused:
            self.protocol.resume_writing()

    def _send_buffered(self) -> None:
        buffer = self._buffer
        while buffer:
            room_bytes = WINDOW_BYTES - self.out.unread_bytes
            if room_bytes <= 0:
                return
            data = buffer.popleft()
            if len(data) > room_bytes:
                buffer.appendleft(data[room_bytes:])
                data = data[:room_bytes]
            self._buffered_bytes -= len(data)
            self.network.send(self.out, data)

    def _drop_buffer(self) -> None:
        self._buffer.clear()
        self._buffered_bytes = 0


class Interface:
    """A host's end of the network, for one incarnation of its process."""

    def __init__(self, network: Network, host: str) -> None:
        self.network = network
        self.host = host
        self.listeners: dict[int, Listener] = {}
        self.transports: dict[SimTransport, None] = {}
        self.loop: SimLoop
        self.on = True
        network.interfaces[host] = self

    def listen(self, factory: Callable[[], Any], host: str, port: int) -> Listener:
        if host != self.host:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        if port in self.listeners:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        listener = self.listeners[port] = Listener(self, factory, host, port)
        return listener

    def close_listener(self, listener: Listener) -> None:
        if listener.is_serving():
            del self.listeners[listener.address[1]]

    async def connect(self, factory: Callable[[], Any], host: str, port: int) -> tuple[SimTransport, Any]:
        """As `loop.create_connection`."""
        connected: asyncio.Future[SimTransport] = self.loop.create_future()
        self.network.dial(self, host, port, connected)
        try:
            transport = await connected
        except asyncio.CancelledError:
            if connected.done() and not connected.cancelled() and connected.exception() is None:
                self.network.drop_unused(connected.result())
            raise
        if transport.gone:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        protocol = factory()
        transport.protocol = protocol
        protocol.connection_made(transport)
        if transport._inbox:
            self.loop.call_soon(transport._read_inbox)
        return transport, protocol

    def process_ended(self, *, silently: bool) -> None:
        """The process was killed, and the kernel says so; or `silently`: the machine lost its power."""
        self.listeners.clear()
        transports, self.transports = self.transports, {}
        for transport in transports:
            transport.gone = True
            transport._closing = transport._finished = True
            if silently:
                continue
            if transport._inbox:
                self.network.send_reset(transport.out)
            else:
                self.network.send(transport.out, None)
        if silently:
            self.on = False


class Network:
    """All hosts and the links between them."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, profile: NetworkProfile) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.profile = profile
        self.interfaces: dict[str, Interface] = {}
        self.on_event: Callable[[str], None] = lambda event: None
        """Told of rare events, by name: for probes."""
        self.segments = 0
        self._links: dict[tuple[str, str], Link] = {}
        self._pipes = 0
        self._ephemeral_port = 32768

    def link(self, source: str, target: str) -> Link:
        link = self._links.get((source, target))
        if link is None:
            link = self._links[source, target] = Link()
        return link

    # ---- faults

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from `source` to `target`, until as many `mend`s."""
        link = self.link(source, target)
        if link.blocked == 0:
            link.blocked_since = self.scheduler.now
        link.blocked += 1

    def mend(self, source: str, target: str) -> None:
        link = self.link(source, target)
        assert link.blocked > 0
        link.blocked -= 1
        if link.blocked == 0:
            held, link.held = link.held, {}
            for pipe in held:
                self._release(pipe)

    def mend_all(self) -> None:
        for (source, target), link in self._links.items():
            link.extra_s = link.loss = 0.0
            while link.blocked:
                self.mend(source, target)

    def connections(self) -> list[SimTransport]:
        """Both ends of every open connection, in order."""
        return [transport for host in sorted(self.interfaces) for transport in self.interfaces[host].transports]

    def reset(self, transport: SimTransport) -> None:
        """Break a connection at both ends; what is under way is lost."""
        for end in (transport, transport.out.receiver):
            end.out.lost = True
            if end.interface.on:
                end.broken(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))

    def half_open(self, transport: SimTransport) -> None:
        """Nothing gets through any more in either direction, and nobody hears why."""
        transport.out.lost = transport.into.lost = True
        for pipe in (transport.out, transport.into):
            if not pipe.held:
                pipe.held_since = self.scheduler.now

    # ---- connecting

    def dial(self, interface: Interface, host: str, port: int, connected: asyncio.Future[SimTransport]) -> None:
        self._syn(interface, host, port, connected, 0, self.scheduler.now)

    def _syn(
        self,
        interface: Interface,
        host: str,
        port: int,
        connected: asyncio.Future[SimTransport],
        attempt: int,
        begun: float,
    ) -> None:
        """One attempt to connect: it needs both directions, and a machine that is on."""
        if connected.done() or not interface.loop.alive:
            return
        there, back = self.link(interface.host, host), self.link(host, interface.host)
        target = self.interfaces.get(host)
        lossy = self.profile.loss + there.loss + back.loss
        lost = bool(lossy) and self.rng.random() < lossy
        if there.blocked or back.blocked or target is None or not target.on or lost:
            if attempt < len(SYN_AGAIN_S):
                again = begun + SYN_AGAIN_S[attempt]
                self.scheduler.at(again, self._syn, interface, host, port, connected, attempt + 1, begun)
            else:
                timeout = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                self.scheduler.at(begun + CONNECT_TIMEOUT_S, self._fail, interface, connected, timeout)
            return
        arrival = self.scheduler.now + self._latency_s(there)
        self.scheduler.at(arrival, self._syn_arrives, interface, host, port, connected, back)

    def _syn_arrives(
        self, interface: Interface, host: str, port: int, connected: asyncio.Future[SimTransport], back: Link
    ) -> None:
        target = self.interfaces[host]
        if not target.on or not interface.loop.alive:
            return
        answered_at = self.scheduler.now + self._latency_s(back)
        listener = target.listeners.get(port)
        if listener is None:
            refused = ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            self.scheduler.at(answered_at, self._fail, interface, connected, refused)
            return
        self._ephemeral_port = 32768 + (self._ephemeral_port + 1 - 32768) % 28000
        near = SimTransport(self, interface.loop, interface, (target.host, port))
        far = SimTransport(self, target.loop, target, (interface.host, self._ephemeral_port))
        there = self.link(interface.host, target.host)
        self._pipes += 2
        near.out = far.into = Pipe(self._pipes, near, far, there, back)
        near.into = far.out = Pipe(self._pipes + 1, far, near, back, there)
        self.scheduler.note(b"connect %d" % self._pipes)
        interface.transports[near] = None
        target.transports[far] = None
        target.loop.post(self._accepted, far, listener)
        self.scheduler.at(answered_at, self._connected, near, connected)

    @staticmethod
    def _accepted(transport: SimTransport, listener: Listener) -> None:
        if transport.gone:
            return
        if not listener.is_serving():
            transport.protocol = asyncio.Protocol()
            transport.abort()
            return
        transport.protocol = protocol = listener.factory()
        protocol.connection_made(transport)
        if transport._inbox:
            transport.loop.call_soon(transport._read_inbox)

    def _connected(self, transport: SimTransport, connected: asyncio.Future[SimTransport]) -> None:
        if not transport.loop.alive:
            return
        if connected.done():
            self.drop_unused(transport)
        else:
            transport.loop.post(_settle, connected, transport, None)

    def drop_unused(self, transport: SimTransport) -> None:
        """Nobody waits for the connection any more."""
        if transport.protocol is None:
            transport.protocol = asyncio.Protocol()
        transport.abort()

    def _fail(self, interface: Interface, connected: asyncio.Future[SimTransport], error: OSError) -> None:
        if interface.loop.alive and not connected.done():
            interface.loop.post(_settle, connected, None, error)

    # ---- segments

    def send(self, pipe: Pipe, data: bytes | None) -> None:
        """A segment, or the end of the stream, on its way."""
        if data is not None:
            pipe.unread_bytes += len(data)
            if len(data) > 1 and self.rng.random() < self.profile.split:
                at = self.rng.randrange(1, len(data))
                self._transmit(pipe, data[:at])
                data = data[at:]
        self._transmit(pipe, data)

    def _transmit(self, pipe: Pipe, data: bytes | None) -> None:
        arrival = self.scheduler.now + self._latency_s(pipe.sender_link)
        if arrival < pipe.arrives_at:
            arrival = pipe.arrives_at
        pipe.arrives_at = arrival
        self.scheduler.at(arrival, self._arrive, pipe, data)

    def _latency_s(self, link: Link) -> float:
        profile = self.profile
        rng = self.rng
        delay_s = profile.latency_s + (rng.expovariate(1 / profile.jitter_s) if profile.jitter_s else 0.0)
        if link.extra_s:
            delay_s += link.extra_s * (1 + rng.random())
        loss = profile.loss + link.loss
        if loss and rng.random() < loss:
            delay_s += rng.choice((0.2, 0.2, 0.6))
        return delay_s

    def _arrive(self, pipe: Pipe, data: bytes | None) -> None:
        receiver = pipe.receiver
        link = pipe.sender_link
        if pipe.held or link.blocked or pipe.lost or not self.interfaces[receiver.interface.host].on:
            self._hold(pipe, data)
            return
        self.segments += 1
        self.scheduler.note(b"%d %d" % (pipe.number, zlib.crc32(data) if data is not None else -1))
        if receiver.gone:
            if data is not None and not pipe.sender.gone:
                self.send_reset(receiver.out)  # nobody is there to take it
            return
        if pipe.back_link.blocked:
            self._watch(pipe)  # it arrives, but the sender can't hear so
        receiver.received(data)

    def _hold(self, pipe: Pipe, data: bytes | None) -> None:
        if not pipe.held:
            pipe.held_since = self.scheduler.now
        pipe.held.append(data)
        if pipe.sender_link.blocked and not pipe.lost:
            pipe.sender_link.held[pipe] = None
        elif not pipe.lost and not pipe.sender.gone:  # the machine is off
            self.scheduler.after(SYN_AGAIN_S[0], self._release, pipe)
        self._watch(pipe)

    def _watch(self, pipe: Pipe) -> None:
        """Whether the sender's kernel gives up: what it sent stays unacknowledged."""
        timeout_s = pipe.sender.user_timeout_s
        if timeout_s is not None and not pipe.watched:
            pipe.watched = True
            self.scheduler.after(timeout_s, self._give_up, pipe, self.scheduler.now)

    def _give_up(self, pipe: Pipe, since: float) -> None:
        pipe.watched = False
        if pipe.sender.gone or not pipe.sender.loop.alive:
            return
        unheard = pipe.back_link.blocked > 0 and pipe.back_link.blocked_since <= since
        if unheard or (pipe.held and pipe.held_since <= since):
            self.on_event("user timeout")
            pipe.sender.broken(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
            pipe.lost = True
        elif pipe.held or pipe.back_link.blocked:
            self._watch(pipe)

    def _release(self, pipe: Pipe) -> None:
        """The link is mended: what was held back is sent again, when TCP next tries."""
        if pipe.held and not pipe.lost:
            lasted_s = min(self.scheduler.now - pipe.held_since, RETRANSMIT_S_MAX)
            self.scheduler.after(self._latency_s(pipe.sender_link) + self.rng.random() * lasted_s, self._resend, pipe)

    def _resend(self, pipe: Pipe) -> None:
        if not pipe.held or pipe.lost:
            return
        if pipe.sender_link.blocked:
            pipe.sender_link.held[pipe] = None
            return
        if not self.interfaces[pipe.receiver.interface.host].on:
            self.scheduler.after(SYN_AGAIN_S[0], self._release, pipe)
            return
        held, pipe.held = pipe.held, deque()
        for data in held:
            self._arrive(pipe, data)

    def send_reset(self, pipe: Pipe) -> None:
        """Overtakes nothing, but what was sent before it may be lost with it."""
        self.scheduler.after(self._latency_s(pipe.sender_link), self._reset_arrives, pipe)

    def _reset_arrives(self, pipe: Pipe) -> None:
        if pipe.sender_link.blocked or pipe.lost or pipe.receiver.gone:
            return  # lost: the other end hears of it when it sends something
        self.scheduler.note(b"%d reset" % pipe.number)
        pipe.receiver.broken(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))

    def read(self, pipe: Pipe) -> None:
        """The receiving process has read from it."""
        sender = pipe.sender
        if sender._buffer:
            self.scheduler.after(self._latency_s(pipe.back_link), sender.window_opened)


def cut_between(
    network: Network, left: Iterable[str], right: Iterable[str], *, one_way: bool = False
) -> Callable[[], None]:
    """Cut all links from left to right, and back unless `one_way`; what undoes it."""
    pairs = [(a, b) for a in left for b in right if a != b]
    if not one_way:
        pairs += [(b, a) for a, b in pairs]
    for a, b in pairs:
        network.cut(a, b)

    def mend() -> None:
        for a, b in pairs:
            if network.link(a, b).blocked:
                network.mend(a, b)

    return mend


def _settle(connected: asyncio.Future[SimTransport], transport: SimTransport | None, error: OSError | None) -> None:
    if connected.done():
        if transport is not None:
            transport.network.drop_unused(transport)
    elif error is not None:
        connected.set_exception(error)
    else:
        assert transport is not None
        connected.set_result(transport)
