"""The binaries as processes: usage errors, help, what a one-shot command imports, standard streams."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raftkv import __version__
from raftkv.cli.programs import command_table
from tests.cli.clusters import cpu_s, start_python

BIN = Path(sys.executable).parent
NOBODY = "127.0.0.1:9"  # the discard port: nobody listens


def run(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a binary of the venv without settings from outside."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAFTKV_")}
    clean["XDG_DATA_HOME"] = "/nonexistent"
    return subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]],
        input=stdin,
        capture_output=True,
        env={**clean, **environment},
        timeout=60,
        check=False,
    )


def one_error_line(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The error of a failed command; checks that it is one line, and not a traceback."""
    lines = done.stderr.decode().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in lines[0]
    assert done.stdout == b""
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("raftkv-kv", "frobnicate"), "raftkv-kv: unknown command frobnicate"),
        (("raftkv-kv", "get"), "raftkv-kv: Get needs more words: usage: Get KEY [--for-update]"),
        (("raftkv-kv", "put", "k", "@/no/such/file"), "can't read the value's file /no/such/file"),
        (("raftkv-kv", "get", "k"), "Get k: no controllers: give --controllers HOST:PORT,… or RAFTKV_CONTROLLERS"),
        (("raftkv-kv", "--controllers", "x", "get", "k"), "--controllers: address 'x' is not HOST:PORT"),
        (("raftkv-kv", "--pipeline", "0"), "--pipeline: 0 is out of range: it must be between 1 and 10000"),
        (("raftkv-ctl", "join", "1"), "Join: 1 is not GID:HOST:PORT,HOST:PORT,…"),
        (("raftkv-ctl", "move", "x", "1"), "SHARD: 'x' is not a whole number"),
        (("raftkv", "kv", "put", "k"), "raftkv-kv: Put needs more words"),
        (("raftkv", "ctl", "frobnicate"), "raftkv-ctl: unknown command frobnicate"),
        (("raftkv", "frobnicate"), "raftkv: No such command 'frobnicate'"),
        (("raftkv", "local", "frobnicate"), "raftkv local: No such command 'frobnicate'"),
        (("raftkv", "controller"), "raftkv controller: Missing option '--id'"),
        (("raftkv", "shardkv", "--id", "x"), "raftkv shardkv: Invalid value for '--id'"),
        (("raftkv", "local", "up", "--groups", "0"), "raftkv local up: Invalid value for '--groups'"),
    ],
)  # fmt: skip
def test_usage_errors(arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint in one_error_line(run(*arguments), 2)


def test_nobody_there() -> None:
    done = run("raftkv-kv", "--controllers", NOBODY, "--timeout", "0.5", "get", "k")
    assert NOBODY in one_error_line(done, 3)
    done = run("raftkv-kv", "--timeout", "0.5", stdin=b"get k\nget l\n", RAFTKV_CONTROLLERS=NOBODY)
    assert one_error_line(done, 3).startswith("raftkv-kv: line 1: Get k: ")


@pytest.mark.parametrize(
    "arguments",
    [("raftkv-kv", "get", "k"), ("raftkv-kv", "put", "k", "v"), ("raftkv-kv", "scan"), ("raftkv-ctl", "status")],
)
def test_a_server_that_never_answers_is_no_hang(arguments: tuple[str, ...]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        done = run(*arguments, "--timeout", "1", RAFTKV_CONTROLLERS=f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 15
    one_error_line(done, 3)


def test_help_needs_no_server() -> None:
    for program in ("raftkv-kv", "raftkv-ctl"):
        for arguments in (["--help"], ["-h"], ["help"]):
            done = run(program, *arguments)
            assert (done.returncode, done.stderr) == (0, b"")
            assert done.stdout.decode().startswith(f"{program} [OPTIONS] [COMMAND ARG…]")
        for command in command_table(program).commands:
            assert run(program, "help", command.name).stdout.decode().startswith(command.usage)
            break
    assert run("raftkv-kv", "put", "--help").stdout.startswith(b"Put KEY VALUE")
    assert b"controller" in run("raftkv", "--help").stdout
    assert run("raftkv", "--version").stdout.startswith(b"raftkv, version ")


def test_an_empty_script_is_done() -> None:
    assert run("raftkv-kv").returncode == 0
    assert run("raftkv-kv", stdin=b"# nothing\n\nhelp\nexit\nget k\n").returncode == 0


def test_standard_input_may_be_closed() -> None:
    done = subprocess.run(["sh", "-c", f"{BIN / 'raftkv-kv'} <&-"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_nobody_reads_the_output() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{BIN / 'raftkv-kv'} help > /dev/full"], capture_output=True, timeout=60, check=False
    )
    assert done.stderr == b"raftkv-kv: Help: can't write to standard output: No space left on device\n"
    assert done.returncode == 1


HEAVY = (
    "prompt_toolkit",
    "rich",
    "rocksdict",
    "uvloop",
    "click",
    "sortedcontainers",
    "raftkv.daemons",
    "raftkv.storage",
)


def test_a_one_shot_command_imports_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from raftkv.cli.programs import main\n"
        f"main('raftkv-kv', ['--controllers', '{NOBODY}', '--timeout', '0.2', 'get', 'k'])\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    modules: list[str] = json.loads(done.stdout)
    heavy = [name for name in modules if name in HEAVY or name.startswith(("raftkv.daemons.", "raftkv.storage."))]
    assert heavy == []
    assert "raftkv.client.kv" in modules


def test_a_one_shot_command_is_quick_to_start() -> None:
    def command() -> None:
        run("raftkv-kv", "--controllers", NOBODY, "--timeout", "0.1", "get", "k")

    costs = [(cpu_s(command), cpu_s(start_python)) for _ in range(5)]
    command_s, python_s = (min(column) for column in zip(*costs, strict=True))
    assert command_s <= 4 * python_s, costs


@pytest.mark.parametrize("program", ["raftkv", "raftkv-kv", "raftkv-ctl"])
def test_the_version(program: str) -> None:
    done = run(program, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{program}, version {__version__}\n".encode(), b"")


def test_a_value_on_standard_input_that_is_closed() -> None:
    command = f"{BIN / 'raftkv-kv'} --controllers {NOBODY} put k - <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert one_error_line(done, 2) == "raftkv-kv: Put: the value - is standard input, which is closed"
