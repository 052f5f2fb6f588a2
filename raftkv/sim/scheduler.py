"""Virtual time: one queue of events for the whole simulated world, and the hash of all that happened.

Events run in the order of (time, sequence), so a run depends on nothing but its seed. Time moves only
from event to event. The scheduler must never look at a real clock, and never run an event before its time.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

_STAMP = struct.Struct("<d")


class VirtualTimeStandsStill(AssertionError):
    """Too many events at one instant: something runs in circles without waiting for anything."""


EVENTS_PER_INSTANT_MAX = 100_000


class Scheduler:
    """`now` is the true time of the simulated world in seconds; processes see it through their own clocks."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._trace = hashlib.blake2b(digest_size=16)
        self._stopped = False

    def at(self, time: float, callback: Callable[..., None], *args: Any) -> None:
        """Call `callback(*args)` at `time`, or now if that has passed. It can't be taken back: the
        callback checks whether it still matters."""
        self._sequence = sequence = self._sequence + 1
        heappush(self._heap, (time if time > self.now else self.now, sequence, callback, args))

    def after(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
        self.at(self.now + delay_s, callback, *args)

    def run_until(self, deadline: float) -> None:
        """Run all events up to `deadline`, or until `stop`; then `now` is the deadline."""
        heap = self._heap
        self._stopped = False
        at_this_instant = 0
        while heap and heap[0][0] <= deadline and not self._stopped:
            time, _, callback, args = heappop(heap)
            if time > self.now:
                self.now = time
                at_this_instant = 0
            else:
                at_this_instant += 1
                if at_this_instant > EVENTS_PER_INSTANT_MAX:
                    raise VirtualTimeStandsStill(f"at {time:.6f} s, in {callback!r}")
            self.events += 1
            callback(*args)
        if not self._stopped and deadline > self.now:
            self.now = deadline

    def stop(self) -> None:
        """Let `run_until` return after the present event."""
        self._stopped = True

    def clear(self) -> None:
        """The world ends: nothing that was to come happens any more."""
        self._heap.clear()

    # ---- what happened

    def note(self, what: bytes) -> None:
        """Add a fact, and when it happened, to the trace."""
        self._trace.update(_STAMP.pack(self.now))
        self._trace.update(what)

    @property
    def trace_hash(self) -> str:
        """A digest of every fact noted so far: equal for equal runs, whatever ran before them."""
        return self._trace.hexdigest()
