"""What a role proposes on its own account, as one awaits it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack

from raftkv.daemons.replica import Replica
from raftkv.protocol.errors import RaftKVError, from_result


async def propose(replica: Replica, command: list[Any]) -> list[Any]:
    """Propose a command and wait until it is applied: its result [0, …]. Raise what refused it, also at apply."""
    applied: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
    replica.submit(msgpack.packb(command), command, _settle, applied)
    result = await applied
    if result[0] != 0:
        raise from_result(result)
    return result


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, RaftKVError):
        future.set_exception(result)
    else:
        future.set_result(result)


def submit(replica: Replica, command: list[Any]) -> asyncio.Future[Any]:
    """Propose a command together with others of this turn: what comes of it, a result or a RaftKVError, as a value."""
    applied: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    replica.submit(msgpack.packb(command), command, _give, applied)
    return applied


def _give(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)
