"""The shell as a program on a pseudo-terminal, in front of a real cluster; its screens are in testdata/*.screen.

RAFTKV_REWRITE=1 writes them anew; the difference is then read before it is committed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.clusters import LocalCluster, cpu_s, start_python
from tests.cli.terminal import Terminal

TESTDATA = Path(__file__).parent / "testdata"
SIZE = (110, 40)
RIGHT = "\x1b[C"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    shape = ("--groups", "2", "--replicas", "1", "--coordinators", "1")
    made = LocalCluster(tmp_path_factory.mktemp("cluster"), shape)
    try:
        made.up()
        yield made
    finally:
        made.down("--wipe")


def terminal(cluster: LocalCluster, state_home: Path, program: str = "raftkv-kv", **environment: str) -> Terminal:
    return Terminal(program, controllers=cluster.controllers, state_home=state_home, size=SIZE, **environment)


def check(shell: Terminal, name: str) -> None:
    """Compare the screen with the file, or write it."""
    file = TESTDATA / f"{name}.screen"
    shown = shell.screenshot()
    if os.environ.get("RAFTKV_REWRITE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")


def leave(shell: Terminal) -> None:
    shell.send("\x04")
    assert shell.wait_for_end() == 0


def ready(shell: Terminal, *ends: str) -> None:
    """Wait until the last lines begin so."""
    shell.wait_until(
        lambda lines: (
            len(lines) >= len(ends)
            and all(line.startswith(end) for line, end in zip(lines[-len(ends) :], ends, strict=True))
        )
    )


def test_a_first_session(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path)
    for line in ["put greeting 'hello, world'", "GET greeting", "get nobody", "gte greeting", "scan gr"]:
        shell.ask(line)
    shell.send('put letter "Dear\r  reader,\r')
    ready(shell, f"{' ' * (len(shell.prompt) - 1)}…")
    shell.send('bye"\r')
    shell.wait_for_prompt()
    shell.ask("get letter -o plain | wc")
    check(shell, "first-session")
    leave(shell)


def test_completion_and_hints(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path)
    shell.ask("put user:1 one")
    shell.ask("put user:2 two")
    shell.send("put ")
    ready(shell, f"{shell.prompt} put KEY VALUE [--if-version N]")
    check(shell, "hint")
    shell.send("us")
    shell.wait_until(lambda lines: "user:2" in lines[-1])
    check(shell, "completion")
    shell.send("\x03")
    shell.wait_for_prompt()
    shell.send("sc")
    shell.wait_until(lambda lines: "in key order" in lines[-1])
    shell.send("\t --l")
    shell.wait_until(lambda lines: "--limit" in lines[-1])
    check(shell, "completion-of-options")
    shell.send("\x03")
    shell.wait_for_prompt()
    shell.send("put user:1")  # the rest is what was typed first
    shell.wait_until(lambda lines: f"{shell.prompt} put user:1 one" in lines)
    shell.send(RIGHT + " --if-version 0\r")
    shell.wait_for_prompt()
    assert any(line.startswith("Put user:1: ") for line in shell.lines()[-3:])
    leave(shell)


def test_colours(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path)
    shell.send("scan 'x y' --limit 5 | wc")
    ready(shell, f"{shell.prompt} scan 'x y' --limit 5 | wc")
    assert shell.colours("scan") == {"green"}
    assert shell.colours("'x y'") == {"brown"}  # as the palette of terminals has its yellow
    assert shell.colours("--limit") == {"cyan"}
    assert shell.colours("5") == {"blue"}
    shell.send("\x03get a b")
    ready(shell, f"{shell.prompt} get a b")
    assert shell.colours("b") == {"red"}
    shell.send("\x03")
    leave(shell)
    shell = terminal(cluster, tmp_path, NO_COLOR="1")
    shell.send("get a b")
    ready(shell, f"{shell.prompt} get a b")
    assert shell.colours("get a b") == {"default"}
    shell.send("\x03")
    leave(shell)


def test_a_transaction_with_a_conflict(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path)
    plain = shell.prompt
    shell.ask("put account 100")
    for number, line in enumerate(["begin", "get account", "put account 90"]):
        shell.send(line + "\r")
        ready(shell, f"{plain[:-1]} (txn: {number})>")
    assert cluster.kv("put", "account", "50").code == 0  # somebody else
    shell.send("commit\r")
    ready(shell, f"{plain} commit".replace(">", " (txn: 2)>"), "Commit: ", plain)
    shell.ask("get account")
    check(shell, "conflict")
    leave(shell)


def test_ctrl_c_during_a_stalled_write(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path, RAFTKV_TIMEOUT="60")
    shell.ask("put stalled 0")
    groups = cluster.processes(role="shardkv")
    try:
        for process in groups:
            cluster.kill(process, signal.SIGSTOP)
        shell.send("put stalled 1\r")
        ready(shell, f"{shell.prompt} put stalled 1")
        shell.send("\x03")
        shell.wait_for_prompt()
    finally:
        for process in groups:
            cluster.kill(process, signal.SIGCONT)
    shell.ask("append stalled !")
    check(shell, "interrupted-write")
    leave(shell)


def test_a_change_of_the_map_is_said_above_what_is_being_typed(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path)
    shell.ask("put k 0")
    shell.send("put k some")
    ready(shell, f"{shell.prompt} put k some")
    before = int(cluster.ctl("query").out.split(b"#")[1].split(b":")[0])
    try:
        assert cluster.ctl("move", "0", "2").code == 0
        ready(shell, f"configuration {before + 1}: 1 shard got another owner", f"{shell.prompt} put k some")
        shell.send("thing\r")
        shell.wait_for_prompt()
        assert cluster.kv("get", "k").out == b"something\n"
    finally:
        cluster.ctl("move", "0", "1")
    ready(shell, f"configuration {before + 2}: 1 shard got another owner", shell.prompt)
    leave(shell)


def test_the_prompt_while_no_controller_answers(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path)
    shell.ask("put k v")
    controllers = cluster.processes(role="controller")
    try:
        for process in controllers:
            cluster.kill(process, signal.SIGSTOP)
        ready(shell, f"{shell.prompt[:-1]}?>")
        shell.send("get k\r")  # the groups serve all the same
        ready(shell, "v", f"{shell.prompt[:-1]}?>")
    finally:
        for process in controllers:
            cluster.kill(process, signal.SIGCONT)
    shell.wait_for_prompt()
    leave(shell)


def test_a_large_scan_goes_through_the_pager(cluster: LocalCluster, tmp_path: Path) -> None:
    lines = b"".join(b"put page:%03d v\n" % number for number in range(100))
    assert cluster.kv("--pipeline", "32", stdin=lines).code == 0
    shell = terminal(cluster, tmp_path, PAGER="less", LESS="FRX")
    shell.send("scan page:\r")
    ready(shell, ":")
    check(shell, "pager")
    shell.send("\x03")  # is the pager's
    shell.send("q")
    shell.wait_for_prompt()
    shell.ask("\\pager off")
    shell.enter("scan page: --limit 30")
    assert shell.lines()[-2].startswith("page:029")
    leave(shell)


def test_the_commands_of_the_shell(cluster: LocalCluster, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i s/world/moon/ "$1"\n')
    editor.chmod(0o755)
    shell = terminal(cluster, tmp_path, EDITOR=str(editor))
    for line in ["put hello 'hello, world'", "\\timing on", "\\e hello", "\\o json", "get hello | sed s/,.*//", "\\?"]:
        shell.enter(line)
    check(shell, "backslash-commands")
    shell.send("\\watch 0.2 get hello\r")
    shell.wait_until(lambda lines: "\n".join(lines).count("every 0.2 s") > 2)
    shell.send("\x03")
    shell.wait_for_prompt()
    leave(shell)


def test_what_loses_data_asks(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path, "raftkv-ctl")
    for answer, said in [("n", "not confirmed; nothing was changed"), ("y", "force is for groups that are lost")]:
        shell.send("leave 1,2 --force\r")
        shell.wait_until(lambda lines: lines[-1].endswith("(y/N)"))
        shell.send(answer + "\r")
        shell.wait_for_prompt()
        assert said in " ".join(shell.lines()[-4:])
    leave(shell)


def test_it_is_quick_to_be_ready(cluster: LocalCluster, tmp_path: Path) -> None:
    """The whole session with a command in it; on a processor of 2025 that is a quarter of a second."""

    def session() -> None:
        shell = terminal(cluster, tmp_path)
        shell.ask("get nobody")
        leave(shell)

    costs = [(cpu_s(session), cpu_s(start_python)) for _ in range(3)]
    session_s, python_s = (min(column) for column in zip(*costs, strict=True))
    assert session_s <= 8 * python_s, costs
