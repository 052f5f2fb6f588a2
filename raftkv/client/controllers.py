"""`Controllers`: the shard map and who serves it, asynchronously.

Changes of the map are commands in the controllers' log and apply exactly once, like any write.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from raftkv.client.calls import Route
from raftkv.client.cluster import CONTROLLERS_SHARD, TIMEOUT_S_DEFAULT, Cluster, bad_reply
from raftkv.client.retry import Call
from raftkv.client.routing import LATEST
from raftkv.client.tasks import gather_ordered
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.addresses import parse_address
from raftkv.protocol.errors import (
    BadRequest,
    ConnectionLost,
    DrainOver,
    HandshakeRefused,
    LastGroup,
    RaftKVError,
    Unavailable,
)
from raftkv.protocol.limits import CONNECT_TIMEOUT_S
from raftkv.protocol.messages import Verb

if TYPE_CHECKING:
    import ssl

JOIN = 65
LEAVE = 66
MOVE = 67
GIVE_UP = 68
DRAIN = 69
LIFT = 70
LEAVE_DRAINED = 71

STATUS_AT_ONCE = 64
DRAIN_WAIT_S = 5.0
"""For a group that is to leave as the last one to say that it is empty."""
LEAVES_MAX = 5
"""How often a leave begins again that other changes of the map came between."""

Status = dict[str, Any]


class Controllers:
    """A client of the controllers at `controllers` ("HOST:PORT" each); options as for `RaftKV`."""

    def __init__(
        self,
        controllers: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        ssl: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._cluster = Cluster(controllers, timeout_s=timeout_s, ssl=ssl, rng=rng)

    async def join(self, groups: Mapping[int, Sequence[str]]) -> int:
        """Add groups, gid → their replicas' addresses. Return the number of the new configuration.

        Raise GroupExists, BadRequest. Shards move to them while they are served.
        """
        if not groups:
            raise BadRequest("Join names no group")
        for gid, addresses in groups.items():
            if not addresses:
                raise BadRequest(f"group {gid} has no addresses")
            for address in addresses:
                parse_address(address)
        arg = [[gid, list(groups[gid])] for gid in sorted(groups)]
        names = ", ".join(str(gid) for gid in sorted(groups))
        return await self._change(f"join of group {names}", JOIN, [arg])

    async def leave(self, gids: Sequence[int], *, force: bool = False) -> int:
        """Remove groups. Return the number of the new configuration. Raise NoSuchGroup, LastGroup.

        The last group leaves only if it says that nothing is in its shards, or with `force`, which gives up all
        shards with what is in them, and is refused (BadRequest) while a replica of it answers.
        """
        if not gids:
            raise BadRequest("Leave names no group")
        if force:
            latest = await self.query()
            if not latest.groups.keys() - set(gids):
                await self._check_lost({gid: latest.groups[gid] for gid in gids if gid in latest.groups})
                await self._check_held_nowhere(latest, set(gids))
        name = f"leave of group {', '.join(str(gid) for gid in gids)}"
        for _ in range(LEAVES_MAX):
            try:
                return await self._change(name, GIVE_UP if force else LEAVE, [list(gids)])
            except LastGroup:
                pass
            with contextlib.suppress(DrainOver):
                return await self._leave_drained(name, list(gids))
        raise DrainOver

    async def _leave_drained(self, name: str, gids: list[int]) -> int:
        """Of all groups that there are, if all of them are empty. Raise LastGroup, DrainOver.

        The drain that this begins is over when it returns or raises; or by itself, if this process dies.
        """
        latest = await self.query()
        drain = await self._change(name, DRAIN, [gids, latest.num])
        try:
            for gid in gids:
                await self._drain(gid, latest, drain)
            return await self._change(name, LEAVE_DRAINED, [gids, drain])
        except BaseException:
            with contextlib.suppress(RaftKVError):
                await self._change(f"end of the {name}", LIFT, [drain])
            raise

    async def _drain(self, gid: int, latest: ShardMap, drain: int) -> None:
        cluster = self._cluster
        call = cluster.caller.call(f"drain of group {gid}", None, is_write=False, timeout_s=DRAIN_WAIT_S)
        route = Route(latest.num, cluster.router.replicas(latest, gid))

        async def route_of(call: Call) -> Route:
            return route

        try:
            await cluster.caller.ask(call, route_of, Verb.DRAIN, [drain, latest.num], lambda reply: reply)
        except (Unavailable, HandshakeRefused) as error:
            raise LastGroup(gid) from error

    async def _check_lost(self, groups: Mapping[int, Sequence[str]]) -> None:
        """Raise BadRequest if any replica of them answers."""

        async def answers(address: str) -> bool:
            try:
                await self.status_of(address)
            except RaftKVError:
                return False
            return True

        asked = [(gid, address) for gid, addresses in groups.items() for address in addresses]
        found = await gather_ordered([answers(address) for _, address in asked], STATUS_AT_ONCE)
        for (gid, address), answered in zip(asked, found, strict=True):
            if answered:
                raise BadRequest(
                    f"group {gid} answers at {address}: force is for groups that are lost; join another group, so that "
                    "the shards have somewhere to go"
                )

    async def _check_held_nowhere(self, latest: ShardMap, gids: set[int]) -> None:
        """Raise BadRequest if a group that has left answers, and holds shards that `latest` has given to `gids`: it
        serves them until they are asked for."""
        groups: dict[int, tuple[str, ...]] = {}
        for num in range(latest.num - 1, 0, -1):
            config = await self.query(num)
            if config.given_up_ms:
                break
            for gid, addresses in config.groups.items():
                groups.setdefault(gid, addresses)

        async def held(address: str) -> list[int]:
            try:
                return [shard for shard, _ in (await self.status_of(address))["shards"]]
            except (RaftKVError, KeyError, TypeError, ValueError):
                return []

        asked = [(gid, address) for gid in sorted(groups.keys() - gids) for address in groups[gid]]
        found = await gather_ordered([held(address) for _, address in asked], STATUS_AT_ONCE)
        for (gid, address), shards in zip(asked, found, strict=True):
            if shards:
                raise BadRequest(
                    f"group {gid}, which has left, answers at {address} and still holds {len(shards)} shards: join it "
                    "again, so that nothing is lost"
                )

    async def move(self, shard: int, gid: int) -> int:
        """Place one shard. Return the configuration's number. Raise BadShard, NoSuchGroup."""
        return await self._change(f"move of shard {shard} to group {gid}", MOVE, [shard, gid])

    async def query(self, num: int | None = None) -> ShardMap:
        """Configuration `num`, or the latest. Raise NoSuchConfig."""
        if num is not None and num < 0:
            raise BadRequest(f"configurations are numbered from 0, not {num}")
        call = self._cluster.call("query")
        return (await self._cluster.router.fetch(call, LATEST if num is None else num)).shard_map

    async def wait_beyond(self, num: int) -> ShardMap:
        """The latest configuration: at once if its number is above `num`, else when one is made or a second is over."""
        return (await self._cluster.router.fetch_beyond(self._cluster.call("query"), num)).shard_map

    async def coordinators(self) -> dict[int, tuple[str, ...]]:
        """The addresses of each group of coordinators that has registered, by gid."""
        call = self._cluster.call("query")
        return dict((await self._cluster.router.fetch(call, LATEST)).coordinators)

    async def status(self) -> dict[str, Status | RaftKVError]:
        """What each controller says of itself, or why it didn't, by address."""

        async def one(address: str) -> Status | RaftKVError:
            try:
                return await self.status_of(address)
            except RaftKVError as error:
                return error

        addresses = self._cluster.addresses
        answers = await gather_ordered([one(address) for address in addresses], STATUS_AT_ONCE)
        return dict(zip(addresses, answers, strict=True))

    async def status_of(self, address: str) -> Status:
        """What the daemon at `address`, of any role, says of itself. It is asked once: no other can answer.

        Raise Unavailable when it doesn't.
        """
        body = await self._ask_one(self._cluster.call("status"), address, Verb.STATUS, [])
        if type(body) is not dict or not all(type(key) is str for key in body):
            raise bad_reply("a status request")
        return body

    async def transfer(self, address: str, target: int | None = None) -> None:
        """Ask the leader at `address` to hand over to replica `target`, or to the most up-to-date one.

        Raise NotLeader, Unavailable.
        """
        target_id = -1 if target is None else target
        await self._ask_one(self._cluster.call("transfer"), address, Verb.TRANSFER, [target_id])

    def unsettled_writes(self) -> list[str]:
        """As for `RaftKV`."""
        return self._cluster.unsettled_writes()

    async def close(self) -> None:
        """Close the connections. Requests in progress fail."""
        await self._cluster.close()

    async def __aenter__(self) -> Controllers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    # ---- inside

    async def _change(self, name: str, op: int, args: list[Any]) -> int:
        call = self._cluster.call(name, is_write=True)
        await self._cluster.router.shard_map(call)  # for the map time that the command is stamped with
        return await self._cluster.write(call, CONTROLLERS_SHARD, op, args, int)

    async def _ask_one(self, call: Call, address: str, verb: int, body: list[Any]) -> Any:
        parse_address(address)
        connect_s = min(CONNECT_TIMEOUT_S, call.timeout_s)
        channel = await self._cluster.pool.get(address, timeout_s=connect_s)
        left_s = call.deadline - asyncio.get_running_loop().time()
        try:
            return await channel.request(verb, body, timeout_s=max(left_s, 0.001))
        except ConnectionLost as error:
            raise Unavailable(str(error)) from None
