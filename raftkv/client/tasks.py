"""Concurrency that leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def gather_ordered(coroutines: Sequence[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """Their results, in order, running at most `at_once` of them at a time.

    When one fails, or the caller is cancelled, the others are cancelled, in order, and awaited: nothing runs on.
    (asyncio.gather leaves the others running; TaskGroup cancels in the order of addresses.)
    """
    gate = asyncio.Semaphore(at_once)

    async def gated(coroutine: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await coroutine

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(gated(coroutine)) for coroutine in coroutines]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()  # raises the failure
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for coroutine in coroutines:
            coroutine.close()  # those that never began
