"""Shards move between real processes, under load, with the numbers that matter: nothing lost, no long stall."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV
from raftkv.client.tasks import gather_ordered
from tests.system.cluster import Cluster, running

KEYS = 3_000
VALUE_BYTES = 2_000
STALL_S_MAX = 1.5
"""The longest that one operation may take while shards move, on a busy machine of two cores."""


async def load(kv: RaftKV, rng: random.Random) -> dict[bytes, bytes]:
    values = {b"key-%d" % number: rng.randbytes(VALUE_BYTES) for number in range(KEYS)}
    await gather_ordered([kv.put(key, value) for key, value in values.items()], 64)
    return values


async def under_load(
    kv: RaftKV, values: dict[bytes, bytes], rng: random.Random, work: Callable[[], Coroutine[Any, Any, None]]
) -> float:
    """Do `work` while keys are written, read and scanned; the longest that any of it took, in seconds."""
    longest_s = 0.0
    done = False

    async def write(mine: list[bytes]) -> None:
        nonlocal longest_s
        while not done:
            key = rng.choice(mine)
            began_s = time.monotonic()
            await kv.append(key, b"+")
            values[key] += b"+"
            found = await kv.get(key)
            longest_s = max(longest_s, time.monotonic() - began_s)
            assert found is not None and found.value == values[key], key
            await asyncio.sleep(0.002)

    async def scan() -> None:
        """What is there throughout is seen once, in order."""
        while not done:
            seen = [key async for key, _ in kv.scan(b"key-1")]
            assert seen == sorted(key for key in values if key.startswith(b"key-1"))
            await asyncio.sleep(0.05)

    async def main() -> None:
        nonlocal done
        try:
            await work()
        finally:
            done = True

    keys = sorted(values)
    await gather_ordered([main(), scan(), *(write(keys[start::8]) for start in range(8))], 10)
    return longest_s


async def settled(cluster: Cluster, gids: set[int]) -> None:
    """Until the groups together serve every shard, and nothing is on its way or left elsewhere."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        await asyncio.sleep(0.1)
        shards: list[int] = []
        calm = True
        for gid, processes in cluster.groups.items():
            status = await asyncio.to_thread(processes[0].status)
            mine = [shard for shard, state in status["shards"] if state == "serving"]
            calm = calm and len(mine) == len(status["shards"]) and bool(mine) == (gid in gids)
            shards += mine
        if calm and sorted(shards) == list(range(10)):
            return
    raise AssertionError("the shards did not settle")


def test_shards_move_under_load(folder: Path) -> None:
    with running(Cluster(folder, groups=3), join=False) as cluster:
        with cluster.admin() as admin:
            admin.join({1: [process.address for process in cluster.groups[1]]})
        rng = random.Random(5)

        async def main() -> None:
            async with RaftKV(cluster.controller_addresses, timeout_s=30, rng=random.Random(6)) as kv:
                values = await load(kv, rng)

                async def grow_and_shrink() -> None:
                    async with Controllers(cluster.controller_addresses, timeout_s=30) as admin:
                        await admin.join({gid: [p.address for p in cluster.groups[gid]] for gid in (2, 3)})
                        await settled(cluster, {1, 2, 3})
                        await admin.leave([1])
                        await settled(cluster, {2, 3})

                stall_s = await under_load(kv, values, rng, grow_and_shrink)
                for process in cluster.groups[1]:
                    process.kill()
                for key, value in values.items():
                    found = await kv.get(key)
                    assert found is not None and found.value == value
                assert stall_s < STALL_S_MAX
                print(f"longest append and get: {stall_s:.3f} s")

        asyncio.run(main())


def test_status_says_what_holds_a_copy_back(folder: Path) -> None:
    """The throttle, and the turn of a fifth shard from the same group; without either there is nothing to say."""
    small = Cluster(folder, groups=2, replicas=1, controllers=1)
    with running(small, environment={"RAFTKV_MOVE_BYTES_PER_S": "10000"}) as cluster:
        with cluster.client() as kv:
            for number in range(200):
                kv.put(b"key-%d" % number, bytes(5_000))
        with cluster.admin() as admin:
            admin.leave([2])
        throttled, turn = "throttled to 0.01 MB/s (--move-bytes-per-s)", "its turn: 4 shards are copied from group 2"
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            rows = cluster.groups[1][0].status()["migrations"]
            told = sorted(row["slowed_by"] or "" for row in rows)
            if len(told) == 5 and told[0].startswith(turn) and told[1:] == [throttled] * 4:
                break
            time.sleep(0.05)
        assert told[0].startswith(turn) and told[1:] == [throttled] * 4, rows
        assert [row["waits_for"] for row in rows] == [None] * 5
