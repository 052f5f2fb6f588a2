"""What storage costs on the hot path. Run: python -m tests.storage.bench_storage [directory]"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time

import uvloop

from raftkv.storage.disk import OsDisk
from raftkv.storage.rocks import RocksEngine
from raftkv.storage.wal import Wal
from tests.storage.helpers import entry

DATA = b"x" * 125
"""An entry of 150 bytes."""


def nothing() -> None:
    """For an append that nobody waits for."""


async def log(directory: str) -> None:
    disk = OsDisk()
    wal, _ = Wal.open(disk, f"{directory}/wal")
    loop = asyncio.get_running_loop()
    for count in (1, 5):
        first = wal.last_index + 1
        batches = [[entry(first + n * count + i, 1, DATA) for i in range(count)] for n in range(5000)]
        idle = batches[:2000]
        times_s = []
        for batch in idle:
            durable: asyncio.Future[None] = loop.create_future()
            started_s = time.perf_counter()
            wal.append(None, batch, lambda durable=durable: durable.set_result(None))  # type: ignore[misc]
            await durable
            times_s.append(time.perf_counter() - started_s)
        times_s.sort()
        print(
            f"{count} entries, idle disk: durable after {times_s[1000] * 1e6:.0f} µs, p99 {times_s[1980] * 1e6:.0f} µs"
        )
        durable = loop.create_future()
        cpu_s = time.thread_time()
        for batch in batches[2000:-1]:
            wal.append(None, batch, nothing)
        cpu_s = time.thread_time() - cpu_s
        wal.append(None, batches[-1], lambda durable=durable: durable.set_result(None))  # type: ignore[misc]
        await durable
        print(f"{count} entries, a sync in flight: append costs {cpu_s / 2999 * 1e6:.1f} µs of the loop")
    wal.close()
    disk.close()


async def engine(directory: str) -> None:
    rocks = RocksEngine(f"{directory}/engine")
    value = os.urandom(100)
    for count in (100, 3):
        batches = [{os.urandom(20): value for _ in range(count)} for _ in range(60_000 // count)]
        started_s = time.thread_time()
        for batch in batches:
            rocks.write(batch)
        each_s = (time.thread_time() - started_s) / len(batches)
        print(f"write of {count} rows: {each_s * 1e6:.1f} µs, {each_s / count * 1e6:.2f} µs a row")
    keys = [key for batch in batches for key in batch]
    await rocks.flush()
    started_s = time.thread_time()
    for key in keys:
        rocks.get(key)
    print(f"get: {(time.thread_time() - started_s) / len(keys) * 1e6:.2f} µs")
    started_s = time.thread_time()
    count = sum(1 for _ in rocks.scan(b"", b"\xff" * 30))
    print(f"scan: {(time.thread_time() - started_s) / count * 1e6:.2f} µs a row")
    gap_s = 0.0

    async def beat() -> None:
        nonlocal gap_s
        before_s = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now_s = time.perf_counter()
            gap_s, before_s = max(gap_s, now_s - before_s), now_s

    beating = asyncio.ensure_future(beat())
    rocks.write({os.urandom(20): value for _ in range(60_000)})
    await asyncio.sleep(0.3)
    gap_s = 0.0
    await rocks.flush()
    print(f"flush: the loop stands still for {gap_s * 1e3:.1f} ms at most")
    rocks.write({os.urandom(20): value for _ in range(60_000)})
    await asyncio.sleep(0.3)
    gap_s = 0.0
    await rocks.checkpoint(f"{directory}/copy")
    print(f"checkpoint: the loop stands still for {gap_s * 1e3:.1f} ms at most")
    beating.cancel()
    rocks.close()


def main() -> None:
    directory = tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None)
    try:
        uvloop.run(log(directory))
        uvloop.run(engine(directory))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
