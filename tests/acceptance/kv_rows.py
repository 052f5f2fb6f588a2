"""The generic body of the key-value scenarios: what clerks do in a row, and what must hold after each iteration.

Two manners: appends, puts and gets (2024), and versioned puts (2025). The history of a row is checked by the rig.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pytest

from raftkv.machines.slots import shard_of
from raftkv.protocol.errors import OutcomeUnknown, VersionMismatch
from tests.acceptance.kv_rig import Rig
from tests.acceptance.rigs import ELECTION_TIMEOUT_S, NO_LIMIT, BaseClerk, BaseRig

STATE_FACTOR = 8
"""Raft state may be so many times `maxraftstate`."""
FINISH_TIMEOUT_S = 20.0
"""How long the last operations may take after all has healed and restarted."""

Record = Callable[[str, object], None]
P = TypeVar("P")


class Row(NamedTuple):
    name: str
    clients: int
    servers: int
    unreliable: bool = False
    restarts: bool = False
    partitions: bool = False
    max_raft_state: int = NO_LIMIT
    random_keys: bool = False


class Scale(NamedTuple):
    """How much of a row is run: iterations, seconds each, and about how many operations in all."""

    iterations: int
    seconds: float
    operations: int


def scales(quick: Scale, long: Scale) -> pytest.MarkDecorator:
    values = [pytest.param(quick, id="quick"), pytest.param(long, id="long", marks=pytest.mark.long)]
    return pytest.mark.parametrize("scale", values)


class User:
    """What one clerk does in an iteration."""

    def __init__(self, clerk: BaseClerk, row: Row, think_s: float) -> None:
        self.clerk = clerk
        self.row = row
        self.rng = random.Random(f"{clerk.rig.seed}/user {clerk.number}")
        self.operations = 0
        self._think_s = think_s

    async def loop(self, until_s: float) -> None:
        while self.clerk.rig.now < until_s:
            await self.act()
            self.operations += 1
            await asyncio.sleep(self.rng.random() * 2 * self._think_s)

    async def act(self) -> None:
        raise NotImplementedError

    async def check(self) -> None:
        """At the end of an iteration, when nothing ails the cluster."""


class Appender(User):
    """2024: appends and gets on a key of its own, which it knows; or those and puts on random keys."""

    def __init__(self, clerk: BaseClerk, row: Row, think_s: float) -> None:
        super().__init__(clerk, row, think_s)
        self.keys = [b"%d" % number for number in range(row.clients)]
        self.own = b""
        self._tokens = 0

    async def act(self) -> None:
        clerk, number = self.clerk, self.clerk.number
        key = self.rng.choice(self.keys) if self.row.random_keys else b"%d" % number
        token = b"x %d %d y" % (number, self._tokens)
        self._tokens += 1
        if self.rng.random() < 0.5:
            await clerk.append(key, token)
            self.own += token
        elif self.row.random_keys and self.rng.random() < 0.1:
            await clerk.put(key, token)
        elif self.row.random_keys:
            await clerk.get(key)
        else:
            await self.check()

    async def check(self) -> None:
        if not self.row.random_keys:
            found = await self.clerk.get(b"%d" % self.clerk.number)
            assert (found.value if found is not None else b"") == self.own, "not what this clerk has appended"


class VersionedPutter(User):
    """2025: reads a version, then puts on condition that it is still that; all clerks on the same keys."""

    def __init__(self, clerk: BaseClerk, row: Row, think_s: float) -> None:
        super().__init__(clerk, row, think_s)
        self.keys = [b"k%d" % number for number in range(100)] if row.random_keys else [b"k"]
        self.versions = dict.fromkeys(self.keys, 0)
        self.done: dict[bytes, int] = {}
        self.unknown: dict[bytes, int] = {}
        self._puts = 0

    async def act(self) -> None:
        key = self.rng.choice(self.keys)
        self._puts += 1
        value = b'{"id":%d,"put":%d}' % (self.clerk.number, self._puts)
        try:
            self.versions[key] = await self.clerk.put(key, value, self.versions[key])
            self.done[key] = self.done.get(key, 0) + 1
        except OutcomeUnknown:
            self.unknown[key] = self.unknown.get(key, 0) + 1
        except VersionMismatch as error:
            found = await self.clerk.get(key)
            assert found is not None and found.version >= error.version > 0
            self.versions[key] = found.version


def run_row(row: Row, scale: Scale, kind: type[User], seed: int, record: Record) -> None:
    with Rig(row.servers, seed, unreliable=row.unreliable, max_raft_state=row.max_raft_state) as rig:
        work_row(rig, row, scale, kind, record)


def work_row(rig: BaseRig[P], row: Row, scale: Scale, kind: type[User], record: Record) -> None:
    think_s = row.clients * scale.iterations * scale.seconds / scale.operations
    if row.unreliable:
        think_s /= 4  # the operations themselves take long
    users = [kind(clerk, row, think_s) for clerk in rig.clerks_of(row.clients)]
    largest = 0
    for _ in range(scale.iterations):
        iterate(rig, row, users, scale.seconds)
        largest = max(largest, rig.raft_state_max())
        if row.max_raft_state != NO_LIMIT:
            assert largest <= STATE_FACTOR * row.max_raft_state
        else:
            made = [rig.snapshots_made(process) for process in rig.servers]
            assert not any(made), f"snapshots were made, and the log may grow without limit: {made}"
        if kind is VersionedPutter:
            check_versions(rig, users)
    operations = sum(user.operations for user in users)
    record("operations", operations)
    record("raft state", largest)
    assert operations >= scale.operations / (80 if row.unreliable else 10), f"only {operations} operations"


def iterate(rig: BaseRig[P], row: Row, users: list[User], seconds: float) -> None:
    undisturbed_s = 1.0 if row.partitions else 0.0
    until_s = rig.now + undisturbed_s + seconds
    tasks = [user.clerk.spawn(user.loop(until_s)) for user in users]
    rig.sleep(undisturbed_s)
    while rig.now < until_s:
        if row.partitions:
            left = [process for process in rig.servers if rig.rng.random() < 0.5]
            rig.partition(left, [process for process in rig.servers if process not in left])
        rig.sleep(min(until_s - rig.now, ELECTION_TIMEOUT_S + rig.rng.uniform(0, 0.2)) if row.partitions else seconds)
    if row.partitions:
        rig.heal()
        rig.sleep(ELECTION_TIMEOUT_S)
    if row.restarts:
        rig.restart(rig.servers)
    rig.finish_all(tasks, FINISH_TIMEOUT_S)
    checks = [user.clerk.spawn(user.check()) for user in users]
    rig.finish_all(checks, FINISH_TIMEOUT_S)
    for task in [*tasks, *checks]:
        assert task.result is None  # raises what the clerk got


def check_versions(rig: BaseRig[P], users: list[User]) -> None:
    """Each put that was done took one revision of its shard, and no other did."""
    done: dict[int, int] = {}
    unknown: dict[int, int] = {}
    latest: dict[int, int] = {}
    clerk = rig.clerks[0]
    putters = [user for user in users if isinstance(user, VersionedPutter)]
    for key in putters[0].keys:
        shard = shard_of(key, rig.shards)
        done[shard] = done.get(shard, 0) + sum(user.done.get(key, 0) for user in putters)
        unknown[shard] = unknown.get(shard, 0) + sum(user.unknown.get(key, 0) for user in putters)
        found = clerk.do(clerk.get(key))
        latest[shard] = max(latest.get(shard, 0), found.version if found is not None else 0)
    for shard, version in latest.items():
        assert done[shard] <= version <= done[shard] + unknown[shard], (shard, version, done, unknown)
