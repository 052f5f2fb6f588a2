"""The screen: each anomaly by its name, no false alarm, and how much it catches."""

from __future__ import annotations

import random

import pytest

from raftkv.sim.check.history import Kind, Operation
from raftkv.sim.check.one_key import by_key, check_key
from raftkv.sim.check.screen import screen
from raftkv.sim.check.tokens import Tokens, prefix_free, show
from raftkv.sim.check.verdict import Deadline, Result
from tests.sim.check.build import KEY, OPEN, append, cas, cas_refused, delete, failed, get, put
from tests.sim.check.generate import Shape, random_history

ANOMALIES: dict[str, tuple[str, list[Operation]]] = {
    "nobody wrote it": ("phantom", [put(b"a;", 1, 2), get(b"b;", 3, 4)]),
    "part of a token": ("phantom", [put(b"a;", 1, 2), get(b"a", 3, 4)]),
    "empty": ("phantom", [put(b"a;", 1, 2), get(b"", 3, 4)]),
    "only a failed write wrote it": ("phantom", [failed(b"a;", 1, 2), get(b"a;", 3, 4)]),
    "a put as if appended": ("phantom", [put(b"a;", 1, 2), put(b"b;", 1, 2), get(b"a;b;", 3, 4)]),
    "cas found what was never there": ("phantom", [put(b"a;", 1, 2), cas(b"x;", b"b;", 3, 4)]),
    "refused cas found what was never there": ("phantom", [put(b"a;", 1, 2), cas_refused(b"b;", 3, 4, found=b"c;")]),
    "twice in one value": ("duplicate", [append(b"a;", 1, 2), get(b"a;a;", 3, 4)]),
    "in two values": (
        "duplicate",
        [put(b"a;", 1, 9), put(b"b;", 1, 9), append(b"c;", 1, 9), get(b"a;c;", 1, 9), get(b"b;c;", 1, 9)],
    ),
    "two orders": (
        "fork",
        [put(b"x;", 1, 9), append(b"a;", 1, 9), append(b"b;", 1, 9), get(b"x;a;b;", 1, 9), get(b"x;b;a;", 1, 9)],
    ),
    "seen before its call": ("future-read", [get(b"a;", 1, 2), put(b"a;", 3, 4)]),
    "unknown, and seen before its call": ("future-read", [get(b"a;", 1, 2), put(b"a;", 3, OPEN)]),
    "appended after what follows it": (
        "order-against-real-time",
        [append(b"a;", 1, 2), append(b"c;", 3, 4), append(b"b;", 5, 6), get(b"a;b;c;", 7, 8)],
    ),
    "overwritten": ("stale-read", [put(b"a;", 1, 2), put(b"b;", 3, 4), get(b"a;", 5, 6)]),
    "overwritten, as a reader knew": (
        "stale-read",
        [put(b"a;", 1, 2), put(b"b;", 3, OPEN), get(b"b;", 4, 5), get(b"a;", 6, 7)],
    ),
    "deleted": ("stale-read", [put(b"a;", 1, 2), delete(True, 3, 4), get(b"a;", 5, 6)]),
    "shorter than before": (
        "stale-read",
        [append(b"a;", 1, 2), append(b"b;", 3, 9), get(b"a;b;", 4, 5), get(b"a;", 6, 7)],
    ),
    "append is missing": (
        "lost-write",
        [put(b"a;", 1, 2), append(b"b;", 3, 4), append(b"c;", 5, 6), get(b"a;c;", 7, 8)],
    ),
    "nothing is left": ("lost-write", [put(b"a;", 1, 2), get(None, 3, 4)]),
    "refused because absent": ("lost-write", [put(b"a;", 1, 2), cas_refused(b"a;", 3, 4, 0)]),
    "one version twice": ("version-conflict", [put(b"a;", 1, 9, 4), put(b"b;", 1, 9, 4)]),
    "two values at one version": ("version-conflict", [put(b"a;", 1, 9, 4), get(b"b;", 1, 9, 4), put(b"b;", 1, 9)]),
    "versions fall": ("version-order", [put(b"a;", 1, 2, 4), put(b"b;", 3, 4, 3)]),
    "read before its version was made": ("version-order", [get(b"a;", 1, 2, 4), put(b"a;", 3, 4, 4)]),
}


@pytest.mark.parametrize("case", ANOMALIES)
def test_anomalies(case: str) -> None:
    name, operations = ANOMALIES[case]
    verdict = screen(operations)
    assert verdict.result is Result.VIOLATED
    assert name in {anomaly.name for anomaly in verdict.anomalies}, str(verdict)
    assert verdict.anomalies[0].text.startswith('key "k": ') or name in ("phantom", "duplicate", "fork")
    assert not check_key(by_key(operations)[KEY], Deadline(None)).linearizable


@pytest.mark.parametrize(
    "operations",
    [
        [put(b"a;", 1, 4), put(b"b;", 3, 4), get(b"a;", 5, 6)],  # concurrent puts: either may be last
        [put(b"a;", 1, 2), put(b"b;", 3, 9), get(b"b;", 4, 9), get(b"a;", 6, 7)],
        [put(b"a;", 1, 2), delete(None, 2, OPEN), get(None, 3, 4)],
        [append(b"a;", 1, 2), append(b"b;", 3, OPEN), get(b"a;", 4, 5), get(b"a;b;", 6, 7)],
        [put(b"x", 1, 2), put(b"xy", 3, 4), get(b"zzz", 5, 6)],  # unfit tokens: no opinion
    ],
)
def test_no_alarm(operations: list[Operation]) -> None:
    assert screen(operations).passed


def test_it_never_contradicts_the_search_and_finds_most_lies() -> None:
    kinds = (Kind.GET, Kind.GET, Kind.PUT, Kind.APPEND)
    shapes = [Shape(40, 4, lies=1), Shape(40, 4, versions=0, lies=1), Shape(25, 4, kinds, conditional=0, lies=1)]
    violated = caught = 0
    for seed in range(600):
        operations = random_history(random.Random(seed), shapes[seed % len(shapes)])
        linearizable = check_key(by_key(operations)[KEY], Deadline(None)).linearizable
        found = not screen(operations).passed
        assert not (found and linearizable), f"seed {seed}: a false alarm"
        violated += not linearizable
        caught += found
    assert violated > 200 and caught > 0.7 * violated, (violated, caught)


def test_tokens_must_be_told_apart() -> None:
    assert prefix_free([b"a", b"b"]) and prefix_free([])
    assert not prefix_free([b"a", b"ab"])
    assert not prefix_free([b"a", b"a"])
    assert not prefix_free([b""])
    assert Tokens.of([put(b"a", 1, 2), put(b"a", 3, 4)]) is None
    assert Tokens.of([failed(b"a", 1, 2), put(b"a", 3, 4)]) is not None


def test_a_value_has_one_reading() -> None:
    tokens = Tokens.of([append(b"1;", 1, 2), append(b"12;", 1, 2), append(b"2;", 1, 2)])
    assert tokens is not None
    assert tokens.parse(b"12;1;2;") == [1, 0, 2]
    assert tokens.parse(b"12;1") is None
    assert tokens.observe(b"12;1;2;", 0) == 2
    assert tokens.observe(b"12;1;", 0) == 0
    assert tokens.find(b"12;") == 1
    assert tokens.find(b"12;2;") is None
    assert tokens.stage(0) == b"12;1;"


def test_values_for_people() -> None:
    assert show(None) == "absent"
    assert show(b"a\n\xff") == '"a\\n\\xff"'
    assert len(show(b"x" * 500)) < 70
