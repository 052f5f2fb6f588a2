"""Rules of transactions, each with a way to switch it off in the real daemons and clients.

One more, fences that a new leader aborts, needs coincidences that only the worlds of
tests/machines/transaction_world.py are dense enough for.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from raftkv.client.commit import Commit, _SeveralGroups
from raftkv.client.transactions import Transaction
from raftkv.daemons import coordinator as coordinator_daemon
from raftkv.daemons import map_follower, transactions
from raftkv.daemons.transactions import Transactions
from raftkv.machines import coordinator, participants
from raftkv.machines.coordinator import CoordinatorMachine, TxnState
from raftkv.machines.participants import Participants
from raftkv.machines.results import EXPIRED
from raftkv.protocol.errors import Expired, OutcomeUnknown, Timeout
from raftkv.protocol.transactions import State
from raftkv.sim.scenario import Scenario
from tests.machines.transaction_rules import (
    decision_acknowledged_without_the_shard,
    lock_released_before_the_decision,
    locks_stay_behind,
    no_outcome_of_one_group,
    no_tombstone,
    prepared_holder_wounded,
)
from tests.sim.ablations import Ablation, scenario


def acknowledged_before_the_decision_is_logged(patch: pytest.MonkeyPatch) -> None:
    log_end = Transactions._log_end

    async def answered_first(self: Transactions, command: int, txid: bytes, commit: bool) -> TxnState:
        work = self._works.get(txid)
        if work is not None and command == coordinator.DECIDE:
            for waiter in work.waiters:
                transactions._answer(waiter, TxnState.COMMITTED if commit else TxnState.ABORTED, None)
            work.waiters = []
        return await log_end(self, command, txid, commit)

    patch.setattr(Transactions, "_log_end", answered_first)


def reads_not_rechecked(patch: pytest.MonkeyPatch) -> None:
    """A transaction that only reads is done when it has read."""

    async def nothing(self: Transaction) -> None:
        pass

    patch.setattr(Transaction, "_check_reads", nothing)


def abort_answered_without_logging_it(patch: pytest.MonkeyPatch) -> None:
    """Groups that ask about a transaction which isn't decided are told that it is aborted."""

    async def guessed(self: Transactions, txids: Any) -> dict[bytes, State]:
        assert self.replica is not None
        self.replica.check_readable()
        records = {txid: self._machine.record(self._store.engine, txid) for txid in txids}
        return {
            txid: State.COMMITTED if record is not None and record.state == TxnState.COMMITTED else State.ABORTED
            for txid, record in records.items()
        }

    patch.setattr(Transactions, "_states", guessed)


def expired_taken_as_unknown(patch: pytest.MonkeyPatch) -> None:
    """A txid without a record is a new one, however old it is."""
    known = Participants._known

    def new(self: Participants, view: Any, txid: bytes, shards: Any) -> Any:
        result = known(self, view, txid, shards)
        return None if result is not None and result[0] == EXPIRED else result

    patch.setattr(Participants, "_known", new)
    patch.setattr(CoordinatorMachine, "is_expired", lambda self, txid: False)
    short_lifetime(patch)


def path_changed_on_retry(patch: pytest.MonkeyPatch) -> None:
    """Each attempt goes where the shards are by then, whatever may have become of those before."""
    run = Commit.run

    async def forgetful(self: Commit) -> None:
        attempt_s = 0.8
        while True:
            left_s = self._deadline - asyncio.get_running_loop().time()
            if left_s < attempt_s:
                return await run(self)
            self._call = self._cluster.caller.call(self._call.what, None, is_write=True, timeout_s=attempt_s)
            self._coordinators = None
            with contextlib.suppress(OutcomeUnknown, Timeout, Expired):
                try:
                    return await self._at_one_group()
                except _SeveralGroups:
                    self._coordinators = await self._find_coordinators()
                    return await self._at_coordinators()

    patch.setattr(Commit, "run", forgetful)


def short_lifetime(patch: pytest.MonkeyPatch) -> None:
    """Outcomes are dropped after one second instead of an hour, and every group hears of each second that passes."""
    patch.setattr(participants, "OUTCOME_LIFETIME_MS", 1_000)
    patch.setattr(coordinator, "OUTCOME_LIFETIME_MS", 1_000)
    patch.setattr(map_follower, "MAP_TIME_STEP_MS", 1_000)
    patch.setattr(coordinator_daemon, "MAP_TIME_STEP_MS", 1_000)


