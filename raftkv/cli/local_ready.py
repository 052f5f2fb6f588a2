"""When a cluster of `raftkv local` serves: every process is alive and is the one that answers, every shard reads.

Believes no address: whoever answers must be the very process that the state file names. Starts and stops nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftkv.cli.exit_codes import ExitCode, LocalFailure
from raftkv.cli.local_state import LocalProcess, LocalState

if TYPE_CHECKING:
    from raftkv.cli.session import ControllersClient

STATUS_TIMEOUT_S = 2.0
LOG_DIRECTORY = "logs"
_POLL_S = 0.05

Children = Mapping[str, subprocess.Popen[bytes]]


class NotOurs(LocalFailure):
    """The cluster can't come to be, or somebody else has its ports: what was started for it is of no use."""


def log_path(data_dir: Path, process: LocalProcess) -> Path:
    """Where the daemon's output goes."""
    return data_dir / LOG_DIRECTORY / f"{process.name}.log"


async def wait_until_served(
    data_dir: Path, state: LocalState, started: Children, is_new: bool, timeout_s: float
) -> None:
    """Wait for every process, join the groups of a new cluster, wait for every shard. Raises LocalFailure.

    A replica that can't start (its disk was lost, say) doesn't keep the others from serving: it is
    complained of at the end. But a new group is formed by all of its replicas.
    """
    from raftkv.client.controllers import Controllers
    from raftkv.protocol.errors import RaftKVError

    deadline = time.monotonic() + timeout_s
    failures: dict[str, LocalFailure] = {}
    async with Controllers(state.controllers, timeout_s=STATUS_TIMEOUT_S) as controllers:
        for process in state.processes:
            try:
                await _wait_for_process(data_dir, state, process, started, controllers, deadline)
            except NotOurs:
                raise
            except LocalFailure as failure:
                failures[process.name] = failure
                group = [peer for peer in state.processes if (peer.role, peer.gid) == (process.role, process.gid)]
                if is_new and failure.exit_code is ExitCode.REFUSED:
                    raise NotOurs(str(failure)) from None
                if is_new or 2 * sum(peer.name in failures for peer in group) >= len(group):
                    raise
        try:
            await _join_and_read(state, max(2.0, deadline - time.monotonic()))
            await _wait_for_coordinators(state, controllers, deadline)
        except RaftKVError as error:
            failures |= _ended(data_dir, state, started)
            why = "; ".join([*map(str, failures.values()), str(error)])
            raise LocalFailure(
                f"the cluster doesn't serve after {timeout_s:g} s: {why}; logs: {data_dir / LOG_DIRECTORY}",
                ExitCode.UNAVAILABLE,
            ) from None
        failures |= await _look_again(data_dir, state, started, controllers)
    if failures:
        raise LocalFailure(f"the cluster serves, but {'; '.join(map(str, failures.values()))}")


async def _look_again(
    data_dir: Path, state: LocalState, started: Children, controllers: ControllersClient
) -> dict[str, LocalFailure]:
    """What ended, or was answered for by somebody else, since it was last looked at. Raises NotOurs."""
    from raftkv.cli.health import ask

    answers = await ask(controllers, [process.addr for process in state.processes], STATUS_TIMEOUT_S)
    for process in state.processes:
        _check_identity(process, answers[process.addr])
    return _ended(data_dir, state, started)


def _ended(data_dir: Path, state: LocalState, started: Children) -> dict[str, LocalFailure]:
    """What was started and is dead by now."""
    return {
        process.name: _failure(data_dir, process, "ended after its start", ExitCode.REFUSED)
        for process in state.processes
        if process.name in started and started[process.name].poll() is not None
    }


