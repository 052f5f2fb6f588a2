"""Asking the leader of another group, whoever that is just now.

One connection per replica, kept; one pass over the group's replicas per question. It never retries what was refused:
when nobody leads or answers, the error says which, in words for the status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from raftkv.daemons.options import DaemonOptions
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import (
    ConnectFailed,
    ConnectionLost,
    HandshakeRefused,
    NoAnswer,
    NotLeader,
    OutcomeUnknown,
    RaftKVError,
    TlsRefused,
    Unavailable,
    WrongPeer,
)
from raftkv.protocol.limits import MEMBERS_MAX
from raftkv.protocol.messages import Hello
from raftkv.storage.store import Store

if TYPE_CHECKING:
    import ssl

ANSWER_TIMEOUT_S = 3.0


def named_client(options: DaemonOptions, store: Store) -> Callable[[], Hello]:
    """To those whom a daemon asks it is a client, but one with a name."""

    def hello() -> Hello:
        cluster_id = store.identity.cluster_id
        return Hello(cluster_id=cluster_id, role=options.role, gid=options.gid, replica=options.replica)

    return hello


class GroupCalls:
    """Connections to other groups, all of one role. `hello` says who asks."""

    def __init__(self, hello: Callable[[], Hello], role: str = "shardkv", *, ssl: ssl.SSLContext | None = None) -> None:
        self._hello = hello
        self._role = role
        self._ssl = ssl
        self._channels: dict[str, Channel] = {}
        self._dialling: dict[str, asyncio.Lock] = {}
        self._leaders: dict[int, str] = {}

    async def ask(self, gid: int, addresses: Sequence[str], verb: int, body: list[Any]) -> Any:
        """The answer of the leader of group `gid` (0: the controllers), whose replicas are at `addresses`.

        The question must be one that may be asked twice.
        Raise what the leader refuses it with, or Unavailable when no replica leads or none answers.
        """
        tried: dict[str, RaftKVError] = {}
        queue = list(addresses)
        if gid in self._leaders:
            queue.insert(0, self._leaders[gid])
        while queue:
            address = queue.pop(0)
            if address in tried:
                continue
            try:
                channel = await self._channel(address, gid)
                answer = await self._request(channel, verb, body)
            except NotLeader as error:
                tried[address] = error
                if error.leader_address is not None and len(tried) <= MEMBERS_MAX:  # it need not be in the map
                    queue.insert(0, error.leader_address)
            except (Unavailable, ConnectionLost, HandshakeRefused, OutcomeUnknown) as error:
                tried[address] = error
            except RaftKVError:
                self._leaders[gid] = address
                raise
            else:
                self._leaders[gid] = address
                return answer
        self._leaders.pop(gid, None)
        raise _nobody(self._name(gid), addresses, tried)

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._dialling.clear()

    async def _request(self, channel: Channel, verb: int, body: list[Any]) -> Any:
        heard = channel.replies_received
        try:
            return await channel.request(verb, body, timeout_s=ANSWER_TIMEOUT_S)
        except NoAnswer:
            if channel.replies_received == heard:
                channel.abort("no answer")  # half-open, or hung
            raise

    async def _channel(self, address: str, gid: int) -> Channel:
        """The connection to `address`; dialled once however many want it."""
        async with self._dialling.setdefault(address, asyncio.Lock()):
            channel = self._channels.get(address)
            if channel is None or channel.closed:
                channel = await Channel.open(address, self._hello(), ssl=self._ssl)
                self._channels[address] = channel
        hello = channel.server_hello
        if hello.role != self._role or hello.gid != gid:
            raise WrongPeer(f"{address} is {hello}, not a replica of {self._name(gid)}")
        return channel

    def _name(self, gid: int) -> str:
        return f"group {gid}" if self._role == "shardkv" else f"the group of the {self._role}s"


def _nobody(name: str, addresses: Sequence[str], tried: dict[str, RaftKVError]) -> RaftKVError:
    """Why there was no answer: what a replica said, that none leads, or that none is there."""
    for error in tried.values():
        if isinstance(error, Unavailable) and not isinstance(error, ConnectFailed):
            return error
    if any(isinstance(error, (NotLeader, OutcomeUnknown)) for error in tried.values()):
        return Unavailable(f"{name} has no leader")
    for error in tried.values():
        if isinstance(error, TlsRefused):
            return Unavailable(f"{name} can't be asked: {error}")
    where = ", ".join(addresses) or "an address that any configuration names"
    return Unavailable(f"{name} does not answer at {where}")
