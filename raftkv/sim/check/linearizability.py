"""Linearizability of a key-value history: each key by itself.

A history is linearizable if and only if the part of each key is (Herlihy and Wing). What can't be decided
before the deadline is undecided, never passed.
"""

from __future__ import annotations

from collections.abc import Iterable

from raftkv.sim.check.history import History, Operation
from raftkv.sim.check.one_key import Mode, by_key, check_key, not_linearizable
from raftkv.sim.check.report import explain_key
from raftkv.sim.check.tokens import show
from raftkv.sim.check.verdict import Anomaly, Deadline, Verdict

DEADLINE_S = 60.0
"""For a whole history: hard ones are exponential, so more time seldom helps."""


def check_linearizability(
    history: History | Iterable[Operation],
    *,
    deadline_s: float | None = DEADLINE_S,
    mode: Mode = Mode.GUIDED,
    explain: bool = True,
) -> Verdict:
    """Check all keys. With `explain` each anomaly has a timeline of the smallest failing window found."""
    operations = history.operations if isinstance(history, History) else list(history)
    deadline = Deadline(deadline_s)
    anomalies: list[Anomaly] = []
    undecided: list[bytes] = []
    keys = by_key(operations)
    for key, of_key in sorted(keys.items(), key=lambda item: len(item[1])):
        outcome = check_key(of_key, deadline, mode)
        if outcome.linearizable is None:
            undecided.append(key)
        elif not outcome.linearizable:
            if explain:
                anomalies.append(explain_key(key, of_key, outcome))
            else:
                anomalies.append(outcome.contradiction or not_linearizable(key, of_key))
    reason = ""
    if undecided:
        more = f" and {len(undecided) - 3} more" if len(undecided) > 3 else ""
        reason = f"no answer within {deadline_s} s for key {', '.join(map(show, undecided[:3]))}{more}"
    return Verdict.of(sum(map(len, keys.values())), anomalies, reason)
