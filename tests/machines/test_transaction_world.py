"""Worlds of clients, coordinators and groups, from seeds; and that they notice what is switched off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from raftkv.machines.coordinator import TxnState
from tests.machines.transaction_rules import (
    decision_acknowledged_without_the_shard,
    lock_released_before_the_decision,
    locks_stay_behind,
    new_leader_aborts_fences,
    no_outcome_of_one_group,
    no_tombstone,
    prepared_holder_wounded,
    reads_not_rechecked,
)
from tests.machines.transaction_world import World, run_world


@pytest.mark.parametrize("block", range(4))
def test_worlds(block: int) -> None:
    hits: Counter[str] = Counter()
    for seed in range(25 * block, 25 * (block + 1)):
        hits += run_world(seed).hits
    print(sorted(hits.items()))


@pytest.mark.long
@pytest.mark.parametrize("block", range(20))
def test_many_worlds(block: int) -> None:
    for seed in range(1_000 + 50 * block, 1_000 + 50 * (block + 1)):
        run_world(seed)


# ---- rules that are switched off


def abort_answered_without_logging_it(patch: pytest.MonkeyPatch) -> None:
    """Whoever asks about a transaction without a record, or without a decision, is told that it is aborted."""

    def abort_stray(self: World, txid: bytes, shards: list[int]) -> None:
        record = self.coordinators.machine.record(self.coordinators.engine, txid)
        committed = record is not None and record.state == TxnState.COMMITTED
        self.send(lambda: self.decide_at(txid, committed, shards))

    patch.setattr(World, "abort_stray", abort_stray)


def path_changed_on_retry(patch: pytest.MonkeyPatch) -> None:
    """A repeated commit goes to the group or to the coordinators, as it comes; with no look at what is recorded."""

    def commit(self: World) -> None:
        txn = self._some(lambda txn: bool(txn.reads) and not txn.resolving)
        if txn is None:
            return
        txn.sent = True
        gids = {self.owners[part[0]] for part in txn.parts()}
        if len(gids) == 1 and self.rng.random() < 0.5:
            self.send(lambda: self.commit_at_group(txn))
        else:
            self.send(lambda: self.commit_at_coordinator(txn))

    patch.setattr(World, "commit", commit)


@pytest.mark.parametrize(
    "rule",
    [
        reads_not_rechecked,
        no_tombstone,
        no_outcome_of_one_group,
        locks_stay_behind,
        decision_acknowledged_without_the_shard,
        prepared_holder_wounded,
        new_leader_aborts_fences,
        abort_answered_without_logging_it,
        lock_released_before_the_decision,
        path_changed_on_retry,
    ],
)
def test_is_noticed_when_switched_off(
    rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule(monkeypatch)
    with pytest.raises(AssertionError, match="seed") as caught:
        for seed in range(50):
            run_world(seed)
    print(str(caught.value)[:200])
