"""The display of `raftkv top` as rich's renderables: a head, a body of tables, a foot. Pure: samples in, lines out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, OverflowMethod, RenderableType, RenderResult
from rich.console import Group as Stack
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from raftkv.cli.exit_codes import one_line
from raftkv.cli.printers import ranges
from raftkv.cli.results import MoveHealth, ReplicaHealth, count
from raftkv.cli.top_poll import Group, Sample, rates

SORTS = ("group", "state", "lag", "rate", "ms")
KEYS = "q quit  s sort  r reverse  p pause  + - interval  ↑ ↓ scroll"
LAG_MANY = 1000
"""Entries behind the leader at which a replica is shown in yellow."""


@dataclass(slots=True)
class View:
    """How the user wants to see it."""

    sort: str = "group"
    reverse: bool = False
    paused: bool = False
    interval_s: float = 1.0
    first_line: int = 0  # of the body, at its top
    keys: bool = True  # there is a keyboard
    columns: int = 80  # of the screen


@dataclass(frozen=True, slots=True)
class Screenful:
    """Head, as much of the body as fits from `view.first_line` on, and foot; it takes the whole height."""

    head: RenderableType
    body: RenderableType
    foot: RenderableType
    view: View

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = max(1, options.max_height - 2)
        plain = options.update(height=None)
        lines = console.render_lines(self.body, plain, pad=False)
        self.view.first_line = max(0, min(self.view.first_line, len(lines) - height))
        shown = lines[self.view.first_line : self.view.first_line + height]
        yield from _line(console, self.head, plain)
        yield Segment.line()
        for line in shown:
            yield from line
            yield Segment.line()
        for _ in range(height - len(shown)):
            yield Segment.line()
        more = len(lines) - self.view.first_line - len(shown)
        yield from _line(console, Text(f"… {count(more, 'line')} below   {KEYS}", "dim") if more else self.foot, plain)


def _line(console: Console, renderable: RenderableType, options: ConsoleOptions) -> Sequence[Segment]:
    """The first line of it."""
    return console.render_lines(renderable, options, pad=False)[0]


def screenful(before: Sample | None, now: Sample, age_s: float, error: str, clock: str, view: View) -> Screenful:
    """One display; `before` is the sample that rates count from, `error` why the last poll brought nothing."""
    keys = KEYS if view.keys else "Ctrl-C quits"
    return Screenful(_head(now, age_s, error, clock, view), body(before, now, view), Text(keys, "dim"), view)


def _head(now: Sample, age_s: float, error: str, clock: str, view: View) -> Text:
    number = now.health.config_number
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append("raftkv top", "bold")
    head.append(f"  {clock}  configuration {'unknown' if number is None else f'#{number}'}  ")
    problems = now.health.problems
    if error:
        head.append(f"NO ANSWER for {age_s:.0f} s: {one_line(error)}", "bold red")
        return head
    head.append(f"UNHEALTHY: {count(len(problems), 'problem')}" if problems else "healthy", _colour(not problems))
    if view.paused:
        head.append("  PAUSED", "bold yellow")
    elif age_s > 2 * view.interval_s + 1:
        head.append(f"  {age_s:.0f} s old", "yellow")
    head.append(f"  by {view.sort}{' reversed' if view.reverse else ''}, every {view.interval_s:g} s")
    return head


def body(before: Sample | None, now: Sample, view: View) -> RenderableType:
    """All tables."""
    speed = rates(before, now)
    parts: list[RenderableType] = [Text(f"UNHEALTHY: {one_line(text)}", "red") for text in now.health.problems]
    if parts:
        parts.append(Text())
    parts += [_replicas(now, speed, view), Text(), _shards(now, speed)]
    if now.health.moves:
        parts += [Text(), _moves(now.health.moves)]
    load = now.load
    oldest = f", the oldest for {load.oldest_s:.1f} s" if load.open else ""
    parts += [
        Text(),
        Text(f"transactions: {load.open} open over several groups{oldest}"),
        Text(f"locks: {load.prepared} prepared, {count(load.locked_keys, 'key')} explicitly, {load.waiting} waiting"),
    ]
    return Stack(*parts)


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in columns:
        gives = name in _GIVE_WAY
        overflow: OverflowMethod = "fold" if name == "WHICH" else "ellipsis"
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=not gives, overflow=overflow)
    return table


_GIVE_WAY = ("ADDRESS", "WAITS FOR", "WHICH")
"""Columns that become narrower where there is no room for all."""


NARROW = 72
"""Columns of a screen that has no room for all of a replica's numbers."""


