"""The command: run seeds, one line each, and at the end what was reached and what was not.

`main(argv)` is what `raftkv sim` calls. It exits 1 when a seed is violated or undecided, and then prints the seed, the
command that replays it, the time-line of faults and what is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from raftkv.sim.arguments import OneLineParser
from raftkv.sim.loop import SimLoop
from raftkv.sim.nemesis import check_faults
from raftkv.sim.probes import KNOWN
from raftkv.sim.run import Report, run_seed
from raftkv.sim.scenario import Scenario, ScenarioError, load, names

TIMELINE_LINES = 40
FIELDS = (
    "seed", "scenario", "trace_hash", "operations", "unknown", "faults", "faults_by_kind", "virtual_seconds",
    "real_seconds", "cpu_seconds", "verdict", "violations", "elections", "crashes", "snapshots_installed",
    "longest_operation_s", "healed_after_s", "probes",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run as the arguments say; the exit status: 0 all passed, 1 not, 2 bad arguments."""
    options = arguments().parse_args(argv)
    try:
        scenario = load(options.scenario)
        check_faults(scenario)
    except ScenarioError as error:
        sys.stderr.write(f"raftkv sim: {error}\n")
        return 2
    if options.virtual_seconds is not None:
        scenario = scenario.with_seconds(options.virtual_seconds)
    seeds = [options.seed] if options.seed is not None else options.seeds
    totals = Totals()
    show = _show if options.log else None
    for report in _with_progress(_reports(seeds, scenario, options.jobs, show), len(seeds)):
        write = sys.stdout.write
        totals.add(report)
        write(as_json(report) + "\n" if options.output == "json" else as_line(report) + "\n")
        if options.history and len(seeds) == 1:
            report.history.header.update(seed=report.seed, scenario=report.scenario, faults=report.timeline)
            report.history.write(options.history)
        if not report.passed and options.output != "json":
            write(explanation(report, options.scenario, options.virtual_seconds))
        sys.stdout.flush()
    if options.output != "json":
        sys.stdout.write(totals.text())
    return 0 if not totals.bad else 1


_ABOUT = """Run the real daemons in a simulated world, one history a seed.

  raftkv sim --seed 42                     one history; the same seed is the same history
  raftkv sim --seeds 1..100 --jobs 2       many, and which rare states they reached
  raftkv sim --seed 42 --log               what its daemons say
"""


def arguments() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(prog="raftkv sim", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, metavar="N", help="run this one")
    which.add_argument("--seeds", type=_range, metavar="A..B", help="run these, the last one too")
    known = ", ".join(names())
    parser.add_argument("--scenario", default="mix", metavar="FILE", help=f"a TOML file, or one of {known}")
    parser.add_argument("--virtual-seconds", type=_above_zero(float), metavar="S", help="instead of the scenario's")
    parser.add_argument("--jobs", type=_above_zero(int), default=1, metavar="N", help="so many seeds at once")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="json is one object a seed")
    parser.add_argument("--history", metavar="FILE", help="write the history of the one seed")
    parser.add_argument("--log", action="store_true", help="show what the daemons log, at virtual time")
    return parser


def _above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < 1e9:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
        return number

    return parse


def _range(text: str) -> range:
    first, dots, last = text.partition("..")
    if not dots or not first.isdigit() or not last.isdigit() or int(first) > int(last):
        raise argparse.ArgumentTypeError(f"{text!r} is not A..B")
    return range(int(first), int(last) + 1)


def _reports(
    seeds: Sequence[int], scenario: Scenario, jobs: int, show: Callable[[logging.LogRecord], None] | None
) -> Iterator[Report]:
    """In the order of the seeds."""
    if jobs <= 1 or len(seeds) == 1:
        for seed in seeds:
            yield run_or_fail(seed, scenario, show=show)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(partial(run_or_fail, scenario=scenario), seeds)


def run_or_fail(seed: int, scenario: Scenario, show: Callable[[logging.LogRecord], None] | None = None) -> Report:
    """`run_seed`; a seed that breaks the simulator itself is one that didn't pass, and the others go on."""
    try:
        return run_seed(seed, scenario, show=show)
    except Exception:
        text = f"SimulatorFailed: {traceback.format_exc()}"
        return Report(seed, scenario.name, verdict="violated", violations=[text])


