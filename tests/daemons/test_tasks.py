"""Background tasks end in the order of their start, and a failure is noticed."""

from __future__ import annotations

import asyncio

from raftkv.daemons.tasks import Tasks


def test_cancelled_in_the_order_of_their_start() -> None:
    async def scenario() -> list[int]:
        ended: list[int] = []

        async def sleeper(number: int) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(number)

        tasks = Tasks(lambda name, error: None)
        for number in range(50):
            tasks.start(sleeper(number), f"sleeper-{number}")
        await asyncio.sleep(0)
        await tasks.cancel_all()
        return ended

    assert asyncio.run(scenario()) == list(range(50))


def test_a_failure_is_reported_once_by_name() -> None:
    async def scenario() -> list[tuple[str, str]]:
        crashed: list[tuple[str, str]] = []
        tasks = Tasks(lambda name, error: crashed.append((name, repr(error))))

        async def failing() -> None:
            raise RuntimeError("no")

        tasks.start(failing(), "failing")
        await asyncio.sleep(0.01)
        await tasks.cancel_all()
        return crashed

    assert asyncio.run(scenario()) == [("failing", "RuntimeError('no')")]
