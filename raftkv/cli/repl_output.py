"""Where the shell's output goes: to the screen, through a pager when it is larger than that, or into a shell command.

Both are streams of bytes for a `Printer`, and both stream: `drain` waits until the reader keeps up. What is printed
before it is clear that the screen is too small waits for that, or for the end of the command.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping
from typing import BinaryIO, TypeVar, cast

from prompt_toolkit.utils import get_cwidth

from raftkv.cli.exit_codes import LocalFailure
from raftkv.cli.results import Lines, Pairs, Result

T = TypeVar("T")

LESS_OPTIONS = "FRX"
"""As `LESS`, if that is not set: don't wait for a key if it fits, let colours through, leave the text on the screen."""
KEPT_ROWS = 2
"""Of the screen, for the command and the next prompt."""


class Sink:
    """Standard output. The other sinks are like it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    @property
    def as_stream(self) -> BinaryIO:
        """What a Printer takes: it does nothing else with it."""
        return cast("BinaryIO", self)

    def isatty(self) -> bool:
        """Whether people look at it."""
        return self.stream.isatty()

    def write(self, data: bytes) -> int:
        """Take the bytes."""
        return self.stream.write(data)

    def flush(self) -> None:
        """A result, or a part of one, is complete."""
        self.stream.flush()

    async def drain(self) -> None:
        """Wait until more may be written. Raises BrokenPipeError when nobody reads any more."""

    async def finish(self) -> None:
        """The command is over; wait until whoever reads has read it."""


class IntoProcess(Sink):
    """Standard input of a process, once that runs."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self.process: Process | None = None

    def write(self, data: bytes) -> int:
        """Take the bytes. Raises BrokenPipeError."""
        assert self.process is not None and self.process.stdin is not None
        if self.process.stdin.is_closing():
            raise BrokenPipeError
        self.process.stdin.write(data)
        return len(data)

    def flush(self) -> None:
        """The process gets what it can take by itself."""

    async def drain(self) -> None:
        """Wait until the process has read most of it."""
        if self.process is not None and self.process.stdin is not None:
            try:
                await self.process.stdin.drain()
            except ConnectionResetError:
                raise BrokenPipeError from None

    async def finish(self) -> None:
        """Close its input and wait for its end."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()


class ShellPipe(IntoProcess):
    """`COMMAND | shell command`: the rest of the line is the shell's."""

    def __init__(self, stream: BinaryIO, command: str) -> None:
        super().__init__(stream)
        self._command = command

    def isatty(self) -> bool:
        """A command reads it."""
        return False

    async def start(self) -> None:
        """Start the shell."""
        self.process = await asyncio.create_subprocess_shell(self._command, stdin=PIPE)


class Paged(IntoProcess):
    """The screen, or a pager when the output is taller or wider than that."""

    def __init__(self, stream: BinaryIO, pager: list[str], size: Callable[[], os.terminal_size]) -> None:
        super().__init__(stream)
        self._pager = pager
        self._columns, rows = size()
        self._rows_left = rows - KEPT_ROWS
        self._waiting: list[bytes] = []
        self._too_large = False
        self._direct = False  # there is no pager: everything goes to the screen

    def write(self, data: bytes) -> int:
        """Take the bytes, and see whether they still fit."""
        if self._direct:
            return self.stream.write(data)
        if self.process is not None:
            return super().write(data)
        self._waiting.append(data)
        for line in data.removesuffix(b"\n").split(b"\n") if not self._too_large else ():
            width = get_cwidth(_shown(line)) if len(line) <= 8 * self._columns else len(line)
            self._rows_left -= 1
            self._too_large |= self._rows_left < 0 or width > self._columns
        return len(data)

    def flush(self) -> None:
        """Nothing is shown before it is known where."""
        if self._direct:
            self.stream.flush()

    async def drain(self) -> None:
        """Start the pager when it has become clear that it is needed; then wait until it keeps up."""
        if self._too_large and self.process is None and not self._direct:
            await self._start()
        await super().drain()

    async def finish(self) -> None:
        """Show what waits; if there is a pager, wait until its user has left it."""
        try:
            await self.drain()
        except BrokenPipeError:
            pass
        if self.process is None:
            self.stream.write(b"".join(self._waiting))
            self.stream.flush()
            self._waiting.clear()
        await super().finish()

    async def _start(self) -> None:
        environment = {"LESS": LESS_OPTIONS, **os.environ}
        waiting, self._waiting = self._waiting, []
        try:
            self.process = await asyncio.create_subprocess_exec(*self._pager, stdin=PIPE, env=environment)
        except OSError:
            self._direct = True
        self.write(b"".join(waiting))


_COLOUR = re.compile("\x1b\\[[0-9;]*m")


def _shown(line: bytes) -> str:
    """What takes room on the screen."""
    return _COLOUR.sub("", line.decode("utf-8", "replace"))


def find_pager(environment: Mapping[str, str]) -> list[str] | None:
    """`$PAGER`, or less or more, whichever there is; None if none is wanted (an empty PAGER, or cat)."""
    given = environment.get("PAGER")
    if given is None:
        return next(([name] for name in ("less", "more") if shutil.which(name)), None)
    try:
        words = shlex.split(given)
    except ValueError:
        words = []
    return words if words and words != ["cat"] else None


def paced(result: Result, sink: Sink, note_keys: Callable[[list[bytes]], None]) -> Result:
    """The result, whose parts come no faster than the sink takes them; tells which keys it shows."""
    if isinstance(result, Pairs):
        return Pairs(_paced(result.pairs, sink, lambda pair: note_keys([pair[0]])))
    if isinstance(result, Lines):
        return Lines(_paced(result.lines, sink, lambda line: None))
    return result


async def _paced(parts: AsyncIterator[T], sink: Sink, seen: Callable[[T], None]) -> AsyncIterator[T]:
    async for part in parts:
        seen(part)
        yield part
        await sink.drain()


def check_shell_command(command: str) -> None:
    """Raise LocalFailure unless there is something to run."""
    if not command:
        raise LocalFailure('no shell command stands behind the |; as a word it is written "|"')
