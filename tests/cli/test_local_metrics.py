"""`raftkv local up --metrics`: every process has a port that answers, and status names it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from tests.cli.clusters import run

UP = ("--groups", "1", "--replicas", "1", "--coordinators", "1")


def test_every_process_serves_metrics(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path / "c"))
    started = run("raftkv", "local", "up", *UP, "--metrics", *where, RAFTKV_METRICS_LISTEN="127.0.0.1:1")
    try:
        assert started.code == 0, started.err
        processes = json.loads(run("raftkv", "local", "status", "-o", "json", *where).out)["processes"]
        assert len(processes) == 5
        for process in processes:
            with urllib.request.urlopen(f"http://{process['metrics']}/metrics", timeout=5) as answer:
                text = answer.read().decode()
            gid = {"controller": 0, "coordinator": 1, "shardkv": process["gid"]}[process["role"]]
            who = f'gid="{gid}",replica="{process["id"]}",role="{process["role"]}"'
            assert f"raftkv_build_info{{{who}" in text
        header, first, *_ = run("raftkv", "local", "status", *where).out.decode().splitlines()
        assert header.split() == ["ROLE", "GID", "ID", "ADDR", "METRICS", "PID", "STATE"]
        assert first.split()[4] == processes[0]["metrics"]
        assert run("raftkv", "local", "up", *where).code == 0  # as it is
    finally:
        run("raftkv", "local", "down", "--wipe", *where)
