"""Links between Raft peers: dialling until it works, up and down, refusals, dropping rather than growing."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any

import pytest

from raftkv.protocol import peer_link
from raftkv.protocol.connection import Connection, Server
from raftkv.protocol.errors import BadVersion, Malformed, RaftKVError, ReplicaMustBeReplaced, WrongPeer
from raftkv.protocol.frames import encode_frame
from raftkv.protocol.limits import PEER_UNACKED_TIMEOUT_MS
from raftkv.protocol.messages import (
    Hello,
    decode_hello,
    decode_raft,
    encode_hello_reply,
    encode_raft,
    encode_refused,
)
from raftkv.protocol.peer_link import PeerLink
from raftkv.raft.messages import Message, TimeoutNow
from tests.protocol.loops import both_loops, run, until

PEER_HELLO = Hello(role="controller", replica=1, purpose="peer")


class Peer:
    """A replica that listens; `refusal` is its answer to hello, if any."""

    def __init__(self) -> None:
        self.hellos: list[Hello] = []
        self.messages: list[Message] = []
        self.connections: list[Connection] = []
        self.refusal: RaftKVError | None = None
        self.reply = encode_hello_reply(PEER_HELLO)
        self.port = 0
        self.server: Server | None = None

    async def start(self) -> None:
        self.server = await Server.listen("127.0.0.1", self.port, self._on_connection)
        self.port = self.server.port

    async def stop(self) -> None:
        assert self.server is not None
        self.server.abort()
        await until(lambda: self.server is not None and not self.server.connections)

    def _on_connection(self, connection: Connection) -> None:
        self.connections.append(connection)
        connection.on_frame = self._on_frame
        connection.on_lost = lambda connection, error: None

    def _on_frame(self, connection: Connection, frame: list[Any]) -> None:
        if frame[0] == 1:
            self.hellos.append(decode_hello(frame))
            if self.refusal is not None:
                raise self.refusal
            connection.send(self.reply)
        else:
            self.messages.append(decode_raft(frame))


class Owner:
    """Has the link; keeps what it reports."""

    def __init__(self, port: int, **options: Any) -> None:
        self.events: list[str] = []
        self.refusals: list[RaftKVError] = []
        self.objection: RaftKVError | None = None
        self.replica = 2
        self.link = PeerLink(
            f"127.0.0.1:{port}",
            lambda: Hello(role="controller", replica=self.replica, purpose="peer"),
            rng=random.Random(1),
            on_up=self._on_up,
            on_down=lambda: self.events.append("down"),
            on_refused=self.refusals.append,
            **options,
        )

    def _on_up(self, reply: Hello) -> None:
        if self.objection is not None:
            raise self.objection
        assert reply.replica == 1
        self.events.append("up")

    async def close(self) -> None:
        self.link.close()
        await asyncio.sleep(0.01)


@both_loops
def test_messages_arrive_in_order(loop: str) -> None:
    async def main() -> None:
        peer = Peer()
        await peer.start()
        owner = Owner(peer.port)
        assert not owner.link.send(b"dropped: it is down")
        owner.link.start()
        await until(lambda: owner.events == ["up"])
        for term in range(50):
            assert owner.link.send(encode_raft(TimeoutNow(term, 2)))
        await until(lambda: len(peer.messages) == 50)
        assert peer.messages == [TimeoutNow(term, 2) for term in range(50)]
        assert peer.hellos[0].purpose == "peer"
        assert owner.link.dropped == 1
        assert owner.link._connection is not None
        assert owner.link._connection._transport is not None
        sock = owner.link._connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == PEER_UNACKED_TIMEOUT_MS
        await owner.close()
        assert owner.events == ["up"]  # closing is not reported
        await peer.stop()

    run(loop, main)


@both_loops
def test_it_comes_up_when_the_peer_does_and_again_after_a_crash(loop: str) -> None:
    async def main() -> None:
        peer = Peer()
        await peer.start()
        await peer.stop()
        owner = Owner(peer.port)
        owner.link.start()
        await asyncio.sleep(0.15)
        assert owner.events == []
        await peer.start()
        await until(lambda: owner.link.up)
        await peer.stop()
        await until(lambda: owner.events == ["up", "down"])
        assert not owner.link.send(b"x")
        await peer.start()
        await until(lambda: owner.events == ["up", "down", "up"])
        await owner.close()
        await peer.stop()

    run(loop, main)


@both_loops
def test_it_dials_at_once_when_the_peer_gives_a_sign_of_life(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_link, "BACKOFF_S_MIN", 600.0)

    async def main() -> None:
        peer = Peer()
        await peer.start()
        await peer.stop()
        owner = Owner(peer.port)
        owner.link.hurry()  # nothing to hurry yet
        owner.link.start()
        await until(lambda: owner.link._pause is not None)
        await peer.start()
        assert not owner.link.up
        owner.link.hurry()
        owner.link.hurry()
        await until(lambda: owner.link.up)
        owner.link.hurry()
        assert len(peer.hellos) == 1
        await owner.close()
        await peer.stop()

    run(loop, main)


@both_loops
def test_reconnect_says_hello_anew(loop: str) -> None:
    async def main() -> None:
        peer = Peer()
        await peer.start()
        owner = Owner(peer.port)
        owner.link.start()
        owner.link.reconnect()  # before it is up
        await until(lambda: owner.link.up)
        owner.link.send(encode_raft(TimeoutNow(1, 2)))
        owner.replica = 3
        owner.link.reconnect()
        await until(lambda: peer.hellos[-1].replica == 3 and owner.link.up)
        assert peer.messages == [TimeoutNow(1, 2)]  # what was queued has left
        assert owner.events == ["up", "down", "up"]
        await owner.close()
        await peer.stop()

    run(loop, main)


@both_loops
def test_refusals(loop: str) -> None:
    async def main() -> None:
        peer = Peer()
        peer.refusal = WrongPeer("not you")
        await peer.start()
        owner = Owner(peer.port)
        owner.link.start()
        await until(lambda: owner.refusals)
        assert isinstance(owner.refusals[0], WrongPeer)
        assert owner.events == []
        peer.refusal = None
        await until(lambda: owner.link.up)  # it is tried again
        peer.connections[-1].send(encode_refused(ReplicaMustBeReplaced("wiped")))
        await until(lambda: len(owner.refusals) == 2)
        assert isinstance(owner.refusals[1], ReplicaMustBeReplaced)
        assert owner.events == ["up", "down"]
        await owner.close()
        await peer.stop()

    run(loop, main)


@both_loops
def test_another_version_and_chatter_are_refused(loop: str) -> None:
    async def main() -> None:
        peer = Peer()
        peer.reply = encode_frame([2, 99])
        await peer.start()
        owner = Owner(peer.port)
        owner.link.start()
        await until(lambda: owner.refusals)
        assert isinstance(owner.refusals[0], BadVersion)
        peer.reply = encode_hello_reply(PEER_HELLO) + encode_raft(TimeoutNow(1, 1))
        await until(lambda: isinstance(owner.refusals[-1], Malformed))
        assert owner.events == []
        await owner.close()
        await peer.stop()

    run(loop, main)


@both_loops
def test_the_owner_may_object(loop: str) -> None:
    async def main() -> None:
        peer = Peer()
        await peer.start()
        owner = Owner(peer.port)
        owner.objection = WrongPeer("I meant another one")
        owner.link.start()
        await until(lambda: owner.refusals)
        assert owner.refusals == [owner.objection]
        assert not owner.link.up
        await owner.close()
        await peer.stop()

    run(loop, main)


@both_loops
def test_it_drops_rather_than_grow(loop: str) -> None:
    async def main() -> None:
        peer = Peer()
        await peer.start()
        owner = Owner(peer.port, queue_bytes_max=1_000_000)
        owner.link.start()
        await until(lambda: owner.link.up)
        peer.connections[0].hold()
        frame = encode_raft(TimeoutNow(1, 2)) * 10_000
        for _ in range(1000):
            owner.link.send(frame)
            assert owner.link.out_bytes <= 1_000_000
            await asyncio.sleep(0)
        assert owner.link.dropped > 0
        await owner.close()
        await peer.stop()

    run(loop, main)


@both_loops
def test_close_at_any_moment_leaves_nothing(loop: str) -> None:
    async def main() -> None:
        peer = Peer()
        await peer.start()
        for turns in range(12):
            owner = Owner(peer.port)
            owner.link.start()
            for _ in range(turns):
                await asyncio.sleep(0)
            await owner.close()
            assert "down" not in owner.events
        never_started = Owner(peer.port)
        await never_started.close()
        await peer.stop()

    run(loop, main)
