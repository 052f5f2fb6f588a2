"""Whom to ask: the shard map and its map time, and per Raft group the leader as last seen.

Everything here is a cache and may be wrong: servers refuse what isn't theirs, and the caller then asks for
a newer map or another replica. The map is fetched by whoever needs it first; the others wait for that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

from raftkv.client.calls import Caller, Route
from raftkv.client.replicas import Replicas
from raftkv.client.retry import Call
from raftkv.machines.shard_map import NO_GROUP, ShardMap
from raftkv.protocol.errors import (
    ConnectFailed,
    NoAnswer,
    RaftKVError,
    ServerError,
    Timeout,
    Unavailable,
    WrongGroup,
)
from raftkv.protocol.messages import Verb

LATEST = -1
NO_WAIT = -1

OWNERLESS_POLL_MS = 1_000
"""How long a controller may hold back its answer while there is no group to go to."""

ANSWER_S = 0.1
"""How long before an attempt ends a held back answer must be on its way."""

REFRESH_S_MIN = 0.5
"""A refusal that the map can't explain (a group behind it) makes us look at most so often."""

EARLIER_MAPS_MAX = 16
"""So many earlier maps are looked at for who else may have a shard, and kept."""
EARLIER_MAP_WAIT_S = 1.0
"""They are worth no more time than this: the group that was asked may be back by then."""

MAP_TIME_OLD_S = 30.0
"""From this age on a fresh map time is fetched beside the writes, which go on with the old one. It makes
a session seem older than it is, no more: a session lives for an hour of map time."""

MAP_TIME_STALE_S = 600.0
"""At this age a write waits for a fresh one first, if a controller answers soon."""

MAP_TIME_WAIT_S = 2.0


class Fetched(NamedTuple):
    shard_map: ShardMap
    map_time_ms: int
    coordinators: Mapping[int, tuple[str, ...]] = {}
    """The addresses by gid; empty if none have registered."""


