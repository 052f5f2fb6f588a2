"""After a Join, Leave or Move: wait until the shards that it moves are served by their new owners; or, for Wait, all.

It only looks, at the groups' leaders; the groups move the shards whether anybody waits or not. Ending early
never undoes anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raftkv.cli.exit_codes import ExitCode, LocalFailure, exit_code_of
from raftkv.cli.progress import progress
from raftkv.cli.results import count

if TYPE_CHECKING:
    from raftkv.cli.session import ControllersClient
    from raftkv.machines.shard_map import ShardMap

POLL_S = 0.1
POLL_S_MAX = 0.5
LOOK_TIMEOUT_S = 2.0

GO_ON = "the shards go on moving: `raftkv-ctl Status` shows how, `raftkv-ctl Wait` waits for them"
"""What to say when the waiting ends early."""


async def wait_for_change(
    client: ControllersClient, what: str, config_num: int, timeout_s: float, shard: int | None = None
) -> None:
    """Until every shard that configuration `config_num` has moved, or just `shard`, is served by its owner.

    `timeout_s` counts from the last progress. Raises LocalFailure, naming what it waits for; whatever it is, it says
    that the configuration is made.
    """
    from raftkv.protocol.errors import RaftKVError

    made = f"configuration {config_num} is made"
    try:
        moved = await _moved_by(client, config_num) if shard is None else [shard]
        await _wait(client, what, moved, timeout_s, f"{made}, but ")
    except RaftKVError as error:
        raise LocalFailure(f"{what}: {made}; then: {error}; {GO_ON}", exit_code_of(error)) from None


async def wait_for_all(client: ControllersClient, what: str, timeout_s: float) -> None:
    """Until every shard that has an owner is served by it. As `wait_for_change`; raises RaftKVError too."""
    await _wait(client, what, range((await client.query()).shards), timeout_s, "")


async def _moved_by(client: ControllersClient, config_num: int) -> list[int]:
    from raftkv.machines.balance import moves

    if config_num == 0:
        return []
    before, after = await client.query(config_num - 1), await client.query(config_num)
    return [shard for shard, _, new in moves(before.owners, after.owners) if new != 0]


async def _wait(client: ControllersClient, what: str, shards: Sequence[int], timeout_s: float, made: str) -> None:
    """Until the shards are served by their owners of the latest configuration. `made` begins the complaint."""
    if not shards:
        return
    loop = asyncio.get_running_loop()
    deadline_s, seen, pause_s = loop.time() + timeout_s, None, POLL_S
    with progress(what, len(shards)) as show:
        while True:
            latest = await client.query()
            waiting, state, reason = await _look(client, latest, shards)
            show(len(shards) - len(waiting), reason)
            if not waiting:
                return
            if state != seen:
                deadline_s, seen, pause_s = loop.time() + timeout_s, state, POLL_S
            elif loop.time() > deadline_s:
                have = "has" if len(waiting) == 1 else "have"
                raise LocalFailure(
                    f"{what}: {made}{count(len(waiting), 'shard')} of {len(shards)} {have} not arrived, without "
                    f"progress for {timeout_s:g} s: {reason}; {GO_ON}",
                    ExitCode.UNAVAILABLE,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(POLL_S_MAX, 1.5 * pause_s)


async def _look(
    client: ControllersClient, latest: ShardMap, moved: Sequence[int]
) -> tuple[list[int], tuple[Any, ...], str]:
    """The shards that are still awaited, what differs if anything has happened, and the reason for the first."""
    from raftkv.cli.health import ask, leaders_of

    gids = sorted({latest.owner(shard) for shard in moved if latest.owner(shard)})
    addresses = [address for gid in gids for address in latest.groups[gid]]
    leaders = leaders_of(latest.groups, await ask(client, addresses, LOOK_TIMEOUT_S))
    waiting = [shard for shard in moved if latest.owner(shard) and not _serves(leaders.get(latest.owner(shard)), shard)]
    rows = [row for answer in leaders.values() for row in answer.get("migrations", ())]
    moving = {int(row["shard"]): row for row in rows if row["phase"] != "release"}
    state = (latest.num, waiting, [(shard, moving[shard]["bytes"]) for shard in waiting if shard in moving])
    return waiting, state, _reason(latest, waiting, moving, leaders)


def _serves(leader: Mapping[str, Any] | None, shard: int) -> bool:
    return leader is not None and [shard, "serving"] in [list(row) for row in leader["shards"]]


def _reason(
    latest: ShardMap, waiting: Sequence[int], moving: Mapping[int, Any], leaders: Mapping[int, Mapping[str, Any]]
) -> str:
    """What the first of them waits for."""
    if not waiting:
        return ""
    shard = waiting[0]
    gid = latest.owner(shard)
    if gid not in leaders:
        return f"group {gid} has no leader that answers"
    row = moving.get(shard)
    if row is None:
        return f"group {gid} has not begun to fetch shard {shard}"
    return (
        f"shard {shard} from group {row['from']} to {gid}: {row['waits_for'] or row.get('slowed_by') or row['phase']}"
    )
