"""Commands on standard input, one a line: each is read, run and its output flushed before the next is read.

Another program can therefore drive it as a co-process. It stops at the first error or missing key with
that exit code; `keep_going` goes on, and still ends with the first one. With `window` above 1, that many
commands on single keys may be in flight: output stays in order, commands on the *same* key run in
order, and any other command waits for those before it. A transaction may span lines; one that is open at the
end is aborted.
"""

from __future__ import annotations

import asyncio
import codecs
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from raftkv.cli.command_table import Call, CommandTable, parse
from raftkv.cli.confirmation import require_yes
from raftkv.cli.exit_codes import ExitCode, UsageError, exit_code_of
from raftkv.cli.lines import LineReader, LineTooLong
from raftkv.cli.oneshot import LeaveShell, complaint, interrupted
from raftkv.cli.printers import OutputClosed, Printer, note
from raftkv.cli.results import Missing, Result
from raftkv.cli.session import Session, with_values
from raftkv.cli.words import WordError, is_comment_or_blank, show_word, split_words


@dataclass(slots=True)
class _Running:
    """One command that was read and whose output is not printed yet."""

    line_number: int
    call: Call | None  # None: the line is no command, and the task raises why
    task: asyncio.Task[Result]
    key: bytes | None = None  # of a command that may be one of several in flight


class _Stopped(Exception):
    """This command was not sent: an earlier one ended the script."""


