"""The main job on real input: a text goes in through the command line, replicas die, the text comes out.

As an operator does it: `raftkv local up`, `examples/load_text.py`, kill -9, `raftkv local up` again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BASE_PORT = 18_000
PORTS_PER_WORKER = 200


def raftkv(*arguments: str, timeout_s: float = 120) -> str:
    """Run the program; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "raftkv", *arguments], capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


class Local:
    """A cluster of `raftkv local`."""

    def __init__(self, folder: Path) -> None:
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        self.data_dir = str(folder / "cluster")
        self.base_port = BASE_PORT + worker * PORTS_PER_WORKER

    def up(self) -> None:
        raftkv("local", "up", "--data-dir", self.data_dir, "--base-port", str(self.base_port))

    def status(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(raftkv("local", "status", "--data-dir", self.data_dir, "-o", "json"))
        return report

    @property
    def controllers(self) -> str:
        return ",".join(self.status()["controllers"])

    def pids(self, role: str, gid: int | None = None) -> list[int]:
        return [p["pid"] for p in self.status()["processes"] if p["role"] == role and p["gid"] == gid and p["pid"]]

    def load(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "examples/load_text.py"), "--controllers", self.controllers, *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def local(folder: Path) -> Iterator[Local]:
    cluster = Local(folder)
    cluster.up()
    try:
        yield cluster
    finally:
        raftkv("local", "down", "--wipe", "--data-dir", cluster.data_dir)


@pytest.fixture
def text(folder: Path) -> str:
    """At least 5,000 lines: the licence texts where there are any, else this project's own sources."""
    licences = Path("/usr/share/common-licenses")
    sources = sorted(licences.iterdir()) if licences.is_dir() else sorted(ROOT.glob("raftkv/**/*.py"))
    joined = folder / "text"
    joined.write_bytes(b"".join(path.read_bytes() for path in sources if path.is_file()))
    return str(joined)


@pytest.mark.timeout(240)
def test_a_text_survives_kill_9_of_some_and_of_all(local: Local, text: str) -> None:
    load = local.load("--pipeline", "8", text)
    assert load.stdout is not None
    assert load.stdout.readline().startswith("500 of")
    victims = [local.pids("shardkv", 1)[0], local.pids("shardkv", 2)[0], local.pids("controller")[0]]
    assert load.poll() is None, "the load ended before anything was killed"
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    rest = load.stdout.read()
    assert load.wait(120) == 0, rest
    assert "equal: " in rest

    local.up()
    for process in local.status()["processes"]:
        os.kill(process["pid"], signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while any(process["state"] != "down" for process in local.status()["processes"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    local.up()
    verify = local.load("--verify-only", text)
    assert verify.stdout is not None
    answer = verify.stdout.read()
    assert verify.wait(60) == 0 and "equal: " in answer
