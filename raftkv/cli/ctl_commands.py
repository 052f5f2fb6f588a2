"""The commands of `raftkv-ctl`: one handler each, and their rows of the command table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftkv.cli.command_table import Argument, Call, Command, Option, check_address, parse_count
from raftkv.cli.exit_codes import LocalFailure, UsageError
from raftkv.cli.printers import note, ranges
from raftkv.cli.results import Configuration, Done, Moves, Result
from raftkv.cli.words import show_word

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raftkv.cli.session import Session

_INTEGER_MAX = (1 << 63) - 1


async def join(session: Session, call: Call) -> Result:
    """Add groups."""
    groups = parse_groups(call.words)
    from raftkv.cli.join_check import look_before_join

    client = session.controllers(call.options)
    timeout_s = session.timeout_s(call.options)
    silent, unnamed = await look_before_join(client, session.settings.controllers, groups, timeout_s)
    config = await client.join(groups)
    if unnamed:
        note(
            f"{session.settings.program}: joined, but the map lacks {', '.join(unnamed)}, which the others know: "
            "if the group is to be found when only those are up, Leave and Join it again with all of its replicas"
        )
    if silent:
        note(f"{session.settings.program}: joined, but no answer yet from {', '.join(silent)}: are they right?")
    return await _done(session, call, config)


async def leave(session: Session, call: Call) -> Result:
    """Remove groups."""
    gids, force = parse_gids(call.words), bool(call.options.get("force"))
    from raftkv.protocol.errors import NoSuchGroup

    client = session.controllers(call.options)
    before = await client.query() if force else None
    try:
        config = await client.leave(gids, force=force)
    except NoSuchGroup as error:
        if error.gid <= 0:
            raise
        raise LocalFailure(
            f"Leave: {error}; `Wait` waits for shards that are still on their way from one that has left"
        ) from None
    if before is not None and not before.groups.keys() - set(gids):
        lost = ranges([shard for shard, gid in enumerate(before.owners) if gid])
        note(f"{session.settings.program}: shards {lost} are given up with all that was in them")
    return await _done(session, call, config)


async def move(session: Session, call: Call) -> Result:
    """Give a shard to a group."""
    shard, gid = _integer("SHARD", call.words[0]), _integer("GID", call.words[1])
    return await _done(session, call, await session.controllers(call.options).move(shard, gid), shard)


async def wait(session: Session, call: Call) -> Result:
    """Wait for what moves."""
    from raftkv.cli.arrival import wait_for_all

    await wait_for_all(session.controllers(call.options), str(call), session.timeout_s(call.options))
    return Done()


async def _done(session: Session, call: Call, config_num: int, shard: int | None = None) -> Result:
    """The configuration is made; wait for its shards, unless told not to."""
    if not call.options.get("no_wait"):
        from raftkv.cli.arrival import wait_for_change

        client = session.controllers(call.options)
        session.config_made = config_num
        try:
            await wait_for_change(client, str(call), config_num, session.timeout_s(call.options), shard)
        except Exception:
            session.config_made = None
            raise
        session.config_made = None  # but not when it is cancelled: whoever says so needs it
    return Done({"config": config_num})


async def plan(session: Session, call: Call) -> Result:
    """What a Join or Leave would move, without doing it."""
    change, words = call.words[0].decode("utf-8", "replace").lower(), call.words[1:]
    if change not in ("join", "leave"):
        raise UsageError(f"Plan: {show_word(call.words[0])} is neither Join nor Leave")
    if not words:
        raise UsageError(f"Plan {change.title()} needs at least one group")
    joining = parse_groups(words) if change == "join" else {}
    leaving = parse_gids(words) if change == "leave" else []
    from raftkv.machines.balance import moves, rebalance
    from raftkv.protocol.errors import GroupExists, NoSuchGroup

    latest = await session.controllers(call.options).query()
    for gid in joining:
        if gid in latest.groups:
            raise GroupExists(gid)
    for gid in leaving:
        if gid not in latest.groups:
            raise NoSuchGroup(gid)
    after = rebalance(latest.owners, {*latest.groups, *joining} - set(leaving))
    return Moves(moves(latest.owners, after))


async def query(session: Session, call: Call) -> Result:
    """Show a configuration."""
    number = _integer("NUM", call.words[0], least=0) if call.words else None
    return Configuration(await session.controllers(call.options).query(number))


async def status(session: Session, call: Call) -> Result:
    """Show the cluster's health."""
    from raftkv.cli.health import cluster_health

    timeout_s = session.timeout_s(call.options)
    return await cluster_health(session.controllers(call.options), session.settings.controllers, timeout_s)


async def txns(session: Session, call: Call) -> Result:
    """Show what is open."""
    from raftkv.cli.open_transactions import open_transactions

    return await open_transactions(session.controllers(call.options), session.timeout_s(call.options))


