"""A shell on a pseudo-terminal, read from its screen as a user reads it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

from tests.cli.clusters import BIN, clean_environment

COLUMNS, LINES = 160, 50


class Terminal:
    """A REPL and its screen."""

    def __init__(
        self,
        program: str,
        *arguments: str,
        controllers: str,
        state_home: Path,
        size: tuple[int, int] = (COLUMNS, LINES),
        **environment: str,
    ) -> None:
        columns, rows = size
        self.prompt = f"{program} {controllers.split(',')[0]}>"
        self._base_port = int(controllers.split(",")[0].split(":")[1])
        self._screen = pyte.HistoryScreen(columns, rows)
        self._stream = pyte.Stream(self._screen)
        settings = {"XDG_STATE_HOME": str(state_home), "RAFTKV_CONTROLLERS": controllers, "TERM": "xterm"}
        self.child: pexpect.spawn[str] = pexpect.spawn(
            str(BIN / program),
            list(arguments),
            env=clean_environment(**{**settings, **environment}),
            encoding="utf-8",
            dimensions=(rows, columns),
        )
        self.wait_for_prompt()

    def lines(self) -> list[str]:
        """The lines on the screen without the empty ones at its end."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def wait_for_prompt(self, timeout_s: float = 60) -> None:
        """Until an empty prompt is the last line."""
        self.wait_until(lambda lines: lines[-1:] == [self.prompt], timeout_s)

    def wait_until(self, holds: Callable[[list[str]], object], timeout_s: float = 60) -> None:
        """Until that holds of the lines of a screen on which nothing moves any more."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.1))
                continue  # until it is silent
            except pexpect.TIMEOUT:
                pass
            if holds(self.lines()):
                return
            assert time.monotonic() < deadline, "\n".join(self.lines())

    def screenshot(self) -> str:
        """The screen as text, without what differs from run to run: ports, transactions' ids, durations, elections."""
        text = "\n".join(line for line in self.lines() if not re.match("group [0-9]+: |the controllers: ", line)) + "\n"
        text = re.sub(r"127\.0\.0\.1:(\d{5})", lambda port: f"127.0.0.1:{self._shown_port(int(port[1]))}", text)
        text = re.sub(r"\b[0-9a-f]{32}\b", "0" * 32, text)
        return re.sub(r"\d+\.\d ms", "0.0 ms", text)

    def _shown_port(self, port: int) -> int:
        return 20_000 + port - self._base_port

    def colours(self, text: str) -> set[str]:
        """Those of the last place on the screen that shows the text."""
        row, line = max((row, line) for row, line in enumerate(self._screen.display) if text in line)
        column = line.rindex(text)
        return {self._screen.buffer[row][column + offset].fg for offset in range(len(text))}

    def send(self, keys: str) -> None:
        """Type without waiting."""
        self.child.send(keys)

    def ask(self, line: str) -> list[str]:
        """Type a line; what was printed until the next prompt."""
        self.enter(line)
        return self.answer(line)

    def enter(self, line: str) -> None:
        """Type a line and wait for the next prompt."""
        self.type(line)
        self.send("\r")
        self.wait_for_prompt()

    def type(self, line: str) -> None:
        """Until the typed line is on the screen, and the prompt before it is not the last line any more."""
        self.send(line)
        self.wait_until(lambda lines: lines[-1:] != [self.prompt])

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
