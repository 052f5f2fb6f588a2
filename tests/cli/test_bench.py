"""`raftkv bench` on a real cluster: each scenario, its JSON, Ctrl-C, and what becomes of processes and keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pexpect
import pytest

from raftkv.bench.scenarios import SCENARIOS
from tests.cli.clusters import BIN, Ran, clean_environment, run
from tests.system.cluster import Cluster, running

KEYS = 400
AT_ONCE = 6
BUSY_S = 0.35
SHORT = ("--duration", "0.5", "--warmup", "0.1", "--keys", str(KEYS), "--clients", "4", "--processes", "2")
LATENCIES = {"mean", "p50", "p95", "p99", "p99.9", "max"}
TOTALS = {"requests", "done", "done_per_s", "errors", "unknown", "retries", "failed_attempts"}


@pytest.fixture(scope="module")
def controllers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Those of two groups of one replica; what replicas are for is tested elsewhere."""
    shape = Cluster(tmp_path_factory.mktemp("cluster"), groups=2, replicas=1, controllers=1, coordinators=1)
    with running(shape) as cluster:
        yield ",".join(cluster.controller_addresses)


@pytest.fixture(scope="module")
def reports(controllers: str) -> dict[str, Ran]:
    """What each scenario said; several at a time, so that it doesn't take long."""

    def measure(scenario: str) -> Ran:
        more = ("--rate", "100") if scenario == "get-hot" else ("--processes", "1")
        return bench(controllers, "--scenario", scenario, *SHORT, *more, "-o", "json")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(SCENARIOS, pool.map(measure, SCENARIOS), strict=True))


def bench(controllers: str, *arguments: str) -> Ran:
    return run("raftkv", "bench", "--controllers", controllers, *arguments)


def start(controllers: str, *arguments: str) -> subprocess.Popen[str]:
    command = [str(BIN / "raftkv"), "bench", "--controllers", controllers, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment())


def loading_processes(pid: int) -> list[int]:
    """The children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_loading(bench: subprocess.Popen[str], processes: int) -> list[int]:
    deadline_s = time.monotonic() + 20
    while len(children := loading_processes(bench.pid)) < processes:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return children


def wait_until_busy(pids: list[int]) -> None:
    """Until they have used more of the processor than it takes to start, to load the keys and to warm up."""
    deadline_s = time.monotonic() + 30
    while used_s(pids) < BUSY_S * len(pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def used_s(pids: list[int]) -> float:
    """User and system time of the processes."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def wait_until_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_measures_something(reports: dict[str, Ran], scenario: str) -> None:
    ran = reports[scenario]
    assert ran.code == 0, ran.err
    assert ran.err == "raftkv bench: the keys bench:… are left for the next run; --cleanup deletes them\n"
    assert ran.out.count(b"\n") == 1
    report: dict[str, Any] = json.loads(ran.out)
    assert report["scenario"] == scenario
    assert (report["options"]["clients"], report["options"]["keys"], report["interrupted"]) == (4, KEYS, False)
    assert set(report["versions"]) == {"python", "raftkv", "uvloop"}
    assert report["cluster"] == {"config": 1, "shards": 10, "groups": [1, 2]}
    assert report["measured_s"] == pytest.approx(0.5)
    totals = report["totals"]
    assert set(totals) == {*TOTALS, "cut_off"}
    assert totals["done"] > 0
    assert totals["done_per_s"] == pytest.approx(totals["done"] / 0.5)
    assert (totals["errors"], totals["unknown"], totals["cut_off"]) == ({}, {}, 0)
    assert sum(each["done"] for each in report["per_second"]) == totals["done"]
    assert sum(bucket["count"] for bucket in report["histogram"]) == totals["done"]
    assert set(report["operations"]) == set(SCENARIOS[scenario].mix)
    for each in (report, *report["operations"].values()):
        latency = each["latency_ms"]
        assert set(latency) == LATENCIES
        percentiles = [latency[name] for name in ("p50", "p95", "p99", "p99.9", "max")]
        assert percentiles[0] > 0
        assert percentiles == sorted(percentiles)
    assert sum(each["done"] for each in report["operations"].values()) == totals["done"]
    assert all(set(each) == {*TOTALS, "latency_ms"} for each in report["operations"].values())
    if scenario == "get-hot":
        assert report["open_loop"]["kept"] is True
        assert totals["done_per_s"] == pytest.approx(100, rel=0.5)
    else:
        assert report["open_loop"] is None


