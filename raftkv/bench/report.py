"""What was measured, as lines for people and as one JSON object.

Throughput is what succeeded; a request whose outcome is unknown is counted as that, and in no latency.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from raftkv.bench.histogram import Histogram
from raftkv.bench.plan import Tally
from raftkv.bench.processes import Measured
from raftkv.bench.scenarios import SCENARIOS

PERCENTILES = (50.0, 95.0, 99.0, 99.9)
LATE_S = 1.0
"""An open loop whose oldest waiting request is due for longer than this could not keep its rate."""


class Report:
    """Of one measurement. `total` is of all kinds of requests, `kinds` of each; `seconds` of all kinds, second by
    second, also those in which nothing ended."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self.kinds: dict[str, Tally] = {kind: Tally() for kind in SCENARIOS[measured.plan.scenario].mix}
        self.total = Tally()
        length = max(math.ceil(measured.ending.measured_s), max(measured.series, default=0) + 1)
        self.seconds = [Tally() for _ in range(length)]
        for second, kinds in measured.series.items():
            for kind, tally in kinds.items():
                self.kinds[kind].add(tally)
                self.total.add(tally)
                self.seconds[second].add(tally)

    @property
    def keeps_rate(self) -> bool:
        """Whether an open loop could begin its requests when they were due; true of a closed one."""
        return self.measured.ending.oldest_s <= LATE_S

    def lines(self) -> Iterator[str]:
        """For people; the plain form."""
        plan, ending = self.measured.plan, self.measured.ending
        loop = "closed loop" if plan.rate is None else f"open loop, {plan.rate:,.10g} requests/s"
        clients = f"{_count(plan.clients, 'client')} in {_count(plan.processes, 'process')}"
        early = ", ended early" if self.measured.interrupted else ""
        times = f"{ending.measured_s:.1f} s after {plan.warmup_s:g} s of warm-up"
        yield f"{plan.scenario}: {clients}, {loop}, {times}{early}"
        groups = sorted(self.measured.shard_map.groups)
        yield (
            f"{_count(plan.keys, 'key')}, values of {_count(plan.value_bytes, 'byte')}; "
            f"{_count(len(groups), 'group')}, {_count(self.measured.shard_map.shards, 'shard')}; seed {plan.seed}"
        )
        yield ""
        rows = [("total", self.total)] if len(self.kinds) == 1 else [("total", self.total), *self.kinds.items()]
        names = ["mean", *(f"p{per_cent:g}" for per_cent in PERCENTILES), "max"]
        header = ["", "done", "per second", *(f"{name} ms" for name in names)]
        cells = [
            [
                kind,
                f"{tally.done:,}",
                f"{self._per_second(tally):,.1f}",
                *map(_shown_ms, _latencies(tally.latency).values()),
            ]
            for kind, tally in rows
        ]
        widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
        for line in (header, *cells):
            first, *rest = (
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            yield "  ".join([first, *rest]).rstrip()
        yield ""
        yield f"errors: {_shown(self.total.errors)}"
        yield f"unknown outcomes: {_shown(self.total.unknown)}"
        yield f"retries: {self.total.retries:,}"
        if self.total.failed_attempts or plan.scenario in ("txn", "get-lock"):
            each = f" ({self.total.failed_attempts / self.total.done:.2f} for each commit)" if self.total.done else ""
            yield f"attempts of transactions that lost against others: {self.total.failed_attempts:,}{each}"
        if ending.cut_off:
            yield f"in flight at the end, and not counted: {ending.cut_off:,}"
        if plan.rate is not None:
            yield from self._open_loop()

    def _open_loop(self) -> Iterator[str]:
        plan, ending = self.measured.plan, self.measured.ending
        late_ns = ending.late.percentile_ns(99)
        if late_ns is not None:
            yield f"the load's own lateness, which is part of the latencies: p99 {late_ns / 1e6:.2f} ms"
        if ending.unbegun:
            yield (
                f"backlog at the end: {_count(ending.unbegun, 'request')}, the oldest due {ending.oldest_s:.1f} s "
                "before; not in the latencies"
            )
        if not self.keeps_rate:
            yield (
                f"THE RATE WAS NOT KEPT: {plan.rate:,.10g} requests/s are more than the cluster serves to "
                f"{_count(plan.clients, 'client')}, so latencies grow with --duration"
            )

    def as_object(self) -> dict[str, Any]:
        """The JSON object. Times are seconds or, where a name says so, milliseconds."""
        plan, ending, shard_map = self.measured.plan, self.measured.ending, self.measured.shard_map
        options = asdict(plan)
        del options["scenario"]
        return {
            "scenario": plan.scenario,
            "options": options,
            "versions": versions(),
            "cluster": {"config": shard_map.num, "shards": shard_map.shards, "groups": sorted(shard_map.groups)},
            "interrupted": self.measured.interrupted,
            "measured_s": ending.measured_s,
            "totals": {**self._totals(self.total), "cut_off": ending.cut_off},
            "latency_ms": _latencies(self.total.latency),
            "operations": {
                kind: {**self._totals(tally), "latency_ms": _latencies(tally.latency)}
                for kind, tally in self.kinds.items()
            },
            "open_loop": None if plan.rate is None else self._open_loop_object(),
            "per_second": [
                {
                    "second": second,
                    "done": tally.done,
                    "errors": tally.errors.total(),
                    "unknown": tally.unknown.total(),
                    "latency_ms": _latencies(tally.latency),
                }
                for second, tally in enumerate(self.seconds)
            ],
            "histogram": [
                {"from_ms": low / 1e6, "below_ms": high / 1e6, "count": count}
                for low, high, count in self.total.latency.buckets()
            ],
        }

    def _open_loop_object(self) -> dict[str, Any]:
        ending = self.measured.ending
        return {
            "rate": self.measured.plan.rate,
            "kept": self.keeps_rate,
            "backlog": ending.unbegun,
            "backlog_oldest_s": ending.oldest_s,
            "own_lateness_ms": _latencies(ending.late),
        }

    def _totals(self, tally: Tally) -> dict[str, Any]:
        return {
            "requests": tally.requests,
            "done": tally.done,
            "done_per_s": self._per_second(tally),
            "errors": dict(tally.errors),
            "unknown": dict(tally.unknown),
            "retries": tally.retries,
            "failed_attempts": tally.failed_attempts,
        }

    def _per_second(self, tally: Tally) -> float:
        return tally.done / self.measured.ending.measured_s


def versions() -> dict[str, str | None]:
    """Of what makes the load."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("raftkv", "uvloop"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _latencies(latency: Histogram) -> dict[str, float | None]:
    """In milliseconds; None of nothing."""
    found = {"mean": latency.mean_ns}
    found.update({f"p{per_cent:g}": latency.percentile_ns(per_cent) for per_cent in PERCENTILES})
    found["max"] = latency.max_ns if latency.count else None
    return {name: None if time_ns is None else time_ns / 1e6 for name, time_ns in found.items()}


def _shown_ms(time_ms: float | None) -> str:
    return "-" if time_ms is None else f"{time_ms:,.2f}"


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "0"


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}es" if noun.endswith("s") else f"{number:,} {noun}s"
