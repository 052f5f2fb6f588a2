"""Simulated processes: what survives an incarnation (clock, disk, address) and what ends with it.

`DaemonProcess` runs a production `Daemon` the way daemons/process.py does: the same end on a failure of the disk
or on an exception in a callback, but the end is a virtual process's. `ClientProcess` runs a coroutine with the SDK.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raftkv.daemons.daemon import Daemon
from raftkv.daemons.failpoints import Failpoints
from raftkv.daemons.options import DaemonOptions
from raftkv.sim.disk import DiskProfile, Media, SimDisk
from raftkv.sim.loop import Clock, ProcessEnded, SimLoop
from raftkv.sim.network import Interface, Network
from raftkv.sim.scheduler import Scheduler
from raftkv.storage.engine import Range
from raftkv.storage.errors import StorageError, WriteStall
from raftkv.storage.memory import MemoryBacking, MemoryEngine
from raftkv.storage.store import APPLIED_KEY


@dataclass
class World:
    """What all processes of a run share."""

    scheduler: Scheduler
    network: Network
    seed: str
    disk_profile: DiskProfile
    clock_step_s: float = 0.0

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose: one more draw here changes nothing there."""
        return random.Random(f"{self.seed}/{purpose}")


class Process:
    """One machine with one process. `host` is its name on the network."""

    def __init__(self, world: World, host: str) -> None:
        self.world = world
        self.host = host
        self.rng = world.rng(host)
        self.clock = Clock(self.rng.uniform(1.0, 1000.0))
        self.incarnation = 0
        self.loop: SimLoop | None = None
        self.slowness = 1.0
        self.paused = False
        self.exit_text: str | None = None
        """Why the process ended of its own accord; None while it runs, or if it was killed."""
        self._past: list[SimLoop] = []

    @property
    def running(self) -> bool:
        return self.loop is not None and self.loop.alive

    def launch(self, main: Callable[[], Coroutine[Any, Any, None]]) -> SimLoop:
        """Begin a new incarnation that runs `main()`."""
        assert not self.running
        self.incarnation += 1
        self.exit_text = None
        self.paused = False
        interface = Interface(self.world.network, self.host)
        loop = SimLoop(  # type: ignore[abstract]  # what daemons and clients don't use isn't there
            self.host, self.world.scheduler, self.clock, interface, self._exception
        )
        interface.loop = self.loop = loop
        loop.slowness = self.slowness
        loop.clock_step_s = self.world.clock_step_s
        self.world.scheduler.note(b"start %s" % self.host.encode())
        loop.post(self._enter, main)
        return loop

    def _enter(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        assert self.loop is not None
        task = self.loop.create_task(main(), name=f"main of {self.host}")
        task.add_done_callback(self._main_ended)

    def _main_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._exception(f"main of {self.host}", error)

    def kill(self) -> None:
        """SIGKILL: the process ends between two instructions, the machine goes on."""
        self._end(power_loss=False)

    def lose_power(self) -> None:
        """The whole machine stops: nobody is told, and what wasn't synced may be gone."""
        if self.running:
            self._end(power_loss=True)
            self.clock.restart(self.world.scheduler.now, self.rng.uniform(1.0, 60.0))

    def exit(self, text: str) -> None:
        """The process ends itself."""
        if self.running:
            self.exit_text = text
            self.kill()
        raise ProcessEnded

    def _end(self, *, power_loss: bool) -> None:
        loop = self.loop
        if loop is None or not loop.alive:
            return
        self.world.scheduler.note(b"end %s" % self.host.encode())
        loop.die()
        self._past.append(loop)
        loop.interface.process_ended(silently=power_loss)

    def pause(self) -> None:
        if self.running and not self.paused:
            assert self.loop is not None
            self.paused = True
            self.loop.pause()

    def resume(self) -> None:
        if self.running and self.paused:
            assert self.loop is not None
            self.paused = False
            self.loop.resume()

    def set_slowness(self, slowness: float) -> None:
        self.slowness = slowness
        if self.loop is not None:
            self.loop.slowness = slowness

    def set_clock_rate(self, rate: float) -> None:
        self.clock.set_rate(self.world.scheduler.now, rate)
        if self.running and self.loop is not None:
            self.loop.rewake()

    def jump_clock(self, forward_s: float) -> None:
        self.clock.jump(self.world.scheduler.now, forward_s)
        if self.running and self.loop is not None:
            self.loop.rewake()

    def dispose(self) -> None:
        """The run is over."""
        if self.running and self.loop is not None:
            self.loop.die()
            self._past.append(self.loop)
        for loop in self._past:
            loop.dispose()
        self._past.clear()

    def _exception(self, message: str, error: BaseException | None) -> None:
        """An exception that nobody caught."""
        raise NotImplementedError


class ClientProcess(Process):
    """A process of the application's: any exception in it is the simulation's failure."""

    def __init__(self, world: World, host: str, on_failure: Callable[[Process, str, BaseException], None]) -> None:
        super().__init__(world, host)
        self._on_failure = on_failure

    def _exception(self, message: str, error: BaseException | None) -> None:
        if error is not None:
            self._on_failure(self, message, error)


class SimEngine(MemoryEngine):
    """The engine in memory, which can be made to stall as RocksDB may: it takes no batch of the state machine."""

    def __init__(self, process: DaemonProcess, disk: SimDisk, directory: str) -> None:
        super().__init__(disk, directory, process.backing)
        self._process = process
        self._where = directory

    def write(self, changes: Mapping[bytes, bytes | None], range_deletes: Sequence[Range] = ()) -> None:
        if self._process.engine_stalls and APPLIED_KEY in changes:
            raise WriteStall(self._where)
        super().write(changes, range_deletes)


class DaemonProcess(Process):
    """A machine whose process is a RaftKV daemon.

    `on_failure` gets what is a bug wherever it happens; `on_exit` the text of a process that ended itself.
    """

    def __init__(
        self,
        world: World,
        host: str,
        options: DaemonOptions,
        on_failure: Callable[[Process, str, BaseException], None],
        on_exit: Callable[[DaemonProcess, str], None],
    ) -> None:
        super().__init__(world, host)
        self.options = options
        self.media = Media(world.rng(f"{host}/disk"), world.disk_profile)
        self.backing = MemoryBacking(world.rng(f"{host}/engine"))
        self.failpoints = Failpoints()
        self.disk: SimDisk | None = None
        self.daemon: Daemon | None = None
        self.started = False
        """The daemon listens."""
        self.on_started: Callable[[DaemonProcess], None] = lambda process: None
        self.after_turn: Callable[[DaemonProcess], None] = lambda process: None
        self.excuses = 0  # faults under way for which it may end itself
        self.excused_until = 0.0
        """Until then the daemon may end itself: a fault of the disk was injected that may make it."""
        self.power_lasts_steps: int | None = None
        """Fault for the next start."""
        self.engine_stalls = False
        self._on_failure = on_failure
        self._on_exit = on_exit
        self._stopping: asyncio.Event | None = None

    def start(self) -> None:
        loop = self.launch(self._main)
        loop.after_turn = self._after_turn
        self.disk = SimDisk(self.media, loop, self.lose_power)
        self.disk.power_lasts_steps, self.power_lasts_steps = self.power_lasts_steps, None
        self.daemon = None
        self.started = False

    def stop(self) -> None:
        """SIGTERM."""
        if self.running and self._stopping is not None:
            self._stopping.set()

    async def _main(self) -> None:
        disk = self.disk
        assert disk is not None
        self._stopping = asyncio.Event()
        self.daemon = daemon = Daemon(self.options, disk, self._engine, self._fatal, self.incarnation, self.failpoints)
        try:
            await daemon.start()
        except (StorageError, OSError) as error:
            self._fatal(f"{self.options.name}: {error}")
        self.started = True
        self.on_started(self)
        await self._stopping.wait()
        await daemon.stop()
        self.exit("stopped")

    def _engine(self, directory: str) -> MemoryEngine:
        assert self.disk is not None
        return SimEngine(self, self.disk, directory)

    def _after_turn(self) -> None:
        self.after_turn(self)

    def _fatal(self, text: str) -> None:
        if self.running:
            self._on_exit(self, text)
        self.exit(text)

    def _exception(self, message: str, error: BaseException | None) -> None:
        """As daemons/process.py has it."""
        if isinstance(error, StorageError):
            self._fatal(f"{self.options.name}: {error}")
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self._on_failure(self, message, error)
            self.exit(f"{self.options.name}: failed with {error!r}")

    def _end(self, *, power_loss: bool) -> None:
        was_running = self.running
        super()._end(power_loss=power_loss)
        if was_running and self.disk is not None:
            self.disk.die(power_loss=power_loss)
        self.started = False
