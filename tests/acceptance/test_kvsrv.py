"""The single-server scenarios of the course: appends and locks on a lossy network, versioned puts, bounds on memory.

One server, one controller. Where the course's server may answer "maybe" after a retransmission, sessions make the
answer certain here, so it must be. Memory is that of the daemon's own objects, as Python counts it; what the simulator
keeps for it (its disk, its connections' kernel side) is not. Values are of 1 MiB at most.
"""

from __future__ import annotations

import asyncio
import random
import sys
import types
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from raftkv.machines.kv import PUT
from raftkv.protocol.errors import VersionMismatch
from raftkv.protocol.messages import ReadOp, Verb
from raftkv.raft.entry import EntryKind
from raftkv.sim.disk import Media, SimDisk
from raftkv.sim.loop import SimLoop
from raftkv.sim.network import Interface, Network, SimTransport
from raftkv.sim.process import Process, World
from raftkv.sim.scheduler import Scheduler
from tests.acceptance.kv_rig import Clerk, Rig, seeds
from tests.acceptance.kv_rows import Appender, Record, Row, Scale, run_row, scales
from tests.acceptance.rigs import BASE_SEED, ELECTION_TIMEOUT_S, BaseClerk, BaseRig, Raw

MIB = 1024 * 1024
SESSION_BYTES_MAX = 300
READER_BYTES_MAX = 10
LOCK_S = 2.0

P = TypeVar("P")

ROWS = (Row("basic_2", 1, 1), Row("concurrent_2", 5, 1), Row("unreliable_2", 5, 1, unreliable=True))

rows = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


# ---- 2024: appends


@rows
@scales(Scale(3, 1.0, 300), Scale(3, 1.0, 2500))
def test_kvsrv(row: Row, scale: Scale, record_property: Record) -> None:
    run_row(row, scale, Appender, BASE_SEED, record_property)


def append_shows_what_was_there(rig: BaseRig[P], row: Row) -> None:
    """An Append's answer is the version that it made: the clerk's former append lies before it, the next after it."""

    async def main(clerk: BaseClerk) -> None:
        before = 0
        for number in range(10):
            token = b"x %d %d y" % (clerk.number, number)
            version = await clerk.append(b"k", token)
            found = await clerk.get(b"k")
            assert found is not None and found.version >= version > before
            assert found.value.count(token) == 1
            before = version

    tasks = [clerk.spawn(main(clerk)) for clerk in rig.clerks_of(row.clients)]
    rig.finish_all(tasks, 60)
    for task in tasks:
        assert task.result is None
    value = rig.local_get(rig.servers[0], b"k")
    assert value is not None and value.version == 10 * row.clients


@rows
@seeds(1, 5)
def test_append_shows_what_was_there(row: Row, seed: int) -> None:
    with Rig(1, seed, unreliable=row.unreliable) as rig:
        append_shows_what_was_there(rig, row)


def unreliable_one_key_2(rig: BaseRig[P]) -> None:
    clerks = rig.clerks_of(5)

    async def append_ten(clerk: BaseClerk) -> None:
        for number in range(10):
            await clerk.append(b"k", b"x %d %d y" % (clerk.number, number))

    rig.finish_all([clerk.spawn(append_ten(clerk)) for clerk in clerks], 60)
    found = clerks[0].do(clerks[0].get(b"k"))
    assert found is not None and found.version == 50
    for clerk in clerks:
        places = [found.value.find(b"x %d %d y" % (clerk.number, number)) for number in range(10)]
        assert -1 not in places and places == sorted(places)


@seeds(3, 20)
def test_unreliable_one_key_2(seed: int) -> None:
    with Rig(1, seed, unreliable=True) as rig:
        unreliable_one_key_2(rig)


# ---- 2025: versioned puts


