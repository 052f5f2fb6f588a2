"""Where the Redis listeners of the other nodes are, and which node leads which group: for CLUSTER and MOVED.

Only in cluster mode. Every node asks every other one for its status, now and then; of its own group it knows the leader
from Raft. All of it may be outdated: then the node that a client is sent to sends it on.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from raftkv.client.tasks import gather_ordered
from raftkv.daemons.redis.replies import Refusal
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.slots import SLOTS
from raftkv.protocol.addresses import parse_address
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import RaftKVError
from raftkv.protocol.messages import Hello, Verb

if TYPE_CHECKING:
    from raftkv.daemons.options import DaemonOptions
    from raftkv.daemons.shardkv import ShardKvRole

REFRESH_S = 1.0
REFRESH_S_PER_NODE = 0.1
"""With many nodes each is asked less often: a node answers so many questions a second, whatever their number."""
ANSWER_TIMEOUT_S = 1.0
ASKED_AT_ONCE = 16


class Node(NamedTuple):
    """A replica with a Redis listener. `address` is its own, `redis` that of the listener."""

    address: str
    redis: str
    gid: int
    leads: bool

    @property
    def id(self) -> str:
        """40 hex digits, the same at every node and after a restart."""
        return hashlib.sha1(self.address.encode(), usedforsecurity=False).hexdigest()

    @property
    def place(self) -> tuple[str, int]:
        return parse_address(self.redis)


class Nodes:
    """All nodes as this one sees them."""

    def __init__(self, options: DaemonOptions, role: ShardKvRole, rng: random.Random) -> None:
        self._options = options
        self._role = role
        self._rng = rng
        self._channels: dict[str, Channel] = {}
        self._listeners: dict[str, str] = {}
        self._terms: dict[str, int] = {}
        """Of those that said that they lead; by address."""

    # ---- what this node knows

    @property
    def config(self) -> ShardMap | None:
        return self._role.machine.config

    def me(self) -> Node:
        replica = self._role.replica
        listener = self._options.redis_address or ""
        return Node(self._options.address, listener, self._options.gid, replica is not None and replica.is_leader)

    def leader(self, gid: int) -> Node | None:
        """The group's leader, if it and its listener are known."""
        if gid == self._options.gid:
            replica = self._role.replica
            if replica is None:
                return None
            address = self._options.address if replica.is_leader else replica.not_leader().leader_address
        else:
            config = self.config
            addresses = () if config is None else config.groups.get(gid, ())
            leaders = [address for address in addresses if address in self._terms]
            address = max(leaders, key=self._terms.__getitem__, default=None)
        return None if address is None else self._node(address, gid, True)

    def of_group(self, gid: int) -> list[Node]:
        """Those whose listeners are known; the leader first."""
        leader = self.leader(gid)
        config = self.config
        addresses = () if config is None else config.groups.get(gid, ())
        others = (self._node(address, gid, False) for address in addresses if not leader or address != leader.address)
        return [*([leader] if leader else []), *(node for node in others if node is not None)]

    def _node(self, address: str, gid: int, leads: bool) -> Node | None:
        if address == self._options.address:
            return self.me()._replace(leads=leads)
        listener = self._listeners.get(address)
        return None if listener is None else Node(address, listener, gid, leads)

    def redirection(self, slot: int) -> Refusal | None:
        """MOVED to the node that serves the slot; None if that isn't known, or is this one."""
        machine = self._role.machine
        shards = machine.shard_count
        if not shards:
            return None
        shard = slot * shards // SLOTS
        leader = self.leader(self._options.gid if machine.serves(shard) else machine.holder(shard))
        if leader is None or leader.address == self._options.address:
            return None
        host, port = leader.place
        return Refusal(f"MOVED {slot} {host}:{port}")

    # ---- what CLUSTER shows

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """(first slot, last slot, gid), each as long as can be."""
        config = self.config
        if config is None:
            return
        shards, start = config.shards, 0
        for shard in range(1, shards + 1):
            if shard == shards or config.owners[shard] != config.owners[start]:
                if config.owners[start]:
                    yield -(-start * SLOTS // shards), -(-shard * SLOTS // shards) - 1, config.owners[start]
                start = shard

    def slots(self) -> list[Any]:
        return [
            [first, last, *([node.place[0].encode(), node.place[1], node.id.encode(), []] for node in nodes)]
            for first, last, gid in self.ranges()
            if (nodes := self.of_group(gid)) and nodes[0].leads
        ]

    def shards(self) -> list[Any]:
        return [
            {
                b"slots": [slot for first, last, owner in self.ranges() if owner == gid for slot in (first, last)],
                b"nodes": [
                    {
                        b"id": node.id.encode(),
                        b"port": node.place[1],
                        b"ip": node.place[0].encode(),
                        b"endpoint": node.place[0].encode(),
                        b"role": b"master" if node.leads else b"replica",
                        b"replication-offset": 0,
                        b"health": b"online",
                    }
                    for node in self.of_group(gid)
                ],
            }
            for gid in self._gids()
        ]

    def lines(self) -> bytes:
        """CLUSTER NODES."""
        lines: list[str] = []
        for gid in self._gids():
            nodes = self.of_group(gid)
            master = nodes[0].id if nodes and nodes[0].leads else "-"
            ranges = " ".join(f"{first}-{last}" for first, last, owner in self.ranges() if owner == gid)
            for node in nodes:
                host, port = node.place
                flags = "myself," if node.address == self._options.address else ""
                flags += "master" if node.leads else "slave"
                line = f"{node.id} {host}:{port}@{port} {flags} {'-' if node.leads else master} 0 0 1 connected"
                lines.append(f"{line} {ranges}" if node.leads and ranges else line)
        return "".join(f"{line}\n" for line in lines).encode()

    def info(self) -> bytes:
        covered = sum(last - first + 1 for first, last, gid in self.ranges() if self.leader(gid) is not None)
        gids = self._gids()
        values = {
            "cluster_enabled": 1,
            "cluster_state": "ok" if covered == SLOTS else "fail",
            "cluster_slots_assigned": sum(last - first + 1 for first, last, _ in self.ranges()),
            "cluster_slots_ok": covered,
            "cluster_slots_pfail": 0,
            "cluster_slots_fail": SLOTS - covered,
            "cluster_known_nodes": sum(len(self.of_group(gid)) for gid in gids),
            "cluster_size": len(gids),
            "cluster_current_epoch": self.config.num if self.config else 0,
            "cluster_my_epoch": self.config.num if self.config else 0,
        }
        return "".join(f"{name}:{value}\r\n" for name, value in values.items()).encode()

    def _gids(self) -> list[int]:
        return sorted(self.config.groups) if self.config else []

    # ---- how it is found out

    async def watch(self) -> None:
        """Until cancelled."""
        try:
            while True:
                config = self.config
                others = [
                    address
                    for addresses in (config.groups.values() if config else ())
                    for address in addresses
                    if address != self._options.address
                ]
                for address in self._channels.keys() - set(others):
                    self._channels.pop(address).close()
                for known in (self._listeners, self._terms):
                    for address in known.keys() - set(others):
                        del known[address]
                await gather_ordered([self._ask(address) for address in others], ASKED_AT_ONCE)
                pause_s = max(REFRESH_S, REFRESH_S_PER_NODE * len(others))
                await asyncio.sleep(pause_s * (0.5 + self._rng.random() / 2) if self._listeners else REFRESH_S / 5)
        finally:
            for channel in self._channels.values():
                channel.close()

    async def _ask(self, address: str) -> None:
        try:
            channel = self._channels.get(address)
            if channel is None or channel.closed:
                channel = await Channel.open(address, Hello.of_client(), ssl=self._options.client_ssl)
                self._channels[address] = channel
            status = await channel.request(Verb.STATUS, [], timeout_s=ANSWER_TIMEOUT_S)
        except (RaftKVError, OSError):
            self._terms.pop(address, None)
            return
        listener, term = status.get("redis"), status.get("term")
        if type(listener) is str:
            self._listeners[address] = listener
        else:
            self._listeners.pop(address, None)
        if status.get("state") == "leader" and type(term) is int:
            self._terms[address] = term
        else:
            self._terms.pop(address, None)
