"""What `raftkv local` remembers, and how it recognises its processes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raftkv.cli import local_cluster, local_state
from raftkv.cli.exit_codes import LocalFailure, UsageError
from raftkv.cli.local_state import LocalProcess, is_running, load, new_state, save


def test_the_layout_of_ports_and_names() -> None:
    state = new_state(2, 3, 10, 20_000)
    assert state.controllers == ("127.0.0.1:20000", "127.0.0.1:20001", "127.0.0.1:20002")
    assert state.coordinator_addresses == ("127.0.0.1:20010", "127.0.0.1:20011", "127.0.0.1:20012")
    assert state.addresses_of(2) == ["127.0.0.1:20023", "127.0.0.1:20024", "127.0.0.1:20025"]
    assert [process.name for process in state.processes][2:5] == ["controller-2", "group-1-0", "group-1-1"]
    assert [process.name for process in state.processes][-1] == "coordinator-2"
    most = new_state(20, 3, 10, 20_000, local_state.COORDINATORS_MAX)
    ports = [int(process.addr.split(":")[1]) for process in most.processes]
    assert len(set(ports)) == len(ports)
    assert max(ports) < 20_000 + local_state.GROUP_PORTS_FROM + local_state.GROUP_PORTS <= 20_200


def test_ports_for_metrics_are_in_the_cluster_s_block() -> None:
    state = new_state(16, 3, 10, 20_000, local_state.COORDINATORS_MAX)
    had_metrics = state.has_metrics
    local_state.add_metrics(state)
    assert (had_metrics, state.has_metrics) == (False, True)
    assert state.processes[0].metrics == "127.0.0.1:20140"
    addresses = [process.metrics for process in state.processes]
    assert addresses[-1] == "127.0.0.1:20199" and len(set(addresses)) == 60
    assert not {process.addr for process in state.processes} & set(addresses)


def test_ports_for_redis_are_in_the_cluster_s_block() -> None:
    state = new_state(20, 3, 10, 20_000, local_state.COORDINATORS_MAX)
    had_redis = state.has_redis
    local_state.add_redis(state)
    assert (had_redis, state.has_redis) == (False, True)
    listeners = [process.redis for process in state.processes if process.redis is not None]
    assert (listeners[0], listeners[-1], len(set(listeners))) == ("127.0.0.1:20080", "127.0.0.1:20139", 60)
    assert all((process.redis is not None) is (process.role == "shardkv") for process in state.processes)
    assert not {process.addr for process in state.processes} & set(listeners)


def test_redis_is_turned_on_while_nothing_runs(tmp_path: Path) -> None:
    state = new_state(1, 1, 7, 20_000)
    ours = sleeper("--data-dir", str(tmp_path / "controller-0"))
    try:
        state.processes[0].pid = ours.pid
        with pytest.raises(UsageError, match="runs without --redis; stop it first: `raftkv local down --data-dir"):
            local_cluster._turn_redis_on(tmp_path, state)
    finally:
        ours.kill()
        ours.wait()
    assert "--redis-listen" not in local_cluster.daemon_arguments(tmp_path, state, state.processes[3])
    local_cluster._turn_redis_on(tmp_path, state)
    arguments = local_cluster.daemon_arguments(tmp_path, state, state.processes[3])
    assert arguments[arguments.index("--redis-listen") + 1] == "127.0.0.1:20080"


def test_a_directory_from_before_metrics_is_read(tmp_path: Path) -> None:
    save(tmp_path, new_state(1, 1, 7, 20_000))
    text = (tmp_path / "cluster.json").read_text()
    before = json.loads(text)
    for process in before["processes"]:
        del process["metrics"], process["redis"]
    (tmp_path / "cluster.json").write_text(json.dumps(before))
    state = load(tmp_path)
    assert state is not None and not state.has_metrics and not state.has_redis
    assert [process["metrics"] for process in local_cluster.status(tmp_path)["processes"]] == [None] * 7
    assert "--metrics-listen" not in local_cluster.daemon_arguments(tmp_path, state, state.processes[0])


def test_metrics_are_turned_on_while_nothing_runs(tmp_path: Path) -> None:
    state = new_state(1, 1, 7, 20_000)
    ours = sleeper("--data-dir", str(tmp_path / "controller-0"))
    try:
        state.processes[0].pid = ours.pid
        with pytest.raises(UsageError, match="runs without --metrics; stop it first: `raftkv local down --data-dir"):
            local_cluster._turn_metrics_on(tmp_path, state)
        assert not state.has_metrics
    finally:
        ours.kill()
        ours.wait()
    local_cluster._turn_metrics_on(tmp_path, state)
    arguments = local_cluster.daemon_arguments(tmp_path, state, state.processes[1])
    assert arguments[arguments.index("--metrics-listen") + 1] == "127.0.0.1:20141"


def test_nothing_is_imported_from_the_directory_of_whoever_says_up(tmp_path: Path) -> None:
    """The parent of a clone has a folder `raftkv`; and anybody's directory may have a module of a common name."""
    (tmp_path / "raftkv").mkdir()
    (tmp_path / "random.py").write_text("raise SystemExit('imported')")
    state = new_state(1, 1, 7, 20_000)
    command = [*local_cluster.daemon_arguments(tmp_path, state, state.processes[0]), "--help"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_too_many_processes_for_metrics(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="with --metrics at most 60 processes, not 66"):
        local_cluster._new_cluster(tmp_path, 20, 3, 10, 20_000, 3, metrics=True)


def test_a_port_of_metrics_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        port = bind_first_of_a_block(stranger, tmp_path)
        stranger.listen()
        process = LocalProcess("controller", None, 0, f"127.0.0.1:{port + 1}", metrics=f"127.0.0.1:{port}")
        with pytest.raises(LocalFailure, match=f"the port of controller 0, 127.0.0.1:{port}, is in use"):
            local_cluster._check_ports([process])


def test_the_state_is_read_back(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    assert load(tmp_path / "nowhere") is None
    state = new_state(1, 1, 7, 20_000)
    state.processes[0].pid = 42
    save(tmp_path, state)
    assert load(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "processes": [{"x": 1}]}'])
def test_a_file_that_is_no_state_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "cluster.json").write_text(text)
    with pytest.raises(LocalFailure, match="is not a state file of `raftkv local`"):
        local_cluster.load_state(tmp_path)


def test_each_directory_has_a_block_of_ports_of_its_own() -> None:
    blocks = {next(local_state.base_ports(Path(f"/data/{number}"))) for number in range(200)}
    assert len(blocks) > 40
    every = list(local_state.base_ports(Path("/data/x")))
    assert len(set(every)) == len(every) == local_state.BASE_PORT_BLOCKS
    assert all(20_000 <= base <= 32_768 - local_state.PORTS for base in every)


def sleeper(*words: str) -> subprocess.Popen[bytes]:
    """A process that sleeps under this command line, which it has from the moment that it has run `exec`."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", *words], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def test_only_a_process_that_names_its_directory_is_ours(tmp_path: Path) -> None:
    process = LocalProcess("controller", None, 0, "127.0.0.1:1")
    assert not is_running(tmp_path, process)
    ours = sleeper("--data-dir", str(tmp_path / "controller-0"))
    other = sleeper("--data-dir", str(tmp_path / "controller-00"))
    try:
        process.pid = other.pid
        assert not is_running(tmp_path, process)
        process.pid = os.getpid()
        assert not is_running(tmp_path, process)
        process.pid = ours.pid
        assert is_running(tmp_path, process)
        ours.kill()
        os.waitid(os.P_PID, ours.pid, os.WEXITED | os.WNOWAIT)  # dead, but not collected yet
        assert not is_running(tmp_path, process)
    finally:
        for child in (ours, other):
            child.kill()
            child.wait()
    assert not is_running(tmp_path, process)


def up(data_dir: Path, *, groups: int | None = None, base_port: int | None = None, timeout_s: float = 5) -> None:
    local_cluster.up(
        data_dir,
        groups=groups,
        replicas=None,
        shards=None,
        base_port=base_port,
        timeout_s=timeout_s,
        say=lambda line: None,
    )


def bind_first_of_a_block(stranger: socket.socket, data_dir: Path) -> int:
    """The first port of a block that nobody uses: outside the range from which the system gives ports to others."""
    for port in local_state.base_ports(data_dir):
        with contextlib.suppress(OSError):
            stranger.bind(("127.0.0.1", port))
            return port
    raise AssertionError("every block is in use")


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        port = bind_first_of_a_block(stranger, tmp_path)
        stranger.listen()
        with pytest.raises(LocalFailure) as caught:
            up(tmp_path, base_port=port)
    assert str(caught.value) == (
        f"the port of controller 0, 127.0.0.1:{port}, is in use by another program; "
        "stop that, or choose other ports for a new cluster with --base-port"
    )
    assert load(tmp_path) is None


def test_without_a_base_port_a_free_block_is_taken(tmp_path: Path) -> None:
    first = next(local_state.base_ports(tmp_path))
    with socket.socket() as stranger:
        try:
            stranger.bind(("127.0.0.1", first + 1))
        except OSError:
            pytest.skip("somebody else has that port just now")
        stranger.listen()
        state = local_cluster._new_cluster(tmp_path, 2, 3, 10, None)
    assert state.base_port != first


def test_an_existing_cluster_keeps_its_shape(tmp_path: Path) -> None:
    save(tmp_path, new_state(2, 3, 10, 20_000))
    with pytest.raises(UsageError, match="has --groups 2, not 3; leave the option out"):
        up(tmp_path, groups=3)
    with pytest.raises(UsageError, match="has --base-port 20000, not 30000"):
        up(tmp_path, base_port=30_000)


def test_too_many_replicas(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 60 replicas"):
        up(tmp_path, groups=21)


def test_two_at_once_on_one_directory(tmp_path: Path) -> None:
    with local_cluster.locked(tmp_path, 0), pytest.raises(LocalFailure, match="another `raftkv local` is at work"):
        up(tmp_path, timeout_s=0.1)


def test_down_without_a_cluster_is_no_error_and_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    said: list[str] = []
    local_cluster.down(tmp_path, wipe=True, say=said.append)
    local_cluster.down(tmp_path / "nowhere", wipe=True, say=said.append)
    assert said == [f"there is no cluster in {tmp_path}", f"there is no cluster in {tmp_path / 'nowhere'}"]
    assert (tmp_path / "mine").exists()


def test_a_wipe_leaves_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    save(tmp_path, new_state(1, 1, 10, 20_000))
    (tmp_path / "group-1-0").mkdir()
    (tmp_path / "logs").mkdir()
    local_cluster.down(tmp_path, wipe=True, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_status_without_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(LocalFailure, match=r"there is no cluster in .*; `raftkv local up` starts one"):
        local_cluster.status(tmp_path)


def test_clients_find_the_default_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFTKV_DATA_DIR", str(tmp_path))
    assert local_state.default_controllers() == ()
    save(tmp_path, new_state(1, 1, 10, 20_000))
    assert local_state.default_controllers()[0] == "127.0.0.1:20000"
    monkeypatch.delenv("RAFTKV_DATA_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert local_state.default_data_dir() == tmp_path / "raftkv" / "local"
    assert local_state.default_controllers() == ()