class Script:
    """One run over the lines of a descriptor."""

    def __init__(
        self,
        session: Session,
        printer: Printer,
        table: CommandTable,
        *,
        environment: Mapping[str, str],
        keep_going: bool = False,
        window: int = 1,
    ) -> None:
        assert window >= 1
        self._session = session
        self._printer = printer
        self._table = table
        self._environment = environment
        self._keep_going = keep_going
        self._window = window
        self._running: deque[_Running] = deque()
        self._last_on_key: dict[bytes, asyncio.Task[Result]] = {}
        self._held: tuple[int, Call] | None = None  # read, but waits until nothing is in flight
        self._line_number = 0
        self._at_end = False  # no more lines are to be read
        self._stopping = False
        self._code = ExitCode.DONE

    async def run(self, descriptor: int) -> ExitCode:
        """Run all lines; the exit code. Raises OutputClosed, and CancelledError after Ctrl-C."""
        lines = LineReader(descriptor)
        reading: asyncio.Task[bool] | None = None
        try:
            while True:
                self._start_what_arrived(lines)
                while self._running and self._running[0].task.done() and not self._stopping:
                    await self._finish_first()
                    self._start_what_arrived(lines)
                if self._stopping or (self._at_end and not self._running and self._held is None):
                    break
                if reading is None and self._may_read():
                    reading = asyncio.get_running_loop().create_task(lines.more())
                waits: set[asyncio.Task[bool] | asyncio.Task[Result]] = set()
                if reading is not None:
                    waits.add(reading)
                if self._running:
                    waits.add(self._running[0].task)
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if reading is not None and reading.done():
                    if not reading.result():
                        self._take_last_line(lines)
                    reading = None
            await self._abandon_rest()
            await self._end_transaction()
            return self._code
        except asyncio.CancelledError:
            self._note_interrupted()
            raise
        finally:
            tasks: list[asyncio.Task[bool] | asyncio.Task[Result]] = [entry.task for entry in self._running]
            if reading is not None:
                tasks.append(reading)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._session.close()

    def _may_read(self) -> bool:
        """Whether the next line may be taken."""
        if self._at_end or self._stopping or self._held is not None or len(self._running) >= self._window:
            return False
        return not self._running or self._running[-1].key is not None  # the others run alone

    def _start_what_arrived(self, lines: LineReader) -> None:
        """Start commands whose lines are here, as far as the window allows."""
        if self._held is not None and not self._running:
            (number, call), self._held = self._held, None
            self._start(number, call)
            return
        while self._may_read():
            try:
                line = lines.buffered()
            except LineTooLong as error:
                self._line_number += 1
                self._fail(UsageError(str(error)))
                self._at_end = True  # the rest of it is no line
                return
            if line is None:
                return
            self._take(line)

    def _take_last_line(self, lines: LineReader) -> None:
        """The input ended: its last line may lack a line end."""
        last = lines.buffered()
        if last is not None:
            self._take(last)
        self._at_end = True

    def _take(self, line: bytes) -> None:
        """Parse one line; start it, hold it, or note that it can't be understood."""
        self._line_number += 1
        if self._line_number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # what some editors put before the text
        if is_comment_or_blank(line):
            return
        try:
            parsed = parse(self._table, split_words(line), environment=self._environment, on_a_line=True)
            if parsed.command is None:
                raise UsageError(f"no command on the line: {show_word(line.strip())}")
            call = with_values(parsed.call(), on_a_line=True)
            require_yes(call)
        except (WordError, UsageError) as error:
            self._fail(UsageError(str(error)))
            return
        if not call.command.pipelines and self._running:
            self._held = (self._line_number, call)
        else:
            self._start(self._line_number, call)

    def _start(self, number: int, call: Call) -> None:
        """Send a command, after the ones before it on the same key."""
        key = call.words[0] if call.command.pipelines else None
        before = self._last_on_key.get(key) if key is not None else None
        task = asyncio.get_running_loop().create_task(self._operate(call, before))
        if key is not None:
            self._last_on_key[key] = task
        self._running.append(_Running(number, call, task, key))

    async def _operate(self, call: Call, before: asyncio.Task[Result] | None) -> Result:
        if before is not None:
            await asyncio.wait({before})
            if not self._keep_going and (before.exception() or isinstance(before.result(), Missing)):
                raise _Stopped  # it will stop the script when its turn to be printed comes
        if self._stopping:
            raise _Stopped
        return await call.command.run(self._session, call)

    def _fail(self, error: UsageError) -> None:
        """Queue a line that is no command, so that its complaint comes in order."""

        async def complain() -> Result:
            raise error

        task = asyncio.get_running_loop().create_task(complain())
        self._running.append(_Running(self._line_number, None, task))

    async def _finish_first(self) -> None:
        """Print what the oldest command came to; decide whether to go on."""
        entry = self._running.popleft()
        if entry.key is not None and self._last_on_key.get(entry.key) is entry.task:
            del self._last_on_key[entry.key]
        try:
            result = entry.task.result()
            output = entry.call.options.get("output") if entry.call is not None else None
            code = await self._printer.show(result, output)
        except (LeaveShell, OutputClosed, asyncio.CancelledError) as end:
            if not isinstance(end, LeaveShell):
                raise
            self._stopping = True
            return
        except Exception as error:
            code = exit_code_of(error)
            self._note(entry.line_number, complaint(self._session, entry.call, error))
            self._break_transaction(entry)
        else:
            if isinstance(result, Missing):
                self._note(entry.line_number, f"{entry.call}: key not found")
        if code is ExitCode.DONE:
            return
        if self._code is ExitCode.DONE:
            self._code = code
        if not self._keep_going:
            self._stopping = True

    def _break_transaction(self, entry: _Running) -> None:
        """A line failed, and the next ones run all the same: those that need it, up to a Commit or Abort, must not."""
        began = entry.call is not None and entry.call.command.name == "Begin"
        if began or self._session.in_transaction:
            self._session.broken = self._session.broken or f"line {entry.line_number} failed"

    async def _end_transaction(self) -> None:
        """One that is left open at the end is aborted, and that is an error."""
        if self._session.transaction is None:
            return
        txid = self._session.transaction.txid.hex()
        await self._session.end_transaction()
        note(f"{self._table.program}: transaction {txid} was open at the end: aborted, nothing was written")
        if self._code is ExitCode.DONE:
            self._code = ExitCode.USAGE

    async def _abandon_rest(self) -> None:
        """After an error: let what is already in flight finish, and say that it was."""
        if not self._running:
            return
        await asyncio.wait({entry.task for entry in self._running})
        sent = [
            entry
            for entry in self._running
            if entry.call is not None and entry.call.command.writes and not isinstance(entry.task.exception(), _Stopped)
        ]
        if sent:
            applied = sum(entry.task.exception() is None for entry in sent)
            span = f"{sent[0].line_number} to {sent[-1].line_number}"
            note(
                f"{self._table.program}: of the lines after it, {len(sent)} writes (lines {span}) "
                f"were in flight already; {applied} of them applied"
            )

    def _note(self, line_number: int, text: str) -> None:
        note(f"{self._table.program}: line {line_number}: {text}")

    def _note_interrupted(self) -> None:
        """Say which commands Ctrl-C ended."""
        if not self._running:
            self._note(self._line_number, "interrupted")
        for entry in self._running:
            if entry.call is not None and not entry.task.done():
                self._note(entry.line_number, interrupted(self._session, entry.call))
