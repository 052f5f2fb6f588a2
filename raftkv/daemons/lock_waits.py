"""Requests that wait at a replica until a transaction lets go of what they are about.

First come, first served, per key. Nothing of it is replicated: the queues are emptied when the replica's role
changes, and whoever has waited long enough is told that the key is locked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

from raftkv.machines.kv import KvMachine
from raftkv.protocol.limits import LOCK_WAIT_S_MAX

WAITING_MAX = 4_096
"""Requests that wait; beyond it they are refused at once."""

Step = Callable[[], None]


class Waiting:
    """One request. `go_on` tries again, `give_up` refuses it."""

    __slots__ = ("give_up", "go_on", "is_blocked", "timer")

    def __init__(self, is_blocked: Callable[[], bool], go_on: Step, give_up: Step) -> None:
        self.is_blocked = is_blocked
        self.go_on = go_on
        self.give_up = give_up
        self.timer: asyncio.TimerHandle | None = None


class LockWaits:
    """All that wait at one replica; a `place` is what they queue for."""

    def __init__(self, machine: KvMachine) -> None:
        self._machine = machine
        self._loop = asyncio.get_running_loop()
        self._queues: dict[Hashable, dict[Waiting, None]] = {}
        self._count = 0
        self._seen = machine.unlocks

    def __len__(self) -> int:
        return self._count

    def deadline_s(self) -> float:
        """Of a request that begins to wait now, in loop time."""
        return self._loop.time() + LOCK_WAIT_S_MAX

    def has_queue(self, place: Hashable) -> bool:
        return place in self._queues

    def wait(
        self, place: Hashable, deadline_s: float, is_blocked: Callable[[], bool], go_on: Step, give_up: Step
    ) -> None:
        """`go_on()` once `is_blocked()` is false and whoever waits for the same place has gone on, `give_up()` at
        the deadline. One of the two is called, once."""
        if self._count >= WAITING_MAX or deadline_s <= self._loop.time():
            give_up()
            return
        waiting = Waiting(is_blocked, go_on, give_up)
        waiting.timer = self._loop.call_at(deadline_s, self._waited_enough, place, waiting)
        self._queues.setdefault(place, {})[waiting] = None
        self._count += 1

    def applied(self) -> None:
        """Something was applied: let those go on whose lock is gone."""
        unlocks = self._machine.unlocks
        if unlocks == self._seen:
            return
        self._seen = unlocks
        for place in [place for place, queue in self._queues.items() if not next(iter(queue)).is_blocked()]:
            for waiting in self._take(place):
                waiting.go_on()

    def clear(self) -> None:
        """They have waited in vain."""
        for place in list(self._queues):
            for waiting in self._take(place):
                waiting.give_up()

    def _take(self, place: Hashable) -> list[Waiting]:
        queue = self._queues.pop(place)
        self._count -= len(queue)
        for waiting in queue:
            if waiting.timer is not None:
                waiting.timer.cancel()
        return list(queue)

    def _waited_enough(self, place: Hashable, waiting: Waiting) -> None:
        """Its own timer says so: the loop's clock may be a step behind it."""
        queue = self._queues[place]
        del queue[waiting]
        self._count -= 1
        if not queue:
            del self._queues[place]
        waiting.give_up()
