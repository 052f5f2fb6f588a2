"""One loading process on a store in memory and in virtual time: what counts as what, and from when."""

from __future__ import annotations

import asyncio
import itertools
import random
import selectors
import statistics
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar, cast

import pytest

from raftkv.bench.load import Ending, Load, poisson
from raftkv.bench.plan import BadPlan, Plan, Series, Tally, add_series
from raftkv.bench.processes import Measured
from raftkv.bench.report import Report
from raftkv.bench.scenarios import Client, World
from raftkv.client.kv import RaftKV, Value
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import Busy, CommitUnknown, OutcomeUnknown, Timeout, TooLarge

PLAN = Plan(
    scenario="get",
    controllers=("127.0.0.1:9",),
    timeout_s=1.0,
    clients=1,
    processes=1,
    duration_s=1.0,
    warmup_s=0.0,
    keys=10,
    value_bytes=3,
    conflict=0.0,
    groups=None,
    batch=2,
    rate=None,
    seed=1,
)
OWNERS = (1, 1, 2, 2)
STALL_S = 0.5


class VirtualSelector(selectors.DefaultSelector):
    """Waits for nothing: the clock moves on instead."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everybody waits for ever"
            self.now_s += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time takes none, so that the load on this machine decides nothing."""

    def __init__(self) -> None:
        self._virtual = VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


T = TypeVar("T")


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now_s() -> float:
    return asyncio.get_running_loop().time()


class MemoryKv:
    """A store in a dict. It answers after 1 ms, but nobody before `stalled_until_s`; `fails` says with what."""

    def __init__(self, fails: Callable[[], Exception | None] = lambda: None) -> None:
        self.data: dict[bytes, bytes] = {}
        self.puts: list[bytes] = []
        self.stalled_until_s = 0.0
        self.retries = 0
        self._fails = fails

    async def get(self, key: bytes) -> Value | None:
        await self._answer()
        return Value(self.data[key], 1) if key in self.data else None

    async def put(self, key: bytes, value: bytes) -> int:
        await self._answer()
        self.puts.append(key)
        self.data[key] = value
        return 1

    async def _answer(self) -> None:
        await asyncio.sleep(max(0.001, self.stalled_until_s - now_s()))
        error = self._fails()
        if error is not None:
            self.retries += 1
            raise error


def load_of(plan: Plan, kv: MemoryKv, now: Callable[[], float] = now_s) -> tuple[Load, list[dict[str, Any]]]:
    """All of the plan's load as one process, and what it will have said."""
    said: list[dict[str, Any]] = []
    clients = [Client(cast(RaftKV, kv), number, plan.seed) for number in range(plan.clients)]
    return Load(plan, World(plan, OWNERS), clients, 0, said.append, now), said


def run(plan: Plan, kv: MemoryKv, *, stall_after_s: float | None = None, stop_after_s: float = 60) -> Report:
    """The report on a load of `kv`, which stalls once if it is to."""

    async def all_of_it() -> Report:
        load, said = load_of(plan, kv)
        kv.data = {World(plan, OWNERS).key(number): b"old" for number in range(plan.keys)}
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        start_s = now_s() + 0.01
        if stall_after_s is not None:
            loop.call_later(stall_after_s, lambda: setattr(kv, "stalled_until_s", now_s() + STALL_S))
        loop.call_later(stop_after_s, stop.set)
        ending = await load.run(start_s, stop)
        series: Series = {}
        for message in said:
            kinds = {kind: Tally.decode(encoded) for kind, encoded in message["kinds"].items()}
            add_series(series, message["second"], kinds)
        return Report(Measured(plan, ShardMap(1, OWNERS, {1: ("a:1",), 2: ("b:1",)}), series, ending, stop.is_set()))

    return run_virtually(all_of_it())


def slow(report: Report, above_s: float) -> int:
    return sum(count for low_ns, _, count in report.total.latency.buckets() if low_ns >= above_s * 1e9)


def test_an_open_loop_measures_from_when_a_request_was_due() -> None:
    """The server stalls for half a second in which a hundred requests fall due. A closed loop meets that once."""
    closed = run(PLAN, MemoryKv(), stall_after_s=0.2)
    assert 490 <= closed.total.done <= 510
    assert slow(closed, 0.1) == 1
    opened = run(replace(PLAN, rate=200.0), MemoryKv(), stall_after_s=0.2)
    assert 150 < opened.total.done < 250
    assert 80 < slow(opened, 0.1) < 130
    assert 40 < slow(opened, 0.3) < 80
    assert opened.measured.ending.late.count > 50
    assert opened.measured.ending.late.max_ns < 1e6


