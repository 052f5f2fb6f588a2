"""The interactive shell: reads lines and runs them; Ctrl-C cancels the request, never the session.

Only the modules named repl_… import prompt_toolkit. The client reconnects by itself, so nothing here does. While the
prompt waits, the watcher follows the cluster; what it has to say is printed above the prompt, and what is being typed
stays as it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import set_app
from prompt_toolkit.application.run_in_terminal import run_in_terminal
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.input import Input
from prompt_toolkit.output import ColorDepth, Output, create_output

from raftkv.cli.command_table import Call, CommandTable, parse
from raftkv.cli.confirmation import is_yes, question_about, require_yes
from raftkv.cli.exit_codes import ExitCode, UsageError
from raftkv.cli.oneshot import LeaveShell, complaint, interrupted
from raftkv.cli.printers import OutputClosed, Printer, note
from raftkv.cli.repl_backslash import with_backslash_commands
from raftkv.cli.repl_completion import LineCompleter
from raftkv.cli.repl_highlighting import STYLE, LineLexer
from raftkv.cli.repl_hints import SuggestEarlierLines, hints
from raftkv.cli.repl_history import open_history
from raftkv.cli.repl_known import Known
from raftkv.cli.repl_output import Paged, ShellPipe, Sink, check_shell_command, find_pager, paced
from raftkv.cli.repl_prompt import cluster_name, continuation, line_keys, prompt_pieces
from raftkv.cli.repl_watcher import CLIENT_TIMEOUT_S, Notice, Watcher
from raftkv.cli.results import Configuration, Done, Found, Result
from raftkv.cli.session import Session, TransactionClient, with_values
from raftkv.cli.typed_line import typed_commands
from raftkv.cli.words import WordError, split_words

PATIENCE_S = 1.0
"""How long the end of the watcher may take before the shell ends without it."""
MENU_LINES = 8


async def run_repl(session: Session, printer: Printer, table: CommandTable, environment: Mapping[str, str]) -> ExitCode:
    """Read and run lines until `exit` or Ctrl-D. Always DONE: errors belong to their commands. Raises OutputClosed."""
    # Asking the terminal where its cursor is makes a warning where it doesn't answer (docker exec, CI).
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    return await Shell(session, printer, table, environment).run()


class Shell:
    """One session in front of a terminal; the tests bring their own `source` of keys and `screen`."""

    def __init__(
        self,
        session: Session,
        printer: Printer,
        table: CommandTable,
        environment: Mapping[str, str],
        *,
        source: Input | None = None,
        screen: Output | None = None,
    ) -> None:
        self.session = session
        # The form is the session's, which \o changes: the variable was looked at when the program started.
        self.environment = {name: value for name, value in environment.items() if name != "RAFTKV_OUTPUT"}
        self.table = with_backslash_commands(self, table)
        self.timing = False
        self.paging = True
        self.last_line = ""
        self.running: Call | None = None
        """What Ctrl-C would cancel, and an error is about."""
        self._printer = printer
        self._pager = find_pager(environment)
        self._cluster = cluster_name(session.settings.controllers)
        self._known = Known()
        self._operations = 0
        self._own_configs: set[int] = set()
        self._notices: list[Notice] = []
        self._foreground = False
        self._source = source
        # Standard output may be a file, and is for data.
        self._screen = screen or create_output(always_prefer_tty=True)
        self._colours = ColorDepth.DEPTH_1_BIT if environment.get("NO_COLOR") else None
        is_open = Condition(lambda: typed_commands(self.table, self._prompt.default_buffer.text)[-1].is_open)
        self._prompt: PromptSession[str] = PromptSession(
            history=open_history(table.program, environment),
            completer=LineCompleter(self.table, self._known),
            lexer=LineLexer(self.table),
            auto_suggest=SuggestEarlierLines(),
            input_processors=[hints(self.table)],
            key_bindings=line_keys(is_open & has_focus(DEFAULT_BUFFER)),
            multiline=is_open,
            prompt_continuation=continuation,
            enable_open_in_editor=True,
            reserve_space_for_menu=MENU_LINES,
            style=STYLE,
            color_depth=self._colours,
            input=source,
            output=self._screen,
        )
        self._watcher: Watcher | None = None

    async def run(self) -> ExitCode:
        """Until `exit` or Ctrl-D."""
        controllers = ", ".join(self.session.settings.controllers) or "no controllers"
        note(f"{self.table.program}: {controllers}. `help` lists the commands, Ctrl-D leaves.")
        _ignore_interrupts()
        watching = self._watch()
        try:
            while True:
                self._say_notices()
                try:
                    text = await self._prompt.prompt_async(self._message)
                except KeyboardInterrupt:
                    continue  # Ctrl-C at the prompt clears the line
                except EOFError:
                    text = "exit"
                try:
                    await self._run_text(text)
                except LeaveShell:
                    if await self._may_leave():
                        return ExitCode.DONE
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching], timeout=PATIENCE_S)
            await self.session.close()

    # ---- the prompt

    def _message(self) -> StyleAndTextTuples:
        connected = self._watcher is not None and self._watcher.connected is not False
        return prompt_pieces(self.session, self._cluster, self._operations, connected)

    def _watch(self) -> asyncio.Task[None] | None:
        """Begin to follow the cluster, if there is one."""
        controllers = self.session.settings.controllers
        if not controllers:
            return None
        client = self.session.own_controllers(CLIENT_TIMEOUT_S)
        self._watcher = Watcher(client, controllers, self._known, self._tell, self._prompt.app.invalidate)
        return asyncio.get_running_loop().create_task(self._watcher.run(), name="watch the cluster")

    async def _tell(self, notice: Notice) -> None:
        """Above the prompt if that waits for keys, else before the next one."""
        self._notices.append(notice)
        app = self._prompt.app
        if app.is_running and not app.is_done:
            with set_app(app):
                await run_in_terminal(self._say_notices)

    def _say_notices(self) -> None:
        notices, self._notices = self._notices, []
        for notice in notices:
            if notice.config_num not in self._own_configs:  # of those its user knows
                note(notice.text)

    async def _may_leave(self) -> bool:
        """Ask before an open transaction is dropped. Ctrl-D is a yes, Ctrl-C a no."""
        txn = self.session.transaction
        if txn is None or txn.phase.value != "open":
            return True
        return await self._ask("A transaction is open. Abort it and leave? (y/n) ", at_end=True)

    async def _ask(self, question: str, *, at_end: bool = False) -> bool:
        """Whether the answer is yes; `at_end` is what Ctrl-D stands for."""
        asking: PromptSession[str] = PromptSession(input=self._source, output=self._screen, color_depth=self._colours)
        try:
            return is_yes(await asking.prompt_async(question))
        except KeyboardInterrupt:
            return False
        except EOFError:
            return at_end
        finally:
            _ignore_interrupts()

    # ---- one line

    async def _run_text(self, text: str) -> None:
        """Run what was typed, or pasted: several lines, up to the first that goes wrong."""
        commands = [text[typed.start : typed.end] for typed in typed_commands(self.table, text)]
        for number, line in enumerate(commands, start=1):
            if not await self.run_line(line):
                rest = sum(bool(left.strip()) for left in commands[number:])
                if rest:
                    note(f"{rest} more of the lines were not run")
                return

    async def run_line(self, line: str) -> bool:
        """Run one line; what goes wrong is said on standard error, and is False. Raises LeaveShell and OutputClosed."""
        self.running = None
        try:
            call, shell_command = self.understand(line, confirmed=True)
            if call is None:
                return True
            self.running = call
            question = question_about(call)
            if question is not None and not await self._ask(question):
                note(f"{call}: not confirmed; nothing was changed")
                return False
            if not call.command.name.startswith("\\"):
                self.last_line = line
            return await self._run_interruptibly(call, shell_command)
        except WordError as error:
            note(str(error))
        except (LeaveShell, OutputClosed):
            raise
        except Exception as error:
            note(complaint(self.session, self.running, error))
        return False

    def understand(self, line: str, *, confirmed: bool = False) -> tuple[Call | None, str | None]:
        """The call that a line is, and the shell command behind its pipe; None for what there isn't.

        A command that takes a whole line has that as its last word, as it stands. `confirmed`: whoever calls this asks
        about what loses data. Raises WordError, UsageError, LocalFailure.
        """
        typed = typed_commands(self.table, line)[0]
        if not typed.words:
            return None, None
        text, shell_command = typed.text_of(line), typed.shell_of(line)
        begins = [word.start for word, role in zip(typed.words, typed.roles, strict=True) if role.kind == "command"]
        inner: tuple[bytes, ...] = ()
        if len(begins) > 1:
            text, shell_command = line[: begins[1]], None  # a pipe belongs to the inner one
            inner = (line[begins[1] :].encode("utf-8", "surrogateescape"),)
        if shell_command is not None:
            check_shell_command(shell_command)
        words = split_words(text.encode("utf-8", "surrogateescape"))
        parsed = parse(self.table, words, environment=self.environment, on_a_line=True)
        if parsed.command is None:
            raise UsageError("no command on the line; `help` lists them")
        call = with_values(parsed.call(), on_a_line=True)
        if not confirmed:
            require_yes(call)
        return replace(call, words=(*call.words, *inner)), shell_command

    async def _run_interruptibly(self, call: Call, shell_command: str | None) -> bool:
        """Run a call that Ctrl-C cancels; says whether a write may still apply."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(self.execute(call, shell_command))
        loop.add_signal_handler(signal.SIGINT, self._interrupt, task)
        try:
            await task
            return True
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            if sys.stderr is not None and sys.stderr.isatty():
                note("")  # the terminal has shown a ^C
            if self.running is not None:
                note(interrupted(self.session, self.running))
            return False
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            _ignore_interrupts()

    def _interrupt(self, task: asyncio.Task[None]) -> None:
        if not self._foreground:  # else it is meant for whoever has the terminal
            self.session.interrupt(task)

    @contextmanager
    def in_foreground(self) -> Iterator[None]:
        """While another program has the terminal."""
        self._foreground = True
        try:
            yield
        finally:
            self._foreground = False

    async def execute(self, call: Call, shell_command: str | None = None, *, paged: bool = True) -> None:
        """Run one call and show what it came to. Raises what the SDK raises, UsageError, LeaveShell, OutputClosed."""
        self.running = call
        self._known.note_call(call)
        before = self.session.transaction
        began_s = time.perf_counter()
        result = await call.command.run(self.session, call)
        self._note_result(call, before, result)
        sink = await self._sink(shell_command, paged)
        form = self.session.settings.output
        printer = self._printer.onto(sink.as_stream, "plain" if shell_command and form == "table" else form)
        try:
            await printer.show(paced(result, sink, self._known.note_keys), call.options.get("output"))
        except (OutputClosed, BrokenPipeError):
            if type(sink) is Sink:
                raise OutputClosed from None
        finally:
            took_s = time.perf_counter() - began_s
            with self.in_foreground():
                await sink.finish()
        if self.timing and not call.command.name.startswith("\\"):
            note(f"Time: {took_s * 1000:.1f} ms")

    def _note_result(self, call: Call, before: TransactionClient | None, result: Result) -> None:
        """Remember what the prompt, completion and the notices need of it."""
        if self.session.transaction is None or self.session.transaction is not before:
            self._operations = 0
        elif any(argument.completes == "keys" for argument in call.command.arguments):
            self._operations += 1
        if isinstance(result, Found):
            self._known.note_keys([result.key])
        elif isinstance(result, Done) and "config" in result.fields:
            self._own_configs.add(result.fields["config"])
        elif isinstance(result, Done) and "txid" in result.fields:
            self._known.note_txid(result.fields["txid"])
        elif isinstance(result, Configuration):
            known = self._known.shard_map
            if known is None or known.num < result.shard_map.num:
                self._known.shard_map = result.shard_map

    async def _sink(self, shell_command: str | None, paged: bool) -> Sink:
        stream = self._printer.stream
        if shell_command is not None:
            pipe = ShellPipe(stream, shell_command)
            await pipe.start()
            return pipe
        if paged and self.paging and self._pager is not None and stream.isatty():
            return Paged(stream, self._pager, lambda: os.get_terminal_size(sys.stdout.fileno()))
        return Sink(stream)


def _ignore_interrupts() -> None:
    """A Ctrl-C that comes between a command and the next prompt must not end the session."""
    signal.signal(signal.SIGINT, lambda number, frame: None)
