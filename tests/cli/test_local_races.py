"""`raftkv local up` when something goes wrong at the same time: its exit status doesn't depend on luck."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from raftkv.cli import local_cluster
from raftkv.cli.exit_codes import LocalFailure
from raftkv.cli.local_state import CLAIM_PORT, HOST, base_ports, command_line, is_running, load
from tests.cli.clusters import BIN, LocalCluster, clean_environment, run

SMALL = ("--groups", "1", "--replicas", "1", "--coordinators", "1")


def start_up(data_dir: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(BIN / "raftkv"), "local", "up", "--data-dir", str(data_dir), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
    )


def free_base_port(data_dir: Path) -> str:
    return str(local_cluster._new_cluster(data_dir, 1, 1, 10, None).base_port)


@pytest.mark.long
def test_two_at_once_on_the_same_ports_have_one_winner(tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    base_port = free_base_port(tmp_path)
    ups = [start_up(directory, *SMALL, "--base-port", base_port) for directory in directories]
    ends = [process.communicate(timeout=90) for process in ups]
    try:
        assert sorted(process.returncode for process in ups) == [0, 1], ends
        (lost,) = [number for number in (0, 1) if ups[number].returncode]
        assert ends[lost][0] == b""
        assert ends[lost][1].count(b"\n") == 1
        assert b"use" in ends[lost][1]
        rows = json.loads(run("raftkv", "local", "status", "--data-dir", str(directories[1 - lost]), "-o", "json").out)
        assert all(row["state"] != "down" for row in rows["processes"])
        assert load(directories[lost]) is None  # nothing of it was started
    finally:
        for directory in directories:
            run("raftkv", "local", "down", "--wipe", "--data-dir", str(directory))


def test_the_ports_are_claimed_while_processes_start(tmp_path: Path) -> None:
    base_port = next(base_ports(tmp_path))
    with (
        local_cluster.claimed(base_port),
        pytest.raises(LocalFailure, match=f"port {base_port + CLAIM_PORT} is in use: another `raftkv local up`"),
        local_cluster.claimed(base_port),
    ):
        raise AssertionError
    assert not local_cluster.port_in_use(f"{HOST}:{base_port + CLAIM_PORT}")


def test_a_new_cluster_with_a_process_that_cannot_start_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "group-1-0").write_text("where its directory should be")
    failed = run("raftkv", "local", "up", "--data-dir", str(tmp_path), *SMALL)
    assert (failed.code, failed.out) == (1, b"")
    assert "replica 0 of group 1" in failed.err.splitlines()[-1]
    assert "ended at its start" in failed.err.splitlines()[-1]
    state = load(tmp_path)
    assert state is not None
    assert not any(is_running(tmp_path, process) for process in state.processes)


def test_the_directory_of_a_daemon_is_not_one_of_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "wal").mkdir()
    refused = run("raftkv", "local", "up", "--data-dir", str(tmp_path), *SMALL)
    assert (refused.code, refused.out) == (1, b"")
    assert f"{tmp_path} is the data directory of one daemon" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["wal"]


def test_a_full_standard_output_is_named() -> None:
    with open("/dev/full", "wb") as full:
        asked = [str(BIN / "raftkv"), "--help"]
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, env=clean_environment(), check=False)
    assert (done.returncode, done.stderr) == (1, b"raftkv: standard output: No space left on device\n")


def test_ctrl_c_while_a_process_is_started_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the process is there and hasn't been noted yet."""
    start = local_cluster._start
    children: list[subprocess.Popen[bytes]] = []

    def interrupted(*arguments: Any) -> subprocess.Popen[bytes]:
        children.append(start(*arguments))
        while not any(command_line(children[-1].pid)):  # the kernel names it a moment after its start
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        return children[-1]

    monkeypatch.setattr(local_cluster, "_start", interrupted)
    try:
        with pytest.raises(LocalFailure, match="interrupted; 1 process started by it"):
            local_cluster.up(
                tmp_path, groups=1, replicas=1, shards=None, base_port=None, timeout_s=30, say=lambda line: None
            )
        assert len(children) == 1
        local_cluster.down(tmp_path, wipe=True, say=lambda line: None)
        deadline_s = time.monotonic() + 10
        while os.waitpid(children[0].pid, os.WNOHANG) == (0, 0):  # its memory goes first, so `down` was done already
            assert time.monotonic() < deadline_s, "it goes on"
            time.sleep(0.01)
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)


@pytest.mark.long
def test_a_wiped_replica_always_makes_it_1(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, SMALL)
    try:
        cluster.up()
        for _ in range(2):
            assert cluster.down().code == 0
            shutil.rmtree(tmp_path / "controller-1")
            again = run("raftkv", "local", "up", "--data-dir", str(tmp_path))
            assert (again.code, again.out) == (1, b"")
            complaint = again.err.splitlines()[-1]
            assert complaint.startswith("raftkv: the cluster serves, but controller 1 (")
            assert "is not taken back as a voter" in complaint
    finally:
        cluster.down("--wipe")


def test_ctrl_c_says_what_goes_on(tmp_path: Path) -> None:
    process = start_up(tmp_path, *SMALL)
    try:
        while load(tmp_path) is None:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert b"go on: `raftkv local down --data-dir" in said.splitlines()[-1]
        assert b"Traceback" not in said
    finally:
        process.kill()
        run("raftkv", "local", "down", "--wipe", "--data-dir", str(tmp_path))
