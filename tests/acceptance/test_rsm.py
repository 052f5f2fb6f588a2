"""The replicated-state-machine scenarios of the course (2025), on simulated daemons.

The counter is a key to which each Inc appends a `+` and each Dec a `-`: the reply's version says how many were done
before it, and every replica's own copy says what it has applied. Where the scenario submits to one server only,
requests go there without the SDK, one attempt each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from raftkv.machines.kv import APPEND
from raftkv.protocol.errors import NotLeader, OutcomeUnknown, RaftKVError
from tests.acceptance.kv_rig import Rig, seeds
from tests.acceptance.rigs import BaseClerk, BaseRig, Raw, Task

COUNTER = b"counter"
SUBMIT_TIMEOUT_S = 10.0

Record = Callable[[str, object], None]
P = TypeVar("P")


def inc(clerk: BaseClerk) -> int:
    return clerk.do(clerk.append(COUNTER, b"+"))


def inc_many(rig: BaseRig[P], count: int) -> list[int]:
    """So many at once, by ten clerks; their replies."""
    clerks = rig.clerks_of(10)
    tasks = [clerks[number % 10].spawn(clerks[number % 10].append(COUNTER, b"+")) for number in range(count)]
    rig.finish_all(tasks, SUBMIT_TIMEOUT_S)
    return [task.result for task in tasks]


def check_counter(rig: BaseRig[P], count: int, *, up: int | None = None) -> None:
    """On every server that can be reached, or on all."""
    values = [rig.local_get(process, COUNTER) for process in rig.reachable()]
    right = [value for value in values if value == (b"+" * count, count)]
    assert len(right) >= (len(rig.servers) if up is None else up), f"seed {rig.seed}: {values}"


def basic(rig: BaseRig[P]) -> None:
    clerk = rig.clerk()
    assert [inc(clerk) for _ in range(10)] == list(range(1, 11))
    rig.wait_equal(1.0)
    check_counter(rig, 10)


@seeds(2, 10)
def test_basic_4a(seed: int) -> None:
    with Rig(3, seed) as rig:
        basic(rig)


def concurrent(rig: BaseRig[P]) -> None:
    assert sorted(inc_many(rig, 50)) == list(range(1, 51))
    rig.wait_equal(1.0)
    check_counter(rig, 50)


@seeds(2, 10)
def test_concurrent_4a(seed: int) -> None:
    with Rig(3, seed) as rig:
        concurrent(rig)


def leader_failure(rig: BaseRig[P]) -> None:
    clerk = rig.clerk()
    assert inc(clerk) == 1
    rig.wait_equal(1.0)
    leader = rig.leader()
    rig.isolate(leader)
    assert inc(clerk) == 2
    rig.sleep(0.2)  # the follower hears of the commit by a heartbeat
    check_counter(rig, 2, up=2)
    rig.heal()
    assert inc(clerk) == 3
    rig.wait_equal(5.0)
    check_counter(rig, 3)


@seeds(3, 10)
def test_leader_failure_4a(seed: int) -> None:
    with Rig(3, seed) as rig:
        leader_failure(rig)


def leader_partition(rig: BaseRig[P], record: Record) -> None:
    """None of the 100 may return OK; all must have returned a second after the heal, at the latest."""
    clerk, other = rig.clerks_of(2)
    assert inc(clerk) == 1
    leader = rig.leader()
    raws = [Raw(other, leader) for _ in range(100)]
    for raw in raws[:4]:
        other.do(raw.open())
    for number, raw in enumerate(raws):
        raw.channel = raws[number % 4].channel
    rest = rig.hosts_of(process for process in rig.servers if process is not leader)
    rig.cut([rig.host_of(leader), other.host], [*rest, clerk.host])
    decs = [other.spawn(raw.write(raw.command(APPEND, COUNTER, b"-"))) for raw in raws]
    assert inc(clerk) == 2
    rig.sleep(1.0)
    returned = sum(task.done for task in decs)
    rig.heal()
    rig.finish_all(decs, 1.0)
    for task in decs:
        assert isinstance(task.error, OutcomeUnknown | NotLeader), f"seed {rig.seed}: {task.error!r}"
    record("returned during the partition", returned)
    record("all returned after", max((task.ended_s or 0) - task.started_s for task in decs))
    assert inc(clerk) == 3
    rig.wait_equal(5.0)
    check_counter(rig, 3)


@seeds(3, 20)
def test_leader_partition_4a(seed: int, record_property: Record) -> None:
    with Rig(3, seed) as rig:
        leader_partition(rig, record_property)


def restart_replay(rig: BaseRig[P], record: Record) -> None:
    clerk = rig.clerk()
    for number in range(100):
        assert inc(clerk) == number + 1
    rig.restart(rig.servers)
    started_s = rig.now
    assert inc(clerk) == 101
    record("first reply after", rig.now - started_s)
    record("agreed after", rig.wait_equal(1.0))
    check_counter(rig, 101)


@seeds(2, 10)
def test_restart_replay_4a(seed: int, record_property: Record) -> None:
    with Rig(3, seed) as rig:
        restart_replay(rig, record_property)


def submit_slowly(rig: BaseRig[P], clerk: BaseClerk, count: int) -> list[Task[int]]:
    """So many, which have to wait: 20 ms later none has been answered."""
    rig.hold_writes()
    tasks = [clerk.spawn(clerk.append(COUNTER, b"+")) for _ in range(count)]
    rig.sleep(0.02)
    assert not any(task.done for task in tasks)
    rig.release_writes()
    return tasks


def shutdown(rig: BaseRig[P], end: str, record: Record) -> None:
    """All servers end for good, in any way: every Submit returns, and none pretends that it was not sent."""
    clerk = rig.clerk(SUBMIT_TIMEOUT_S)
    inc(clerk)
    tasks = submit_slowly(rig, clerk, 100)
    started_s = rig.now
    for process in rig.servers:
        rig.end(process, end)
    rig.finish_all(tasks, 11.0)
    errors = [task.error for task in tasks if task.error is not None]
    assert errors if end != "stop" else True
    assert all(isinstance(error, RaftKVError) for error in errors)
    record("all returned after", max(task.ended_s or 0 for task in tasks) - started_s)
    record("answered", 100 - len(errors))


@pytest.mark.parametrize("end", ["stop", "kill", "lose_power"])
@seeds(1, 8)
def test_shutdown_4a(seed: int, end: str, record_property: Record) -> None:
    with Rig(3, seed) as rig:
        shutdown(rig, end, record_property)


def restart_submit(rig: BaseRig[P]) -> None:
    """Who waited before a restart is never given the answer to another's command."""
    clerk = rig.clerk()
    assert sorted(inc_many(rig, 100)) == list(range(1, 101))
    rig.restart(rig.servers)
    assert inc(clerk) == 101
    tasks = submit_slowly(rig, clerk, 100)
    rig.restart(rig.servers)
    rig.finish_all(tasks, 20.0)
    versions = [task.result for task in tasks]  # the SDK goes on until they are done, once each
    assert sorted(versions) == list(range(102, 202))
    assert inc(clerk) == 202
    rig.wait_equal(1.0)
    check_counter(rig, 202)


