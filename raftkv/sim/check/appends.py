"""Unique appends: every acknowledged one is there exactly once, in an order that all readers agree on.

For keys on which there is nothing but appends of unique tokens and gets (the check of a log, a queue or a
set). It names what is wrong in linear time; what it passes may still not be linearizable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raftkv.sim.check.history import History, Kind, Operation, Status
from raftkv.sim.check.report import timeline
from raftkv.sim.check.screen import PER_KEY_MAX, screen_key
from raftkv.sim.check.tokens import Tokens, show
from raftkv.sim.check.verdict import Anomaly, Verdict


def is_append_only(operations: Iterable[Operation]) -> bool:
    """Whether these are appends and gets, and not gets alone."""
    kinds = {operation.kind for operation in operations}
    return Kind.APPEND in kinds and kinds <= {Kind.APPEND, Kind.GET}


def check_appends(history: History | Iterable[Operation]) -> Verdict:
    """Check every key on which there are only appends and gets.

    Undecided where an acknowledged append was followed by no read, or where tokens are not unique (none
    may be empty, or the beginning of another).
    """
    operations = history.operations if isinstance(history, History) else list(history)
    keys: dict[bytes, list[Operation]] = {}
    for operation in operations:
        if operation.kind is not Kind.TXN:
            keys.setdefault(operation.key, []).append(operation)
    anomalies: list[Anomaly] = []
    reasons: list[str] = []
    count = 0
    for key, of_key in keys.items():
        if is_append_only(of_key):
            count += len(of_key)
            found, reason = _check_key(key, of_key)
            anomalies += found
            reasons += [reason] if reason else []
    reason = reasons[0] if reasons else ""
    return Verdict.of(count, anomalies, reason + (f" (and {len(reasons) - 1} more keys)" if len(reasons) > 1 else ""))


def _check_key(key: bytes, operations: Sequence[Operation]) -> tuple[list[Anomaly], str]:
    """The anomalies of one key, and why it is undecided."""
    tokens = Tokens.of(operations)
    if tokens is None:
        return [], f"key {show(key)}: the appended values are not unique"
    found = screen_key(operations)
    if found:
        return [_with_timeline(anomaly) for anomaly in found], ""
    reads = [op for op in operations if op.kind is Kind.GET and op.status is Status.OK]
    appends = [op for op in operations if op.kind is Kind.APPEND and op.status is Status.OK]
    last = max(reads, key=lambda read: len(read.output.value or b""), default=None)
    there = set(tokens.parse(last.output.value) or ()) if last is not None and last.output.value else set()
    latest_call_ns = max((read.call_ns for read in reads), default=-1)
    unread = 0
    for append in appends:
        assert append.value is not None and append.return_ns is not None
        if tokens.writer_of[append.value] in there:
            continue
        if append.return_ns >= latest_call_ns:
            unread += 1
            continue
        later = next(read for read in reads if read.call_ns > append.return_ns)
        text = f"key {show(key)}: the append of {show(append.value)} was acknowledged, but no later read has it"
        found.append(_with_timeline(Anomaly("lost-write", text, (append, later))))
    reason = f"key {show(key)}: {unread} acknowledged appends were not followed by a read" if unread else ""
    return found[:PER_KEY_MAX], reason


def _with_timeline(anomaly: Anomaly) -> Anomaly:
    return Anomaly(anomaly.name, anomaly.text, anomaly.operations, timeline(anomaly.operations))
