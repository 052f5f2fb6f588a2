"""The command table: what a command is, its grammar, and the help that follows from it.

Everything that knows about commands — the parser of argument vectors, of script lines and of REPL
lines, `help`, `--help` — reads this table; no command is described anywhere else. Nothing here talks
to a server, and nothing here prints.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raftkv.cli.exit_codes import UsageError
from raftkv.cli.words import Word, show_word

if TYPE_CHECKING:
    from raftkv.cli.results import Result
    from raftkv.cli.session import Session


@dataclass(frozen=True, slots=True)
class Argument:
    """One word of a command (`many`: one or more). `is_value`: `-`, `@FILE` and `@@` have their meaning.

    `completes` says what a shell may offer for it: keys, gids, shards, txids, files, commands, or line (it begins a
    whole command); `choices` are the words that it can only be.
    """

    name: str
    required: bool = True
    many: bool = False
    is_value: bool = False
    completes: str = ""
    choices: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        """How a usage line shows it."""
        shown = f"{self.name} …" if self.many else self.name
        return shown if self.required else f"[{shown}]"


@dataclass(frozen=True, slots=True)
class Option:
    """One option; `parse` turns its text into a value and raises ValueError; None makes it a flag."""

    names: tuple[str, ...]
    help: str
    parse: Callable[[str], Any] | None = None
    metavar: str = ""
    default: str = ""  # in words, where there is one
    program_only: bool = False  # may stand on the command line, not on a line of a script
    variable: bool = True  # False: what it asks for is for one command, never a setting for all
    choices: tuple[str, ...] = ()  # what its text can only be
    danger: str = ""  # what it loses; empty: nothing

    @property
    def key(self) -> str:
        """Its name in `Call.options`: the first long name, as a Python identifier."""
        longest = next(name for name in self.names if name.startswith("--"))
        return longest[2:].replace("-", "_")

    @property
    def environment(self) -> str:
        """The environment variable that sets it where the command line doesn't."""
        return f"RAFTKV_{self.key.upper()}"

    @property
    def usage(self) -> str:
        """How help shows it."""
        names = ", ".join(self.names)
        return f"{names} {self.metavar}" if self.parse else names


@dataclass(frozen=True, slots=True)
class Call:
    """A command with its words (still as they were typed) and its options by key."""

    command: Command
    words: tuple[bytes, ...]
    options: Mapping[str, Any]
    quoted: tuple[bool, ...] = ()  # which of the words stood in quotes, on a line

    def __str__(self) -> str:
        """The command and its first word, for messages."""
        return " ".join([self.command.name, *(show_word(word) for word in self.words[:1])])