def test_reliable_put() -> None:
    with Rig(1, 0) as rig:
        clerk = rig.clerk()
        assert clerk.do(clerk.put(b"k", b"one", 0)) == 1
        found = clerk.do(clerk.get(b"k"))
        assert found == (b"one", 1)
        with pytest.raises(VersionMismatch) as mismatch:
            clerk.do(clerk.put(b"k", b"again", 0))
        assert mismatch.value.version == 1
        with pytest.raises(VersionMismatch) as mismatch:
            clerk.do(clerk.put(b"absent", b"v", 1))
        assert mismatch.value.version == 0, "there is no such key"
        assert clerk.do(clerk.get(b"absent")) is None
        assert clerk.do(clerk.get(b"k")) == found, "what was refused has changed something"


def put_concurrent(rig: BaseRig[P], seconds: float, record: Record) -> None:
    """Ten clients on one key: its version is the number of puts that were done."""
    until_s = rig.now + seconds

    async def main(clerk: BaseClerk) -> int:
        done = version = 0
        while rig.now < until_s:
            try:
                version = await clerk.put(b"k", b"%d/%d" % (clerk.number, done), version)
                done += 1
            except VersionMismatch as error:
                version = error.version
        return done

    tasks = [clerk.spawn(main(clerk)) for clerk in rig.clerks_of(10)]
    rig.finish_all(tasks, 30)
    done = sum(task.result for task in tasks)
    value = rig.local_get(rig.servers[0], b"k")
    assert value is not None and value.version == done >= 10
    record("puts", done)


@pytest.mark.parametrize("unreliable", [False, True], ids=["reliable", "unreliable"])
@pytest.mark.parametrize(
    "seconds", [pytest.param(0.3, id="quick"), pytest.param(1.0, id="long", marks=pytest.mark.long)]
)
def test_put_concurrent(unreliable: bool, seconds: float, record_property: Record) -> None:
    with Rig(1, BASE_SEED, unreliable=unreliable) as rig:
        put_concurrent(rig, seconds * (3 if unreliable else 1), record_property)


@seeds(2, 10)
def test_unreliable_net(seed: int, record_property: Record) -> None:
    """100 puts, each done exactly once although some were sent, and even logged, more than once."""
    with Rig(1, seed, unreliable=True) as rig:
        clerk = rig.clerk()

        async def main() -> None:
            for number in range(100):
                assert await clerk.put(b"k", b"%d" % number, number) == number + 1

        clerk.do(main(), 100)
        assert clerk.do(clerk.get(b"k")) == (b"99", 100)
        logged = [tuple(command[2:4]) for command in logged_commands(rig) if command[0] == PUT]
        assert len(set(logged)) == 100
        record_property("logged again", len(logged) - 100)
        assert len(logged) > 100, "nothing was sent again once it had been logged: the network is too good"


def logged_commands(rig: Rig) -> list[list[Any]]:
    """All in the server's log, which is whole."""
    process = rig.servers[0]
    assert process.daemon is not None and process.daemon.replica is not None
    raft, machine = process.daemon.replica.raft, process.daemon.replica.machine
    entries = raft.entries_from(raft.first_index, 1 << 40)
    return [command for entry in entries if entry.kind == EntryKind.COMMANDS for command in machine.decode(entry.data)]


# ---- locks


class Lock:
    """A lock of the application's, on one key: it holds the owner's name, or nothing."""

    def __init__(self, clerk: BaseClerk, key: bytes, rng: random.Random) -> None:
        self._clerk = clerk
        self._key = key
        self._rng = rng
        self._version = 0

    async def acquire(self) -> None:
        name = b"clerk %d" % self._clerk.number
        while True:
            found = await self._clerk.get(self._key)
            if found is None or not found.value:
                try:
                    self._version = await self._clerk.put(self._key, name, found.version if found is not None else 0)
                    return
                except VersionMismatch:
                    continue
            await asyncio.sleep(self._rng.uniform(0.005, 0.02))

    async def release(self) -> None:
        await self._clerk.put(self._key, b"", self._version)


