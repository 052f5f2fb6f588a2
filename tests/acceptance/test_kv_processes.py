"""Some of the key-value scenarios on real processes: speed, a paused majority, a paused leader, kills, small snapshots.

Bounds on time are three times those of the simulator. A real network can't be cut here without a proxy (that is what
tests/chaos does): SIGSTOP takes servers away instead.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from raftkv.client.kv import RaftKV
from raftkv.machines.slots import shard_of
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import RaftKVError
from raftkv.protocol.messages import Hello, ReadOp, Verb
from raftkv.sim.check.history import History, Kind, Operation, Output
from raftkv.sim.check.linearizability import check_linearizability
from tests.system.cluster import Cluster, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

SLOWER = 3
SPEED_S_PER_OPERATION = 0.0333
STATE_FACTOR = 8
THINK_S = 0.01

Record = Callable[[str, object], None]


class Client:
    """A sequential client whose operations are recorded; none may fail."""

    def __init__(self, cluster: Cluster, number: int, history: History) -> None:
        self.kv = RaftKV(cluster.controller_addresses, timeout_s=60)
        self.number = number
        self.key = b"own %d" % number
        self.value = b""
        self.operations = 0
        self._history = history

    async def append(self, token: bytes) -> None:
        started_ns = time.monotonic_ns()
        version = await self.kv.append(self.key, token)
        self._add(Kind.APPEND, token, Output.written(version), started_ns)
        self.value += token

    async def check(self) -> None:
        started_ns = time.monotonic_ns()
        found = await self.kv.get(self.key)
        output = Output.read(None) if found is None else Output.read(found.value, found.version)
        self._add(Kind.GET, None, output, started_ns)
        assert (found.value if found is not None else b"") == self.value, "not what this client has appended"

    async def work(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.operations += 1
            await (self.check() if self.operations % 2 else self.append(b"x %d %d y" % (self.number, self.operations)))
            await asyncio.sleep(THINK_S)

    def _add(self, kind: Kind, value: bytes | None, output: Output, started_ns: int) -> None:
        name = f"client {self.number}"
        self._history.add(Operation.write(name, kind, self.key, value, output, started_ns, time.monotonic_ns()))


def restart_rows(cluster: Cluster, clients: int, record: Record, *, state_bytes_max: int | None) -> None:
    """Three iterations of 5 s; in each all servers of the group are killed and started again after 1 s."""
    history = History()

    async def main() -> None:
        users = [Client(cluster, number, history) for number in range(clients)]
        for _ in range(3):
            async with asyncio.TaskGroup() as group:
                for user in users:
                    group.create_task(user.work(5.0))
                await asyncio.sleep(4.9)
                for process in cluster.groups[1]:
                    process.kill()
                await asyncio.sleep(1.0)
                for process in cluster.groups[1]:
                    process.start()
            for user in users:
                await user.check()
            if state_bytes_max is not None:
                largest = max([(await status(process.address))["log_bytes"] for process in cluster.groups[1]])
                record("raft state", largest)
                assert largest <= state_bytes_max
        for user in users:
            await user.kv.close()

    asyncio.run(main())
    verdict = check_linearizability(history)
    record("operations", len(history))
    assert verdict.passed, str(verdict)
    assert len(history) > 100 * clients


async def status(address: str) -> dict[str, Any]:
    channel = await Channel.open(address, Hello.of_client())
    try:
        report: dict[str, Any] = await channel.request(Verb.STATUS, [], timeout_s=5)
        return report
    finally:
        channel.close()


def test_persist_concurrent_4a(tmp_path: Path, record_property: Record) -> None:
    with running(Cluster(tmp_path, replicas=5, controllers=1)) as cluster:
        restart_rows(cluster, 5, record_property, state_bytes_max=None)


def test_snapshot_recover_many_clients_4b(tmp_path: Path, record_property: Record) -> None:
    options = ("--snapshot-bytes", "1000")
    with running(Cluster(tmp_path, replicas=5, controllers=1, options=options)) as cluster:
        restart_rows(cluster, 20, record_property, state_bytes_max=STATE_FACTOR * 1000)


def test_speed_4a(tmp_path: Path, record_property: Record) -> None:
    with running(Cluster(tmp_path)) as cluster, cluster.client() as client:
        started_s = time.monotonic()
        for number in range(1000):
            assert client.append(b"k", b"x 0 %d y" % number) == number + 1
        took_s = time.monotonic() - started_s
        found = client.get(b"k")
        assert found is not None and found.value == b"".join(b"x 0 %d y" % number for number in range(1000))
        record_property("seconds for 1000", took_s)
        assert took_s <= SLOWER * 1000 * SPEED_S_PER_OPERATION


def test_one_partition_4a(tmp_path: Path, record_property: Record) -> None:
    """A leader without its majority answers neither Put nor Get; paused while another leads, it shows nothing old."""
    with running(Cluster(tmp_path, replicas=5)) as cluster:
        leader = cluster.leader(1)
        others = [process for process in cluster.groups[1] if process is not leader]
        majority = others[:3]

        async def timed(work: Awaitable[Any]) -> tuple[Any, float]:
            result = await work
            return result, time.monotonic()

        async def main() -> None:
            async with RaftKV(cluster.controller_addresses, timeout_s=60) as kv:
                await kv.put(b"1", b"14")
                for process in majority:
                    process.signal(signal.SIGSTOP)
                await asyncio.sleep(0.3)
                put = asyncio.create_task(timed(kv.put(b"1", b"15")))
                get = asyncio.create_task(timed(kv.get(b"1")))
                await asyncio.sleep(1.0)
                assert not put.done() and not get.done(), "answered without a majority"
                for process in majority:
                    process.signal(signal.SIGCONT)
                healed_s = time.monotonic()
                _, put_s = await asyncio.wait_for(put, SLOWER * 4)
                found, get_s = await asyncio.wait_for(get, SLOWER * 4)
                assert found.value in (b"14", b"15")
                assert (await kv.get(b"1")).value == b"15"  # type: ignore[union-attr]
                record_property("put ended after", put_s - healed_s)
                record_property("get ended after", get_s - healed_s)

                await read_from_paused_leader(kv)

        async def read_from_paused_leader(kv: RaftKV) -> None:
            old = await asyncio.to_thread(cluster.leader, 1)
            channel = await Channel.open(old.address, Hello.of_client())
            old.signal(signal.SIGSTOP)
            version = await asyncio.wait_for(kv.put(b"1", b"16"), SLOWER * 4)
            reads = [asyncio.create_task(read(channel)) for _ in range(10)]
            await asyncio.sleep(0.1)
            old.signal(signal.SIGCONT)
            for outcome in await asyncio.gather(*reads, return_exceptions=True):
                fine = isinstance(outcome, RaftKVError) or outcome == [b"16", version]
                assert fine, f"an old leader answered {outcome!r}"
            channel.close()

        async def read(channel: Channel) -> Any:
            return await channel.request(Verb.READ, [1, 0, ReadOp.GET, shard_of(b"1", 10), b"1"], timeout_s=10)

        asyncio.run(main())