Handler = Callable[["Session", Call], Awaitable["Result"]]


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table."""

    name: str
    summary: str
    run: Handler
    arguments: tuple[Argument, ...] = ()
    options: tuple[Option, ...] = ()
    details: str = ""
    examples: tuple[str, ...] = ()
    danger: str = ""  # what to take care of; an option that loses something says so itself
    writes: bool = False  # an interrupted one may still apply
    pipelines: bool = False  # one request on one key, its first word: several may be in flight

    @property
    def usage(self) -> str:
        """The usage line, without options that every command has."""
        options = [f"[{option.usage.split(', ')[-1]}]" for option in self.options]
        return " ".join([self.name, *(argument.usage for argument in self.arguments), *options])

    def check_arity(self, words: Sequence[bytes]) -> None:
        """Raise UsageError unless the number of words fits."""
        least = sum(argument.required for argument in self.arguments)
        most = None if any(argument.many for argument in self.arguments) else len(self.arguments)
        if len(words) < least or (most is not None and len(words) > most):
            problem = "needs more words" if len(words) < least else "got too many words"
            raise UsageError(f"{self.name} {problem}: usage: {self.usage}")


@dataclass(frozen=True, slots=True)
class CommandTable:
    """All commands of one program, and the options that each of them takes."""

    program: str  # raftkv-kv or raftkv-ctl
    about: str
    commands: tuple[Command, ...]
    options: tuple[Option, ...]
    examples: tuple[str, ...] = ()  # for a shell
    by_name: dict[str, Command] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_name.update({command.name.lower(): command for command in self.commands})
        assert len(self.by_name) == len(self.commands), "two commands share a name"

    def find(self, name: bytes) -> Command:
        """The command of that name in any case. Raises UsageError, with the nearest name if there is one."""
        text = name.decode("utf-8", "replace")
        command = self.by_name.get(text.lower())
        if command is not None:
            return command
        near = _nearest(text.lower(), self.by_name)
        hint = f"did you mean {self.by_name[near].name}?" if near else "`help` lists the commands"
        raise UsageError(f"unknown command {show_word(name)}; {hint}")


@dataclass(frozen=True, slots=True)
class Parsed:
    """A line or argument vector taken apart; `command` is None when it had no words."""

    command: Command | None
    words: tuple[bytes, ...]
    options: dict[str, Any]
    quoted: tuple[bool, ...] = ()

    def call(self) -> Call:
        """The call, its arity checked."""
        assert self.command is not None
        self.command.check_arity(self.words)
        return Call(self.command, self.words, self.options, self.quoted)


def parse(
    table: CommandTable, words: Sequence[Word], *, environment: Mapping[str, str], on_a_line: bool = False
) -> Parsed:
    """Take `words` apart: options before, between or after the words; `--` ends them.

    `on_a_line` is a line of a script or the REPL, where options of the program don't stand. A word such
    as `-`, `-5` or a quoted one is never an option. Raises UsageError.
    """
    known = {name: option for option in table.options for name in option.names}
    for command in table.commands:
        known.update({name: option for option in command.options for name in option.names})
    plain: list[Word] = []
    given: dict[str, tuple[Option, Any]] = {}
    rest = iter(words)
    for word in rest:
        if word.quoted or not looks_like_option(word.data):
            plain.append(word)
            continue
        if word.data == b"--":
            plain.extend(rest)
            break
        name, option, text = _option(known, word.data)
        if option.program_only and on_a_line:
            raise UsageError(f"{name} belongs on the command line of {table.program}, not on a line")
        if option.parse is not None and text is None:
            following = next(rest, None)
            if following is None:
                raise UsageError(f"{name} needs a value: {option.usage}")
            text = following.data.decode("utf-8", "surrogateescape")
        given[option.key] = (option, _value(option, name, text))
    command_row = table.find(plain[0].data) if plain else None
    options: dict[str, Any] = {}
    own = command_row.options if command_row is not None else ()
    for option in (*table.options, *own):
        if option.key in given:
            options[option.key] = given.pop(option.key)[1]
        elif on_a_line and option not in own:
            continue  # the program has taken it from there, unless its command line said otherwise
        elif option.variable and environment.get(option.environment):
            options[option.key] = _value(option, option.environment, environment[option.environment])
    for option, _ in given.values():
        subject = command_row.name if command_row is not None else table.program
        raise UsageError(f"{subject} takes no {option.names[-1]}; `help {subject}` shows what it takes")
    words_after = plain[1:]
    return Parsed(
        command_row,
        tuple(word.data for word in words_after),
        options,
        tuple(word.quoted for word in words_after),
    )


def looks_like_option(data: bytes) -> bool:
    """`-x…` and `--…`, but not `-` (a value) nor `-5` (a number)."""
    return len(data) > 1 and data[:1] == b"-" and data[1:2] not in b"0123456789."


def _option(known: Mapping[str, Option], data: bytes) -> tuple[str, Option, str | None]:
    """The option that `data` names, and the text glued to it (`--limit=5`, `-ojson`). Raises UsageError."""
    text = data.decode("utf-8", "surrogateescape")
    name, equals, value = text.partition("=")
    if name in known:
        return name, known[name], value if equals else None
    if not text.startswith("--") and text[:2] in known and known[text[:2]].parse is not None:
        return text[:2], known[text[:2]], text[2:]
    near = _nearest(name, known, 0.75) if name.startswith("--") else ""
    hint = f"did you mean {near}? " if near else ""
    raise UsageError(f"unknown option {show_word(data)}; {hint}put `--` before words that begin with a dash")


def _nearest(text: str, known: Iterable[str], least: float = 0.6) -> str:
    """The one that was probably meant; empty if none is near."""
    import difflib  # only after a mistake: it costs milliseconds

    return next(iter(difflib.get_close_matches(text, known, n=1, cutoff=least)), "")


_FLAG_TEXTS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def _value(option: Option, name: str, text: str | None) -> Any:
    """The option's value from its text. Raises UsageError."""
    if option.parse is None:
        if text is None:
            return True
        if text.lower() not in _FLAG_TEXTS:
            raise UsageError(f"{name} takes no value other than yes or no")
        return _FLAG_TEXTS[text.lower()]
    assert text is not None
    try:
        return option.parse(text)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def help_text(table: CommandTable, command: Command | None = None) -> str:
    """The help on one command, or on all: examples first."""
    if command is None:
        return _overview(table)
    options = (*command.options, *(option for option in table.options if not option.program_only))
    return "\n".join([*about_lines(command), "", _OPTIONS, *_option_lines(options)])


