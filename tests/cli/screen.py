"""Any program on a pseudo-terminal, read from its screen as a user reads it; `terminal.py` is that for shells."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

from tests.cli.clusters import BIN, clean_environment

COLUMNS, LINES = 80, 24


class Screen:
    """A program and its screen."""

    def __init__(
        self,
        program: str,
        *arguments: str,
        columns: int = COLUMNS,
        lines: int = LINES,
        cwd: Path | None = None,
        **environment: str,
    ) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.Stream(self._screen)
        self.written = ""
        """Everything that came, escape sequences too."""
        self.child: pexpect.spawn[str] = pexpect.spawn(
            program if program.startswith("/") else str(BIN / program),
            list(arguments),
            env=clean_environment(**{"TERM": "xterm-256color", **environment}),
            cwd=cwd and str(cwd),
            encoding="utf-8",
            dimensions=(lines, columns),
        )

    def read(self, wait_s: float = 0.05) -> bool:
        """Take in what has come; False once the program has closed the terminal."""
        try:
            text = self.child.read_nonblocking(65536, timeout=wait_s)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.written += text
        self._stream.feed(text)
        return True

    @property
    def lines(self) -> list[str]:
        """The lines on the screen without the empty ones at its end."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        """The screen as text."""
        return "\n".join(self.lines) + "\n"

    @property
    def cursor_hidden(self) -> bool:
        """Whether the program has left the cursor hidden."""
        return bool(self._screen.cursor.hidden)

    def wait_for(self, seen: Callable[[list[str]], object], timeout_s: float = 60) -> list[str]:
        """The screen as soon as `seen` says so."""
        deadline = time.monotonic() + timeout_s
        while not seen(self.lines):
            assert self.read(), f"it has ended:\n{self.text}"
            assert time.monotonic() < deadline, f"{self.text}the last of {len(self.written)}: {self.written[-3000:]!r}"
        return self.lines

    def resize(self, columns: int, lines: int) -> None:
        """As the user pulls at the window's corner."""
        self._screen.resize(lines, columns)
        self.child.setwinsize(lines, columns)

    def wait_for_end(self, timeout_s: float = 30) -> int | None:
        """The exit status once the program has ended; minus the signal's number if one ended it."""
        deadline = time.monotonic() + timeout_s
        while self.read():
            assert time.monotonic() < deadline, self.text
        self.child.close()
        return self.child.exitstatus if self.child.signalstatus is None else -self.child.signalstatus

    def signal(self, number: signal.Signals) -> None:
        """Send the program a signal."""
        self.child.kill(number)
