"""A whole cluster on this machine: start what isn't running, wait until it serves, stop it, say how it is.

Everything is found by the data directory. It signals a pid only after it has seen that the process is
one of this cluster, and it removes only what it made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raftkv.cli import config_file, interrupts, local_state
from raftkv.cli.exit_codes import ExitCode, LocalFailure, UsageError
from raftkv.cli.local_ready import LOG_DIRECTORY, STATUS_TIMEOUT_S, NotOurs, log_path, wait_until_served
from raftkv.cli.local_state import LocalProcess, LocalState, is_running
from raftkv.cli.results import count

STOP_TIMEOUT_S = 15.0
LOCK_FILE = "local.lock"
_POLL_S = 0.05

Say = Callable[[str], None]


@contextlib.contextmanager
def locked(data_dir: Path, timeout_s: float) -> Iterator[None]:
    """Only one `up` or `down` at a time works on a directory; the next one waits. Raises LocalFailure."""
    deadline = time.monotonic() + timeout_s
    with (data_dir / LOCK_FILE).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LocalFailure(f"another `raftkv local` is at work on {data_dir}; wait for it") from None
            time.sleep(_POLL_S)
        yield


@contextlib.contextmanager
def claimed(base_port: int) -> Iterator[None]:
    """Only one `up` at a time starts processes on a block of ports, whatever its directory. Raises LocalFailure.

    A port of the block that no process has is bound meanwhile: unlike a file, the kernel frees it in any case.
    """
    port = base_port + local_state.CLAIM_PORT
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as claim:
        try:
            claim.bind((local_state.HOST, port))
        except OSError:
            raise LocalFailure(
                f"port {port} is in use: another `raftkv local up` is starting a cluster on ports {base_port} to "
                f"{base_port + local_state.PORTS - 1}, or another program has it; choose others with --base-port"
            ) from None
        yield


def load_state(data_dir: Path) -> LocalState | None:
    """The state in that directory, None if there is no cluster. Raises LocalFailure."""
    try:
        return local_state.load(data_dir)
    except (OSError, ValueError) as error:
        raise LocalFailure(str(error)) from None


def up(
    data_dir: Path,
    *,
    groups: int | None,
    replicas: int | None,
    shards: int | None,
    coordinators: int | None = None,
    metrics: bool = False,
    redis: bool = False,
    base_port: int | None,
    timeout_s: float,
    say: Say,
) -> LocalState:
    """Start the cluster, or what is dead of it; return when it serves. Raises LocalFailure, UsageError."""
    if (data_dir / "wal").exists():
        raise LocalFailure(f"{data_dir} is the data directory of one daemon; give that of a cluster, or a new one")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / LOG_DIRECTORY).mkdir(exist_ok=True)
    except OSError as error:
        raise LocalFailure(f"can't make the data directory {data_dir}: {error.strerror}") from None
    with locked(data_dir, timeout_s):
        state = load_state(data_dir)
        is_new = state is None
        if state is None:
            if coordinators is None:
                coordinators = local_state.COORDINATORS
            shape = (groups or 2, replicas or 3, shards or 10)
            state = _new_cluster(data_dir, *shape, base_port, coordinators, metrics, redis)
        else:
            _check_shape(
                data_dir,
                state,
                groups=groups,
                replicas=replicas,
                shards=shards,
                coordinators=coordinators,
                base_port=base_port,
            )
            if metrics and not state.has_metrics:
                _turn_metrics_on(data_dir, state)
            if redis and not state.has_redis:
                _turn_redis_on(data_dir, state)
        with claimed(state.base_port):
            _start_dead_and_wait(data_dir, state, is_new, timeout_s, say)
    return state


def _start_dead_and_wait(data_dir: Path, state: LocalState, is_new: bool, timeout_s: float, say: Say) -> None:
    """Start what doesn't run, and wait until all serve. Raises LocalFailure."""
    dead = [process for process in state.processes if not is_running(data_dir, process)]
    _check_ports(dead)
    local_state.save(data_dir, state)
    if dead:
        say(f"starting {len(dead)} of {count(len(state.processes), 'process')} in {data_dir}")
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for process in dead:
            with interrupts.Held():  # one that nobody has noted would go on for ever
                started[process.name] = _start(data_dir, state, process)
                process.pid = started[process.name].pid
                local_state.save(data_dir, state)
        interrupts.run(wait_until_served(data_dir, state, started, is_new, timeout_s))
    except NotOurs:
        _end_children(started)
        raise
    except KeyboardInterrupt:
        raise LocalFailure(
            f"interrupted; {count(len(started), 'process')} started by it go on: "
            f"`raftkv local down --data-dir {shlex.quote(str(data_dir))}` stops the cluster",
            ExitCode.INTERRUPTED,
        ) from None
    finally:
        for child in started.values():
            child.returncode = 0  # it goes on without us: no warning that it is still running


