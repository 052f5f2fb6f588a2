"""Tasks that belong to somebody: kept referenced, cancelled in the order of their start.

asyncio.TaskGroup cancels its children in the order of their addresses, which differs from run to run;
a simulation needs one order. Every background task of a daemon lives in one of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Tasks:
    """A set of background tasks. `on_crash` gets the exception of a task that failed."""

    def __init__(self, on_crash: Callable[[str, BaseException], None]) -> None:
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._on_crash = on_crash

    def start(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_crash(task.get_name(), error)

    async def cancel_all(self) -> None:
        """Cancel every task, oldest first, and wait until all have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        for task in tasks:
            try:
                await task
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    raise
            except Exception:
                continue  # reported by _ended
