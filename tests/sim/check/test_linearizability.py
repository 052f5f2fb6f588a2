"""Linearizability: hand-made histories, random ones against the exhaustive checker, unknown outcomes, speed."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from raftkv.sim.check.history import Kind, Operation
from raftkv.sim.check.linearizability import check_linearizability
from raftkv.sim.check.one_key import Mode, by_key, check_key
from raftkv.sim.check.verdict import Deadline, Result
from tests.sim.check import generate
from tests.sim.check.build import OPEN, append, cas, cas_refused, delete, failed, get, put, put_refused
from tests.sim.check.generate import Shape, random_history
from tests.sim.check.naive import naive_linearizable

GOOD: dict[str, list[Operation]] = {
    "nothing": [],
    "absent at first": [get(None, 1, 2), delete(False, 3, 4), cas_refused(b"x", 5, 6, 0)],
    "put then get": [put(b"a", 1, 2), get(b"a", 3, 4)],
    "append to nothing": [append(b"a", 1, 2), append(b"b", 3, 4), get(b"ab", 5, 6)],
    "concurrent put not seen yet": [put(b"a", 1, 2), put(b"b", 3, 8), get(b"a", 4, 5), get(b"b", 6, 7)],
    "concurrent puts in the other order": [put(b"a", 1, 5), put(b"b", 2, 4), get(b"a", 6, 7)],
    "equal times are concurrent": [put(b"a", 1, 5), get(None, 5, 6)],
    "cas": [put(b"a", 1, 2), cas(b"a", b"b", 3, 4), get(b"b", 5, 6), cas_refused(b"a", 7, 8, found=b"b")],
    "delete and again": [put(b"a", 1, 2), delete(True, 3, 4), get(None, 5, 6), put(b"a", 7, 8), get(b"a", 9, 10)],
    "versions rise with gaps": [put(b"a", 1, 2, 3), append(b"b", 3, 4, 9), get(b"ab", 5, 6, 9)],
    "conditional puts": [
        put(b"a", 1, 2, 3, 0),
        put(b"b", 3, 4, 5, 3),
        put_refused(3, 5, 6, 5),
        put_refused(7, 7, 8, 5),
    ],
    "create only, refused": [put(b"a", 1, 2, 3), put_refused(0, 3, 4, 3)],
    "a failed write says nothing": [failed(b"a", 1, 2), get(None, 3, 4)],
    "the same value twice": [put(b"a", 1, 2), put(b"a", 3, 4), get(b"a", 5, 6), get(b"a", 7, 8)],
    "the shorter of two equal writes first": [put(b"a", 1, 9), put(b"b", 2, 3), delete(True, 4, 5), delete(True, 6, 7)],
    "cas of what nobody saw": [
        append(b"a;", 1, 2),
        append(b"b;", 3, 4),
        cas_refused(b"b;a;", 5, 6),
        get(b"a;b;", 7, 8),
    ],
    "values that nobody saw differ": [
        *[put(b"a;", 1, 9), put(b"b;", 1, 9), append(b"c;", 10, 11), cas_refused(b"b;c;", 12, 13)],
    ],
    "two versions of one value": [put(b"a", 1, 9, 2), put(b"a", 1, 9, 4), get(b"a", 1, 9, 4), get(b"a", 1, 9, 2)],
}

BAD: dict[str, list[Operation]] = {
    "stale read": [put(b"a", 1, 2), put(b"b", 3, 4), get(b"a", 5, 6)],
    "lost write": [put(b"a", 1, 2), get(None, 3, 4)],
    "phantom": [get(b"a", 1, 2)],
    "read from the future": [get(b"a", 1, 2), put(b"a", 3, 4)],
    "read goes back": [put(b"a", 1, 2), put(b"b", 3, 9), get(b"b", 4, 5), get(b"a", 6, 7)],
    "append twice": [append(b"a", 1, 2), get(b"aa", 3, 4)],
    "append lost": [append(b"a", 1, 2), append(b"b", 3, 4), get(b"b", 5, 6)],
    "appends in two orders": [append(b"a", 1, 9), append(b"b", 1, 9), get(b"ab", 1, 9), get(b"ba", 1, 9)],
    "failed write seen": [failed(b"a", 1, 2), get(b"a", 3, 4)],
    "cas of a value that is not there": [put(b"a", 1, 2), cas(b"b", b"c", 3, 4)],
    "cas refused though it matches": [put(b"a", 1, 2), cas_refused(b"a", 3, 4)],
    "cas refused with another value": [put(b"a", 1, 2), cas_refused(b"b", 3, 4, found=b"c")],
    "two cas from one value": [put(b"a", 1, 2), cas(b"a", b"b", 3, 9), cas(b"a", b"c", 3, 9)],
    "two deletes of one value": [put(b"a", 1, 2), delete(True, 3, 9), delete(True, 3, 9)],
    "delete of a value finds nothing": [put(b"a", 1, 2), delete(False, 3, 4)],
    "version falls": [put(b"a", 1, 2, 5), put(b"b", 3, 4, 4)],
    "version stays": [put(b"a", 1, 2, 5), put(b"b", 3, 4, 5)],
    "read shows another version": [put(b"a", 1, 2, 5), get(b"a", 3, 4, 6)],
    "no room for a version": [put(b"a", 1, 2, 5), put(b"b", 3, 4), put(b"c", 5, 6, 6)],
    "conditional put of another version": [put(b"a", 1, 2, 5), put(b"b", 3, 4, 7, 4)],
    "create only, but it is there": [put(b"a", 1, 2, 5), put(b"b", 3, 4, 7, 0)],
    "conditional put refused with its own version": [put(b"a", 1, 2, 5), put_refused(5, 3, 4, 5)],
    "cas refused though what nobody saw matches": [
        append(b"a;", 1, 2),
        append(b"b;", 3, 4),
        cas_refused(b"a;b;", 5, 6),
    ],
    "two versions of one write": [put(b"a", 1, 9), get(b"a", 1, 9, 2), get(b"a", 1, 9, 3)],
}

UNKNOWN_GOOD: dict[str, list[Operation]] = {
    "never": [put(b"a", 1, OPEN), get(None, 2, 3), get(None, 90, 91)],
    "at once": [put(b"a", 1, OPEN), get(b"a", 2, 3)],
    "much later": [put(b"a", 1, OPEN), put(b"b", 2, 3), get(b"b", 4, 5), get(b"a", 90, 91)],
    "later than another unknown one": [put(b"a", 1, OPEN), append(b"b", 2, OPEN), get(b"a", 5, 6), get(b"ab", 7, 8)],
    "cas": [put(b"a", 1, 2), cas(b"a", b"b", 3, OPEN), get(b"a", 4, 5), get(b"b", 6, 7)],
    "a chain of cas": [put(b"a", 1, OPEN), cas(b"a", b"b", 1, OPEN), cas(b"b", b"c", 1, OPEN), get(b"c", 2, 3)],
    "delete": [put(b"a", 1, 2), delete(None, 3, OPEN), get(b"a", 4, 5), get(None, 6, 7)],
    "explains a second delete": [put(b"a", 1, 2), put(b"b", 1, OPEN), delete(True, 3, 4), delete(True, 5, 6)],
    "explains a version": [put(b"a", 1, 2, 3), put(b"b", 1, OPEN), put_refused(9, 3, 4, 4)],
    "explains a hidden mismatch": [put(b"a", 1, 2), put(b"b", 1, OPEN), cas_refused(b"a", 3, 4)],
    "cas of what nobody saw": [
        *[append(b"a;", 1, 2), append(b"b;", 1, 2), cas(b"b;a;", b"c;", 3, OPEN)],
        *[delete(True, 4, 5), put(b"d;", 6, 7), cas_refused(b"a;b;", 8, 9), get(b"d;", 9, 9)],
    ],
    "conditional": [put(b"a", 1, 2, 3), put(b"b", 3, OPEN, None, 3), get(b"b", 4, 5, 8)],
    "two reads bind its version": [put(b"a", 1, OPEN), get(b"a", 2, 3, 8), get(b"a", 4, 5, 8)],
}

UNKNOWN_BAD: dict[str, list[Operation]] = {
    "seen before its call": [get(b"a", 1, 2), put(b"a", 3, OPEN)],
    "applied twice": [put(b"a", 1, OPEN), get(b"a", 2, 3), put(b"b", 4, 5), get(b"b", 6, 7), get(b"a", 8, 9)],
    "undone": [append(b"b", 1, OPEN), get(b"b", 2, 3), get(None, 4, 5)],
    "one delete for two": [put(b"a", 1, 2), delete(None, 3, OPEN), delete(True, 3, 4), delete(True, 5, 6)],
    "cas that could not match": [put(b"a", 1, 2), cas(b"x", b"b", 3, OPEN), get(b"b", 4, 5)],
    "condition that did not hold": [put(b"a", 1, 2, 3), put(b"b", 3, OPEN, None, 2), get(b"b", 4, 5)],
    "its version falls": [put(b"a", 1, 2, 3), put(b"b", 3, OPEN), get(b"b", 4, 5, 2)],
    "its version moves": [put(b"a", 1, OPEN), get(b"a", 2, 3, 8), get(b"a", 4, 5, 9)],
}


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("name", [*GOOD, *(f"unknown: {name}" for name in UNKNOWN_GOOD)])
def test_good(name: str, mode: Mode) -> None:
    operations = UNKNOWN_GOOD[name.removeprefix("unknown: ")] if name.startswith("unknown: ") else GOOD[name]
    assert naive_linearizable(operations), "the example itself"
    verdict = check_linearizability(operations, mode=mode)
    assert verdict.result is Result.PASSED, str(verdict)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("name", [*BAD, *(f"unknown: {name}" for name in UNKNOWN_BAD)])
def test_bad(name: str, mode: Mode) -> None:
    operations = UNKNOWN_BAD[name.removeprefix("unknown: ")] if name.startswith("unknown: ") else BAD[name]
    assert not naive_linearizable(operations), "the example itself"
    verdict = check_linearizability(operations, mode=mode)
    assert verdict.result is Result.VIOLATED
    assert verdict.anomalies[0].operations


def test_keys_are_checked_by_themselves() -> None:
    other = Operation.get("c", b"other", BAD["phantom"][0].output, 1, 2)
    verdict = check_linearizability([*GOOD["cas"], other])
    assert verdict.result is Result.VIOLATED
    assert [anomaly.operations[0].key for anomaly in verdict.anomalies] == [b"other"]
    assert verdict.operations == 5


KINDS = (Kind.GET, Kind.PUT, Kind.APPEND)
SHAPES = [
    Shape(),
    Shape(versions=1.0),
    Shape(versions=0.0, conditional=0.0),
    Shape(unique=False),
    Shape(unique=False, versions=1.0),
    Shape(kinds=KINDS, versions=0, conditional=0, operations=7, clients=4, spread=12),
    Shape(kinds=KINDS, versions=1, conditional=0, operations=7, clients=4, spread=12, lies=0.9),
    Shape(kinds=(Kind.GET, Kind.PUT, Kind.CAS), versions=0, conditional=0, unknown=0.3),
    Shape(kinds=(*KINDS, Kind.CAS), versions=0.7, conditional=0, unknown=0.3, clients=4, spread=10),
    Shape(unknown=0.5, spread=10),
]


def agree(seeds: range) -> Counter[bool]:
    """Compare all modes with the exhaustive checker on one random history a seed; count the verdicts."""
    counts: Counter[bool] = Counter()
    for seed in seeds:
        operations = random_history(random.Random(seed), SHAPES[seed % len(SHAPES)])
        expected = naive_linearizable(operations)
        counts[expected] += 1
        of_key = by_key(operations).get(generate.KEY, [])
        for mode in Mode:
            assert check_key(of_key, Deadline(None), mode).linearizable is expected, f"seed {seed}, {mode}"
    return counts


def test_all_modes_agree_with_the_exhaustive_checker() -> None:
    counts = agree(range(4000))
    assert counts[False] >= 600 and counts[True] >= 2000, counts


@pytest.mark.long
@pytest.mark.parametrize("first", range(10_000, 90_000, 20_000))
def test_all_modes_agree_with_the_exhaustive_checker_on_many(first: int) -> None:
    counts = agree(range(first, first + 20_000))
    assert counts[False] >= 3_000, counts


def test_what_is_passed_has_a_true_linearization() -> None:
    for seed in range(300):
        operations = random_history(random.Random(seed), Shape(lies=0, operations=30, clients=4))
        outcome = check_key(by_key(operations)[generate.KEY], Deadline(None))
        assert outcome.linearizable
        in_order = [  # each at its own instant, in that order: then only this order is possible
            Operation(op.client, op.kind, op.key, at, at, op.status, op.value, op.expected, op.if_version, op.output)
            for at, op in enumerate(outcome.order)
        ]
        assert naive_linearizable(in_order)


def busy(seed: int, clients: int, *, lies: float = 0.0, unknown: float = 0.0, versions: float = 0.0) -> list[Operation]:
    """40 operations of each client, always one in flight, on one key."""
    shape = Shape(clients * 40, clients, KINDS, versions, unknown=unknown, conditional=0, lies=lies, spread=60)
    return random_history(random.Random(seed), shape)


@pytest.mark.parametrize("versions", [0.0, 1.0])
def test_ten_busy_clients_on_one_key(versions: float) -> None:
    started = time.process_time()
    for seed in range(5):
        verdict = check_linearizability(busy(seed, 10, unknown=0.05, versions=versions), deadline_s=None)
        assert verdict.passed, str(verdict)
    assert (time.process_time() - started) / 5 < 2.0


def test_ten_busy_clients_with_a_lie() -> None:
    results = Counter(
        check_linearizability(busy(seed, 10, lies=1.0), deadline_s=None, explain=False).result for seed in range(12)
    )
    assert results[Result.VIOLATED] >= 4, results


def test_many_operations_over_many_keys() -> None:
    operations: list[Operation] = []
    for seed in range(200):
        for operation in random_history(random.Random(seed), Shape(100, 5, versions=1.0, lies=0, unknown=0.03)):
            moved = (operation.client, operation.kind, b"k%d" % seed, operation.call_ns, operation.return_ns)
            more = (operation.status, operation.value, operation.expected, operation.if_version, operation.output)
            operations.append(Operation(*moved, *more))
    assert len(operations) == 20_000
    started = time.process_time()
    verdict = check_linearizability(operations)
    assert verdict.passed, str(verdict)
    assert time.process_time() - started < 10.0


def test_undecided_when_the_deadline_passes() -> None:
    operations = random_history(
        random.Random(1), Shape(400, 15, unique=False, versions=0, conditional=0, lies=1, spread=90)
    )
    verdict = check_linearizability(operations, deadline_s=0.05)
    assert verdict.result is Result.UNDECIDED
    assert 'no answer within 0.05 s for key "k"' in verdict.reason
    assert not verdict.passed
