"""The last group leaves when it is empty, and comes back; real daemons, and the command line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raftkv.protocol.errors import BadRequest, LastGroup
from tests.cli.clusters import run
from tests.system.cluster import Cluster, running


def test_the_last_group_leaves_when_it_is_empty(folder: Path) -> None:
    with running(Cluster(folder, groups=1)) as cluster, cluster.admin() as admin, cluster.client() as client:
        controllers = ",".join(cluster.controller_addresses)
        addresses = [process.address for process in cluster.groups[1]]
        client.put(b"key", b"value")
        refused = run("raftkv-ctl", "Leave", "1", RAFTKV_CONTROLLERS=controllers)
        assert refused.code == 1
        assert refused.err.count("\n") == 1
        assert "group 1 is the last one, and holds data" in refused.err
        found = client.get(b"key")
        assert found is not None and found.value == b"value"
        client.put(b"key", b"it serves on")
        assert client.delete(b"key")
        left = run("raftkv-ctl", "Leave", "1", RAFTKV_CONTROLLERS=controllers)
        assert left.code == 0, left.err
        assert admin.query().groups == {}
        admin.join({1: addresses})
        assert client.get(b"key") is None
        client.put(b"key", b"again")
        found = client.get(b"key")
        assert found is not None and found.value == b"again"


@pytest.mark.long
def test_a_last_group_that_does_not_answer_stays(folder: Path) -> None:
    with running(Cluster(folder, groups=1)) as cluster, cluster.admin() as admin:
        for process in cluster.groups[1]:
            process.kill()
        with pytest.raises(LastGroup, match="--force gives the data up"):
            admin.leave([1])
        assert admin.leave([1], force=True) == 2
        assert admin.query().groups == {}


def test_a_last_group_that_has_nothing_is_not_forced_out_over_one_that_has(folder: Path) -> None:
    """Group 1 has left for a group that is not there: it still has everything."""
    with running(Cluster(folder, groups=1)) as cluster, cluster.admin() as admin, cluster.client() as client:
        client.put(b"key", b"value")
        addresses = [process.address for process in cluster.groups[1]]
        admin.join({7: ["127.0.0.1:1"]})
        admin.leave([1])
        with pytest.raises(BadRequest, match=r"group 1, which has left, answers at .* and still holds 10 shards"):
            admin.leave([7], force=True)
        admin.join({1: addresses})
        admin.leave([7])
        found = client.get(b"key")
        assert found is not None and found.value == b"value"


@pytest.mark.long
def test_a_leader_that_the_map_does_not_name_is_asked(folder: Path) -> None:
    with (
        running(Cluster(folder, groups=2), join=False) as cluster,
        cluster.admin() as admin,
        cluster.client() as client,
    ):
        leader = cluster.leader(1)
        admin.join({1: [process.address for process in cluster.groups[1] if process is not leader]})
        client.put(b"key", b"value")
        admin.join({2: [process.address for process in cluster.groups[2]]})
        admin.leave([1])
        deadline_s = time.monotonic() + 20
        while leader.status()["shards"]:
            assert time.monotonic() < deadline_s, "the shards do not move"
            time.sleep(0.1)
        found = client.get(b"key")
        assert found is not None and found.value == b"value"
