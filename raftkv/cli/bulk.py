"""`Import` and `Export`: many pairs from a file, many pairs as the lines of one.

An import has up to IN_FLIGHT writes under way, those on one key in the file's order. It ends at the first line that
can't be read or written, and says how many lines from the start are in: whatever ended it, it can go on after them,
and it may be repeated from there or from the start, since each line just stores its value again.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import stat
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TextIO

from raftkv.cli.command_table import Argument, Call, Command, Option, parse_count
from raftkv.cli.exit_codes import ExitCode, LocalFailure, UsageError, describe, exit_code_of
from raftkv.cli.lines import LineReader, LineTooLong
from raftkv.cli.pair_lines import DECODERS, ENCODERS, FORMS, BadLine, form_of
from raftkv.cli.progress import Show, progress
from raftkv.cli.results import Done, Lines, Result, count
from raftkv.cli.words import escape_exactly, show_word, unescape

if TYPE_CHECKING:
    from raftkv.cli.session import KvClient, Session

IN_FLIGHT = 256
IN_FLIGHT_BYTES = 16 * 1024 * 1024
"""Of lines, beyond which no other is begun: 256 of the longest would be gigabytes."""
SHOWN_EVERY = 64
STDIN = 0
PATH_MAX = 4096


class _Write(NamedTuple):
    """A line whose write is under way; what it stands for is read when the file is read up to `end_bytes`."""

    line_number: int
    end_bytes: int
    size_bytes: int
    key: bytes
    task: asyncio.Task[int]


class Import:
    """One run over the lines of a descriptor: `lines` are in, from the file's start on, and `pairs` were written."""

    def __init__(self, client: KvClient, form: str | None, from_line: int, show: Show) -> None:
        self.lines = from_line - 1
        self.pairs = 0
        self._client = client
        self._form = form
        self._from_line = from_line
        self._show = show
        self._line_number = 0
        self._read_bytes = 0
        self._in_flight_bytes = 0
        self._writes: deque[_Write] = deque()
        self._last_on_key: dict[bytes, asyncio.Task[int]] = {}

    async def run(self, descriptor: int) -> None:
        """Raise BadLine, the SDK's error of the first line that could not be written, UsageError or OSError."""
        reader = LineReader(descriptor)
        try:
            while True:
                try:
                    line = reader.buffered()
                except LineTooLong as error:
                    self._line_number += 1
                    raise await self._after_the_others(BadLine(str(error))) from None
                if line is not None:
                    await self._take(line)
                elif not await self._more(reader):
                    break
            while (line := reader.buffered()) is not None:  # the last line may lack its end
                await self._take(line)
            while self._writes:
                await self._finish_first()
            if self._line_number < self._from_line - 1:
                raise UsageError(f"--from-line {self._from_line}: the file has {count(self._line_number, 'line')} only")
        except asyncio.CancelledError:
            with suppress(Exception):
                self._finish_done()
            raise
        finally:
            tasks = [write.task for write in self._writes]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def failed_line(self) -> int:
        """The number of the line that ended it: the one after those that are in, blank ones left out."""
        return self._writes[0].line_number if self._writes else self._line_number

    async def _more(self, reader: LineReader) -> bool:
        """Wait for more of the file; False at its end. A write that fails meanwhile ends it: a pipe may be slow."""
        reading = asyncio.get_running_loop().create_task(reader.more())
        try:
            while not reading.done():
                self._finish_done()
                first = [write.task for write in islice(self._writes, 1)]
                await asyncio.wait([reading, *first], return_when=asyncio.FIRST_COMPLETED)
            return reading.result()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _take(self, line: bytes) -> None:
        """Begin to write a line, when one of the writes before has made room."""
        self._line_number += 1
        size_bytes = len(line)
        self._read_bytes += size_bytes
        line = line.removesuffix(b"\n")
        if self._line_number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # what some editors put before the text
        if self._line_number < self._from_line or not line.strip(b" \r"):
            return
        try:
            self._form = self._form or form_of(line)
            key, value = DECODERS[self._form](line)
        except BadLine as error:
            raise await self._after_the_others(error) from None
        self._finish_done()
        while len(self._writes) >= IN_FLIGHT or self._in_flight_bytes > IN_FLIGHT_BYTES:
            await self._finish_first()
        before = self._last_on_key.get(key)
        task = asyncio.get_running_loop().create_task(self._put(key, value, before))
        self._last_on_key[key] = task
        self._writes.append(_Write(self._line_number, self._read_bytes, size_bytes, key, task))
        self._in_flight_bytes += size_bytes

    async def _put(self, key: bytes, value: bytes, before: asyncio.Task[int] | None) -> int:
        if before is not None:
            await before
        return await self._client.put(key, value)

    async def _finish_first(self) -> None:
        await asyncio.wait([self._writes[0].task])
        self._finish_done()

    def _finish_done(self) -> None:
        """Count the first ones that are done."""
        while self._writes and self._writes[0].task.done():
            write = self._writes[0]
            write.task.result()
            self._writes.popleft()
            self._in_flight_bytes -= write.size_bytes
            if self._last_on_key.get(write.key) is write.task:
                del self._last_on_key[write.key]
            self.lines, self.pairs = write.line_number, self.pairs + 1
            if self.pairs % SHOWN_EVERY == 0:
                self._show(write.end_bytes, count(self.pairs, "pair"))

    async def _after_the_others(self, error: BadLine) -> BadLine:
        """The lines before the bad one are written first; if that fails, it is what is raised."""
        while self._writes:
            await self._finish_first()
        return error