def test_the_plain_report_and_cleaning_up(controllers: str, reports: dict[str, Ran], tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    ran = bench(controllers, "--scenario", "ycsb-a", *SHORT, "--chart", str(chart), "--cleanup")
    assert ran.code == 0, ran.err
    lines = ran.out.decode().splitlines()
    assert lines[0] == "ycsb-a: 4 clients in 2 processes, closed loop, 0.5 s after 0.1 s of warm-up"
    assert lines[1] == "400 keys, values of 100 bytes; 2 groups, 10 shards; seed 1"
    assert lines[3].split("  ")[-6:] == ["mean ms", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "max ms"]
    assert [line.split()[0] for line in lines[4:7]] == ["total", "read", "update"]
    assert lines[8:] == ["errors: 0", "unknown outcomes: 0", "retries: 0"]
    assert "\x1b" not in ran.out.decode() + ran.err
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert ran.err.startswith("raftkv bench: deleted ")
    assert run("raftkv-kv", "--controllers", controllers, "scan", "bench:").out == b""


def test_an_interrupt_ends_it_with_the_report(controllers: str) -> None:
    process = start(controllers, "--scenario", "mixed", *SHORT, "--duration", "60", "-o", "json")
    children = wait_until_loading(process, 2)
    wait_until_busy(children)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert err.endswith("raftkv bench: interrupted; the report is of what was measured until then\n")
    report = json.loads(out)
    assert report["interrupted"] is True
    assert 0 < report["measured_s"] < 30
    assert report["totals"]["done"] > 10
    wait_until_gone(children)


def test_an_interrupt_before_anything_is_measured(controllers: str) -> None:
    process = start(controllers, "--scenario", "put", *SHORT, "--warmup", "60")
    children = wait_until_loading(process, 2)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "raftkv: bench: interrupted before anything was measured; keys that were loaded stay\n"
    wait_until_gone(children)


def test_a_terminal_shows_progress_and_ctrl_c_reaches_nobody_else(controllers: str) -> None:
    arguments = ["bench", "--controllers", controllers, *SHORT, "--duration", "60"]
    environment = clean_environment(TERM="xterm")
    terminal: pexpect.spawn[str] = pexpect.spawn(
        str(BIN / "raftkv"), arguments, env=environment, encoding="utf-8", dimensions=(50, 120), timeout=30
    )
    terminal.expect("measuring")
    terminal.expect(r"\d/s, p99")
    terminal.sendintr()
    terminal.expect("mixed: 4 clients in 2 processes, closed loop, .* ended early")
    terminal.expect("total ")
    terminal.expect("p99 latency, ms")
    terminal.expect("interrupted")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130


def test_a_loading_process_that_dies_fails_the_whole(controllers: str) -> None:
    process = start(controllers, "--scenario", "get", *SHORT, "--duration", "60")
    children = wait_until_loading(process, 2)
    wait_until_busy(children)
    os.kill(children[1], signal.SIGKILL)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"raftkv: bench: loading process 2 of 2 (pid {children[1]}) was killed by SIGKILL: ")
    assert err.count("\n") == 1
    wait_until_gone(children)


def test_loading_processes_end_with_whoever_started_them(controllers: str) -> None:
    process = start(controllers, "--scenario", "get", *SHORT, "--duration", "60")
    children = wait_until_loading(process, 2)
    process.kill()
    process.communicate(timeout=20)
    wait_until_gone(children)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--scenario", "nothing"), 2, "raftkv bench: Invalid value for '--scenario'"),
        (("--scenario", "get", "--conflict", "5"), 2, "--conflict is for get-hot, get-lock, txn, not for get"),
        (("--scenario", "put", "--groups", "2"), 2, "--groups is for txn, batch, "),
        (("--clients", "2", "--processes", "3"), 2, "--processes 3: there are only 2 clients"),
        (("--chart", "/nowhere/at/all.png"), 2, "--chart: there is no directory /nowhere/at"),
        (("--scenario", "fanout", "--groups", "3"), 1, "only 2 of the cluster's groups serve shards"),
        (("--scenario", "txn", "--keys", "20"), 1, "--keys 20: "),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    controllers: str, arguments: tuple[str, ...], code: int, complaint: str
) -> None:
    ran = bench(controllers, *arguments)
    assert (ran.code, ran.out) == (code, b"")
    assert complaint in ran.err
    assert ran.err.count("\n") == 1


def test_nobody_answers() -> None:
    ran = bench("127.0.0.1:9", "--timeout", "0.3")
    assert (ran.code, ran.out) == (3, b"")
    assert ran.err.startswith("raftkv: bench: query: no leader of the controllers answered within 0.3 s")
    assert ran.err.count("\n") == 1


def test_help_begins_with_examples_and_names_every_scenario() -> None:
    ran = run("raftkv", "bench", "--help")
    assert ran.code == 0
    lines = ran.out.decode().splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip().startswith("raftkv bench "))
    assert first < 6
    assert all(any(line.strip().startswith(f"{name} ") for line in lines) for name in SCENARIOS)
    assert max(map(len, lines)) <= 120
