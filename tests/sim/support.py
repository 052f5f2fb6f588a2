"""A small simulated world for tests of its parts."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from raftkv.sim.disk import DiskProfile
from raftkv.sim.network import Network, NetworkProfile
from raftkv.sim.process import ClientProcess, Process, World
from raftkv.sim.scheduler import Scheduler


class SmallWorld:
    """Processes by name on one network; exceptions in them are kept in `errors`."""

    def __init__(self, profile: NetworkProfile | None = None, seed: str = "test") -> None:
        self.scheduler = Scheduler()
        rng = World(self.scheduler, None, seed, DiskProfile()).rng("network")  # type: ignore[arg-type]
        self.network = Network(self.scheduler, rng, profile or NetworkProfile(jitter_s=0.0, split=0.0))
        self.world = World(self.scheduler, self.network, seed, DiskProfile(spike=0.0))
        self.errors: list[BaseException] = []
        self.processes: dict[str, ClientProcess] = {}

    def process(self, name: str) -> ClientProcess:
        if name not in self.processes:
            self.processes[name] = ClientProcess(self.world, name, self._failed)
        return self.processes[name]

    def launch(self, name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> ClientProcess:
        process = self.process(name)
        process.launch(main)
        return process

    def run(self, seconds: float) -> None:
        self.scheduler.run_until(self.scheduler.now + seconds)

    def _failed(self, process: Process, message: str, error: BaseException) -> None:
        self.errors.append(error)
