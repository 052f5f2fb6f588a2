"""One connection per server, made when it is first needed and again when it broke.

Dialling is shared: however many requests want the same server, it is dialled once, and goes on when one of
them is cancelled. Tasks are the pool's and end with `close`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING

from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import ConnectFailed, WrongPeer
from raftkv.protocol.limits import CONNECT_TIMEOUT_S
from raftkv.protocol.messages import Hello

if TYPE_CHECKING:
    import ssl


class Pool:
    """`cluster_id` is learned from the first controller that knows it, and then demanded of every server."""

    def __init__(self, ssl: ssl.SSLContext | None = None) -> None:
        self.cluster_id = b""
        self._ssl = ssl
        self._channels: dict[str, Channel] = {}
        self._dials: dict[str, asyncio.Task[Channel]] = {}
        self.closed = False

    def ready(self, address: str) -> Channel | None:
        """The connection to `address` if there is one."""
        channel = self._channels.get(address)
        return channel if channel is not None and not channel.closed else None

    async def get(self, address: str, *, timeout_s: float) -> Channel:
        """Raise ConnectFailed, or the HandshakeRefused that the server answered."""
        channel = self.ready(address)
        if channel is not None:
            return channel
        if self.closed:
            raise ConnectFailed(address, "the client is closed")
        task = self._dials.get(address)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._dial(address), name=f"dial {address}")
            self._dials[address] = task
            task.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(task)
        except TimeoutError:
            raise ConnectFailed(address, f"no connection within {timeout_s:.3g} s") from None

    def keep_only(self, addresses: Collection[str]) -> None:
        """Close the idle connections to servers that are not in the cluster any more."""
        for address, channel in list(self._channels.items()):
            if address not in addresses and channel.in_flight == 0:
                del self._channels[address]
                channel.close()

    async def close(self) -> None:
        self.closed = True
        tasks = list(self._dials.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            channel.close()
        for channel in channels:
            await channel.wait_closed()

    async def _dial(self, address: str) -> Channel:
        try:
            channel = await Channel.open(
                address, Hello.of_client(self.cluster_id), ssl=self._ssl, timeout_s=CONNECT_TIMEOUT_S
            )
        finally:
            self._dials.pop(address, None)
        self._channels[address] = channel
        channel.on_closed = self._forget
        hello = channel.server_hello
        if hello.role == "controller" and hello.cluster_id and not self.cluster_id:
            self.cluster_id = hello.cluster_id
        return channel

    def _forget(self, channel: Channel) -> None:
        if self._channels.get(channel.address) is channel:
            del self._channels[channel.address]


def check_server(channel: Channel, role: str, gid: int) -> None:
    """Raise WrongPeer unless a replica of that role and group lives there."""
    hello = channel.server_hello
    if hello.role != role or hello.gid != gid:
        meant = f"a replica of group {gid}" if role == "shardkv" else f"a {role}"
        raise WrongPeer(f"{channel.address} is {hello}, not {meant}; check the addresses")


def _retrieve(task: asyncio.Task[Channel]) -> None:
    """Whoever waited has got the error; when nobody did, there is nothing to report."""
    if not task.cancelled():
        task.exception()
