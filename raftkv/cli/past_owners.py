"""For `Status`: who holds the shards that their owners don't have yet, groups that have left among them.

A shard stays where it is until its owner has fetched it, and an owner that is dead can't tell of it. So the earlier
configurations say whom to ask. Only reads, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raftkv.cli.printers import ranges
from raftkv.cli.results import MoveHealth

if TYPE_CHECKING:
    from raftkv.cli.session import ControllersClient
    from raftkv.machines.shard_map import ShardMap

LOOK_BACK_MAX = 20
"""How many earlier configurations are read."""

HOLDING = ("exporting", "serving")
"""The states in which a group has a shard whole; the later here, the surer."""

Answer = Mapping[str, Any]
States = Mapping[int, Mapping[int, str]]
"""By gid, the state of each shard that is there."""


@dataclass(slots=True)
class Past:
    """What the earlier configurations say of some shards.

    `owners[shard]` are its other owners, the latest first; `since[shard]` is the configuration that gave it to its
    owner, or the earliest one read. `addresses` are those of every group that was an owner, where it was last.
    """

    owners: dict[int, list[int]] = field(default_factory=dict)
    since: dict[int, int] = field(default_factory=dict)
    addresses: dict[int, tuple[str, ...]] = field(default_factory=dict)
    is_whole: bool = True


async def look_back(client: ControllersClient, latest: ShardMap, shards: Iterable[int]) -> Past:
    """The earlier owners of the shards, back to where all shards were given up. Raises what `query` raises."""
    past = Past(owners={shard: [] for shard in shards})
    past.since = dict.fromkeys(past.owners, latest.num)
    known = dict(latest.groups)
    settled: set[int] = set()
    oldest = max(0, latest.num - LOOK_BACK_MAX)
    for num in range(latest.num - 1, oldest - 1, -1):
        config = await client.query(num)
        known = {**config.groups, **known}
        for shard, owners in past.owners.items():
            gid = config.owner(shard)
            if gid != latest.owner(shard):
                settled.add(shard)
                if gid and gid not in owners:
                    owners.append(gid)
            elif shard not in settled:
                past.since[shard] = num
        if config.given_up_ms:
            break
    else:
        past.is_whole = oldest == 0
    asked = {gid for owners in past.owners.values() for gid in owners}
    past.addresses = {gid: known[gid] for gid in sorted(asked)}
    return past


def states_of(groups: Mapping[int, Sequence[str]], answers: Mapping[str, Answer | None]) -> dict[int, dict[int, str]]:
    """The shards of each group that answers: as its leader says, or else the replica that has applied most."""
    states = {}
    for gid, addresses in groups.items():
        given = [answer for address in addresses if (answer := answers.get(address)) and answer["gid"] == gid]
        if given:
            best = max(given, key=lambda answer: (answer["state"] == "leader", answer["term"], _applied(answer)))
            states[gid] = {int(shard): str(state).lower() for shard, state in best["shards"]}
    return states


def _applied(answer: Answer) -> int:
    applied_index = answer.get("applied_index")
    return -1 if applied_index is None else int(applied_index)


def holder_of(shard: int, past: Past, states: States) -> int | None:
    """The earlier owner that serves the shard, or keeps it for the next one; None if nobody says so."""
    found = [gid for gid in past.owners[shard] if states.get(gid, {}).get(shard) in HOLDING]
    return max(found, key=lambda gid: HOLDING.index(states[gid][shard]), default=None)


def waiting_moves(
    latest: ShardMap,
    past: Past,
    states: States,
    leading: Iterable[int],
    moves: Sequence[MoveHealth],
    problems: list[str],
) -> list[MoveHealth]:
    """A row for each shard that somebody else holds and whose owner has none for it; adds them to `problems`.

    `states` are of all groups that answer, `leading` the groups that have a leader.
    """
    shown = {(move.shard, move.target) for move in moves}
    lacking = [
        shard
        for shard in past.owners
        if (shard, latest.owner(shard)) not in shown and states.get(latest.owner(shard), {}).get(shard) != "serving"
    ]
    waiting = []
    for shard in lacking:
        holder, owner = holder_of(shard, past, states), latest.owner(shard)
        if holder is not None:
            reason = _reason(owner, states, leading)
            waiting.append(MoveHealth(shard, holder, owner, past.since[shard], "waiting", 0, None, reason))
    _complain_of_waiting(latest, waiting, problems)
    unknown = sorted(set(lacking) - {move.shard for move in waiting})
    _complain_of_silent(latest, past, states, unknown, problems)
    return waiting


def _reason(owner: int, states: States, leading: Iterable[int]) -> str:
    if owner not in states:
        return f"group {owner} does not answer"
    if owner not in leading:
        return f"group {owner} has no leader"
    return f"group {owner} has not begun to fetch it"


def _complain_of_waiting(latest: ShardMap, waiting: Sequence[MoveHealth], problems: list[str]) -> None:
    """One line for all shards that wait for the same."""
    together: dict[tuple[int, int, str | None], list[int]] = {}
    for move in waiting:
        together.setdefault((move.source, move.target, move.waits_for), []).append(move.shard)
    for (source, target, reason), shards in sorted(together.items()):
        left = "" if source in latest.groups else f"; group {source} has left, but holds what it had: don't stop it"
        its, waits = ("its", "waits") if len(shards) == 1 else ("their", "wait")
        way = f"on {its} way from group {source} to group {target}"
        problems.append(f"{_name(shards)}, {way}, {waits}: {reason}{left}")


def _name(shards: Sequence[int]) -> str:
    return f"shard{'' if len(shards) == 1 else 's'} {ranges(shards)}"


def _complain_of_silent(
    latest: ShardMap, past: Past, states: States, unknown: Sequence[int], problems: list[str]
) -> None:
    """Shards that nobody holds who answers, though an earlier owner that doesn't answer may; the owner first, if it is
    silent too: it is the one that most likely has them."""
    together: dict[tuple[int, int], list[int]] = {}
    for shard in unknown:
        silent = next((gid for gid in past.owners[shard] if gid not in states), None)
        if silent is not None:
            owner = latest.owner(shard)
            together.setdefault((0 if owner in states else owner, silent), []).append(shard)
    for (owner, gid), shards in sorted(together.items()):
        if owner:
            why = f"group {owner}, the owner, does not answer; nor does group {gid}, an earlier one that may hold them"
        else:
            why = f"group {gid}, an earlier owner, may hold what is missing, and does not answer"
        problems.append(f"{_name(shards)}: {why}")
    if unknown and not past.is_whole:
        problems.append(
            f"{_name(unknown)}: no group is known to hold what is missing; only the owners of the last {LOOK_BACK_MAX} "
            "configurations were asked"
        )
