"""A scripted cluster for the SDK's tests: real connections and frames, no Raft behind them.

Each server answers from a shared state, unless a rule says otherwise: a rule is a function that gets a
request and returns True if it has dealt with it (answered, dropped, closed the connection).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgpack

from raftkv.machines.shard_map import ShardMap
from raftkv.protocol import errors
from raftkv.protocol.connection import Connection, Server
from raftkv.protocol.messages import (
    KIND_HELLO,
    GetBody,
    Hello,
    ScanBody,
    Verb,
    decode_hello,
    decode_read_body,
    decode_request,
    decode_write_body,
    encode_error_reply,
    encode_hello_reply,
    encode_reply,
)
from raftkv.protocol.transactions import CoordinateOp

CLUSTER_ID = b"C" * 16
PUT, APPEND, DELETE, CAS = 1, 2, 3, 4


@dataclass
class Asked:
    """One request as a server got it."""

    server: FakeServer
    connection: Connection
    request_id: int
    verb: int
    body: list[Any]

    @property
    def command(self) -> list[Any]:
        """The command of a WRITE or CONTROL."""
        decoded: list[Any] = msgpack.unpackb(self.body[-1])
        return decoded

    def reply(self, body: Any) -> None:
        self.connection.send(encode_reply(self.request_id, body))

    def refuse(self, error: errors.RaftKVError) -> None:
        self.connection.send(encode_error_reply(self.request_id, *error.to_wire()))


Rule = Callable[[Asked], bool]


class FakeServer:
    """One daemon. `requests` are all it got; `rules` are asked in order, before the default answer."""

    def __init__(self, cluster: FakeCluster, role: str, gid: int, replica: int) -> None:
        self.cluster = cluster
        self.hello = Hello(cluster_id=CLUSTER_ID, role=role, gid=gid, replica=replica, store_id=b"S" * 16)
        self.rules: list[Rule] = []
        self.requests: list[Asked] = []
        self.hellos: list[Hello] = []
        self.says_hello = True
        self.port = 0
        self._server: Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await Server.listen("127.0.0.1", self.port, self._on_connection)
        self.port = self._server.port

    def stop(self) -> None:
        """Reset every connection and refuse new ones."""
        assert self._server is not None
        self._server.abort()

    def asked(self, verb: int) -> list[Asked]:
        return [request for request in self.requests if request.verb == verb]

    @property
    def connections(self) -> int:
        assert self._server is not None
        return len(self._server.connections)

    def greet(self) -> None:
        """Say the hello that was held back to whoever is connected."""
        assert self._server is not None
        for connection in self._server.connections:
            connection.send(encode_hello_reply(self.hello))

    def _on_connection(self, connection: Connection) -> None:
        connection.on_frame = self._on_frame
        connection.on_lost = lambda connection, error: None

    def _on_frame(self, connection: Connection, frame: list[Any]) -> None:
        if frame[0] == KIND_HELLO:
            self.hellos.append(decode_hello(frame))
            if self.says_hello:
                connection.send(encode_hello_reply(self.hello))
            return
        asked = Asked(self, connection, *decode_request(frame))
        self.requests.append(asked)
        for rule in self.rules:
            if rule(asked):
                return
        self.answer(asked)

    def answer(self, asked: Asked) -> None:
        """What a well-behaved server says."""
        try:
            asked.reply(self._body(asked))
        except errors.RaftKVError as error:
            asked.refuse(error)

    def _body(self, asked: Asked) -> Any:
        if asked.verb == Verb.STATUS:
            return {"role": self.hello.role, "replica": self.hello.replica}
        if asked.verb == Verb.COORDINATE and asked.body[0] == CoordinateOp.STATUS:
            return self.cluster.coordinate(asked.body)  # any replica may say it
        leader = self.cluster.leaders.get(self.hello.gid)
        if leader is not self:
            raise errors.NotLeader(leader.address if leader is not None else None)
        if asked.verb == Verb.CONFIG:
            return [self.cluster.shard_map.encode(), self.cluster.map_time_ms, *self.cluster.config_extras()]
        if asked.verb == Verb.CONTROL:
            return self.cluster.control(asked.command)
        if asked.verb == Verb.WRITE:
            decode_write_body(asked.body)
            return self.cluster.write(self.hello.gid, asked.command)
        if asked.verb == Verb.TXN:
            return self.cluster.txn(self.hello.gid, asked.command)
        if asked.verb == Verb.COORDINATE:
            return self.cluster.coordinate(asked.body)
        assert asked.verb == Verb.READ
        return self.cluster.read(self.hello.gid, asked.body)


@dataclass
class FakeCluster:
    """Three controllers, and groups of three; the state that they would replicate is here."""

    shards: int = 4
    gids: tuple[int, ...] = (1, 2)
    map_time_ms: int = 1_000
    controllers: list[FakeServer] = field(default_factory=list)
    groups: dict[int, list[FakeServer]] = field(default_factory=dict)
    leaders: dict[int, FakeServer | None] = field(default_factory=dict)
    replies: dict[tuple[int, bytes, int], list[Any]] = field(default_factory=dict)
    acknowledged: dict[tuple[int, bytes], int] = field(default_factory=dict)
    data: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    revision: int = 0
    applied: list[list[Any]] = field(default_factory=list)

    async def start(self) -> None:
        self.controllers = [FakeServer(self, "controller", 0, replica) for replica in range(3)]
        self.groups = {gid: [FakeServer(self, "shardkv", gid, replica) for replica in range(3)] for gid in self.gids}
        for server in self.servers:
            await server.start()
        self.leaders = {gid: self.groups[gid][0] for gid in self.gids}
        self.leaders[0] = self.controllers[0]
        self.shard_map = self.make_map(1)

    def make_map(self, num: int, owners: tuple[int, ...] | None = None) -> ShardMap:
        if owners is None:
            owners = tuple(self.gids[shard % len(self.gids)] for shard in range(self.shards))
        return ShardMap(num, owners, {gid: tuple(s.address for s in servers) for gid, servers in self.groups.items()})

    @property
    def servers(self) -> list[FakeServer]:
        return [*self.controllers, *(server for servers in self.groups.values() for server in servers)]

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.controllers]

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def asked(self, verb: int) -> list[Asked]:
        return [asked for server in self.servers for asked in server.asked(verb)]

    def everywhere(self, gid: int, rule: Rule) -> None:
        for server in self.groups[gid] if gid else self.controllers:
            server.rules.append(rule)

    def write(self, gid: int, command: list[Any]) -> list[Any]:
        op, shard, client_id, seq, first_unacked, _stamp, key, *args = command
        if self.shard_map.owner(shard) != gid:
            raise errors.WrongGroup(self.shard_map.num, -1)
        known = self.replies.get((shard, client_id, seq))
        if known is not None:
            return known
        if seq < self.acknowledged.get((shard, client_id), 0):
            raise errors.Expired("its reply was acknowledged before")
        self.acknowledged[shard, client_id] = max(first_unacked, self.acknowledged.get((shard, client_id), 0))
        self.applied.append(command)
        result = self._apply(op, key, args)
        self.replies[shard, client_id, seq] = result
        return result

    def _apply(self, op: int, key: bytes, args: list[Any]) -> list[Any]:
        value, version = self.data.get(key, (None, 0))
        if op == PUT and args[1] is not None and args[1] != version:
            return errors.VersionMismatch(version).to_result()
        if op == CAS and value != args[0]:
            return errors.CasMismatch(value, version).to_result()
        self.revision += 1
        if op == DELETE:
            self.data.pop(key, None)
            return [0, value is not None, self.revision]
        new = {PUT: args[0], APPEND: (value or b"") + args[0], CAS: args[-1]}[op]
        self.data[key] = (new, self.revision)
        return [0, self.revision]

    def read(self, gid: int, body: list[Any]) -> Any:
        from raftkv.machines.slots import shard_of

        read = decode_read_body(body)
        if self.shard_map.owner(read.shard) != gid:
            raise errors.WrongGroup(self.shard_map.num, -1)
        if isinstance(read, GetBody):
            value, version = self.data.get(read.key, (None, 0))
            return [value, version]
        assert isinstance(read, ScanBody)
        keys = [
            key
            for key in sorted(self.data)
            if shard_of(key, self.shards) == read.shard
            and key.startswith(read.prefix)
            and (read.after_key is None or key > read.after_key)
        ]
        page = keys[: read.max_pairs]
        return [[[key, *self.data[key]] for key in page], len(keys) > len(page)]

    def config_extras(self) -> list[Any]:
        """What a CONFIG reply has after map and time."""
        return []

    def txn(self, gid: int, command: list[Any]) -> list[Any]:
        raise errors.BadRequest("there are no transactions here")

    def coordinate(self, body: list[Any]) -> list[Any]:
        raise errors.BadRequest("there are no transactions here")

    def control(self, command: list[Any]) -> list[Any]:
        client_id, seq = command[2], command[3]
        known = self.replies.get((-1, client_id, seq))
        if known is None:
            self.applied.append(command)
            known = self.replies[-1, client_id, seq] = [0, 7]
        return known


def with_cluster(
    test: Callable[[FakeCluster], Awaitable[None]], make: type[FakeCluster] | None = None, **options: Any
) -> None:
    """Run the test against a new cluster, and check that it leaves no task behind."""

    async def run() -> None:
        cluster = (make or FakeCluster)(**options)
        await cluster.start()
        try:
            await test(cluster)
        finally:
            cluster.stop()
            await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, left

    run_async(run())


def run_async(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run with a deadline; nothing may be reported to the loop's exception handler."""
    reported: list[dict[str, Any]] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
        async with asyncio.timeout(30):
            await coroutine

    asyncio.run(guarded())
    assert not reported, reported


def first(count: int, then: Rule) -> Rule:
    """`then`, for the first `count` requests only."""
    left = count

    def rule(asked: Asked) -> bool:
        nonlocal left
        if left == 0 or not then(asked):
            return False
        left -= 1
        return True

    return rule


def drop(asked: Asked) -> bool:
    """The request is lost."""
    return True


def apply_and_drop(asked: Asked) -> bool:
    """The request is carried out; its reply is lost."""
    asked.server._body(asked)
    return True


def apply_and_reset(asked: Asked) -> bool:
    """Carried out; then the connection breaks before the reply."""
    asked.server._body(asked)
    asked.connection.abort()
    return True


def reset(asked: Asked) -> bool:
    asked.connection.abort()
    return True


def refusing(error: errors.RaftKVError) -> Rule:
    def rule(asked: Asked) -> bool:
        asked.refuse(error)
        return True

    return rule


def on_verb(verb: int, rule: Rule) -> Rule:
    return lambda asked: asked.verb == verb and rule(asked)