def test_a_rate_that_is_not_kept_is_reported() -> None:
    """One client and one millisecond a request: some hundred a second, and the other requests stay undone."""
    report = run(replace(PLAN, rate=20_000.0, duration_s=1.3), MemoryKv())
    ending = report.measured.ending
    assert 1_290 <= report.total.done <= 1_300
    assert 25_000 < ending.unbegun + report.total.done < 27_000
    assert not report.keeps_rate
    text = "\n".join(report.lines())
    assert f"backlog at the end: {ending.unbegun:,} requests" in text
    assert "THE RATE WAS NOT KEPT" in text
    assert report.as_object()["open_loop"]["kept"] is False


def test_a_rate_that_is_kept_leaves_nothing() -> None:
    report = run(replace(PLAN, rate=100.0, clients=4), MemoryKv())
    assert report.keeps_rate
    assert report.measured.ending.unbegun == 0
    assert report.as_object()["open_loop"]["kept"] is True


def test_what_is_unknown_or_failed_is_no_success() -> None:
    errors = itertools.cycle([None, OutcomeUnknown("put"), None, CommitUnknown(b"t" * 16, "lost"), Busy("full")])
    report = run(replace(PLAN, scenario="put", duration_s=0.3), MemoryKv(lambda: next(errors)))
    total = report.total
    assert total.done >= 118
    assert set(total.unknown) == {"OutcomeUnknown", "CommitUnknown"}
    assert set(total.errors) == {"Busy"}
    for count in (total.unknown["OutcomeUnknown"], total.unknown["CommitUnknown"], total.errors["Busy"]):
        assert abs(2 * count - total.done) <= 2
    assert total.latency.count == total.done == sum(each.done for each in report.seconds)
    assert total.retries == total.unknown.total() + total.errors.total()
    shown = report.as_object()["totals"]
    assert shown["requests"] == total.done + total.unknown.total() + total.errors.total()
    assert shown["done_per_s"] == pytest.approx(total.done / report.measured.ending.measured_s)
    lines = list(report.lines())
    assert f"errors: Busy {total.errors['Busy']}" in lines
    assert any(line.startswith("unknown outcomes: ") and "CommitUnknown" in line for line in lines)


def test_what_is_refused_without_being_sent_leaves_it_stoppable() -> None:
    """A clock that only moves while everybody waits would stand still."""

    class RefusingKv(MemoryKv):
        async def put(self, key: bytes, value: bytes) -> int:
            raise TooLarge("the value", 1)

    clock = itertools.count()
    stop = asyncio.Event()
    load, said = load_of(replace(PLAN, scenario="put", duration_s=20.0), RefusingKv(), lambda: next(clock) * 1e-3)

    async def stopped_soon() -> Ending:
        asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(stop.set))
        return await load.run(0.0, stop)

    ending = run_virtually(stopped_soon())
    assert ending.measured_s < 1
    assert all(set(Tally.decode(message["kinds"]["put"]).errors) == {"TooLarge"} for message in said)


def test_a_key_that_is_missing_is_an_error() -> None:
    plan = replace(PLAN, duration_s=0.1)
    load, said = load_of(plan, MemoryKv())
    run_virtually(load.run(0.0, asyncio.Event()))
    (message,) = said
    tally = Tally.decode(message["kinds"]["get"])
    assert (tally.done, set(tally.errors)) == (0, {"KeyMissing"})


def test_the_warm_up_does_not_count() -> None:
    failed = 0

    def fail_early() -> Exception | None:
        nonlocal failed
        if now_s() >= 0.29:
            return None
        failed += 1
        return Timeout("early")

    report = run(replace(PLAN, warmup_s=0.3, duration_s=0.2), MemoryKv(fail_early))
    assert failed > 250
    assert report.total.errors.total() == 0
    assert 195 <= report.total.done <= 200
    assert report.measured.ending.measured_s == pytest.approx(0.2)


