"""Read-modify-write transactions over two keys in two groups, at several shares of conflicts.

    python -m bench.transactions [--conflicts 0,10,50] [--clients 16] [--seconds 10]

Starts a cluster of its own on loopback: three controllers, three coordinators, two groups of three replicas. The load
is that of `raftkv bench --scenario txn`, from one process: so many per cent of the transactions take their keys from
the few common ones, the others from the client's own. Prints throughput, how many attempts failed for each commit, and
latency: from the first attempt until the commit. Clients and daemons share the machine; only ratios within one run
mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from raftkv.bench.plan import Plan
from raftkv.bench.processes import Run
from raftkv.bench.report import Report
from raftkv.bench.scenarios import COMMON_KEYS
from tests.system.cluster import Cluster, running

OWN_KEYS = 100
"""Of each client, in each group; about so many, since keys fall where they fall."""
GROUPS = 2
WARMUP_S = 0.5


def measure(cluster: Cluster, per_cent: float, clients: int, seconds: float) -> str:
    plan = Plan(
        scenario="txn",
        controllers=cluster.controller_addresses,
        timeout_s=10.0,
        clients=clients,
        processes=1,
        duration_s=seconds,
        warmup_s=WARMUP_S,
        keys=GROUPS * (COMMON_KEYS + OWN_KEYS * clients),
        value_bytes=100,
        conflict=per_cent / 100,
        groups=GROUPS,
        batch=2,
        rate=None,
        seed=1,
    )
    report = Report(asyncio.run(Run(plan, lambda what, done, total, text: None).measure()))
    total = report.total
    p50_ms, p99_ms = ((total.latency.percentile_ns(share) or 0.0) / 1e6 for share in (50, 99))
    bad = {**total.errors, **total.unknown}
    errors = f"  errors {bad}" if bad else ""
    return (
        f"{per_cent:3g} % conflicts  {clients} clients  {total.done / seconds:7,.1f} commits/s  "
        f"{total.failed_attempts / max(1, total.done):5.2f} failed attempts/commit  "
        f"p50 {p50_ms:7.1f} ms  p99 {p99_ms:7.1f} ms{errors}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conflicts", default="0,10,50", help="per cent of the transactions on hot keys")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of them")
    parser.add_argument("--data-dir", help="on the disk to be measured; a temporary folder by default")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=arguments.data_dir) as folder,
        running(Cluster(Path(folder) / "cluster", groups=GROUPS, coordinators=3)) as cluster,
    ):
        for per_cent in map(float, arguments.conflicts.split(",")):
            print(measure(cluster, per_cent, arguments.clients, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
