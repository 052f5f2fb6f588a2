"""Who answers at the addresses of a Join: a wrong one can't be taken back once shards depend on it.

Only asks, all at once and not for long; what doesn't answer may be a daemon that isn't started yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raftkv.cli.exit_codes import LocalFailure

if TYPE_CHECKING:
    from raftkv.cli.session import ControllersClient

LOOK_TIMEOUT_S = 0.8


async def look_before_join(
    client: ControllersClient, controllers: Sequence[str], groups: Mapping[int, Sequence[str]], timeout_s: float
) -> tuple[list[str], list[str]]:
    """The addresses that don't answer, and those of other replicas of which the ones that answer know.

    Raises LocalFailure if one is somebody else's; nothing has been sent then.
    """
    from raftkv.protocol.errors import HandshakeRefused, RaftKVError

    async def ask(address: str) -> Mapping[str, Any] | HandshakeRefused | None:
        try:
            async with asyncio.timeout(min(timeout_s, LOOK_TIMEOUT_S)):
                return await client.status_of(address)
        except HandshakeRefused as error:
            return error
        except (RaftKVError, OSError, TimeoutError):
            return None

    asked = [(gid, address) for gid, addresses in groups.items() for address in addresses]
    every = list(dict.fromkeys([*controllers, *(address for _, address in asked)]))
    answers = dict(zip(every, await asyncio.gather(*map(ask, every)), strict=True))
    ids = [answer["cluster_id"] for address in controllers if isinstance(answer := answers[address], Mapping)]
    cluster_id = next((known for known in ids if known), "")
    for gid, address in asked:
        answer = answers[address]
        wrong = f"{answer}" if isinstance(answer, HandshakeRefused) else None
        if isinstance(answer, Mapping):
            wrong = _wrong(gid, answer, cluster_id)
        if wrong is not None:
            raise LocalFailure(f"Join: {address} can't be a replica of group {gid}: {wrong}; nothing was changed")
    silent = [address for _, address in asked if answers[address] is None]
    unnamed: dict[str, None] = {}
    for gid, address in asked:
        if isinstance(answer := answers[address], Mapping):
            unnamed |= dict.fromkeys(known for known in answer["members"].values() if known not in groups[gid])
    return silent, list(unnamed)


def _wrong(gid: int, answer: Mapping[str, Any], cluster_id: str) -> str | None:
    """Why that answer isn't one of a replica of the group in this cluster; None if it may be."""
    if answer["role"] != "shardkv":
        return f"it is {answer['role']} {answer['replica']}"
    if answer["gid"] != gid:
        return f"it is a replica of group {answer['gid']}"
    if cluster_id and answer["cluster_id"] and answer["cluster_id"] != cluster_id:
        return f"it belongs to another cluster, {answer['cluster_id']}, not to {cluster_id}"
    return None
