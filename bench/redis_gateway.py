"""The Redis gateway of one group of three replicas, loaded by redis-benchmark.

    python -m bench.redis_gateway [--connections 1,64,256] [--requests 50000] [--pipeline 16] [--profile]

Starts a cluster of its own on loopback, and has redis-benchmark (Debian's redis-tools) load the group's leader:
100-byte values, uniform keys, a closed loop; and once with 64 connections that each have `--pipeline` requests under
way. Prints throughput, latency, and the CPU of the three replicas for each operation, beside the budget of the design.
`--profile` samples the leader with py-spy. Figures move with the machine; only ratios within one run mean something.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.durable import BUDGET_US, cpu_s, sampling
from tests.system.cluster import Cluster, running

BUDGET_OF = {"set": "put", "get": "get"}


def measure(cluster: Cluster, operation: str, connections: int, requests: int, keys: int, pipeline: int) -> str:
    group = cluster.groups[1]
    leader = cluster.leader(1)
    before_s, leader_before_s = cpu_s(group), cpu_s([leader])
    out = subprocess.run(
        [
            "redis-benchmark", "-p", str(leader.redis_port), "-t", operation, "-c", str(connections), "-d", "100",
            "-n", str(requests), "-r", str(keys), "-P", str(pipeline), "--csv",
        ],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    used_s, leader_s = cpu_s(group) - before_s, cpu_s([leader]) - leader_before_s
    row = next(csv.DictReader(out.stdout.splitlines()))
    errors = " errors" if "rror" in out.stderr + out.stdout else ""
    budget = BUDGET_US.get((BUDGET_OF.get(operation, ""), connections), "") if pipeline == 1 else ""
    return (
        f"{operation:5} {connections:4} × {pipeline:2} {float(row['rps']):9,.0f}/s  "
        f"mean {float(row['avg_latency_ms']):6.2f} ms  p99 {float(row['p99_latency_ms']):6.2f} ms  "
        f"CPU/op {used_s / requests * 1e6:6.1f} µs (leader {leader_s / requests * 1e6:5.1f})  {budget}{errors}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", default="1,64,256")
    parser.add_argument("--operations", default="set,get")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--pipeline", type=int, default=16)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--data-dir", help="on the disk to be measured; a temporary folder by default")
    arguments = parser.parse_args()
    if shutil.which("redis-benchmark") is None:
        sys.exit("bench.redis_gateway: there is no redis-benchmark; on Debian and Ubuntu: apt-get install redis-tools")
    requests, keys = arguments.requests, arguments.keys
    with (
        tempfile.TemporaryDirectory(dir=arguments.data_dir) as folder,
        running(Cluster(Path(folder) / "cluster", groups=1, redis="plain")) as cluster,
    ):
        for operation in arguments.operations.split(","):
            for connections in map(int, arguments.connections.split(",")):
                some = min(requests, 2_000 * connections)
                print(measure(cluster, operation, connections, some, keys, 1), flush=True)
            print(measure(cluster, operation, 64, requests * 2, keys, arguments.pipeline), flush=True)
        if arguments.profile:
            for operation in arguments.operations.split(","):
                with sampling(cluster.leader(1)):
                    print(measure(cluster, operation, 64, requests, keys, 1), flush=True)


if __name__ == "__main__":
    main()
