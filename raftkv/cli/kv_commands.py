"""The commands of `raftkv-kv`: one handler each, and their rows of the command table."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING

from raftkv.cli.bulk import BULK_COMMANDS
from raftkv.cli.command_table import Argument, Call, Command, Option, parse_count
from raftkv.cli.exit_codes import UsageError
from raftkv.cli.results import Done, Found, Missing, Pairs, Result
from raftkv.cli.transaction_commands import TRANSACTION_COMMANDS

if TYPE_CHECKING:
    from raftkv.cli.session import KvClient, Session


async def put(session: Session, call: Call) -> Result:
    """Store a value."""
    key, value = call.words
    if_version = call.options.get("if_version")
    txn = session.transaction_of(call)
    if txn is not None:
        if if_version is not None:
            raise UsageError("Put --if-version is not allowed inside a transaction: Get the key, and Commit checks it")
        await txn.put(key, value)
        return Done()
    return Done({"version": await session.kv(call.options).put(key, value, if_version=if_version)})


async def get(session: Session, call: Call) -> Result:
    """Read a value."""
    (key,) = call.words
    txn, for_update = session.transaction_of(call), bool(call.options.get("for_update"))
    if txn is not None:
        found = await txn.get(key, for_update=for_update)
    elif for_update:
        raise UsageError("Get --for-update belongs between Begin and Commit")
    else:
        found = await session.kv(call.options).get(key)
    return Missing(key) if found is None else Found(key, found.value, found.version)


async def append(session: Session, call: Call) -> Result:
    """Add to the end of a value."""
    key, suffix = call.words
    txn = session.transaction_of(call)
    if txn is not None:
        await txn.append(key, suffix)
        return Done()
    return Done({"version": await session.kv(call.options).append(key, suffix)})


async def delete(session: Session, call: Call) -> Result:
    """Remove a key."""
    (key,) = call.words
    txn = session.transaction_of(call)
    if txn is not None:
        await txn.delete(key)
        return Done()
    return Done({"existed": await session.kv(call.options).delete(key)})


async def cas(session: Session, call: Call) -> Result:
    """Compare and set."""
    session.refuse_inside(call)
    key, expected, new = call.words
    return Done({"version": await session.kv(call.options).cas(key, expected, new)})


async def scan(session: Session, call: Call) -> Result:
    """Keys and values in key order."""
    session.refuse_inside(call)
    prefix = call.words[0] if call.words else b""
    return Pairs(_pairs(session.kv(call.options), prefix, call.options.get("limit")))


async def _pairs(client: KvClient, prefix: bytes, limit: int | None) -> AsyncIterator[tuple[bytes, bytes]]:
    async for key, found in client.scan(prefix, limit=limit):
        yield key, found.value


_KEY = Argument("KEY", completes="keys")
_VALUE_HELP = (
    'A value `-` is read from standard input (one-shot only; on a line "-" in quotes is a dash), `@FILE` from\n'
    "a file; `@@` is a literal @.\n"
    "On a line, words with spaces or other bytes stand in quotes: \"a b\\n\\x00\" or 'a b'."
)

COMMANDS = (
    Command(
        "Put",
        "store VALUE under KEY",
        put,
        (_KEY, Argument("VALUE", is_value=True)),
        (
            Option(
                ("--if-version",),
                "only if the key has this version (0: only if it is absent)",
                partial(parse_count, least=0),
                "N",
                variable=False,
            ),
        ),
        _VALUE_HELP,
        (
            "Put greeting hello",
            'Put "a key" "two\\nlines"',
            "Put photo @cat.jpg",
            "Put lock me --if-version 0",
        ),
        writes=True,
        pipelines=True,
    ),
    Command(
        "Get",
        "print the value of KEY",
        get,
        (_KEY,),
        (Option(("--for-update",), "in a transaction: lock the key first, as Lock does", variable=False),),
        "A missing key prints nothing and ends with exit code 4; `-o json` shows the version too (0: written by the\n"
        "open transaction itself).",
        ("Get greeting", "Get greeting -o json", "Get account --for-update"),
        pipelines=True,
    ),
    Command(
        "Append",
        "add SUFFIX to the end of KEY's value (a missing key counts as empty)",
        append,
        (_KEY, Argument("SUFFIX", is_value=True)),
        (),
        _VALUE_HELP,
        ('Append log "one more line\\n"',),
        writes=True,
        pipelines=True,
    ),
    Command(
        "Delete",
        "remove KEY (OK also when it is absent)",
        delete,
        (_KEY,),
        examples=("Delete greeting",),
        writes=True,
        pipelines=True,
    ),
    Command(
        "Cas",
        "set KEY to NEW if its value is EXPECTED",
        cas,
        (_KEY, Argument("EXPECTED", is_value=True), Argument("NEW", is_value=True)),
        (),
        "Anything else, a missing key included, is refused: exit code 1.\n" + _VALUE_HELP,
        ("Cas counter 41 42",),
        writes=True,
        pipelines=True,
    ),
    Command(
        "Scan",
        "print keys that begin with PREFIX and their values, in key order",
        scan,
        (Argument("PREFIX", required=False, completes="keys"),),
        (Option(("--limit",), "at most N pairs", parse_count, "N", variable=False),),
        "KEY<TAB>VALUE a line, over all shards, streamed; bytes outside printable ASCII as \\xHH.\n"
        "`-o json` is exact and reversible. Each shard is read linearizably, not all at one instant.",
        ("Scan user: --limit 10", "Scan -o json"),
    ),
    *BULK_COMMANDS,
    *TRANSACTION_COMMANDS,
)
