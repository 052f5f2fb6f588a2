"""The power goes at every step of what a store does, and again while it recovers.

Each scenario is run once for every disk operation in it, with no operation after that one; then the disk
keeps a random part of what was not synced. What comes back is the old state or the new one, never a mix.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from raftkv.raft.actions import HardState
from raftkv.raft.membership import Membership
from raftkv.storage import store as store_module
from raftkv.storage.boot import Applied
from raftkv.storage.errors import StorageError
from raftkv.storage.memory import MemoryEngine
from raftkv.storage.store import Store
from tests.storage.fake_disk import FakeDisk, PowerLost
from tests.storage.helpers import MEMBERS, entries, entry, run, settle, survives
from tests.storage.store_helpers import IDENTITY, Machine, stream

Scenario = Callable[[Machine], Coroutine[Any, Any, None]]
Check = Callable[[Machine, Store], None]

SEEDS = range(2)
LATER = Membership((1, 2, 3), (4,))


def crash_everywhere(prepare: Scenario, scenario: Scenario, check: Check, seeds: range) -> int:
    """The number of crash points; `check` judges each outcome."""
    points = 0
    steps = 0
    while True:
        finished = False
        for seed in seeds:
            machine = Machine.make(seed * 1000 + steps)
            run(prepare(machine))
            machine.disk.lose_power_after(steps)
            finished = run(survives(machine.disk, scenario(machine)))
            machine.disk.lose_power_after(1 << 30)
            recover_and_check(machine, check, random.Random(steps * 7 + seed))
            points += 1
        if finished:
            return points
        steps += 1


def recover_and_check(machine: Machine, check: Check, rng: random.Random) -> None:
    if rng.random() < 0.25:
        machine.disk.kill()
    else:
        machine.disk.power_loss()
    for _ in range(2):  # recovery itself is cut off, too
        machine.disk.lose_power_after(rng.randrange(25))
        try:
            machine.open()
        except PowerLost:
            machine.disk.power_loss()
        else:
            machine.disk.kill()
    store = machine.open()
    check(machine, store)
    if store.membership is not None:
        term = store.hard_state.term + 1
        last = store.entries[-1].index if store.entries else store.start_index
        run(machine.append(store, HardState(term), [entry(last + 1, term)]))
    store.close()
    machine.disk.power_loss()
    again = machine.open()
    check(machine, again)
    again.close()


# -- making a directory -----------------------------------------------------------------------------


async def nothing(machine: Machine) -> None:
    """No preparation."""


async def make(machine: Machine) -> None:
    machine.open().set_cluster_id(b"c" * 16)


def check_made(machine: Machine, store: Store) -> None:
    assert store.is_fresh and len(store.identity.store_id) == 16
    assert store.identity.cluster_id in (b"", b"c" * 16)


def test_making_a_directory() -> None:
    assert crash_everywhere(nothing, make, check_made, range(4)) > 60


# -- a replica's life: append, apply, flush, compact, checkpoint --------------------------------------


async def live(machine: Machine) -> None:
    store = machine.open()
    await machine.form(store)
    await machine.log_and_apply(store, 1, 6)
    await store.flush()
    store.compact(4, 1, MEMBERS)
    await machine.log_and_apply(store, 7, 12)
    await machine.append(store, HardState(2, 3), entries(13, 16, term=2))
    await machine.append(store, HardState(3, None), entries(14, 15, term=3))
    machine.apply(store, entries(13, 13, term=2))
    checkpoint = await store.make_checkpoint()
    store.compact(store.flushed.index, store.flushed.term, MEMBERS)
    assert len(await checkpoint.read(0, 1 << 20)) == checkpoint.total_bytes
    checkpoint.release()
    await machine.append(store, None, entries(16, 19, term=3))
    machine.apply(store, entries(14, 19, term=3))
    await settle()


def test_a_life() -> None:
    points = crash_everywhere(nothing, live, Machine.check, SEEDS)
    assert points > 150


# -- installing a snapshot --------------------------------------------------------------------------

SNAPSHOT = Applied(30, 3, 30)


async def prepare_install(machine: Machine) -> None:
    """Our own replica, with a tail that conflicts with the snapshot; the sender beside it."""
    store = machine.open()
    await machine.form(store)
    await machine.log_and_apply(store, 1, 10)
    await store.flush()
    store.compact(5, 1, MEMBERS)
    await machine.append(store, HardState(2, 2), entries(11, 35, term=2))
    machine.apply(store, entries(11, 12, term=2))
    await settle()
    store.close()
    sender = Machine(machine.disk, machine.backing, "sender", replace(IDENTITY, replica=3))
    source = sender.open()
    await sender.form(source)
    await sender.append(source, HardState(3, 3), entries(1, 30, term=3))
    sender.apply(source, entries(1, 29, term=3))
    sender.apply(source, entries(30, 30, term=3), LATER)
    await source.flush()
    source.close()
    await settle()


async def install(machine: Machine) -> None:
    sender = Machine(machine.disk, machine.backing, "sender", replace(IDENTITY, replica=3)).open()
    checkpoint = await sender.make_checkpoint()
    store = machine.open()
    await stream(checkpoint, store, 1000)
    # From here on the replaced entries are no longer promised to anybody.
    machine.acknowledged = {index: term for index, term in machine.acknowledged.items() if index <= 12}
    await store.install(checkpoint.id, 30, 3, LATER, HardState(4, 1))
    await machine.append(store, None, entries(31, 33, term=4))
    machine.apply(store, entries(31, 32, term=4))
    await store.flush()
    await settle()


def check_install(machine: Machine, store: Store) -> None:
    machine.check(store)
    assert store.identity == replace(IDENTITY, store_id=store.identity.store_id)
    if store.applied.index < 30:  # the old state, whole
        assert store.applied.term in (1, 2) and 10 <= store.applied.index <= 12
        assert (store.start_index, store.membership) == (5, MEMBERS)
        assert store.engine_membership == MEMBERS
        assert [e for e in store.entries if e.index <= 35] == entries(6, 10) + entries(11, 35, term=2)
        assert store.hard_state.term >= 2
    else:  # the new one, whole
        assert (store.start_index, store.start_term, store.membership) == (30, 3, LATER)
        assert store.engine_membership == LATER
        assert all(e.term >= 4 for e in store.entries)
        # Repaired at the start: the vote of term 2 is void in term 3. Else what was given with the reset.
        # Or either of them after the check's own append, of the next term.
        assert store.hard_state in (HardState(3), HardState(4, 1), HardState(4), HardState(5))


def test_installing_a_snapshot() -> None:
    points = crash_everywhere(prepare_install, install, check_install, SEEDS)
    assert points > 100


def test_a_crash_between_the_swap_and_the_reset_of_the_log_is_repaired() -> None:
    """The one step that leaves the two apart, by itself."""
    machine = Machine.make()

    async def scenario() -> None:
        await prepare_install(machine)
        sender = Machine(machine.disk, machine.backing, "sender2", replace(IDENTITY, replica=3))
        machine.disk.kill()
        source = Machine(machine.disk, machine.backing, "sender", sender.identity).open()
        checkpoint = await source.make_checkpoint()
        store = machine.open()
        await stream(checkpoint, store)
        resets: list[int] = []
        store.wal.reset = lambda *arguments: resets.append(1)  # type: ignore[method-assign]
        assert not await survives_until(store, checkpoint.id)
        assert resets == [1]

    async def survives_until(store: Store, snapshot_id: bytes) -> bool:
        import asyncio

        try:
            await asyncio.wait_for(store.install(snapshot_id, 30, 3, LATER, HardState(4, 1)), 0.05)
        except TimeoutError:
            return False
        return True

    run(scenario())
    machine.acknowledged.clear()
    machine.disk.power_loss()
    store = machine.open()
    assert store.applied == SNAPSHOT
    assert (store.start_index, store.start_term, store.membership) == (30, 3, LATER)
    assert (store.hard_state, store.entries) == (HardState(3, None), [])
    machine.check(store)


class Noticed(Exception):
    """A check failed, as it should."""


def ablated(prepare: Scenario, scenario: Scenario, check: Check) -> None:
    def noticing(machine: Machine, store: Store) -> None:
        try:
            check(machine, store)
        except AssertionError as error:
            raise Noticed from error

    with pytest.raises((Noticed, StorageError)):
        crash_everywhere(prepare, scenario, noticing, range(6))


def test_the_crash_test_notices_that_the_boot_rule_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "reconcile", lambda *arguments: None)
    ablated(prepare_install, install, check_install)


def test_the_crash_test_notices_a_swap_that_is_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: FakeDisk, path: str, data: bytes) -> None:
        file = self.open_file(path + ".tmp", new=True)
        file.write(0, data)
        self.move(path + ".tmp", path)

    monkeypatch.setattr(FakeDisk, "write_durably", write)
    ablated(prepare_install, install, check_install)


def test_the_crash_test_notices_a_log_compacted_above_the_flushed_state(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flush(self: MemoryEngine) -> None:
        """Says it has."""

    monkeypatch.setattr(MemoryEngine, "flush", flush)
    ablated(nothing, live, Machine.check)


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["making", "living", "installing"])
def test_many_seeds(scenario: str) -> None:
    {
        "making": lambda: crash_everywhere(nothing, make, check_made, range(100, 140)),
        "living": lambda: crash_everywhere(nothing, live, Machine.check, range(100, 120)),
        "installing": lambda: crash_everywhere(prepare_install, install, check_install, range(100, 120)),
    }[scenario]()
