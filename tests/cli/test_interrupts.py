"""SIGINT at every moment of a command's life: exit status 130, at most one line, never a traceback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.clusters import BIN, clean_environment

NOBODY = "127.0.0.1:9"
INTERRUPTED_AT_IMPORT = """
import os, signal, sys
where = sys.argv[1]
class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
from raftkv.cli import main
program = getattr(main, sys.argv[2])
del sys.argv[:3]
sys.argv.insert(0, "raftkv")
program()
"""


@pytest.mark.parametrize(
    ("module", "program", "arguments"),
    [
        ("raftkv.cli.interrupts", "raftkv_kv", ["get", "k"]),
        ("raftkv.cli.programs", "raftkv_kv", ["get", "k"]),
        ("raftkv.cli.kv_commands", "raftkv_kv", ["get", "k"]),
        ("raftkv.client.kv", "raftkv_kv", ["get", "k"]),
        ("raftkv.cli.health", "raftkv_ctl", ["status"]),
        ("click", "raftkv", ["local", "status"]),
        ("raftkv.cli.local_cluster", "raftkv", ["local", "status"]),
        ("raftkv.daemons.options", "raftkv", ["controller"]),
        ("raftkv.sim.main", "raftkv", ["sim", "--help"]),
        ("raftkv.bench.processes", "raftkv", ["bench"]),
    ],
)
def test_an_interrupt_during_an_import(module: str, program: str, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_IMPORT, module, program, *arguments],
        env=clean_environment(RAFTKV_CONTROLLERS=NOBODY, RAFTKV_TIMEOUT="5"),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == b""
    assert done.stderr.count(b"\n") <= 1
    assert b"Traceback" not in done.stderr


def test_the_entry_points_import_next_to_nothing() -> None:
    """Until the handler stands a SIGINT is a traceback in whatever is being imported."""
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom raftkv.cli import main\n"
        "print(sorted(set(sys.modules) - before - {'__future__'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().strip() == "['raftkv', 'raftkv.cli', 'raftkv.cli.main']"


@pytest.mark.parametrize("arguments", [("get", "k"), ("scan",), ()])
def test_several_in_a_row_while_nobody_answers(arguments: tuple[str, ...]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        controllers = f"127.0.0.1:{silent.getsockname()[1]}"
        with subprocess.Popen(
            [str(BIN / "raftkv-kv"), "--controllers", controllers, "--timeout", "30", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(),
        ) as process:
            assert process.stdin is not None
            if not arguments:
                process.stdin.write(b"get k\n")
                process.stdin.flush()
            silent.settimeout(30)
            connection, _ = silent.accept()
            with connection:
                for _ in range(20):
                    if process.poll() is None:
                        process.send_signal(signal.SIGINT)
                    time.sleep(0.005)
                out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert err.decode().rstrip().endswith("interrupted; nothing was changed")
    assert err.count(b"\n") == 1


def test_a_program_that_was_told_to_ignore_it_ignores_it() -> None:
    code = (
        "import os, signal\nfrom raftkv.cli import interrupts\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "interrupts.end_at_once()\nos.kill(os.getpid(), signal.SIGINT)\n"
        "interrupts.raise_once()\nos.kill(os.getpid(), signal.SIGINT)\nprint('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"alive\n")


def test_an_interrupt_while_a_value_is_read() -> None:
    """More goes in than the pipe holds: so it is being read."""
    command = [str(BIN / "raftkv-kv"), "put", "k", "-"]
    environment = clean_environment(RAFTKV_CONTROLLERS=NOBODY)
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(bytes(256 * 1024))
        process.stdin.flush()
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "S":  # it waits for more
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b"raftkv-kv: Put k: interrupted; nothing was changed\n"
