"""Latency while groups join and leave: 3 → 6 → 2 groups under an open load of 30 % of what the cluster can do.

    python -m bench.resharding [--seconds 10] [--replicas 3] [--megabytes 24] [-o chart.png]

Starts a cluster of its own on loopback (six groups, three of them joined) and loads it. A closed loop finds the
capacity; then operations are begun at fixed times, each shard in turn, whether or not earlier ones have ended, and
latency counts from the time at which an operation should have begun: a stall can't hide the operations that it held
up. An operation whose outcome is unknown is counted as that, never as done. Three more groups join, then all but two
leave; `--seconds` is how long each calm between the changes lasts.

Printed are p50 and p99 of the shards that don't move, beside those of the calm just before, and for the moved shards
the longest time without a success. On one machine all groups, the copying and this program share the processors, so the
figures say more about their ratio than about a cluster; with few cores, `--replicas 1` shows what replication costs.
"Processors busy" counts the daemons only, not this program.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import uvloop

from bench.durable import cpu_s
from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV
from raftkv.client.tasks import gather_ordered
from raftkv.machines.slots import shard_of
from raftkv.protocol.errors import OutcomeUnknown, RaftKVError
from tests.system.cluster import Cluster, running, status_of

SHARDS = 12
VALUE_BYTES = 1_000
WRITE_SHARE = 0.5
CLOSED_LOOP_USERS = 32
LOAD_SHARE = 0.3
TIMEOUT_S = 10.0
ARRIVAL_TIMEOUT_S = 300.0
LOOK_S = 0.2
BAR = 2.0
"""p99 of the shards that don't move, over the quiet p99."""


class Done(NamedTuple):
    """An operation that succeeded: when it should have begun and when it ended, in seconds of the loop's clock."""

    shard: int
    intended_s: float
    ended_s: float

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.intended_s


class Calm(NamedTuple):
    """A time in which nothing moved; how many processors the daemons kept busy."""

    start_s: float
    end_s: float
    busy: float


@dataclass
class Change:
    """A change of the map: from when, until every shard had arrived; which moved; how many processors were busy with it
    and with the load."""

    text: str
    start_s: float
    end_s: float
    moved: frozenset[int]
    busy: float


@dataclass
class Load:
    """Operations on keys of all shards, and what became of them."""

    kv: RaftKV
    keys: list[list[bytes]]
    rng: random.Random
    done: list[Done] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    async def operate(self, shard: int, intended_s: float) -> None:
        key = self.rng.choice(self.keys[shard])
        try:
            if self.rng.random() < WRITE_SHARE:
                await self.kv.put(key, self.rng.randbytes(VALUE_BYTES))
            else:
                await self.kv.get(key)
        except OutcomeUnknown:
            self.failed["outcome unknown"] += 1
        except RaftKVError as error:
            self.failed[type(error).__name__] += 1
        else:
            self.done.append(Done(shard, intended_s, asyncio.get_running_loop().time()))

    async def fill(self) -> None:
        keys = [key for keys in self.keys for key in keys]
        for start in range(0, len(keys), 1_000):
            puts = [self.kv.put(key, self.rng.randbytes(VALUE_BYTES)) for key in keys[start : start + 1_000]]
            await gather_ordered(puts, CLOSED_LOOP_USERS)

    async def capacity(self, seconds: float) -> float:
        """Operations per second of a closed loop."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + seconds
        before = len(self.done)

        async def user() -> None:
            while (now := loop.time()) < end_s:
                await self.operate(self.rng.randrange(SHARDS), now)

        await gather_ordered([user() for _ in range(CLOSED_LOOP_USERS)], CLOSED_LOOP_USERS)
        return (len(self.done) - before) / seconds

    async def open_loop(self, rate: float, stopped: Callable[[], bool]) -> None:
        """Begin operations at fixed times until `stopped`, then wait for the last ones."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for number in itertools.count():
                intended_s = start_s + number / rate
                if (ahead_s := intended_s - loop.time()) > 0:
                    await asyncio.sleep(ahead_s)
                if stopped():
                    return
                tasks.create_task(self.operate(number % SHARDS, intended_s))


def keys_by_shard(count: int) -> list[list[bytes]]:
    keys: list[list[bytes]] = [[] for _ in range(SHARDS)]
    for number in range(count):
        key = b"key%08d" % number
        keys[shard_of(key, SHARDS)].append(key)
    return keys