async def import_file(session: Session, call: Call) -> Result:
    """Store the pairs of a file."""
    session.refuse_inside(call)
    name = call.words[0]
    client = session.kv(call.options)
    descriptor = _open(session, name)
    try:
        size = os.fstat(descriptor)
        total = size.st_size if stat.S_ISREG(size.st_mode) else None
        with progress(str(call), total, counted=False) as show:
            run = Import(client, call.options.get("format"), call.options.get("from_line", 1), show)
            try:
                await run.run(descriptor)
            except asyncio.CancelledError:
                session.go_on = _go_on(run)
                raise
            except UsageError:
                raise
            except Exception as error:
                raise _failure(session, call, run, error) from None
    finally:
        if descriptor != STDIN:
            os.close(descriptor)
    return Done({"pairs": run.pairs, "lines": run.lines})


def _open(session: Session, name: bytes) -> int:
    """The descriptor of the file. Raises UsageError."""
    if name == b"-":
        if not session.one_shot:
            raise UsageError("Import: - is standard input, where this line came from: give a file")
        if sys.stdin is None:
            raise UsageError("Import: standard input is closed: give a file")
        return STDIN
    try:
        descriptor = os.open(os.fsdecode(name), os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"Import: can't read {show_word(name, PATH_MAX)}: {reason}; - is standard input") from None
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"Import: {show_word(name, PATH_MAX)} is a directory: give a file, or - for standard input")
    return descriptor


def _failure(session: Session, call: Call, run: Import, error: Exception) -> LocalFailure:
    """What ended it, at which line, and how it goes on."""
    where = f"{call}: line {run.failed_line}"
    go_on = _go_on(run)
    if isinstance(error, BadLine):
        return LocalFailure(f"{where}: {error}; {go_on}", ExitCode.USAGE)
    if isinstance(error, OSError):
        return LocalFailure(f"{call}: can't read it: {error.strerror}; {go_on}")
    text = describe(error, controllers=session.settings.controllers)
    return LocalFailure(f"{where}: {text}; {go_on}", exit_code_of(error))


def _go_on(run: Import) -> str:
    """It doesn't name the other options, which may hold anything: the same command has them."""
    if run.lines == 0:
        return "no line is known to be in: start again"
    return (
        f"the lines up to {run.lines} are in, others may be: the same command with --from-line {run.lines + 1} goes on"
    )