class Router:
    """The map and the leaders, for one client."""

    def __init__(self, controllers: Sequence[str], caller: Caller, rng: random.Random) -> None:
        self._caller = caller
        self._rng = rng
        self._controllers = Route(LATEST, Replicas("controller", 0, tuple(controllers), rng))
        self._groups: dict[int, Replicas] = {}
        self._departed: dict[int, Replicas] = {}
        """Groups that aren't in the map, and may hold shards that it gives to others."""
        self._coordinators: dict[int, Replicas] = {}
        self._earlier: dict[int, ShardMap] = {}
        self._map: ShardMap | None = None
        self._holders: dict[int, Replicas] = {}
        self._map_time_ms = 0
        self._fetched_at = 0.0
        self._looked_at = 0.0
        self._freshen_due = 0.0
        self._unanswered_until = 0.0
        self._lock = asyncio.Lock()
        self._freshening: asyncio.Task[None] | None = None

    @property
    def map_time_ms(self) -> int:
        return self._map_time_ms

    async def shard_map(self, call: Call) -> ShardMap:
        """The map as last fetched; fetched now if there is none. Raise when `call`'s deadline passes."""
        if self._map is None:
            await self._refresh(call, beyond=-1)
            assert self._map is not None
        return self._map

    async def route(self, call: Call, shard: int) -> Route:
        """Where the shard is served, as far as is known; waits for a map that has groups."""
        while True:
            shard_map = self._map if self._map is not None else await self.shard_map(call)
            refusal = call.last_error
            if type(refusal) is WrongGroup:
                call.last_error = None  # it has been heard
                await self._after_wrong_group(call, shard_map, shard, refusal)
            elif isinstance(refusal, (ConnectFailed, NoAnswer)):
                await self._after_silence(call, shard_map, shard)
            shard_map = self._map or shard_map  # others may have fetched a newer one, and its groups, meanwhile
            gid = shard_map.owner(shard)
            group = self._holders.get(shard) or (self._groups[gid] if gid != NO_GROUP else None)
            if group is not None:
                call.asked_gid = group.gid
                return Route(shard_map.num, group)
            try:
                await self._refresh(call, beyond=shard_map.num, wait_ms=OWNERLESS_POLL_MS)
            except Timeout as error:
                raise Timeout(
                    f"{call.what}: no group serves the shards (configuration {shard_map.num}); "
                    "add one with `raftkv-ctl Join GID:ADDR,…`"
                ) from error

    async def common_route(self, call: Call, shards: Sequence[int]) -> Route | None:
        """Where all these shards are served, if that is one group, as far as is known.

        Which of several shards a WrongGroup meant isn't known: then there may be a newer map, and no more is learned.
        """
        if len(shards) == 1:
            return await self.route(call, shards[0])
        shard_map = await self.shard_map(call)
        refusal = call.last_error
        if type(refusal) is WrongGroup:
            call.last_error = None  # it has been heard
            if refusal.config_num > shard_map.num:
                await self._refresh(call, beyond=shard_map.num)
            elif asyncio.get_running_loop().time() - self._looked_at >= REFRESH_S_MIN:
                await self._fetch(call, NO_WAIT, 0)
        first = await self.route(call, shards[0])  # waits for a map that has groups
        assert self._map is not None
        for shard in shards[1:]:
            group = self._holders.get(shard) or self._groups.get(self._map.owner(shard))
            if group is None or group.gid != first.replicas.gid:
                return None
        return first

    # ---- the coordinators

    @property
    def coordinator_gids(self) -> list[int]:
        """The groups of coordinators that were registered when the map was fetched last, ascending."""
        return sorted(self._coordinators)

    async def find_coordinators(self, call: Call) -> list[int]:
        """Their gids; looked for now if none are known. Empty if none have registered."""
        await self.shard_map(call)
        if not self._coordinators:
            await self._fetch(call, NO_WAIT, 0)
        return self.coordinator_gids

    async def coordinators_route(self, call: Call, gid: int) -> Route:
        """That group of coordinators. When none of them can be reached, they may live elsewhere by now."""
        group = self._coordinators.get(gid)
        silent = isinstance(call.last_error, (ConnectFailed, NoAnswer))
        if silent and group is not None and call.unreached.issuperset(group.addresses):
            call.unreached.clear()
            await self._look_again(call)
            group = self._coordinators.get(gid)
        if group is None:
            gone = f"{call.what}: the coordinators of group {gid} are not registered any more"
            raise call.judge_final(Unavailable(gone))
        assert self._map is not None
        return Route(self._map.num, group)

    async def _look_again(self, call: Call) -> None:
        """Fetch what the controllers know, if one answers soon."""
        now = asyncio.get_running_loop().time()
        timeout_s = min(EARLIER_MAP_WAIT_S, call.deadline - now)
        if timeout_s > 0:
            errand = self._caller.call("the coordinators' addresses", None, is_write=False, timeout_s=timeout_s)
            with contextlib.suppress(RaftKVError):
                self._take(await self.fetch(errand, LATEST), now)

    # ---- map time

    async def freshen_map_time(self, call: Call, stale_s: float | None = None) -> None:
        """Before a first sending: see to it that the map time isn't too old. At the age `stale_s` it waits for a fresh
        one, if a controller answers soon, or answered when one was last asked."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        is_stale = now - self._fetched_at >= (MAP_TIME_STALE_S if stale_s is None else stale_s)
        if self._map is None or now < (self._unanswered_until if is_stale else self._freshen_due):
            return
        if self._freshening is None:
            self._freshening = loop.create_task(self._freshen(), name="refresh map time")
        if is_stale:
            await asyncio.wait([self._freshening], timeout=min(MAP_TIME_WAIT_S, call.deadline - now))

    async def renew_map_time(self, call: Call) -> None:
        """Fetch it now, because a server found ours too old. Raise when `call`'s deadline passes."""
        await self._fetch(call, NO_WAIT, 0)

    async def controllers_route(self, call: Call) -> Route:
        return self._controllers

    async def fetch(self, call: Call, num: int) -> Fetched:
        """Configuration `num` from a controller, past the cache. Raise NoSuchConfig too."""
        return await self._caller.ask(call, self.controllers_route, Verb.CONFIG, [num, NO_WAIT, 0], _fetched)

    async def fetch_beyond(self, call: Call, num: int) -> Fetched:
        """The latest, from a controller, which holds its answer back for a while if there is none above `num`."""
        wait_ms = int(1000 * (call.attempt_s(asyncio.get_running_loop().time()) - ANSWER_S))
        body = [LATEST, num, max(0, wait_ms)]
        return await self._caller.ask(call, self.controllers_route, Verb.CONFIG, body, _fetched)

    async def close(self) -> None:
        if self._freshening is not None:
            self._freshening.cancel()
            await asyncio.gather(self._freshening, return_exceptions=True)

    # ---- inside

    async def _after_wrong_group(self, call: Call, shard_map: ShardMap, shard: int, refusal: WrongGroup) -> None:
        """Look for a newer map; while the shard hasn't arrived at its owner, the holder has it.

        Who refuses may be behind the map, and name a holder all the same: nobody else can say where the shard is
        before it has caught up. A holder that refuses sends us back to the owner; one that others were told of
        meanwhile is asked first.
        """
        if refusal.config_num > shard_map.num:
            shard_map = await self._refresh(call, beyond=shard_map.num)
        elif asyncio.get_running_loop().time() - self._looked_at >= REFRESH_S_MIN:
            shard_map = await self._fetch(call, NO_WAIT, 0)
        holder = self._holders.get(shard)
        if holder is not None:
            if holder.gid == call.asked_gid:
                del self._holders[shard]
        elif refusal.holder_gid not in (call.asked_gid, shard_map.owner(shard)):
            holder = await self._find(call, refusal.holder_gid)
            if holder is not None and shard_map is self._map:
                self._holders[shard] = holder

    async def _after_silence(self, call: Call, shard_map: ShardMap, shard: int) -> None:
        """When no replica of the group that was asked can be reached: turn to who had the shard before."""
        holder = self._holders.get(shard)
        group = holder or self._groups.get(shard_map.owner(shard))
        if group is None or not call.unreached.issuperset(group.addresses):
            return
        call.unreached.clear()
        call.last_error = None  # it has been heard
        if holder is None or not call.silent_gid:  # the owner is named, rather than who may have had it before
            call.silent_gid = group.gid
        self._holders.pop(shard, None)
        await self._look_back(call, shard, group.gid)

    async def _look_back(self, call: Call, shard: int, silent_gid: int) -> None:
        """If the group that doesn't answer never asked for the shard, an earlier owner serves it still."""
        assert self._map is not None
        newest = self._map
        async for earlier in self._earlier_maps(call):
            owner = earlier.owner(shard)
            if owner not in (NO_GROUP, newest.owner(shard), silent_gid):
                if self._map is newest:
                    self._holders[shard] = self.replicas(earlier, owner)
                return

    async def _find(self, call: Call, gid: int) -> Replicas | None:
        """Where the group is; one that isn't in the map any more serves its shards until they have moved."""
        if gid in self._groups or gid <= NO_GROUP:
            return self._groups.get(gid)
        async for earlier in self._earlier_maps(call):
            if gid in earlier.groups:
                return self.replicas(earlier, gid)
        return None

    def replicas(self, shard_map: ShardMap, gid: int) -> Replicas:
        """As in the latest map, or else as in `shard_map`."""
        known = self._groups.get(gid) or self._departed.get(gid)
        if known is None:
            known = self._departed[gid] = Replicas("shardkv", gid, shard_map.groups[gid], self._rng)
        return known

    async def _earlier_maps(self, call: Call) -> AsyncIterator[ShardMap]:
        """Backwards from the one before the latest, so many of them, or until no controller answers."""
        assert self._map is not None
        for num in range(self._map.num - 1, max(0, self._map.num - 1 - EARLIER_MAPS_MAX), -1):
            known = self._earlier.get(num)
            if known is None:
                left_s = call.deadline - asyncio.get_running_loop().time()
                if left_s <= 0:
                    return
                timeout_s = min(EARLIER_MAP_WAIT_S, left_s)
                errand = self._caller.call("an earlier shard map", None, is_write=False, timeout_s=timeout_s)
                try:
                    known = (await self.fetch(errand, num)).shard_map
                except RaftKVError:
                    return
                if len(self._earlier) >= EARLIER_MAPS_MAX:
                    del self._earlier[min(self._earlier)]
                self._earlier[num] = known
            yield known

    async def _refresh(self, call: Call, *, beyond: int, wait_ms: int = 0) -> ShardMap:
        """A map numbered above `beyond`, or, after `wait_ms`, the latest."""
        await call.before_deadline(self._lock.acquire(), "the shard map did not arrive")
        try:
            if self._map is not None and self._map.num > beyond:
                return self._map  # somebody fetched it meanwhile
            return await self._fetch(call, beyond if wait_ms else NO_WAIT, wait_ms)
        finally:
            self._lock.release()

    async def _fetch(self, call: Call, wait_after: int, wait_ms: int) -> ShardMap:
        loop = asyncio.get_running_loop()
        errand = call.errand("the shard map")
        wait_ms = max(0, min(wait_ms, int(1000 * (errand.attempt_s(loop.time()) - ANSWER_S))))
        body = [LATEST, wait_after if wait_ms else NO_WAIT, wait_ms]
        asked_at = loop.time()
        try:
            fetched = await self._caller.ask(errand, self.controllers_route, Verb.CONFIG, body, _fetched)
        except RaftKVError as error:  # it says nothing of what became of `call` itself
            call.tried.update(errand.tried)
            if isinstance(error, Timeout):
                hardly_asked = loop.time() - asked_at < call.timeout_s / 4
                if call.asked_gid and hardly_asked:  # the time went to the group
                    raise call.given_up(f"group {call.asked_gid} did not serve the shard") from None
                raise call.given_up("no leader of the controllers answered") from None
            raise call.judge_final(error) from None
        self._take(fetched, asked_at)
        assert self._map is not None
        return self._map

    def _take(self, fetched: Fetched, asked_at: float) -> None:
        self._looked_at = asked_at
        if fetched.map_time_ms >= self._map_time_ms:
            self._map_time_ms = fetched.map_time_ms
            self._fetched_at = asked_at
            self._freshen_due = asked_at + MAP_TIME_OLD_S
        shard_map = fetched.shard_map
        if self._map is not None and shard_map.num < self._map.num:
            return
        self._take_coordinators(fetched.coordinators)
        if self._map is not None and shard_map.num == self._map.num:
            return
        self._map = shard_map
        self._holders.clear()
        self._departed = {gid: group for gid, group in self._groups.items() if gid not in shard_map.groups}
        for gid, addresses in shard_map.groups.items():
            known = self._groups.get(gid)
            if known is None or known.addresses != addresses:
                self._groups[gid] = Replicas("shardkv", gid, addresses, self._rng)
        for gid in self._departed:
            del self._groups[gid]
        known_now = [*self._groups.values(), *self._departed.values(), *self._coordinators.values()]
        addresses_now = {address for group in known_now for address in group.addresses}
        self._caller.pool.keep_only(addresses_now | set(self._controllers.replicas.addresses))

    def _take_coordinators(self, coordinators: Mapping[int, tuple[str, ...]]) -> None:
        """They register without a new configuration."""
        for gid, addresses in coordinators.items():
            known = self._coordinators.get(gid)
            if known is None or known.addresses != addresses:
                self._coordinators[gid] = Replicas("coordinator", gid, addresses, self._rng)
        for gid in self._coordinators.keys() - coordinators.keys():
            del self._coordinators[gid]

    async def _freshen(self) -> None:
        loop = asyncio.get_running_loop()
        call = Call("map time", None, is_write=False, now=loop.time(), timeout_s=MAP_TIME_WAIT_S, rng=self._rng)
        try:
            await self._fetch(call, NO_WAIT, 0)
        except RaftKVError:
            self._freshen_due = self._unanswered_until = loop.time() + MAP_TIME_OLD_S  # go on with the old one
        finally:
            self._freshening = None


def _fetched(body: Any) -> Fetched:
    """Check a CONFIG reply."""
    if type(body) is not list or len(body) < 2 or type(body[0]) is not bytes or type(body[1]) is not int:
        raise ServerError(ServerError.code, "its reply to CONFIG is not a map and a time")
    try:
        return Fetched(ShardMap.decode(body[0]), body[1], _coordinators(body[3] if len(body) > 3 else []))
    except ValueError as error:
        raise ServerError(ServerError.code, str(error)) from None


def _coordinators(listed: Any) -> dict[int, tuple[str, ...]]:
    """[[gid, [address…]]…] by gid. Raise ValueError."""
    if type(listed) is not list or not all(type(group) is list and len(group) == 2 for group in listed):
        raise ValueError("the coordinators are not an array of groups")
    for gid, addresses in listed:
        good = type(gid) is int and type(addresses) is list
        if not good or not all(type(address) is str for address in addresses):
            raise ValueError("a group of coordinators is not a number and addresses")
    return {gid: tuple(addresses) for gid, addresses in listed if addresses}