async def calm_of(cluster: Cluster, seconds: float) -> Calm:
    loop = asyncio.get_running_loop()
    start_s, used_s = loop.time(), cpu_s(cluster.processes)
    await asyncio.sleep(seconds)
    took_s = loop.time() - start_s
    return Calm(start_s, start_s + took_s, (cpu_s(cluster.processes) - used_s) / took_s)


async def change(
    cluster: Cluster, controllers: Controllers, text: str, *, join: Sequence[int] = (), leave: Sequence[int] = ()
) -> Change:
    """Change the map, and wait until its shards have arrived and are released where they were."""
    loop = asyncio.get_running_loop()
    before = await controllers.query()
    start_s, used_s = loop.time(), cpu_s(cluster.processes)
    if join:
        await controllers.join({gid: [process.address for process in cluster.groups[gid]] for gid in join})
    if leave:
        await controllers.leave(leave)
    after = await controllers.query()
    moved = frozenset(shard for shard in range(SHARDS) if before.owner(shard) != after.owner(shard))
    while loop.time() < start_s + ARRIVAL_TIMEOUT_S:
        reports = await asyncio.gather(*(status_of(group[0].address) for group in cluster.groups.values()))
        if all(report["shards"] == [[s, "serving"] for s in after.shards_of(report["gid"])] for report in reports):
            took_s = loop.time() - start_s
            return Change(text, start_s, start_s + took_s, moved, (cpu_s(cluster.processes) - used_s) / took_s)
        await asyncio.sleep(LOOK_S)
    raise AssertionError(f"{text}: the shards have not arrived after {ARRIVAL_TIMEOUT_S:g} s")


def percentile_ms(latencies_s: Sequence[float], share: float) -> float:
    ordered = sorted(latencies_s)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000 if ordered else float("nan")


def longest_gap_ms(done: Sequence[Done], start_s: float, end_s: float) -> float:
    """Without a success, between `start_s` and `end_s`."""
    times_s = sorted([start_s, end_s, *(each.ended_s for each in done if start_s < each.ended_s < end_s)])
    return max(after - before for before, after in itertools.pairwise(times_s)) * 1000


def report(done: Sequence[Done], changes: Sequence[Change], calms: Sequence[Calm]) -> Iterator[str]:
    """The figures, as lines."""
    for each, calm in zip(changes, calms, strict=True):
        quiet_s = [one.latency_s for one in done if calm.start_s <= one.intended_s < calm.end_s]
        quiet_p99_ms = percentile_ms(quiet_s, 0.99)
        gap_ms = max(longest_gap_ms([o for o in done if o.shard == s], calm.start_s, calm.end_s) for s in range(SHARDS))
        yield (
            f"quiet: {len(quiet_s)} operations, p50 {percentile_ms(quiet_s, 0.5):.1f} ms, p99 {quiet_p99_ms:.1f} ms; "
            f"longest gap of a shard {gap_ms:.0f} ms; {calm.busy:.2f} processors busy"
        )
        inside = [one for one in done if each.start_s <= one.intended_s < each.end_s]
        still = [one.latency_s for one in inside if one.shard not in each.moved]
        moving = [one.latency_s for one in inside if one.shard in each.moved]
        p99_ms = percentile_ms(still, 0.99)
        verdict = "met" if p99_ms <= BAR * quiet_p99_ms else "missed"
        yield (
            f"{each.text}: {len(each.moved)} of {SHARDS} shards move, all there after "
            f"{each.end_s - each.start_s:.1f} s; {each.busy:.2f} processors busy"
        )
        yield (
            f"  those that stay: {len(still)} operations, p50 {percentile_ms(still, 0.5):.1f} ms, p99 {p99_ms:.1f} ms, "
            f"{p99_ms / quiet_p99_ms:.2f} times quiet (the bar, {BAR:g}, is {verdict})"
        )
        stalls = {
            shard: longest_gap_ms([one for one in done if one.shard == shard], each.start_s, each.end_s)
            for shard in sorted(each.moved)
        }
        shown = ", ".join(f"{shard}: {gap_ms:.0f}" for shard, gap_ms in stalls.items())
        yield (
            f"  those that move: {len(moving)} operations, p50 {percentile_ms(moving, 0.5):.1f} ms, p99 "
            f"{percentile_ms(moving, 0.99):.1f} ms; longest gap of each, ms: {shown}"
        )


