"""A progress bar on standard error, where that is a terminal; elsewhere nothing is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Show = Callable[[int, str], None]
"""Called with how much is done, and a text on the rest."""


def progress(
    what: str, total: int | None, *, counted: bool = True, wanted: bool = True
) -> AbstractContextManager[Show]:
    """The bar of `what`; `total` None: nobody knows how much there is. `counted` shows the numbers, else per cent."""
    if not wanted or sys.stderr is None or not sys.stderr.isatty():
        return nullcontext(lambda done, text: None)
    return _Bar(what, total, counted)


class _Bar(AbstractContextManager[Show]):
    """Goes when its context ends."""

    def __init__(self, what: str, total: int | None, counted: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

        class Steady(Console):
            """Leaves the cursor shown: a second Ctrl-C ends the program at once, and nobody would show it again."""

            def show_cursor(self, show: bool = True) -> bool:
                return False

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn() if counted else TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(
            *columns, console=Steady(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._progress.add_task(what, total=total, text="")

    def __enter__(self) -> Show:
        self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done, text=text)
