"""`raftkv bench`: options in, a load on a running cluster, and a report of what it came to.

The load is made by processes of its own (`raftkv/bench/`); here are the options, the progress bar and Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click

from raftkv.bench import chart
from raftkv.bench.plan import KEY_PREFIX, BadPlan, Plan
from raftkv.bench.processes import LoadFailed, Measured, Run, Show, Stopped, delete_keys
from raftkv.bench.report import Report
from raftkv.bench.scenarios import SCENARIOS
from raftkv.cli import interrupts
from raftkv.cli.daemons import CONTROLLERS_HELP, AddressesType, Seconds, tls_options
from raftkv.cli.daemons import option as setting
from raftkv.cli.exit_codes import ExitCode, LocalFailure, UsageError, describe, exit_code_of
from raftkv.cli.local_state import default_controllers
from raftkv.cli.printers import note
from raftkv.cli.session import NO_CONTROLLERS, TIMEOUT_S_DEFAULT
from raftkv.cli.tls_files import client_ssl
from raftkv.protocol.errors import RaftKVError
from raftkv.protocol.limits import VALUE_BYTES_MAX

F = TypeVar("F", bound=Callable[..., Any])

PROCESSES_MAX = 64
CLIENTS_MAX = 10_000
KEYS_MAX = 10_000_000
NO_CHART = "a chart needs matplotlib: pip install 'raftkv[chart]'"

_SCENARIO_LINES = "\n".join(f"  {name:13} {scenario.about}" for name, scenario in SCENARIOS.items())

_HELP = f"""Load a running cluster and report throughput and latency.

\b
  raftkv bench                                      mixed reads and writes, 10 s
  raftkv bench --scenario put --clients 64          durable writes
  raftkv bench --scenario get --rate 5000           latency at 5,000 requests a second
  raftkv bench --scenario txn --conflict 50         transactions that get in each other's way
  raftkv bench --scenario ycsb-a -o json > a.json   for programs
  raftkv bench --scenario put --chart put.png       throughput and latency over time

