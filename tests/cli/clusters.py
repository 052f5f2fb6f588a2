"""Real clusters for the tests, through `raftkv local` as a user would have them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without settings of raftkv from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAFTKV_")}
    return {**kept, **more}


def cpu_s(act: Callable[[], object]) -> float:
    """What the processes that `act` starts and waits for use of the processor."""
    before = os.times()
    act()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def start_python() -> None:
    """The yardstick of start-up costs."""
    subprocess.run([sys.executable, "-c", "import asyncio"], check=True)


@dataclass
class Ran:
    """A finished command."""

    code: int
    out: bytes
    err: str


def run(*arguments: str | bytes, stdin: bytes = b"", timeout_s: float = 60, **environment: str) -> Ran:
    """Run a binary of the venv."""
    program, *rest = arguments
    done = subprocess.run(
        [os.fsencode(BIN / os.fsdecode(program)), *(os.fsencode(argument) for argument in rest)],
        input=stdin,
        capture_output=True,
        env=clean_environment(**environment),
        timeout=timeout_s,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr.decode())


@dataclass
class LocalCluster:
    """A cluster in a directory."""

    data_dir: Path
    shape: tuple[str, ...]
    controllers: str = ""

    def up(self) -> Ran:
        """Start it, or what is dead of it."""
        ran = run("raftkv", "local", "up", "--data-dir", str(self.data_dir), *self.shape)
        assert ran.code == 0, ran.err
        self.controllers = ran.out.decode().split()[-1]
        return ran

    def down(self, *options: str) -> Ran:
        """Stop it."""
        return run("raftkv", "local", "down", "--data-dir", str(self.data_dir), *options)

    def status(self) -> dict[str, Any]:
        """The object of `status -o json`."""
        ran = run("raftkv", "local", "status", "--data-dir", str(self.data_dir), "-o", "json")
        assert ran.code == 0, ran.err
        shown: dict[str, Any] = json.loads(ran.out)
        return shown

    def kv(self, *arguments: str | bytes, stdin: bytes = b"") -> Ran:
        """Run raftkv-kv."""
        return run("raftkv-kv", *arguments, stdin=stdin, RAFTKV_CONTROLLERS=self.controllers)

    def ctl(self, *arguments: str | bytes, stdin: bytes = b"") -> Ran:
        """Run raftkv-ctl."""
        return run("raftkv-ctl", *arguments, stdin=stdin, RAFTKV_CONTROLLERS=self.controllers)

    def processes(self, **wanted: Any) -> list[dict[str, Any]]:
        """The processes of `status` with these fields."""
        return [row for row in self.status()["processes"] if wanted.items() <= row.items()]

    def kill(self, process: dict[str, Any], number: signal.Signals = signal.SIGKILL) -> None:
        """Signal one process of this cluster."""
        os.kill(process["pid"], number)
