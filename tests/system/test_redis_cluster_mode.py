"""`--redis-mode cluster`: Redis Cluster's clients find the leaders of their keys, and new ones when they change."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import hiredis
import pytest
import redis

from raftkv.machines.slots import SLOTS, shard_of, slot_of
from tests.system.cluster import Cluster, Process, running
from tests.system.resp import Resp


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(
        Cluster(tmp_path_factory.mktemp("cluster"), groups=2, controllers=1, coordinators=1, redis="cluster")
    ) as cluster:
        for node in nodes_of(cluster):
            wait_until_known(node)
        yield cluster


def nodes_of(cluster: Cluster) -> list[Process]:
    return [process for group in cluster.groups.values() for process in group]


def wait_until_known(node: Process, timeout_s: float = 30.0) -> None:
    """Until the node knows the leaders of all slots, and all nodes."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        with Resp(node.redis_port) as resp:
            info = resp.ask("CLUSTER", "INFO")
        if b"cluster_state:ok" in info and b"cluster_known_nodes:6" in info:
            return
        assert time.monotonic() < deadline_s, info
        time.sleep(0.05)


def clustered(node: Process) -> Any:
    return redis.RedisCluster(host="127.0.0.1", port=node.redis_port, protocol=3, socket_timeout=30)


def key_of_group(cluster: Cluster, gid: int, tag: str) -> bytes:
    """A key that this group serves."""
    with cluster.admin() as admin:
        owners = admin.query().owners
    return next(key for n in range(1000) if owners[shard_of(key := b"%s-%d" % (tag.encode(), n), len(owners))] == gid)


def test_redis_cluster_of_redis_py(cluster: Cluster) -> None:
    with clustered(nodes_of(cluster)[2]) as kv:
        for number in range(60):
            assert kv.set(f"key-{number}", number)
        assert [kv.get(f"key-{number}") for number in range(60)] == [b"%d" % number for number in range(60)]
        assert kv.incr("key-7", 10) == 17
        assert kv.mget_nonatomic(["key-1", "key-2", "key-3"]) == [b"1", b"2", b"3"]
        assert kv.mset({"{t}a": 1, "{t}b": 2}) and kv.mget("{t}a", "{t}b") == [b"1", b"2"]
        with kv.pipeline() as pipe:
            for number in range(60):
                pipe.get(f"key-{number}")
            assert pipe.execute()[8:10] == [b"8", b"9"]
        assert {*kv.scan_iter(match="key-*", count=7)} == {f"key-{number}".encode() for number in range(60)}
        assert len(kv.get_primaries()) == 2 and len(kv.get_replicas()) == 4
        assert kv.delete(*(f"key-{number}" for number in range(60))) == 60
        with kv.pipeline(transaction=True) as pipe:
            pipe.set("{t}a", 5).incr("{t}a").get("{t}b")
            assert pipe.execute()[1:] == [6, b"2"]


def test_moved_and_crossslot(cluster: Cluster) -> None:
    key = key_of_group(cluster, 2, "moved")
    slot = slot_of(key)
    to = f"MOVED {slot} 127.0.0.1:{cluster.leader(2).redis_port}"
    for node in (cluster.leader(1), cluster.follower(1), cluster.follower(2)):
        with Resp(node.redis_port) as resp:
            for name, *more in (("SET", 1), ("GET",), ("MGET",), ("INCR",), ("DEL",), ("WATCH",), ("MSET", 1)):
                assert str(resp.ask(str(name), key, *more)) == to
            resp.ask("MULTI")
            assert str(resp.ask("SET", key, 1)) == to
            assert str(resp.ask("EXEC")).startswith("EXECABORT")
    with Resp(cluster.leader(2).redis_port) as resp:
        other = next(k for n in range(1000) if slot_of(k := b"%d" % n) != slot)
        crossed = "CROSSSLOT Keys in request don't hash to the same slot"
        assert str(resp.ask("MGET", key, other)) == crossed
        assert str(resp.ask("MSET", key, 1, other, 2)) == crossed
        assert str(resp.ask("DEL", key, other)) == crossed
        assert str(resp.ask("MSETNX", key, 1, other, 2)) == crossed
        resp.ask("MULTI")
        assert resp.ask("SET", key, 1) == b"QUEUED"
        assert str(resp.ask("SET", other, 1)).startswith("CROSSSLOT")
        assert str(resp.ask("EXEC")).startswith("EXECABORT")
        assert str(resp.ask("SELECT", 1)) == "ERR SELECT is not allowed in cluster mode"


