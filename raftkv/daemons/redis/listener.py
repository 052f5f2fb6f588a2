"""`--redis-listen`: accepts Redis clients, and owns what their connections share.

It lives in the daemon's loop, beside the frames of native clients. Everything is bounded: connections, the bytes of
requests that aren't whole, commands on their way elsewhere.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from raftkv.daemons.redis.connection import RedisConnection
from raftkv.daemons.redis.direct import Direct
from raftkv.daemons.redis.forward import Forward
from raftkv.daemons.redis.lanes import Lanes
from raftkv.daemons.redis.nodes import Nodes
from raftkv.daemons.redis.scanning import Scanner
from raftkv.protocol.addresses import parse_address
from raftkv.protocol.limits import CONNECTIONS_MAX

if TYPE_CHECKING:
    from raftkv.daemons.options import DaemonOptions
    from raftkv.daemons.shardkv import ShardKvRole
    from raftkv.daemons.tasks import Tasks
    from raftkv.storage.store import Store

HELD_BYTES_MAX = 256 * 1024 * 1024
"""Of requests that haven't come in whole, of all connections together."""


class RedisListener:
    """The Redis side of one daemon."""

    def __init__(
        self, options: DaemonOptions, role: ShardKvRole, store: Store, tasks: Tasks, rng: random.Random, pid: int
    ) -> None:
        self._options = options
        self._role = role
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        self._server: asyncio.Server | None = None
        self._ids = 0
        self._held_bytes = 0
        self.pid = pid
        self.direct = Direct(role, store, rng)
        self.forward = Forward(options.controllers, tasks, rng, options.client_ssl)
        self.lanes = Lanes(self.direct.transact)
        self.scanner = Scanner(self.forward.kv, rng)
        self.nodes = Nodes(options, role, rng) if options.redis_mode == "cluster" else None
        """Where the others are; None unless clients are told so."""
        self.connections: dict[RedisConnection, None] = {}
        self.connections_max = CONNECTIONS_MAX
        self.connections_received = 0
        self.connections_rejected = 0
        self.commands_processed = 0

    async def listen(self) -> None:
        """Raise OSError if the address can't be had."""
        assert self._options.redis_listen is not None
        host, port = parse_address(self._options.redis_listen)
        tls = self._options.tls

        def factory() -> asyncio.Protocol:
            connection = RedisConnection(self)
            if tls is None:
                return connection
            from raftkv.protocol.tls_layer import TlsLayer

            return TlsLayer(connection, tls.server)

        self._server = await self._loop.create_server(factory, host, port, backlog=1024)
        if self.nodes is not None:
            self._tasks.start(self.nodes.watch(), "redis-nodes")

    def stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Close every connection, with what it has been answered."""
        self.stop_listening()
        for connection in list(self.connections):
            connection.close()
        await self.forward.close()

    # ---- what connections use

    @property
    def is_cluster(self) -> bool:
        return self.nodes is not None

    @property
    def port(self) -> int:
        assert self._options.redis_listen is not None
        return parse_address(self._options.redis_listen)[1]

    @property
    def uptime_s(self) -> float:
        return self._loop.time() - self._started_s

    @property
    def acts_as_master(self) -> bool:
        """A plain node takes writes, whoever leads; in a cluster only a leader does."""
        return self.nodes is None or self.direct.leads

    @property
    def state(self) -> str:
        """Of the replica."""
        replica = self._role.replica
        return "unformed" if replica is None else str(replica.raft.role)

    def shards_here(self) -> list[int]:
        """The shards that a cluster's client finds here."""
        return [shard for shard, _ in self._role.machine.shard_states() if self._role.machine.serves(shard)] * (
            self.direct.leads
        )

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def made(self, connection: RedisConnection) -> str | None:
        """A client has connected. The text of the refusal if there are too many."""
        self.connections_received += 1
        if len(self.connections) >= self.connections_max:
            self.connections_rejected += 1
            return "ERR max number of clients reached"
        self.connections[connection] = None
        return None

    def lost(self, connection: RedisConnection) -> None:
        self.connections.pop(connection, None)

    def hold(self, more_bytes: int) -> bool:
        """Whether so much more of unfinished requests can be held; it counts in any case."""
        self._held_bytes += more_bytes
        return more_bytes <= 0 or self._held_bytes <= HELD_BYTES_MAX
