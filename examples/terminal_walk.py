"""A walk through the command line, recorded: real programs on a pseudo-terminal, and what their screens show.

    python examples/terminal_walk.py > docs/terminal-walk.md

It starts a cluster of its own, in a directory that is gone afterwards, and needs `pexpect` and `pyte`, which the
development set-up has. Takes two minutes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pyte

BIN = Path(sys.executable).parent
COLUMNS, ROWS = 118, 32
WAIT_S = 90.0
PAIRS = 50_000
SHELL_PROMPT = "$"
CTRL_C, CTRL_D, CTRL_L = "\x03", "\x04", "\x0c"


class Terminal:
    """A shell of the system on a pseudo-terminal, read from its screen."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.Stream(self._screen)
        self._child: pexpect.spawn[str] = pexpect.spawn(
            "bash",
            ["--norc", "--noprofile"],
            env={**environment, "PS1": "$ ", "TERM": "xterm"},
            cwd=str(folder),
            encoding="utf-8",
            dimensions=(ROWS, COLUMNS),
        )
        self.until_prompt(SHELL_PROMPT)

    def lines(self) -> list[str]:
        """The screen without the empty lines at its end."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def until(self, holds: Callable[[list[str]], object], *, quiet_s: float = 0.15) -> None:
        """Wait until that holds, and the screen has been still for a moment."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                self._stream.feed(self._child.read_nonblocking(65536, timeout=quiet_s))
                if quiet_s > 0.01:
                    continue
            except pexpect.TIMEOUT:
                pass
            if holds(self.lines()):
                return
            if time.monotonic() > deadline_s:
                raise TimeoutError("\n".join(self.lines()))

    def until_prompt(self, prompt: str) -> None:
        """Wait until a line is being asked for."""
        self.until(lambda lines: lines[-1:] == [prompt])

    def type(self, keys: str) -> None:
        """Press keys."""
        self._child.send(keys)

    def run(self, line: str, prompt: str = SHELL_PROMPT) -> None:
        """Type a line and wait for the next prompt."""
        self.type(line + "\r")
        self.until(lambda lines: line in "".join(self._screen.display))
        self.until_prompt(prompt)

    def clear(self, prompt: str = SHELL_PROMPT) -> None:
        """An empty screen with the prompt on it."""
        self.type(CTRL_L)
        self.until(lambda lines: lines == [prompt])

    def close(self) -> None:
        """Leave."""
        self._child.close(force=True)