@seeds(3, 20)
def test_restart_submit_4a(seed: int) -> None:
    with Rig(3, seed) as rig:
        restart_submit(rig)


def waiters_of_a_lost_leader(rig: BaseRig[P]) -> None:
    """The same without retries: an answer that comes is the right one, whatever took the place of the command."""
    clerk, other = rig.clerks_of(2)
    assert inc(clerk) == 1
    leader = rig.leader()
    raw = Raw(other, leader, timeout_s=SUBMIT_TIMEOUT_S)
    other.do(raw.open())
    rest = rig.hosts_of(process for process in rig.servers if process is not leader)
    rig.cut([rig.host_of(leader)], rest)
    doubtful: list[Task[Any]] = [
        other.spawn(raw.write(raw.command(APPEND, b"other", b"%d," % seq, seq=seq))) for seq in range(1, 11)
    ]
    rig.wait_until(lambda: rig.leader_now() not in (None, leader), "new leader", 10)
    versions = [inc(clerk) for _ in range(20)]  # at the indices of the others' entries
    rig.heal()
    rig.finish_all(doubtful, SUBMIT_TIMEOUT_S)
    assert versions == list(range(2, 22))
    assert all(isinstance(task.error, RaftKVError) for task in doubtful), "answered, but it was replaced"
    assert clerk.do(clerk.get(b"other")) is None


@seeds(3, 20)
def test_waiters_of_a_lost_leader_4a(seed: int) -> None:
    with Rig(3, seed) as rig:
        waiters_of_a_lost_leader(rig)


def snapshot(rig: BaseRig[P], record: Record) -> None:
    clerk = rig.clerk()
    for number in range(100):
        assert inc(clerk) == number + 1
    rig.wait_equal(1.0)
    largest = rig.raft_state_max()
    record("raft state", largest)
    assert largest <= 2 * 1000
    assert all(rig.snapshots_made(process) for process in rig.servers)
    rig.restart(rig.servers)
    assert inc(clerk) == 101
    rig.wait_equal(1.0)
    check_counter(rig, 101)


@seeds(2, 10)
def test_snapshot_4c(seed: int, record_property: Record) -> None:
    with Rig(3, seed, max_raft_state=1000) as rig:
        snapshot(rig, record_property)