def _end_children(started: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Stop the processes that this very `up` started; they serve nobody."""
    for child in started.values():
        child.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for child in started.values():
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _new_cluster(
    data_dir: Path,
    groups: int,
    replicas: int,
    shards: int,
    base_port: int | None,
    coordinators: int = local_state.COORDINATORS,
    metrics: bool = False,
    redis: bool = False,
) -> LocalState:
    """The shape of a new cluster; without a given base port, on ports that are free now."""
    if groups * replicas > local_state.GROUP_PORTS:
        raise UsageError(f"local up: at most {local_state.GROUP_PORTS} replicas in all groups together")
    for base in local_state.base_ports(data_dir) if base_port is None else [base_port]:
        state = local_state.new_state(groups, replicas, shards, base, coordinators)
        if metrics:
            _add_metrics(state)
        if redis:
            local_state.add_redis(state)
        if base_port is not None:
            return state
        claim = f"{local_state.HOST}:{base + local_state.CLAIM_PORT}"
        if not any(map(port_in_use, (claim, *_addresses(state.processes)))):
            return state
    raise LocalFailure("no free block of ports was found; choose one with --base-port")


def _add_metrics(state: LocalState) -> None:
    if len(state.processes) > local_state.METRICS_PORTS:
        raise UsageError(
            f"local up: with --metrics at most {local_state.METRICS_PORTS} processes, not {len(state.processes)}"
        )
    local_state.add_metrics(state)


def _turn_metrics_on(data_dir: Path, state: LocalState) -> None:
    _check_stopped(data_dir, state, "--metrics")
    _add_metrics(state)


def _turn_redis_on(data_dir: Path, state: LocalState) -> None:
    _check_stopped(data_dir, state, "--redis")
    local_state.add_redis(state)


def _check_stopped(data_dir: Path, state: LocalState, option: str) -> None:
    """For what a cluster was made without: raise UsageError while some of it runs."""
    if any(is_running(data_dir, process) for process in state.processes):
        raise UsageError(
            f"local up: the cluster in {data_dir} runs without {option}; stop it first: "
            f"`raftkv local down --data-dir {shlex.quote(str(data_dir))}`"
        )


def _addresses(processes: Iterable[LocalProcess]) -> list[str]:
    """All that the processes listen on."""
    listened = (address for process in processes for address in (process.addr, process.metrics, process.redis))
    return [address for address in listened if address is not None]


def _check_shape(data_dir: Path, state: LocalState, **given: int | None) -> None:
    """An existing cluster keeps its shape; raise UsageError if another one was asked for."""
    for name, wanted in given.items():
        present = getattr(state, name)
        if wanted is not None and wanted != present:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"local up: the cluster in {data_dir} has {option} {present}, not {wanted}; "
                "leave the option out, or begin anew after `raftkv local down --wipe`"
            )


def port_in_use(address: str) -> bool:
    """Whether somebody listens on that port of loopback."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return True
    return False


def _check_ports(dead: list[LocalProcess]) -> None:
    """Raise LocalFailure if a port of a process that isn't running is taken by a stranger."""
    for process in dead:
        for address in _addresses([process]):
            if port_in_use(address):
                raise LocalFailure(
                    f"the port of {process.title}, {address}, is in use by another program; "
                    "stop that, or choose other ports for a new cluster with --base-port"
                )


def daemon_arguments(data_dir: Path, state: LocalState, process: LocalProcess) -> list[str]:
    """The command line of one daemon."""
    peers = [peer for peer in state.processes if (peer.role, peer.gid) == (process.role, process.gid)]
    # -P: what lies in the directory of whoever says `up` must not be imported in place of what is installed.
    arguments = [sys.executable, "-P", "-m", "raftkv", process.role]
    arguments += ["--id", str(process.id), "--listen", process.addr]
    arguments += ["--peers", ",".join(f"{peer.id}={peer.addr}" for peer in peers)]
    arguments += ["--data-dir", str(data_dir / process.name)]
    if process.role == "controller":
        arguments += ["--shards", str(state.shards)]
    else:
        arguments += ["--controllers", ",".join(state.controllers)]
    if process.gid is not None:
        arguments += ["--gid", str(process.gid)]
    if process.metrics is not None:
        arguments += ["--metrics-listen", process.metrics]
    if process.redis is not None:
        arguments += ["--redis-listen", process.redis]
    return arguments


def _start(data_dir: Path, state: LocalState, process: LocalProcess) -> subprocess.Popen[bytes]:
    """Start one daemon, detached from this terminal, its output appended to its log."""
    own = ("RAFTKV_ADVERTISE", "RAFTKV_METRICS_LISTEN", "RAFTKV_REDIS_LISTEN")  # can't be the same for several
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in own and not name.startswith("RAFTKV_TLS_")  # local clusters are plain
    }
    environment[config_file.VARIABLE] = ""  # there may be TLS too
    with log_path(data_dir, process).open("ab") as log:
        return subprocess.Popen(
            daemon_arguments(data_dir, state, process),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )


