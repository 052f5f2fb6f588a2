"""The interactive shell: prompt, history, help; Ctrl-C cancels the request, never the session.

The only module that imports prompt_toolkit. The client reconnects by itself, so nothing here does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output import create_output

from raftkv.cli.command_table import Call, CommandTable, parse
from raftkv.cli.exit_codes import ExitCode, UsageError
from raftkv.cli.oneshot import LeaveShell, complaint, execute, interrupted
from raftkv.cli.printers import Printer, note
from raftkv.cli.session import Session, with_values
from raftkv.cli.words import WordError, is_comment_or_blank, split_words


async def run_repl(session: Session, printer: Printer, table: CommandTable, environment: Mapping[str, str]) -> ExitCode:
    """Read and run lines until `exit` or Ctrl-D. Always DONE: errors belong to their commands."""
    # Asking the terminal where its cursor is makes a warning where it doesn't answer (docker exec, CI).
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    controllers = ", ".join(session.settings.controllers) or "no controllers"
    note(f"{table.program}: {controllers}. `help` lists the commands, Ctrl-D leaves.")
    prompt: PromptSession[str] = PromptSession(
        history=open_history(table.program, environment),
        output=create_output(always_prefer_tty=True),  # standard output may be a file, and is for data
    )
    _ignore_interrupts()
    try:
        while True:
            try:
                line = await prompt.prompt_async(lambda: prompt_text(session))
            except KeyboardInterrupt:
                continue  # Ctrl-C at the prompt clears the line
            except EOFError:
                line = "exit"
            try:
                await run_line(session, printer, table, environment, line)
            except LeaveShell:
                if await _may_leave(session):
                    break
    finally:
        await session.close()
    return ExitCode.DONE


def prompt_text(session: Session) -> str:
    """The program's name, and how the open transaction stands: its locks may be lost at any moment."""
    state = ""
    if session.transaction is not None:
        phase = session.transaction.phase.value
        state = " (transaction)" if phase == "open" else f" (transaction {phase})"
    return f"{session.settings.program}{state}> "


async def _may_leave(session: Session) -> bool:
    """Ask before an open transaction is dropped. Ctrl-D is a yes, Ctrl-C a no."""
    txn = session.transaction
    if txn is None or txn.phase.value != "open":
        return True
    question: PromptSession[str] = PromptSession(output=create_output(always_prefer_tty=True))
    try:
        answer = await question.prompt_async("A transaction is open. Abort it and leave? (y/n) ")
    except KeyboardInterrupt:
        return False
    except EOFError:
        return True
    return answer.strip().lower() in ("y", "yes")


async def run_line(
    session: Session, printer: Printer, table: CommandTable, environment: Mapping[str, str], line: str
) -> None:
    """Run one line; what goes wrong is said on standard error. Raises LeaveShell and OutputClosed."""
    data = line.encode("utf-8", "surrogateescape")
    if is_comment_or_blank(data):
        return
    call: Call | None = None
    try:
        parsed = parse(table, split_words(data), environment=environment, on_a_line=True)
        if parsed.command is None:
            raise UsageError("no command on the line; `help` lists them")
        call = with_values(parsed.call(), on_a_line=True)
        await _run_interruptibly(session, printer, call)
    except WordError as error:
        note(str(error))
    except (LeaveShell, KeyboardInterrupt):
        raise
    except Exception as error:
        note(complaint(session, call, error))


async def _run_interruptibly(session: Session, printer: Printer, call: Call) -> None:
    """Run a call that Ctrl-C cancels; says whether a write may still apply."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(execute(session, printer, call))
    loop.add_signal_handler(signal.SIGINT, session.interrupt, task)
    try:
        await task
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
        note(interrupted(session, call))
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        _ignore_interrupts()


def _ignore_interrupts() -> None:
    """A Ctrl-C that comes between a command and the next prompt must not end the session."""
    signal.signal(signal.SIGINT, lambda number, frame: None)


def open_history(program: str, environment: Mapping[str, str]) -> History:
    """The history in `$XDG_STATE_HOME/raftkv/`, for its owner's eyes only; in memory if that can't be."""
    state_home = environment.get("XDG_STATE_HOME") or ""
    base = Path(state_home) if Path(state_home).is_absolute() else Path.home() / ".local" / "state"
    path = base / "raftkv" / f"{program}.history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
    except OSError as error:
        print(f"no history is kept: {path}: {error.strerror}", file=sys.stderr)
        return InMemoryHistory()
    return FileHistory(str(path))
