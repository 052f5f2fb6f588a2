"""`raftkv top` on a pseudo-terminal and a real cluster: a leader dies under its eyes, and it always tidies up."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.clusters import BIN, LocalCluster, run
from tests.cli.golden import agrees
from tests.cli.screen import Screen

NOBODY = "127.0.0.1:9"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    shape = ("--groups", "1", "--replicas", "3", "--coordinators", "1")
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"), shape)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down("--wipe")


class Top(Screen):
    """`raftkv top` on a terminal, and what that terminal was like before."""

    def __init__(self, cluster: LocalCluster, *arguments: str, program: str = "raftkv") -> None:
        # A size that is exported, as by make, must not outlive the first resize.
        words, at = arguments or ("top",), cluster.controllers
        super().__init__(program, *words, RAFTKV_CONTROLLERS=at, COLUMNS="80", LINES="24")
        self.before = termios.tcgetattr(self.child.child_fd)
        self.wait_for(lambda lines: lines and "raftkv top" in lines[0])

    def wait_for_head(self, text: str) -> None:
        """Until the head says so."""
        self.wait_for(lambda lines: text in lines[0])

    def row(self, *words: str) -> list[str]:
        """The words of the first line that begins with these; none if there is no such line."""
        found = (line.split() for line in self.lines)
        return next((line for line in found if line[: len(words)] == list(words)), [])

    def has_tidied_up(self) -> bool:
        """The terminal is as it was; before it has ended, since then there is none."""
        return (
            not self.cursor_hidden
            and self.written.rfind("\x1b[?1049l") > self.written.rfind("\x1b[?1049h")
            and termios.tcgetattr(self.child.child_fd) == self.before
        )


def shape(screen: Screen) -> str:
    """The screen without what is different every time: numbers, and with them widths."""
    lines = [re.sub(r"\d+([.,:]\d+)*", "N", line) for line in screen.lines]
    return "".join(re.sub(r" {2,}", "  ", line) + "\n" for line in lines)


def test_a_leader_dies_while_it_is_open(cluster: LocalCluster) -> None:
    top = Top(cluster, "top", "--sort", "state", "--interval", "0.5")
    top.wait_for(lambda lines: "  healthy" in lines[0] and not any(re.search(r" - +\S+$", line) for line in lines))
    agrees("top-terminal-before.txt", shape(top))
    (leader,) = cluster.processes(role="shardkv", state="leader")
    cluster.kill(leader)
    address = leader["addr"]
    down = f"group 1: the replica at {address} is down"
    top.wait_for(
        lambda lines: (
            "UNHEALTHY: 1 problem" in lines[0]
            and f"UNHEALTHY: {down}" in lines
            and top.row("1", str(leader["id"]), address, "down")
            and any(re.match(rf"1 +[^{leader['id']}] +\S+ +leader ", line) for line in lines)
        )
    )
    agrees("top-terminal-leader-killed.txt", shape(top))
    assert cluster.kv("put", "k", "v").code == 0
    cluster.up()
    top.wait_for(lambda lines: "  healthy" in lines[0] and top.row("1", str(leader["id"]), address, "follower"))
    top.child.send("q")
    assert top.wait_for_end() == 0
    assert not top.cursor_hidden
    assert top.written.endswith("\x1b[?1049l\x1b[?25h")


def test_rates_and_keys(cluster: LocalCluster) -> None:
    top = Top(cluster, "top", "--interval", "500ms")
    load = Screen(
        "/bin/sh",
        "-c",
        f"yes 'put k v' | {BIN / 'raftkv-kv'} --pipeline 8 > /dev/null",
        RAFTKV_CONTROLLERS=cluster.controllers,
    )
    try:
        top.wait_for(lambda lines: [line for line in lines if re.match(r"1 +10 +serving +[1-9][\d,]*(\.\d)? ", line)])
    finally:
        load.child.close(force=True)
    for sort in ("state", "lag", "rate", "ms", "group"):
        top.child.send("s")
        top.wait_for_head(f"by {sort}, every 0.5 s")
    top.child.send("r")
    top.wait_for(lambda lines: "by group reversed" in lines[0] and lines[2].startswith("coordinator"))
    top.child.send("+")
    top.wait_for(lambda lines: "every 1 s" in lines[0])
    top.child.send("--")
    top.wait_for(lambda lines: "every 0.2 s" in lines[0])
    top.child.send("+++")  # or a busy machine draws old frames faster than this test reads them
    top.wait_for(lambda lines: "every 2 s" in lines[0])
    top.child.send("p")
    top.wait_for(lambda lines: "PAUSED" in lines[0])
    top.child.send(" ")
    top.wait_for(lambda lines: "PAUSED" not in lines[0])
    top.resize(60, 9)
    top.wait_for(lambda lines: len(lines) == 9 and "TERM" not in lines[1] and "lines below" in lines[-1])
    top.child.send("\x1b[B\x1b[B")
    top.wait_for(lambda lines: not lines[1].startswith("GROUP"))
    top.child.send("\x1b[6~" * 5)
    top.wait_for(lambda lines: lines[-1].startswith("q quit") and lines[-2].startswith("locks:"))
    top.resize(100, 30)
    top.wait_for(lambda lines: "TERM" in lines[1] and len(lines) == 30)
    top.child.send("Q")
    assert top.wait_for_end() == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)]
)
def test_signals_end_it_tidily(cluster: LocalCluster, number: signal.Signals, status: int) -> None:
    top = Top(cluster, "-c", f"{BIN / 'raftkv'} top; echo status=$?; read line", program="/bin/bash")
    assert termios.tcgetattr(top.child.child_fd) != top.before
    if number is signal.SIGINT:
        top.child.send("\x03")
    else:
        children = Path(f"/proc/{top.child.pid}/task/{top.child.pid}/children").read_text(encoding="ascii").split()
        os.kill(int(children[0]), number)
    shown = f"status={status if status > 0 else 128 - status}"  # bash ends with what it runs at Ctrl-C
    top.wait_for(lambda lines: number is signal.SIGINT or any(shown in line for line in lines))
    top.wait_for(lambda lines: top.has_tidied_up())
    assert "Traceback" not in top.written
    top.child.close(force=True)


def test_a_bug_leaves_one_line_and_a_terminal_that_works(cluster: LocalCluster) -> None:
    code = (
        "from raftkv.cli import top_view, top\n"
        "shown = top.screenful\n"
        "def broken(before, *rest):\n"
        "    return shown(before, *rest) if before is None else 1 / 0\n"
        "top.screenful = broken\n"
        "import sys; sys.argv = ['raftkv', 'top', '--interval', '0.2']\n"
        "from raftkv.cli.main import raftkv; raftkv()\n"
    )
    top = Top(cluster, "-c", code, program=sys.executable)
    assert top.wait_for_end() == 1
    assert not top.cursor_hidden
    assert "raftkv: this is a bug: ZeroDivisionError: division by zero; RAFTKV_TRACEBACK=1 shows where" in top.written
    assert "Traceback" not in top.written


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(cluster: LocalCluster) -> None:
    screen = Screen("/bin/bash", "--norc", "--noprofile", "-i", PS1="$ ", RAFTKV_CONTROLLERS=cluster.controllers)
    screen.wait_for(lambda lines: lines[-1:] == ["$"])
    screen.child.send(f"{BIN / 'raftkv'} top\r")
    screen.wait_for(lambda lines: lines and lines[0].startswith("raftkv top"))
    screen.child.send("\x1a")
    screen.wait_for(lambda lines: any("Stopped" in line for line in lines) and lines[-1] == "$")
    assert not screen.cursor_hidden
    screen.child.send("stty -a | grep -o ' icanon'; fg\r")
    screen.wait_for(lambda lines: lines and lines[0].startswith("raftkv top"))
    assert " icanon" in screen.written
    screen.child.send("q")
    screen.wait_for(lambda lines: lines[-1:] == ["$"])
    screen.child.send("exit\r")
    assert screen.wait_for_end() == 0


def test_without_a_terminal_it_prints_once(cluster: LocalCluster) -> None:
    ran = run("raftkv", "top", "--interval", "0.2", RAFTKV_CONTROLLERS=cluster.controllers)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.decode().splitlines()
    assert lines[0].split() == ["GROUP", "ID", "ADDRESS", "STATE", "TERM", "COMMIT", "LAG", "PER", "S", "MS"]
    assert b"\x1b" not in ran.out
    assert [line.split()[0] for line in lines[1:8]] == ["controller"] * 3 + ["1"] * 3 + ["coordinator"]
    (coordinator,) = cluster.processes(role="coordinator")
    cluster.kill(coordinator)
    ran = run("raftkv", "top", "--interval", "0.2", RAFTKV_CONTROLLERS=cluster.controllers)
    assert (ran.code, ran.err) == (5, "")
    assert ran.out.startswith(b"UNHEALTHY: the coordinators: the replica at 127.0.0.1:")
    cluster.up()


def test_nobody_there_is_exit_3_and_no_screen() -> None:
    ran = run("raftkv", "top", "--timeout", "0.5", RAFTKV_CONTROLLERS=NOBODY)
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, b"", 1)
    assert ran.err.startswith("raftkv: top: ") and NOBODY in ran.err
    ran = run("raftkv", "top", XDG_DATA_HOME="/nonexistent")
    assert ran.code == 2
    assert ran.err.startswith("raftkv: no controllers: give --controllers")
