"""`raftkv-kv` and `raftkv-ctl`: from an argument vector to an exit code.

Decides which of the three ways to run it is, imports only what that way needs, and turns whatever goes
wrong into one line and an exit code: never a traceback.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from raftkv.cli import config_file, interrupts
from raftkv.cli.command_table import (
    Argument,
    Call,
    Command,
    CommandTable,
    Option,
    Parsed,
    help_text,
    parse,
    parse_controllers,
    parse_count,
    parse_seconds,
)
from raftkv.cli.confirmation import ask_once
from raftkv.cli.exit_codes import ExitCode, UsageError
from raftkv.cli.oneshot import LeaveShell, run_one
from raftkv.cli.printers import OUTPUTS, OutputClosed, Printer, note, settle_stdout
from raftkv.cli.results import Result, Text
from raftkv.cli.session import TIMEOUT_S_DEFAULT, SdkConnector, Session, Settings, with_values
from raftkv.cli.tls_files import TLS_OPTIONS, client_ssl
from raftkv.cli.words import Word

WINDOW_MAX = 10_000
TRACEBACK_VARIABLE = "RAFTKV_TRACEBACK"


def _parse_output(text: str) -> str:
    if text.lower() not in OUTPUTS:
        raise ValueError(f"{text!r} is not one of {', '.join(OUTPUTS)}")
    return text.lower()


OPTIONS = (
    Option(
        ("--controllers", "--ctrl-peers"),
        "where the controllers are",
        parse_controllers,
        "HOST:PORT,…",
        "the cluster of `raftkv local up`",
        program_only=True,
    ),
    Option(
        ("-o", "--output"),
        "plain, json or table",
        _parse_output,
        "FORM",
        "table on a terminal, plain elsewhere",
        choices=OUTPUTS,
    ),
    Option(
        ("--timeout",),
        "how long a command may take",
        parse_seconds,
        "SECONDS",
        f"{TIMEOUT_S_DEFAULT:g}",
    ),
    Option(
        ("--keep-going",),
        "script: go on after errors; still ends with the first one's code",
        program_only=True,
    ),
    Option(
        ("--pipeline",),
        "script: that many commands on single keys in flight, output in order",
        partial(parse_count, most=WINDOW_MAX),
        "N",
        "1",
        program_only=True,
    ),
    *(Option((name,), text, str, "FILE", program_only=True) for name, text in TLS_OPTIONS.items()),
    Option(("--version",), "show the version", program_only=True, variable=False),
    Option(("-h", "--help"), "show help on the program or the command", program_only=True, variable=False),
)

_ABOUT = {
    "raftkv-kv": (
        "Keys and values of a RaftKV cluster.\n"
        "With a COMMAND it runs that; without one it is a shell on a terminal, and otherwise runs\n"
        "the commands on standard input, one a line, up to the first error or missing key."
    ),
    "raftkv-ctl": (
        "The shard map and the health of a RaftKV cluster.\n"
        "With a COMMAND it runs that; without one it is a shell on a terminal, and otherwise runs\n"
        "the commands on standard input, one a line, up to the first error."
    ),
}

_EXAMPLES = {
    "raftkv-kv": (
        "raftkv-kv put greeting 'hello, world'",
        "raftkv-kv get greeting",
        "raftkv-kv scan user: --limit 10 -o json",
        "raftkv-kv --controllers 10.0.0.1:7000,10.0.0.2:7000 --timeout 2 get greeting",
        "raftkv-kv --pipeline 64 < commands.txt",
        "raftkv-kv                               # a shell; `help` lists the commands there",
    ),
    "raftkv-ctl": (
        "raftkv-ctl status",
        "raftkv-ctl query -o json",
        "raftkv-ctl join 3:10.0.0.7:7100,10.0.0.8:7100,10.0.0.9:7100",
        "raftkv-ctl leave 3",
        "raftkv-ctl --controllers 10.0.0.1:7000,10.0.0.2:7000 --timeout 60 wait",
    ),
}


def command_table(program: str) -> CommandTable:
    """The commands of `raftkv-kv` or `raftkv-ctl`."""
    own: tuple[Command, ...]
    if program == "raftkv-kv":
        from raftkv.cli.kv_commands import COMMANDS as own
    else:
        from raftkv.cli.ctl_commands import COMMANDS as own

    async def show_help(session: Session, call: Call) -> Result:
        return Text(help_text(table, table.find(call.words[0]) if call.words else None))

    async def leave(session: Session, call: Call) -> Result:
        raise LeaveShell

    common = (
        Command(
            "Help",
            "this list, or help on COMMAND",
            show_help,
            (Argument("COMMAND", required=False, completes="commands"),),
            examples=("Help", f"Help {own[0].name}"),
        ),
        Command("Exit", "leave (as Ctrl-D does)", leave, examples=("Exit",)),
    )
    table = CommandTable(program, _ABOUT[program], (*own, *common), OPTIONS, _EXAMPLES[program])
    return table


def main(program: str, arguments: Sequence[str]) -> int:
    """Run the program; its exit status."""
    if sys.stdout is None:
        note(f"{program}: standard output is closed; send it to /dev/null if it isn't wanted")
        return ExitCode.REFUSED
    try:
        return int(_run(program, arguments, os.environ))
    except UsageError as error:
        note(f"{program}: {error}")
        return ExitCode.USAGE
    except (KeyboardInterrupt, asyncio.CancelledError):
        return ExitCode.INTERRUPTED
    except (OutputClosed, BrokenPipeError):
        return ExitCode.REFUSED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        note(f"{program}: {where}{error.strerror or error}")
        return ExitCode.REFUSED
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        note(f"{program}: this is a bug: {type(error).__name__}: {error}; {TRACEBACK_VARIABLE}=1 shows where")
        return ExitCode.REFUSED
    finally:
        settle_stdout()


def _run(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> ExitCode:
    table = command_table(program)
    parsed = parse(table, [Word(os.fsencode(argument)) for argument in arguments], environment=environment)
    if parsed.options.get("help"):
        sys.stdout.buffer.write(help_text(table, parsed.command).encode() + b"\n")
        sys.stdout.buffer.flush()
        return ExitCode.DONE
    if parsed.options.get("version"):
        from raftkv import __version__

        sys.stdout.buffer.write(f"{program}, version {__version__}\n".encode())
        sys.stdout.buffer.flush()
        return ExitCode.DONE
    for key, value in config_file.load(environment).client.items():
        parsed.options.setdefault(key, value)
    settings = Settings(
        program,
        _controllers(parsed),
        parsed.options.get("timeout", TIMEOUT_S_DEFAULT),
        parsed.options.get("output") or ("table" if sys.stdout.isatty() else "plain"),
    )
    files = (parsed.options.get(name) for name in ("tls_cert", "tls_key", "tls_ca"))
    session = Session(settings, SdkConnector(client_ssl(*files)))
    out = sys.stdout.buffer
    if parsed.command is not None:
        call = parsed.call()
        if not ask_once(call):
            note(f"{program}: {call}: not confirmed; nothing was changed")
            return ExitCode.REFUSED
        interrupts.raise_once()
        try:
            call = with_values(call, on_a_line=False)
        except KeyboardInterrupt:
            note(f"{program}: {call}: interrupted; nothing was changed")
            return ExitCode.INTERRUPTED
        one = run_one(session, Printer(settings.output, out), call)
        return interrupts.run(one, session.interrupt)
    if sys.stdin is not None and sys.stdin.isatty():
        from raftkv.cli.repl import run_repl

        return asyncio.run(run_repl(session, Printer(settings.output, out, nil=True), table, environment))
    return _script(session, Printer(settings.output, out), table, parsed, environment)


def _script(
    session: Session, printer: Printer, table: CommandTable, parsed: Parsed, environment: Mapping[str, str]
) -> ExitCode:
    from raftkv.cli.script import Script

    if sys.stdin is None:
        return ExitCode.DONE  # standard input is closed: a script without lines
    script = Script(
        session,
        printer,
        table,
        environment=environment,
        keep_going=parsed.options.get("keep_going", False),
        window=parsed.options.get("pipeline", 1),
    )
    return interrupts.run(script.run(sys.stdin.fileno()), session.interrupt)


def _controllers(parsed: Parsed) -> tuple[str, ...]:
    """The controllers that were given, or those of the local cluster."""
    given: tuple[str, ...] | None = parsed.options.get("controllers")
    if given is not None:
        return given
    from raftkv.cli.local_state import default_controllers

    return default_controllers()
