"""All programs, commands and options as plain values: what the reference page and the shells' completion are made of.

`raftkv-kv` and `raftkv-ctl` come from their command tables, the rest from the click commands, `sim` and `check` from
their own parsers. Nothing is described here a second time. Imports everything, so nothing imports it at the start.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, cast

import click

from raftkv.cli.command_table import Argument, Command, Option, about_lines
from raftkv.cli.main import _COMMANDS, _root
from raftkv.cli.programs import command_table
from raftkv.cli.repl_backslash import with_backslash_commands

if TYPE_CHECKING:
    import argparse

    from raftkv.cli.repl import Shell

TABLE_PROGRAMS = ("raftkv-kv", "raftkv-ctl")
FILE, DIRECTORY, COMMAND = "FILE", "DIR", "COMMAND"
"""What a word may stand for, besides one of some fixed words."""


@dataclass(frozen=True, slots=True)
class OptionRow:
    """One option; `metavar` is empty for a flag, `words` are what it takes, where they are known."""

    names: tuple[str, ...]
    metavar: str
    help: str
    variable: str = ""
    default: str = ""
    words: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        """How it is written."""
        return f"{', '.join(self.names)} {self.metavar}".rstrip()


@dataclass(frozen=True, slots=True)
class CommandRow:
    """One command or program with what is below it; `words` are for the words after it, one after the other."""

    path: str  # `raftkv local up`
    summary: str
    text: str  # its help without the options, lines as they stand
    options: tuple[OptionRow, ...] = ()
    below: tuple[CommandRow, ...] = ()
    words: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        """Its last word, as it is typed."""
        return self.path.rsplit(" ", 1)[-1]

    def all(self) -> Iterator[CommandRow]:
        """It and everything below."""
        yield self
        for row in self.below:
            yield from row.all()


@cache
def programs() -> tuple[CommandRow, ...]:
    """raftkv-kv, raftkv-ctl and raftkv, in the order of the reference."""
    return (*(_table_program(name) for name in TABLE_PROGRAMS), _click_program())


# ---- from the command tables


def _table_program(program: str) -> CommandRow:
    table = command_table(program)
    common = tuple(option for option in table.options if not option.program_only)
    commands = tuple(_table_command(program, command, (*command.options, *common)) for command in table.commands)
    text = "\n".join([f"{program} [OPTIONS] [COMMAND ARG…]", "", "Examples:", *(f"  {e}" for e in table.examples)])
    text += "\n\n" + "\n".join(f"  {line}" for line in table.about.splitlines())
    return CommandRow(program, table.about.splitlines()[0], text, _table_options(table.options), commands)


def _table_command(program: str, command: Command, options: tuple[Option, ...]) -> CommandRow:
    return CommandRow(
        f"{program} {command.name.lower()}",
        command.summary,
        "\n".join(about_lines(command)),
        _table_options(options),
        words=tuple(_words(argument) for argument in command.arguments),
    )


def _table_options(options: tuple[Option, ...]) -> tuple[OptionRow, ...]:
    return tuple(
        OptionRow(
            option.names,
            option.metavar if option.parse else "",
            option.help,
            option.environment if option.variable else "",
            option.default,
            option.choices or ((FILE,) if option.metavar == FILE else ()),
        )
        for option in options
    )


def _words(argument: Argument) -> tuple[str, ...]:
    """What a word of a command may be, as far as a shell that asks no server can know."""
    if argument.completes in _KINDS:
        return (_KINDS[argument.completes],)
    return ("@",) if argument.is_value else tuple(choice.lower() for choice in argument.choices)


_KINDS = {"files": FILE, "commands": COMMAND}


def shell_rows() -> tuple[CommandRow, ...]:
    """What only the shell of raftkv-kv has; raftkv-ctl has the same, but for what is about values."""
    table = with_backslash_commands(cast("Shell", None), command_table("raftkv-kv"))  # nobody runs them
    own = [command for command in table.commands if command.name.startswith("\\")]
    return tuple(replace(_table_command("raftkv-kv", command, ()), path=command.name) for command in own)


# ---- from click


def _click_program() -> CommandRow:
    return _click_command(_root(), "raftkv", "")


def _click_command(command: click.Command, path: str, summary: str) -> CommandRow:
    context = click.Context(command, info_name=path, help_option_names=["-h", "--help"])
    shown = inspect.cleandoc(command.help or "").replace("\b\n", "")
    params = command.get_params(context)
    options = tuple(_click_option(param, context) for param in params if isinstance(param, click.Option))
    words = tuple(_click_words(param.type) for param in params if isinstance(param, click.Argument))
    below: list[CommandRow] = []
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            one = command.get_command(context, name)
            assert one is not None
            text = _COMMANDS[name][2] if path == "raftkv" else one.get_short_help_str(200)
            below.append(_passed_on(name, text) if name in _PASSED_ON else _click_command(one, f"{path} {name}", text))
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    return CommandRow(path, summary or shown.splitlines()[0], f"{usage}\n\n{shown}", options, tuple(below), words)


def _click_option(param: click.Option, context: click.Context) -> OptionRow:
    text, _, default = (param.help or "").partition("[default: ")
    extra = param.get_help_extra(context)
    default = default.removesuffix("]") or extra.get("default", "") or extra.get("required", "")
    metavar = "" if param.is_flag else param.make_metavar(context).strip("[]")
    if isinstance(param.type, click.types.IntParamType | click.types.FloatParamType) and param.metavar is None:
        metavar = "N"
    limits = f" ({extra['range']})" if "range" in extra else ""
    words = _click_words(param.type) or ((metavar,) if metavar in (FILE, DIRECTORY) else ())
    variables = ", ".join(extra.get("envvars", ()))
    return OptionRow((*param.opts, *param.secondary_opts), metavar, text.strip() + limits, variables, default, words)


def _click_words(kind: click.ParamType[object]) -> tuple[str, ...]:
    if isinstance(kind, click.Choice):
        return tuple(str(choice) for choice in kind.choices)
    if isinstance(kind, click.Path):
        return (FILE,) if kind.dir_okay is False else (DIRECTORY,)
    return ()


# ---- from the parsers of sim and check

_PASSED_ON = ("sim", "check", "kv", "ctl")


def _passed_on(name: str, summary: str) -> CommandRow:
    """A command that takes its arguments apart by itself."""
    if name in ("kv", "ctl"):
        program = _table_program(f"raftkv-{name}")
        text = f"raftkv {name} [OPTIONS] [COMMAND ARG…]\n\nThe same as raftkv-{name}: see there."
        return CommandRow(f"raftkv {name}", summary, text, program.options, program.below)
    if name == "sim":
        from raftkv.sim.main import arguments
    else:
        from raftkv.sim.check.file import arguments
    parser = arguments()
    options = tuple(_argparse_option(action) for action in parser._actions if action.option_strings)
    words = ((FILE,),) if name == "check" else ()
    usage = f"raftkv {name} [OPTIONS]{' FILE …' if words else ''}"
    return CommandRow(
        f"raftkv {name}", summary, f"{usage}\n\n{(parser.description or '').rstrip()}", options, words=words
    )


def _argparse_option(action: argparse.Action) -> OptionRow:
    flag = action.nargs == 0
    choices = tuple(str(choice) for choice in action.choices or ())
    metavar = "" if flag else str(action.metavar or "|".join(choices))
    default = "" if flag or action.default is None else str(action.default)
    words = (FILE,) if metavar == FILE else choices
    return OptionRow(tuple(action.option_strings), metavar, action.help or "", "", default, words)