def about_lines(command: Command) -> list[str]:
    """The help on one command without its options."""
    lines = [f"{command.usage}", ""]
    if command.examples:
        lines += ["Examples:", *(f"  {example}" for example in command.examples), ""]
    lines.append(f"  {command.summary}")
    if command.details:
        lines += ["", *(f"  {line}" for line in command.details.splitlines())]
    if command.danger:
        lines += ["", f"  Danger: {command.danger}"]
    return lines


def _overview(table: CommandTable) -> str:
    """All commands and the options of the program."""
    width = max(len(command.usage) for command in table.commands)
    rows = [f"  {command.usage:<{width}}  {command.summary}" for command in table.commands]
    lines = [
        f"{table.program} [OPTIONS] [COMMAND ARG…]",
        "",
        "Examples:",
        *(f"  {example}" for example in table.examples),
        "",
        *(f"  {line}" for line in table.about.splitlines()),
        "",
        f"Commands (in any case; `{table.program} COMMAND --help` has examples of each):",
        *rows,
        "",
        _OPTIONS,
        *_option_lines(table.options),
    ]
    return "\n".join(lines)


_OPTIONS = "Options (in brackets the environment variable that sets it, too):"


def _option_lines(options: Sequence[Option]) -> list[str]:
    """One aligned line for each option."""
    width = max(len(option.usage) for option in options)
    defaults = [f"; default: {option.default}" if option.default else "" for option in options]
    variables = [f" [{option.environment}]" if option.variable else "" for option in options]
    return [
        f"  {option.usage:<{width}}  {option.help}{default}{variable}"
        for option, default, variable in zip(options, defaults, variables, strict=True)
    ]


def parse_seconds(text: str) -> float:
    """`10`, `0.5`, `10s` or `500ms` as seconds, above 0 and at most a day. Raises ValueError."""
    number, scale = (text[:-2], 0.001) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    try:
        seconds = float(number) * scale
    except ValueError:
        raise ValueError(f"{text!r} is not a time; write seconds, such as 10 or 0.5, or 500ms") from None
    if not 0 < seconds <= 86_400:
        raise ValueError(f"{text!r} is not a time that is more than 0 and at most 86400 seconds")
    return seconds


def parse_count(text: str, least: int = 1, most: int = 1 << 62) -> int:
    """A whole number from `least` to `most`. Raises ValueError."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit():
        raise ValueError(f"{text!r} is not a whole number")
    if len(digits) > 100 or not least <= int(text) <= most:  # int() of a very long one costs seconds
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise ValueError(f"{shown} is out of range: it must be between {least} and {most}")
    return int(text)


def parse_controllers(text: str) -> tuple[str, ...]:
    """`HOST:PORT,HOST:PORT,…`. Raises ValueError."""
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses:
        raise ValueError("give at least one HOST:PORT")
    for address in addresses:
        check_address(address)
    return addresses


def check_address(address: str) -> None:
    """Raise ValueError unless `address` is HOST:PORT."""
    from raftkv.protocol.addresses import parse_address
    from raftkv.protocol.errors import BadRequest

    try:
        parse_address(address)
    except BadRequest as error:
        raise ValueError(error.reason) from None
