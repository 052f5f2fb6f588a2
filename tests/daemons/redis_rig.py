"""Redis connections on a replica whose disk and peers are the test: what leaves when, and in which order."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from raftkv.daemons.redis.connection import RedisConnection
from raftkv.daemons.redis.direct import Direct
from raftkv.daemons.redis.lanes import Lanes
from tests.daemons.rig import Rig
from tests.system.resp import packed


class FakeRole:
    """The rig's replica, in place of a shardkv's role."""

    def __init__(self, rig: Rig) -> None:
        self.replica = rig.replica
        self.machine: Any = rig.replica.machine
        self.map_time_ms = 1 << 40
        self.commits: list[Any] = []
        self.waited_for: set[bytes] = set()

    def is_waited_for(self, shard: int, key: bytes) -> bool:
        return key in self.waited_for

    def count_commit(self, result: Any) -> None:
        self.commits.append(result)


class FakeForward:
    """Keeps what should go elsewhere, until the test answers it."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, Any, Any]] = []

    def execute(self, spec: Any, args: list[bytes], deliver: Any, token: Any) -> None:
        self.waiting.append((args, deliver, token))

    def transact(self, keys: Any, run: Any, deliver: Any, token: Any) -> None:
        self.waiting.append((list(keys), deliver, token))

    def answer(self, result: Any) -> Any:
        """The first; what it was."""
        what, deliver, token = self.waiting.pop(0)
        deliver(token, result)
        return what


class FakeTransport(asyncio.Transport):
    def __init__(self, connection: RedisConnection) -> None:
        super().__init__()
        self.connection = connection
        self.out: list[bytes] = []
        self.high = 1 << 30
        self.reading = True
        self.closed = False

    @property
    def sent(self) -> bytes:
        return b"".join(self.out)

    def write(self, data: Any) -> None:
        self.out.append(bytes(data))
        if sum(map(len, self.out)) > self.high:
            self.connection.pause_writing()

    def drain(self) -> bytes:
        """The client has read all."""
        sent = self.sent
        self.out.clear()
        self.connection.resume_writing()
        return sent

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        self.high = high

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 5) if name == "peername" else default

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class FakeListener:
    """What connections share."""

    nodes = None
    is_cluster = False
    connections_max = 5

    def __init__(self, rig: Rig) -> None:
        self.role = FakeRole(rig)
        self.direct = Direct(self.role, rig.store, random.Random(1))  # type: ignore[arg-type]
        self.lanes = Lanes(self.direct.transact)
        self.forward = FakeForward()
        self.commands_processed = 0
        self.held_bytes = 0
        self.held_bytes_max = 1 << 30
        self.connections: dict[Any, None] = {}
        self._ids = 0

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def made(self, connection: Any) -> str | None:
        return None

    def lost(self, connection: Any) -> None:
        return None

    def hold(self, more_bytes: int) -> bool:
        self.held_bytes += more_bytes
        return self.held_bytes <= self.held_bytes_max


class RedisRig:
    """A leader of three, and connections to it. The peers acknowledge when `rig.commit_all` says so."""

    def __init__(self) -> None:
        self.rig = Rig(voters=3)

    async def start(self) -> RedisRig:
        await self.rig.start()
        await self.rig.lead()
        self.listener = FakeListener(self.rig)
        return self

    def connect(self) -> tuple[RedisConnection, FakeTransport]:
        connection = RedisConnection(self.listener)  # type: ignore[arg-type]
        transport = FakeTransport(connection)
        connection.connection_made(transport)
        return connection, transport


def many(*commands: str) -> bytes:
    """Commands of words without blanks, as bytes of one chunk."""
    return b"".join(packed(*command.split()) for command in commands)
