"""What `RaftKV` and `Controllers` share: connections, routing and the client's sessions."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from raftkv.client.calls import Caller
from raftkv.client.pool import Pool
from raftkv.client.retry import Call
from raftkv.client.routing import Router
from raftkv.client.sessions import Sessions
from raftkv.protocol.addresses import parse_addresses
from raftkv.protocol.errors import BadRequest, Expired, Malformed, RaftKVError, ServerError, from_result
from raftkv.protocol.frames import encode_body
from raftkv.protocol.messages import Verb

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

TIMEOUT_S_DEFAULT = 10.0

CONTROLLERS_SHARD = -1
"""Stands for the shard in commands to the controllers."""


class Cluster:
    """One client of one cluster. It belongs to the event loop in which it is first used."""

    def __init__(
        self,
        controllers: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        ssl: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Raise BadRequest for addresses that aren't HOST:PORT, or none at all."""
        addresses = parse_addresses(controllers)
        if not addresses:
            raise BadRequest("no controller's address is given")
        if not timeout_s > 0:
            raise BadRequest(f"the timeout must be more than 0 s, not {timeout_s:g}")
        rng = rng if rng is not None else random.SystemRandom()
        self.rng = rng
        self.timeout_s = timeout_s
        self.addresses = addresses
        self.pool = Pool(ssl)
        self.caller = Caller(self.pool, rng)
        self.router = Router(addresses, self.caller, rng)
        self.sessions = Sessions(rng)
        self.on_close: dict[Callable[[], None], None] = {}
        """What has to be stopped first."""
        self._unsettled: dict[Call, None] = {}

    def call(self, name: str, key: bytes | None = None, *, is_write: bool = False) -> Call:
        return self.caller.call(name, key, is_write=is_write, timeout_s=self.timeout_s)

    async def write(
        self,
        call: Call,
        shard: int,
        op: int,
        args: Sequence[Any],
        result_type: type[T],
    ) -> T:
        """What command `op` answers after its 0, of the type that it must have. Applied exactly once.

        All attempts carry the same (client id, seq, stamp). A command that was certainly refused because
        our map time was too old begins again with a new one, once.
        """
        router = self.router
        await router.freshen_map_time(call)
        session = self.sessions.of_shard(shard)
        seq = session.try_begin()
        if seq is None:
            seq = await call.before_deadline(session.begin(), "earlier writes of the same client did not end")
        self._unsettled[call] = None
        try:
            header = [op, shard, self.sessions.client_id, seq, session.first_unacked]
            try:
                return await self._send(call, shard, [*header, router.map_time_ms, *args], result_type)
            except Expired:  # certainly: it would be OutcomeUnknown if an earlier attempt could have applied
                await router.renew_map_time(call)
                return await self._send(call, shard, [*header, router.map_time_ms, *args], result_type)
        finally:
            del self._unsettled[call]
            session.end(seq)

    @contextlib.contextmanager
    def unsettled(self, call: Call) -> Iterator[None]:
        """While `call`, a write, is under way."""
        self._unsettled[call] = None
        try:
            yield
        finally:
            del self._unsettled[call]

    def unsettled_writes(self) -> list[str]:
        """Writes in progress that may have applied already, as text: what a Ctrl-C has to mention."""
        return [call.what for call in self._unsettled if call.may_have_applied]

    async def close(self) -> None:
        for stop in list(self.on_close):
            stop()
        await self.router.close()
        await self.pool.close()

    async def _send(self, call: Call, shard: int, command: list[Any], result_type: type[T]) -> T:
        encoded = encode_body(command)
        decode = result_of(result_type)
        if shard == CONTROLLERS_SHARD:
            return await self.caller.ask(call, self.router.controllers_route, Verb.CONTROL, [encoded], decode)
        return await self.caller.ask(
            call,
            lambda call: self.router.route(call, shard),
            Verb.WRITE,
            lambda route: [route.config_num, encoded],
            decode,
        )


def result_of(result_type: type[T]) -> Callable[[Any], T]:
    def decode(result: Any) -> T:
        """What stands in a result [0, it, …]; raise the error that any other stands for."""
        if type(result) is not list or not result or type(result[0]) is not int:
            raise bad_reply("a write")
        if result[0] != 0:
            try:
                error = from_result(result)
            except Malformed:
                raise bad_reply("a write") from None
            raise error
        if len(result) < 2 or type(result[1]) is not result_type:
            raise bad_reply("a write")
        value: T = result[1]
        return value

    return decode


def bad_reply(to: str) -> RaftKVError:
    """The server's reply isn't one: nothing is known of what it did."""
    return ServerError(ServerError.code, f"its reply to {to} can't be understood")
