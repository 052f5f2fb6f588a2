"""Carrying out one request: attempt after attempt, until it is answered, refused, or its deadline passes.

The same for controllers and groups; `Route` says whom to ask. It never sends an attempt of a write
after the request ended, and it always says what it knows: see `retry` for the rule.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from raftkv.client.pool import Pool, check_server
from raftkv.client.replicas import Replicas
from raftkv.client.retry import Call, Step, brief
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import (
    ConnectFailed,
    HandshakeRefused,
    NoAnswer,
    NotLeader,
    RaftKVError,
    TlsRefused,
    Unavailable,
)
from raftkv.protocol.limits import CONNECT_TIMEOUT_S, DIAL_PATIENCE_S

T = TypeVar("T")


class Route(NamedTuple):
    """Whom to ask, and by which configuration."""

    config_num: int
    replicas: Replicas


class Caller:
    """Makes attempts. `rng` is for the jitter of back-offs."""

    def __init__(self, pool: Pool, rng: random.Random) -> None:
        self.pool = pool
        self.retries = 0
        """Attempts that failed and were followed by another one, of all requests so far."""
        self._rng = rng

    def call(self, name: str, key: bytes | None, *, is_write: bool, timeout_s: float) -> Call:
        """A new request whose deadline runs from now on."""
        now = asyncio.get_running_loop().time()
        return Call(name, key, is_write=is_write, now=now, timeout_s=timeout_s, rng=self._rng)

    async def ask(
        self,
        call: Call,
        route_of: Callable[[Call], Awaitable[Route]],
        verb: int,
        body: list[Any] | Callable[[Route], list[Any]],
        decode: Callable[[Any], T],
        *,
        any_replica: bool = False,
    ) -> T:
        """The decoded reply.

        `route_of(call)` is asked before each attempt. `decode` raises RaftKVError for a reply that isn't one;
        that counts as the server's answer. Raises what `retry` decides: a refusal, OutcomeUnknown, Timeout.
        """
        loop = asyncio.get_running_loop()
        while True:
            if self.pool.closed:
                raise call.judge_final(Unavailable(f"{call.what}: the client was closed"))
            route = await route_of(call)
            replicas = route.replicas
            now = loop.time()
            if not call.has_time(now):
                raise call.given_up(replicas.silence)
            address = replicas.pick_any(now) if any_replica else replicas.pick(now)
            try:
                channel = self.pool.ready(address)
                if channel is not None and channel.opened_s < call.mute_s and not channel.in_flight:
                    channel.abort("it may be cut off like the one before")  # dialling tells sooner than waiting
                    channel = None
                if channel is None:
                    patience_s = DIAL_PATIENCE_S if len(replicas.addresses) > 1 else CONNECT_TIMEOUT_S
                    channel = await self.pool.get(address, timeout_s=min(patience_s, call.deadline - now))
                    now = loop.time()
                check_server(channel, replicas.role, replicas.gid)
                reply = await self._attempt(call, channel, verb, body(route) if callable(body) else body, now)
                decoded = decode(reply)
            except HandshakeRefused as error:
                self._not_ours(call, replicas, address, error, loop.time())
                step: Step = "redirect"
            except RaftKVError as error:
                self._learn(replicas, address, error, loop.time())
                step = call.judge(error, address)
            else:
                call.in_flight = False
                if not any_replica:
                    replicas.answered(address)
                return decoded
            await self._pause(call, route, address, step, any_replica)

    async def _attempt(self, call: Call, channel: Channel, verb: int, body: list[Any], now: float) -> Any:
        heard = channel.replies_received
        call.in_flight = True
        try:
            return await channel.request(verb, body, timeout_s=max(call.attempt_s(now), 0.001))
        except NoAnswer:
            if channel.replies_received == heard:
                channel.abort("no answer")  # to nobody: half-open, or hung; the next one dials anew
                call.mute_s = asyncio.get_running_loop().time()
            raise

    def _learn(self, replicas: Replicas, address: str, error: RaftKVError, now: float) -> None:
        if isinstance(error, NotLeader):
            replicas.not_leader(address, error.leader_address, now)
        elif isinstance(error, (ConnectFailed, NoAnswer)):  # a lost connection alone says little: dialling will
            replicas.failed(address, now, silent=isinstance(error, NoAnswer))
        elif error.retry == "redirect":
            replicas.not_leader(address, None, now)
        elif error.final:
            replicas.answered(address)

    def _not_ours(self, call: Call, replicas: Replicas, address: str, error: HandshakeRefused, now: float) -> None:
        """Somebody else lives there. Others of the group may still be right; when none is, say so at once.

        With TLS that only one end speaks, or accepts, it is enough that none of the others shows any sign of life.
        """
        call.in_flight = False
        call.last_error = error
        call.tried[address] = brief(error)
        call.refused.add(address)
        replicas.failed(address, now, silent=False)
        hopeless = call.refused | call.unreached if isinstance(error, TlsRefused) else call.refused
        if hopeless.issuperset(replicas.addresses):
            raise call.judge_final(error)

    async def _pause(self, call: Call, route: Route, address: str, step: Step, any_replica: bool) -> None:
        """Before the next attempt: none if it goes to a replica that hasn't been asked in this round."""
        loop = asyncio.get_running_loop()
        self.retries += 1
        call.visited.add(address)
        now = loop.time()
        if step == "redirect" and not any_replica and route.replicas.pick(now) not in call.visited:
            return
        if step == "redirect" and any_replica and not call.visited.issuperset(route.replicas.addresses):
            return
        call.visited.clear()
        pause_s = min(call.next_backoff_s(), call.deadline - now)
        if pause_s > 0:
            await asyncio.sleep(pause_s)
