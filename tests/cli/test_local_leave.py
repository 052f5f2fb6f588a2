"""A local cluster whose groups come and go: `up` leaves the map alone, Status shows who still holds what."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.clusters import BIN, LocalCluster, clean_environment

NOBODY = "127.0.0.1:1"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    found = LocalCluster(tmp_path / "cluster", ("--groups", "2", "--replicas", "1", "--shards", "4"))
    found.up()
    try:
        yield found
    finally:
        found.down("--wipe")


@pytest.mark.long
def test_up_does_not_undo_a_leave(cluster: LocalCluster) -> None:
    assert cluster.ctl("leave", "2").code == 0
    cluster.kill(cluster.processes(gid=1)[0])
    cluster.up()
    assert b"Config #2: {Num:2 Shards:[1 1 1 1] Groups:map[1:" in cluster.ctl("query").out
    assert cluster.ctl("leave", "1").code == 0
    cluster.up()
    assert cluster.ctl("query").out == b"Config #3: {Num:3 Shards:[0 0 0 0] Groups:map[]}\n"
    address = cluster.processes(gid=2)[0]["addr"]
    assert cluster.ctl("join", f"2:{address}").code == 0
    cluster.up()
    assert cluster.ctl("query").out.startswith(b"Config #4: {Num:4 Shards:[2 2 2 2]")


def test_status_shows_what_a_dead_group_does_not_fetch(cluster: LocalCluster) -> None:
    assert cluster.kv("put", "k", "v").code == 0
    assert cluster.ctl("join", f"3:{NOBODY}", "--no-wait").code == 0
    command = [str(BIN / "raftkv-ctl"), "--controllers", cluster.controllers, "leave", "1,2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()) as leave:
        deadline = time.monotonic() + 20
        while b"#3" not in cluster.ctl("query").out and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.3)
        leave.send_signal(signal.SIGINT)
        out, err = leave.communicate(timeout=20)
    assert (leave.returncode, out) == (130, b"")
    assert err.decode() == (
        "raftkv-ctl: Leave 1,2: interrupted; configuration 3 is made, and the shards go on moving: "
        "`raftkv-ctl Status` shows how, `raftkv-ctl Wait` waits for them\n"
    )
    shown = cluster.ctl("status", "-o", "json")
    assert shown.code == 5
    status = json.loads(shown.out)
    rows = [(row["shard"], row["to"], row["phase"], row["waits_for"]) for row in status["migrations"]]
    assert rows == [(shard, 3, "waiting", "group 3 does not answer") for shard in range(4)]
    assert {row["from"] for row in status["migrations"]} == {1, 2}
    left = {row["gid"]: row["state"] for row in status["replicas"] if row["left"]}
    assert left == {1: "leader", 2: "leader"}
    assert b"1 (left)" in cluster.ctl("status").out
    assert cluster.kv("get", "k").out == b"v\n"
