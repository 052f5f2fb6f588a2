"""How engine and log are brought together at the start: the rule alone, then a store that needs it."""

from __future__ import annotations

import pytest

from raftkv.raft.actions import HardState
from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership
from raftkv.storage.boot import Applied, Restart, reconcile
from raftkv.storage.errors import DirectoryDamaged, StateLost
from raftkv.storage.store import APPLIED_KEY
from raftkv.storage.wal import WalState
from tests.storage.helpers import MEMBERS, entries, entry, run, settle
from tests.storage.store_helpers import Machine

OLD = Membership((1, 2))


def log(start: int, start_term: int, new: list[Entry], hard_state: HardState | None = None) -> WalState:
    return WalState(hard_state or HardState(5, 2), start, start_term, OLD, new)


def decide(applied: Applied, state: WalState) -> Restart | None:
    return reconcile("data", applied, MEMBERS, state)


@pytest.mark.parametrize(
    ("applied", "state"),
    [
        (Applied(0, 0), log(0, 0, [])),
        (Applied(0, 0), log(0, 0, entries(1, 9))),  # nothing flushed: replay it all
        (Applied(4, 1), log(0, 0, entries(1, 9))),  # the log is ahead: replay the rest
        (Applied(9, 1), log(0, 0, entries(1, 9))),  # level
        (Applied(4, 1), log(4, 1, [])),
        (Applied(4, 1), log(4, 1, entries(5, 9))),
        (Applied(6, 2), log(4, 1, [entry(5, 1), entry(6, 2), entry(7, 3)])),
    ],
)
def test_a_log_that_holds_the_applied_entry_is_kept(applied: Applied, state: WalState) -> None:
    assert decide(applied, state) is None


@pytest.mark.parametrize(
    ("applied", "state"),
    [
        (Applied(4, 3), log(0, 0, [])),  # the engine is ahead: the log ends below
        (Applied(9, 3), log(2, 1, entries(3, 8))),
        (Applied(10_000, 3), log(2, 1, entries(3, 8))),
        (Applied(4, 3), log(0, 0, entries(1, 9))),  # another term there, with a tail behind it
        (Applied(9, 3), log(0, 0, entries(1, 9))),
        (Applied(1, 3), log(0, 0, entries(1, 1))),
    ],
)
def test_otherwise_it_restarts_at_the_applied_entry(applied: Applied, state: WalState) -> None:
    assert decide(applied, state) == Restart(HardState(5, 2), applied.index, applied.term, MEMBERS)


def test_the_term_is_raised_to_the_applied_one_and_the_vote_is_empty_then() -> None:
    for term, expected in [(4, HardState(5, 2)), (5, HardState(5, 2)), (6, HardState(6, None))]:
        restart = decide(Applied(7, term), log(0, 0, []))
        assert restart is not None and restart.hard_state == expected


def test_a_log_that_starts_above_the_applied_entry_has_lost_state() -> None:
    with pytest.raises(StateLost, match="starts after entry 5, the engine ends at 4"):
        decide(Applied(4, 1), log(5, 1, entries(6, 9)))
    with pytest.raises(StateLost):
        decide(Applied(0, 0), log(1, 1, []))


def test_two_terms_for_the_entry_at_the_log_start_are_a_contradiction() -> None:
    with pytest.raises(DirectoryDamaged, match="entry 4 is of term 1 in the log and of 2 in the engine"):
        decide(Applied(4, 2), log(4, 1, entries(5, 9)))


# -- in a store -------------------------------------------------------------------------------------


async def ahead(machine: Machine, logged: int, applied: int, applied_term: int) -> None:
    """A store whose log ends at `logged` (term 1) and whose engine has flushed through `applied`."""
    store = machine.open()
    await machine.form(store)
    await machine.append(store, HardState(2, 3), entries(1, logged))
    machine.apply(store, [*entries(1, applied - 1), entry(applied, applied_term)], None)
    await store.flush()
    store.close()
    await settle()


@pytest.mark.parametrize(("logged", "applied", "term"), [(3, 9, 2), (9, 9, 2), (12, 9, 4), (1, 9, 4)])
def test_an_engine_ahead_of_the_log_restarts_it(logged: int, applied: int, term: int) -> None:
    machine = Machine.make()
    run(ahead(machine, logged, applied, term))
    machine.acknowledged.clear()  # entries of other terms: they were never committed
    for _ in range(3):  # and it stays so
        store = machine.open()
        machine.check(store)
        assert (store.start_index, store.start_term, store.entries) == (applied, term, [])
        assert store.membership == MEMBERS
        assert store.hard_state == (HardState(2, 3) if term <= 2 else HardState(term, None))
        machine.disk.power_loss()
    store = machine.open()
    run(machine.append(store, None, [entry(applied + 1, term)]))
    machine.disk.power_loss()
    assert machine.open().entries == [entry(applied + 1, term)]


def test_an_engine_behind_the_log_keeps_it_for_replay() -> None:
    machine = Machine.make()

    async def scenario() -> None:
        store = machine.open()
        await machine.form(store)
        await machine.log_and_apply(store, 1, 5)
        await store.flush()
        await machine.append(store, None, entries(6, 9))

    run(scenario())
    machine.disk.power_loss()
    store = machine.open()
    machine.check(store)
    assert store.applied.index == 5 and store.entries == entries(1, 9)


def test_an_engine_that_lost_its_flushed_state_is_refused() -> None:
    machine = Machine.make()

    async def scenario() -> None:
        store = machine.open()
        await machine.form(store)
        await machine.log_and_apply(store, 1, 9)
        await store.flush()
        store.compact(8, 1, MEMBERS)
        await settle()
        store.engine.write({APPLIED_KEY: None})
        await store.engine.flush()
        store.close()

    run(scenario())
    with pytest.raises(StateLost, match="the log starts after entry 8, the engine ends at 0"):
        machine.open()