def _replicas(now: Sample, speed: Mapping[Group, float], view: View) -> Table:
    numbers = ("ID", "TERM", "COMMIT", "LAG", "PER S", "MS")
    left_out = ("TERM", "COMMIT", "MS") if view.columns < NARROW else ()
    names = ("GROUP", "ID", "ADDRESS", "STATE", "TERM", "COMMIT", "LAG", "PER S", "MS")
    table = _table(*(name for name in names if name not in left_out), numbers=numbers)
    for replica in _sorted(now, speed, view):
        latency_s = now.latencies_s.get(replica.address)
        leads = replica.state == "leader"
        cells: list[str | Text] = [
            _name(replica),
            _number(replica.replica),
            replica.address,
            Text(replica.state, _state_colour(replica.state)),
            _number(replica.term),
            _number(replica.commit_index),
            Text(_number(replica.lag), "yellow" if (replica.lag or 0) >= LAG_MANY else ""),
            _rate(speed.get((replica.role, replica.gid))) if leads else "",
            "-" if latency_s is None else f"{1000 * latency_s:.1f}",
        ]
        table.add_row(*(cell for name, cell in zip(names, cells, strict=True) if name not in left_out))
    return table


def _sorted(now: Sample, speed: Mapping[Group, float], view: View) -> list[ReplicaHealth]:
    """The replicas, the greatest first; what is down has neither lag nor latency, and stands before the others."""
    replicas = list(now.health.replicas)
    infinite = float("inf")
    if view.sort == "state":
        order = ("down", "unformed", "candidate", "precandidate", "leader")
        replicas.sort(key=lambda each: order.index(each.state) if each.state in order else len(order))
    elif view.sort == "lag":
        replicas.sort(key=lambda each: infinite if each.lag is None else each.lag, reverse=True)
    elif view.sort == "rate":
        replicas.sort(key=lambda each: speed.get((each.role, each.gid), -1.0), reverse=True)
    elif view.sort == "ms":
        replicas.sort(key=lambda each: now.latencies_s.get(each.address, infinite), reverse=True)
    return replicas[::-1] if view.reverse else replicas


def _shards(now: Sample, speed: Mapping[Group, float]) -> Table:
    table = _table("GROUP", "SHARDS", "STATE", "PER S", "WHICH", numbers=("SHARDS", "PER S"))
    by_group: dict[tuple[int, str], list[int]] = {}
    for shard in now.health.shards:
        by_group.setdefault((shard.gid, shard.state), []).append(shard.shard)
    rows = {**{(replica.gid, "-"): [] for replica in now.health.replicas if replica.gid is not None}, **by_group}
    served = {gid for gid, _ in by_group}
    for (gid, state), shards in sorted(rows.items()):
        if not shards and gid in served:
            continue
        rate = _rate(speed.get(("shardkv", gid))) if state == "serving" else ""
        shown = Text(state, "" if state in ("serving", "-") else "yellow")
        table.add_row(str(gid) if gid else "none", str(len(shards)), shown, rate, ranges(shards) or "-")
    return table


def _moves(moves: Sequence[MoveHealth]) -> Table:
    table = _table("SHARD", "FROM", "TO", "PHASE", "BYTES", "SECONDS", "WAITS FOR", numbers=("BYTES", "SECONDS"))
    for move in moves:
        age = "-" if move.age_s is None else f"{move.age_s:.0f}"
        waits = Text(one_line(move.waits_for or move.slowed_by or "-"), "red" if move.waits_for else "")
        table.add_row(*map(str, (move.shard, move.source, move.target)), move.phase, f"{move.size_bytes:,}", age, waits)
    return table


def _name(replica: ReplicaHealth) -> str:
    name = replica.role if replica.gid is None else str(replica.gid)
    return f"{name} (left)" if replica.has_left else name


def _number(number: int | None) -> str:
    return "-" if number is None else str(number)


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _colour(well: bool) -> str:
    return "green" if well else "bold red"


def _state_colour(state: str) -> str:
    return {"leader": "bold green", "follower": "", "down": "bold red"}.get(state, "yellow")
