"""What loses data is asked for once more on a terminal, and needs --yes where nobody can be asked."""

from __future__ import annotations

import asyncio
import os

import pexpect
import pytest

from raftkv.cli.command_table import Call, parse
from raftkv.cli.confirmation import is_yes, question_about, require_yes
from raftkv.cli.exit_codes import ExitCode, UsageError
from raftkv.cli.programs import command_table
from raftkv.cli.script import Script
from raftkv.cli.words import split_words
from tests.cli.clusters import BIN, clean_environment, run
from tests.cli.fakes import Shell

NOBODY = "127.0.0.1:9"


def call(line: str) -> Call:
    return parse(command_table("raftkv-ctl"), split_words(line.encode()), environment={}).call()


@pytest.mark.parametrize("line", ["leave 1", "leave 1,2 --no-wait", "leave 1 --force --yes", "leave 1 --yes", "query"])
def test_what_loses_nothing_goes_on(line: str) -> None:
    assert question_about(call(line)) is None
    require_yes(call(line))


def test_force_loses_data() -> None:
    assert question_about(call("leave 1 --force")) == (
        "Leave 1 --force: if no other group is left, all data is given up. Go on? (y/N) "
    )
    with pytest.raises(UsageError, match="if that is meant, say so with --yes"):
        require_yes(call("leave 1 --force"))


def test_only_a_yes_is_one() -> None:
    assert all(map(is_yes, ("y", "Y\n", " yes ")))
    assert not any(map(is_yes, ("", "\n", "n", "yesterday", "ja")))


def test_every_option_that_loses_data_comes_with_yes() -> None:
    for program in ("raftkv-kv", "raftkv-ctl"):
        for command in command_table(program).commands:
            dangerous = [option.key for option in command.options if option.danger]
            assert not dangerous or any(option.key == "yes" for option in command.options), command.name


@pytest.mark.parametrize("stdin", [b"", b"y\n"])
def test_a_program_that_cannot_ask_refuses(stdin: bytes) -> None:
    ran = run("raftkv-ctl", "--controllers", NOBODY, "leave", "1", "--force", stdin=stdin)
    assert (ran.code, ran.out) == (2, b"")
    assert ran.err.startswith("raftkv-ctl: Leave 1 --force: ")
    assert ran.err.endswith("say so with --yes\n")


@pytest.mark.parametrize(
    ("line", "code", "calls"),
    [
        (b"leave 1 --force --no-wait\n", ExitCode.USAGE, []),
        (b"leave 1 --force --yes --no-wait\n", ExitCode.DONE, ["query", "leave by force"]),
        (b"leave 1 --no-wait\n", ExitCode.DONE, ["leave"]),
    ],
)
def test_a_script_says_yes_itself(line: bytes, code: ExitCode, calls: list[str]) -> None:
    shell = Shell("raftkv-ctl")
    read_end, write_end = os.pipe()
    os.write(write_end, line)
    os.close(write_end)
    script = Script(shell.session, shell.printer, shell.table, environment={})
    try:
        assert asyncio.run(script.run(read_end)) is code
    finally:
        os.close(read_end)
    assert [name for name, _ in shell.fakes.controllers_client.calls if name != "close"] == calls


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ("n", 1, "Leave 1: not confirmed; nothing was changed"),
        ("", 1, "Leave 1: not confirmed; nothing was changed"),
        ("y", 3, "no leader of the controllers answered"),
    ],
)
def test_one_shot_on_a_terminal_asks(answer: str, code: int, said: str) -> None:
    arguments = ["--controllers", NOBODY, "--timeout", "0.3", "leave", "1", "--force"]
    child = pexpect.spawn(
        str(BIN / "raftkv-ctl"), arguments, env=clean_environment(), encoding="utf-8", dimensions=(24, 200), timeout=20
    )
    child.expect_exact("Go on? (y/N) ")
    child.sendline(answer)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == code
    assert said in (child.before or "")
