"""The coordinators' machine, command by command: the first decision wins, and what is old goes."""

from __future__ import annotations

from typing import Any

import pytest

from raftkv.machines import coordinator as coord
from raftkv.machines.coordinator import BEGIN, DECIDE, END, FENCE, MAP_TIME, SETTLE, TAKE_OVER, TxnState
from raftkv.machines.participants import OUTCOME_LIFETIME_MS
from raftkv.machines.txn_commands import make_txid
from tests.machines.support import Replica

NOW_MS = 10_000_000
TXID = make_txid(NOW_MS, b"entropy8")
DIGEST = b"d" * 16


def coordinators(map_time_ms: int = NOW_MS) -> Replica[coord.CoordinatorMachine]:
    replica = Replica(coord.CoordinatorMachine())
    if map_time_ms:
        assert replica.run_one([MAP_TIME, map_time_ms]) == [0, map_time_ms]
    return replica


def state_of(replica: Replica[coord.CoordinatorMachine], txid: bytes = TXID) -> TxnState | None:
    record = replica.machine.record(replica.engine, txid)
    assert record is None or (txid in replica.machine.open) == (record.ended_ms == 0)
    return None if record is None else record.state


def test_the_way_of_a_transaction() -> None:
    replica = coordinators()
    assert state_of(replica) is None
    assert replica.run_one([BEGIN, TXID, DIGEST, [3, 1]]) == [0, TxnState.BEGUN]
    assert replica.run_one([DECIDE, TXID, True]) == [0, TxnState.COMMITTED]
    record = replica.machine.record(replica.engine, TXID)
    assert record == (TxnState.COMMITTED, DIGEST, (3, 1), 0)
    assert replica.run_one([END, [TXID]]) == [0]
    assert replica.machine.record(replica.engine, TXID) == (TxnState.COMMITTED, DIGEST, (3, 1), NOW_MS)
    assert not replica.machine.open
    assert replica.run_one([BEGIN, TXID, DIGEST, [3, 1]]) == [0, TxnState.COMMITTED], "repeated"


@pytest.mark.parametrize("first", [True, False])
def test_the_first_decision_wins(first: bool) -> None:
    replica = coordinators()
    state = TxnState.COMMITTED if first else TxnState.ABORTED
    replica.run_one([BEGIN, TXID, DIGEST, [1]])
    for commit in (first, not first):
        assert replica.run_one([DECIDE, TXID, commit]) == [0, state]
    assert replica.run_one([SETTLE, TXID, not first]) == [0, state]
    assert replica.run_one([FENCE, TXID, [1]]) == [0, state]


def test_one_txid_has_one_content() -> None:
    replica = coordinators()
    replica.run_one([BEGIN, TXID, DIGEST, [1]])
    assert replica.run_one([BEGIN, TXID, b"e" * 16, [1]])[0] == 8
    replica.run_one([DECIDE, TXID, True])
    replica.run_one([END, [TXID]])
    assert replica.run_one([BEGIN, TXID, b"e" * 16, [1]])[0] == 8


def test_a_fence_keeps_a_late_begin_out() -> None:
    replica = coordinators()
    assert replica.run_one([FENCE, TXID, [1, 2]]) == [0, TxnState.FENCED]
    assert replica.run_one([BEGIN, TXID, DIGEST, [1, 2]]) == [0, TxnState.FENCED]
    assert replica.run_one([DECIDE, TXID, True]) == [0, TxnState.FENCED], "no decision is of a fence"
    assert replica.run_one([END, [TXID]]) == [0]
    assert state_of(replica) is TxnState.FENCED, "nor has it an end"
    assert replica.run_one([SETTLE, TXID, True]) == [0, TxnState.COMMITTED]


def test_a_new_leader_aborts_what_is_undecided_and_nothing_else() -> None:
    replica = coordinators()
    begun, fenced, committed = (make_txid(NOW_MS, bytes(7) + b"%d" % n) for n in range(3))
    replica.run([BEGIN, begun, DIGEST, [1]], [FENCE, fenced, [1]], [BEGIN, committed, DIGEST, [1]])
    replica.run_one([DECIDE, committed, True])
    assert replica.run_one([TAKE_OVER]) == [0]
    states = [state_of(replica, txid) for txid in (begun, fenced, committed)]
    assert states == [TxnState.ABORTED, TxnState.FENCED, TxnState.COMMITTED]
    assert list(replica.machine.open) == [begun, fenced, committed], "all of them have yet to be told"


