"""The shell's own commands, which begin with a backslash: rows of the command table like all others.

So they are completed, highlighted, hinted at and explained by the same means. They exist in the shell only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from raftkv.cli.command_table import Argument, Call, Command, CommandTable, help_text, parse_seconds
from raftkv.cli.exit_codes import UsageError
from raftkv.cli.oneshot import complaint
from raftkv.cli.printers import OUTPUTS, note
from raftkv.cli.repl_editor import edit, find_editor
from raftkv.cli.results import Done, Lines, Result, Text
from raftkv.cli.words import WordError, show_word

if TYPE_CHECKING:
    from raftkv.cli.repl import Shell
    from raftkv.cli.session import Session

WATCH_S_DEFAULT = 2.0

SHELL_HELP = r"""On any line:
  COMMAND | SHELL COMMAND  the output goes to a command of your shell
  "two                     a quote that is open goes on on the next line
  words"
Keys:
  Tab            complete commands, options, keys, groups, shards, files
  Right          take over the dim rest of an earlier line
  Ctrl-R         search the history; Up and Down walk through it
  Ctrl-X Ctrl-E  the line in $EDITOR
  Ctrl-C         cancel the request, or clear the line
  Ctrl-D         leave
Output that is larger than the screen goes through $PAGER.
Lines that begin with a space are not kept in the history."""


def with_backslash_commands(shell: Shell, table: CommandTable) -> CommandTable:
    """The program's table with the shell's own rows; its Help knows them."""
    own: tuple[Command, ...] = (
        Command(
            "\\timing",
            "say how long each command takes, or stop saying it",
            partial(timing, shell),
            (Argument("on|off", required=False, choices=("on", "off")),),
        ),
        Command(
            "\\o",
            "print results as plain, json or table from now on",
            partial(output, shell),
            (Argument("FORM", required=False, choices=OUTPUTS),),
            examples=("\\o json",),
        ),
        Command(
            "\\pager",
            "use the pager, or don't",
            partial(pager, shell),
            (Argument("on|off", required=False, choices=("on", "off")),),
            details="$PAGER says which; less otherwise.",
        ),
        Command(
            "\\watch",
            f"repeat COMMAND, or the last one, every N seconds ({WATCH_S_DEFAULT:g}) until Ctrl-C",
            partial(watch, shell),
            (Argument("N", required=False), Argument("COMMAND", required=False, many=True, completes="line")),
            examples=("\\watch 1 get greeting", "\\watch 5 scan user: | wc -l"),
        ),
    )
    if "put" in table.by_name:
        own = (*own, _edit_row(shell))
    own = (*own, Command("\\?", "the shell's own commands and keys", partial(show_shell_help, shell)))
    rows = [replace(row, run=partial(show_help, shell)) if row.name == "Help" else row for row in table.commands]
    return replace(table, commands=(*rows, *own), by_name={})


def _edit_row(shell: Shell) -> Command:
    return Command(
        "\\e",
        "edit KEY's value in $EDITOR; it is stored unless others were faster",
        partial(edit_value, shell),
        (Argument("KEY", completes="keys"),),
        details=(
            "A missing key begins empty. Nothing is stored if nothing was changed, or if the editor fails. A line end\n"
            "that the editor adds to a text without one is taken off again."
        ),
        examples=("\\e greeting",),
        writes=True,
    )


async def show_help(shell: Shell, session: Session, call: Call) -> Result:
    """`help`, with what only the shell has."""
    if call.words:
        return Text(help_text(shell.table, shell.table.find(call.words[0])))
    return Text(f"{help_text(shell.table)}\n\n{SHELL_HELP}")


async def show_shell_help(shell: Shell, session: Session, call: Call) -> Result:
    """What only the shell has."""
    rows = [row for row in shell.table.commands if row.name.startswith("\\")]
    width = max(len(row.usage) for row in rows)
    lines = [f"  {row.usage:<{width}}  {row.summary}" for row in rows]
    return Text("\n".join(["The shell's own commands:", *lines, SHELL_HELP]))


async def timing(shell: Shell, session: Session, call: Call) -> Result:
    """Whether durations are said."""
    shell.timing = _switched(shell.timing, call)
    return Text(f"timing is {'on' if shell.timing else 'off'}")


async def pager(shell: Shell, session: Session, call: Call) -> Result:
    """Whether a pager is used."""
    shell.paging = _switched(shell.paging, call)
    return Text(f"the pager is {'on' if shell.paging else 'off'}")


async def output(shell: Shell, session: Session, call: Call) -> Result:
    """The form of results."""
    if call.words:
        form = call.words[0].decode("utf-8", "replace").lower()
        if form not in OUTPUTS:
            raise UsageError(f"\\o: {show_word(call.words[0])} is not one of {', '.join(OUTPUTS)}")
        session.settings = replace(session.settings, output=form)
    return Text(f"output is {session.settings.output}")


def _switched(before: bool, call: Call) -> bool:
    """on, off, or without a word the other one. Raises UsageError."""
    if not call.words:
        return not before
    word = call.words[0].lower()
    if word not in (b"on", b"off"):
        raise UsageError(f"{call.command.name}: {show_word(call.words[0])} is neither on nor off")
    return word == b"on"


async def watch(shell: Shell, session: Session, call: Call) -> Result:
    """Again and again: what goes wrong is said, and may be right the next time."""
    words = [word.decode("utf-8", "surrogateescape") for word in call.words]
    interval_s = WATCH_S_DEFAULT
    if words and words[0][:1] in "0123456789.":
        try:
            interval_s = parse_seconds(words.pop(0))
        except ValueError as error:
            raise UsageError(f"\\watch: {error}") from None
    line = words[0] if words else shell.last_line
    if not line:
        raise UsageError("\\watch: there is no last command; give one")
    again, shell_command = shell.understand(line)  # a line that is no command ends it at once
    if again is None or again.command.name.startswith("\\"):
        raise UsageError("\\watch: it repeats commands of the program only")
    while True:
        note(f"-- {time.strftime('%H:%M:%S')}, every {interval_s:g} s: {line.strip()}")
        try:
            again, shell_command = shell.understand(line)  # anew: a value may come from a file
            assert again is not None
            await shell.execute(again, shell_command, paged=False)
        except (UsageError, WordError):
            raise
        except Exception as error:
            note(complaint(session, again, error))
        shell.running = None  # nothing is interrupted by the end of the pause
        await asyncio.sleep(interval_s)


async def edit_value(shell: Shell, session: Session, call: Call) -> Result:
    """Read, edit, store at the version that was read."""
    (key,) = call.words
    txn = session.transaction_of(call)
    editor = find_editor(shell.environment)
    found = await (txn.get(key) if txn is not None else session.kv(call.options).get(key))
    before = found.value if found is not None else b""
    with shell.in_foreground():
        after = await edit(before, editor)
    if after == before:
        note("nothing was changed")
        return Lines(_nothing())
    if txn is not None:
        await txn.put(key, after)
        return Done()
    version = found.version if found is not None else 0
    return Done({"version": await session.kv(call.options).put(key, after, if_version=version)})


async def _nothing() -> AsyncIterator[bytes]:
    lines: tuple[bytes, ...] = ()
    for line in lines:
        yield line
