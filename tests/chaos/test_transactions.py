"""What transactions may never do is found and said, and so are the figures of a run.

The SDK and the machines are the real ones, in this process; whatever goes wrong is written by a client of which the
history knows nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raftkv.client.kv import RaftKV
from raftkv.sim.check.history import Status
from raftkv.sim.scenario import TxnPlan
from raftkv.sim.txn_workload import TxnRecorder, TxnUser, elements_of
from raftkv.sim.workload import read_all_transactions
from tests.chaos.checks import wait_unlocked
from tests.chaos.cluster import ChaosCluster
from tests.chaos.run import Report, transaction_lines, verdict_lines
from tests.chaos.workload import Recorder
from tests.client.txn_fakes import TxnCluster, with_txn_cluster

PLAN = TxnPlan(users=1, lists=3, elements=8, locked=0.0, abandoned=0.0)
STEPS = 80

Damage = Callable[[RaftKV, TxnRecorder], Awaitable[None]]


async def none(kv: RaftKV, transactions: TxnRecorder) -> None:
    """Nothing is wrong."""


async def lost_append(kv: RaftKV, transactions: TxnRecorder) -> None:
    key, elements = await longest(kv, transactions)
    await kv.put(key, b"".join(elements[:-1]))


async def lost_append_in_a_full_list(kv: RaftKV, transactions: TxnRecorder) -> None:
    key = transactions.full[0]
    found = await kv.get(key)
    assert found is not None
    await kv.put(key, b"".join(elements_of(found.value)[:-1]))


async def doubled_append(kv: RaftKV, transactions: TxnRecorder) -> None:
    key, elements = await longest(kv, transactions)
    await kv.append(key, elements[-1])


async def lost_money(kv: RaftKV, transactions: TxnRecorder) -> None:
    found = await kv.get(b"b0")
    assert found is not None
    await kv.put(b"b0", b"%d" % (int(found.value) - 1))


async def short_cut(kv: RaftKV, transactions: TxnRecorder) -> None:
    await kv.put(b"r0", b"0")


async def longest(kv: RaftKV, transactions: TxnRecorder) -> tuple[bytes, list[bytes]]:
    found = {key: await kv.get(key) for key in transactions.lists}
    lists = {key: elements_of(value.value) for key, value in found.items() if value is not None}
    return max(lists.items(), key=lambda item: len(item[1]))


def problems_after(damage: Damage) -> tuple[Report, TxnRecorder]:
    """Transactions, the damage, what a run does at its end."""
    report = Report(seed=1)
    recorder = Recorder()
    transactions = TxnRecorder(recorder, PLAN, report.problems.append)

    async def test(cluster: TxnCluster) -> None:
        async with RaftKV(cluster.addresses, rng=random.Random(1)) as kv:
            user = TxnUser("c0t0", kv, transactions, random.Random(1))
            for _ in range(STEPS):
                await user.act()
            await damage(kv, transactions)
            assert await read_all_transactions(kv, transactions, "final") == []

    with_txn_cluster(test)
    report.lines += verdict_lines(recorder, report, lambda _: None)
    report.lines += transaction_lines(recorder, transactions)
    return report, transactions


def test_a_run_without_damage_is_clean_and_counted() -> None:
    report, transactions = problems_after(none)
    assert report.problems == []
    assert transactions.full
    assert {kind for kind, _ in transactions.outcomes} == {*PLAN.mix, "bank", "ring"} - {"audit"}
    committed = sum(transactions.outcomes.values())
    assert committed > STEPS
    assert {status for _, status in transactions.outcomes} == {Status.OK}
    figures = next(line for line in report.lines if line.startswith("transactions (committed / aborted / unknown)"))
    assert f": {committed} / 0 / 0; bank " in figures
    lists = transactions.outcomes["lists", Status.OK]
    assert f" lists {lists} / 0 / 0," in figures


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lost_append, "strict serializability violated"),
        (lost_append_in_a_full_list, "strict serializability violated"),
        (doubled_append, "strict serializability violated"),
        (lost_money, "BankKeepsItsMoney: 599 of 600"),
        (short_cut, "RingStaysARing"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_damage_is_reported(damage: Damage, named: str) -> None:
    report, _ = problems_after(damage)
    assert len(report.problems) == 1
    assert named in report.problems[0]
    assert "FAILED, 1 problems" in str(report)


class Reporting:
    """A daemon that says this of itself."""

    def __init__(self, name: str, report: dict[str, Any] | None) -> None:
        self.name = name
        self.report = report

    async def status_now(self, timeout_s: float) -> dict[str, Any] | None:
        return self.report


@pytest.mark.parametrize(
    ("group", "coordinator", "problem"),
    [
        ({"prepared": 0, "explicit_locks": 0}, {"open": 0}, ""),
        ({"prepared": 1, "explicit_locks": 0}, {"open": 0}, "group1-0 has {'prepared': 1}"),
        ({"prepared": 0, "explicit_locks": 2}, {"open": 0}, "group1-0 has {'explicit_locks': 2}"),
        ({"prepared": 0, "explicit_locks": 0}, {"open": 3}, "coordinator-0 has {'open': 3}"),
        ({"prepared": 0, "explicit_locks": 0}, None, "no status of coordinator-0"),
    ],
)
def test_locks_that_stay_are_reported(group: dict[str, Any], coordinator: dict[str, Any] | None, problem: str) -> None:
    cluster = SimpleNamespace(
        data_daemons=[Reporting("group1-0", group)], coordinators=[Reporting("coordinator-0", coordinator)]
    )
    problems, _ = asyncio.run(wait_unlocked(cast(ChaosCluster, cluster), 0.0))
    assert problems == ([f"transactions are left after 0 s: {problem}"] if problem else [])
