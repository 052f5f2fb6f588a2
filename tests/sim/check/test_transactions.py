"""List-append transactions: each anomaly by its name, random histories against the exhaustive checker, speed."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from raftkv.sim.check.graph import Edge, Graph, Label
from raftkv.sim.check.history import Operation, Status, Step
from raftkv.sim.check.transactions import check_transactions
from raftkv.sim.check.verdict import Result
from tests.sim.check.build import OPEN, txn
from tests.sim.check.generate import random_transactions
from tests.sim.check.naive import naive_serializable

GOOD: dict[str, list[Operation]] = {
    "nothing": [],
    "one after the other": [txn("x+1 y+1", 1, 2), txn("x=1 y=1 x+2", 3, 4), txn("x=12", 5, 6)],
    "its own writes": [txn("x=  x+1 x=1 x+2 x=12", 1, 2), txn("x=12", 3, 4)],
    "concurrent": [txn("x+1", 1, 9), txn("x=", 1, 9), txn("x=1", 1, 9)],
    "unknown, not seen": [txn("x+1 y+1", 1, OPEN), txn("x= y=", 3, 4)],
    "unknown, seen much later": [txn("x+1", 1, OPEN), txn("x=", 3, 4), txn("x=1", 5, 6)],
    "aborted": [txn("x+1", 1, 2, Status.FAIL), txn("x=", 3, 4)],
    "appends that nobody saw": [txn("x+1", 1, 2), txn("x+2", 1, 2), txn("y+1", 3, 4)],
    "the same element of an aborted attempt": [txn("x+1", 1, 2, Status.FAIL), txn("x+1", 3, 4), txn("x=1", 5, 6)],
}

BAD: dict[str, tuple[str, list[Operation]]] = {
    "dirty write": ("G0", [txn("x+1 y+1", 1, 9), txn("x+2 y+2", 1, 9), txn("x=12", 1, 9), txn("y=21", 1, 9)]),
    "dirty write against real time": ("G0-realtime", [txn("x+1", 1, 2), txn("x+2", 3, 4), txn("x=21", 1, 9)]),
    "aborted read": ("G1a", [txn("x+1", 1, 2, Status.FAIL), txn("x=1", 1, 9)]),
    "intermediate read": ("G1b", [txn("x+1 x+2", 1, 9), txn("x=1", 1, 9)]),
    "circular information": ("G1c", [txn("x+1 y=1", 1, 9), txn("y+1 x=1", 1, 9)]),
    "read before it was written": ("G1c-realtime", [txn("x=1", 1, 2), txn("x+1", 3, 4)]),
    "read skew": ("G-single", [txn("x+1 y+1", 1, 9), txn("x=1 y=", 1, 9)]),
    "lost update": ("G-single", [txn("x= x+1", 1, 9), txn("x= x+2", 1, 9), txn("x=12", 1, 9)]),
    "stale read": ("G-single-realtime", [txn("x+1", 1, 2), txn("x=", 3, 4)]),
    "lost append": ("G-single-realtime", [txn("x+1", 1, 2), txn("x+2", 3, 4), txn("x=1", 5, 6)]),
    "write skew": ("G2", [txn("x= y+1", 1, 9), txn("y= x+1", 1, 9)]),
    "long fork": ("G2", [txn("x+1", 1, 9), txn("y+1", 1, 9), txn("x=1 y=", 1, 9), txn("x= y=1", 1, 9)]),
    "order against real time": ("G2-realtime", [txn("y+1", 1, 2), txn("x=", 3, 4), txn("x+1 y=", 1, 9)]),
    "disagrees with itself": ("internal", [txn("x+1", 1, 2), txn("x= x=1", 1, 9)]),
    "doesn't see its own append": ("internal", [txn("x+1 x=", 1, 9)]),
    "own appends in another order": ("internal", [txn("x+1 x+2", 1, 2), txn("x=21", 3, 4)]),
    "first own append lost": ("internal", [txn("x+1 x+2", 1, 2), txn("x=2", 3, 4)]),
    "nobody appended": ("phantom", [txn("x=7", 1, 2)]),
    "twice": ("duplicate-elements", [txn("x+1", 1, 2), txn("x=11", 3, 4)]),
    "two orders": ("incompatible-order", [txn("x+1", 1, 9), txn("x+2", 1, 9), txn("x=12", 1, 9), txn("x=21", 1, 9)]),
    "half of an unknown one": ("G-single", [txn("x+1 y+1", 1, OPEN), txn("x=1 y=", 2, 3)]),
    "unknown, seen before its call": ("G1c-realtime", [txn("x=1", 1, 2), txn("x+1", 3, OPEN)]),
}


@pytest.mark.parametrize("name", GOOD)
def test_good(name: str) -> None:
    assert naive_serializable(GOOD[name]), "the example itself"
    verdict = check_transactions(GOOD[name])
    assert verdict.result is Result.PASSED, str(verdict)


@pytest.mark.parametrize("name", BAD)
def test_bad(name: str) -> None:
    anomaly, operations = BAD[name]
    assert not naive_serializable(operations), "the example itself"
    verdict = check_transactions(operations)
    assert verdict.result is Result.VIOLATED
    assert verdict.anomalies[0].name == anomaly, str(verdict)
    assert verdict.anomalies[0].operations


def test_a_cycle_is_explained_step_by_step() -> None:
    verdict = check_transactions(BAD["stale read"][1])
    assert verdict.anomalies[0].detail.splitlines() == [
        '  T1 = {append "x" 1} by t1 at 0.000–0.000 ms, ok',
        '  T2 = {read "x" []} by t3 at 0.000–0.000 ms, ok',
        "  T1 < T2: it had returned 0.000 ms before the other was called (rt)",
        '  T2 < T1: it read "x" up to nothing, without the other\'s 1 (rw): a contradiction',
    ]


def test_an_element_appended_twice_can_not_be_judged() -> None:
    verdict = check_transactions([txn("x+1", 1, 2), txn("x+1", 3, 4), txn("x=1", 5, 6)])
    assert verdict.result is Result.UNDECIDED
    assert verdict.reason == 'the element 1 of key "x" was appended twice: orders can\'t be told'


COMMON_ANOMALIES = {"G0", "G1a", "G1b", "G1c", "G-single", "G2", "G-single-realtime", "internal"}


def agree(seeds: range) -> tuple[Counter[bool], Counter[str]]:
    """Compare with the exhaustive checker on one random history a seed."""
    counts: Counter[bool] = Counter()
    names: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        count, keys, clients = rng.randrange(3, 7), rng.randrange(1, 4), rng.randrange(2, 5)
        operations = random_transactions(rng, count=count, keys=keys, clients=clients, lies=0.7)
        expected = naive_serializable(operations)
        verdict = check_transactions(operations)
        assert verdict.passed is expected and not verdict.reason, f"seed {seed}: {verdict}"
        counts[expected] += 1
        names.update({anomaly.name for anomaly in verdict.anomalies})
    return counts, names


def test_it_agrees_with_the_exhaustive_checker() -> None:
    counts, names = agree(range(4000))
    assert counts[False] >= 400 and counts[True] >= 1500, counts
    assert names.keys() >= COMMON_ANOMALIES, names


@pytest.mark.long
@pytest.mark.parametrize("first", range(10_000, 90_000, 20_000))
def test_it_agrees_with_the_exhaustive_checker_on_many(first: int) -> None:
    counts, names = agree(range(first, first + 20_000))
    assert counts[False] >= 2_000, counts
    assert names.keys() >= COMMON_ANOMALIES, names


def large(count: int, lies: float, seed: int = 1) -> list[Operation]:
    return random_transactions(random.Random(seed), count=count, keys=8, clients=10, lies=lies)


def test_many_transactions() -> None:
    operations: list[Operation] = []
    for part in range(40):  # fresh keys from time to time, or the lists themselves are most of the work
        start_ns = part * 10**6
        for operation in large(500, 0, part):
            steps = [Step(b"%d:%s" % (part, step.key), step.element, step.elements) for step in operation.steps]
            end_ns = None if operation.return_ns is None else start_ns + operation.return_ns
            operations.append(
                Operation.txn(operation.client, steps, start_ns + operation.call_ns, end_ns, operation.status)
            )
    assert len(operations) == 20_000
    started = time.process_time()
    assert check_transactions(operations).passed
    assert time.process_time() - started < 10.0


def test_one_cycle_among_many() -> None:
    operations = large(1000, 0)
    last_ns = max(operation.return_ns or operation.call_ns for operation in operations)
    skew = [txn("a= b+1", last_ns + 1, last_ns + 9), txn("b= a+1", last_ns + 1, last_ns + 9)]
    verdict = check_transactions([*operations, *skew])
    assert [anomaly.name for anomaly in verdict.anomalies] == ["G2"]
    assert set(verdict.anomalies[0].operations) == set(skew)


def test_components_and_cycles_of_a_graph() -> None:
    graph = Graph(6)
    for source, target in [(0, 1), (1, 2), (2, 0), (3, 3), (3, 4)]:
        graph.add(source, target, Label.WW)
    graph.add(2, 3, Label.WR)
    graph.add(4, 1, Label.RW)
    assert graph.components(Label.WW) == [graph.components(Label.WW)[0]] * 3 + [-1] * 3
    assert len(set(graph.components(Label.WW | Label.WR | Label.RW)[:5])) == 1
    assert graph.cycle_through(graph.edges(Label.WW), Label.WW, Label.WW) == [
        Edge(0, 1, Label.WW),
        Edge(1, 2, Label.WW),
        Edge(2, 0, Label.WW),
    ]
    assert graph.cycle_through(graph.edges(Label.RW), Label.RW, Label.WW) is None
    assert graph.cycle_through(graph.edges(Label.RW), Label.RW, Label.WW | Label.WR) == [
        Edge(4, 1, Label.RW),
        Edge(1, 2, Label.WW),
        Edge(2, 3, Label.WR),
        Edge(3, 4, Label.WW),
    ]
