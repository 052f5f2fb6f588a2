"""What a daemon does with connections: handshake, then a peer's messages or a client's requests.

The role (controller, shardkv) brings a table of verbs. A request is answered through `Session`, once, in
any order, now or later; answers to a connection that is gone are dropped. A frame that can't be
understood costs its sender the connection, never the daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from raftkv.daemons.peers import Peers
from raftkv.protocol.connection import Connection
from raftkv.protocol.errors import BadRequest, BadVersion, Malformed, RaftKVError, WrongCluster, WrongPeer
from raftkv.protocol.limits import HELLO_TIMEOUT_S
from raftkv.protocol.messages import (
    PROTOCOL_VERSION,
    Hello,
    decode_hello,
    decode_request,
    encode_error_reply,
    encode_hello_reply,
    encode_reply,
)

log = logging.getLogger(__name__)

SAY_AGAIN_S = 600.0
"""The log says once in this time that somebody is refused for the same reason."""
SAID_MAX = 1_000

Verb = Callable[["Session", int, list[Any]], None]
"""Called as verb(session, request_id, body); a RaftKVError that it raises is the answer."""


class Session:
    """One admitted connection of a client.

    Large answers are made only when the connection can take them: a client that asks for much and reads
    little makes the daemon keep its questions, which are small, and no answers.
    """

    __slots__ = ("_backlog", "connection")

    begin: Callable[[int, int], None] | None = None
    """Called with id and verb of each request that comes in, where requests are measured."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._backlog: deque[tuple[Callable[[Any], None], Any]] = deque()
        connection.on_drained = self._work_off

    @property
    def closed(self) -> bool:
        return self.connection.closing

    def when_writable(self, answer: Callable[[Any], None], token: Any) -> None:
        """`answer(token)` now, or in its turn when the client has read more of what it got."""
        if self._backlog or self.connection.congested:
            self._backlog.append((answer, token))
            self.connection.hold()
        else:
            answer(token)

    def reply(self, request_id: int, body: Any) -> None:
        self.connection.send(encode_reply(request_id, body))

    def refuse(self, request_id: int, error: RaftKVError) -> None:
        code, fields = error.to_wire()
        self.connection.send(encode_error_reply(request_id, code, fields))

    def deliver(self, request_id: int, result: Any) -> None:
        """A command's result array ([0, …] or [error code, …]), or an error that came before the log."""
        if isinstance(result, RaftKVError):
            self.refuse(request_id, result)
        elif result[0] == 0:
            self.connection.send(encode_reply(request_id, result))
        else:
            self.connection.send(encode_error_reply(request_id, result[0], result[1:]))

    def _work_off(self) -> None:
        backlog = self._backlog
        if not backlog:
            return
        while backlog and not self.connection.congested:
            answer, token = backlog.popleft()
            answer(token)
        if not backlog:
            self.connection.release()


class Service:
    """All connections of one daemon: gives each new one its handlers."""

    def __init__(
        self,
        peers: Peers,
        verbs: Mapping[int, Verb],
        name: str,
        make_session: Callable[[Connection], Session] = Session,
    ) -> None:
        self._make_session = make_session
        self._peers = peers
        self._verbs = verbs
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._handshakes: dict[Connection, asyncio.TimerHandle] = {}
        self._said_s: dict[tuple[str, str], float] = {}

    def accept(self, connection: Connection) -> None:
        """A stranger has connected: it must say hello first, and soon."""
        connection.on_frame = self._handshake
        connection.on_lost = self._stranger_lost
        self._handshakes[connection] = self._loop.call_later(HELLO_TIMEOUT_S, self._too_late, connection)

    def close(self) -> None:
        for timer in self._handshakes.values():
            timer.cancel()
        self._handshakes.clear()

    def _too_late(self, connection: Connection) -> None:
        connection.refuse(WrongPeer(f"no hello within {HELLO_TIMEOUT_S:g} s"))

    def _end_handshake(self, connection: Connection) -> None:
        timer = self._handshakes.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _stranger_lost(self, connection: Connection, error: Exception | None) -> None:
        self._end_handshake(connection)
        if isinstance(error, RaftKVError) and not self._said_lately(connection.peername.rpartition(":")[0], str(error)):
            self._log_loss(connection, error)

    def _said_lately(self, host: str, text: str) -> bool:
        """Whether this was said of somebody at `host` already: whoever is refused tries again every second."""
        now = self._loop.time()
        if now - self._said_s.get((host, text), float("-inf")) < SAY_AGAIN_S:
            return True
        if len(self._said_s) >= SAID_MAX:
            self._said_s.clear()
        self._said_s[host, text] = now
        return False

    def _log_loss(self, connection: Connection, error: Exception | None) -> None:
        if isinstance(error, RaftKVError):
            log.warning("%s: connection from %s refused: %s", self._name, connection.peername, error)

    def _handshake(self, connection: Connection, frame: list[Any]) -> None:
        hello = decode_hello(frame)
        self._end_handshake(connection)
        if hello.purpose == "peer":
            self._admit_peer(connection, hello)
        else:
            self._admit_client(connection, hello)

    def _admit_peer(self, connection: Connection, hello: Hello) -> None:
        peers = self._peers
        peer = peers.admit(connection, hello)

        def on_frame(_: Connection, frame: list[Any]) -> None:
            peers.on_frame(peer, frame)

        def on_lost(_: Connection, error: Exception | None) -> None:
            peers.inbound_lost(peer, connection)
            self._log_loss(connection, error)

        connection.on_frame = on_frame
        connection.on_lost = on_lost

    def _admit_client(self, connection: Connection, hello: Hello) -> None:
        mine = self._peers.hello()
        if hello.version != PROTOCOL_VERSION:
            raise BadVersion(PROTOCOL_VERSION, hello.version)
        if mine.cluster_id and hello.cluster_id and mine.cluster_id != hello.cluster_id:
            raise WrongCluster(mine.cluster_id, hello.cluster_id)
        session = self._make_session(connection)
        begin = session.begin
        verbs = self._verbs

        def on_frame(_: Connection, frame: list[Any]) -> None:
            request_id, verb, body = decode_request(frame)
            if begin is not None:
                begin(request_id, verb)
            try:
                handler = verbs.get(verb)
                if handler is None:
                    raise BadRequest(f"{self._name} has no request number {verb}")
                handler(session, request_id, body)
            except Malformed as error:
                session.refuse(request_id, BadRequest(error.reason))
            except RaftKVError as error:
                session.refuse(request_id, error)

        connection.on_frame = on_frame
        connection.on_lost = self._log_loss
        connection.send(encode_hello_reply(mine))
