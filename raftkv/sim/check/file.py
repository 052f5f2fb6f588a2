"""`raftkv check FILE`: all checks that fit a history file, and the exit status that says what came out.

Raises nothing for what a file can contain: a malformed one is one line on `errors`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import TextIO

from raftkv.sim.arguments import OneLineParser
from raftkv.sim.check.appends import check_appends, is_append_only
from raftkv.sim.check.history import History, HistoryError, Kind
from raftkv.sim.check.linearizability import DEADLINE_S, check_linearizability
from raftkv.sim.check.one_key import by_key
from raftkv.sim.check.report import timeline
from raftkv.sim.check.screen import screen
from raftkv.sim.check.tokens import plain
from raftkv.sim.check.transactions import check_transactions
from raftkv.sim.check.verdict import Anomaly, Result, Verdict


class Exit(IntEnum):
    """The exit status of a check."""

    PASSED = 0
    VIOLATED = 1
    USAGE = 2  # no such file, not a history
    UNDECIDED = 5  # the deadline passed, or the history can't tell: not a pass


STATUS = {Result.PASSED: Exit.PASSED, Result.VIOLATED: Exit.VIOLATED, Result.UNDECIDED: Exit.UNDECIDED}


def check_history(history: History, *, deadline_s: float | None = DEADLINE_S) -> Verdict:
    """All checks that fit: registers by the screen, then by search; append-only keys; transactions.

    A key that the screen finds at fault is not searched too: the screen says more.
    """
    verdicts: list[Verdict] = []
    registers = [operation for operation in history.operations if operation.kind is not Kind.TXN]
    if registers:
        screened = screen(registers)
        named = [_with_timeline(anomaly) for anomaly in screened.anomalies]
        faulty = {anomaly.operations[0].key for anomaly in named}
        verdicts.append(Verdict.of(len(registers), named))
        rest = [operation for operation in registers if operation.key not in faulty]
        verdicts.append(check_linearizability(rest, deadline_s=deadline_s))
        if history.header.get("workload") == "appends":
            only = {key for key, of_key in by_key(rest).items() if is_append_only(of_key)}
            verdicts.append(check_appends([operation for operation in rest if operation.key in only]))
    if len(registers) < len(history.operations):
        verdicts.append(check_transactions(history))
    verdict = Verdict.both(verdicts)
    return Verdict.of(len(history.operations), verdict.anomalies, verdict.reason)


def check_file(path: str | Path, *, deadline_s: float | None = DEADLINE_S) -> Verdict:
    """Check a history file. Raises HistoryError if it isn't one, or can't be read."""
    return check_history(History.read(path), deadline_s=deadline_s)


_ABOUT = """Check what clients saw: linearizability, unique appends, transactions (docs/histories.md).

  raftkv check history.jsonl
  raftkv check --deadline 600 run1.jsonl run2.jsonl
"""


def arguments() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(
        prog="raftkv check", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a history as JSON lines")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, metavar="SECONDS", help="then undecided")
    return parser


def main(argv: Sequence[str] | None = None, out: TextIO | None = None, errors: TextIO | None = None) -> int:
    """Check the files named in `argv`; the worst exit status of all (see Exit)."""
    options = arguments().parse_args(argv)
    out, errors = out or sys.stdout, errors or sys.stderr
    statuses: set[Exit] = set()
    for path in options.files:
        try:
            verdict = check_file(path, deadline_s=options.deadline)
        except HistoryError as error:
            errors.write(f"raftkv check: {plain(str(error))}\n")
            statuses.add(Exit.USAGE)
        else:
            prefix = f"{path}: " if len(options.files) > 1 else ""
            out.write(f"{prefix}{verdict}\n")
            statuses.add(STATUS[verdict.result])
    return next(status for status in (Exit.VIOLATED, Exit.USAGE, Exit.UNDECIDED, Exit.PASSED) if status in statuses)


def _with_timeline(anomaly: Anomaly) -> Anomaly:
    return Anomaly(anomaly.name, anomaly.text, anomaly.operations, timeline(anomaly.operations))