async def _join_and_read(state: LocalState, timeout_s: float) -> None:
    """Join the groups if no configuration was ever made, then read in every shard: that is what serving means.

    Later the map is its owner's: a group that has left isn't joined again, and shards without an owner aren't read.
    """
    from raftkv.client.controllers import Controllers
    from raftkv.client.kv import RaftKV
    from raftkv.machines.shard_map import NO_GROUP
    from raftkv.machines.slots import shard_of
    from raftkv.protocol.errors import GroupExists

    async with Controllers(state.controllers, timeout_s=timeout_s) as controllers:
        shard_map = await controllers.query()
        if shard_map.num == 0:
            with contextlib.suppress(GroupExists):  # an earlier attempt of this very Join
                await controllers.join({gid: state.addresses_of(gid) for gid in range(1, state.groups + 1)})
            shard_map = await controllers.query()
    waiting = {shard for shard, gid in enumerate(shard_map.owners) if gid != NO_GROUP}
    number = 0
    async with RaftKV(state.controllers, timeout_s=timeout_s) as client:
        while waiting:
            key = b"raftkv-local-%d" % number
            number += 1
            if (shard := shard_of(key, shard_map.shards)) in waiting:
                await client.get(key)
                waiting.remove(shard)


async def _wait_for_coordinators(state: LocalState, controllers: ControllersClient, deadline: float) -> None:
    """Until the controllers name them to everybody, and one of them leads. Raises Unavailable."""
    from raftkv.cli.health import ask, coordinators_of
    from raftkv.protocol.errors import Unavailable

    wanted = state.coordinator_addresses
    while wanted:
        answers = await ask(controllers, [*state.controllers, *wanted], STATUS_TIMEOUT_S)
        if wanted in coordinators_of({address: answers[address] for address in state.controllers}).values():
            found = [answers[address] for address in wanted]
            if any(answer is not None and answer["state"] == "leader" for answer in found):
                return
        if time.monotonic() > deadline:
            raise Unavailable("the coordinators haven't made themselves known to the controllers, or have no leader")
        await asyncio.sleep(_POLL_S)


async def _wait_for_process(
    data_dir: Path,
    state: LocalState,
    process: LocalProcess,
    started: Children,
    controllers: ControllersClient,
    deadline: float,
) -> None:
    """Until it is a member of its group; LocalFailure with the end of its log if it died or time is up.

    One that only answers may still learn from the others that it can't be taken back, and end. One that waits for the
    others of a new group waits in vain when one of them has died.
    """
    from raftkv.cli.health import ask

    child = started.get(process.name)
    others = [
        peer for peer in state.processes if (peer.role, peer.gid) == (process.role, process.gid) and peer is not process
    ]
    while True:
        answer = (await ask(controllers, [process.addr], STATUS_TIMEOUT_S))[process.addr]
        if child is not None and child.poll() is not None:
            raise _failure(data_dir, process, "ended at its start", ExitCode.REFUSED)
        _check_identity(process, answer)
        if answer is not None and answer["state"] != "unformed":
            return
        for other in others if answer is not None else ():
            if other.name in started and started[other.name].poll() is not None:
                raise _failure(data_dir, other, "ended at its start", ExitCode.REFUSED)
        if time.monotonic() > deadline:
            what = "doesn't answer" if answer is None else "waits for the other replicas"
            raise _failure(data_dir, process, what, ExitCode.UNAVAILABLE)
        await asyncio.sleep(_POLL_S)


def _check_identity(process: LocalProcess, answer: Mapping[str, Any] | None) -> None:
    """Raise NotOurs if it was another process that answered at this one's address."""
    if answer is not None and answer["pid"] != process.pid:
        raise NotOurs(
            f"at the address of {process.title}, {process.addr}, process {answer['pid']} of another cluster answers; "
            "choose other ports for a new cluster with --base-port"
        )


def _failure(data_dir: Path, process: LocalProcess, what: str, exit_code: ExitCode) -> LocalFailure:
    log = log_path(data_dir, process)
    return LocalFailure(f"{process.title} ({process.addr}) {what}: {last_line(log)} (log: {log})", exit_code)


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "its log is empty"
