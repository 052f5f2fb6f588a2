"""kill -9, restart, wipe, catch up: nothing acknowledged is lost, nothing applied twice."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from raftkv.client.sync import SyncRaftKV
from raftkv.protocol.errors import OutcomeUnknown
from tests.system.cluster import Cluster, Process, running


class Appender(threading.Thread):
    """One client that appends numbered tokens to its own key until told to stop."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(name=f"appender-{number}")
        self.cluster = cluster
        self.number = number
        self.key = b"appender-%d" % number
        self.acknowledged: list[int] = []
        self.unknown: list[int] = []
        self.longest_s = 0.0
        self.failure: BaseException | None = None
        self._stop_asked = threading.Event()

    def run(self) -> None:
        try:
            with SyncRaftKV(self.cluster.controller_addresses, timeout_s=60) as client:
                for step in range(1_000_000):
                    if self._stop_asked.is_set():
                        return
                    started_s = time.monotonic()
                    try:
                        client.append(self.key, b"%d " % step)
                        self.acknowledged.append(step)
                    except OutcomeUnknown:
                        self.unknown.append(step)
                    self.longest_s = max(self.longest_s, time.monotonic() - started_s)
        except BaseException as error:
            self.failure = error

    def finish(self) -> None:
        self._stop_asked.set()
        self.join(90)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.failure is not None:
            raise self.failure


def check_appends(cluster: Cluster, appenders: list[Appender]) -> int:
    """Every acknowledged append once and in order; of the unknown ones at most once. Their number."""
    total = 0
    with cluster.client(timeout_s=60) as client:
        for appender in appenders:
            found = client.get(appender.key)
            tokens = [int(token) for token in found.value.split()] if found is not None else []
            assert len(tokens) == len(set(tokens)), f"{appender.name}: applied twice"
            assert tokens == sorted(tokens), f"{appender.name}: out of order"
            missing = set(appender.acknowledged) - set(tokens)
            assert not missing, f"{appender.name}: acknowledged and lost: {sorted(missing)[:10]}"
            phantoms = set(tokens) - set(appender.acknowledged) - set(appender.unknown)
            assert not phantoms, f"{appender.name}: never sent: {sorted(phantoms)[:10]}"
            total += len(appender.acknowledged)
    return total


def storm(cluster: Cluster, seconds: float, seed: int, *, clients: int = 6) -> int:
    """Kill, stop and restart single replicas at random under load; everything runs again at the end."""
    rng = random.Random(seed)
    appenders = [Appender(cluster, number) for number in range(clients)]
    for appender in appenders:
        appender.start()
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        victims = [rng.choice(group) for group in [cluster.controllers, *cluster.groups.values()] if rng.random() < 0.7]
        how = rng.choice(["kill", "kill", "pause", "terminate"])
        for victim in victims:
            if how == "kill":
                victim.kill()
            elif how == "pause":
                victim.signal(signal.SIGSTOP)
            else:
                assert victim.terminate() == 0
        time.sleep(rng.uniform(0.1, 2.0))
        for victim in victims:
            if how == "pause":
                victim.signal(signal.SIGCONT)
            else:
                victim.start()
        time.sleep(rng.uniform(0.5, 2.0))
    for appender in appenders:
        appender.finish()
    return check_appends(cluster, appenders)


@pytest.mark.long
def test_kill_9_of_one_replica_in_every_group_and_of_everything(folder: Path) -> None:
    with running(Cluster(folder, groups=2)) as cluster:
        appenders = [Appender(cluster, number) for number in range(4)]
        for appender in appenders:
            appender.start()
        time.sleep(1.0)
        for victim in (cluster.leader(1), cluster.leader(2), cluster.leader(0)):
            victim.kill()
        time.sleep(3.0)
        for appender in appenders:
            appender.finish()
        assert check_appends(cluster, appenders) > 20
        for process in cluster.processes:
            process.kill()
        for process in cluster.processes:
            process.start()
        cluster.wait_serving()
        check_appends(cluster, appenders)


@pytest.mark.long
def test_a_short_storm(folder: Path) -> None:
    with running(Cluster(folder, groups=2, options=["--snapshot-entries", "200"])) as cluster:
        assert storm(cluster, 12, seed=1) > 100


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_long_storm(folder: Path, seed: int) -> None:
    print(f"seed {seed}")
    with running(Cluster(folder, groups=2, options=["--snapshot-entries", "500"])) as cluster:
        assert storm(cluster, 90, seed=seed) > 500


