"""A line as it is being typed: its words with their places, and what each of them is by the command table.

Highlighting, completion and hints look at this. The words are those of `words.split_words` and their roles those of
`command_table.parse`, but nothing is an error here: what can't be read is marked, what is unfinished may go on.
Pure functions; nothing here prints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from raftkv.cli.command_table import Argument, Command, CommandTable, Option, looks_like_option
from raftkv.cli.words import split_words

PIPE = "|"
SCANNED_MAX = 64
"""Lines whose words are remembered."""

_BLANKS = re.compile(r"[ \t\r\v\f]*")
_BARE = re.compile(r"[^ \t\r\n\v\f]*")
_ESCAPE = re.compile(r"\\(?:[\\\"nrt0]|x[0-9A-Fa-f]{2})")
_ESCAPE_BEGUN = re.compile(r"\\(?:x[0-9A-Fa-f]?)?\Z")
_NO_ESCAPE = re.compile(r'[^"\\]*')
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?\Z")


class TypedWord(NamedTuple):
    """One word of a text, between two positions; one that has not been begun is empty."""

    start: int
    end: int
    readable: str  # as far as it can be read, its quote closed
    quote: str = ""  # the quote that it begins with
    closed: bool = True  # False: its quote is open at the end of the text
    escapes: tuple[tuple[int, int], ...] = ()
    wrong: int | None = None  # from this position on it can't be read

    @property
    def data(self) -> bytes:
        """What it stands for."""
        words = split_words(self.readable.encode("utf-8", "surrogateescape"))
        return words[0].data if words else b""

    @property
    def is_number(self) -> bool:
        """Whether it is one, for the eye."""
        return not self.quote and bool(_NUMBER.match(self.readable))


class Role(NamedTuple):
    """What a word is. `kind`: command, option, value (of an option), argument, dashes, or extra: too many."""

    kind: str
    command: Command | None = None  # None where it is of none, or unknown
    option: Option | None = None
    argument: Argument | None = None


@dataclass(slots=True)
class TypedCommand:
    """One command of a text."""

    start: int
    end: int
    words: list[TypedWord]
    roles: list[Role]
    comment: tuple[int, int] | None
    pipe: TypedWord | None
    shell: tuple[int, int] | None  # what stands behind the pipe

    @property
    def is_open(self) -> bool:
        """Whether a quote is open at its end."""
        return bool(self.words) and not self.words[-1].closed and self.words[-1].wrong is None and self.pipe is None

    def text_of(self, whole: str) -> str:
        """The command itself, without what stands behind a pipe."""
        return whole[self.start : self.pipe.start if self.pipe else self.end]

    def shell_of(self, whole: str) -> str | None:
        """The shell command behind a pipe; None if there is no pipe."""
        return None if self.pipe is None else whole[self.pipe.end : self.end].strip()

    @property
    def command(self) -> Command | None:
        """The last command that it names: of `\\watch 2 get k` it is Get."""
        return next((role.command for role in reversed(self.roles) if role.kind == "command"), None)


def typed_commands(table: CommandTable, text: str) -> list[TypedCommand]:
    """The commands of a text, one a line; a quote may hold line ends. There is at least one."""
    commands = []
    position = 0
    while True:
        scanned = _scan(text, position)
        words = [*scanned.words]
        end, comment, pipe, shell = scanned.end, scanned.comment, scanned.pipe, scanned.shell
        command = TypedCommand(position, end, words, roles_of(table, words), comment, pipe, shell)
        commands.append(command)
        if command.end >= len(text):
            return commands
        position = command.end + 1


def begin_word(table: CommandTable, command: TypedCommand, position: int) -> TypedWord:
    """The word at the end of the command; one that could begin there, if the last one is over."""
    last = command.words[-1] if command.words else None
    if last is None or last.end < position:
        command.words.append(TypedWord(position, position, ""))
        command.roles = roles_of(table, command.words)
    return command.words[-1]


class _Scanned(NamedTuple):
    """What one line of a text holds, whatever the table says of it."""

    end: int
    words: tuple[TypedWord, ...] = ()
    comment: tuple[int, int] | None = None
    pipe: TypedWord | None = None
    shell: tuple[int, int] | None = None


@lru_cache(maxsize=SCANNED_MAX)
def _scan(text: str, start: int) -> _Scanned:
    """The words from `start` to the end of the line or text. At each key the same text is looked at several times."""
    words: list[TypedWord] = []
    position = _after(_BLANKS, text, start)
    if text.startswith("#", position):
        end = _line_end(text, position)
        return _Scanned(end, comment=(position, end))
    while position < len(text) and text[position] != "\n":
        word = _quoted(text, position) if text[position] in "\"'" else _bare(text, position)
        if word.readable == PIPE and words:
            end = _line_end(text, word.end)
            return _Scanned(end, tuple(words), pipe=word, shell=(word.end, end))
        words.append(word)
        position = _after(_BLANKS, text, word.end)
    return _Scanned(position, tuple(words))


def _bare(text: str, start: int) -> TypedWord:
    end = _after(_BARE, text, start)
    return TypedWord(start, end, text[start:end])


def _quoted(text: str, start: int) -> TypedWord:
    """The word in quotes that opens at `start`."""
    quote = text[start]
    escapes: list[tuple[int, int]] = []
    position = start + 1
    if quote == "'":
        close = text.find(quote, position)
        position = len(text) if close < 0 else close
    while quote == '"':
        position = _after(_NO_ESCAPE, text, position)
        if not text.startswith("\\", position):
            break
        escape = _ESCAPE.match(text, position)
        if escape is None:
            return _with_bad_escape(text, start, position, tuple(escapes))
        escapes.append(escape.span())
        position = escape.end()
    if position >= len(text):
        return TypedWord(start, len(text), text[start:] + quote, quote, False, tuple(escapes))
    end = _after(_BARE, text, position + 1)
    wrong = position + 1 if end > position + 1 else None  # a space must follow
    return TypedWord(start, end, text[start : position + 1], quote, True, tuple(escapes), wrong)


def _with_bad_escape(text: str, start: int, position: int, escapes: tuple[tuple[int, int], ...]) -> TypedWord:
    """A word in double quotes with an escape that is none; or isn't one yet, at the end of the text."""
    close = text.find('"', position + 2)
    end = len(text) if close < 0 else _after(_BARE, text, close + 1)
    begun = bool(_ESCAPE_BEGUN.match(text, position))
    return TypedWord(start, end, text[start:position] + '"', '"', close >= 0, escapes, None if begun else position)


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def roles_of(table: CommandTable, words: Sequence[TypedWord]) -> list[Role]:
    """What each word is, as `parse` would have it."""
    known = {name: option for option in table.options for name in option.names}
    for row in table.commands:
        known.update({name: option for option in row.options for name in option.names})
    roles: list[Role] = []
    command: Command | None = None
    expected: list[Argument] | None = None  # None: the command itself is
    waiting: Option | None = None
    dashes = False
    for word in words:
        if waiting is not None:
            roles.append(Role("value", command, waiting))
            waiting = None
        elif not dashes and not word.quote and looks_like_option(word.data):
            option, waits = _option(known, word.readable)
            dashes = word.readable == "--"
            roles.append(Role("dashes" if dashes else "option", command, option))
            waiting = option if waits else None
        elif expected is None or _begins_command(expected, word):
            command = table.by_name.get(word.data.decode("utf-8", "replace").lower())
            expected = list(command.arguments) if command is not None else []
            roles.append(Role("command", command))
        elif expected:
            roles.append(Role("argument", command, None, expected[0]))
            if not expected[0].many:
                expected.pop(0)
        else:
            roles.append(Role("extra", command))
    return roles


def _begins_command(expected: Sequence[Argument], word: TypedWord) -> bool:
    """Whether a whole command stands here: in `\\watch`, with or without the number before it."""
    return any(argument.completes == "line" for argument in expected[: 1 if word.is_number else 2])


def _option(known: Mapping[str, Option], text: str) -> tuple[Option | None, bool]:
    """The option that the text names, if any, and whether its value is the next word."""
    name, equals, _ = text.partition("=")
    if name in known:
        return known[name], known[name].parse is not None and not equals
    glued = known.get(text[:2])
    return (glued if glued is not None and glued.parse is not None else None), False
