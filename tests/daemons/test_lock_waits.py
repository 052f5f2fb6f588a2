"""The queues of those who wait for a lock."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from raftkv.daemons import lock_waits
from raftkv.daemons.lock_waits import LockWaits


def early_loop() -> asyncio.AbstractEventLoop:
    """Its timers come up to 5 ms early."""
    loop: Any = asyncio.SelectorEventLoop()
    loop._clock_resolution = 0.005
    return loop  # type: ignore[no-any-return]


def test_everybody_is_told_at_the_end_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer may come a little before its time by the loop's clock: uvloop's counts whole milliseconds."""
    monkeypatch.setattr(lock_waits, "LOCK_WAIT_S_MAX", 0.05)
    told: list[int] = []
    went_on: list[int] = []

    async def run() -> None:
        machine: Any = SimpleNamespace(unlocks=0)
        waits = LockWaits(machine)
        for number in range(200):
            waits.wait(
                number % 3,
                waits.deadline_s(),
                lambda: True,
                lambda number=number: went_on.append(number),  # type: ignore[misc]
                lambda number=number: told.append(number),  # type: ignore[misc]
            )
            await asyncio.sleep(0.0013)
        await asyncio.sleep(0.2)
        assert len(waits) == 0
        machine.unlocks += 1
        waits.applied()

    with asyncio.Runner(loop_factory=early_loop) as runner:
        runner.run(run())
    assert sorted(told) == list(range(200))
    assert not went_on
