"""The daemons' options: from words or the environment to DaemonOptions, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raftkv.cli import main
from raftkv.daemons.options import DaemonOptions

PEERS = "0=h0:1,1=h1:1,2=h2:1"
CONTROLLER = ["controller", "--id", "1", "--listen", "h1:1", "--peers", PEERS, "--data-dir", "d"]
SHARDKV = ["shardkv", "--gid", "7", *CONTROLLER[1:], "--controllers", "c:1,c:2"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[DaemonOptions]:
    """The options of the daemons that were started (they end at once, with status 0)."""
    runs: list[DaemonOptions] = []

    def run_daemon(options: DaemonOptions, on_ready: Callable[[str], None]) -> int:
        runs.append(options)
        on_ready(f"{options.name} is ready")
        return 0

    monkeypatch.setattr("raftkv.daemons.process.run_daemon", run_daemon)
    return runs


def test_a_controller(started: list[DaemonOptions], capsys: pytest.CaptureFixture[str]) -> None:
    assert main._run_click([*CONTROLLER, "--shards", "16"]) == 0
    peers = {0: "h0:1", 1: "h1:1", 2: "h2:1"}
    assert started == [DaemonOptions(role="controller", replica=1, listen="h1:1", peers=peers, data_dir="d", shards=16)]
    assert capsys.readouterr() == ("controller 1 is ready\n", "")


def test_a_coordinator(started: list[DaemonOptions], capsys: pytest.CaptureFixture[str]) -> None:
    assert main._run_click(["coordinator", *CONTROLLER[1:], "--controllers", "c:1,c:2"]) == 0
    (options,) = started
    assert (options.role, options.gid, options.controllers) == ("coordinator", 1, ("c:1", "c:2"))
    assert capsys.readouterr() == ("coordinator 1 is ready\n", "")


def test_a_shardkv_with_every_option(started: list[DaemonOptions]) -> None:
    more = ["--advertise", "a:9", "--snapshot-entries", "5", "--snapshot-bytes", "6", "--cache-bytes", "7"]
    more += ["--metrics-listen", "127.0.0.1:9000"]
    more += ["--reads", "lease", "--log-level", "debug", "--log-format", "json"]
    assert main._run_click([*SHARDKV, *more]) == 0
    (options,) = started
    assert (options.gid, options.controllers, options.advertise) == (7, ("c:1", "c:2"), "a:9")
    assert (options.snapshot_entries, options.snapshot_bytes, options.cache_bytes) == (5, 6, 7)
    assert options.metrics_listen == "127.0.0.1:9000"
    assert (options.reads, options.log_level, options.log_format) == ("lease", "debug", "json")


def test_everything_from_the_environment(started: list[DaemonOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "ID": "2", "LISTEN": "h2:1", "PEERS": PEERS, "DATA_DIR": "d", "GID": "7", "CONTROLLERS": "c:1",
        "SNAPSHOT_ENTRIES": "5", "READS": "lease", "LOG_FORMAT": "json",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"RAFTKV_{name}", value)
    assert main._run_click(["shardkv"]) == 0
    (options,) = started
    assert (options.replica, options.gid, options.snapshot_entries, options.reads) == (2, 7, 5, "lease")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*CONTROLLER, "--id", "5"], "--id 5 is not among the --peers (they name 0, 1, 2)"),
        ([*CONTROLLER, "--peers", "0=h:1,0=h:2"], "replica 0 stands there twice"),
        ([*CONTROLLER, "--peers", "h:1"], "'h:1' is not ID=HOST:PORT"),
        ([*CONTROLLER, "--peers", "1=h"], "--peers: address 'h' is not HOST:PORT"),
        ([*CONTROLLER, "--peers", "0=h:1,1=h:1"], "two of the --peers have the same address"),
        ([*CONTROLLER, "--listen", "h:99999"], "--listen: address 'h:99999': the port must be a number"),
        ([*CONTROLLER, "--shards", "0"], "--shards must be from 1 to 16384"),
        ([*CONTROLLER, "--snapshot-entries", "0"], "must be at least 1"),
        ([*CONTROLLER, "--reads", "dirty"], "Invalid value for '--reads'"),
        ([*CONTROLLER, "--frobnicate"], "No such option '--frobnicate'"),
        ([*CONTROLLER, "more"], "unexpected extra argument (more)"),
        ([*SHARDKV, "--gid", "0"], "--gid must be at least 1"),
        ([*SHARDKV, "--controllers", "c"], "'c' is not HOST:PORT"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    started: list[DaemonOptions], arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main._run_click(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert complaint in err
    assert started == []