async def export(session: Session, call: Call) -> Result:
    """Pairs as lines."""
    session.refuse_inside(call)
    prefix = call.words[0] if call.words else b""
    output = call.options.get("output", session.settings.output)
    form = call.options.get("format") or ("jsonl" if output == "json" else "tsv")
    return Lines(_exported(session, call, prefix, form))


async def _exported(session: Session, call: Call, prefix: bytes, form: str) -> AsyncIterator[bytes]:
    from raftkv.protocol.errors import RaftKVError

    encode = ENCODERS[form]
    last: bytes | None = call.options.get("after")
    number = size_bytes = 0
    with progress(str(call), None, counted=False, wanted=_is_file(sys.stdout)) as show:
        try:
            async for key, found in session.kv(call.options).scan(prefix, after=last):
                line = encode(key, found.value)
                yield line
                last, number, size_bytes = key, number + 1, size_bytes + len(line) + 1
                if number % SHOWN_EVERY == 0:
                    show(size_bytes, f"{count(number, 'pair')}, {size_bytes / 1e6:.1f} MB")
        except asyncio.CancelledError:
            session.go_on = _go_on_after(last)
            raise
        except RaftKVError as error:
            text = describe(error, controllers=session.settings.controllers)
            raise LocalFailure(f"{call}: {text}; {_go_on_after(last)}", exit_code_of(error)) from None


def _is_file(stream: TextIO | None) -> bool:
    """Whether it is a regular file: at the end of a pipe may be a pager, whose screen a bar would spoil."""
    try:
        return stream is not None and stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _go_on_after(last: bytes | None) -> str:
    import shlex

    if last is None:
        return "no pair was read: start again"
    after = shlex.quote(escape_exactly(last).decode("ascii").replace("'", "\\x27"))
    return f"the same command with --after {after}, its output appended (>>), goes on"


def _parse_form(text: str) -> str:
    if text.lower() not in FORMS:
        raise ValueError(f"{text!r} is not one of {', '.join(FORMS)}")
    return text.lower()


def _parse_key(text: str) -> bytes:
    return unescape(text.encode("utf-8", "surrogateescape"))


_FORMS_HELP = (
    "tsv is KEY<TAB>VALUE, where \\\\ \\n \\r \\t \\0 \\xHH stand for other bytes;\n"
    'jsonl is {"key": …, "value": …}, where what isn\'t UTF-8 is {"b64": "…"}. Both are exact for any bytes.'
)

BULK_COMMANDS = (
    Command(
        "Import",
        "store the pairs of FILE, one a line (- is standard input)",
        import_file,
        (Argument("FILE", completes="files"),),
        (
            Option(
                ("--format",),
                "tsv or jsonl; otherwise what its first line is",
                _parse_form,
                "FORM",
                variable=False,
                choices=FORMS,
            ),
            Option(("--from-line",), "begin there: the first is 1", parse_count, "N", variable=False),
        ),
        f"{_FORMS_HELP}\n"
        "It stores as Put does, over whatever is there, many lines at a time, those of one key in order. If it ends\n"
        "early it says how it goes on; to do lines again does no harm, unless somebody else has written meanwhile.",
        ("Import pairs.tsv", "Import pairs.jsonl --from-line 20001", "Import -"),
        writes=True,
    ),
    Command(
        "Export",
        "print keys that begin with PREFIX and their values as lines that Import reads",
        export,
        (Argument("PREFIX", required=False, completes="keys"),),
        (
            Option(
                ("--format",), "tsv (if nothing is said) or jsonl", _parse_form, "FORM", variable=False, choices=FORMS
            ),
            Option(("--after",), "only keys after KEY, written as in a tsv", _parse_key, "KEY", variable=False),
        ),
        f"{_FORMS_HELP}\n"
        "In key order over all shards, streamed; each shard is read linearizably, not all at one instant.\n"
        "From a shell: raftkv-kv export > all.tsv",
        ("Export", "Export user: --format jsonl", "Export --after user:4711"),
    ),
)