def lock(rig: BaseRig[P], clients: int, unreliable: bool, locks: int, record: Record) -> None:
    """Never two holders, and all of them get on."""
    until_s = rig.now + LOCK_S * rig.slower
    holders = [0] * locks
    taken = [0]

    async def main(clerk: BaseClerk) -> None:
        rng = random.Random(f"{rig.seed}/{clerk.number}")
        mine = [Lock(clerk, b"lock %d" % number, rng) for number in range(locks)]
        while rig.now < until_s:
            for number, lock in enumerate(mine):
                await lock.acquire()
                holders[number] += 1
                assert holders[number] == 1, f"seed {rig.seed}: two hold lock {number}"
            taken[0] += 1
            await asyncio.sleep(0.01)
            assert holders == [1] * locks
            for number, lock in reversed(list(enumerate(mine))):
                holders[number] -= 1
                await lock.release()

    tasks = [clerk.spawn(main(clerk)) for clerk in rig.clerks_of(clients)]
    rig.finish_all(tasks, 60)
    for task in tasks:
        assert task.result is None
    record("taken", taken[0])
    assert taken[0] >= (5 if unreliable else 20)


@pytest.mark.parametrize("locks", [1, 2], ids=["one_lock", "two_nested"])
@pytest.mark.parametrize("unreliable", [False, True], ids=["reliable", "unreliable"])
@pytest.mark.parametrize("clients", [1, 10])
@seeds(1, 4)
def test_lock(seed: int, clients: int, unreliable: bool, locks: int, record_property: Record) -> None:
    with Rig(1, seed, unreliable=unreliable) as rig:
        lock(rig, clients, unreliable, locks, record_property)


# ---- memory


OUTSIDE = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType,
    SimLoop, SimDisk, Media, Interface, Network, SimTransport, Scheduler, Process, World,
)  # fmt: skip
"""What isn't the daemon's own: code, and the world around it."""


def heap_bytes(rig: Rig) -> int:
    """All that the server's daemon holds, reached from it, as `sys.getsizeof` counts."""
    import gc

    todo: list[Any] = [rig.servers[0].daemon]
    seen: set[int] = set()
    total = 0
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, OUTSIDE):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        todo.extend(gc.get_referents(item))
    return total


def run_and_settle(rig: Rig, clerk: Clerk, work: Coroutine[Any, Any, None]) -> int:
    """Then let the log be cut, and count."""
    clerk.do(work, 600)
    rig.sleep(2 * ELECTION_TIMEOUT_S)
    return heap_bytes(rig)


def test_the_count_of_memory_counts() -> None:
    """It sees a value in the store, and not the simulated disk."""
    with Rig(1, 0, max_raft_state=65536) as rig:
        clerk = rig.clerk()
        empty = heap_bytes(rig)
        clerk.do(clerk.put(b"k", bytes(MIB)))
        rig.sleep(ELECTION_TIMEOUT_S)
        grown = heap_bytes(rig) - empty
        assert MIB < grown < 1.2 * MIB
        assert empty < 3 * MIB


def memory_rig(seed: int = 0) -> Rig:
    return Rig(1, seed, max_raft_state=65536)


def test_mem_get_2(record_property: Record) -> None:
    """A large value that two clients have read, and that was overwritten, is nowhere any more."""
    with memory_rig() as rig:
        writer, first, second = rig.clerks_of(3)
        empty = heap_bytes(rig)
        writer.do(writer.put(b"k", random.Random(0).randbytes(MIB)))
        for reader in (first, second):
            found = reader.do(reader.get(b"k"))
            assert found is not None and len(found.value) == MIB
        writer.do(writer.put(b"k", b"0"))
        rig.sleep(ELECTION_TIMEOUT_S)
        grown = heap_bytes(rig) - empty
        record_property("grown", grown)
        assert grown < 0.25 * MIB, "a reply, or the log, still holds it"


def test_mem_put_2(record_property: Record) -> None:
    with memory_rig() as rig:
        first, second = rig.clerks_of(2)
        empty = heap_bytes(rig)
        for clerk in (first, second):
            clerk.do(clerk.put(b"k", random.Random(clerk.number).randbytes(MIB)))
        first.do(first.put(b"k", b"0"))
        rig.sleep(ELECTION_TIMEOUT_S)
        grown = heap_bytes(rig) - empty
        record_property("grown", grown)
        assert grown < 0.25 * MIB


