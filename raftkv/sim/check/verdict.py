"""What a checker says: passed, violated with the anomalies found, or undecided. Undecided is never a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from raftkv.sim.check.history import Operation


class Result(StrEnum):
    PASSED = "passed"
    VIOLATED = "violated"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One thing that can't have happened in a correct store.

    `name` is stable (docs/histories.md lists all), `text` one line that says what is wrong, `operations`
    those that contradict each other, `detail` more lines (a timeline, a cycle), empty if there is no more to say.
    """

    name: str
    text: str
    operations: tuple[Operation, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" + (f"\n{self.detail}" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result over `operations` operations that were looked at; `reason` says why it is undecided."""

    result: Result
    operations: int = 0
    anomalies: tuple[Anomaly, ...] = ()
    reason: str = ""

    def __post_init__(self) -> None:
        assert (self.result is Result.VIOLATED) == bool(self.anomalies)
        assert (self.result is Result.UNDECIDED) == bool(self.reason)

    @property
    def passed(self) -> bool:
        return self.result is Result.PASSED

    @classmethod
    def of(cls, operations: int, anomalies: Iterable[Anomaly], reason: str = "") -> Verdict:
        """Violated if there are anomalies, else undecided if there is a reason, else passed."""
        found = tuple(anomalies)
        if found:
            return cls(Result.VIOLATED, operations, found)
        return cls(Result.UNDECIDED if reason else Result.PASSED, operations, (), reason)

    @classmethod
    def both(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """What several checks of the same history say together."""
        every = list(verdicts)
        reasons = [verdict.reason for verdict in every if verdict.reason]
        return cls.of(
            max((verdict.operations for verdict in every), default=0),
            [anomaly for verdict in every for anomaly in verdict.anomalies],
            "; ".join(dict.fromkeys(reasons)),
        )

    def __str__(self) -> str:
        head = f"{self.result}: {self.operations} operations" + (f" ({self.reason})" if self.reason else "")
        return "\n".join([head, *map(str, self.anomalies)])


class Deadline:
    """When to give up a search; `clock` in seconds is for tests."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end_s = None if seconds is None else clock() + seconds

    @property
    def passed(self) -> bool:
        return self._end_s is not None and self._clock() >= self._end_s
