"""The happy path, end to end: elect, replicate, read, compact, catch up by snapshot, restart."""

from __future__ import annotations

import pytest

from tests.raft.network import Cluster, Faults


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_a_cluster_elects_and_replicates(replicas: int) -> None:
    cluster = Cluster(replicas)
    leader = cluster.elect()
    for number in range(100):
        assert cluster.propose(b"command %d" % number, leader)
        cluster.run(1)
    assert cluster.run(1000, cluster.converged)
    assert len(cluster.payloads) == 100


@pytest.mark.parametrize("replicas", [1, 3])
def test_reads_are_answered_on_every_replica(replicas: int) -> None:
    cluster = Cluster(replicas)
    leader = cluster.elect()
    cluster.propose(b"x", leader)
    cluster.run(200)
    for replica in cluster.servers:
        assert cluster.read(replica)
    cluster.run(50)
    assert cluster.reads_done == replicas


def test_a_follower_left_behind_catches_up_by_snapshot() -> None:
    cluster = Cluster(3)
    leader = cluster.elect()
    behind = next(replica for replica in cluster.servers if replica != leader)
    cluster.isolate(behind)
    cluster.run(1100)
    for number in range(50):
        cluster.propose(b"command %d" % number, leader)
        cluster.run(5)
    cluster.servers[leader].flush_and_compact()
    assert cluster.raft(leader).first_index > cluster.raft(behind).last_index + 1
    cluster.heal()
    assert cluster.run(5000, cluster.converged)
    assert cluster.raft(behind).start_index >= 50


def test_all_crash_and_restart() -> None:
    cluster = Cluster(3, faults=Faults(sync_ms_max=10))
    leader = cluster.elect()
    for number in range(20):
        cluster.propose(b"command %d" % number, leader)
    cluster.run(100)
    before = cluster.raft(leader).commit_index
    for server in cluster.servers.values():
        server.crash()
    for server in cluster.servers.values():
        server.boot()
    cluster.elect()
    assert cluster.run(2000, cluster.converged)
    assert cluster.checker.commit_index > before
    assert len(cluster.payloads) == 20
