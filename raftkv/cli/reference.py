"""`python -m raftkv.cli.reference > docs/commands.md`: the reference page, made of the catalogue.

A test fails when the page differs from this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from raftkv.cli.catalogue import CommandRow, OptionRow, programs, shell_rows
from raftkv.cli.exit_codes import EXIT_CODE_HELP
from raftkv.cli.repl_backslash import SHELL_HELP

_HEAD = """\
# Every command and option

Made by `python -m raftkv.cli.reference > docs/commands.md` of what the programs themselves know; don't edit it. The
[README](../README.md) is what to read first.

An option may be given on the command line, in the environment variable beside it, or for most by a key of the
configuration file; the command line wins over the environment, and that over the file.
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        [_HEAD, *_contents(), *(line for program in programs() for line in _program(program)), *_shells(), *_codes()]
    )


def _contents() -> Iterator[str]:
    for program in programs():
        commands = [row for row in program.all() if row is not program and _has_section(program, row)]
        links = ",\n  ".join(f"[{row.path.removeprefix(program.path + ' ')}](#{_anchor(row)})" for row in commands)
        yield f"- [{program.path}](#{_anchor(program)}): {links}"
    yield "- [In the shells](#in-the-shells)"
    yield "- [Exit codes](#exit-codes)"
    yield ""


def _has_section(program: CommandRow, row: CommandRow) -> bool:
    """What is below `raftkv kv` has it below `raftkv-kv`."""
    return row.path.split()[0] == program.path


def _program(program: CommandRow) -> Iterator[str]:
    for row in program.all():
        if not _has_section(program, row):
            continue
        yield f"{'##' if row is program else '###'} {row.path}"
        yield ""
        yield from ("```", row.text, "```", "")
        if row.path in ("raftkv kv", "raftkv ctl"):
            continue
        common = program.options if row is not program else ()
        own = [option for option in row.options if option not in common]
        yield from _options(own, shared=bool(common) and program.path != "raftkv")


def _options(options: list[OptionRow], *, shared: bool) -> Iterator[str]:
    if options:
        yield from ("| option | variable | default | |", "|---|---|---|---|")
        for option in options:
            variable = f"`{option.variable}`" if option.variable else ""
            yield f"| `{_cell(option.usage)}` | {variable} | {_cell(option.default)} | {_cell(option.help)} |"
        yield ""
    if shared:
        yield "And the options of the program, on a line of a script or in the shell only `-o` and `--timeout`."
        yield ""


def _shells() -> Iterator[str]:
    yield from (
        "## In the shells",
        "",
        "raftkv-kv and raftkv-ctl without a COMMAND, on a terminal, have these too (\\e is about values: raftkv-kv's):",
        "",
    )
    for row in shell_rows():
        yield from ("```", row.text, "```", "")
    yield from ("```", SHELL_HELP, "```", "")


def _codes() -> Iterator[str]:
    yield from ("## Exit codes", "", "| | |", "|---|---|")
    for code, text in EXIT_CODE_HELP.items():
        yield f"| {int(code)} | {text} |"
    yield ""


def _anchor(row: CommandRow) -> str:
    return row.path.replace(" ", "-")


def _cell(text: str) -> str:
    """Text in a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
