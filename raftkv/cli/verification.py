"""`raftkv sim` and `raftkv check`: the doors to the simulator and to the checkers of histories.

Both parse their own arguments, because they also run without the command line: this only passes them on.
"""

from __future__ import annotations

import click

from raftkv.cli import interrupts

_PASS_ON = {"ignore_unknown_options": True, "help_option_names": []}


@click.command(context_settings=_PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def sim(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Run the real daemons in a simulated world, one history a seed."""
    from raftkv.sim.main import main

    interrupts.raise_once()
    context.exit(main(arguments))


@click.command(context_settings=_PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def check(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Check what clients saw: linearizability, unique appends, transactions."""
    from raftkv.sim.check.file import main

    interrupts.raise_once()
    context.exit(main(arguments))