WRONG = (
    "BankKeepsItsMoney",
    "RingStaysARing",
    "DecisionNeverChanges",
    "NotWell",
    "G0",
    "G1a",
    "G1b",
    "G1c",
    "G-single",
    "G2",
    "phantom",
    "internal",
    "incompatible-order",
    "duplicate-elements",
    "EndOnlyAfterAll",
    "UnexpectedException",
)
"""What the checks of transactions call what they find."""


def transacting(name: str, faults: dict[str, float], **settings: Any) -> Scenario:
    cluster = {"groups": 2, "shards": 4, "coordinators": 3, "controllers": 1} | settings.pop("cluster", {})
    transactions = {"users": 2, "lists": 6, "accounts": 4, "ring": 4} | settings.pop("transactions", {})
    settings = {
        "nemesis": {"every_s": [0.3, 0.9]},
        "workload": {"workers": 1, "keys": 4, "think_s": 2.0, "timeout_s": [1.0, 10.0]},
        "liveness_seconds": 60,
        **settings,
    }
    return scenario(name, faults, cluster=cluster, transactions=transactions, **settings)


STEPS = {"crash_at_step": 10.0, "stall_at_step": 6.0}
LEADERS = {"kill_leader": 6.0, "isolate_leader": 6.0, "pause": 4.0, "transfer": 3.0, "split": 4.0}
LOSS = {"reset": 10.0, "clog": 3.0, "half_open": 3.0, "cut_client": 3.0}
PLAIN = transacting("transactions", {"reset": 2.0})
TROUBLE = transacting("transactions, leaders and steps", STEPS | LEADERS)
MOVING = transacting("transactions and moves", STEPS | {"move": 20.0, "kill_leader": 3.0})
LOSING = transacting("transactions and lost answers", LOSS | {"move": 6.0, "kill_leader": 3.0})
LATE = transacting("transactions and late steps", {"stall_at_step": 16.0, "isolate_leader": 4.0, "clog": 4.0})
STALLED = transacting(
    "transactions that come late",
    {"stall_at_step": 20.0, "move": 2.0},
    workload={"workers": 1, "keys": 4, "think_s": 2.0, "timeout_s": [0.5, 2.0]},
    nemesis={"every_s": [0.2, 0.5], "at_once": 8},
)
WANDERING = transacting(
    "transactions whose shards come together", {"stall_at_step": 12.0, "move": 20.0, "clog": 4.0, "kill_leader": 2.0}
)
CUT_OFF = transacting(
    "transactions of clients that are cut off",
    {"cut_client": 20.0, "clog": 6.0},
    workload={"workers": 1, "keys": 4, "think_s": 2.0, "timeout_s": [10.0, 20.0]},
    nemesis={"every_s": [0.3, 0.6], "at_once": 6},
)
LOCKING = transacting(
    "transactions that lock", LATE.nemesis.faults, transactions={"locked": 0.8, "lists": 3, "mix": {"lists": 1.0}}
)

TXN_ABLATIONS: dict[str, Ablation] = {
    "ack before the decision is committed": Ablation(acknowledged_before_the_decision_is_logged, TROUBLE, WRONG),
    "lock released before the decision is applied": Ablation(lock_released_before_the_decision, PLAIN, WRONG),
    "reads not re-checked": Ablation(reads_not_rechecked, PLAIN, WRONG),
    "tombstone missing": Ablation(no_tombstone, STALLED, WRONG),
    "abort answered without logging it": Ablation(abort_answered_without_logging_it, LATE, WRONG),
    "decision acknowledged by a group that lost the shard": Ablation(
        decision_acknowledged_without_the_shard, MOVING, WRONG
    ),
    "locks not moved": Ablation(locks_stay_behind, MOVING, WRONG),
    "one-group outcome not kept": Ablation(no_outcome_of_one_group, LOSING, WRONG),
    "path changed on retry": Ablation(path_changed_on_retry, WANDERING, WRONG),
    "expired taken as unknown": Ablation(expired_taken_as_unknown, CUT_OFF, WRONG, beside=short_lifetime),
    "prepared holder wounded": Ablation(prepared_holder_wounded, LOCKING, WRONG),
}
