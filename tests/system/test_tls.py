"""A cluster of real daemons that speaks TLS alone, its command line, and everybody who isn't let in."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from raftkv.protocol.tls import client_context
from tests.cli.clusters import Ran, run
from tests.protocol.certificates import Authority, Files, needs_openssl
from tests.system.cluster import Cluster, Process, free_port, running

pytestmark = needs_openssl


class Secured(NamedTuple):
    cluster: Cluster
    authority: Authority
    client: Files

    def kv(self, *words: str, stdin: bytes = b"", **environment: Any) -> Ran:
        return self.run("raftkv-kv", *words, stdin=stdin, **environment)

    def run(self, program: str, *words: str, stdin: bytes = b"", **environment: Any) -> Ran:
        controllers = ",".join(self.cluster.controller_addresses)
        settings: dict[str, Any] = {"RAFTKV_CONTROLLERS": controllers, **self.client.environment, **environment}
        return run(program, *words, stdin=stdin, **settings)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """One controller, one coordinator, a group of three; the second group, of one, isn't joined yet."""
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder / "ca")
    node, client = authority.issue("node", "IP:127.0.0.1"), authority.issue("client", "DNS:nobody")
    cluster = Cluster(
        folder, controllers=1, coordinators=1, options=node.options, ssl=client_context(*client), redis="cluster"
    )
    with running(cluster):
        for process in cluster.add_group(2, 1, node.options):
            process.start()
            process.wait_ready()
        yield Secured(cluster, authority, client)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a controller without TLS."""
    address = f"127.0.0.1:{free_port()}"
    arguments = ["controller", "--id", "0", "--listen", address, "--peers", f"0={address}"]
    process = Process("plain", arguments, address, tmp_path_factory.mktemp("plain"))
    process.start()
    try:
        process.wait_ready()
        yield address
    finally:
        process.kill()


def test_redis_clients_need_certificates_too(secured: Secured) -> None:
    """Those of Redis Cluster: nodes find each other over TLS, and so does the client."""
    node = secured.cluster.follower(1)
    files: dict[str, Any] = {
        "host": "127.0.0.1",
        "ssl": True,
        "ssl_certfile": secured.client.cert,
        "ssl_keyfile": secured.client.key,
        "ssl_ca_certs": secured.client.ca,
        "ssl_check_hostname": True,
    }
    deadline_s = time.monotonic() + 30
    with redis.Redis(port=node.redis_port, **files) as kv:
        while kv.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    clustered: Any = redis.RedisCluster(port=node.redis_port, **files)
    with clustered as kv:
        assert kv.set("secret", b"x" * 1_000_000)
        assert kv.get("secret") == b"x" * 1_000_000
        assert kv.delete("secret") == 1
    with redis.Redis(port=node.redis_port) as plain_text, pytest.raises(redis.RedisError):
        plain_text.ping()
    without = {**files, "ssl_certfile": None, "ssl_keyfile": None}
    with redis.Redis(port=node.redis_port, **without) as stranger, pytest.raises((redis.RedisError, OSError)):
        stranger.ping()


def test_values_transactions_and_moving_shards(secured: Secured) -> None:
    keys = "".join(f"put key{number} {number}\n" for number in range(20))
    assert secured.kv(stdin=keys.encode()).out == b"OK\n" * 20
    joined = secured.run("raftkv-ctl", "join", f"2:{secured.cluster.groups[2][0].address}")
    assert (joined.code, joined.out, joined.err) == (0, b"OK\n", "")
    across = b"begin\nget key1\nput key1 a\nput key2 b\nput key3 c\nput key4 d\ncommit\n"
    committed = secured.kv(stdin=across)
    assert (committed.code, committed.out.splitlines()[-1]) == (0, b"OK")
    scanned = dict(line.split(b"\t") for line in secured.kv("scan").out.splitlines())
    assert len(scanned) == 20 and (scanned[b"key4"], scanned[b"key5"]) == (b"d", b"5")
    big = secured.kv("put", "big", "-", stdin=b"x" * 1_000_000)
    assert big.code == 0 and secured.kv("get", "big").out == b"x" * 1_000_000 + b"\n"
    status = secured.run("raftkv-ctl", "status")
    assert status.code == 0 and b"healthy" in status.out
    with secured.cluster.client() as client:
        assert client.get(b"key1") is not None


def test_a_load(secured: Secured) -> None:
    words = ("bench", "--scenario", "ycsb-a", "--keys", "50", "--duration", "0.3", "--warmup", "0", "-o", "json")
    done = secured.run("raftkv", *words, "--cleanup")
    assert done.code == 0, done.err
    totals = json.loads(done.out)["totals"]
    assert totals["done"] > 0 and totals["errors"] == {}
    assert "deleted 50 keys" in done.err


def test_a_leader_that_dies_is_replaced(secured: Secured) -> None:
    leader = secured.cluster.leader(1)
    leader.kill()
    assert secured.kv("append", "after", "x").out == b"OK\n"
    leader.start()
    leader.wait_ready()


def test_options_do_as_well_as_the_environment(secured: Secured) -> None:
    done = run(
        "raftkv-kv", "--controllers", secured.cluster.controller_addresses[0], *secured.client.options, "scan", "no"
    )
    assert (done.code, done.out, done.err) == (0, b"", "")


def test_health(secured: Secured) -> None:
    address = secured.cluster.leader(1).address
    assert secured.run("raftkv", "health", RAFTKV_LISTEN=address).code == 0
    everywhere = address.replace("127.0.0.1", "0.0.0.0")
    well = secured.run("raftkv", "health", RAFTKV_LISTEN=everywhere)
    assert (well.code, well.err) == (0, "") and b"of group 1, leader" in well.out
    without = run("raftkv", "health", RAFTKV_LISTEN=address)
    assert (without.code, without.out) == (1, b"")
    assert f"{address} speaks TLS; give --tls-cert, --tls-key and --tls-ca" in without.err


@pytest.mark.parametrize("program", ["raftkv-kv", "raftkv-ctl"])
@pytest.mark.parametrize("wrong", ["without", "foreign", "distrusted", "expired"])
def test_who_is_not_let_in_is_told_at_once(wrong: str, program: str, secured: Secured, tmp_path: Path) -> None:
    stranger = Authority(tmp_path).issue("stranger")
    files, text = {
        "without": (Files("", "", ""), "speaks TLS; give --tls-cert, --tls-key and --tls-ca"),
        "foreign": (stranger._replace(ca=secured.client.ca), "does not accept our certificate: not signed by the CA"),
        "distrusted": (secured.client._replace(ca=stranger.ca), "has a certificate that is not signed by the CA in"),
        "expired": (secured.authority.issue("old", days=-1), "does not accept our certificate: expired"),
    }[wrong]
    began_s = time.monotonic()
    words = ["get", "k"] if program == "raftkv-kv" else ["query"]
    settings: dict[str, Any] = files.environment
    refused = secured.run(program, *words, **settings)
    assert time.monotonic() - began_s < 3
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, b"", 1)
    assert f"{secured.cluster.controller_addresses[0]} {text}" in refused.err


def test_a_host_that_the_certificate_does_not_name(secured: Secured) -> None:
    port = secured.cluster.controller_addresses[0].rpartition(":")[2]
    refused = secured.kv("get", "k", RAFTKV_CONTROLLERS=f"localhost:{port}")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert f"localhost:{port} has a certificate that is not for localhost; its subjectAltName must" in refused.err


def test_a_dead_controller_doesn_t_hide_the_reason(secured: Secured) -> None:
    controllers = f"127.0.0.1:9,{secured.cluster.controller_addresses[0]}"
    refused = run("raftkv-kv", "get", "k", RAFTKV_CONTROLLERS=controllers, RAFTKV_TIMEOUT="30")
    assert refused.code == 1 and "speaks TLS; give" in refused.err


def test_tls_to_a_plain_port(plain: str, secured: Secured) -> None:
    began_s = time.monotonic()
    refused = secured.kv("get", "k", RAFTKV_CONTROLLERS=plain)
    assert time.monotonic() - began_s < 3
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, b"", 1)
    assert f"{plain} does not speak TLS; leave the --tls- options out" in refused.err


def test_daemons_say_once_why_they_find_nobody(secured: Secured, plain: str, tmp_path: Path) -> None:
    """One that speaks no TLS among those that do, one the other way round, and what the others say of them."""
    controllers = secured.cluster.controller_addresses[0]
    lost = f"127.0.0.1:{free_port()}"
    base = ["shardkv", "--gid", "9", "--id", "0", "--listen", lost, "--peers", f"0={lost},1=127.0.0.1:{free_port()}"]
    daemon = Process("lost", [*base, "--controllers", controllers], lost, tmp_path)
    daemon.start()
    wait_for(daemon, f"controller {controllers} speaks TLS; give --tls-cert, --tls-key and --tls-ca")
    time.sleep(1)
    daemon.kill()
    assert daemon.log().count("speaks TLS") == 1
    log = secured.cluster.controllers[0].log()
    assert log.count("from 127.0.0.1:") == len({line.partition("refused")[2] for line in log.splitlines()} - {""})
    assert "it does not speak TLS; it needs --tls-cert, --tls-key and --tls-ca" in log

    arguments = [*base, "--controllers", plain, *secured.client.options]
    daemon = Process("lost-too", arguments, lost, tmp_path)
    daemon.start()
    wait_for(daemon, f"controller {plain} does not speak TLS; leave the --tls- options out")
    assert daemon.terminate() == 0
    assert "Traceback" not in daemon.log()


def test_peers_of_which_one_speaks_no_tls(secured: Secured, tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    peers = ",".join(f"{number}={address}" for number, address in enumerate(addresses))
    node = secured.authority.issue("node2")
    daemons = [
        Process(
            f"c{number}", ["controller", "--id", str(number), "--listen", address, "--peers", peers], address, tmp_path
        )
        for number, address in enumerate(addresses)
    ]
    daemons[0].start(extra=node.options)
    daemons[1].start()
    wait_for(daemons[0], f"no link with replica 1 at {addresses[1]}: it does not speak TLS; leave the --tls- options")
    wait_for(daemons[0], "refused: it does not speak TLS; it needs --tls-cert, --tls-key and --tls-ca")
    wait_for(daemons[1], f"no link with replica 0 at {addresses[0]}: it speaks TLS; give --tls-cert, --tls-key")
    wait_for(daemons[1], "TLS, which this end doesn't speak (--tls-cert, --tls-key, --tls-ca)")
    time.sleep(1.5)
    assert [daemon.terminate() for daemon in daemons] == [0, 0]
    for daemon in daemons:
        assert "Traceback" not in daemon.log()
        assert daemon.log().count("no link") == daemon.log().count("refused:") == 1, daemon.log()


@pytest.mark.parametrize("program", ["kv", "ctl", "health", "shardkv"])
def test_options_that_do_not_belong_together(program: str, secured: Secured, tmp_path: Path) -> None:
    cert, key, ca = secured.client
    words = {
        "kv": ["kv", "--controllers", "127.0.0.1:1", "scan"],
        "ctl": ["ctl", "--controllers", "127.0.0.1:1", "status"],
        "health": ["health", "--listen", "127.0.0.1:1"],
        "shardkv": ["shardkv", "--gid", "1", "--id", "0", "--listen", "h:1", "--peers", "0=h:1", "--controllers", "h:2",
                    "--data-dir", str(tmp_path / "data")],
    }[program]  # fmt: skip
    for given, complaint in (
        (["--tls-cert", cert], "--tls-key and --tls-ca missing: --tls-cert, --tls-key and --tls-ca belong together"),
        (["--tls-cert", cert, "--tls-key", f"{key}x", "--tls-ca", ca], f"--tls-key {key}x: No such file or directory"),
    ):
        refused = run("raftkv", *words, *given)
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, b"", 1), refused.err
        assert complaint in refused.err
    assert not (tmp_path / "data").exists()


def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (commands,) = (block for block in readme.split("```")[1::2] if "openssl req" in block)
    local = commands.replace("10.0.0.1", "127.0.0.1")
    subprocess.run(["sh", "-euc", local], cwd=tmp_path, check=True, capture_output=True)
    ca = str(tmp_path / "ca.crt")
    node, client = (
        Files(str(tmp_path / f"{name}.crt"), str(tmp_path / f"{name}.key"), ca) for name in ("node1", "client")
    )
    address = f"127.0.0.1:{free_port()}"
    arguments = ["controller", "--id", "0", "--listen", address, "--peers", f"0={address}", *node.options]
    daemon = Process("documented", arguments, address, tmp_path)
    daemon.start()
    try:
        daemon.wait_ready()
        settings: dict[str, Any] = client.environment
        assert run("raftkv-ctl", "--controllers", address, "query", **settings).out.startswith(b"Config #0:")
    finally:
        daemon.kill()


def test_they_end_well(secured: Secured) -> None:
    """The last test: a graceful end of everything, and no trace of a bug in any log."""
    for process in secured.cluster.processes:
        assert process.terminate() == 0, process.log()
    for process in secured.cluster.processes:
        for word in ("Traceback", "ERROR", "Error("):
            assert word not in process.log(), process.log()


def wait_for(process: Process, text: str, timeout_s: float = 10) -> None:
    """Until the process has logged it."""
    deadline_s = time.monotonic() + timeout_s
    while text not in process.log():
        assert time.monotonic() < deadline_s, process.log()
        time.sleep(0.02)
