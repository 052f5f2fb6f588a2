"""What has moved away takes no room any more: after a storm of moves the disks hold what a fresh load would put there.

Measured are the tables of all engines after a graceful stop of everything. The logs are left out: each keeps some
entries for followers, whatever is in them, and for this little data that would be most of it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV
from raftkv.client.tasks import gather_ordered
from raftkv.daemons.compaction import RECLAIM_CALM_S
from tests.system.cluster import Cluster, running, status_of
from tests.system.engines import engine_bytes, misplaced, wal_bytes

MEGABYTES = 20
VALUE_BYTES = 10_000
GROUPS = 3
CHANGES = 30
MOVED_TIMEOUT_S = 60.0
CALM_S = RECLAIM_CALM_S + 3.0
CALM_TIMEOUT_S = 60.0
RATIO_MAX = 1.5
OPTIONS = ("--snapshot-bytes", "2000000")
"""Flushes as often as that: with the usual 16 MiB most of the data would still be in memory."""


def addresses(cluster: Cluster, gid: int) -> list[str]:
    return [process.address for process in cluster.groups[gid]]


def data_dirs(cluster: Cluster) -> dict[int, list[Path]]:
    return {gid: [process.data_dir for process in group] for gid, group in cluster.groups.items()}


async def load(cluster: Cluster) -> None:
    rng = random.Random(1)
    async with RaftKV(cluster.controller_addresses, timeout_s=30) as kv:
        values = [(b"key-%d" % n, rng.randbytes(VALUE_BYTES)) for n in range(MEGABYTES * 1_000_000 // VALUE_BYTES)]
        await gather_ordered([kv.put(key, value) for key, value in values], 32)


async def arrived(cluster: Cluster, controllers: Controllers) -> tuple[int, ...]:
    """Until every replica has what the map gives it, and nothing else. The owners."""
    latest = await controllers.query()
    deadline_s = time.monotonic() + MOVED_TIMEOUT_S
    while True:
        reports = [await status_of(process.address) for group in cluster.groups.values() for process in group]
        if all(
            report["config_num"] == latest.num
            and report["shards"] == [[shard, "serving"] for shard in latest.shards_of(report["gid"])]
            and not report["migrations"]
            for report in reports
        ):
            return latest.owners
        assert time.monotonic() < deadline_s, "the shards have not arrived"
        await asyncio.sleep(0.1)


async def storm(cluster: Cluster, controllers: Controllers, rng: random.Random) -> None:
    """Changes of the map; each second one comes while shards are on their way."""
    for number in range(CHANGES):
        latest = await controllers.query()
        members, absent = list(latest.groups), [gid for gid in cluster.groups if gid not in latest.groups]
        kind = rng.choice(["join"] * bool(absent) + ["leave", "move", "move"] * (len(members) > 1))
        if kind == "join":
            await controllers.join({gid: addresses(cluster, gid) for gid in absent})
        elif kind == "leave":
            await controllers.leave([rng.choice(members)])
        else:
            await controllers.move(rng.randrange(latest.shards), rng.choice(members))
        if number % 2:
            await arrived(cluster, controllers)
        else:
            await asyncio.sleep(0.3 * rng.random())


async def calm(cluster: Cluster) -> None:
    """Until the tables have not changed for a while: what is to be compacted has been."""
    seen, since_s = -1, time.monotonic()
    deadline_s = since_s + CALM_TIMEOUT_S
    while time.monotonic() < min(since_s + CALM_S, deadline_s):
        total = total_bytes(data_dirs(cluster))
        if total != seen:
            seen, since_s = total, time.monotonic()
        await asyncio.sleep(0.2)


def total_bytes(groups: Mapping[int, list[Path]]) -> int:
    while True:
        try:
            return sum(engine_bytes(data_dir) for group in groups.values() for data_dir in group)
        except FileNotFoundError:
            continue  # a table went between the list and the look


def use_of(folder: Path, *, stormy: bool) -> int:
    """Bytes of all tables with the data set loaded: into a fresh cluster, or before a storm of moves."""
    with running(Cluster(folder, groups=GROUPS, options=OPTIONS), join=False) as cluster:

        async def main() -> tuple[int, ...]:
            everybody = {gid: addresses(cluster, gid) for gid in cluster.groups}
            async with Controllers(cluster.controller_addresses, timeout_s=30) as controllers:
                if stormy:
                    await controllers.join({1: everybody[1]})
                    await load(cluster)
                    await storm(cluster, controllers, random.Random(7))
                    absent = everybody.keys() - (await controllers.query()).groups.keys()
                    if absent:
                        await controllers.join({gid: everybody[gid] for gid in absent})
                else:
                    await controllers.join(everybody)
                    await load(cluster)
                owners = await arrived(cluster, controllers)
            await calm(cluster)
            return owners

        owners = asyncio.run(main())
        for process in (process for group in cluster.groups.values() for process in group):
            assert process.terminate(60) == 0
        problems, rows = misplaced(data_dirs(cluster), owners)
        assert not problems, "\n".join(problems)
        assert rows >= MEGABYTES * 1_000_000 // VALUE_BYTES
        logs = sum(wal_bytes(data_dir) for group in data_dirs(cluster).values() for data_dir in group)
        total = total_bytes(data_dirs(cluster))
        print(f"{'storm' if stormy else 'fresh'}: tables {total / 1e6:.1f} MB, logs {logs / 1e6:.1f} MB")
        return total


@pytest.mark.long
@pytest.mark.timeout(400)
def test_after_a_storm_of_moves_the_disks_hold_what_a_fresh_load_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, stormy = use_of(folder / "fresh", stormy=False), use_of(folder / "storm", stormy=True)
    with capsys.disabled():
        print(f"\ntables of the whole cluster: {fresh / 1e6:.1f} MB fresh, {stormy / 1e6:.1f} MB after the storm")
    assert stormy <= RATIO_MAX * fresh


@pytest.mark.long
def test_a_replica_that_was_stopped_first_gives_the_room_back_when_it_is_started_again(folder: Path) -> None:
    with running(Cluster(folder, groups=2, replicas=1, controllers=1, options=OPTIONS), join=False) as cluster:
        (process,) = cluster.groups[1]

        async def main() -> None:
            async with Controllers(cluster.controller_addresses, timeout_s=30) as controllers:
                await controllers.join({1: addresses(cluster, 1)})
                await load(cluster)
                await controllers.join({2: addresses(cluster, 2)})
                await controllers.leave([1])
                await arrived(cluster, controllers)

        asyncio.run(main())
        assert process.terminate() == 0
        if engine_bytes(process.data_dir) < MEGABYTES * 500_000:
            pytest.skip("it was given back before the stop")
        process.start()
        process.wait_ready()
        deadline_s = time.monotonic() + CALM_TIMEOUT_S
        while total_bytes({1: [process.data_dir]}) > MEGABYTES * 50_000:
            assert time.monotonic() < deadline_s, "the room is not given back"
            time.sleep(0.1)
