"""Worlds of clients, coordinators and groups, from seeds; and that they notice what is switched off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from raftkv.machines.coordinator import CoordinatorMachine, TxnState
from raftkv.machines.locks import ShardLocks, outcome_key
from raftkv.machines.participants import NOT_HERE, Participants
from raftkv.machines.rows import KIND_PREPARED, prefix_end
from raftkv.machines.shards import Shard
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


def reads_not_rechecked(patch: pytest.MonkeyPatch) -> None:
    conflicts = Participants._conflicts

    def locks_only(self: Participants, view: Any, txid: bytes, parts: list[Any]) -> list[bytes]:
        return conflicts(self, view, txid, [[shard, [], writes] for shard, _, writes in parts])

    patch.setattr(Participants, "_conflicts", locks_only)


def no_tombstone(patch: pytest.MonkeyPatch) -> None:
    end = Participants._end

    def forget_aborts(self: Participants, view: Any, shard: Shard, txid: bytes, writes: Any) -> int:
        revision = end(self, view, shard, txid, writes)
        if writes is None:
            view.delete(outcome_key(shard, txid))
        return revision

    patch.setattr(Participants, "_end", forget_aborts)


def no_outcome_of_one_group(patch: pytest.MonkeyPatch) -> None:
    commit = Participants._commit

    def forget(self: Participants, view: Any, command: list[Any]) -> Any:
        result = commit(self, view, command)
        for number, _, _ in command[2]:
            if number in self._shards.serving:
                view.delete(outcome_key(self._shards.serving[number], command[1]))
        return result

    patch.setattr(Participants, "_commit", forget)


def locks_stay_behind(patch: pytest.MonkeyPatch) -> None:
    def arrived(self: Participants, view: Any, shard: Shard) -> None:
        for key, _ in list(view.scan(shard.prefix + KIND_PREPARED, prefix_end(shard.prefix + KIND_PREPARED))):
            view.delete(key)

    patch.setattr(Participants, "arrived", arrived)


def decision_acknowledged_without_the_shard(patch: pytest.MonkeyPatch) -> None:
    decide = Participants._decide

    def ack_all(self: Participants, view: Any, command: list[Any]) -> Any:
        ok, states = decide(self, view, command)
        return [ok, [[number, int(command[2]) if state == NOT_HERE else state, rev] for number, state, rev in states]]

    patch.setattr(Participants, "_decide", ack_all)


def prepared_holder_wounded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShardLocks, "of_prepared", lambda self, key, txid: None)
    lock = Participants._lock

    def wound(self: Participants, view: Any, command: list[Any]) -> Any:
        shard = self._shards.serving.get(command[3])
        if shard is not None:
            for txid in [t for t in shard.locks.prepared if t > command[2]]:
                self._end(view, shard, txid, None)
        return lock(self, view, command)

    patch.setattr(Participants, "_lock", wound)


def new_leader_aborts_fences(patch: pytest.MonkeyPatch) -> None:
    take_over = CoordinatorMachine._take_over

    def abort_all(self: CoordinatorMachine, view: Any, command: list[Any]) -> Any:
        for txid, known in sorted(self.open.items()):
            if known.state == TxnState.FENCED:
                self._keep(view, txid, known._replace(state=TxnState.ABORTED))
        return take_over(self, view, command)

    patch.setattr(CoordinatorMachine, "_take_over", abort_all)


def abort_answered_without_logging_it(patch: pytest.MonkeyPatch) -> None:
    """Whoever asks about a transaction without a record, or without a decision, is told that it is aborted."""

    def abort_stray(self: World, txid: bytes, shards: list[int]) -> None:
        record = self.coordinators.machine.record(self.coordinators.engine, txid)
        committed = record is not None and record.state == TxnState.COMMITTED
        self.send(lambda: self.decide_at(txid, committed, shards))

    patch.setattr(World, "abort_stray", abort_stray)


def lock_released_before_the_decision(patch: pytest.MonkeyPatch) -> None:
    """The vote is remembered, and keeps nobody out."""
    patch.setattr(ShardLocks, "prepare", lambda self, txid, prepared: self.prepared.update({txid: prepared}))
    patch.setattr(ShardLocks, "unprepare", lambda self, txid: self.prepared.pop(txid, None))


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
