"""Metrics, liveness and readiness of real daemons, as a scraper and a supervisor see them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raftkv.daemons.metrics_table import HISTOGRAM, METRICS, PROCESS_METRICS
from tests.cli.clusters import run
from tests.system.cluster import Cluster, Process, free_port, running

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One controller, a group of three and one of one, one coordinator; each serves metrics and logs JSON."""
    json_logs = ("--log-format", "json")
    cluster = Cluster(tmp_path_factory.mktemp("metrics"), controllers=1, coordinators=1, options=json_logs)
    cluster.add_group(2, 1, json_logs)
    for process in cluster.processes:
        process.arguments += ["--metrics-listen", f"127.0.0.1:{free_port()}"]
    with running(cluster):
        yield cluster


def address_of(process: Process) -> str:
    return process.arguments[process.arguments.index("--metrics-listen") + 1]


def fetch(process: Process, path: str) -> tuple[int, str]:
    """Status and body; they come without anything else than HTTP/1.1 being asked for."""
    try:
        with urllib.request.urlopen(f"http://{address_of(process)}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(process: Process) -> Samples:
    """All samples by name and labels."""
    status, text = fetch(process, "/metrics")
    assert status == 200
    families = list(text_string_to_metric_families(text))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def total(processes: list[Process], name: str, **labels: str) -> float:
    """The sum of the samples that have the labels."""
    return sum(
        value
        for process in processes
        for (found, its), value in scrape(process).items()
        if found == name and labels.items() <= dict(its).items()
    )


def eventually(what: object, timeout_s: float = 10.0) -> None:
    assert callable(what)
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


def test_every_role_exposes_what_the_table_says(cluster: Cluster) -> None:
    for process in cluster.processes:
        role = process.arguments[0]
        _, text = fetch(process, "/metrics")
        found = {
            family.name + ("_total" if family.type == "counter" else ""): family
            for family in text_string_to_metric_families(text)
        }
        expected = [metric for metric in METRICS if role in metric.roles] + list(PROCESS_METRICS)
        assert set(found) == {metric.name for metric in expected}
        for metric in expected:
            family = found[metric.name]
            assert family.type == metric.kind, metric.name
            for sample in family.samples:
                labels = set(sample.labels) - ({"le"} if metric.kind == HISTOGRAM else set())
                assert labels == set(metric.labels), sample


def test_counters_go_up_with_what_clients_do(cluster: Cluster) -> None:
    group, groups = cluster.groups[1], [*cluster.groups[1], *cluster.groups[2]]
    names = (
        "raftkv_raft_proposals_applied_total",
        "raftkv_wal_fsync_duration_seconds_count",
        "raftkv_wal_append_bytes_total",
    )
    before = {name: total(group, name) for name in names}
    writes = total(groups, "raftkv_requests_total", verb="write", outcome="ok")
    with cluster.client() as client:
        for number in range(20):
            client.put(b"k%d" % number, b"v")
        found = client.get(b"k7")
        assert found is not None and found.value == b"v"
        with client.transaction() as txn:
            txn.put(b"k1", b"w")
        with client.transaction() as txn:
            for number in range(20):
                txn.put(b"k%d" % number, b"w")
    for name in names:
        eventually(lambda name=name: total(group, name) >= before[name] + 3)
    assert total(groups, "raftkv_requests_total", verb="write", outcome="ok") >= writes + 20
    assert total(groups, "raftkv_request_duration_seconds_count", verb="write") >= writes + 20
    assert total(groups, "raftkv_requests_total", verb="read", outcome="ok") > 0
    assert total(groups, "raftkv_txn_commits_total", way="one_group", outcome="committed") == 1
    assert total(cluster.coordinators, "raftkv_txn_commits_total", way="coordinated", outcome="committed") == 1
    eventually(lambda: total([*groups, *cluster.coordinators], "raftkv_txn_open") == 0)
    leader = cluster.leader(1)
    assert total([leader], "raftkv_raft_is_leader") == total(group, "raftkv_raft_is_leader") == 1
    assert total(group, "raftkv_raft_has_leader") == 3
    assert total([leader], "raftkv_shards_serving") == 5
    assert total([leader], "raftkv_config_num") == 1
    assert {dict(labels)["peer"] for name, labels in scrape(leader) if name == "raftkv_raft_peer_lag_entries"} == {
        process.arguments[process.arguments.index("--id") + 1] for process in group if process is not leader
    }
    assert total(cluster.controllers, "raftkv_controller_config_num") == 1
    assert total([leader], "raftkv_connections") >= 2


def test_a_move_is_measured_where_the_shard_arrives(cluster: Cluster) -> None:
    (target,) = cluster.groups[2]
    before = total([target], "raftkv_shards_serving")
    with cluster.client() as client, cluster.admin() as admin:
        for number in range(50):
            client.put(b"move%d" % number, b"v" * 100)
        admin.move(0, 2)
    eventually(lambda: total([target], "raftkv_shards_serving") == before + 1)
    assert total([target], "raftkv_migration_duration_seconds_count") == 1
    assert total([target], "raftkv_migration_bytes_total") > 100
    eventually(lambda: total([target], "raftkv_migrations") == total([target], "raftkv_shards_importing") == 0)
    assert total(cluster.controllers, "raftkv_controller_config_num") == 2


def test_all_are_ready_and_health_agrees(cluster: Cluster) -> None:
    for process in cluster.processes:
        eventually(lambda process=process: fetch(process, "/readyz") == (200, "ok\n"))
        assert fetch(process, "/livez") == (200, "ok\n")
        assert total([process], "raftkv_ready") == 1
        assert process.status()["not_ready"] == []
    assert run("raftkv", "health", RAFTKV_LISTEN=cluster.groups[1][0].address).code == 0
    status, verbose = fetch(cluster.groups[1][0], "/readyz?verbose")
    assert status == 200
    assert verbose.splitlines() == ["[+]formed ok", "[+]leader ok", "[+]applied ok", "[+]configuration ok", "ok"]
    assert fetch(cluster.groups[1][0], "/livez?verbose") == (200, "[+]loop ok\n[+]store ok\nok\n")


def test_without_a_quorum_a_replica_lives_and_is_not_ready(cluster: Cluster) -> None:
    one, *others = cluster.groups[1]
    for process in others:
        process.signal(signal.SIGSTOP)
    try:
        reason = "[-]leader failed: no leader of the group is known\n"
        eventually(lambda: fetch(one, "/readyz") == (503, reason))
        status, verbose = fetch(one, "/readyz?verbose")
        assert status == 503 and reason in verbose and "[+]formed ok" in verbose and verbose.endswith("not ok\n")
        assert fetch(one, "/livez") == (200, "ok\n")
        assert total([one], "raftkv_raft_has_leader") == total([one], "raftkv_ready") == 0
        health = run("raftkv", "health", RAFTKV_LISTEN=one.address)
        assert health.code == 5 and "knows no leader" in health.err
    finally:
        for process in others:
            process.signal(signal.SIGCONT)
    eventually(lambda: all(fetch(process, "/readyz")[0] == 200 for process in cluster.groups[1]))


def test_every_line_of_a_log_is_an_object(cluster: Cluster) -> None:
    for process in cluster.processes:
        everything = process.log().splitlines()
        ready = f"is ready on {process.address}"  # on standard output: not of the log
        lines = [line for line in everything if not line.endswith(ready)]
        assert lines and len(lines) == len(everything) - 1
        for line in map(json.loads, lines):
            assert {"time", "level", "logger", "message", "gid", "replica"} <= set(line), line
            assert line["role"] == process.arguments[0]


def test_a_replica_that_waits_for_its_group_says_for_whom(tmp_path: Path) -> None:
    mine, other, metrics = (f"127.0.0.1:{free_port()}" for _ in range(3))
    arguments = ["controller", "--id", "0", "--listen", mine, "--peers", f"0={mine},1={other}"]
    process = Process("c", [*arguments, "--metrics-listen", metrics], mine, tmp_path)
    process.start()
    try:
        process.wait_ready()
        waits = f"[-]formed failed: the group is not formed yet; waits for 1 at {other}\n"
        assert fetch(process, "/readyz") == (503, waits)
        assert fetch(process, "/livez") == (200, "ok\n")
        assert total([process], "raftkv_raft_term") == 0
        assert process.terminate() == 0
    finally:
        process.kill()


def test_an_address_that_can_t_be_had_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    mine, taken = f"127.0.0.1:{free_port()}", address_of(cluster.controllers[0])
    for where, why in ((taken, "address already in use"), ("192.0.2.1:9", "")):
        arguments = ["controller", "--id", "0", "--listen", mine, "--peers", f"0={mine}", "--metrics-listen", where]
        process = Process("c", arguments, mine, tmp_path)
        process.start()
        assert process.wait() == 1
        line = process.log().splitlines()[-1]
        assert line.startswith(f"raftkv: controller 0: can't listen on {where} for metrics: ") and why in line
        assert "Traceback" not in process.log()
        assert not process.data_dir.exists()


def test_who_doesn_t_ask_for_metrics_doesn_t_pay_for_the_import() -> None:
    code = (
        "import sys, raftkv.daemons.process, raftkv.cli.daemons\n"
        "assert not {'prometheus_client', 'raftkv.daemons.metrics', 'raftkv.daemons.meters'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
