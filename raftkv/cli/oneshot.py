"""One command, run to its end: `raftkv-kv get k`. Also the step that scripts and the REPL repeat.

Starts fast: imports neither prompt_toolkit nor rich nor anything of the servers.
"""

from __future__ import annotations

import asyncio
import re

from raftkv.cli.command_table import Call
from raftkv.cli.exit_codes import ExitCode, describe, exit_code_of
from raftkv.cli.printers import OutputClosed, Printer, note
from raftkv.cli.session import Session


class LeaveShell(Exception):
    """`exit`: no further command is to be read."""


async def execute(session: Session, printer: Printer, call: Call) -> ExitCode:
    """Run one call and show what it came to. Raises what the SDK raises, UsageError and LeaveShell."""
    result = await call.command.run(session, call)
    return await printer.show(result, call.options.get("output"))


async def run_one(session: Session, printer: Printer, call: Call) -> ExitCode:
    """Run one call of the command line; errors become their one line. Raises OutputClosed."""
    program = session.settings.program
    session.one_shot = True
    try:
        return await execute(session, printer, call)
    except LeaveShell:
        return ExitCode.DONE
    except OutputClosed:
        raise
    except asyncio.CancelledError:
        note(f"{program}: {interrupted(session, call)}")
        raise
    except Exception as error:
        note(f"{program}: {complaint(session, call, error)}")
        return exit_code_of(error)
    finally:
        await session.close()


def complaint(session: Session, call: Call | None, error: Exception) -> str:
    """The one line on a failed call."""
    text = describe(error, controllers=session.settings.controllers)
    if call is None or text.startswith(call.command.name):
        return text
    name = re.escape(call.command.name)
    said = re.match(rf"(?:{name}(?: '[^']*')?|query): ", text, re.IGNORECASE)  # the SDK names the request, too
    return f"{call}: {text[said.end() :] if said else text}"


def interrupted(session: Session, call: Call) -> str:
    """The one line on a call that Ctrl-C ended: whether it may still apply."""
    made, session.config_made = session.config_made, None
    go_on, session.go_on = session.go_on, None
    if go_on is not None:
        return f"{call}: interrupted; {go_on}"
    if call.command.writes and made is not None:
        from raftkv.cli.arrival import GO_ON

        return f"{call}: interrupted; configuration {made} is made, and {GO_ON}"
    if call.command.writes and session.unsettled_at_interrupt:
        if call.command.name == "Commit":
            txid = session.unsettled_at_interrupt[0].split()[-1]
            settle = f"`Txn resolve {txid}` settles it"
            return f"{call}: interrupted; it was sent and may be committed, or may still be: {settle}"
        return f"{call}: interrupted; it was sent and may have applied, or may still: read before you try again"
    return f"{call}: interrupted; nothing was changed"
