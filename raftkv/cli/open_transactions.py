"""`raftkv-ctl Txns`: the transactions that are open, and the locks that they hold, as the leaders say.

Read from the Status replies: `transactions` of coordinators, a list of maps {txid, state, shards, age_ms}, and `locks`
of groups, of maps {txid, shard, keys, kind, age_ms}. Who only counts what is open there is shown as `unlisted`. Changes
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raftkv.cli.health import REPLICA_TIMEOUT_S, Answer, ask
from raftkv.cli.results import HeldLocks, OpenTransaction, Transactions, count

if TYPE_CHECKING:
    from raftkv.cli.session import ControllersClient


async def open_transactions(client: ControllersClient, timeout_s: float) -> Transactions:
    """Raises RaftKVError when no controller answers."""
    groups = (await client.query()).groups
    coordinators = await client.coordinators()
    addresses = [address for named in (coordinators, groups) for each in named.values() for address in each]
    answers = await ask(client, addresses, min(timeout_s, REPLICA_TIMEOUT_S))
    unanswered: list[str] = []
    transactions: list[OpenTransaction] = []
    unlisted: list[str] = []
    for gid, answer in _leaders("the coordinators (group {})", coordinators, answers, unanswered):
        listed = answer.get("transactions")
        if isinstance(listed, list):
            transactions += [_transaction(gid, txn) for txn in listed]
        elif isinstance(listed, Mapping) and listed.get("open"):
            unlisted.append(f"the coordinators (group {gid}) have {count(listed['open'], 'open transaction')}")
    locks: list[HeldLocks] = []
    for gid, answer in _leaders("group {}", groups, answers, unanswered):
        listed = answer.get("locks")
        prepared, keys = int(answer.get("prepared", 0)), int(answer.get("explicit_locks", 0))
        if isinstance(listed, list):
            locks += [_locks(gid, held) for held in listed]
        elif prepared or keys:
            unlisted.append(f"group {gid} has {prepared} prepared, and {count(keys, 'key')} locked explicitly")
    transactions.sort(key=lambda txn: (-txn.age_s, txn.txid))
    locks.sort(key=lambda lock: (lock.txid, lock.shard))
    return Transactions(transactions, locks, unlisted, unanswered)


def _leaders(
    what: str,
    groups: Mapping[int, Sequence[str]],
    answers: Mapping[str, Answer | None],
    unanswered: list[str],
) -> list[tuple[int, Answer]]:
    """(gid, what its leader says); of several that call themselves so, the one of the highest term."""
    found = []
    for gid in sorted(groups):
        given = [answers.get(address) for address in groups[gid]]
        leading = [answer for answer in given if answer and answer["state"] == "leader"]
        if leading:
            found.append((gid, max(leading, key=lambda answer: int(answer["term"]))))
        else:
            unanswered.append(what.format(gid))
    return found


def _transaction(gid: int, txn: Mapping[str, Any]) -> OpenTransaction:
    return OpenTransaction(
        _hex(txn["txid"]), str(txn["state"]).lower(), gid, [int(shard) for shard in txn["shards"]], txn["age_ms"] / 1000
    )


def _locks(gid: int, held: Mapping[str, Any]) -> HeldLocks:
    keys = [bytes(key) for key in held["keys"]]
    return HeldLocks(_hex(held["txid"]), gid, int(held["shard"]), str(held["kind"]), keys, held["age_ms"] / 1000)


def _hex(txid: bytes | str) -> str:
    return txid.hex() if isinstance(txid, bytes) else txid
