"""`raftkv-ctl Status`: ask every replica of the cluster, and say what isn't well.

Read-only: it changes nothing, and one replica that doesn't answer never hides the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raftkv.cli.past_owners import Past, holder_of, look_back, states_of, waiting_moves
from raftkv.cli.results import ClusterHealth, MoveHealth, ReplicaHealth, ShardHealth

if TYPE_CHECKING:
    from raftkv.cli.session import ControllersClient
    from raftkv.machines.shard_map import ShardMap

REPLICA_TIMEOUT_S = 3.0
"""How long one replica may take before it counts as down."""

Answer = Mapping[str, Any]


async def cluster_health(client: ControllersClient, controllers: Sequence[str], timeout_s: float) -> ClusterHealth:
    """What every replica says. Raises RaftKVError only when no controller answers at all."""
    patience_s = min(timeout_s, REPLICA_TIMEOUT_S)
    answers = await ask(client, controllers, patience_s)
    controllers = all_members(controllers, answers)
    answers |= await ask(client, [address for address in controllers if address not in answers], patience_s)
    problems: list[str] = []
    try:
        shard_map: ShardMap | None = await client.query()
    except Exception as error:
        if not _is_refusal(error) or not any(answers.values()):
            raise
        shard_map = None
        problems.append(f"the shard map can't be read: {error}")
    replicas = replicas_of("controller", None, controllers, answers, problems)
    coordinators = coordinators_of(answers)
    shards: list[ShardHealth] = []
    moves: list[MoveHealth] = []
    if shard_map is not None:
        group_answers = await ask(client, addresses_of(shard_map.groups), patience_s)
        for gid in sorted(shard_map.groups):
            replicas += replicas_of("shardkv", gid, shard_map.groups[gid], group_answers, problems)
        leaders = leaders_of(shard_map.groups, group_answers)
        moves = moves_of(leaders, problems)
        past = await _past(client, shard_map, leaders, moves, problems)
        left = {gid: past.addresses[gid] for gid in past.addresses if gid not in shard_map.groups}
        unasked = [address for address in addresses_of(left) if address not in group_answers]
        group_answers |= await ask(client, unasked, patience_s)
        states = states_of({**shard_map.groups, **left}, group_answers)
        needed = {holder_of(shard, past, states) for shard in past.owners} | {move.source for move in moves}
        for gid in [gid for gid in left if gid in needed]:
            replicas += replicas_of("shardkv", gid, left[gid], group_answers, problems, has_left=True)
        moves += waiting_moves(shard_map, past, states, leaders, moves, problems)
        moves.sort(key=lambda move: (move.shard, move.config_number))
        shards = shards_of(shard_map, leaders, moves, problems)
    for _, addresses_of_them in sorted(coordinators.items()):
        coordinator_answers = await ask(client, addresses_of_them, patience_s)
        replicas += replicas_of("coordinator", None, addresses_of_them, coordinator_answers, problems)
    return ClusterHealth(shard_map.num if shard_map else None, replicas, shards, moves, problems)


def coordinators_of(answers: Mapping[str, Answer | None]) -> dict[int, tuple[str, ...]]:
    """The addresses of each group of coordinators, as the most advanced of these controllers knows them."""
    known = [answer for answer in answers.values() if answer and answer.get("coordinators")]
    latest = max(known, key=lambda answer: int(answer.get("applied_index", 0)), default=None)
    return {} if latest is None else {int(gid): tuple(addresses) for gid, addresses in latest["coordinators"]}


def all_members(given: Sequence[str], answers: Mapping[str, Answer | None]) -> list[str]:
    """The addresses that were given, and those that the replicas there name as members of their group.

    A replica may be given by another name than the members call it; what it says of itself decides.
    """
    known = {answer["address"] for answer in answers.values() if answer}
    named = [address for answer in answers.values() if answer for address in answer["members"].values()]
    return [*given, *(address for address in dict.fromkeys(named) if address not in known and address not in given)]


def addresses_of(groups: Mapping[int, Sequence[str]]) -> list[str]:
    """Those of all the groups, once each."""
    return list(dict.fromkeys(address for addresses in groups.values() for address in addresses))


async def _past(
    client: ControllersClient,
    shard_map: ShardMap,
    leaders: Mapping[int, Answer],
    moves: Sequence[MoveHealth],
    problems: list[str],
) -> Past:
    """The earlier owners of the shards that may be held by a group that Status wouldn't ask, or wouldn't show."""
    coming = {(move.shard, move.target) for move in moves if move.phase != "release"}
    from_elsewhere = {move.shard for move in moves if move.source not in shard_map.groups}
    serving = {
        (shard, gid) for gid, leader in leaders.items() for shard, state in leader["shards"] if state == "serving"
    }
    settled = {*coming, *serving}
    shards = [
        shard
        for shard, gid in enumerate(shard_map.owners)
        if gid and (shard in from_elsewhere or (shard, gid) not in settled)
    ]
    if not shards:
        return Past()
    try:
        return await look_back(client, shard_map, shards)
    except Exception as error:
        if not _is_refusal(error):
            raise
        problems.append(f"the earlier configurations can't be read, so groups that have left are not shown: {error}")
        return Past()


async def ask(client: ControllersClient, addresses: Sequence[str], timeout_s: float) -> dict[str, Answer | None]:
    """The Status reply of each address; None where none came in time."""

    async def one(address: str) -> Answer | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await client.status_of(address)
        except Exception as error:
            if not _is_refusal(error):
                raise
            return None

    return dict(zip(addresses, await asyncio.gather(*(one(address) for address in addresses)), strict=True))


def _is_refusal(error: Exception) -> bool:
    """Whether a server or the network said no; anything else is a bug and must surface."""
    from raftkv.protocol.errors import RaftKVError

    return isinstance(error, RaftKVError | OSError | TimeoutError)


def replicas_of(
    role: str,
    gid: int | None,
    addresses: Sequence[str],
    answers: Mapping[str, Answer | None],
    problems: list[str],
    *,
    has_left: bool = False,
) -> list[ReplicaHealth]:
    """The replicas of one Raft group; adds what is wrong with them to `problems`."""
    name = f"group {gid}" if gid is not None else f"the {role}s"
    if has_left:
        name += ", which has left"
    given = {address: answers.get(address) for address in addresses}
    # Of several that call themselves leader only the one of the highest term can be.
    leader = max(
        (answer for answer in given.values() if answer and answer["state"] == "leader"),
        key=lambda answer: int(answer["term"]),
        default=None,
    )
    ids = {addr: int(replica) for answer in given.values() if answer for replica, addr in answer["members"].items()}
    replicas = []
    for address, answer in given.items():
        if answer is None:
            problems.append(f"{name}: the replica at {address} is down")
            replicas.append(ReplicaHealth(role, gid, ids.get(address), address, "down", has_left=has_left))
            continue
        if gid is not None and answer["gid"] != gid:
            problems.append(f"{name}: {address} is a replica of group {answer['gid']}")
        if answer["state"] == "unformed":
            waits_for = ", ".join(str(peer) for peer in answer.get("waits_for", ())) or "the others"
            problems.append(f"{name}: the replica at {address} is no member; it waits for {waits_for}")
        applied_index = answer.get("applied_index")
        lag = None
        if leader is not None and applied_index is not None:
            lag = max(0, leader["commit_index"] - applied_index)
        replicas.append(
            ReplicaHealth(
                role,
                gid,
                answer["replica"],
                address,
                answer["state"],
                answer["term"],
                answer.get("commit_index"),
                applied_index,
                lag,
                has_left,
            )
        )
    if leader is None:
        problems.append(f"{name}: no leader")
    return replicas


def leaders_of(groups: Mapping[int, Sequence[str]], answers: Mapping[str, Answer | None]) -> dict[int, Answer]:
    """What the leader of each group says; of several that call themselves so, the one of the highest term."""
    leaders: dict[int, Answer] = {}
    for gid, addresses in groups.items():
        leading = [answer for address in addresses if (answer := answers.get(address)) and answer["state"] == "leader"]
        if leading:
            leaders[gid] = max(leading, key=lambda answer: int(answer["term"]))
    return leaders


def moves_of(leaders: Mapping[int, Answer], problems: list[str]) -> list[MoveHealth]:
    """The shards that are on their way, by number; one that can't go on is added to `problems`."""
    moves = [
        MoveHealth(
            int(move["shard"]),
            int(move["from"]),
            int(move["to"]),
            int(move["config_num"]),
            str(move["phase"]),
            int(move["bytes"]),
            float(move["age_s"]),
            None if move["waits_for"] is None else str(move["waits_for"]),
            None if move.get("slowed_by") is None else str(move["slowed_by"]),  # an older daemon doesn't say
        )
        for answer in leaders.values()
        for move in answer.get("migrations", ())
    ]
    moves.sort(key=lambda move: (move.shard, move.config_number))
    for move in moves:
        if move.waits_for is not None:
            what = "the release of shard" if move.phase == "release" else "shard"
            problems.append(
                f"{what} {move.shard}, on its way from group {move.source} to group {move.target}, waits: "
                f"{move.waits_for}"
            )
    return moves


def shards_of(
    shard_map: ShardMap, leaders: Mapping[int, Answer], moves: Sequence[MoveHealth], problems: list[str]
) -> list[ShardHealth]:
    """Each shard with its state at its owner's leader; adds what is wrong with them to `problems`.

    A shard that is being copied is not where it belongs yet, and nothing is wrong: its source serves it. What is wrong
    with one that waits has been said.
    """
    moving = {(move.shard, move.target): move.phase for move in moves if move.phase != "release"}
    states = {gid: {int(shard): str(state).lower() for shard, state in each["shards"]} for gid, each in leaders.items()}
    shards = []
    for shard, gid in enumerate(shard_map.owners):
        if gid == 0:
            state = "no owner"
            if shard_map.groups:
                problems.append(f"shard {shard} has no owner")
        elif (shard, gid) in moving:
            state = "waiting" if moving[shard, gid] == "waiting" else "arriving"
        elif gid not in states:
            state = "unknown"
        else:
            state = states[gid].get(shard, "absent")
            if state != "serving":
                problems.append(f"shard {shard} is {state} at its owner, group {gid}")
        shards.append(ShardHealth(shard, gid, state))
    return shards
