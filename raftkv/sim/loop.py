"""The event loop of one incarnation of one simulated process.

To the code that runs on it this is asyncio's loop; underneath, time comes from the scheduler through the
process's own clock, sockets from the simulated network, and every turn of the loop costs virtual CPU time.
A turn runs what was ready at its start, at one instant; the next turn can't begin before the CPU time of this one
has passed. So a slow process is late with everything, and nothing can run in circles without time passing.

After `die` nothing of it runs any more, whatever still refers to it: no callback, no timer, no socket. Its tasks
stay referenced until the run ends, since an abandoned task would run its `finally` whenever it is collected.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from math import floor
from typing import TYPE_CHECKING, Any, TypeVar

from raftkv.sim.scheduler import Scheduler

if TYPE_CHECKING:
    from raftkv.sim.network import Interface, Listener

T = TypeVar("T")

log = logging.getLogger(__name__)

CALLBACK_COST_S = 4e-6
"""CPU time of one callback. Real ones take 2 … 50 µs."""
CLOCK_COST_S = 2e-7
"""Looking at the clock takes time too: so that code that works until some time comes to an end."""
CLOCK_RESOLUTION_S = 1e-6

_set_running_loop = asyncio._set_running_loop
_NEVER = float("inf")


class ProcessEnded(SystemExit):
    """Unwinds the code of a process that has ended. Like SystemExit it passes through tasks and loops."""


class SimHandle(asyncio.TimerHandle):
    """A callback to come; the same class for those of this turn and those of a later time."""

    __slots__ = ()

    def __init__(  # the base class's does more, none of it needed
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> None:
        self._when = when
        self._callback: Any = callback
        self._args: Any = args
        self._context = context if context is not None else contextvars.copy_context()
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None

    def __repr__(self) -> str:
        return f"<SimHandle {self._callback!r}{' cancelled' if self._cancelled else ''}>"


class Clock:
    """A process's monotonic clock: it may run fast or slow, and jump forward, but never back.

    Made once per process: it is the machine's, and outlives incarnations. Only a power loss starts it anew.
    """

    __slots__ = ("_base_local", "_base_true", "rate")

    def __init__(self, offset_s: float) -> None:
        self.rate = 1.0
        self._base_true = 0.0
        self._base_local = offset_s

    def local(self, true: float) -> float:
        return self._base_local + (true - self._base_true) * self.rate

    def true(self, local: float) -> float:
        """When this clock will show `local`, if nothing changes its rate."""
        return self._base_true + (local - self._base_local) / self.rate

    def set_rate(self, now: float, rate: float) -> None:
        self._base_local, self._base_true, self.rate = self.local(now), now, rate

    def restart(self, now: float, local_s: float) -> None:
        """The machine lost its power: its monotonic clock begins anew."""
        self._base_local, self._base_true = local_s, now

    def jump(self, now: float, forward_s: float) -> None:
        assert forward_s >= 0
        self._base_local, self._base_true = self.local(now) + forward_s, now


class SimLoop(asyncio.AbstractEventLoop):
    """See the module. `after_turn` is called after every turn: for invariants, which only look."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        clock: Clock,
        interface: Interface,
        on_exception: Callable[[str, BaseException | None], None],
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.clock = clock
        self.interface = interface
        self.slowness = 1.0
        """How many times slower than usual the CPU is."""
        self.clock_step_s = 0.0
        """What its clock and its timers count in, rounded as uvloop does it, so that a timer may come a little early. 0
        is as fine as can be."""
        self.after_turn: Callable[[], None] | None = None
        self.turns = 0
        self.alive = True
        self.paused = False
        self.tasks: list[asyncio.Task[Any]] = []
        self._on_exception = on_exception
        self._ready: deque[SimHandle] = deque()
        self._timers: list[tuple[float, int, SimHandle]] = []
        self._timer_sequence = 0
        self._spent_s = 0.0
        self._free_at = 0.0
        self._wake_at = _NEVER
        self._running = False

    # ---- life

    def die(self) -> None:
        """The process is gone, from this moment on, even if one of its callbacks is just running."""
        self.alive = False
        self._ready.clear()
        self._timers.clear()

    def pause(self) -> None:
        """SIGSTOP: the kernel goes on receiving for it, the process does nothing."""
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        self.rewake()

    def rewake(self) -> None:
        """The clock was changed, or the loop may run again: find out anew when."""
        self._wake_at = _NEVER
        self._schedule_next()

    def spend(self, cpu_s: float) -> None:
        """The running callback blocks for that long."""
        self._spent_s += cpu_s

    def dispose(self) -> None:
        """The run is over: let go of tasks and coroutines in order, and in silence."""
        assert not self.alive
        for task in self.tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                try:
                    task.get_coro().close()
                except (RuntimeError, SystemExit, Exception):
                    continue  # it awaits in a `finally`: there is nobody left to run that
            elif not task.cancelled():
                task.exception()
        self.tasks.clear()

    # ---- turns

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """From outside (network, disk): have the process call it, as soon as it gets to it."""
        if self.alive:
            self._ready.append(SimHandle(0.0, callback, args, None))
            if not self._running:
                self._wake_by(self._free_at)

    def _wake_by(self, time: float) -> None:
        if time < self._wake_at and not self.paused:
            time = max(time, self.scheduler.now)
            self._wake_at = time
            self.scheduler.at(time, self._wake, time)

    def _schedule_next(self) -> None:
        if self._ready:
            self._wake_by(self._free_at)
            return
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heappop(timers)
        if timers:
            self._wake_by(max(self._free_at, self.clock.true(timers[0][0])))

    def _wake(self, time: float) -> None:
        if time == self._wake_at and self.alive:
            self._wake_at = _NEVER
            if not self.paused:
                self._turn()

    def _turn(self) -> None:
        ready = self._ready
        timers = self._timers
        self.turns += 1
        self._spent_s = 0.0
        if timers:
            until = self.clock.local(self.scheduler.now) + CLOCK_RESOLUTION_S
            while timers and timers[0][0] <= until:
                handle = heappop(timers)[2]
                if not handle._cancelled:
                    ready.append(handle)
        self._running = True
        _set_running_loop(self)
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle._cancelled:
                    continue
                self._spent_s += CALLBACK_COST_S
                try:
                    handle._context.run(handle._callback, *handle._args)
                except ProcessEnded:
                    pass
                except Exception as error:
                    self.call_exception_handler(
                        {"message": f"exception in {handle!r}", "exception": error, "handle": handle}
                    )
                if not self.alive:
                    return
        except ProcessEnded:  # by the exception handler
            return
        finally:
            _set_running_loop(None)
            self._running = False
        self._free_at = self.scheduler.now + self._spent_s * self.slowness
        if self.after_turn is not None:
            self.after_turn()
        self._schedule_next()

    # ---- what asyncio asks of a loop

    def time(self) -> float:
        now = self.scheduler.now
        if self._running:
            self._spent_s += CLOCK_COST_S
            now += self._spent_s * self.slowness
        local = self.clock.local(now)
        return floor(local / self.clock_step_s) * self.clock_step_s if self.clock_step_s else local

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> SimHandle:
        handle = SimHandle(0.0, callback, args, context)
        if self.alive:
            self._ready.append(handle)
            if not self._running:
                self._wake_by(self._free_at)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> SimHandle:
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> SimHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> SimHandle:
        if self.clock_step_s:
            now = self.time()
            when = now + round((when - now) / self.clock_step_s) * self.clock_step_s
        handle = SimHandle(when, callback, args, context)
        if self.alive:
            self._timer_sequence = sequence = self._timer_sequence + 1
            heappush(self._timers, (when, sequence, handle))
            if not self._running:
                self._schedule_next()
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        task = asyncio.Task(coroutine, loop=self, name=name, context=context)
        if self.alive:
            self.tasks.append(task)
            if len(self.tasks) > 1000:
                self.tasks = [task for task in self.tasks if not task.done()]
        return task

    async def create_server(  # type: ignore[override]
        self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **options: Any
    ) -> Listener:
        assert options.get("ssl") is None, "no TLS in the simulator"
        return self.interface.listen(factory, host, port)

    async def create_connection(  # type: ignore[override]
        self, factory: Callable[[], Any], host: str, port: int, **options: Any
    ) -> tuple[asyncio.Transport, Any]:
        assert options.get("ssl") is None, "no TLS in the simulator"
        return await self.interface.connect(factory, host, port)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return not self.alive

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.alive:
            self._on_exception(str(context.get("message")), context.get("exception"))
