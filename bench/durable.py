"""Durable writes and linearizable reads of one group of three replicas, through the native protocol.

    python -m bench.durable [--connections 1,64,256] [--seconds 5] [--profile]

Starts a cluster of its own on loopback, loads it in a closed loop (each connection is a client with one
request in flight, 100-byte values, uniform keys), and prints throughput, latency, and the CPU of the three
replicas for each operation, beside the budget of the design. `--profile` samples the leader with py-spy and
prints where its time goes. Figures move with the machine; only ratios within one run mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import uvloop

from raftkv.machines.kv import PUT
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.slots import shard_of
from raftkv.protocol.addresses import parse_address
from raftkv.protocol.channel import Channel
from raftkv.protocol.connection import Connection
from raftkv.protocol.messages import Hello, ReadOp, Verb, decode_reply, encode_hello, encode_request
from tests.system.cluster import Cluster, Process, running

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BUDGET_US = {("put", 64): "≤ 125 (goal 80)", ("put", 256): "≤ 85 (goal 50)", ("get", 64): "≤ 45 (goal 25)"}
VALUE = b"v" * 100


class Client(Connection):
    """One connection, one client, one request in flight; counts its own latencies."""

    def __init__(self, load: Load, number: int) -> None:
        super().__init__(self.answered, self.lost, reads_when_congested=True)
        self.load = load
        self.client_id = random.Random(number).randbytes(16)
        self.seq = load.first_seq
        self.sent_s = 0.0

    def answered(self, connection: Connection, frame: list[Any]) -> None:
        if self.sent_s:
            _, error, _ = decode_reply(frame)
            if error is None:
                self.load.latencies_s.append(time.perf_counter() - self.sent_s)
            else:
                self.load.errors[type(error).__name__] += 1
        self.sent_s = time.perf_counter()
        if not self.load.stopped:
            self.seq += 1
            self.send(self.load.request(self))

    def lost(self, _: Connection, error: Exception | None) -> None:
        if not self.load.stopped:
            self.load.errors["connection lost"] += 1


class Load:
    """A closed loop of `connections` clients against one leader, for some seconds."""

    def __init__(self, operation: str, shards: int, keys: int, config_num: int, run: int) -> None:
        self.operation = operation
        self.first_seq = run * 10_000_000
        self.latencies_s: list[float] = []
        self.errors: Counter[str] = Counter()
        self.stopped = False
        self._config_num = config_num
        self._rng = random.Random(run)
        self._keys = [(b"key%010d" % number, shard_of(b"key%010d" % number, shards)) for number in range(keys)]

    def request(self, client: Client) -> bytes:
        key, shard = self._rng.choice(self._keys)
        if self.operation == "get":
            return encode_request(client.seq, Verb.READ, [self._config_num, 0, ReadOp.GET, shard, key])
        command = [PUT, shard, client.client_id, client.seq, client.seq, 1 << 50, key, VALUE, None]
        return encode_request(client.seq, Verb.WRITE, [self._config_num, msgpack.packb(command)])

    async def run(self, address: str, connections: int, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        host, port = parse_address(address)
        clients: list[Client] = []
        for number in range(connections):
            _, client = await loop.create_connection(partial(Client, self, number), host, port)
            clients.append(client)
        for client in clients:
            client.send(encode_hello(Hello.of_client()))
        await asyncio.sleep(seconds)
        self.stopped = True
        await asyncio.sleep(0.2)
        for client in clients:
            client.close()


def cpu_s(processes: list[Process]) -> float:
    """User and system time that the processes have used."""
    total = 0.0
    for process in processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S
    return total


async def latest_map(address: str) -> ShardMap:
    channel = await Channel.open(address, Hello.of_client())
    encoded, *_ = await channel.request(Verb.CONFIG, [-1, -1, 0], timeout_s=5)
    channel.close()
    return ShardMap.decode(encoded)


def measure(cluster: Cluster, operation: str, connections: int, seconds: float, keys: int, run: int) -> str:
    group = cluster.groups[1]
    leader = cluster.leader(1)
    shard_map = uvloop.run(latest_map(cluster.controller_addresses[0]))
    load = Load(operation, shard_map.shards, keys, shard_map.num, run)
    before_s = cpu_s(group)
    leader_before_s = cpu_s([leader])
    uvloop.run(load.run(leader.address, connections, seconds))
    used_s = cpu_s(group) - before_s
    leader_s = cpu_s([leader]) - leader_before_s
    done = len(load.latencies_s)
    latencies = sorted(load.latencies_s)
    mean_ms = statistics.fmean(latencies) * 1000
    p99_ms = latencies[int(done * 0.99)] * 1000
    budget = BUDGET_US.get((operation, connections), "")
    errors = f" errors {dict(load.errors)}" if load.errors else ""
    return (
        f"{operation:4} {connections:4} connections {done / seconds:9,.0f}/s  mean {mean_ms:6.2f} ms  "
        f"p99 {p99_ms:6.2f} ms  CPU/op {used_s / done * 1e6:6.1f} µs (leader {leader_s / done * 1e6:5.1f})"
        f"  {budget}{errors}"
    )


@contextmanager
def sampling(leader: Process) -> Iterator[Path]:
    """py-spy looks at the process meanwhile; the file is complete afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.txt"
        sampler = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(leader.pid), "--format", "raw",
                "--output", str(out), "--duration", "600", "--rate", "200", "--threads", "--nonblocking",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield out
        finally:
            sampler.send_signal(signal.SIGINT)
            sampler.wait()
            if out.exists():
                print_profile(out)


def print_profile(out: Path) -> None:
    """The functions by own time."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for line in out.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame.rpartition(":")[0] or frame for frame in stack.split(";")]
        own[frames[-1]] += int(count)
        for frame in set(frames):
            total[frame] += int(count)
    samples = sum(own.values())
    print(f"the leader's own time, then with callees, of {samples} samples")
    for frame, hits in own.most_common(28):
        print(f"  {hits / samples:6.1%} {total[frame] / samples:6.1%}  {frame}")


def profile(cluster: Cluster, operation: str, seconds: float, keys: int, run: int) -> None:
    """Load with 64 connections while py-spy samples the leader."""
    with sampling(cluster.leader(1)):
        print(measure(cluster, operation, 64, seconds, keys, run))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", default="1,64,256")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--operations", default="put,get")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--data-dir", help="on the disk to be measured; a temporary folder by default")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=arguments.data_dir) as folder,
        running(Cluster(Path(folder) / "cluster", groups=1)) as cluster,
    ):
        run = 0
        for operation in arguments.operations.split(","):
            for connections in map(int, arguments.connections.split(",")):
                run += 1
                print(measure(cluster, operation, connections, arguments.seconds, arguments.keys, run), flush=True)
        if arguments.profile:
            for operation in arguments.operations.split(","):
                run += 1
                profile(cluster, operation, arguments.seconds, arguments.keys, run)


if __name__ == "__main__":
    main()