class Walk:
    """The terminal, the cluster, and the page that becomes of it."""

    def __init__(self, folder: Path) -> None:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAFTKV_")}
        homes = {name: str(folder / name.lower()) for name in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME")}
        self.environment = {**kept, **homes, "PATH": path, "PAGER": "less"}
        self.folder = folder
        self.terminal = Terminal(self.environment, folder)
        self.page: list[str] = []

    def say(self, text: str) -> None:
        """A paragraph or heading of the page."""
        self.page += [text, ""]

    def show(self) -> None:
        """The screen as it is now."""
        shown = [line.replace(str(self.folder), "~") for line in self.terminal.lines()]
        self.page += ["```text", *shown, "```", ""]

    def elsewhere(self, *arguments: str) -> str:
        """Run a program in another terminal, so to speak; what it prints."""
        done = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, check=False, timeout=120)
        return done.stdout

    def processes(self, **wanted: object) -> list[dict[str, object]]:
        """Daemons of the cluster with these fields."""
        status = json.loads(self.elsewhere("raftkv", "local", "status", "-o", "json"))
        return [row for row in status["processes"] if wanted.items() <= row.items()]

    def signal(self, number: signal.Signals, processes: list[dict[str, object]]) -> None:
        """Signal daemons of this cluster."""
        for process in processes:
            os.kill(int(str(process["pid"])), number)

    # ---- the steps

    def first_start(self) -> None:
        """A cluster, a shell, a key."""
        self.say("## First start")
        terminal = self.terminal
        terminal.run("raftkv local up")
        terminal.run("raftkv-kv", "raftkv-kv local>")
        for line in ('put greeting "hello, world"', "get greeting", "gte greeting", "get nobody"):
            terminal.run(line, "raftkv-kv local>")
        self.show()

    def completion(self) -> None:
        """Hints, menus, suggestions."""
        terminal, prompt = self.terminal, "raftkv-kv local>"
        self.say("## Completion")
        self.say("What a command still takes stands dim behind the cursor:")
        terminal.clear(prompt)
        terminal.type("put ")
        terminal.until(lambda lines: "VALUE" in lines[-1])
        self.show()
        self.say("Keys that the session has met, as they are typed or with Tab:")
        terminal.type(CTRL_C)
        terminal.until_prompt(prompt)
        terminal.clear(prompt)
        terminal.type("get g")
        terminal.until(lambda lines: any(line.endswith("key") for line in lines))
        self.show()
        self.say("Options, with what they are for:")
        terminal.type(CTRL_C)
        terminal.until_prompt(prompt)
        terminal.clear(prompt)
        terminal.type("scan --")
        terminal.until(lambda lines: "--timeout" in lines[-1])
        self.show()
        terminal.type(CTRL_C)
        terminal.until_prompt(prompt)

    def conflict(self) -> None:
        """A transaction that somebody else was faster than."""
        terminal, prompt = self.terminal, "raftkv-kv local>"
        self.say("## A transaction with a conflict")
        self.say("Between `put account 90` and `commit`, `raftkv-kv put account 50` ran in another terminal.")
        terminal.run("put account 100", prompt)
        terminal.clear(prompt)
        for number, line in enumerate(["begin", "get account", "put account 90"]):
            terminal.run(line, f"{prompt[:-1]} (txn: {number})>")
        self.elsewhere("raftkv-kv", "put", "account", "50")
        for line in ("commit", "get account"):
            terminal.run(line, prompt)
        self.show()

    def stalled_write(self) -> None:
        """Ctrl-C while nobody can say what becomes of a write."""
        terminal, prompt = self.terminal, "raftkv-kv local>"
        self.say("## Ctrl-C during a stalled write")
        self.say("All replicas of both groups are stopped (SIGSTOP) before the `put`, and go on after the Ctrl-C.")
        groups = self.processes(role="shardkv")
        terminal.clear(prompt)
        self.signal(signal.SIGSTOP, groups)
        try:
            terminal.type("put account 60\r")
            terminal.until(lambda lines: lines[-1].endswith("put account 60"))
            time.sleep(1)  # as its user would wait
            terminal.type(CTRL_C)
            terminal.until_prompt(prompt)
        finally:
            self.signal(signal.SIGCONT, groups)
        terminal.run("get account", prompt)
        self.show()

    def leader_killed(self) -> None:
        """A new leader, above the prompt and in `raftkv top`."""
        terminal, prompt = self.terminal, "raftkv-kv local>"
        self.say("## A leader is killed")
        self.say("In the shell, while a line is being typed:")
        terminal.clear(prompt)
        terminal.type("put account 70")
        terminal.until(lambda lines: "account 70" in lines[-1])
        self._kill_leader(1)
        terminal.until(lambda lines: any("leads now" in line for line in lines))
        self.show()
        terminal.type("\r")
        terminal.until_prompt(prompt)
        terminal.type(CTRL_D)
        terminal.until_prompt(SHELL_PROMPT)
        self.elsewhere("raftkv", "local", "up")
        self.say("And while `raftkv top` is open; before:")
        terminal.clear()
        terminal.type("raftkv top\r")
        terminal.until(lambda lines: sum("leader" in line for line in lines) > 2)
        self.show()
        self.say("After `kill -9` of the leader of group 2:")
        victim = self._kill_leader(2)
        terminal.until(lambda lines: any(victim in line and "down" in line for line in lines), quiet_s=0.01)
        self.show()
        self.say("And when the others of the group have elected another one:")
        terminal.until(lambda lines: any(line.startswith("2 ") and "leader" in line for line in lines), quiet_s=0.01)
        self.show()
        terminal.type("q")
        terminal.until_prompt(SHELL_PROMPT)
        terminal.clear()
        self.say("`raftkv local up` starts again what is dead:")
        terminal.run("raftkv local up")
        self.show()

    def _kill_leader(self, gid: int) -> str:
        leading = self.processes(gid=gid, state="leader")
        self.signal(signal.SIGKILL, leading)
        return str(leading[0]["addr"])

    def bulk(self) -> None:
        """Fifty thousand pairs."""
        terminal = self.terminal
        self.say(f"## Import of {PAIRS:,} pairs")
        lines = (f"user:{number:05}\tname {number}, mail {number}@example.org\n" for number in range(PAIRS))
        (self.folder / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
        terminal.clear()
        terminal.type("time raftkv-kv import pairs.tsv\r")
        terminal.until(lambda lines: re.search(r"[3-8]\d%", "\n".join(lines)), quiet_s=0.01)
        self.say("On the way:")
        self.show()
        self.say("And at the end:")
        terminal.until(lambda lines: any(line.startswith("real") for line in lines))
        terminal.until_prompt(SHELL_PROMPT)
        terminal.run("raftkv-kv scan user: | wc -l")
        self.show()

    def script(self) -> None:
        """The same without a terminal, and what it exits with."""
        terminal = self.terminal
        self.say("## From a script")
        self.say("One command a line on standard input; it ends at the first error, with that error's exit code.")
        terminal.clear()
        for line in (
            r"printf 'put a 1\nappend a 2\nget a\n' | raftkv-kv; echo exit $?",
            r"printf 'get nobody\nput never 1\n' | raftkv-kv; echo exit $?",
            r"printf 'cas a 1 2\n' | raftkv-kv; echo exit $?",
            r"printf 'put a\n' | raftkv-kv; echo exit $?",
            r"printf 'begin\nget a\nput a x\ncommit\nget a\n' | raftkv-kv; echo exit $?",
            "raftkv-kv --controllers 127.0.0.1:9 --timeout 0.5 get a; echo exit $?",
            "raftkv-ctl leave 1,2 --force < /dev/null; echo exit $?",
        ):
            terminal.run(line)
        self.show()
        self.say("A conflict is 7: another program writes between the `get` and the `commit`.")
        terminal.clear()
        script = "echo begin; echo get a; sleep 1; raftkv-kv put a z >&2; echo put a y; echo commit"
        terminal.run(f"({script}) | raftkv-kv; echo exit $?")
        self.show()


@contextmanager
def walk() -> Iterator[Walk]:
    """One that leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="raftkv-walk-") as folder:
        made = Walk(Path(folder))
        try:
            yield made
        finally:
            made.terminal.close()
            made.elsewhere("raftkv", "local", "down", "--wipe")


def main() -> None:
    """Print the page."""
    with walk() as record:
        record.say("# A walk through the command line")
        record.say("Recorded by `python examples/terminal_walk.py`: the screens of a terminal, as its user saw them.")
        for step in (
            record.first_start,
            record.completion,
            record.conflict,
            record.stalled_write,
            record.leader_killed,
            record.bulk,
            record.script,
        ):
            print(f"terminal_walk: {step.__name__}", file=sys.stderr)
            step()
        print("\n".join(record.page).rstrip())


if __name__ == "__main__":
    main()
