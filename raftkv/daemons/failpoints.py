"""Places in the course of a transaction, by name, at which a test can make a daemon crash or stall.

Nothing happens at any of them unless it was armed: by a test that holds the daemon's `Failpoints`, or, in a process of
its own, by the variable RAFTKV_FAILPOINTS, for tests only: `NAME=crash` or `NAME=stall:SECONDS`, several separated by
commas. This module must never be the reason that anything happens in production.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

NAMES = (
    "coordinator took over",
    "coordinator resolved a group",
    "coordinator logged begin",
    "coordinator got a vote",
    "coordinator got all votes",
    "coordinator logged decision",
    "coordinator answered",
    "coordinator got an acknowledgement",
    "coordinator got all acknowledgements",
    "coordinator logged fence",
    "coordinator got all outcomes",
    "group got prepare",
    "group logged prepare",
    "group got decision",
    "group logged decision",
    "group got commit",
    "group logged commit",
    "group asked in doubt",
)
"""In the order in which a transaction comes by, first at the coordinators, then at a group; `commit` is that of a
transaction which needs no coordinators."""

VARIABLE = "RAFTKV_FAILPOINTS"

Action = Callable[[], float]
"""What happens there: it returns how long to stall, in seconds, or it doesn't return."""


class Failpoints:
    """Those of one daemon."""

    def __init__(self) -> None:
        self._armed: dict[str, Action] = {}

    def arm(self, name: str, action: Action) -> None:
        assert name in NAMES, name
        self._armed[name] = action

    def disarm(self, name: str) -> None:
        self._armed.pop(name, None)

    async def reach(self, name: str) -> None:
        """For a task that comes by."""
        if self._armed:
            await self._stall(name)

    def pass_by(self, name: str, go_on: Callable[..., None], *args: Any) -> None:
        """For a callback that comes by: `go_on(*args)`, now or after the stall."""
        action = self._armed.get(name)
        stall_s = 0.0 if action is None else action()
        if stall_s > 0:
            asyncio.get_running_loop().call_later(stall_s, go_on, *args)
        else:
            go_on(*args)

    async def _stall(self, name: str) -> None:
        action = self._armed.get(name)
        stall_s = 0.0 if action is None else action()
        if stall_s > 0:
            await asyncio.sleep(stall_s)


def from_environment(crash: Callable[[str], None]) -> Failpoints:
    """Those that the variable arms; `crash(text)` ends the process. Raise ValueError if it can't be read."""
    failpoints = Failpoints()
    for part in filter(None, os.environ.get(VARIABLE, "").split(",")):
        name, _, what = (text.strip() for text in part.partition("="))
        kind, _, seconds = what.partition(":")
        if name not in NAMES or kind not in ("crash", "stall"):
            raise ValueError(f"{VARIABLE}: {part!r} is not NAME=crash or NAME=stall:SECONDS")
        failpoints.arm(name, _crash(crash, name) if kind == "crash" else _stall(float(seconds)))
    return failpoints


def _crash(crash: Callable[[str], None], name: str) -> Action:
    def action() -> float:
        crash(f"failpoint: {name}")
        return 0.0

    return action


def _stall(seconds: float) -> Action:
    return lambda: seconds
