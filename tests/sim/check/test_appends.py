"""Unique appends: every acknowledged one exactly once, in one order for all readers."""

from __future__ import annotations

import pytest

from raftkv.sim.check.appends import check_appends
from raftkv.sim.check.history import Operation
from raftkv.sim.check.verdict import Result
from tests.sim.check.build import OPEN, append, get, put


def test_good() -> None:
    verdict = check_appends([append(b"a;", 1, 2), append(b"b;", 1, OPEN), append(b"c;", 3, 4), get(b"a;b;c;", 5, 6)])
    assert verdict.passed and verdict.operations == 4
    assert check_appends([append(b"a;", 1, 2), append(b"b;", 1, OPEN), get(b"a;", 5, 6)]).passed


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("lost-write", [append(b"a;", 1, 2), append(b"b;", 3, 4), get(b"a;", 5, 6)]),
        ("lost-write", [append(b"a;", 1, 9), append(b"b;", 1, 9), get(b"b;", 10, 11)]),
        ("lost-write", [append(b"a;", 1, 2), get(None, 5, 6)]),
        ("duplicate", [append(b"a;", 1, 2), append(b"b;", 1, 2), get(b"a;b;a;", 5, 6)]),
        ("phantom", [append(b"a;", 1, 2), get(b"a;x;", 5, 6)]),
        (
            "fork",
            [append(b"x;", 1, 2), append(b"a;", 3, 9), append(b"b;", 3, 9), get(b"x;a;", 4, 9), get(b"x;b;a;", 5, 9)],
        ),
    ],
)
def test_bad(name: str, operations: list[Operation]) -> None:
    verdict = check_appends(operations)
    assert verdict.result is Result.VIOLATED
    assert verdict.anomalies[0].name == name
    assert " – " in verdict.anomalies[0].detail, "a timeline"


def test_undecided_without_a_later_read() -> None:
    verdict = check_appends([append(b"a;", 1, 2), append(b"b;", 3, 4), get(b"a;", 2, 4)])
    assert verdict.result is Result.UNDECIDED
    assert verdict.reason == 'key "k": 1 acknowledged appends were not followed by a read'


def test_undecided_without_unique_tokens() -> None:
    verdict = check_appends([append(b"a", 1, 2), append(b"a", 3, 4), get(b"a", 5, 6)])
    assert verdict.result is Result.UNDECIDED
    assert "not unique" in verdict.reason


def test_other_keys_are_not_its_business() -> None:
    verdict = check_appends([put(b"a;", 1, 2), append(b"b;", 3, 4), get(b"x", 5, 6)])
    assert verdict.passed and verdict.operations == 0