def test_a_replica_serves_reads_that_are_linearizable(cluster: Cluster) -> None:
    key = key_of_group(cluster, 1, "replica")
    with Resp(cluster.leader(1).redis_port) as leader, Resp(cluster.follower(1).redis_port) as follower:
        assert follower.ask("READONLY") == b"OK"
        for number in range(100):
            assert leader.ask("SET", key, number) == b"OK"
            assert follower.ask("GET", key) == b"%d" % number
        assert str(follower.ask("SET", key, 1)).startswith("MOVED")
        assert follower.ask("READWRITE") == b"OK"
        assert str(follower.ask("GET", key)).startswith("MOVED")


def test_what_cluster_shows(cluster: Cluster) -> None:
    node = cluster.follower(2)
    with Resp(node.redis_port) as resp:
        slots = resp.ask("CLUSTER", "SLOTS")
        assert sorted(slot for first, last, *_ in slots for slot in range(first, last + 1)) == list(range(SLOTS))
        leaders = {cluster.leader(gid).redis_port for gid in (1, 2)}
        assert {master[1] for _, _, master, *_ in slots} == leaders
        lines = resp.ask("CLUSTER", "NODES").decode().splitlines()
        mine = resp.ask("CLUSTER", "MYID").decode()
        assert len(lines) == 6 and len(mine) == 40
        assert next(line for line in lines if "myself" in line).startswith(f"{mine} 127.0.0.1:{node.redis_port}@")
        assert sum(" master - " in line for line in lines) == 2
        shards = [dict(zip(shard[::2], shard[1::2], strict=True)) for shard in resp.ask("CLUSTER", "SHARDS")]
        assert [len(shard[b"nodes"]) for shard in shards] == [3, 3]
        assert resp.ask("CLUSTER", "KEYSLOT", "{user}.name") == slot_of(b"user")
        assert isinstance(resp.ask("CLUSTER", "MEET", "x", 1), hiredis.ReplyError)


def test_clients_follow_a_new_leader(cluster: Cluster) -> None:
    """A client that knows the old one goes on when it is dead."""
    keys = [key_of_group(cluster, gid, "failover") for gid in (1, 2)]
    with clustered(cluster.follower(2)) as kv:
        for key in keys:
            kv.set(key, "before")
        leader = cluster.leader(1)
        leader.kill()
        try:
            deadline_s = time.monotonic() + 30
            while True:
                try:
                    assert kv.set(keys[0], "after")
                    break
                except (redis.RedisError, OSError):
                    assert time.monotonic() < deadline_s, "no new leader is found"
                    time.sleep(0.1)
            assert [kv.get(key) for key in keys] == [b"after", b"before"]
        finally:
            leader.start()
            leader.wait_ready()
    for node in nodes_of(cluster):
        wait_until_known(node)


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="there is no redis-cli: apt-get install redis-tools")
def test_redis_cli_follows_moved(cluster: Cluster) -> None:
    keys = [key_of_group(cluster, gid, "cli").decode() for gid in (1, 2)]
    done = subprocess.run(
        ["redis-cli", "-c", "-p", str(cluster.follower(1).redis_port)],
        input="".join(f"set {key} {key}\nget {key}\n" for key in keys),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line == "OK" or line in keys] == ["OK", keys[0], "OK", keys[1]]
