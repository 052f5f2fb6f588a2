"""How a group learns the shard map: its leader asks the controllers, and logs what they say, in order.

Only what is logged counts: every replica takes each configuration at the same place of its log. Map time is
logged when it is a minute ahead of what the group knows; every second while explicit locks are held, which end by it.
`ControllerPolls` is the part that isn't about logging: coordinators ask in the same way.
"""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.proposals import propose
from raftkv.daemons.replica import Replica
from raftkv.machines.kv import CONFIG, LIFT, MAP_TIME, KvMachine
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import Malformed, RaftKVError, WrongPeer
from raftkv.protocol.messages import ConfigReply, Hello, Verb, decode_config_reply
from raftkv.storage.store import Store

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

LONG_POLL_MS = 1_000
"""So old is what is known of map time, at most, while a controller answers: locks that are taken end by it. Also the
pace of logged map times while any are held, and while old sessions are being dropped: each drops a bounded number."""
DRAIN_POLL_MS = 200
"""While the group is drained, and doesn't serve."""
ANSWER_TIMEOUT_S = 3.0
"""How long after a long poll's end an answer may take."""
RETRY_S = 0.2
MAP_TIME_STEP_MS = 60_000
QUIET_S = 10.0
"""After so long without a controller, it is said so in the log, once."""

Answer = tuple[ShardMap, ConfigReply]


class ControllerPolls(ABC):
    """Asks one controller after the other, while its group's replica leads.

    `map_time_ms` is the latest that was heard of while it leads, 0 before the first; `coordinators` the addresses of
    each group of them, by gid.
    """

    def __init__(self, options: DaemonOptions, store: Store, rng: random.Random) -> None:
        self._name = options.name
        self._controllers = list(options.controllers)
        self._ssl = options.client_ssl
        self._store = store
        self._rng = rng
        self.map_time_ms = 0
        self.coordinators: dict[int, tuple[str, ...]] = {}
        self.replica: Replica | None = None

    async def follow(self) -> None:
        """Until cancelled."""
        self.map_time_ms = 0
        loop = asyncio.get_running_loop()
        heard_s = loop.time()
        complained = False
        start = self._rng.randrange(len(self._controllers))
        turn = 0
        while True:
            address = self._controllers[(start + turn) % len(self._controllers)]
            turn += 1
            try:
                channel = await open_controller(address, self._store.identity.cluster_id, self._ssl)
                try:
                    while True:
                        await self._poll(channel)
                        heard_s = loop.time()
                        if complained:
                            log.info("%s: the controllers answer again", self._name)
                            complained = False
                finally:
                    channel.close()
            except (RaftKVError, OSError) as error:
                if loop.time() - heard_s > QUIET_S and not complained:
                    complained = True
                    where = ", ".join(self._controllers)
                    log.warning("%s: no controller answers at %s: %s", self._name, where, error)
            await asyncio.sleep(RETRY_S * (0.5 + self._rng.random()))

    @abstractmethod
    async def _poll(self, channel: Channel) -> None:
        """Ask once, and do what the answer calls for."""

    async def _query(self, channel: Channel, num: int, wait_after: int, wait_ms: int) -> Answer:
        timeout_s = wait_ms / 1000 + ANSWER_TIMEOUT_S
        body = await channel.request(Verb.CONFIG, [num, wait_after, wait_ms], timeout_s=timeout_s)
        reply = decode_config_reply(body)
        try:
            config = ShardMap.decode(reply.encoded_map)
        except ValueError as error:
            raise Malformed(f"not the answer to a CONFIG: {error}") from None
        self.map_time_ms = max(self.map_time_ms, reply.map_time_ms)
        self.coordinators = reply.coordinators
        return config, reply

    async def _log(self, command: list[Any]) -> None:
        assert self.replica is not None
        await propose(self.replica, command)


class MapFollower(ControllerPolls):
    """Keeps the log of a group that serves shards up to date."""

    def __init__(self, options: DaemonOptions, store: Store, machine: KvMachine, rng: random.Random) -> None:
        super().__init__(options, store, rng)
        self._machine = machine

    async def _poll(self, channel: Channel) -> None:
        machine = self._machine
        wait_ms = DRAIN_POLL_MS if machine.drain_num else LONG_POLL_MS
        config, reply = await self._query(channel, -1, machine.config_num, wait_ms)
        while machine.config_num < config.num:
            num = machine.config_num + 1
            next_config = config
            if num != config.num:
                next_config, _ = await self._query(channel, num, -1, 0)
            await self._log([CONFIG, next_config.encode()])
            if machine.config_num < num:
                raise Malformed(f"configuration {num} can't be taken")
            log.info("%s: configuration %d is in the log", self._name, num)
        if 0 < machine.drain_num <= reply.drains_over:
            await self._log([LIFT, machine.drain_num])
            log.info("%s: the group stays, and serves again", self._name)
        step_ms = 1 if machine.explicit_locks else MAP_TIME_STEP_MS
        if machine.sweep_pending or reply.map_time_ms - machine.map_time_ms >= step_ms:
            await self._log([MAP_TIME, reply.map_time_ms])


async def open_controller(address: str, cluster_id: bytes, ssl: ssl.SSLContext | None) -> Channel:
    """A channel to the controller at `address`; raise WrongPeer if somebody else lives there."""
    channel = await Channel.open(address, Hello.of_client(cluster_id), ssl=ssl)
    if channel.server_hello.role != "controller":
        channel.close()
        raise WrongPeer(f"{address} is {channel.server_hello}, not a controller")
    return channel
