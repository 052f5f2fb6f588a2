"""What SIGINT does while no session handles it: never a traceback, always exit status 130.

Imports next to nothing, because it stands before everything else is imported.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing is an import too
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import FrameType
    from typing import Any, TypeVar

    T = TypeVar("T")

INTERRUPTED = 130
PATIENCE_S = 0.3
"""How long the end of an interrupted command may take before another Ctrl-C ends the program at once."""


def end_at_once() -> None:
    """From now on SIGINT ends the program, silently: there is nothing yet, or no more, that it could lose.

    A program that was started with SIGINT ignored goes on ignoring it.
    """
    try:
        import signal

        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, _end)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


def ignore() -> None:
    """From now on SIGINT does nothing: the exit status is decided."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def raise_once() -> None:
    """From now on the first SIGINT raises KeyboardInterrupt, and the next one ends the program."""
    import signal

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)


def run(work: Coroutine[Any, Any, T], on_interrupt: Callable[[Any], object] | None = None) -> T:
    """asyncio.run, but SIGINT cancels `work` (or calls `on_interrupt` with its task) and it raises KeyboardInterrupt.

    One that comes PATIENCE_S after the first ends the program at once, also when the loop is stuck; those
    between do nothing, so that what the interrupted command has to say is said.
    """
    import asyncio
    import signal

    first_s: float | None = None
    before = signal.getsignal(signal.SIGINT)

    async def interruptible() -> T:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)

        def interrupted(number: int, frame: FrameType | None) -> None:
            nonlocal first_s
            if first_s is None:
                first_s = loop.time()
                loop.call_soon_threadsafe(on_interrupt or asyncio.Task.cancel, task)
            elif loop.time() - first_s > PATIENCE_S:
                os._exit(INTERRUPTED)

        # Not the loop's own handler: that leaves one that raises KeyboardInterrupt anywhere.
        signal.signal(signal.SIGINT, interrupted)
        try:
            return await task
        finally:
            signal.signal(signal.SIGINT, _end)

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        if first_s is None:
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


class Held:
    """`with Held():` finishes what it has begun: a SIGINT that comes meanwhile has its effect at the end."""

    def __enter__(self) -> None:
        import signal

        self._before = signal.getsignal(signal.SIGINT)
        self._frames: list[FrameType | None] = []
        if callable(self._before):
            signal.signal(signal.SIGINT, lambda number, frame: self._frames.append(frame))

    def __exit__(self, *_: object) -> None:
        import signal

        if callable(self._before):
            signal.signal(signal.SIGINT, self._before)
            if self._frames:
                self._before(signal.SIGINT, self._frames[0])


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def _raise(number: int, frame: FrameType | None) -> None:
    end_at_once()
    raise KeyboardInterrupt