def test_it_stops_early_and_says_what_it_cut_off() -> None:
    kv = MemoryKv()
    report = run(replace(PLAN, duration_s=30.0, clients=3), kv, stop_after_s=0.3)
    assert report.measured.ending.measured_s == pytest.approx(0.29)
    assert 850 < report.total.done < 900
    assert report.measured.ending.cut_off == 0
    stuck = MemoryKv()
    stuck.stalled_until_s = 60
    report = run(replace(PLAN, duration_s=30.0, clients=3), stuck, stop_after_s=0.1)
    assert report.measured.ending.measured_s == pytest.approx(0.09)
    assert (report.measured.ending.cut_off, report.total.requests) == (3, 0)
    assert "in flight at the end, and not counted: 3" in list(report.lines())


def test_keys_are_loaded_unless_they_are_there_with_the_right_size() -> None:
    kv = MemoryKv()
    load, said = load_of(PLAN, kv)
    key = World(PLAN, OWNERS).key
    kv.data = {key(0): b"abc", key(1): b"too long"}
    run_virtually(load.load_keys())
    assert sorted(kv.puts) == [key(number) for number in range(1, 10)]
    assert {len(value) for value in kv.data.values()} == {PLAN.value_bytes}
    assert said[-1] == {"loaded": 10}


def test_arrivals_are_fixed_in_advance_and_random() -> None:
    times_s = list(itertools.islice(poisson(random.Random("1"), 5.0, 100.0), 10_000))
    assert times_s == list(itertools.islice(poisson(random.Random("1"), 5.0, 100.0), 10_000))
    gaps_s = [after - before for before, after in itertools.pairwise(times_s)]
    assert times_s[0] >= 5
    assert statistics.fmean(gaps_s) == pytest.approx(0.01, rel=0.05)
    assert statistics.stdev(gaps_s) == pytest.approx(0.01, rel=0.05)  # of an exponential distribution, as its mean


def test_pairs_conflict_as_often_as_they_should() -> None:
    plan = replace(PLAN, scenario="txn", conflict=0.25, keys=500, clients=4)
    world = World(plan, OWNERS)
    world.check()
    common = {key for keys in world.groups for key in keys[:4]}
    drawn: dict[int, set[bytes]] = {}
    hits = 0
    for number in range(4):
        client = Client(cast(RaftKV, None), number, 1)
        for _ in range(1_000):
            pair = world.pair(client)
            assert sum(key in world.groups[0] for key in pair) == sum(key in world.groups[1] for key in pair) == 1
            is_common = set(pair) <= common
            hits += is_common
            if not is_common:
                drawn.setdefault(number, set()).update(pair)
    assert 850 < hits < 1_150
    assert sum(len(keys) for keys in drawn.values()) == len(set().union(*drawn.values()))  # nobody else's
    assert not common & set().union(*drawn.values())


def test_batches_are_in_as_many_groups_as_they_should() -> None:
    world = World(replace(PLAN, scenario="batch", batch=5, keys=200), OWNERS)
    client = Client(cast(RaftKV, None), 0, 1)
    single = world.batch(client, world.groups[:1])
    cross = world.batch(client, world.groups)
    assert len(set(single)) == len(set(cross)) == 5
    assert set(single) <= set(world.groups[0])
    assert [sum(key in keys for key in cross) for keys in world.groups] == [3, 2]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scenario": "fanout", "groups": 3}, "--groups 3: only 2 of the cluster's groups serve shards"),
        ({"scenario": "batch-cross", "groups": 1}, "batch-cross needs two groups"),
        ({"scenario": "batch-single", "batch": 50}, "--keys 10: 50 are needed in each group"),
        ({"scenario": "batch-single", "value_bytes": 8 << 20, "keys": 100}, "is more than a transaction holds"),
        ({"scenario": "txn", "clients": 5}, "--keys 10: 14 are needed in each group"),
    ],
)
def test_what_the_cluster_is_too_small_for_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadPlan, match=complaint):
        World(replace(PLAN, **changes), OWNERS).check()


def test_the_latest_keys_are_read_most_often() -> None:
    plan = replace(PLAN, scenario="ycsb-d", keys=100)
    world = World(plan, OWNERS)
    kv = MemoryKv()
    client = Client(cast(RaftKV, kv), 0, 1)
    run_virtually(world.insert(client))
    run_virtually(world.insert(client))
    assert kv.puts == [world.key(100), world.key(101)]
    drawn = [world.latest(client) for _ in range(5_000)]
    counts = [drawn.count(world.key(number)) for number in (101, 100, 99, 98)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 1.5 * counts[1] > 1.5 * counts[2]
    assert set(drawn) == {world.key(number) for number in range(102)}