def down(data_dir: Path, *, wipe: bool, say: Say, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Stop the cluster; with `wipe`, remove its data. Does nothing if there is none. Raises LocalFailure."""
    if not data_dir.is_dir():
        say(f"there is no cluster in {data_dir}")
        return
    with locked(data_dir, 2 * max(timeout_s, STOP_TIMEOUT_S)):
        state = load_state(data_dir)
        if state is None:
            say(f"there is no cluster in {data_dir}")
        else:
            _stop(data_dir, state, timeout_s, say)
            if wipe:
                _wipe(data_dir, state)
                say(f"removed the data in {data_dir}")
    if wipe and state is not None:
        with contextlib.suppress(OSError):
            (data_dir / LOCK_FILE).unlink()
            data_dir.rmdir()  # only if nothing of anybody else is in it


def _stop(data_dir: Path, state: LocalState, timeout_s: float, say: Say) -> None:
    """SIGTERM to all, SIGKILL to what is left after the deadline."""
    running = [process for process in state.processes if is_running(data_dir, process)]
    if not running:
        say(f"nothing runs in {data_dir}")
        return
    _signal(data_dir, running, signal.SIGTERM)
    left = _wait_for_end(data_dir, running, timeout_s)
    if left:
        say(f"{', '.join(process.title for process in left)} didn't end in {timeout_s:g} s: killed")
        _signal(data_dir, left, signal.SIGKILL)
        left = _wait_for_end(data_dir, left, STOP_TIMEOUT_S)
        if left:
            raise LocalFailure(f"{left[0].title} (pid {left[0].pid}) can't be killed; look at it with ps")
    say(f"stopped {count(len(running), 'process')}")


def _signal(data_dir: Path, processes: list[LocalProcess], number: signal.Signals) -> None:
    for process in processes:
        if is_running(data_dir, process) and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _wait_for_end(data_dir: Path, processes: list[LocalProcess], timeout_s: float) -> list[LocalProcess]:
    """Those that still run after that time."""
    deadline = time.monotonic() + timeout_s
    left = processes
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        left = [process for process in left if is_running(data_dir, process)]
    return left


def _wipe(data_dir: Path, state: LocalState) -> None:
    """Remove what `up` made. Raises LocalFailure."""
    try:
        (data_dir / local_state.STATE_FILE).unlink(missing_ok=True)
        for process in state.processes:
            if (data_dir / process.name).exists():
                shutil.rmtree(data_dir / process.name)
        shutil.rmtree(data_dir / LOG_DIRECTORY, ignore_errors=True)
    except OSError as error:
        raise LocalFailure(f"can't remove the data in {data_dir}: {error}") from None


def status(data_dir: Path, timeout_s: float = STATUS_TIMEOUT_S) -> dict[str, Any]:
    """The object of `local status -o json`. Raises LocalFailure if there is no cluster."""
    state = load_state(data_dir)
    if state is None:
        raise LocalFailure(f"there is no cluster in {data_dir}; `raftkv local up` starts one")
    return {
        "data_dir": str(data_dir),
        "controllers": list(state.controllers),
        "coordinators": list(state.coordinator_addresses),
        "processes": interrupts.run(_process_states(data_dir, state, timeout_s)),
    }


async def _process_states(data_dir: Path, state: LocalState, timeout_s: float) -> list[dict[str, Any]]:
    from raftkv.cli.health import ask
    from raftkv.client.controllers import Controllers

    running = {process.addr: process.pid for process in state.processes if is_running(data_dir, process)}
    controllers = Controllers(state.controllers, timeout_s=timeout_s)
    try:
        answers = await ask(controllers, list(running), timeout_s)
    finally:
        await controllers.close()
    return [
        {
            "role": process.role,
            "gid": process.gid,
            "id": process.id,
            "addr": process.addr,
            "redis": process.redis,
            "metrics": process.metrics,
            "pid": running.get(process.addr),  # a dead one's may be a stranger's by now
            "state": _state_name(answers.get(process.addr)),
        }
        for process in state.processes
    ]


def _state_name(answer: Mapping[str, Any] | None) -> str:
    """leader, follower (candidates too) or down: dead, silent, or no member that could vote."""
    if answer is None or answer["state"] == "unformed":
        return "down"
    return "leader" if answer["state"] == "leader" else "follower"
