"""The loop of a simulated process: asyncio's promises on virtual time, clocks, pauses, crashes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from raftkv.sim.loop import CALLBACK_COST_S, Clock
from raftkv.sim.scheduler import Scheduler, VirtualTimeStandsStill
from tests.sim.support import SmallWorld


def test_sleeping_takes_virtual_time_only() -> None:
    world = SmallWorld()
    seen: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(3600)
        seen.append(loop.time() - began)

    world.launch("a", main)
    world.run(3599)
    assert seen == []
    world.run(2)
    assert seen == [pytest.approx(3600, abs=0.001)]


def test_callbacks_run_in_order_and_timers_by_time() -> None:
    world = SmallWorld()
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.2, seen.append, "late")
        loop.call_later(0.1, seen.append, "early")
        cancelled = loop.call_later(0.15, seen.append, "never")
        loop.call_soon(seen.append, "soon")
        loop.call_soon(seen.append, "soon after")
        cancelled.cancel()

    world.launch("a", main)
    world.run(1)
    assert seen == ["soon", "soon after", "early", "late"]


def test_running_in_circles_takes_time() -> None:
    world = SmallWorld()
    turns = 0

    async def main() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    process = world.launch("a", main)
    world.run(0.01)
    assert 0 < turns <= 0.01 / CALLBACK_COST_S + 2
    quick = turns
    process.set_slowness(100.0)
    world.run(0.01)
    assert turns - quick <= quick / 50


def test_a_clock_that_is_asked_again_and_again_goes_on() -> None:
    world = SmallWorld()
    ended = False

    async def main() -> None:
        nonlocal ended
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.005
        while loop.time() < until:
            continue
        ended = True

    world.launch("a", main)
    world.run(0.1)
    assert ended


def test_each_process_has_its_own_running_loop() -> None:
    world = SmallWorld()
    seen: list[Any] = []

    async def main() -> None:
        seen.append(asyncio.get_running_loop())
        await asyncio.sleep(0.1)
        seen.append(asyncio.get_running_loop())

    a, b = world.launch("a", main), world.launch("b", main)
    world.run(1)
    assert [loop is a.loop for loop in seen] == [True, False, True, False] or {id(x) for x in seen} == {
        id(a.loop),
        id(b.loop),
    }
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


def test_a_paused_process_does_nothing_and_then_catches_up() -> None:
    world = SmallWorld()
    seen: list[float] = []

    async def main() -> None:
        while True:
            await asyncio.sleep(1)
            seen.append(world.scheduler.now)

    process = world.launch("a", main)
    world.run(2.5)
    process.pause()
    world.run(5)
    assert len(seen) == 2
    process.resume()
    world.run(0.001)
    assert len(seen) == 3
    assert seen[2] == pytest.approx(7.5, abs=0.01)


def test_nothing_of_a_killed_process_runs() -> None:
    world = SmallWorld()
    seen: list[str] = []

    async def main() -> None:
        try:
            asyncio.get_running_loop().call_later(1, seen.append, "timer")
            await asyncio.sleep(0.5)
            seen.append("woke")
        finally:
            seen.append("finally")

    process = world.launch("a", main)
    world.run(0.1)
    process.kill()
    world.run(10)
    assert seen == []
    assert not process.running
    process.dispose()  # the run is over: what its `finally` does then reaches nobody


def test_a_process_that_kills_itself_ends_in_the_middle_of_a_callback() -> None:
    world = SmallWorld()
    seen: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().call_soon(seen.append, "next callback")
        process.exit("enough")
        seen.append("after")

    process = world.process("a")
    process.launch(main)
    world.run(1)
    assert seen == []
    assert process.exit_text == "enough"
    assert world.errors == []


def test_an_exception_in_a_callback_or_task_is_reported() -> None:
    world = SmallWorld()

    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0.1)
        raise KeyError("x")

    world.launch("a", main)
    world.run(1)
    assert [type(error) for error in world.errors] == [ZeroDivisionError, KeyError]


def test_clocks_drift_and_jump_but_never_back() -> None:
    clock = Clock(100.0)
    assert clock.local(1.0) == 101.0
    clock.set_rate(1.0, 2.0)
    assert clock.local(1.0) == 101.0
    assert clock.local(2.0) == 103.0
    assert clock.true(103.0) == 2.0
    clock.jump(2.0, 10.0)
    assert clock.local(2.0) == 113.0
    with pytest.raises(AssertionError):
        clock.jump(3.0, -1.0)


def test_a_clock_begins_anew_only_when_the_power_was_lost() -> None:
    world = SmallWorld()

    async def main() -> None:
        await asyncio.sleep(1)

    process = world.launch("a", main)
    before = process.clock.local(0)
    process.jump_clock(10_000)
    process.kill()
    assert process.clock.local(0) == before + 10_000
    process.launch(main)
    process.lose_power()
    assert process.clock.local(0) < 100


def test_timers_follow_a_clock_that_is_changed() -> None:
    world = SmallWorld()
    seen: list[float] = []

    async def main() -> None:
        await asyncio.sleep(10)
        seen.append(world.scheduler.now)
        await asyncio.sleep(10)
        seen.append(world.scheduler.now)

    process = world.launch("a", main)
    world.run(1)
    process.set_clock_rate(3.0)
    world.run(5)
    assert seen == [pytest.approx(4.0, abs=0.01)]
    process.set_clock_rate(1.0)
    process.jump_clock(100)
    world.run(0.001)
    assert seen[1] == pytest.approx(6.0, abs=0.01)


def test_events_at_one_instant_are_ordered_and_bounded() -> None:
    scheduler = Scheduler()
    seen: list[int] = []
    for number in range(5):
        scheduler.at(1.0, seen.append, number)
    scheduler.at(0.5, seen.append, -1)
    scheduler.run_until(2)
    assert seen == [-1, 0, 1, 2, 3, 4]
    assert scheduler.now == 2

    def again() -> None:
        scheduler.at(0, again)

    again()
    with pytest.raises(VirtualTimeStandsStill):
        scheduler.run_until(3)


def test_the_trace_tells_facts_their_order_and_their_times_apart() -> None:
    def trace(*facts: tuple[float, bytes]) -> str:
        scheduler = Scheduler()
        for time, fact in facts:
            scheduler.at(time, scheduler.note, fact)
        scheduler.run_until(10)
        return scheduler.trace_hash

    traces = [
        trace((1, b"a"), (2, b"b")),
        trace((1, b"b"), (2, b"a")),
        trace((1, b"a"), (2.5, b"b")),
        trace((1, b"a")),
    ]
    assert len(set(traces)) == 4
    assert trace((1, b"a"), (2, b"b")) == traces[0]
