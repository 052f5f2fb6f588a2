"""The shell in this process, on keys from a pipe and a screen in memory, in front of an SDK in memory."""

from __future__ import annotations

import asyncio
import io
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyte
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output.vt100 import Vt100_Output

from raftkv.cli import repl
from raftkv.cli.exit_codes import ExitCode
from raftkv.cli.printers import Printer
from tests.cli.fakes import Fakes, Shell

COLUMNS, LINES = 100, 30
WAIT_S = 20.0
UP, RIGHT, TAB, ENTER = "\x1b[A", "\x1b[C", "\t", "\r"
CTRL_C, CTRL_D, CTRL_R = "\x03", "\x04", "\x12"
PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"


class Screen(io.StringIO):
    """What a terminal shows of text and bytes that are written to it."""

    def __init__(self) -> None:
        super().__init__()
        self._display = pyte.HistoryScreen(COLUMNS, LINES)
        self._stream = pyte.Stream(self._display)
        self.raw = ""
        self._lines: list[str] | None = None

    def write(self, text: str) -> int:
        """Text, of prompt_toolkit or on standard error."""
        self.raw += text
        self._lines = None
        self._stream.feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))
        return len(text)

    def lines(self) -> list[str]:
        """Without the empty ones at the end."""
        if self._lines is None:
            self._lines = [line.rstrip() for line in self._display.display]
            while self._lines and not self._lines[-1]:
                self._lines.pop()
        return self._lines


class Bytes(io.BytesIO):
    """Standard output: to the screen, and kept."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """The bytes of results."""
        self._screen.write(data.decode("utf-8", "replace"))
        return super().write(data)


class Rig:
    """A shell that runs, and what its user does and sees."""

    def __init__(self, program: str, state_home: Path, environment: Mapping[str, str], keys: PipeInput) -> None:
        made = Shell(program, "table")
        self.fakes: Fakes = made.fakes
        self.fakes.controllers_client.statuses = {"c:1": {"state": "leader", "term": 1}}
        self.screen = Screen()
        self.out = Bytes(self.screen)
        self.session = made.session
        self._keys = keys
        output = Vt100_Output(self.screen, lambda: Size(LINES, COLUMNS), term="xterm", enable_cpr=False)
        self.shell = repl.Shell(
            self.session,
            Printer("table", cast("BinaryIO", self.out), nil=True),
            made.table,
            {"XDG_STATE_HOME": str(state_home), "PAGER": "", **environment},
            source=keys,
            screen=output,
        )

    def type(self, text: str) -> None:
        """Press keys."""
        self._keys.send_text(text)

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait; fails with the screen when it takes too long."""
        deadline_s = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < deadline_s, "\n".join(self.screen.lines())
            await asyncio.sleep(0.005)

    async def until_last(self, line: str) -> None:
        """Wait until that is the last line on the screen."""
        await self.until(lambda: self.screen.lines()[-1:] == [line])

    async def ask(self, line: str, prompt: str = "") -> list[str]:
        """Type a line; what is shown between it and the next prompt."""
        before = self.screen.raw.count("\x1b[?2004h")  # each prompt turns bracketed paste on
        self.type(line + ENTER)
        prompt = prompt or f"{self.session.settings.program} c:1>"
        await self.until(lambda: self.screen.raw.count("\x1b[?2004h") > before)
        await self.until(lambda: self.screen.lines()[-1:] == [prompt])
        lines = self.screen.lines()
        typed = max(i for i, shown in enumerate(lines) if shown.endswith(f"> {line}".rstrip()))
        return lines[typed + 1 : -1]


@asynccontextmanager
async def at_the_prompt(
    state_home: Path,
    program: str = "raftkv-kv",
    prepare: Callable[[Rig], None] = lambda rig: None,
    **environment: str,
) -> AsyncIterator[Rig]:
    """A shell at its first prompt; it has to end by itself within a moment when it is left."""
    before, stderr = signal.getsignal(signal.SIGINT), sys.stderr
    with create_pipe_input() as keys:
        rig = Rig(program, state_home, environment, keys)
        prepare(rig)
        sys.stderr = rig.screen
        try:
            running = asyncio.get_running_loop().create_task(rig.shell.run())
            await rig.until(lambda: rig.screen.lines()[1:])
            yield rig
            if not running.done():
                rig.type(CTRL_C + CTRL_D)
            async with asyncio.timeout(WAIT_S):
                assert await running is ExitCode.DONE
        finally:
            sys.stderr = stderr
            signal.signal(signal.SIGINT, before)
