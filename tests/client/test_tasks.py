"""gather_ordered: results in order, a bound, and nothing left running."""

from __future__ import annotations

import asyncio

import pytest

from raftkv.client.tasks import gather_ordered
from tests.client.fakes import run_async


def test_results_in_order_and_never_too_many_at_once() -> None:
    running = 0
    most = 0

    async def job(n: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (5 - n % 5))
        running -= 1
        return n

    async def run() -> None:
        assert await gather_ordered([job(n) for n in range(20)], 4) == list(range(20))
        assert await gather_ordered([job(0) for _ in range(0)], 4) == []

    run_async(run())
    assert most == 4


@pytest.mark.parametrize("how", ["a failure", "a cancellation"])
def test_nothing_is_left(how: str) -> None:
    ended: list[int] = []

    async def job(n: int) -> None:
        try:
            if n == 1 and how == "a failure":
                raise ValueError("job 1")
            await asyncio.sleep(60)
        finally:
            ended.append(n)

    async def run() -> None:
        gathering = asyncio.ensure_future(gather_ordered([job(n) for n in range(9)], 3))
        await asyncio.sleep(0.01)
        if how == "a cancellation":
            gathering.cancel()
        with pytest.raises((ValueError, asyncio.CancelledError)):
            await gathering
        assert len(asyncio.all_tasks()) == 1

    run_async(run())
    assert sorted(ended)[:3] == [0, 1, 2]
