"""A shell on a pseudo-terminal, read from its screen as a user reads it."""

from __future__ import annotations

import time
from pathlib import Path

import pexpect
import pyte

from tests.cli.clusters import BIN, clean_environment

COLUMNS, LINES = 160, 50


class Terminal:
    """A REPL and its screen."""

    def __init__(self, program: str, *arguments: str, controllers: str, state_home: Path) -> None:
        self.prompt = f"{program} {controllers.split(',')[0]}>"
        self._screen = pyte.HistoryScreen(COLUMNS, LINES)
        self._stream = pyte.Stream(self._screen)
        environment = clean_environment(XDG_STATE_HOME=str(state_home), RAFTKV_CONTROLLERS=controllers, TERM="xterm")
        self.child: pexpect.spawn[str] = pexpect.spawn(
            str(BIN / program),
            list(arguments),
            env=environment,
            encoding="utf-8",
            dimensions=(LINES, COLUMNS),
        )
        self.wait_for_prompt()

    def lines(self) -> list[str]:
        """The lines on the screen without the empty ones at its end."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def wait_for_prompt(self, timeout_s: float = 30) -> None:
        """Until an empty prompt is the last line."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.1))
                continue  # until it is silent
            except pexpect.TIMEOUT:
                pass
            if self.lines()[-1:] == [self.prompt]:
                return
            assert time.monotonic() < deadline, "\n".join(self.lines())

    def send(self, keys: str) -> None:
        """Type without waiting."""
        self.child.send(keys)

    def ask(self, line: str) -> list[str]:
        """Type a line; what was printed until the next prompt."""
        self.send(line + "\r")
        time.sleep(0.2)  # until the typed line is on the screen, and the old prompt is no longer the last
        return self.answer(line)

    def answer(self, line: str) -> list[str]:
        """What was printed between a typed line and the prompt after it."""
        self.wait_for_prompt()
        lines = self.lines()
        typed = max(i for i, shown in enumerate(lines) if shown == f"{self.prompt} {line}")
        return lines[typed + 1 : -1]

    def wait_for_end(self) -> int | None:
        """The exit status, once the program has ended."""
        self.child.expect(pexpect.EOF, timeout=20)
        self.child.close()
        return self.child.exitstatus
