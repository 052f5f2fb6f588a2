"""`raftkv top`: the cluster as it is now, again and again, until `q`.

Polls and keys are independent: what is shown can be sorted and scrolled while a daemon is silent. The terminal is given
back in every case: `q`, Ctrl-C, Ctrl-Z, SIGTERM, SIGHUP, an exception. Without a terminal it prints once, plain.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click
from rich.console import Console

from raftkv.cli import interrupts
from raftkv.cli.daemons import CONTROLLERS_HELP, AddressesType, Seconds, option, tls_options
from raftkv.cli.exit_codes import ExitCode, LocalFailure, UsageError, describe, exit_code_of
from raftkv.cli.keyboard import Keyboard
from raftkv.cli.local_state import default_controllers
from raftkv.cli.session import NO_CONTROLLERS, TIMEOUT_S_DEFAULT
from raftkv.cli.tls_files import client_ssl
from raftkv.cli.top_poll import Sample, Watch
from raftkv.cli.top_view import SORTS, View, body, screenful
from raftkv.protocol.errors import RaftKVError

INTERVALS_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
PLAIN_COLUMNS = 1000
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@click.command()
@option("--interval", type=Seconds(), default="1", help="From one poll to the next; + and - change it.")
@option("--sort", type=click.Choice(SORTS), default="group", help="Of the replicas; s changes it.")
@option("--controllers", "--ctrl-peers", type=AddressesType(), help=CONTROLLERS_HELP)
@option("--timeout", "timeout_s", type=Seconds(), default=f"{TIMEOUT_S_DEFAULT:g}", help="Until the first answer.")
@tls_options
def top(**options: Any) -> int:
    """Watch a cluster: leaders, terms, lag, rates, shards, moves, transactions.

    \b
      raftkv top
      raftkv top --interval 5 --sort lag
      raftkv top | head                      no terminal: prints once, and exits with 5 if it is unhealthy

    q quits, p pauses, s sorts by another column, r the other way round, + and - change the interval, arrows scroll.
    PER S are log entries that a group has committed: many writes at once share one, reads make none. MS is how long
    a daemon took to answer. A daemon that hasn't answered within a second is shown as down.
    """
    controllers = options["controllers"] or default_controllers()
    if not controllers:
        raise UsageError(NO_CONTROLLERS)
    ssl = client_ssl(options["tls_cert"], options["tls_key"], options["tls_ca"])
    view = View(sort=options["sort"], interval_s=options["interval"])
    try:
        status, ended_by = interrupts.run(_top(controllers, options["timeout_s"], ssl, view))
    except RaftKVError as error:
        raise LocalFailure(f"top: {describe(error, controllers=controllers)}", exit_code_of(error)) from None
    if ended_by is not None:
        signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    return status


async def _top(controllers: tuple[str, ...], timeout_s: float, ssl: Any, view: View) -> tuple[int, int | None]:
    """The exit status, and the signal that ended it."""
    from raftkv.client.controllers import Controllers

    async with Controllers(controllers, timeout_s=timeout_s, ssl=ssl) as client:
        watch = Watch(client, controllers, timeout_s)
        first = await watch.poll()
        # An exported size would hold for ever, whatever becomes of the window: ask the terminal.
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        console = Console(_environ=environment)
        if not console.is_terminal or console.is_dumb_terminal:
            await asyncio.sleep(view.interval_s)
            return _print_once(first, await watch.poll(), view), None
        return ExitCode.DONE, await Display(console, watch, first, view).run()


def _print_once(before: Sample, now: Sample, view: View) -> int:
    """What a terminal would show, without colour, as wide as it needs."""
    console = Console(file=sys.stdout, width=PLAIN_COLUMNS, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(body(before, now, view))
    for line in captured.get().splitlines():
        print(line.rstrip())
    return ExitCode.UNHEALTHY if now.health.problems else ExitCode.DONE


class Display:
    """One run on a terminal."""

    def __init__(self, console: Console, watch: Watch, first: Sample, view: View) -> None:
        self._console = console
        self._watch = watch
        self._view = view
        self._before: Sample | None = None
        self._now = first
        self._error = ""
        self._changed = asyncio.Event()
        self._hurry = asyncio.Event()  # the next poll is due
        self._quit = False
        self._ended_by: int | None = None

    async def run(self) -> int | None:
        """Until the user leaves; the signal that ended it, if one did."""
        loop = asyncio.get_running_loop()
        polling = loop.create_task(self._poll())
        with ExitStack() as stack:
            stack.callback(polling.cancel)
            stack.enter_context(self._signals())
            keyboard: Keyboard | None = None
            if sys.stdin is not None and sys.stdin.isatty():
                keyboard = stack.enter_context(Keyboard(sys.stdin.fileno(), self._pressed))
            self._view.keys = keyboard is not None
            screen = self._console.screen(hide_cursor=True)
            stack.enter_context(screen)
            loop.add_signal_handler(signal.SIGTSTP, self._suspend, keyboard)
            stack.callback(loop.remove_signal_handler, signal.SIGTSTP)
            while not self._quit:
                clock = time.strftime("%H:%M:%S")
                self._view.columns = self._console.size.width
                age_s = loop.time() - self._now.at_s
                screen.update(screenful(self._before, self._now, age_s, self._error, clock, self._view))
                self._changed.clear()
                await self._wait_for_change(polling)
        return self._ended_by

    async def _wait_for_change(self, polling: asyncio.Task[None]) -> None:
        """Until there is something new to see, at most a second: the age is shown. Raises what ended the polling."""
        changed = asyncio.get_running_loop().create_task(self._changed.wait())
        try:
            await asyncio.wait({changed, polling}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        if polling.done():
            polling.result()

    async def _poll(self) -> None:
        """Poll for ever; what the cluster doesn't answer is shown, anything else is raised."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + self._view.interval_s
            while self._view.paused or loop.time() < due_s:
                self._hurry.clear()
                try:
                    async with asyncio.timeout(None if self._view.paused else due_s - loop.time()):
                        await self._hurry.wait()
                except TimeoutError:
                    continue
                due_s = min(due_s, loop.time() + self._view.interval_s)
            try:
                sample = await self._watch.poll()
            except RaftKVError as error:
                self._error = str(error)
            else:
                if not self._view.paused:  # it may have been meanwhile
                    self._before, self._now, self._error = self._now, sample, ""
            self._changed.set()

    def _pressed(self, key: str) -> None:
        view = self._view
        if key in ("q", "Q"):
            self._quit = True
        elif key in ("p", " "):
            view.paused = not view.paused
            self._hurry.set()
        elif key == "s":
            view.sort = SORTS[(SORTS.index(view.sort) + 1) % len(SORTS)]
        elif key == "r":
            view.reverse = not view.reverse
        elif key in ("+", "-"):
            steps = sorted({*INTERVALS_S, view.interval_s})
            position = steps.index(view.interval_s) + (1 if key == "+" else -1)
            view.interval_s = steps[max(0, min(position, len(steps) - 1))]
            self._hurry.set()
        elif key in ("up", "k", "down", "j", "pageup", "pagedown"):
            page = max(1, self._console.size.height - 3)
            view.first_line += {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -page, "pagedown": page}[key]
        self._changed.set()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals that end it let it tidy up first; a window of another size is drawn again."""
        loop = asyncio.get_running_loop()
        for number in ENDING_SIGNALS:
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGWINCH, self._changed.set)
        try:
            yield
        finally:
            for number in (*ENDING_SIGNALS, signal.SIGWINCH):
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        self._ended_by = number
        self._quit = True
        self._changed.set()

    def _suspend(self, keyboard: Keyboard | None) -> None:
        """Ctrl-Z: the shell gets its terminal as it was; `fg` draws anew."""
        self._console.show_cursor(True)
        self._console.set_alt_screen(False)
        if keyboard is not None:
            keyboard.give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        if keyboard is not None:
            keyboard.take()
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)
        self._changed.set()
