"""Completion in the shell: commands, options, and the words that the command table says something about.

Never asks a server: what it offers is in the table, in what the session knows already, or, for files, in a folder.
Commands and options are matched in any case, keys as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from raftkv.cli.command_table import Argument, Command, CommandTable
from raftkv.cli.printers import ranges
from raftkv.cli.repl_known import Known
from raftkv.cli.typed_line import Role, TypedWord, begin_word, typed_commands
from raftkv.cli.words import quote_word

CANDIDATES_MAX = 200
FILES_SEEN_MAX = 2_000


class Candidate(NamedTuple):
    """Something to offer: `text` would stand from position `start` on; `meta` says what it is."""

    start: int
    text: str
    meta: str = ""


class LineCompleter(Completer):
    """What prompt_toolkit asks, at every key that is typed and at Tab."""

    def __init__(self, table: CommandTable, known: Known) -> None:
        self._table = table
        self._known = known

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Those of the word at the cursor."""
        text = document.text_before_cursor
        for candidate in candidates(self._table, self._known, text, asked=complete_event.completion_requested):
            yield Completion(candidate.text, candidate.start - len(text), display_meta=candidate.meta)


def candidates(table: CommandTable, known: Known, text: str, *, asked: bool = True) -> list[Candidate]:
    """What the word at the end of `text` could become. Unless it was asked for (by Tab), only if it has begun, and not
    if it is already what it would become."""
    command = typed_commands(table, text)[-1]
    if command.comment is not None or command.pipe is not None:
        return []
    word = begin_word(table, command, len(text))
    if word.wrong is not None or (not asked and word.start == word.end):
        return []
    begins_option = not word.quote and word.readable.startswith("-")
    found: list[Candidate] = []
    for candidate in _of_role(table, known, command.roles, word, begins_option):
        if len(found) == CANDIDATES_MAX:
            break
        found.append(candidate)
    if not asked and [candidate.text for candidate in found] == [text[word.start :]]:
        return []
    return found


def _of_role(
    table: CommandTable, known: Known, roles: list[Role], word: TypedWord, begins_option: bool
) -> Iterator[Candidate]:
    role = roles[-1]
    if role.kind == "command":
        yield from _commands(table.commands, word)
    elif role.kind == "value" and role.option is not None:
        yield from _choices(role.option.choices, word)
    elif role.kind in ("option", "dashes") or (begins_option and role.kind in ("argument", "extra")):
        yield from _options(table, role.command, roles, word)
    elif role.kind == "argument" and role.argument is not None:
        yield from _argument(table, known, role.argument, word)
    elif role.kind == "extra" and word.start == word.end:
        yield from _options(table, role.command, roles, word)


def _commands(commands: Iterable[Command], word: TypedWord) -> Iterator[Candidate]:
    typed = word.data.decode("utf-8", "replace")
    for command in sorted(commands, key=lambda command: command.name):
        if command.name.lower().startswith(typed.lower()):
            name = command.name.lower() if typed and typed.islower() else command.name
            yield Candidate(word.start, name, command.summary)


def _choices(choices: Iterable[str], word: TypedWord) -> Iterator[Candidate]:
    typed = word.data.decode("utf-8", "replace").lower()
    for choice in choices:
        if choice.lower().startswith(typed):
            yield Candidate(word.start, choice)


def _options(table: CommandTable, command: Command | None, roles: list[Role], word: TypedWord) -> Iterator[Candidate]:
    name, equals, value = word.readable.partition("=")
    given = {role.option.key for role in roles[:-1] if role.option is not None}
    own = command.options if command is not None else ()
    for option in (*own, *(option for option in table.options if not option.program_only)):
        if equals:
            if name in option.names:
                after = word.start + len(name) + 1
                yield from (Candidate(after, each) for each in option.choices if each.startswith(value.lower()))
        elif option.key not in given:
            shown = option.names[-1]
            if shown.startswith(word.readable.lower()):
                yield Candidate(word.start, shown, option.help)


def _argument(table: CommandTable, known: Known, argument: Argument, word: TypedWord) -> Iterator[Candidate]:
    yield from _choices(argument.choices, word)
    typed = word.data
    if argument.completes == "keys":
        for key in known.keys(typed):
            yield Candidate(word.start, quote_word(key).decode("ascii"), "key")
    elif argument.completes == "txids":
        yield from _choices(known.txids(), word)
    elif argument.completes == "commands":
        yield from _commands(table.commands, word)
    elif argument.completes == "gids" and known.shard_map is not None:
        groups = known.shard_map.groups
        start = word.start + typed.rfind(b",") + 1  # Leave takes several, with commas
        last = typed[typed.rfind(b",") + 1 :].decode("utf-8", "replace")
        for gid in sorted(groups):
            if str(gid).startswith(last):
                shards = ranges(known.shard_map.shards_of(gid))
                yield Candidate(start, str(gid), f"shards {shards or '-'} at {', '.join(groups[gid])}")
    elif argument.completes == "shards" and known.shard_map is not None:
        for shard, gid in enumerate(known.shard_map.owners):
            if str(shard).startswith(typed.decode("utf-8", "replace")):
                yield Candidate(word.start, str(shard), f"of group {gid}" if gid else "nobody's")
    elif argument.completes == "files":
        yield from _files(word, typed)
    elif argument.is_value and typed.startswith(b"@") and not typed.startswith(b"@@") and not word.quote:
        yield from (Candidate(file.start + 1, file.text, file.meta) for file in _files(word, typed[1:]))


def _files(word: TypedWord, typed: bytes) -> Iterator[Candidate]:
    """Files whose path begins so; of a folder too large to look through, some."""
    folder, slash, name = os.fsdecode(typed).rpartition("/")
    if word.quote:
        return
    try:
        with os.scandir(Path(folder + slash).expanduser() if folder + slash else ".") as entries:
            seen = [entry for entry, _ in zip(entries, range(FILES_SEEN_MAX), strict=False)]
    except (OSError, RuntimeError, ValueError):
        return
    for entry in sorted(seen, key=lambda entry: entry.name):
        if entry.name.startswith(name) and (name or not entry.name.startswith(".")) and entry.name.isprintable():
            path = f"{folder}{slash}{entry.name}"
            if quote_word(os.fsencode(path)) == os.fsencode(path):
                is_folder = entry.is_dir()
                yield Candidate(word.start, path + ("/" if is_folder else ""), "folder" if is_folder else "file")