\b
Scenarios (ycsb-… with zipfian keys, theta 0.99, in YCSB's proportions):
{_SCENARIO_LINES}

A client is one of the SDK, with connections and a session of its own, and has one request at a time: --clients is how
many users the cluster has, however many processes make their load. Latency is what such a user waits, retries
included. With --rate requests fall due at random times that are fixed beforehand; latency counts from when a request
was due, so that a slow answer is seen in all the requests that it delayed. A request whose outcome is unknown is no
success.

The keys begin with bench: and stay there, so that the next run finds them; those that are read are loaded first,
unless they are there. --cleanup deletes them.

Ctrl-C ends early, with the report of what was measured and exit status 130. If not one request succeeds, it is 1.
"""


class SecondsOrNone(Seconds):
    """0 too."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse."""
        return 0.0 if str(value) in ("0", "0.0", "0s") else super().convert(value, param, ctx)


def _option(*names: str, **details: Any) -> Callable[[F], F]:
    """A setting of this command only: its variable is RAFTKV_BENCH_…"""
    longest = next(name for name in names if name.startswith("--"))
    return setting(*names, variable="RAFTKV_BENCH_" + longest[2:].upper().replace("-", "_"), **details)


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@_option("--scenario", type=click.Choice(list(SCENARIOS)), metavar="NAME", default="mixed", help="One of those above.")
@_option("--clients", type=click.IntRange(1, CLIENTS_MAX), default=16, help="Each with one request at a time.")
@_option("--duration", type=Seconds(), default="10", help="What is measured.")
@_option("--warmup", type=SecondsOrNone(), default="2", help="Load before that, which isn't counted.")
@_option("--keys", type=click.IntRange(1, KEYS_MAX), default=10_000, help="How many there are.")
@_option("--value-size", type=click.IntRange(0, VALUE_BYTES_MAX), default=100, metavar="BYTES", help="Of every value.")
@_option(
    "--conflict",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    help="Requests on the few common keys.  [default: get-hot 90, txn 10, get-lock 0]",
)
@_option("--groups", type=click.IntRange(1), help="So many are touched.  [default: all]")
@_option("--batch", type=click.IntRange(2, 1_000), default=8, help="Keys of one batch.")
@_option("--rate", type=click.FloatRange(0, min_open=True), metavar="PER_SECOND", help="Open loop.  [default: closed]")
@_option("--seed", type=int, default=1, help="The same seed draws the same keys.")
@_option(
    "--processes",
    type=click.IntRange(1, PROCESSES_MAX),
    help="That make the load.  [default: 2, or 1 on one core]",
)
@setting("--controllers", "--ctrl-peers", type=AddressesType(), help=CONTROLLERS_HELP)
@setting("--timeout", "timeout_s", type=Seconds(), default=str(TIMEOUT_S_DEFAULT), help="Of each request.")
@tls_options
@setting(
    "-o",
    "--output",
    type=click.Choice(["plain", "json", "table"], case_sensitive=False),
    default="plain",
    help="json is one object; the others are for people.",
)
@click.option(
    "--chart",
    "chart_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw it over time, too (pip install 'raftkv[chart]'); with that, a terminal shows a chart by itself.",
)
@click.option("--cleanup", is_flag=True, help="Delete all keys that begin with bench: afterwards.")
def bench(**options: Any) -> int:
    chart_path: Path | None = options["chart_path"]
    if chart_path is not None:
        if not chart.can_draw():
            raise LocalFailure(NO_CHART)
        if not chart_path.absolute().parent.is_dir():
            raise UsageError(f"--chart: there is no directory {chart_path.absolute().parent}")
    plan = _plan(options)
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    with _progress() if is_terminal else nullcontext(_nothing) as show:
        measured = _measure(plan, show)
    report = Report(measured)
    if options["output"] == "json":
        click.echo(json.dumps(report.as_object()))
    else:
        click.echo("\n".join(report.lines()))
        if is_terminal and chart.can_show():
            click.echo("\n" + chart.show(report, shutil.get_terminal_size().columns))
    if chart_path is not None:
        chart.draw(report, chart_path)
    _settle_keys(plan, options["cleanup"], is_terminal)
    if measured.interrupted:
        note("raftkv bench: interrupted; the report is of what was measured until then")
        return ExitCode.INTERRUPTED
    if not report.total.done:
        raise LocalFailure("bench: not one request succeeded; look at `raftkv-ctl Status`")
    return ExitCode.DONE


def _plan(options: dict[str, Any]) -> Plan:
    """The options as a value. Raise UsageError."""
    scenario = SCENARIOS[options["scenario"]]
    controllers = options["controllers"] or default_controllers()
    if not controllers:
        raise UsageError(NO_CONTROLLERS)
    if options["conflict"] is not None and scenario.conflict is None:
        usable = ", ".join(name for name, each in SCENARIOS.items() if each.conflict is not None)
        raise UsageError(f"--conflict is for {usable}, not for {options['scenario']}")
    if options["groups"] is not None and not scenario.by_group:
        usable = ", ".join(name for name, each in SCENARIOS.items() if each.by_group)
        raise UsageError(f"--groups is for {usable}, not for {options['scenario']}")
    processes = options["processes"] or min(2, os.cpu_count() or 1, options["clients"])
    if processes > options["clients"]:
        raise UsageError(f"--processes {processes}: there are only {options['clients']} clients to share out")
    conflict = options["conflict"]
    return Plan(
        scenario=options["scenario"],
        controllers=controllers,
        timeout_s=options["timeout_s"],
        clients=options["clients"],
        processes=processes,
        duration_s=options["duration"],
        warmup_s=options["warmup"],
        keys=options["keys"],
        value_bytes=options["value_size"],
        conflict=(scenario.conflict or 0.0) if conflict is None else conflict / 100,
        groups=options["groups"],
        batch=options["batch"],
        rate=options["rate"],
        seed=options["seed"],
        tls=_tls(options["tls_cert"], options["tls_key"], options["tls_ca"]),
    )


def _tls(cert: str | None, key: str | None, ca: str | None) -> tuple[str, str, str] | None:
    """The files, which have been looked at; None if none is given. Raise UsageError."""
    client_ssl(cert, key, ca)
    return (cert, key, ca) if cert and key and ca else None


def _measure(plan: Plan, show: Show) -> Measured:
    run = Run(plan, show)
    try:
        return interrupts.run(run.measure(), run.stop)
    except Stopped:
        raise LocalFailure(
            "bench: interrupted before anything was measured; keys that were loaded stay", ExitCode.INTERRUPTED
        ) from None
    except BadPlan as error:
        raise LocalFailure(f"bench: {error}") from None
    except LoadFailed as error:
        raise LocalFailure(f"bench: {error}", ExitCode.UNAVAILABLE if error.unavailable else ExitCode.REFUSED) from None
    except RaftKVError as error:
        raise LocalFailure(f"bench: {describe(error, controllers=plan.controllers)}", exit_code_of(error)) from None


def _settle_keys(plan: Plan, cleanup: bool, is_terminal: bool) -> None:
    """Delete the keys, or say that they are there."""
    prefix = KEY_PREFIX.decode()
    if not cleanup:
        note(f"raftkv bench: the keys {prefix}… are left for the next run; --cleanup deletes them")
        return
    with _progress() if is_terminal else nullcontext(_nothing) as show:
        try:
            deleted = interrupts.run(delete_keys(plan, show))
        except RaftKVError as error:
            raise LocalFailure(f"bench: keys {prefix}… are left: {error}", exit_code_of(error)) from None
    note(f"raftkv bench: deleted {deleted:,} keys {prefix}…")


def _nothing(what: str, done: float, total: float, text: str) -> None:
    """Nobody looks."""


def _progress() -> AbstractContextManager[Show]:
    """A bar on standard error, if that is a terminal too."""
    if sys.stderr is None or not sys.stderr.isatty():
        return nullcontext(_nothing)
    return _Bar()


class _Bar(AbstractContextManager[Show]):
    """A progress bar for one thing after the other; it goes in the end."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._progress.add_task("starting", total=None, text="")

    def __enter__(self) -> Show:
        self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, what: str, done: float, total: float, text: str) -> None:
        self._progress.update(self._task, description=what, completed=done, total=total, text=text)
