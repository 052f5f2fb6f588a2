"""Rules of transactions that a test can switch off in the machines: worlds and simulator must notice each."""

from __future__ import annotations

from typing import Any

import pytest

from raftkv.machines.coordinator import CoordinatorMachine, TxnState
from raftkv.machines.locks import ShardLocks, outcome_key
from raftkv.machines.participants import NOT_HERE, Participants
from raftkv.machines.rows import KIND_PREPARED, prefix_end
from raftkv.machines.shards import Shard


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


def lock_released_before_the_decision(patch: pytest.MonkeyPatch) -> None:
    """The vote is remembered, and keeps nobody out."""
    patch.setattr(ShardLocks, "prepare", lambda self, txid, prepared: self.prepared.update({txid: prepared}))
    patch.setattr(ShardLocks, "unprepare", lambda self, txid: self.prepared.pop(txid, None))