def _with_progress(reports: Iterator[Report], count: int) -> Iterator[Report]:
    """The same reports, and on a terminal a bar on standard error: how many are done, how many haven't passed."""
    if count == 1 or not sys.stderr.isatty():
        yield from reports
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(
        *columns,
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # what goes elsewhere must not come out on the terminal
        transient=True,
    ) as progress:
        task = progress.add_task("seeds", total=count)
        bad = 0
        for report in reports:
            yield report
            bad += not report.passed
            progress.update(task, advance=1, description=f"seeds, {bad} not passed" if bad else "seeds, all passed")


def _show(record: logging.LogRecord) -> None:
    loop = asyncio._get_running_loop()
    now = loop.scheduler.now if isinstance(loop, SimLoop) else 0.0
    sys.stdout.write(f"{now:10.4f} {record.levelname.lower()} {record.getMessage()}\n")


def as_json(report: Report) -> str:
    return json.dumps({name: getattr(report, name) for name in FIELDS}, ensure_ascii=False)


def as_line(report: Report) -> str:
    speed = report.virtual_seconds / report.real_seconds if report.real_seconds else 0.0
    return (
        f"seed {report.seed}: {report.verdict}, {report.operations} operations, {report.faults} faults, "
        f"{report.virtual_seconds:.1f} s in {report.real_seconds:.1f} s ({speed:.0f}x), trace {report.trace_hash}"
    )


def explanation(report: Report, scenario: str, virtual_seconds: float | None) -> str:
    """What to know about a seed that didn't pass."""
    seconds = f" --virtual-seconds {virtual_seconds:g}" if virtual_seconds is not None else ""
    lines = [f"  replay: raftkv sim --seed {report.seed} --scenario {scenario}{seconds}"]
    if len(report.timeline) > TIMELINE_LINES:
        lines.append(f"  … {len(report.timeline) - TIMELINE_LINES} earlier events")
    lines += [f"  {time:10.3f}  {event}" for time, event in report.timeline[-TIMELINE_LINES:]]
    for violation in report.violations:
        lines += [f"  {line}" for line in violation.splitlines()]
    return "\n".join(lines) + "\n"


class Totals:
    """Over all seeds of a call."""

    def __init__(self) -> None:
        self.seeds = 0
        self.bad: list[int] = []
        self.sums: dict[str, float] = {}
        self.faults: dict[str, int] = {}
        self.probes: dict[str, int] = {}
        self.longest_s = 0.0

    def add(self, report: Report) -> None:
        self.seeds += 1
        if not report.passed:
            self.bad.append(report.seed)
        summed = (
            "operations", "unknown", "faults", "elections", "crashes", "snapshots_installed", "virtual_seconds",
            "real_seconds", "cpu_seconds",
        )  # fmt: skip
        for name in summed:
            self.sums[name] = self.sums.get(name, 0) + getattr(report, name)
        for counts, more in ((self.faults, report.faults_by_kind), (self.probes, report.probes)):
            for kind, count in more.items():
                counts[kind] = counts.get(kind, 0) + count
        self.longest_s = max(self.longest_s, report.longest_operation_s)

    def text(self) -> str:
        sums: dict[str, Any] = {name: round(value, 1) for name, value in self.sums.items()}
        speed = self.sums["virtual_seconds"] / max(self.sums["real_seconds"], 1e-9)
        per_cpu = self.sums["virtual_seconds"] / max(self.sums["cpu_seconds"], 1e-9)
        missed = [name for name in KNOWN if name not in self.probes]
        lines = [
            f"{self.seeds} seeds, {len(self.bad)} not passed" + (f": {self.bad}" if self.bad else ""),
            ", ".join(f"{name} {value:g}" for name, value in sums.items())
            + f"; {speed:.1f}x real time, {per_cpu:.1f}x per CPU; longest operation {self.longest_s:.1f} s",
            "faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items())),
            "probes hit: " + ", ".join(f"{name} {count}" for name, count in sorted(self.probes.items())),
            "probes never hit: " + (", ".join(missed) or "none"),
        ]
        return "\n".join(lines) + "\n"
