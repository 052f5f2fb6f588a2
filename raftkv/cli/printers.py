"""Results as bytes on standard output: plain (exact), json (one object a line), table (for people).

Standard output carries data only; notices and errors go to standard error, in `note`. Each result is
flushed before the next command is read, so that another program can drive a script line by line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, BinaryIO

from raftkv.cli.exit_codes import ExitCode, LocalFailure, one_line
from raftkv.cli.results import (
    ClusterHealth,
    Configuration,
    Done,
    Found,
    Lines,
    Missing,
    MoveHealth,
    Moves,
    Pairs,
    ReplicaHealth,
    Result,
    Text,
    Transactions,
    count,
)
from raftkv.cli.words import escape_bytes

CELL_CHARS_MAX = 200
OUTPUTS = ("plain", "json", "table")

_Whole = Done | Found | Missing | Configuration | Moves | ClusterHealth | Transactions
"""What isn't streamed."""


class OutputClosed(Exception):
    """Nobody reads standard output any more."""


class Printer:
    """Shows results in one of the three forms."""

    def __init__(self, output: str, stream: BinaryIO, *, nil: bool = False) -> None:
        assert output in OUTPUTS
        self.output = output
        self.nil = nil  # the REPL shows a missing key as (nil)
        self._stream = stream
        self._colours = colours_wanted(stream, os.environ)

    async def show(self, result: Result, output: str | None = None) -> ExitCode:
        """Print and flush one result; the exit code that it stands for. Raises OutputClosed, LocalFailure."""
        try:
            return await self._show(result, output or self.output)
        finally:  # what was shown before an error too, since the error may say how to go on after it
            try:
                self._stream.flush()
            except OSError as error:
                raise _cannot_write(error) from None

    async def _show(self, result: Result, form: str) -> ExitCode:
        if isinstance(result, Pairs):
            await self._pairs(result, form)
            return ExitCode.DONE
        if isinstance(result, Lines):
            async for line in result.lines:
                self._line(line)
            return ExitCode.DONE
        if isinstance(result, Text):
            self._line(result.text.encode())
            return ExitCode.DONE
        if form == "json":
            self._line(_json(_as_object(result)))
        else:
            self._people(result, form)
        if isinstance(result, Missing):
            return ExitCode.NOT_FOUND
        if isinstance(result, ClusterHealth) and result.problems:
            return ExitCode.UNHEALTHY
        if isinstance(result, Transactions) and result.unanswered:
            return ExitCode.UNHEALTHY
        return ExitCode.DONE

    def _people(self, result: _Whole, form: str) -> None:
        """The plain and table forms of what isn't streamed."""
        if isinstance(result, Done):
            self._line(result.text.encode())
        elif isinstance(result, Found):
            self._line(result.value if form == "plain" else printable(result.value).encode())
        elif isinstance(result, Missing):
            if self.nil:
                self._line(b"(nil)")
        elif isinstance(result, Configuration):
            if form == "plain":
                self._line(f"Config #{result.shard_map.num}: {result.shard_map}".encode())
            else:
                self._line("\n".join(_configuration_table(result)).encode())
        elif isinstance(result, Moves):
            rows = [[str(number) for number in move] for move in result.moves]
            lines = ["\t".join(row) for row in rows] if form == "plain" else table(["SHARD", "FROM", "TO"], rows)
            for line in lines:
                self._line(line.encode())
        elif isinstance(result, Transactions):
            self._line("\n".join(_transaction_lines(result)).encode())
        else:
            lines = _health_lines(result)
            if form == "table" and self._colours:
                lines = [_coloured(line) for line in lines]
            self._line("\n".join(lines).encode())

    async def _pairs(self, result: Pairs, form: str) -> None:
        """Keys and values as they come."""
        async for key, value in result.pairs:
            if form == "json":
                self._line(_json({"key": json_bytes(key), "value": json_bytes(value)}))
            elif form == "plain":
                self._line(escape_bytes(key) + b"\t" + escape_bytes(value))
            else:
                self._line(f"{_cell(key):<24}  {_cell(value)}".encode())

    def _line(self, data: bytes) -> None:
        try:
            self._stream.write(data + b"\n")
        except OSError as error:
            raise _cannot_write(error) from None

    @property
    def stream(self) -> BinaryIO:
        """Where it prints."""
        return self._stream

    def onto(self, stream: BinaryIO, output: str) -> Printer:
        """Another one that prints to `stream`, in that form."""
        return Printer(output, stream, nil=self.nil)


