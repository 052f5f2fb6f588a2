"""The shell in this process: what its user types, and what the screen shows."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import Busy, Timeout
from tests.cli.fakes import FakeValue
from tests.cli.repl_rig import (
    CTRL_C,
    CTRL_D,
    CTRL_R,
    ENTER,
    PASTE_BEGIN,
    PASTE_END,
    RIGHT,
    TAB,
    Rig,
    at_the_prompt,
)

PROMPT = "raftkv-kv c:1>"
UNSETTLED = "it was sent and may have applied, or may still: read before you try again"


def play(
    tmp_path: Path,
    dialogue: Callable[[Rig], Awaitable[None]],
    program: str = "raftkv-kv",
    prepare: Callable[[Rig], None] = lambda rig: None,
    **environment: str,
) -> None:
    """Run the dialogue in front of a shell, which has to end afterwards."""

    async def run() -> None:
        async with at_the_prompt(tmp_path, program, prepare, **environment) as rig:
            await dialogue(rig)

    asyncio.run(run())


def test_commands_and_their_errors(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        assert await rig.ask("put k 'a b'") == ["OK"]
        assert await rig.ask("GET k") == ["a b"]
        assert await rig.ask("get missing") == ["(nil)"]
        assert await rig.ask("# a comment") == []
        assert await rig.ask("") == []
        assert await rig.ask("frob") == ["unknown command frob; `help` lists the commands"]
        assert await rig.ask("watch") == ["unknown command watch; did you mean \\watch?"]
        assert await rig.ask("get") == ["Get needs more words: usage: Get KEY [--for-update]"]
        assert (await rig.ask('put k "\\q"'))[0].startswith("column 8: unknown escape \\q")
        assert await rig.ask("get k --pipeline 3") == [
            "--pipeline belongs on the command line of raftkv-kv, not on a line"
        ]
        rig.fakes.kv_client.errors[b"bad"] = Busy("too much")
        assert (await rig.ask("put bad 1"))[0].startswith("Put bad: ")
        assert rig.fakes.kv_client.data.keys() == {b"k"}

    play(tmp_path, dialogue)


def test_an_open_quote_goes_on_on_the_next_line_and_no_indentation_is_added(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        rig.type('put k "one' + ENTER)
        await rig.until_last("             …")
        rig.type("  two" + ENTER + 'three"' + ENTER)
        await rig.until_last(PROMPT)
        assert rig.fakes.kv_client.data[b"k"].value == b"one\n  two\nthree"
        rig.type("put k 'open" + ENTER)
        await rig.until_last("             …")
        rig.type(CTRL_C)  # the way out of a quote that was a mistake
        await rig.until_last(PROMPT)
        assert await rig.ask("get k --output plain") == ["one", "  two", "three"]

    play(tmp_path, dialogue)


def test_pasted_lines_run_one_by_one_up_to_the_first_error(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        rig.type(f'{PASTE_BEGIN}put a 1\n# note\nput b "x\ny"\n{PASTE_END}{ENTER}')
        await rig.until(lambda: rig.screen.lines()[-3:] == ["OK", "OK", PROMPT])
        assert {key: found.value for key, found in rig.fakes.kv_client.data.items()} == {b"a": b"1", b"b": b"x\ny"}
        rig.type(f"{PASTE_BEGIN}get a\nfrob\n\nput c 1\nput d 1\n{PASTE_END}{ENTER}")
        await rig.until(lambda: rig.screen.lines()[-2:] == ["2 more of the lines were not run", PROMPT])
        assert rig.screen.lines()[-4] == "1"
        assert rig.fakes.kv_client.data.keys() == {b"a", b"b"}

    play(tmp_path, dialogue)


def test_ctrl_c_clears_the_line_and_ctrl_d_leaves(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        rig.type("put typed 1" + CTRL_C)
        assert await rig.ask("get typed") == ["(nil)"]
        rig.type(CTRL_D)
        await rig.until(lambda: rig.fakes.kv_client.closed)

    play(tmp_path, dialogue)


def test_completion_hints_and_suggestions_on_the_screen(tmp_path: Path) -> None:
    def prepare(rig: Rig) -> None:
        rig.fakes.kv_client.data = {b"user:1": FakeValue(b"x", 1), b"user:2": FakeValue(b"y", 2)}

    async def dialogue(rig: Rig) -> None:
        await rig.ask("scan user:")
        asked = list(rig.fakes.kv_client.order)
        rig.type("pu")
        await rig.until(lambda: "store VALUE under KEY" in rig.screen.lines()[-1])
        rig.type("t ")
        await rig.until_last(f"{PROMPT} put KEY VALUE [--if-version N]")
        rig.type("u")
        await rig.until(lambda: "user:2  key" in rig.screen.lines()[-1])
        rig.type(TAB)
        await rig.until(lambda: f"{PROMPT} put user:1 VALUE [--if-version N]" in rig.screen.lines())
        rig.type(TAB)
        await rig.until(lambda: f"{PROMPT} put user:2 VALUE [--if-version N]" in rig.screen.lines())
        rig.type(" z" + ENTER)
        await rig.until(lambda: rig.screen.lines()[-2:] == ["OK", PROMPT])
        assert rig.fakes.kv_client.order == [*asked, ("put", b"user:2")]  # no key was asked for meanwhile
        rig.type("pu")  # the rest of the last line that began so
        await rig.until(lambda: rig.screen.lines().count(f"{PROMPT} put user:2 z") == 2)
        rig.type(RIGHT + ENTER)
        await rig.until(lambda: rig.fakes.kv_client.order[len(asked) :] == [("put", b"user:2")] * 2)
        await rig.until_last(PROMPT)

    play(tmp_path, dialogue, prepare=prepare)


def test_history_survives_and_is_searched(tmp_path: Path) -> None:
    async def first(rig: Rig) -> None:
        await rig.ask("put k 1")
        await rig.ask(" put secret 1")
        await rig.ask("get other")

    async def second(rig: Rig) -> None:
        rig.type(CTRL_R + "put")
        await rig.until(lambda: "reverse-i-search" in rig.screen.raw and "put k 1" in rig.screen.lines()[-1])
        rig.type(ENTER + ENTER)
        await rig.until(lambda: rig.fakes.kv_client.order == [("put", b"k")])
        await rig.until_last(PROMPT)

    play(tmp_path, first)
    history = tmp_path / "raftkv" / "raftkv-kv.history"
    assert "secret" not in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    play(tmp_path, second)


def test_the_prompt_counts_what_is_in_a_transaction_and_leaving_asks(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        txn = "raftkv-kv c:1 (txn: {})>"
        assert (await rig.ask("begin", txn.format(0)))[0].startswith("OK 0")
        assert await rig.ask("put a 1", txn.format(1)) == ["OK"]
        assert await rig.ask("get a", txn.format(2)) == ["1"]
        await rig.ask("help get", txn.format(2))
        await rig.ask("scan", txn.format(2))
        await rig.ask("lock a b", txn.format(3))
        assert await rig.ask("commit", PROMPT) == ["OK"]
        await rig.ask("begin", txn.format(0))
        question = "A transaction is open. Abort it and leave? (y/n)"
        for answer in ("n" + ENTER, CTRL_C):
            rig.type(CTRL_D)
            await rig.until_last(question)
            rig.type(answer)
            await rig.until_last(txn.format(0))
        rig.type("exit" + ENTER)
        await rig.until_last(question)
        rig.type("y" + ENTER)
        await rig.until(lambda: rig.fakes.kv_client.aborted)

    play(tmp_path, dialogue)


def test_what_loses_data_is_asked_for(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        client, prompt = rig.fakes.controllers_client, "raftkv-ctl c:1>"
        for answer, done in [("n" + ENTER, []), (CTRL_D, []), (CTRL_C, []), ("y" + ENTER, ["leave by force"])]:
            rig.type("leave 1 --force --no-wait" + ENTER)
            await rig.until(lambda: rig.screen.lines()[-1].endswith("Go on? (y/N)"))
            rig.type(answer)
            await rig.until_last(prompt)
            assert [name for name, _ in client.calls if name.startswith("leave")] == done
        assert "Leave 1: not confirmed; nothing was changed" in rig.screen.lines()
        assert await rig.ask("leave 2 --no-wait") == ["OK"]
        assert "with --yes" in " ".join(await rig.ask("\\watch 1 leave 1 --force"))

    play(tmp_path, dialogue, "raftkv-ctl")


def test_ctrl_c_cancels_the_request_and_keeps_the_session(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        client = rig.fakes.kv_client
        client.gates = {b"k": asyncio.Event()}
        for line, said in [
            ("put k 1", f"Put k: interrupted; {UNSETTLED}"),
            ("delete k", f"Delete k: interrupted; {UNSETTLED}"),
            ("get k", "Get k: interrupted; nothing was changed"),
        ]:
            rig.type(line + ENTER)
            await rig.until(lambda: client.in_flight == 1)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            await rig.until(lambda said=said: rig.screen.lines()[-2:] == [said, PROMPT])  # type: ignore[misc]
        client.gates[b"k"].set()
        assert await rig.ask("append k x") == ["OK"]
        assert client.data[b"k"].value == b"x"

    play(tmp_path, dialogue)


def test_timing_and_the_form_of_output(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        await rig.ask("put k v")
        assert await rig.ask("\\timing") == ["timing is on"]
        value, time = await rig.ask("get k")
        assert value == "v"
        assert time.startswith("Time: ") and time.endswith(" ms")
        assert await rig.ask("\\timing off") == ["timing is off"]
        assert await rig.ask("\\timing maybe") == ["\\timing: maybe is neither on nor off"]
        assert await rig.ask("\\o json") == ["output is json"]
        assert await rig.ask("get k") == ['{"key": "k", "value": "v", "version": 1}']
        assert await rig.ask("get k -o plain") == ["v"]
        assert await rig.ask("\\o") == ["output is json"]
        assert await rig.ask("\\o yaml") == ["\\o: yaml is not one of plain, json, table"]

    play(tmp_path, dialogue, RAFTKV_OUTPUT="plain")  # \o wins over the variable


def test_watch_repeats_a_command_until_ctrl_c(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        client = rig.fakes.kv_client
        assert await rig.ask("\\watch") == ["\\watch: there is no last command; give one"]
        await rig.ask("put n 0")
        for line in ("\\watch 0.02 get n", "\\watch 0.02"):
            client.order.clear()
            rig.type(line + ENTER)
            await rig.until(lambda: len(client.order) > 2)
            client.errors[b"n"] = Timeout("nobody there")  # an error doesn't end it
            await rig.until(lambda: "Get n: nobody there" in " ".join(rig.screen.lines()))
            del client.errors[b"n"]
            before = len(client.order)
            await rig.until(lambda before=before: len(client.order) > before + 1)  # type: ignore[misc]
            os.kill(os.getpid(), signal.SIGINT)
            await rig.until_last(PROMPT)
            await rig.ask("get n")  # what the second round repeats
        for wrong in ("\\watch 0 get n", "\\watch 1 frob", "\\watch 1 \\timing", "\\watch 1 get"):
            assert len(await rig.ask(wrong)) == 1, wrong

    play(tmp_path, dialogue)


def test_output_goes_to_a_shell_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def dialogue(rig: Rig) -> None:
        for number in range(20):
            await rig.ask(f"put k{number:02} v")
        file = tmp_path / "piped"
        assert await rig.ask("scan | sort -r > piped") == []
        assert file.read_text().splitlines() == [f"k{number:02}\tv" for number in reversed(range(20))]  # plain
        await rig.ask("get k01 -o json | cat > piped")
        assert file.read_text() == '{"key": "k01", "value": "v", "version": 2}\n'
        assert await rig.ask("scan | true") == []  # nobody reads it: no error
        assert await rig.ask("get k01 |") == ['no shell command stands behind the |; as a word it is written "|"']
        assert await rig.ask('put k02 "|"') == ["OK"]
        assert await rig.ask("frob | cat") == ["unknown command frob; `help` lists the commands"]
        assert await rig.ask("get k01") == ["v"]

    play(tmp_path, dialogue)


def test_a_value_in_the_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(files))
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\ncat "$2" >> "$1.seen"; sed -i "s/old/new/; s/^$/made/" "$2"; test ! -e "$1.fail"\n')
    editor.chmod(0o755)

    async def dialogue(rig: Rig) -> None:
        client = rig.fakes.kv_client
        client.data[b"k"] = FakeValue(b"old\xff", 7)
        assert await rig.ask("\\e k") == ["OK"]
        assert client.data[b"k"].value == b"new\xff"  # without a line end, as before
        assert await rig.ask("\\e k") == ["nothing was changed"]
        (tmp_path / "editor.fail").touch()
        client.data[b"k"] = FakeValue(b"old", 7)
        assert "ended with status 1: nothing was changed" in " ".join(await rig.ask("\\e k"))
        assert client.data[b"k"].value == b"old"
        (tmp_path / "editor.fail").unlink()
        txn = "raftkv-kv c:1 (txn: {})>"
        await rig.ask("begin", txn.format(0))
        assert await rig.ask("\\e k", txn.format(1)) == ["OK"]
        assert client.data[b"k"].value == b"old"
        await rig.ask("commit")
        assert client.data[b"k"].value == b"new"
        assert list(files.iterdir()) == []

    play(tmp_path, dialogue, EDITOR=f"'{editor}' '{editor}'")


def test_no_editor_that_works(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        said = await rig.ask("\\e k")
        assert said == ["\\e k: can't run /no/such/editor: No such file or directory; EDITOR names another one"]

    play(tmp_path, dialogue, VISUAL="/no/such/editor")


def test_help_shows_what_only_the_shell_has(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        assert (await rig.ask("help \\watch"))[0] == "\\watch [N] [COMMAND …]"
        assert (await rig.ask("help put"))[0] == "Put KEY VALUE [--if-version N]"
        shown = "\n".join(await rig.ask("\\?"))
        own = {row.usage for row in rig.shell.table.commands if row.name.startswith("\\")}
        assert {row.usage for row in rig.shell.table.commands if f"  {row.usage}" in shown} == own
        assert "Ctrl-R" in shown
        rig.type("help" + ENTER)
        await rig.until(lambda: b"OPTIONS" in rig.out.getvalue() and rig.screen.lines()[-1] == PROMPT)
        whole = rig.out.getvalue().decode()
        assert [row.name for row in rig.shell.table.commands if f"  {row.usage}" not in whole] == []

    play(tmp_path, dialogue)


def test_changes_are_said_above_the_prompt_and_what_is_typed_stays(tmp_path: Path) -> None:
    def prepare(rig: Rig) -> None:
        rig.fakes.controllers_client.shard_map = ShardMap(3, (1, 1, 1, 1), {1: ("g1:1",)})

    async def dialogue(rig: Rig) -> None:
        client = rig.fakes.controllers_client
        rig.type("put k some")
        await rig.until(lambda: rig.screen.lines()[-1].startswith(f"{PROMPT} put k some"))
        client.shard_map = ShardMap(5, (1, 1, 2, 2), {1: ("g1:1",), 2: ("g2:1",)})
        said = "configuration 5: group 2 joined; 2 shards got another owner"
        await rig.until(lambda: rig.screen.lines()[-2:] == [said, f"{PROMPT} put k some [--if-version N]"])
        rig.type("thing" + ENTER)
        await rig.until(lambda: rig.screen.lines()[-2:] == ["OK", PROMPT])
        assert rig.fakes.kv_client.data[b"k"].value == b"something"

    play(tmp_path, dialogue, prepare=prepare)


def test_what_happens_while_a_command_runs_is_said_before_the_next_prompt(tmp_path: Path) -> None:
    def prepare(rig: Rig) -> None:
        rig.fakes.controllers_client.shard_map = ShardMap(3, (1, 1), {1: ("g1:1",), 2: ("g2:1",)})
        rig.fakes.kv_client.gates = {b"k": asyncio.Event()}

    async def dialogue(rig: Rig) -> None:
        await rig.until(lambda: rig.shell._known.shard_map is not None)
        rig.type("get k" + ENTER)
        await rig.until(lambda: rig.fakes.kv_client.in_flight == 1)
        rig.fakes.controllers_client.shard_map = ShardMap(4, (1, 1), {1: ("g1:1",)})
        await rig.until(lambda: rig.shell._notices)
        assert "configuration" not in rig.screen.raw
        rig.fakes.kv_client.gates[b"k"].set()
        await rig.until(lambda: rig.screen.lines()[-3:] == ["(nil)", "configuration 4: group 2 left", PROMPT])

    play(tmp_path, dialogue, prepare=prepare)


def test_a_change_that_this_session_has_made_is_no_news(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        client, prompt = rig.fakes.controllers_client, "raftkv-ctl c:1>"
        await rig.until(lambda: rig.shell._known.shard_map is not None)
        assert await rig.ask("move 1 1 --no-wait") == ["OK"]
        client.shard_map = ShardMap(1, (1,) * 10, {1: ("h:1",)})
        await rig.until(lambda: rig.shell._known.shard_map == client.shard_map)
        assert await rig.ask("query -o plain") == [
            "Config #1: {Num:1 Shards:[1 1 1 1 1 1 1 1 1 1] Groups:map[1:[h:1]]}"
        ]
        assert "configuration 1" not in rig.screen.raw
        await rig.until_last(prompt)

    play(tmp_path, dialogue, "raftkv-ctl")


def test_the_prompt_says_when_nobody_answers_and_is_right_again_afterwards(tmp_path: Path) -> None:
    async def dialogue(rig: Rig) -> None:
        client = rig.fakes.controllers_client
        client.silent = True
        rig.type("get")
        await rig.until(lambda: rig.screen.lines()[-1].startswith("raftkv-kv c:1?> get"))
        client.silent = False
        await rig.until(lambda: rig.screen.lines()[-1].startswith("raftkv-kv c:1> get"))
        rig.type(" k" + ENTER)
        await rig.until(lambda: rig.screen.lines()[-2:] == ["(nil)", PROMPT])

    play(tmp_path, dialogue)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color(tmp_path: Path, no_color: str) -> None:
    async def dialogue(rig: Rig) -> None:
        await rig.ask('put k "v"')
        rig.type("frob x")
        await rig.until(lambda: "frob x" in rig.screen.lines()[-1])
        assert bool(re.search(r"\x1b\[(\d+;)*3[1-7][;m]", rig.screen.raw)) == (not no_color)

    play(tmp_path, dialogue, NO_COLOR=no_color)
