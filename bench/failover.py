"""The longest time without a successful write when a group's leader goes away.

    python -m bench.failover [--times 10]

A client writes in a closed loop; the leader gets SIGKILL (a crash: the followers must notice) or SIGTERM (it
hands over first). Prints every gap and the medians, beside the bounds: 2 s and 0.5 s.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from pathlib import Path

from tests.system.cluster import Cluster, Process, running

BOUND_S = {"SIGKILL": 2.0, "SIGTERM": 0.5}


class Writer(threading.Thread):
    """Puts as fast as it goes; remembers when each one was acknowledged."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.cluster = cluster
        self.acknowledged_s: list[float] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        with self.cluster.client() as client:
            number = 0
            while not self.stopped.is_set():
                client.put(b"key%d" % (number % 100), b"value")
                self.acknowledged_s.append(time.monotonic())
                number += 1


def gap_s(cluster: Cluster, how: str) -> float:
    """Take the leader away under load; the longest time between two acknowledgements."""
    leader: Process = cluster.leader(1)
    leader.wait_ready()
    writer = Writer(cluster)
    writer.start()
    time.sleep(1.0)
    if how == "SIGKILL":
        leader.kill()
    else:
        leader.terminate()
    time.sleep(3.0)
    writer.stopped.set()
    writer.join()
    leader.start()
    time.sleep(1.0)
    times_s = writer.acknowledged_s
    return max(after - before for before, after in itertools.pairwise(times_s))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running(Cluster(Path(folder) / "cluster")) as cluster:
        for how, bound_s in BOUND_S.items():
            gaps_s = [gap_s(cluster, how) for _ in range(arguments.times)]
            shown = " ".join(f"{gap:.3f}" for gap in gaps_s)
            median_s = statistics.median(gaps_s)
            print(f"{how}: median {median_s:.3f} s (bound {bound_s} s), longest {max(gaps_s):.3f} s; all: {shown}")


if __name__ == "__main__":
    main()
