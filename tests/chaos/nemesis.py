"""When things go wrong: some tracks of faults, each through a shuffled bag of its kinds again and again.

Half of the faults are alone, so that what clients wait for can be told to be theirs; the others meet those of the
other tracks. What happened is recorded with its times, by the same clock as the history. A fault that finds
something wrong by itself (a daemon that doesn't stop, or doesn't start) ends its track, and the run fails.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from raftkv.client.tasks import gather_ordered
from tests.chaos.faults import Fault, Scene

ALONE_SHARE = 0.5
AFTERMATH_S = 1.0
"""What clients wait for so soon after a fault's end is still that fault's; one that is alone stays so meanwhile."""


@dataclass(frozen=True)
class Event:
    """One fault that was done and undone."""

    kind: str
    start_ns: int
    end_ns: int
    text: str


@dataclass(frozen=True)
class Track:
    """Kinds of faults, one at a time, each `each` times at least, with pauses between them."""

    faults: Mapping[str, Fault]
    each: int
    pause_s: tuple[float, float]


@dataclass
class Nemesis:
    """`say` gets a line for each fault."""

    scene: Scene
    rng: random.Random
    say: Callable[[str], None]
    events: list[Event] = field(default_factory=list)
    _running: int = 0
    _alone: bool = False
    _turn: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def counts(self) -> Counter[str]:
        return Counter(event.kind for event in self.events)

    async def run(self, tracks: Sequence[Track], seconds: float) -> None:
        """All tracks, for so long at least, and until each has had all its kinds as often as it must."""
        end_s = time.monotonic() + seconds

        def over() -> bool:
            counts = self.counts
            done = all(counts[kind] >= track.each for track in tracks for kind in track.faults)
            return done and time.monotonic() >= end_s

        await gather_ordered([self._follow(track, over) for track in tracks if track.faults], len(tracks))
        await asyncio.sleep(end_s - time.monotonic())

    async def _follow(self, track: Track, over: Callable[[], bool]) -> None:
        rng = self.rng
        bag: list[str] = []
        while not over():
            if not bag:
                bag = rng.sample(list(track.faults), len(track.faults))
            kind = bag.pop()
            alone = rng.random() < ALONE_SHARE
            async with self._stage(alone):
                start_ns = time.monotonic_ns()
                text = await track.faults[kind](self.scene)
                if not text:
                    continue
                event = Event(kind, start_ns, time.monotonic_ns(), text)
                self.events.append(event)
                self.say(f"{kind}: {text} ({(event.end_ns - start_ns) / 1e9:.1f} s)")
                if alone:
                    await asyncio.sleep(AFTERMATH_S)
            await asyncio.sleep(rng.uniform(*track.pause_s))

    @asynccontextmanager
    async def _stage(self, alone: bool) -> AsyncIterator[None]:
        """Wait until a fault may begin: alone, or with one that isn't."""
        async with self._turn:
            await self._turn.wait_for(lambda: not self._alone and not (alone and self._running))
            self._running += 1
            self._alone = alone
        try:
            yield
        finally:
            self._running -= 1
            self._alone = False
            async with self._turn:
                self._turn.notify_all()