@pytest.mark.long
def test_a_follower_catches_up_by_snapshot_while_writes_go_on(folder: Path) -> None:
    options = ["--snapshot-bytes", "20000"]
    with running(Cluster(folder, groups=1, options=options)) as cluster:
        victim = cluster.follower(1)
        victim.kill()
        with cluster.client() as client:
            for number in range(300):
                client.put(b"before%d" % number, b"x" * 1000)
            leader = cluster.leader(1)
            last_before = leader.status()["last_index"]
            assert leader.status()["first_index"] > 100, "the log was not compacted"
            appender = Appender(cluster, 0)
            appender.start()
            victim.start()
            wait_caught_up(victim, last_before)
            assert victim.status()["snapshots_installed"] >= 1
            assert len(appender.acknowledged) > 0
            appender.finish()
            # What it caught up with counts: without the other follower it is the majority.
            other = next(p for p in cluster.groups[1] if p not in (victim, leader))
            other.kill()
            client.put(b"after", b"y")
            leader.kill()
            other.start()
            check_appends(cluster, [appender])
            for number in range(300):
                found = client.get(b"before%d" % number)
                assert found is not None and found.value == b"x" * 1000


def wait_caught_up(process: Process, index: int, timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            if process.status().get("applied_index", 0) >= index:
                return
        except Exception:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{process.name} did not catch up to {index}: {process.status()}")


def wait_acknowledged(leader: Process, replica: int, index: int, timeout_s: float = 30) -> None:
    """Until the leader has heard that the replica's disk holds `index`; a replica may apply before its own fsync."""
    deadline_s = time.monotonic() + timeout_s
    while (match := leader.status()["peers"][str(replica)]["match"]) < index:
        assert time.monotonic() < deadline_s, f"replica {replica} acknowledged {match} of {index}"
        time.sleep(0.05)


def test_a_wiped_directory_is_not_taken_back(folder: Path) -> None:
    with running(Cluster(folder, groups=1)) as cluster, cluster.client() as client:
        client.put(b"k", b"v")
        victim = cluster.follower(1)
        victim.kill()
        shutil.rmtree(victim.data_dir)
        victim.start()
        assert victim.wait() == 1
        last_line = victim.log().strip().splitlines()[-1]
        assert "replace the replica" in last_line and "Traceback" not in victim.log()
        client.put(b"k", b"w")
        # It did not vote: with one more replica gone there is no majority, so nothing is acknowledged.
        cluster.follower(1).kill()
        with cluster.client(timeout_s=3) as hasty, pytest.raises(Exception, match=r".+"):
            hasty.put(b"k", b"x")


@pytest.mark.long
def test_an_old_directory_brought_back_is_refused(folder: Path) -> None:
    with running(Cluster(folder, groups=1)) as cluster, cluster.client() as client:
        client.put(b"k", b"v")
        leader = cluster.leader(1)
        victim = cluster.follower(1)
        victim.kill()
        shutil.copytree(victim.data_dir, folder / "old")
        victim.start()
        for number in range(50):
            client.put(b"k%d" % number, b"v")
        wait_acknowledged(leader, int(victim.name.rpartition("-")[2]), leader.status()["last_index"])
        victim.kill()
        shutil.rmtree(victim.data_dir)
        shutil.copytree(folder / "old", victim.data_dir)
        assert cluster.leader(1) is leader
        victim.start()
        assert victim.wait(60.0) == 1
        assert "must be replaced" in victim.log().strip().splitlines()[-1]


@pytest.mark.long
def test_a_paused_leader_serves_no_stale_read(folder: Path) -> None:
    with running(Cluster(folder, groups=1)) as cluster, cluster.client() as client:
        client.put(b"k", b"old")
        for turn in range(3):
            leader = cluster.leader(1)
            leader.signal(signal.SIGSTOP)
            value = b"new%d" % turn
            client.put(b"k", value)
            leader.signal(signal.SIGCONT)
            for _ in range(5):
                found = client.get(b"k")
                assert found is not None and found.value == value
            with SyncRaftKV(cluster.controller_addresses) as fresh:
                found = fresh.get(b"k")
                assert found is not None and found.value == value


def test_sigterm_hands_over_and_exits_0(folder: Path) -> None:
    with running(Cluster(folder, groups=1)) as cluster:
        appender = Appender(cluster, 0)
        appender.start()
        for _ in range(3):
            leader = cluster.leader(1)
            assert leader.terminate() == 0
            assert "Traceback" not in leader.log()
            leader.start()
            cluster.leader(1)
        appender.finish()
        assert not appender.unknown
        check_appends(cluster, [appender])


def test_a_second_sigterm_ends_at_once(folder: Path) -> None:
    with running(Cluster(folder, groups=1)) as cluster:
        for process in cluster.groups[1][:2]:
            process.kill()
        last = cluster.groups[1][2]
        last.signal(signal.SIGSTOP)  # both signals are pending when it goes on
        last.signal(signal.SIGTERM)
        last.signal(signal.SIGINT)
        last.signal(signal.SIGCONT)
        started_s = time.monotonic()
        last.wait(10)
        assert time.monotonic() - started_s < 5
