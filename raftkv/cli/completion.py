"""`raftkv completion bash|zsh|fish`: a script that completes raftkv, raftkv-kv and raftkv-ctl, made of the catalogue.

The script holds every command and option itself: at a keystroke no program is started and no server is asked. All
three work alike: walk over the words so far to the command that they name, past options and their values, then offer
what may stand at the cursor. The functions that do so are in `completion.bash`, `.zsh` and `.fish` beside this module;
here their data is made. Keys are not offered: only the shell of raftkv-kv knows some.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files

import click

from raftkv.cli.catalogue import COMMAND, DIRECTORY, FILE, CommandRow, OptionRow, programs

SHELLS = ("bash", "zsh", "fish")
DATA = "# DATA\n"
"""The line of a script at which its data stands."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script for a shell that completes raftkv, raftkv-kv and raftkv-ctl.

    \b
      source <(raftkv completion bash)
      raftkv completion bash > ~/.raftkv.bash       and `source ~/.raftkv.bash` in ~/.bashrc
      raftkv completion zsh > ~/.zfunc/_raftkv      and `fpath+=~/.zfunc` in ~/.zshrc, before compinit
      raftkv completion fish > ~/.config/fish/conf.d/raftkv.fish

    It holds every command and option, so it is to be made again after an update, and asks no server. bash 4 or newer.
    """
    sys.stdout.write(script(shell))


def script(shell: str) -> str:
    """The script for bash, zsh or fish."""
    frame = files(__package__).joinpath(f"completion.{shell}").read_text(encoding="utf-8")
    before, after = frame.split(DATA)
    return before + "".join(f"{line}\n" for line in {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()) + after


def _rows() -> Iterator[tuple[CommandRow, list[OptionRow]]]:
    """Every command with the options that may stand after it; the scripts take `raftkv kv` for raftkv-kv."""
    for program in programs():
        for row in program.all():
            if row.path.split()[0] != program.path or row.path in ("raftkv kv", "raftkv ctl"):
                continue
            wider = program.options if row is not program and program.path != "raftkv" else ()
            yield row, [*row.options, *(option for option in wider if option not in row.options)]


def _words(row: CommandRow) -> list[str]:
    """What each of the words after a command may be: fixed words, or one of the kinds; COMMAND as fixed words."""
    program = next(each for each in programs() if each.path == row.path.split()[0])
    commands = " ".join(below.name for below in program.below)
    return [commands if words == (COMMAND,) else " ".join(words) for words in row.words]


def _bash() -> Iterator[str]:
    for row, options in _rows():
        yield f"    {_quoted(row.path)})"
        yield f"        commands={_quoted(' '.join(below.name for below in row.below))}"
        yield f"        options={_quoted(' '.join(name for option in options for name in option.names))}"
        yield f"        words=({' '.join(map(_quoted, _words(row)))})"
        yield f"        values=({' '.join(_values(options))})"
        yield "        ;;"


def _zsh() -> Iterator[str]:
    for row, options in _rows():
        yield f"    {_quoted(row.path)})"
        yield f"        commands_=({' '.join(_described(below.name, below.summary) for below in row.below)})"
        named = [_described(name, option.help) for option in options for name in option.names]
        yield f"        options_=({' '.join(named)})"
        yield f"        words_=({' '.join(map(_quoted, _words(row)))})"
        yield f"        values_=({' '.join(_values(options))})"
        yield "        ;;"


def _values(options: Sequence[OptionRow]) -> Iterator[str]:
    """`[--output]='plain json table'` of every option that takes a value."""
    for option in options:
        for name in option.names:
            if option.metavar:
                yield f"[{name}]={_quoted(' '.join(option.words))}"


def _described(name: str, text: str) -> str:
    return _quoted(f"{name}:{' '.join(text.split())}")


def _fish() -> Iterator[str]:
    rows = list(_rows())
    every = [option for _, options in rows for option in options]
    takes = dict.fromkeys(name for option in every if option.metavar for name in option.names)
    assert takes.keys().isdisjoint(name for option in every if not option.metavar for name in option.names)
    yield f"set -g __raftkv_takes {' '.join(takes)}"
    below = [_fish_quoted(each.path) for row, _ in rows for each in row.below]
    yield f"set -g __raftkv_paths {' '.join(below)}"
    for row, options in rows:
        program = row.path.split()[0]
        begin = f"complete{' -c raftkv' if program != 'raftkv' else ''} -c {program} -n"
        here = _fish_quoted(f"__raftkv_is '{row.path}'")
        for each in row.below:
            yield f"{begin} {here} -a {each.name} -d {_fish_quoted(each.summary)}"
        for option in options:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            value = _fish_value(" ".join(option.words)) if option.metavar else ""
            yield f"{begin} {here} {names}{value} -d {_fish_quoted(' '.join(option.help.split()))}"
        for number, words in enumerate(_words(row)):
            there = _fish_quoted(f"__raftkv_is '{row.path}' {number}")
            if words:
                yield f"{begin} {there}{_fish_value(words).replace(' -x', '').replace(' -r', '')}"


def _fish_value(words: str) -> str:
    """What completes a value that is one of these words, or of a kind."""
    kinds = {FILE: " -r -F", DIRECTORY: " -x -a '(__fish_complete_directories)'", "@": " -a '(__raftkv_value_files)'"}
    return kinds.get(words) or (f" -x -a {_fish_quoted(words)}" if words else " -x")


def _quoted(text: str) -> str:
    """One word of bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    """One word of fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