def draw(path: Path, done: Sequence[Done], changes: Sequence[Change], start_s: float, title: str) -> None:
    """Latency over time as PNG: a dot for each operation, the p99 of each second, the changes of the map."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def is_moving(one: Done) -> bool:
        return any(one.shard in each.moved and each.start_s <= one.intended_s < each.end_s for each in changes)

    figure, axes = pyplot.subplots(figsize=(9, 4))
    for moving, color, label in ((False, "#7a9cc6", "shards that stay"), (True, "#d9822b", "shards on their way")):
        dots = [one for one in done if is_moving(one) is moving]
        x, y = [one.intended_s - start_s for one in dots], [one.latency_s * 1000 for one in dots]
        axes.plot(x, y, ".", markersize=2, alpha=0.4, color=color, label=label, rasterized=True)
    by_second: dict[int, list[float]] = {}
    for one in done:
        if not is_moving(one):
            by_second.setdefault(int(one.intended_s - start_s), []).append(one.latency_s)
    seconds = sorted(by_second)
    p99s_ms = [percentile_ms(by_second[second], 0.99) for second in seconds]
    axes.plot(
        [second + 0.5 for second in seconds], p99s_ms, color="#1f3a5f", label="p99 of those that stay, each second"
    )
    for each in changes:
        axes.axvspan(each.start_s - start_s, each.end_s - start_s, color="#f2e3cf", zorder=0)
        axes.text(each.start_s - start_s, 0.98, each.text, transform=axes.get_xaxis_transform(), va="top", fontsize=8)
    axes.set(yscale="log", xlabel="seconds", ylabel="latency, ms", title=title)
    axes.legend(loc="upper right", fontsize=8, markerscale=4)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


async def measure(cluster: Cluster, arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    rng = random.Random(1)
    async with (
        RaftKV(cluster.controller_addresses, timeout_s=TIMEOUT_S) as kv,
        Controllers(cluster.controller_addresses, timeout_s=30) as controllers,
    ):
        await controllers.join({gid: [process.address for process in cluster.groups[gid]] for gid in (1, 2, 3)})
        load = Load(kv, keys_by_shard(arguments.megabytes * 1_000_000 // VALUE_BYTES), rng)
        await load.fill()
        await load.capacity(min(2.0, arguments.seconds))  # to warm up
        capacity = await load.capacity(arguments.seconds)
        rate = LOAD_SHARE * capacity
        print(f"capacity: {capacity:,.0f}/s; the load is {rate:,.0f}/s, {WRITE_SHARE:.0%} of it writes", flush=True)
        load.done.clear()
        stopped = False
        work = asyncio.create_task(load.open_loop(rate, lambda: stopped))
        start_s = loop.time()
        try:
            await asyncio.sleep(1.0)
            calms = [await calm_of(cluster, arguments.seconds)]
            changes = [await change(cluster, controllers, "groups 4, 5, 6 join", join=(4, 5, 6))]
            calms.append(await calm_of(cluster, arguments.seconds))
            changes.append(await change(cluster, controllers, "groups 3, 4, 5, 6 leave", leave=(3, 4, 5, 6)))
            await asyncio.sleep(arguments.seconds)
        finally:
            stopped = True
            await work
    for line in report(load.done, changes, calms):
        print(line)
    print(f"not done: {dict(load.failed) or 'nothing'}")
    if arguments.output is not None:
        title = f"3 → 6 → 2 groups of {arguments.replicas}, {arguments.megabytes} MB, {rate:,.0f} operations/s"
        draw(arguments.output, load.done, changes, start_s, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each calm, and of the closed loop")
    parser.add_argument("--replicas", type=int, default=3, help="of each group")
    parser.add_argument("--megabytes", type=int, default=24, help="of data")
    parser.add_argument("--move-bytes-per-s", type=int, help="as for the daemons")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw latency over time")
    arguments = parser.parse_args()
    if arguments.output is not None and find_spec("matplotlib") is None:
        sys.exit("bench.resharding: a chart needs matplotlib: pip install 'raftkv[chart]'")
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "cluster", groups=6, replicas=arguments.replicas, shards=SHARDS)
        if arguments.move_bytes_per_s is not None:
            for process in (process for group in cluster.groups.values() for process in group):
                process.arguments += ["--move-bytes-per-s", str(arguments.move_bytes_per_s)]
        with running(cluster, join=False):
            uvloop.run(measure(cluster, arguments))
    print(f"took {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
