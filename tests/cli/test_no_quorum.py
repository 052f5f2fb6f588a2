"""A cluster without a majority: what every kind of command prints, in which time, and how it exits."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from tests.cli.clusters import LocalCluster, Ran, run
from tests.cli.screen import Screen

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    shape = ("--groups", "1", "--replicas", "3", "--coordinators", "1")
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"), shape)
    try:
        cluster.up()
        assert cluster.kv("put", "k", "v").code == 0
        yield cluster
    finally:
        cluster.down("--wipe")


def in_time(cluster: LocalCluster, *arguments: str, stdin: bytes = b"") -> Ran:
    """Run a command with that timeout: one that can't be carried out takes about as long."""
    began_s = time.monotonic()
    ran = run(*arguments, "--timeout", f"{TIMEOUT_S:g}", stdin=stdin, RAFTKV_CONTROLLERS=cluster.controllers)
    assert time.monotonic() - began_s < 5 * TIMEOUT_S, arguments
    assert "Traceback" not in ran.err
    return ran


def refused(cluster: LocalCluster, role: str, *arguments: str, stdin: bytes = b"") -> str:
    """The one line of a command that nobody carried out."""
    ran = in_time(cluster, *arguments, stdin=stdin)
    assert ran.code == 3, ran.err
    assert ran.err.count("\n") == 1
    assert f"no leader of {role} answered within" in ran.err
    assert "(connection refused)" in ran.err  # who was tried, and what came of it
    return ran.err


def kill_two(cluster: LocalCluster, role: str) -> None:
    processes = cluster.processes(role=role)
    for process in [*cluster.processes(role=role, state="leader"), *cluster.processes(role=role, state="follower")][:2]:
        cluster.kill(process)
    assert len(processes) == 3


def without_leader(cluster: LocalCluster, group: str) -> None:
    """Until the one that is left has noticed."""
    deadline_s = time.monotonic() + 30
    while f"UNHEALTHY: {group}: no leader" not in cluster.ctl("status").out.decode():
        assert time.monotonic() < deadline_s


def test_a_group_without_majority(cluster: LocalCluster) -> None:
    kill_two(cluster, "shardkv")
    without_leader(cluster, "group 1")
    line = refused(cluster, "group 1", "raftkv-kv", "get", "k")
    assert line.startswith("raftkv-kv: Get k: no leader of group 1 answered within 2 s; tried 127.0.0.1:")
    assert line.endswith("; look at `raftkv-ctl Status`, or allow more time with --timeout\n")
    refused(cluster, "group 1", "raftkv-kv", "put", "k", "w")  # it can't have been logged: not exit 6
    refused(cluster, "group 1", "raftkv-kv", "scan")
    refused(cluster, "group 1", "raftkv-kv", stdin=b"put k w\n")
    assert refused(cluster, "group 1", "raftkv-kv", "export").endswith("; no pair was read: start again\n")
    refused(cluster, "group 1", "raftkv-kv", "import", "-", stdin=b"k\tw\n")

    assert in_time(cluster, "raftkv-ctl", "query").code == 0
    status = in_time(cluster, "raftkv-ctl", "status")
    assert (status.code, status.err) == (5, "")
    assert status.out.decode().count(" is down\n") == 2
    top = in_time(cluster, "raftkv", "top", "--interval", "0.2")
    assert (top.code, top.err) == (5, "")
    assert b"UNHEALTHY: group 1: no leader\n" in top.out
    txns = in_time(cluster, "raftkv-ctl", "txns")
    assert (txns.code, txns.out) == (5, b"UNKNOWN: no leader of group 1 answers\n")


def test_status_on_a_terminal_of_80_columns(cluster: LocalCluster) -> None:
    def screen(no_color: str) -> Screen:
        shown = Screen("raftkv-ctl", "status", RAFTKV_CONTROLLERS=cluster.controllers, NO_COLOR=no_color)
        assert shown.wait_for_end() == 5
        return shown

    coloured, plain = screen(""), screen("1")
    assert "\x1b[31m" in coloured.written and "\x1b" not in plain.written

    def rows(shown: Screen) -> list[list[str]]:
        """Without what goes on changing."""
        return [re.sub(r"candidate|precandidate", "follower", line).split()[:4] for line in shown.lines]

    assert rows(coloured) == rows(plain)
    assert all(len(line) < 80 for line in plain.lines if not line.startswith("UNHEALTHY"))
    assert len(plain.lines) == len(plain.written.splitlines())  # nothing was broken in two


def test_it_works_again_when_they_are_back(cluster: LocalCluster) -> None:
    cluster.up()
    assert cluster.kv("get", "k").out == b"v\n"
    assert cluster.ctl("status").code == 0


@pytest.mark.long
def test_controllers_without_majority(cluster: LocalCluster) -> None:
    kill_two(cluster, "controller")
    without_leader(cluster, "the controllers")
    for command in (("raftkv-kv", "get", "k"), ("raftkv-kv", "put", "k", "w"), ("raftkv-ctl", "query")):
        refused(cluster, "the controllers", *command)
    refused(cluster, "the controllers", "raftkv-ctl", "move", "3", "1")
    status = in_time(cluster, "raftkv-ctl", "status")
    assert status.code == 5
    assert b"UNHEALTHY: the shard map can't be read: query: no leader of the controllers answered" in status.out
    top = in_time(cluster, "raftkv", "top", "--interval", "0.2")
    assert top.code == 5
    assert b"UNHEALTHY: the controllers: no leader\n" in top.out
    health = in_time(
        cluster, "raftkv", "health", "--listen", cluster.processes(role="controller", state="down")[0]["addr"]
    )
    assert health.code == 3
    assert re.fullmatch(
        r"raftkv: health: no good answer from \S+: connection refused; is it running, .*\?\n", health.err
    )
