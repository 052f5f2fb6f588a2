"""The entry points: `raftkv`, `raftkv-kv`, `raftkv-ctl`.

`raftkv` is a click group whose sub-commands are imported when they are used; the other two, and `raftkv kv`
and `raftkv ctl`, go straight to the command table, because one-shot commands must start fast. Here
nothing is imported before SIGINT is taken care of: an import is where it would find a traceback.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing is an import too
if TYPE_CHECKING:
    from collections.abc import Sequence

    import click


def raftkv_kv() -> None:
    """The `raftkv-kv` binary."""
    _run("raftkv-kv", sys.argv[1:])


def raftkv_ctl() -> None:
    """The `raftkv-ctl` binary."""
    _run("raftkv-ctl", sys.argv[1:])


def raftkv() -> None:
    """The `raftkv` binary."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["kv"], ["ctl"]):
        _run(f"raftkv-{arguments[0]}", arguments[1:])  # as fast as the short names: without click
    _run("raftkv", arguments)


def _run(program: str, arguments: Sequence[str]) -> None:
    """Run the program and exit with its status."""
    try:
        from raftkv.cli import interrupts
    except KeyboardInterrupt:
        os._exit(130)
    interrupts.end_at_once()
    if program == "raftkv":
        status = _run_click(arguments)
    else:
        from raftkv.cli.programs import main

        status = main(program, arguments)
    interrupts.ignore()
    sys.exit(status)


_COMMANDS = {
    "controller": ("raftkv.cli.daemons", "controller", "Run one replica of the controllers."),
    "shardkv": ("raftkv.cli.daemons", "shardkv", "Run one replica of a group that serves shards."),
    "coordinator": ("raftkv.cli.daemons", "coordinator", "Run one replica of those that decide transactions."),
    "health": ("raftkv.cli.daemon_health", "health", "Ask one daemon whether it is well."),
    "local": ("raftkv.cli.local", "local", "Start, stop and look at a whole cluster on this machine."),
    "bench": ("raftkv.cli.bench", "bench", "Load a running cluster; report throughput and latency."),
    "top": ("raftkv.cli.top", "top", "Watch a cluster live: leaders, lag, rates, shards, moves, transactions."),
    "completion": ("raftkv.cli.completion", "completion", "Print a script that completes all of this in a shell."),
    "sim": ("raftkv.cli.verification", "sim", "Run the real daemons in a simulated world, one history a seed."),
    "check": ("raftkv.cli.verification", "check", "Check a history of what clients saw: is it linearizable?"),
    "ctl": ("", "", "Shard map and health: Join, Leave, Move, Query, Status (the same as raftkv-ctl)."),
    "kv": ("", "", "Keys and values: Put, Get, Append, Delete, Cas, Scan (the same as raftkv-kv)."),
}


_HELP = """A sharded, replicated, linearizable key-value store.

\b
  raftkv local up                         a whole cluster on this machine
  raftkv-kv put greeting hello            or raftkv kv put greeting hello
  raftkv-ctl status                       or raftkv ctl status
  raftkv top                              watch it
  raftkv bench --scenario put --clients 32
"""


def _root() -> click.Group:
    """The root group; a sub-command's module is imported when that sub-command is asked for."""
    from importlib import import_module

    import click

    from raftkv.cli import config_file

    class LazyGroup(click.Group):
        """A group whose sub-commands live in modules that are not imported yet."""

        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(_COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in _COMMANDS:
                return None
            module, name, help_line = _COMMANDS[cmd_name]
            if not module:
                return click.Command(cmd_name, help=help_line)
            command = getattr(import_module(module), name)
            assert isinstance(command, click.Command)
            return command

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, row[2]) for name, row in _COMMANDS.items()])

    def read_config() -> None:
        context = click.get_current_context()
        context.obj = config_file.load(os.environ)
        context.default_map = context.obj.click_defaults()

    root = LazyGroup(
        name="raftkv",
        callback=read_config,
        help=_HELP,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(package_name="raftkv", prog_name="raftkv")(root)


def _place_in_config(error: click.UsageError) -> str:
    """File and key of a value that a command doesn't take; empty if it came from somewhere else."""
    from click import BadParameter
    from click.core import ParameterSource

    from raftkv.cli import config_file

    if not isinstance(error, BadParameter) or error.ctx is None or error.param is None or error.param.name is None:
        return ""
    if error.ctx.get_parameter_source(error.param.name) is not ParameterSource.DEFAULT_MAP:
        return ""
    daemon = error.ctx.info_name in config_file.DAEMONS
    return config_file.where(error.ctx.find_root().obj, daemon, error.param.name)


def _run_click(arguments: Sequence[str]) -> int:
    """Run a click command; every error is one line."""
    import click

    from raftkv.cli import interrupts
    from raftkv.cli.exit_codes import ExitCode, LocalFailure, UsageError
    from raftkv.cli.printers import note, settle_stdout

    try:
        status = _root().main(args=list(arguments), prog_name="raftkv", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return ExitCode.USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "raftkv"
        place = _place_in_config(error)
        if place:
            note(f"{path}: {place}: {error.message}")
            return ExitCode.USAGE
        note(f"{path}: {error.format_message()} (see `{path} --help`)")
        return ExitCode.USAGE
    except UsageError as error:
        note(f"raftkv: {error}")
        return ExitCode.USAGE
    except click.ClickException as error:
        note(f"raftkv: {error.format_message()}")
        return ExitCode.REFUSED
    except (click.Abort, KeyboardInterrupt):
        note("raftkv: interrupted")
        return ExitCode.INTERRUPTED
    except LocalFailure as error:
        note(f"raftkv: {error}")
        return error.exit_code
    except BrokenPipeError:
        return ExitCode.REFUSED
    except OSError as error:
        note(f"raftkv: {error.filename or 'standard output'}: {error.strerror or error}")
        return ExitCode.REFUSED
    except Exception as error:
        if os.environ.get("RAFTKV_TRACEBACK"):
            raise
        note(f"raftkv: this is a bug: {type(error).__name__}: {error}; RAFTKV_TRACEBACK=1 shows where")
        return ExitCode.REFUSED
    finally:
        interrupts.ignore()  # what it came to is decided
        if sys.stdout is not None:
            settle_stdout()
