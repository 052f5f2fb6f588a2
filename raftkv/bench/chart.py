"""A measurement as a picture: throughput and latency over time, by matplotlib as PNG or by plotext on a terminal.

Both are in the extra `raftkv[chart]` and imported only here.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

from raftkv.bench.report import Report

LINES = 16
NANOSECONDS_PER_MS = 1e6


def can_draw() -> bool:
    """Whether there is a matplotlib."""
    return find_spec("matplotlib") is not None


def can_show() -> bool:
    """Whether there is a plotext."""
    return find_spec("plotext") is not None


def draw(report: Report, path: Path) -> None:
    """Write the PNG. Raise OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = whole_seconds(report)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True)
    above.plot(seconds, [report.seconds[second].done for second in seconds], color="#1f3a5f")
    above.set(ylabel="done in each second", title=title(report))
    above.set_ylim(0, 1.1 * above.get_ylim()[1])
    for name, per_cent, color in (("p50", 50, "#7a9cc6"), ("p99", 99, "#1f3a5f"), ("max", 100, "#d9822b")):
        below.plot(seconds, percentiles_ms(report, seconds, per_cent), color=color, label=name)
    below.set(xlabel="seconds", ylabel="latency, ms", yscale="log")
    below.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=90, format="png")
    finally:
        pyplot.close(figure)


def show(report: Report, columns: int) -> str:
    """The same two curves for a terminal that is so wide, as text without colours."""
    import plotext

    seconds = whole_seconds(report)
    parts = []
    curves = [
        ("done in each second", [float(report.seconds[second].done) for second in seconds]),
        ("p99 latency, ms", percentiles_ms(report, seconds, 99)),
    ]
    for name, values in curves:
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plot_size(columns, LINES)
        points = [(second, value) for second, value in zip(seconds, values, strict=True) if not math.isnan(value)]
        plotext.plot([second for second, _ in points], [value for _, value in points], marker="braille")
        plotext.ylim(0, max((value for _, value in points), default=0.0) or 1.0)
        plotext.title(name)
        parts.append(plotext.uncolorize(plotext.build()).rstrip())
    return "\n".join(parts)


def title(report: Report) -> str:
    """One line on what it is."""
    plan = report.measured.plan
    loop = "closed loop" if plan.rate is None else f"open loop, {plan.rate:,.10g}/s"
    return f"raftkv bench {plan.scenario}: {plan.clients} clients, {loop}"


def whole_seconds(report: Report) -> list[int]:
    """Those in which the load was on from beginning to end; or all, if there is none."""
    whole = int(report.measured.ending.measured_s + 0.001)
    return list(range(min(whole, len(report.seconds)) or len(report.seconds)))


def percentiles_ms(report: Report, seconds: list[int], per_cent: float) -> list[float]:
    """Of each of these seconds; NaN where nothing succeeded."""
    found = [report.seconds[second].latency.percentile_ns(per_cent) for second in seconds]
    return [float("nan") if time_ns is None else time_ns / NANOSECONDS_PER_MS for time_ns in found]