def test_mem_append_2(record_property: Record) -> None:
    """Two appends of half the largest value: at most three times one of them."""
    with memory_rig() as rig:
        first, second = rig.clerks_of(2)
        empty = heap_bytes(rig)
        for clerk in (first, second):
            clerk.do(clerk.append(b"k", random.Random(clerk.number).randbytes(MIB // 2)))
        rig.sleep(ELECTION_TIMEOUT_S)
        grown = heap_bytes(rig) - empty
        record_property("grown", grown)
        assert grown <= 1.5 * MIB


def put_as_many(clerk: Clerk, rig: Rig, clients: int) -> Callable[[], Coroutine[Any, Any, None]]:
    """So many clients, each with an id of its own and one Put of 1000 bytes; fifty of them at a time."""
    value = bytes(1000)

    async def main() -> None:
        raw = Raw(clerk, rig.servers[0], timeout_s=60)
        await raw.open()

        async def one() -> None:
            command = raw.command(PUT, b"k", value, None)
            command[2] = clerk.rng.randbytes(16)
            assert (await raw.write(command))[0] == 0

        for _ in range(clients // 50):
            async with asyncio.TaskGroup() as group:
                for _ in range(50):
                    group.create_task(one())
        raw.close()

    return main


@pytest.mark.parametrize(
    "clients", [pytest.param(2_000, id="quick"), pytest.param(100_000, id="long", marks=pytest.mark.long)]
)
@pytest.mark.timeout(400)
def test_mem_put_many_clients(clients: int, record_property: Record) -> None:
    """A client that has put once costs its session row, which is at most 300 bytes, and bounded caches."""
    with Rig(1, 0, max_raft_state=MIB) as rig:
        clerk = rig.clerk()
        half = put_as_many(clerk, rig, clients // 2)
        run_and_settle(rig, clerk, put_as_many(clerk, rig, 200)())
        heap = run_and_settle(rig, clerk, half())
        state = rig.snapshot_bytes(rig.servers[0])
        heap_each = (run_and_settle(rig, clerk, half()) - heap) / (clients // 2)
        state_each = (rig.snapshot_bytes(rig.servers[0]) - state) / (clients // 2)
        record_property("state bytes a client", state_each)
        record_property("heap bytes a client", heap_each)
        assert 0 < state_each <= SESSION_BYTES_MAX
        if clients >= 20_000:  # the cache of sessions is full, and grows no more
            assert heap_each <= SESSION_BYTES_MAX


@pytest.mark.parametrize(
    "clients", [pytest.param(1_000, id="quick"), pytest.param(20_000, id="long", marks=pytest.mark.long)]
)
def test_mem_get_many_clients(clients: int, record_property: Record) -> None:
    """Clients that come, read once and go leave nothing behind."""
    with memory_rig() as rig:
        clerk = rig.clerk()
        clerk.do(clerk.put(b"k", b"v"))

        async def read_once() -> None:
            raw = Raw(clerk, rig.servers[0])
            shard = raw.command(PUT, b"k")[1]
            value, version = await raw.request(Verb.READ, [1, 0, ReadOp.GET, shard, b"k"])
            assert (value, version) == (b"v", 1)
            raw.close()

        def many(count: int) -> Coroutine[Any, Any, None]:
            async def main() -> None:
                for _ in range(count // 50):
                    async with asyncio.TaskGroup() as group:
                        for _ in range(50):
                            group.create_task(read_once())

            return main()

        before = run_and_settle(rig, clerk, many(200))
        state = rig.snapshot_bytes(rig.servers[0])
        grown = run_and_settle(rig, clerk, many(clients)) - before
        record_property("bytes a client", grown / clients)
        assert grown / clients < READER_BYTES_MAX
        assert rig.snapshot_bytes(rig.servers[0]) == state
