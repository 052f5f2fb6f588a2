"""Whole files: what is checked, the exit status, and the timeline of the smallest failing window."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest

from raftkv.sim.check.file import Exit, check_file, check_history, main
from raftkv.sim.check.history import History, HistoryError, Operation
from raftkv.sim.check.linearizability import check_linearizability
from raftkv.sim.check.one_key import by_key, check_key
from raftkv.sim.check.report import describe, explain_key, first_failing, timeline, until, without_needless_reads
from raftkv.sim.check.screen import screen
from raftkv.sim.check.verdict import Deadline, Result
from tests.sim.check.build import KEY, OPEN, append, cas, cas_refused, delete, failed, get, put, put_refused, txn
from tests.sim.check.generate import Shape, random_history
from tests.sim.check.test_screen import ANOMALIES
from tests.sim.check.test_transactions import BAD as TRANSACTION_ANOMALIES

GOOD = [put(b"a;", 1, 2), get(b"a;", 3, 4)]
STALE = [put(b"a;", 1, 2), put(b"b;", 3, 4), get(b"a;", 5, 6)]
NO_ORDER = [put(b"a", 1, 2), put(b"a", 1, OPEN), delete(True, 3, 4), delete(True, 5, 6), delete(True, 7, 8)]


def write(path: Path, operations: list[Operation], **header: object) -> str:
    History(dict(header), operations).write(path)
    return str(path)


def run(*argv: str) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    status = main(argv, out, errors)
    return status, out.getvalue(), errors.getvalue()


def test_passed(tmp_path: Path) -> None:
    path = write(tmp_path / "h", [*GOOD, txn("x+1", 1, 2), txn("x=1", 3, 4)])
    assert run(path) == (Exit.PASSED, "passed: 4 operations\n", "")
    assert check_file(path).passed


@pytest.mark.parametrize(
    ("operations", "name"),
    [
        (STALE, "stale-read"),
        (NO_ORDER, "not-linearizable"),
        ([*GOOD, txn("x=1", 3, 4)], "phantom"),
        ([*GOOD, txn("x= y+1", 1, 9), txn("y= x+1", 1, 9)], "G2"),
    ],
)
def test_violated(tmp_path: Path, operations: list[Operation], name: str) -> None:
    status, out, errors = run(write(tmp_path / "h", operations))
    assert (status, errors) == (Exit.VIOLATED, "")
    assert out.startswith(f"violated: {len(operations)} operations\n{name}: ")
    assert out.count(f"{name}: ") == 1


def test_undecided(tmp_path: Path) -> None:
    path = write(tmp_path / "h", [append(b"a;", 1, 2)], workload="appends")
    status, out, _ = run(path)
    assert status == Exit.UNDECIDED
    assert out == 'undecided: 1 operations (key "k": 1 acknowledged appends were not followed by a read)\n'


def test_undecided_by_the_deadline(tmp_path: Path) -> None:
    shape = Shape(400, 15, unique=False, versions=0, conditional=0, lies=1, spread=90)
    path = write(tmp_path / "h", random_history(random.Random(1), shape))
    status, out, _ = run(path, "--deadline", "0.05")
    assert status == Exit.UNDECIDED
    assert out.startswith("undecided: 400 operations (no answer within 0.05 s")


@pytest.mark.parametrize("data", [b"", b"\n", b"{}\n", b"\x00\xff", b'{"raftkv_history": 1}\n{"client":\n'])
def test_what_is_not_a_history_is_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "h"
    path.write_bytes(data)
    status, out, errors = run(str(path))
    assert (status, out) == (Exit.USAGE, "")
    assert errors.startswith(f"raftkv check: {path}:")
    assert errors.count("\n") == 1
    with pytest.raises(HistoryError):
        check_file(path)


def test_the_worst_of_several_files(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good", GOOD), write(tmp_path / "bad", STALE)
    status, out, errors = run(good, str(tmp_path / "none"))
    assert (status, out) == (Exit.USAGE, f"{good}: passed: 2 operations\n")
    assert "No such file" in errors
    assert run(good, bad, str(tmp_path / "none"))[0] == Exit.VIOLATED


def test_a_key_is_reported_once() -> None:
    assert [anomaly.name for anomaly in check_history(History({}, STALE)).anomalies] == ["stale-read"]


# ---- reports


def test_a_history_is_cut_where_it_fails_first() -> None:
    later = [put(b"%d" % at, at, at + 1) for at in range(20, 60, 2)]
    window = first_failing([*NO_ORDER, *later], Deadline(None))
    assert window == NO_ORDER
    assert until([put(b"a", 1, 9), get(b"a", 2, 9), get(None, 3, 4)], 5) == [put(b"a", 1, None), get(None, 3, 4)]


def test_needless_reads_are_left_out() -> None:
    reads = [get(b"a", 2, 2) for _ in range(9)]
    assert without_needless_reads([*NO_ORDER, *reads], Deadline(None)) == NO_ORDER
    stale = [put(b"a", 1, 2), put(b"b", 3, 4), *[get(b"b", 5, 6)] * 3, get(b"a", 7, 8)]
    assert without_needless_reads(stale, Deadline(None)) == [put(b"a", 1, 2), put(b"b", 3, 4), get(b"a", 7, 8)]


def test_the_picture_says_where_it_is_stuck() -> None:
    (anomaly,) = check_linearizability(NO_ORDER).anomalies
    assert anomaly.name == "not-linearizable"
    lines = anomaly.detail.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["1", "3", "2", "4", "✗"]
    assert lines[5:] == [
        "  The longest order that explains anything has 4 operations (numbered).",
        "  After it the value is absent; then none of these fits:",
        "    w7: delete → deleted",
    ]


def test_every_report_is_a_violation_itself() -> None:
    reported = 0
    for seed in range(60):
        operations = random_history(random.Random(seed), Shape(40, 4, versions=0.3, lies=1, spread=15))
        of_key = by_key(operations)[KEY]
        outcome = check_key(of_key, Deadline(None))
        if outcome.linearizable:
            continue
        anomaly = explain_key(KEY, of_key, outcome)
        assert anomaly.detail and anomaly.operations
        if anomaly.name == "not-linearizable":
            reported += 1
            assert check_key(list(anomaly.operations), Deadline(None)).linearizable is False
            assert len(anomaly.operations) <= len(of_key)
    assert reported >= 5


def test_a_timeline_is_to_scale_and_bounded() -> None:
    lines = timeline([replace(put(b"a", 1, 3), client="c1"), get(b"a", 2, 4), put(b"b", 2, OPEN)]).splitlines()
    assert [line.index("├") for line in lines] == sorted(line.index("├") for line in lines)
    assert lines[0].endswith('put "a" → ok') and lines[2].endswith('put "b" → unknown')
    assert timeline([]) == ""
    long = timeline([get(b"a", at, at + 1) for at in range(100)]).splitlines()
    assert long[0] == "  … 76 earlier operations …" and len(long) == 25


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (get(None, 1, 2), "get → absent"),
        (get(b"a", 1, 2, 7), 'get → "a" at version 7'),
        (append(b"a", 1, 2, 3), 'append "a" → ok at version 3'),
        (cas(b"a", b"b", 1, 2), 'cas "a" to "b" → ok'),
        (cas_refused(b"a", 1, 2, 0), 'cas "a" to "never1;" → mismatch with absent'),
        (cas_refused(b"a", 1, 2, 4, b"x"), 'cas "a" to "never1;" → mismatch with "x" at version 4'),
        (put_refused(3, 1, 2, 5), 'put "never1;" if version 3 → mismatch at version 5'),
        (delete(True, 1, 2), "delete → deleted"),
        (delete(False, 1, 2), "delete → absent"),
        (delete(None, 1, OPEN), "delete → unknown"),
        (failed(b"a", 1, 2), 'put "a" → failed'),
    ],
)
def test_operations_for_people(operation: Operation, text: str) -> None:
    assert describe(operation) == text


def test_screened_anomalies_have_timelines(tmp_path: Path) -> None:
    assert not screen(STALE).passed
    verdict = check_history(History({}, STALE))
    assert verdict.result is Result.VIOLATED
    assert verdict.anomalies[0].detail.count(" – ") == 3


def test_a_client_can_not_break_the_lines() -> None:
    operations = [replace(operation, client="evil\n\x1b[2J") for operation in [*NO_ORDER, txn("x=1", 1, 2)]]
    text = str(check_history(History({}, operations)))
    assert "evil\\n\\x1b[2J" in text
    assert "\x1b" not in text


# ---- the documentation


def blocks(language: str) -> list[str]:
    text = (Path(__file__).parents[3] / "docs" / "histories.md").read_text(encoding="utf-8")
    return [block.partition("\n")[2] for block in text.split("```")[1::2] if block.startswith(language + "\n")]


def test_the_documented_file_is_one() -> None:
    (lines,) = blocks("")
    history = History.parse(lines.splitlines())
    assert list(history.lines()) == lines.splitlines()
    assert check_history(history).passed


def test_the_documented_code_runs() -> None:
    (code,) = blocks("python")
    exec(code, {})


def test_every_anomaly_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "histories.md").read_text(encoding="utf-8")
    for name in {name for name, _ in [*ANOMALIES.values(), *TRANSACTION_ANOMALIES.values()]} | {"not-linearizable"}:
        assert f"`{name.removesuffix('-realtime')}" in text, name