@pytest.mark.parametrize("map_time_ms", [0, NOW_MS])
def test_a_doubt_about_an_unknown_txid_is_an_abort_that_has_ended(map_time_ms: int) -> None:
    """Also before the coordinators know what time it is."""
    replica = coordinators(map_time_ms)
    assert replica.run_one([FENCE, TXID, []]) == [0, TxnState.ABORTED]
    assert not replica.machine.open
    assert replica.run_one([BEGIN, TXID, DIGEST, [1]]) == [0, TxnState.ABORTED]


def test_of_what_is_older_than_the_horizon_nothing_is_begun_and_nothing_guessed() -> None:
    replica = coordinators()
    old = make_txid(NOW_MS - OUTCOME_LIFETIME_MS - 1, b"entropy8")
    just_not = make_txid(NOW_MS - OUTCOME_LIFETIME_MS, b"entropy8")
    for command in ([BEGIN, old, DIGEST, [1]], [FENCE, old, [1]]):
        assert replica.run_one(command)[0] == 9
    assert state_of(replica, old) is None
    assert replica.machine.is_expired(old) and not replica.machine.is_expired(just_not)
    assert replica.run_one([BEGIN, just_not, DIGEST, [1]]) == [0, TxnState.BEGUN]
    assert replica.run_one([FENCE, old, []]) == [0, TxnState.ABORTED], "a group's question is always answered"


def test_records_go_an_hour_after_their_end_and_never_before_it() -> None:
    replica = coordinators()
    ended, open_one = TXID, make_txid(NOW_MS, b"another!")
    for txid in (ended, open_one):
        replica.run([BEGIN, txid, DIGEST, [1]], [DECIDE, txid, True])
    replica.run_one([MAP_TIME, NOW_MS + 1_000_000])
    replica.run_one([END, [ended]])
    replica.run_one([MAP_TIME, NOW_MS + 1_000_000 + OUTCOME_LIFETIME_MS])
    assert state_of(replica, ended) is TxnState.COMMITTED
    replica.run_one([MAP_TIME, NOW_MS + 1_000_001 + OUTCOME_LIFETIME_MS])
    assert state_of(replica, ended) is None and replica.machine.is_expired(ended)
    replica.run_one([MAP_TIME, 100 * NOW_MS])
    assert state_of(replica, open_one) is TxnState.COMMITTED


def test_a_sweep_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coord, "SWEEP_ROWS_MAX", 4)
    replica = coordinators()
    txids = [make_txid(NOW_MS, b"%8d" % n) for n in range(10)]
    replica.run(*([FENCE, txid, []] for txid in txids))
    later = [MAP_TIME, 2 * NOW_MS]
    for left in (6, 2, 0):
        assert replica.run_one(later)[0] == 0
        assert sum(state_of(replica, txid) is not None for txid in txids) == left
        assert replica.machine.sweep_pending == (left > 0)
        replica.machine.load(replica.engine)
        assert replica.machine.sweep_pending == (left > 0)


@pytest.mark.parametrize(
    "command",
    [
        [DECIDE, TXID, True],
        [SETTLE, TXID, True],
        [BEGIN, TXID, b"short", [1]],
        [BEGIN, TXID, DIGEST, []],
        [BEGIN, TXID, DIGEST, [1, 1]],
        [BEGIN, b"\xff" * 16, DIGEST, [1]],
        [FENCE, TXID, None],
        [END, [TXID, b"x"]],
        [END, TXID],
        [MAP_TIME, -1],
        [TAKE_OVER, 1],
        [99],
    ],
)
def test_commands_that_make_no_sense(command: list[Any]) -> None:
    replica = coordinators()
    rows = dict(replica.engine.rows)
    assert replica.run_one(command)[0] == 8
    assert replica.engine.rows == rows


def test_everything_is_there_again_after_a_restart() -> None:
    replica = coordinators()
    replica.run([BEGIN, TXID, DIGEST, [2, 1]], [FENCE, make_txid(NOW_MS, b"another!"), [7]])
    known = dict(replica.machine.open)
    replica.machine = coord.CoordinatorMachine()
    replica.machine.load(replica.engine)
    assert replica.machine.open == known
    assert replica.machine.map_time_ms == NOW_MS
