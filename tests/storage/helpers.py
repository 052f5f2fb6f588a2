"""What the storage tests share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raftkv.raft.actions import HardState
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.membership import Membership
from raftkv.storage.wal import Wal, WalState
from tests.storage.fake_disk import FakeDisk, PowerLost

T = TypeVar("T")

SEGMENT_BYTES = 4096
DIRECTORY = "data/wal"
MEMBERS = Membership((1, 2, 3), (), ((1, b"a" * 16), (2, b"b" * 16), (3, b"c" * 16)))


def run(scenario: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(scenario, 30))


async def survives(disk: FakeDisk, scenario: Coroutine[Any, Any, Any]) -> bool:
    """Run until the scenario ends (True) or the power goes (False). Other failures are raised."""
    lost = asyncio.Event()
    disk.on_lost = lost.set
    task = asyncio.ensure_future(scenario)
    waiting = asyncio.ensure_future(lost.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        if not task.done():
            task.cancel()
        await task
    except (PowerLost, asyncio.CancelledError):
        return False
    return not disk.lost


def entry(index: int, term: int = 1, data: bytes | None = None) -> Entry:
    return Entry.make(term, index, EntryKind.COMMANDS, index, b"%d.%d " % (term, index) * 5 if data is None else data)


def entries(first: int, last: int, term: int = 1) -> list[Entry]:
    return [entry(index, term) for index in range(first, last + 1)]


def open_wal(disk: FakeDisk, *, segment_bytes: int = SEGMENT_BYTES, may_create: bool = True) -> tuple[Wal, WalState]:
    return Wal.open(disk, DIRECTORY, segment_bytes=segment_bytes, may_create=may_create)


async def append(wal: Wal, hard_state: HardState | None, new: list[Entry]) -> None:
    """Append and wait until it is durable."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    wal.append(hard_state, new, lambda: future.set_result(None))
    await future


async def reset(
    wal: Wal, hard_state: HardState, index: int, term: int, membership: Membership | None = MEMBERS
) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    wal.reset(hard_state, index, term, membership, lambda: future.set_result(None))
    await future


async def settle() -> None:
    """Let everything that was submitted run."""
    for _ in range(50):
        await asyncio.sleep(0)


@dataclass
class Model:
    """What a log should hold after each call: `states[n]` is that after n calls."""

    state: WalState = field(default_factory=lambda: WalState(HardState(), 0, 0, None, []))
    states: list[WalState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.states.append(self.state)

    @property
    def last_index(self) -> int:
        return self.state.entries[-1].index if self.state.entries else self.state.start_index

    def append(self, hard_state: HardState | None, new: list[Entry]) -> None:
        old = self.state
        kept = [e for e in old.entries if not new or e.index < new[0].index]
        self._now(WalState(hard_state or old.hard_state, old.start_index, old.start_term, old.membership, kept + new))

    def compact(self, index: int, membership: Membership) -> None:
        old = self.state
        terms = {e.index: e.term for e in old.entries} | {old.start_index: old.start_term}
        kept = [e for e in old.entries if e.index > index]
        self._now(WalState(old.hard_state, index, terms[index], membership, kept))

    def reset(self, hard_state: HardState, index: int, term: int, membership: Membership) -> None:
        self._now(WalState(hard_state, index, term, membership, []))

    def _now(self, state: WalState) -> None:
        self.state = state
        self.states.append(state)


class LogDriver:
    """Makes random calls on a log, keeps the model and how many calls were acknowledged."""

    def __init__(self, wal: Wal, state: WalState, rng: random.Random) -> None:
        self.wal = wal
        self.rng = rng
        self.model = Model(state)
        self.acknowledged = 0

    def call(self) -> None:
        rng, model = self.rng, self.model
        state = model.state
        done = self._done(len(model.states))
        choice = rng.random()
        if choice < 0.7:
            low = max(state.start_index + 1, model.last_index - rng.choice((-1, -1, -1, 0, 2, 5)))
            first = min(low, model.last_index + 1)
            term = max(state.hard_state.term, 1)
            hard_state = None
            if first <= model.last_index or rng.random() < 0.2:
                term += 1
                hard_state = HardState(term, rng.choice((None, 1, 2, 3)))
            size = rng.choice((0, 30, 30, 200, 700))
            new = [entry(i, term, rng.randbytes(size)) for i in range(first, first + rng.choice((0, 1, 1, 3, 6)))]
            model.append(hard_state, new)
            self.wal.append(hard_state, new, done)
        elif choice < 0.95:
            index = rng.randint(state.start_index, model.last_index)
            membership = Membership((1, 2, index + 3))
            model.compact(index, membership)
            self.wal.compact(index, model.state.start_term, membership)
            model.append(None, [])
            self.wal.append(None, [], self._done(len(model.states) - 1))
        else:
            index = model.last_index + rng.randint(0, 5)
            hard_state = HardState(state.hard_state.term + 1)
            model.reset(hard_state, index, hard_state.term, MEMBERS)
            self.wal.reset(hard_state, index, hard_state.term, MEMBERS, done)

    def _done(self, calls: int) -> Callable[[], None]:
        def done() -> None:
            assert calls > self.acknowledged, "acknowledged out of order"
            self.acknowledged = calls

        return done

    def check(self, recovered: WalState) -> None:
        """What came back is the log after some call at or after the last acknowledged one."""
        possible = self.model.states[self.acknowledged :]
        assert recovered in possible, (recovered, possible)
