"""Redis' own clients, unchanged: redis-py, redis-cli, redis-benchmark; at a plain cluster, any node."""

from __future__ import annotations

import contextlib
import csv
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from raftkv.protocol.errors import VersionMismatch
from tests.system.cluster import Cluster, running
from tests.system.resp import Resp, packed

needs_tools = pytest.mark.skipif(
    shutil.which("redis-cli") is None, reason="there is no redis-cli: apt-get install redis-tools"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(
        Cluster(tmp_path_factory.mktemp("plain"), groups=2, controllers=1, coordinators=1, redis="plain")
    ) as cluster:
        yield cluster


@pytest.fixture
def ports(cluster: Cluster) -> list[int]:
    """A leader's, a follower's, another group's."""
    return [cluster.leader(1).redis_port, cluster.follower(1).redis_port, cluster.follower(2).redis_port]


def client(port: int, protocol: int = 3) -> Any:
    return redis.Redis(port=port, protocol=protocol, socket_timeout=30)


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py(ports: list[int], protocol: int) -> None:
    for number, port in enumerate(ports):
        with client(port, protocol) as kv:
            key = f"py-{protocol}-{number}"
            blob = bytes(range(256)) * 100
            assert kv.ping()
            assert kv.set(key, blob)
            assert kv.get(key) == blob
            assert kv.set(key, "x", nx=True) is None
            assert kv.set(key, "x", xx=True, get=True) == blob
            assert kv.getset(key, "y") == b"x"
            assert kv.append(key, "z") == 2
            assert kv.getdel(key) == b"yz"
            assert kv.get(key) is None
            assert kv.ttl(key) == -2
            assert kv.incr(key, 5) == 5
            assert kv.decr(key) == 4
            assert kv.ttl(key) == -1
            assert kv.type(key) == b"string"
            assert kv.mset({f"{key}-{n}": n for n in range(20)})
            assert kv.mget([f"{key}-{n}" for n in range(21)]) == [*(b"%d" % n for n in range(20)), None]
            assert kv.msetnx({f"{key}-19": "a", f"{key}-20": "b"}) is False
            assert kv.exists(f"{key}-20") == 0
            assert sorted(kv.scan_iter(match=f"{key}-*", count=3)) == sorted(f"{key}-{n}".encode() for n in range(20))
            assert kv.delete(key, *(f"{key}-{n}" for n in range(21))) == 21
            with pytest.raises(redis.ResponseError, match="don't expire"):
                kv.set(key, "v", ex=10)
            with pytest.raises(redis.ResponseError, match="unknown command 'LPUSH'"):
                kv.lpush(key, "v")
            assert kv.client_id() > 0
            assert kv.info()["raftkv_state"] in ("leader", "follower")
            assert kv.config_get("save") in ({"save": ""}, {b"save": b""})


def test_transactions_of_redis_py(ports: list[int]) -> None:
    with client(ports[0]) as one, client(ports[2]) as other:
        one.mset({"from": 10, "to": 0})
        with one.pipeline(transaction=True) as pipe:
            pipe.decrby("from", 3).incrby("to", 3).get("from").set("note", "done")
            assert pipe.execute() == [7, 3, b"7", True]
        with one.pipeline() as pipe:
            pipe.watch("from")
            assert pipe.get("from") == b"7"
            other.incr("from")
            pipe.multi()
            pipe.set("from", 0)
            with pytest.raises(redis.WatchError):
                pipe.execute()
        assert one.get("from") == b"8"
        with one.pipeline() as pipe:
            pipe.watch("absent")
            other.set("absent", 1)
            pipe.multi()
            pipe.set("from", 0)
            with pytest.raises(redis.WatchError):
                pipe.execute()

        def move(pipe: Any) -> None:
            amount = int(pipe.get("to"))
            pipe.multi()
            pipe.set("to", 0)
            pipe.incrby("from", amount)

        assert one.transaction(move, "from", "to") == [True, 11]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures, failures


def test_many_increment_one_counter_through_all_nodes(cluster: Cluster, ports: list[int]) -> None:
    """And others set it to what it is, natively: what a command has read must be what it writes over."""

    def increment(number: int) -> None:
        with client(ports[number % len(ports)]) as kv:
            for _ in range(40):
                kv.incr("hot")

    stopping = threading.Event()

    def rewrite() -> None:
        with cluster.client() as native:
            while not stopping.is_set():
                found = native.get(b"hot")
                if found is not None:
                    with contextlib.suppress(VersionMismatch):
                        native.put(b"hot", found.value, if_version=found.version)

    with client(ports[0]) as kv:
        kv.delete("hot")
        writer = threading.Thread(target=rewrite)
        writer.start()
        try:
            in_threads(12, increment)
        finally:
            stopping.set()
            writer.join()
        assert kv.get("hot") == b"480"


def test_transactions_keep_a_sum_while_everybody_moves(ports: list[int]) -> None:
    """Reads over all shards are of one instant, and no transfer is half done."""
    accounts = [f"account-{number}" for number in range(10)]
    stopping = threading.Event()
    totals: list[int] = []

    def transfer(number: int) -> None:
        with client(ports[number % len(ports)]) as kv:
            for step in range(15):
                source, target = accounts[(number + step) % 10], accounts[(number * 3 + step + 1) % 10]
                if source == target:
                    continue
                with kv.pipeline(transaction=True) as pipe:
                    pipe.decr(source)
                    pipe.incr(target)
                    pipe.execute()

    def look(number: int) -> None:
        with client(ports[number % len(ports)]) as kv:
            while not stopping.is_set():
                try:
                    totals.append(sum(map(int, kv.mget(accounts))))
                except redis.ResponseError as error:
                    assert "TRYAGAIN" in str(error)

    with client(ports[0]) as kv:
        kv.mset(dict.fromkeys(accounts, 100))
        watcher = threading.Thread(target=look, args=(0,))
        watcher.start()
        try:
            in_threads(6, transfer)
        finally:
            stopping.set()
            watcher.join()
        assert sum(map(int, kv.mget(accounts))) == 1000
    assert totals and set(totals) == {1000}


def test_a_pipeline_takes_effect_in_its_order(ports: list[int]) -> None:
    for port in ports:
        with client(port) as kv, kv.pipeline(transaction=False) as pipe:
            for number in range(300):
                key = f"order-{number % 7}"
                pipe.set(key, number).get(key).incr(key).get(key).append(key, "x").strlen(key).delete(key).get(key)
            answers = pipe.execute()
        for number in range(300):
            after = str(number + 1).encode()
            expected = [True, str(number).encode(), number + 1, after, len(after) + 1, len(after) + 1, 1, None]
            assert answers[8 * number : 8 * number + 8] == expected


def test_values_that_are_not_text(ports: list[int]) -> None:
    nasty = [b"", b"\r\n", b"\0", b"$5\r\nhello\r\n", b"*1\r\n$4\r\nPING\r\n", bytes(range(256)), b"\xff" * 1000, b"-1"]
    for port in ports:
        with client(port) as kv:
            for value in nasty:
                kv.set(b"nasty" + value, value)
                assert kv.get(b"nasty" + value) == value
            assert kv.mget([b"nasty" + value for value in nasty]) == nasty


def test_limits(ports: list[int]) -> None:
    for port in ports:
        with client(port) as kv:
            biggest = b"x" * (1 << 20)
            assert kv.set("big", biggest) and kv.get("big") == biggest
            for words in (
                ("SET", "big", biggest + b"x"),
                ("APPEND", "big", "x"),
                ("MSET", "a", 1, "big", biggest + b"x"),
                ("SET", "k" * 9000, "v"),
                ("SET", "big", biggest + b"x", "XX"),
                ("INCR", "k" * 9000),
                ("GET", "k" * 9000),
                ("MGET", "k" * 9000, "big"),
            ):
                with pytest.raises(redis.ResponseError, match="exceeds maximum allowed size"):
                    kv.execute_command(*words)
            assert kv.get("big") == biggest
            kv.delete("big")
        with Resp(port) as resp:
            resp.send(b"*2\r\n$3\r\nGET\r\n$99999999\r\n")
            assert resp.rest() == b"-ERR Protocol error: invalid bulk length\r\n"
        with Resp(port) as resp:
            resp.send(b"*2000000000\r\n")
            assert resp.rest() == b"-ERR Protocol error: invalid multibulk length\r\n"


def test_a_client_that_does_not_read_is_not_read_from(cluster: Cluster) -> None:
    """What it asks for would be 2 GB; the daemon's memory doesn't show it, and others are served."""
    leader = cluster.leader(1)
    with client(leader.redis_port) as kv, Resp(leader.redis_port, timeout_s=3) as greedy:
        kv.set("large", b"x" * 1_000_000)
        before_kb = resident_kb(leader.pid)
        asked = packed("GET", "large") * 2_000
        greedy.socket.setblocking(False)
        try:
            while asked:
                asked = asked[greedy.socket.send(asked) :]
        except BlockingIOError:
            pass
        for _ in range(50):
            assert kv.get("large") == b"x" * 1_000_000
        assert resident_kb(leader.pid) < before_kb + 200_000


def resident_kb(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@needs_tools
def test_redis_cli(ports: list[int]) -> None:
    for port in ports:
        done = subprocess.run(
            ["redis-cli", "-p", str(port)],
            input='set cli "hello world"\nget cli\nincr cli\nkeys cli*\nmulti\nset cli 5\nincr cli\nexec\ndel cli\n',
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines() == [
            "OK", "hello world", "ERR value is not an integer or out of range", "", "cli",
            "OK", "QUEUED", "QUEUED", "OK", "6", "1",
        ]  # fmt: skip
        names = subprocess.run(
            ["redis-cli", "-p", str(port), "--scan", "--pattern", "nobody*"], capture_output=True, text=True, timeout=60
        )
        assert (names.returncode, names.stdout) == (0, "")
        pipe = subprocess.run(
            ["redis-cli", "-p", str(port), "--pipe"],
            input=b"".join(packed("SET", f"piped-{number}", "v" * 500) for number in range(3_000)),
            capture_output=True, timeout=60,
        )  # fmt: skip
        assert b"errors: 0, replies: 3000" in pipe.stdout


@needs_tools
@pytest.mark.parametrize("pipelined", [1, 16])
def test_redis_benchmark(ports: list[int], pipelined: int) -> None:
    done = subprocess.run(
        [
            "redis-benchmark", "-p", str(ports[0]), "-t", "ping,set,get,incr,mset", "-n", "500", "-c", "10",
            "-P", str(pipelined), "-r", "100000", "--csv",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    names = ["PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET (10 keys)"]
    assert [row["test"] for row in rows] == names
    assert all(float(row["rps"]) > 0 for row in rows)