def _cannot_write(error: OSError) -> Exception:
    """What a failed write to standard output means."""
    if isinstance(error, BrokenPipeError):
        return OutputClosed()
    return LocalFailure(f"can't write to standard output: {error.strerror}")


def note(text: str) -> None:
    """One line on standard error; never fails because nobody reads it."""
    if sys.stderr is None:
        return  # print would take standard output instead
    try:
        print(one_line(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def settle_stdout() -> None:
    """If what is still buffered can't be written, drop it, so that the interpreter's last flush can't fail."""
    try:
        sys.stdout.flush()
        return
    except (OSError, ValueError):
        pass
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
    except (OSError, ValueError):
        pass


def json_bytes(data: bytes) -> str | dict[str, str]:
    """Text where it is UTF-8, else {"b64": …}."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        import base64

        return {"b64": base64.b64encode(data).decode("ascii")}


def printable(data: bytes) -> str:
    """Bytes for a terminal: UTF-8 text as it is, anything that could steer the terminal escaped."""
    text = data.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(map(_printable_char, text))


def _cell(data: bytes) -> str:
    """Bytes as a cell of a table for people: cut when long. The other forms are whole."""
    text = printable(data[:CELL_CHARS_MAX])
    if len(data) <= CELL_CHARS_MAX and len(text) <= CELL_CHARS_MAX:
        return text
    return f"{text[:CELL_CHARS_MAX]}… ({len(data)} bytes)"


def _printable_char(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")


def _json(value: Mapping[str, Any]) -> bytes:
    import json

    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def _as_object(result: _Whole) -> dict[str, Any]:
    """The JSON object of a result."""
    if isinstance(result, Done):
        return {"ok": True, **result.fields}
    if isinstance(result, Found):
        return {"key": json_bytes(result.key), "value": json_bytes(result.value), "version": result.version}
    if isinstance(result, Missing):
        return {"key": json_bytes(result.key), "value": None}
    if isinstance(result, Configuration):
        shown = result.shard_map
        groups = {str(gid): list(shown.groups[gid]) for gid in sorted(shown.groups)}
        return {"num": shown.num, "shards": list(shown.owners), "groups": groups}
    if isinstance(result, Moves):
        return {"moves": [{"shard": shard, "from": old, "to": new} for shard, old, new in result.moves]}
    if isinstance(result, Transactions):
        return _transactions_object(result)
    return {
        "healthy": not result.problems,
        "problems": list(result.problems),
        "config": result.config_number,
        "replicas": [
            {
                "role": replica.role,
                "gid": replica.gid,
                "id": replica.replica,
                "addr": replica.address,
                "state": replica.state,
                "term": replica.term,
                "commit_index": replica.commit_index,
                "applied_index": replica.applied_index,
                "lag": replica.lag,
                "left": replica.has_left,
            }
            for replica in result.replicas
        ],
        "shards": [{"shard": shard.shard, "gid": shard.gid, "state": shard.state} for shard in result.shards],
        "migrations": [
            {
                "shard": move.shard,
                "from": move.source,
                "to": move.target,
                "config": move.config_number,
                "phase": move.phase,
                "bytes": move.size_bytes,
                "age_s": move.age_s,
                "waits_for": move.waits_for,
                "slowed_by": move.slowed_by,
            }
            for move in result.moves
        ],
    }


def _configuration_table(result: Configuration) -> list[str]:
    """A configuration for people: a row a group."""
    shown = result.shard_map
    rows = [
        [str(gid), ranges(shown.shards_of(gid)) or "-", " ".join(shown.groups[gid])] for gid in sorted(shown.groups)
    ]
    if not rows:
        return [f"Configuration {shown.num}: no groups, {shown.shards} shards without an owner"]
    return [f"Configuration {shown.num}", *table(["GROUP", "SHARDS", "ADDRESSES"], rows)]


def _health_lines(health: ClusterHealth) -> list[str]:
    """The cluster's health for people; the plain form too: fields are separated by two spaces or more."""
    rows = [_replica_row(replica) for replica in health.replicas]
    lines = table(["GROUP", "ID", "ADDRESS", "STATE", "TERM", "COMMIT", "APPLIED", "LAG"], rows)
    number = "unknown" if health.config_number is None else f"#{health.config_number}"
    lines += ["", f"Configuration {number}"]
    by_group: dict[tuple[int, str], list[int]] = {}
    for shard in health.shards:
        by_group.setdefault((shard.gid, shard.state), []).append(shard.shard)
    if by_group:
        shard_rows = [
            [str(gid) if gid else "-", state, ranges(shards)] for (gid, state), shards in sorted(by_group.items())
        ]
        lines += table(["GROUP", "STATE", "SHARDS"], shard_rows)
    if health.moves:
        lines += [
            "",
            *table(["SHARD", "FROM", "TO", "PHASE", "BYTES", "SECONDS", "WAITS FOR"], map(_move_row, health.moves)),
        ]
    lines.append("")
    if health.problems:
        lines += [f"UNHEALTHY: {problem}" for problem in health.problems]
    else:
        lines.append("healthy")
    return lines


_COLOURS = {"down": 31, "UNHEALTHY:": 31, "unformed": 33, "waiting": 33, "arriving": 33, "healthy": 32, "leader": 1}
"""Escape codes of lines by what stands in them."""


def _coloured(line: str) -> str:
    """A line of Status, the whole of it in the colour of its state; after `UNHEALTHY:` anything may stand."""
    words = line.split()
    found = words[0] if words[:1] == ["UNHEALTHY:"] else next((word for word in words if word in _COLOURS), None)
    return line if found is None else f"\x1b[{_COLOURS[found]}m{line}\x1b[0m"


def colours_wanted(stream: IO[Any], environment: Mapping[str, str]) -> bool:
    """Whether it is a terminal that can show them, and nobody has said NO_COLOR (no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM", "dumb") != "dumb"


def _transactions_object(result: Transactions) -> dict[str, Any]:
    return {
        "transactions": [
            {
                "txid": txn.txid,
                "state": txn.state,
                "coordinator": txn.coordinator,
                "shards": list(txn.shards),
                "age_s": txn.age_s,
            }
            for txn in result.transactions
        ],
        "locks": [
            {
                "txid": lock.txid,
                "gid": lock.gid,
                "shard": lock.shard,
                "kind": lock.kind,
                "keys": [json_bytes(key) for key in lock.keys],
                "age_s": lock.age_s,
            }
            for lock in result.locks
        ],
        "unlisted": list(result.unlisted),
        "unanswered": list(result.unanswered),
    }


def _transaction_lines(result: Transactions) -> list[str]:
    """What is open, for people; the plain form too. Keys come last: they may hold anything printable."""
    lines: list[str] = []
    if result.transactions:
        rows = [
            [txn.txid, txn.state, str(txn.coordinator), ranges(txn.shards), f"{txn.age_s:.0f}"]
            for txn in result.transactions
        ]
        lines += [*table(["TXID", "STATE", "COORDINATOR", "SHARDS", "SECONDS"], rows), ""]
    if result.locks:
        rows = [
            [lock.txid, str(lock.gid), str(lock.shard), lock.kind, f"{lock.age_s:.0f}", " ".join(map(_cell, lock.keys))]
            for lock in result.locks
        ]
        lines += [*table(["TXID", "GROUP", "SHARD", "LOCKS", "SECONDS", "KEYS"], rows), ""]
    lines += [f"not listed: {text}" for text in result.unlisted]
    lines += [f"UNKNOWN: no leader of {name} answers" for name in result.unanswered]
    if not result.unanswered and not result.unlisted:
        holders = {lock.txid for lock in result.locks}
        number = count(len(result.transactions), "open transaction")
        lines.append(f"{number} over several groups; {count(len(holders), 'transaction')} with locks")
    return lines


def _replica_row(replica: ReplicaHealth) -> list[str]:
    name = replica.role if replica.gid is None else str(replica.gid)
    if replica.has_left:
        name += " (left)"
    numbers = [replica.replica, replica.term, replica.commit_index, replica.applied_index, replica.lag]
    shown = ["-" if number is None else str(number) for number in numbers]
    return [name, shown[0], replica.address, replica.state, *shown[1:]]


def _move_row(move: MoveHealth) -> list[str]:
    numbers = [str(number) for number in (move.shard, move.source, move.target)]
    age = "-" if move.age_s is None else f"{move.age_s:.0f}"
    return [*numbers, move.phase, str(move.size_bytes), age, one_line(move.waits_for or move.slowed_by or "-")]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns, two spaces between them."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return ["  ".join(cells).rstrip() for cells in padded]


def ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    parts: list[str] = []
    ordered = sorted(numbers)
    start = 0
    for position, number in enumerate(ordered):
        if position + 1 == len(ordered) or ordered[position + 1] != number + 1:
            parts.append(str(number) if position == start else f"{ordered[start]}-{number}")
            start = position + 1
    return ",".join(parts)