def parse_groups(words: Sequence[bytes]) -> dict[int, list[str]]:
    """Groups to join, by gid. Raises UsageError."""
    groups: dict[int, list[str]] = {}
    for word in words:
        gid, addresses = parse_group(word)
        if gid in groups:
            raise UsageError(f"Join: group {gid} stands there twice")
        groups[gid] = addresses
    return groups


def parse_gids(words: Sequence[bytes]) -> list[int]:
    """`1 2,3` as gids. Raises UsageError."""
    gids = [_integer("GID", part) for word in words for part in word.split(b",")]
    if len(set(gids)) != len(gids):
        raise UsageError("Leave: a group stands there twice")
    return gids


def parse_group(word: bytes) -> tuple[int, list[str]]:
    """`GID:ADDR,ADDR,…` as a gid and its addresses. Raises UsageError."""
    gid_text, colon, rest = word.partition(b":")
    if not colon:
        raise UsageError(f"Join: {show_word(word)} is not GID:HOST:PORT,HOST:PORT,…")
    gid = _integer("GID", gid_text)
    addresses = rest.decode("utf-8", "replace").split(",")
    for address in addresses:
        try:
            check_address(address)
        except ValueError as error:
            raise UsageError(f"Join: group {gid}: {error}") from None
    if len(set(addresses)) != len(addresses):
        raise UsageError(f"Join: group {gid} has an address twice")
    return gid, addresses


def _integer(name: str, word: bytes, least: int = -_INTEGER_MAX) -> int:
    """A number from a word; whether it is a good gid or shard is the controllers' to say."""
    try:
        return parse_count(word.decode("utf-8", "replace"), least, _INTEGER_MAX)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


_NO_WAIT = Option(("--no-wait",), "return once the configuration is made, before the shards have moved", variable=False)
_FORCE = Option(
    ("--force",),
    "give up the last group, which is lost with all data; asks on a terminal, and needs --yes elsewhere",
    variable=False,
    danger="if no other group is left, all data is given up",
)
_YES = Option(("--yes",), "don't ask whether --force is meant", variable=False)
_WAITS = "Waits until the shards that it moves are served by their new owners; --timeout counts from the last progress."

COMMANDS = (
    Command(
        "Join",
        "add one or several groups; shards move to them, as few as make it even",
        join,
        (Argument("GID:ADDR,ADDR,…", many=True),),
        (_NO_WAIT,),
        "Each address is asked first who it is; one of another group or cluster is refused.\n" + _WAITS,
        ("Join 1:10.0.0.1:7001,10.0.0.2:7001,10.0.0.3:7001", "Join 1:h1:7001 2:h2:7001"),
        writes=True,
    ),
    Command(
        "Leave",
        "remove groups; their shards move to the others",
        leave,
        (Argument("GID[,GID…]", many=True, completes="gids"),),
        (_NO_WAIT, _FORCE, _YES),
        _WAITS
        + "\nThe last group leaves if it is empty; by --force if it is lost, with all data: not while it answers.",
        ("Leave 2", "Leave 2,3", "Leave 2 --force", "Leave 2 --force --yes"),
        danger="stop a group's replicas only when Leave has returned: until then they hold its data",
        writes=True,
    ),
    Command(
        "Move",
        "give SHARD to group GID until the next Join or Leave",
        move,
        (Argument("SHARD", completes="shards"), Argument("GID", completes="gids")),
        (_NO_WAIT,),
        _WAITS,
        ("Move 3 2",),
        writes=True,
    ),
    Command(
        "Wait",
        "wait until every shard is served by its owner",
        wait,
        details=(
            "For after a Join, Leave or Move that was interrupted, or had --no-wait. Returns at once if nothing is on\n"
            "its way. --timeout counts from the last progress."
        ),
        examples=("Wait", "Wait --timeout 60"),
    ),
    Command(
        "Plan",
        "print what a Join or Leave would move: SHARD, from group, to group",
        plan,
        (Argument("Join|Leave", choices=("Join", "Leave")), Argument("GROUP", many=True, completes="gids")),
        (),
        "Changes nothing.",
        ("Plan Join 3:10.0.0.7:7001", "Plan Leave 2"),
    ),
    Command(
        "Query",
        "print configuration NUM, or the latest",
        query,
        (Argument("NUM", required=False),),
        examples=("Query", "Query 0", "Query -o json"),
    ),
    Command(
        "Status",
        "groups, leaders, terms, commit and applied index, lag, shards and moves; exit code 5 if anything is unhealthy",
        status,
        examples=("Status", "Status -o json"),
    ),
    Command(
        "Txns",
        "open transactions over several groups, and the locks that transactions hold",
        txns,
        details=(
            "Coordinators show what they have not ended; groups show what is prepared there and explicit locks, with\n"
            "keys. Exit code 5 if one of them has no leader that answers."
        ),
        examples=("Txns", "Txns -o json"),
    ),
)
