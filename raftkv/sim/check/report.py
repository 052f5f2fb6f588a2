"""Explanations for people: the smallest failing window of a key's history, as a timeline.

What is shown is still a violation by itself: the history is cut at the first moment at which it can't be
explained any more (what was open then becomes unknown), and reads that are not needed for that are left
out. A write is never left out of the check, only of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from raftkv.sim.check.history import NOTHING, Kind, Operation, Status
from raftkv.sim.check.model import Register, is_pure, matters
from raftkv.sim.check.one_key import KeyOutcome, check_key, not_linearizable
from raftkv.sim.check.tokens import plain, show
from raftkv.sim.check.verdict import Anomaly, Deadline

BUDGET_S: Final = 5.0
"""For making one failing window smaller: it is a violation in any case."""

LINES_MAX: Final = 24
BAR_COLUMNS: Final = 32


def explain_key(
    key: bytes, operations: Sequence[Operation], outcome: KeyOutcome, *, budget_s: float = BUDGET_S
) -> Anomaly:
    """The anomaly of a key that is not linearizable, with its timeline."""
    if outcome.contradiction is not None:
        found = outcome.contradiction
        return replace(found, text=f"key {show(key)}: {found.text}", detail=timeline(found.operations))
    deadline = Deadline(budget_s)
    window = without_needless_reads(first_failing(operations, deadline), deadline)
    stuck = check_key(window, Deadline(budget_s))
    if stuck.linearizable is False and stuck.contradiction is None:
        return not_linearizable(key, window, _picture(window, stuck))
    return not_linearizable(key, window, timeline(window))


def first_failing(operations: Sequence[Operation], deadline: Deadline) -> list[Operation]:
    """The shortest beginning of a history that is a violation already, by the time of its end."""
    moments = sorted({op.return_ns for op in operations if op.status is Status.OK and op.return_ns is not None})
    good, bad = -1, len(moments) - 1
    while bad - good > 1 and not deadline.passed:
        middle = (good + bad) // 2
        if check_key(until(operations, moments[middle]), deadline).linearizable is False:
            bad = middle
        else:
            good = middle
    return until(operations, moments[bad]) if moments else list(operations)


def until(operations: Sequence[Operation], moment_ns: int) -> list[Operation]:
    """What was known at `moment_ns`: later calls are gone, later returns unknown."""
    known: list[Operation] = []
    for operation in operations:
        if operation.call_ns > moment_ns:
            continue
        if operation.return_ns is not None and operation.return_ns > moment_ns and not operation.is_unknown:
            operation = replace(operation, status=Status.UNKNOWN, return_ns=None, output=NOTHING)
        if matters(operation):
            known.append(operation)
    return known


def without_needless_reads(operations: Sequence[Operation], deadline: Deadline) -> list[Operation]:
    """Leave out what only observes, in ever smaller pieces, as long as the rest is a violation."""
    kept = list(operations)
    size = max(1, sum(map(is_pure, kept)) // 2)
    while True:
        pure = [index for index, operation in enumerate(kept) if is_pure(operation)]
        for start in reversed(range(0, len(pure), size)):
            if deadline.passed:
                return kept
            out = set(pure[start : start + size])
            fewer = [operation for index, operation in enumerate(kept) if index not in out]
            if check_key(fewer, deadline).linearizable is False:
                kept = fewer
        if size == 1:
            return kept
        size //= 2


# ---- pictures


def describe(operation: Operation) -> str:
    """What was asked, and what came of it."""
    output = operation.output
    asked = {
        Kind.GET: "get",
        Kind.DELETE: "delete",
        Kind.CAS: f"cas {show(operation.expected)} to {show(operation.value)}",
    }.get(operation.kind, f"{operation.kind} {show(operation.value)}")
    if operation.if_version is not None:
        asked += f" if version {operation.if_version}"
    if operation.status is not Status.OK:
        return f"{asked} → {'failed' if operation.status is Status.FAIL else 'unknown'}"
    result = "ok"
    if output.mismatch:
        result = "mismatch"
        if output.version == 0 or output.shows_value:
            result += f" with {show(output.value)}"
    elif output.shows_value:
        result = show(output.value)
    elif output.existed is not None:
        result = "deleted" if output.existed else "absent"
    return f"{asked} → {result}" + (f" at version {output.version}" if output.version else "")


def timeline(operations: Sequence[Operation], marks: Sequence[str] = ()) -> str:
    """One line an operation, in the order of calls: its time in ms, client, a bar to scale of events, what it did."""
    if not operations:
        return ""
    marked = list(zip(operations, marks or [""] * len(operations), strict=True))
    marked.sort(key=lambda item: (item[0].call_ns, item[0].return_ns is None, item[0].return_ns or 0))
    hidden = len(marked) - LINES_MAX
    shown = marked[max(0, hidden) :]
    events = sorted({moment for op, _ in shown for moment in (op.call_ns, op.return_ns) if moment is not None})
    column = {moment: place * BAR_COLUMNS // len(events) for place, moment in enumerate(events)}
    clients = max(len(plain(op.client)) for op, _ in shown)
    width = max(len(mark) for _, mark in shown)
    lines = [f"  … {hidden} earlier operations …"] if hidden > 0 else []
    for operation, mark in shown:
        end_ns = operation.return_ns
        start = column[operation.call_ns]
        stop = BAR_COLUMNS if end_ns is None else column[end_ns]
        bar = " " * start + "├" + "─" * (stop - start - 1) + ("…" if end_ns is None else "┤")
        end = "…" if end_ns is None else f"{end_ns / 1e6:.3f}"
        times = f"{operation.call_ns / 1e6:>11.3f} – {end:<11}"
        about = f"{plain(operation.client):<{clients}} {bar:<{BAR_COLUMNS + 2}}"
        lines.append(f"  {mark:>{width}} {times} {about} {describe(operation)}")
    return "\n".join(lines)


def _picture(operations: Sequence[Operation], stuck: KeyOutcome) -> str:
    """The timeline with the places in the longest order that was found, and what did not fit after it."""
    place = {id(operation): number for number, operation in enumerate(stuck.order, 1)}
    marks = [
        str(place[id(operation)]) if id(operation) in place else "?" if operation.is_unknown else "✗"
        for operation in operations
    ]
    lines = [timeline(operations, marks)]
    left = [operation for operation in operations if id(operation) not in place and not operation.is_unknown]
    lines.append(f"  The longest order that explains anything has {len(stuck.order)} operations (numbered).")
    lines.append(f"  After it the value is {_state(stuck.state, operations)}; then none of these fits:")
    lines += [f"    {plain(operation.client)}: {describe(operation)}" for operation in _next(left)[:8]]
    return "\n".join(lines)


def _next(left: Sequence[Operation]) -> list[Operation]:
    """Those that real time allows to come next."""
    first_ns = min((op.return_ns for op in left if op.return_ns is not None), default=0)
    return [operation for operation in left if operation.call_ns <= first_ns]


def _state(state: Register, operations: Sequence[Operation]) -> str:
    """The state of a search for people; a guided one knows only the last token of the value."""
    if state.value is None:
        return "absent"
    text = f"{show(state.value)}" if state.value else "one that nobody saw"
    if state.value and any(operation.kind is Kind.APPEND for operation in operations):
        text = f"one that ends with {text}"
    return text + (f" at version {state.version}" if state.exact else "")
