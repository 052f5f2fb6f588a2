"""Colours of the line being typed: commands, options, quotes, escapes, numbers, comments; in red what can't be right.

With NO_COLOR nothing is coloured; what differs in weight still does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prompt_toolkit.lexers import Lexer
from prompt_toolkit.styles import Style

from raftkv.cli.command_table import CommandTable
from raftkv.cli.typed_line import Role, TypedCommand, TypedWord, typed_commands

if TYPE_CHECKING:
    from prompt_toolkit.document import Document
    from prompt_toolkit.formatted_text import StyleAndTextTuples

STYLE = Style.from_dict(
    {
        "prompt": "bold",
        "prompt.transaction": "ansiyellow bold",
        "prompt.lost": "ansired bold",
        "line.command": "ansigreen bold",
        "line.option": "ansicyan",
        "line.string": "ansiyellow",
        "line.escape": "ansimagenta bold",
        "line.number": "ansiblue",
        "line.comment": "italic dim",
        "line.wrong": "ansired underline",
        "line.pipe": "bold",
        "line.shell": "ansicyan",
        "hint": "dim",
        "auto-suggestion": "noinherit dim",
    }
)

Span = tuple[int, int, str]
"""From, to, and the name of a style."""


class LineLexer(Lexer):
    """What prompt_toolkit asks for each line of the text."""

    def __init__(self, table: CommandTable) -> None:
        self._table = table

    def lex_document(self, document: Document) -> Callable[[int], StyleAndTextTuples]:
        """The styled pieces of a line, by its number."""
        lines: list[StyleAndTextTuples] = [[]]
        for style, text in styled(self._table, document.text):
            first, *rest = text.split("\n")
            lines[-1].append((style, first))
            lines += [[(style, line)] for line in rest]
        return lambda number: lines[number] if number < len(lines) else []


def styled(table: CommandTable, text: str) -> list[tuple[str, str]]:
    """All of the text in pieces, each with its style."""
    pieces: list[tuple[str, str]] = []
    position = 0
    for command in typed_commands(table, text):
        for start, end, name in _spans(table, text, command):
            if position < start:
                pieces.append(("", text[position:start]))
            pieces.append((f"class:line.{name}" if name else "", text[start:end]))
            position = end
    if position < len(text):
        pieces.append(("", text[position:]))
    return pieces


def _spans(table: CommandTable, text: str, command: TypedCommand) -> Iterator[Span]:
    for word, role in zip(command.words, command.roles, strict=True):
        unfinished = word.end == len(text)
        if not _may_be_right(table, word, role, unfinished):
            yield word.start, word.end, "wrong"
        else:
            yield from _word(word, role)
    if command.comment is not None:
        yield (*command.comment, "comment")
    if command.pipe is not None and command.shell is not None:
        yield command.pipe.start, command.pipe.end, "pipe"
        yield (*command.shell, "shell")


def _word(word: TypedWord, role: Role) -> Iterator[Span]:
    """The parts of a word that is not all wrong."""
    name = {"command": "command", "option": "option", "dashes": "option"}.get(role.kind, "")
    if not name:
        name = "string" if word.quote else "number" if word.is_number else ""
    position, good = word.start, word.end if word.wrong is None else word.wrong
    for start, end in word.escapes:
        yield position, start, name
        yield start, end, "escape"
        position = end
    yield position, good, name
    if good < word.end:
        yield good, word.end, "wrong"


def _may_be_right(table: CommandTable, word: TypedWord, role: Role, unfinished: bool) -> bool:
    """Whether the word can stand where it does, or, while it is unfinished, may become what can."""
    text = word.data.decode("utf-8", "surrogateescape")
    if role.kind == "extra":
        return role.command is None
    if role.kind == "command":
        names = [name for name in table.by_name if name.startswith(text.lower())]
        return role.command is not None or (unfinished and bool(names))
    if role.kind == "argument" and role.argument is not None and role.argument.choices:
        choices = [choice.lower() for choice in role.argument.choices]
        return text.lower() in choices or (unfinished and any(choice.startswith(text.lower()) for choice in choices))
    if role.kind == "option":
        return _is_option(table, role, text, unfinished)
    if role.kind == "value" and role.option is not None and role.option.parse is not None and not unfinished:
        try:
            role.option.parse(text)
        except ValueError:
            return False
    return True


def _is_option(table: CommandTable, role: Role, text: str, unfinished: bool) -> bool:
    allowed = [option for option in table.options if not option.program_only]
    allowed += role.command.options if role.command is not None else ()
    if role.option is None or not any(text.split("=")[0].startswith(name) for name in role.option.names):
        return unfinished and any(name.startswith(text) for option in allowed for name in option.names)
    return role.option in allowed or role.command is None
