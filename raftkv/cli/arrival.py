"""After a Join, Leave or Move: wait until the shards that it moves are served by their new owners.

It only looks, at the groups' leaders; the groups move the shards whether anybody waits or not. Ending early
never undoes anything.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from raftkv.cli.exit_codes import ExitCode, LocalFailure
from raftkv.cli.results import count

if TYPE_CHECKING:
    from raftkv.cli.session import ControllersClient
    from raftkv.machines.shard_map import ShardMap

POLL_S = 0.1
POLL_S_MAX = 0.5
LOOK_TIMEOUT_S = 2.0

Show = Callable[[int, str], None]
"""Called with the number of shards that have arrived, and a text on the others."""


async def wait_for_shards(client: ControllersClient, what: str, config_num: int, timeout_s: float) -> None:
    """Until every shard that configuration `config_num` has moved is served by its owner.

    `timeout_s` counts from the last progress. Raises LocalFailure, naming what it waits for.
    """
    from raftkv.machines.balance import moves

    if config_num == 0:
        return
    before, after = await client.query(config_num - 1), await client.query(config_num)
    moved = [shard for shard, _, new in moves(before.owners, after.owners) if new != 0]
    if not moved:
        return
    loop = asyncio.get_running_loop()
    deadline_s, seen, pause_s = loop.time() + timeout_s, None, POLL_S
    with _progress(what, len(moved)) as show:
        while True:
            latest = await client.query()
            waiting, progress, reason = await _look(client, latest, moved)
            show(len(moved) - len(waiting), reason)
            if not waiting:
                return
            if progress != seen:
                deadline_s, seen, pause_s = loop.time() + timeout_s, progress, POLL_S
            elif loop.time() > deadline_s:
                raise LocalFailure(
                    f"{what}: configuration {config_num} is made, but {count(len(waiting), 'shard')} of "
                    f"{len(moved)} have not arrived, without progress for {timeout_s:g} s: {reason}; they go on "
                    "moving: `raftkv-ctl Status` shows how",
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
    progress = (latest.num, waiting, [(shard, moving[shard]["bytes"]) for shard in waiting if shard in moving])
    return waiting, progress, _reason(latest, waiting, moving, leaders)


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
    return f"shard {shard} from group {row['from']} to {gid}: {row['waits_for'] or row['phase']}"


def _progress(what: str, total: int) -> AbstractContextManager[Show]:
    """A bar on standard error if that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return nullcontext(lambda arrived, reason: None)
    return _Bar(what, total)


class _Bar(AbstractContextManager[Show]):
    """A progress bar that goes when all has arrived."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        text, why = TextColumn("{task.description}"), TextColumn("{task.fields[why]}")
        columns = (text, BarColumn(), MofNCompleteColumn(), why)
        self._progress = Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._progress.add_task(what, total=total, why="")

    def __enter__(self) -> Show:
        self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, arrived: int, reason: str) -> None:
        self._progress.update(self._task, completed=arrived, why=reason)
