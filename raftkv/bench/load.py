"""One loading process: loads the keys, makes the requests, and reports each second of them.

    python -m raftkv.bench.load     (started by `processes`, never by people)

Standard input is one line of JSON, the assignment; a second one when all processes are to begin; its end means stop.
Standard output is a line of JSON for each thing that there is to say: `loaded` (keys so far), `ready`, `second`, `end`,
`failed`.

A request's latency counts from when it was meant to begin. In a closed loop that is when the client's request before it
ended. In an open loop it is a time in a schedule that is fixed in advance: a client that is free takes the next one, at
its time or, if that has passed, at once; so a slow answer counts in every request that it kept waiting.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from raftkv.bench.histogram import Histogram
from raftkv.bench.plan import Plan, Series, Tally
from raftkv.bench.scenarios import SCENARIOS, Client, KeyMissing, Operation, World
from raftkv.client.tasks import gather_ordered
from raftkv.protocol.errors import OutcomeUnknown, RaftKVError, Unavailable

REPORT_S = 0.2
LAST_REQUESTS_S = 1.0
"""How long requests in flight may take when it is stopped early."""
LOADS_AT_ONCE_MIN = 16
"""Keys that one process loads at a time, if it hasn't more clients than that."""

Say = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Ending:
    """How the load of one process ended. `measured_s`: without the warm-up. `cut_off`: requests in flight that were
    given up, and count nowhere. Of an open loop, `unbegun`: the requests that were due, and for which no client was
    free before the end, and `oldest_s`, how long the first of them had waited; `late`: how late free clients began."""

    measured_s: float = 0.0
    cut_off: int = 0
    unbegun: int = 0
    oldest_s: float = 0.0
    late: Histogram = field(default_factory=Histogram)

    def add(self, other: Ending) -> None:
        self.measured_s = max(self.measured_s, other.measured_s)
        self.cut_off += other.cut_off
        self.unbegun += other.unbegun
        self.oldest_s = max(self.oldest_s, other.oldest_s)
        self.late.add(other.late)

    def encode(self) -> list[Any]:
        """For JSON."""
        return [self.measured_s, self.cut_off, self.unbegun, self.oldest_s, self.late.encode()]

    @classmethod
    def decode(cls, encoded: Sequence[Any]) -> Ending:
        """What `encode` was called on."""
        measured_s, cut_off, unbegun, oldest_s, late = encoded
        return cls(measured_s, cut_off, unbegun, oldest_s, Histogram.decode(late))


class Load:
    """The clients of one process. `say` takes each message; `now` is the clock, in seconds.

    (Not the event loop's: uvloop's counts whole milliseconds, and processes don't share it.)
    """

    def __init__(
        self,
        plan: Plan,
        world: World,
        clients: Sequence[Client],
        process: int,
        say: Say,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._world = world
        self._clients = clients
        self._process = process
        self._say = say
        self._now = now
        self._mix = SCENARIOS[plan.scenario].mix
        self._kinds = list(self._mix)
        self._shares = [share for share, _ in self._mix.values()]
        self._series: Series = {}
        self._ending = Ending()
        self._busy: set[Client] = set()
        self._measure_s = 0.0
        self._end_s = 0.0
        self._schedule: Iterator[float] = iter(())
        self._unbegun: list[float] = []

    # ---- before

    async def load_keys(self) -> None:
        """Put each key of this process's share that isn't there, or has another size. Raise RaftKVError."""
        plan, world = self._plan, self._world
        numbers = iter(range(self._process, plan.keys, plan.processes))
        rng = random.Random(f"{plan.seed} loading {self._process}")
        loaded, said_s = 0, self._now()

        async def some(client: Client) -> None:
            nonlocal loaded, said_s
            for number in numbers:
                key = world.key(number)
                found = await client.kv.get(key)
                if found is None or len(found.value) != plan.value_bytes:
                    await client.kv.put(key, world.value(rng))
                loaded += 1
                if self._now() - said_s > REPORT_S:
                    said_s = self._now()
                    self._say({"loaded": loaded})

        at_once = max(LOADS_AT_ONCE_MIN, len(self._clients))
        loading = [some(self._clients[position % len(self._clients)]) for position in range(at_once)]
        await gather_ordered(loading, at_once)
        self._say({"loaded": loaded})

    # ---- the measurement

    async def run(self, start_s: float, stop: asyncio.Event) -> Ending:
        """From `start_s` until the time is up or `stop` is set, and the last requests are over."""
        plan = self._plan
        self._measure_s = start_s + plan.warmup_s
        self._end_s = self._measure_s + plan.duration_s
        if plan.rate is not None:
            rate = plan.rate * len(self._clients) / plan.clients
            self._schedule = poisson(random.Random(f"{plan.seed} arrivals {self._process}"), start_s, rate)
        await self._sleep_until(start_s)
        loop = asyncio.get_running_loop()
        users = {client: loop.create_task(self._use(client)) for client in self._clients}
        working = asyncio.gather(*users.values())
        reporting, stopping = loop.create_task(self._report()), loop.create_task(stop.wait())
        try:
            patience_s = self._end_s - self._now() + plan.timeout_s
            waiting: set[asyncio.Future[Any]] = {working, stopping, reporting}
            await asyncio.wait(waiting, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                self._end_s = min(self._end_s, self._now())
            if reporting.done():
                reporting.result()  # nobody listens any more
            if not working.done():
                await self._end_early(users)
            elif not working.cancelled():
                working.result()
        finally:
            for task in (*users.values(), reporting, stopping):
                task.cancel()
            await asyncio.gather(*users.values(), reporting, stopping, working, return_exceptions=True)
        self._flush(None)
        return self._finish()

    async def _end_early(self, users: dict[Client, asyncio.Task[None]]) -> None:
        """Clients that wait for their next request end at once; the others have a moment."""
        for client, task in users.items():
            if client not in self._busy:
                task.cancel()
        await asyncio.wait(users.values(), timeout=LAST_REQUESTS_S)
        self._ending.cut_off = len(self._busy)

    def _finish(self) -> Ending:
        ending = self._ending
        ending.measured_s = max(0.0, self._end_s - self._measure_s)
        for intended_s in self._schedule:
            if intended_s >= self._end_s:
                break
            self._unbegun.append(intended_s)
        ending.unbegun = len(self._unbegun)
        ending.oldest_s = max((self._end_s - intended_s for intended_s in self._unbegun), default=0.0)
        return ending

    async def _use(self, client: Client) -> None:
        if self._plan.rate is None:
            while (now_s := self._now()) < self._end_s:
                await self._request(client, now_s)
            return
        for intended_s in self._schedule:
            if intended_s >= self._end_s:
                return
            now_s = self._now()
            if now_s >= self._end_s:
                self._unbegun.append(intended_s)
                return
            if now_s < intended_s:
                began_s = await self._sleep_until(intended_s)
                if intended_s >= self._measure_s:
                    self._ending.late.record(int((began_s - intended_s) * 1e9))
            await self._request(client, intended_s)

    async def _request(self, client: Client, intended_s: float) -> None:
        """One request; unless it belongs to the warm-up, what it came to."""
        kind = client.rng.choices(self._kinds, self._shares)[0] if len(self._kinds) > 1 else self._kinds[0]
        operate: Operation = self._mix[kind][1]
        retries, failed_attempts = client.kv.retries, client.failed_attempts
        error: Exception | None = None
        self._busy.add(client)
        try:
            await operate(self._world, client)
        except (RaftKVError, KeyMissing) as failure:
            error = failure
        ended_s = self._now()
        self._busy.discard(client)  # not when it is cancelled: then it is cut off
        if intended_s < self._measure_s:
            return
        tally = self._series.setdefault(int(ended_s - self._measure_s), {}).setdefault(kind, Tally())
        tally.retries += client.kv.retries - retries
        tally.failed_attempts += client.failed_attempts - failed_attempts
        if error is not None:
            await asyncio.sleep(0)  # what is refused without being sent must not keep the others waiting
        if error is None:
            tally.done += 1
            tally.latency.record(int((ended_s - intended_s) * 1e9))
        elif isinstance(error, OutcomeUnknown):
            tally.unknown[type(error).__name__] += 1
        else:
            tally.errors[type(error).__name__] += 1

    async def _sleep_until(self, at_s: float) -> float:
        """Until then, never less: a loop's timers may count in whole milliseconds. The time that it is."""
        now_s = self._now()
        while now_s < at_s:
            await asyncio.sleep(at_s - now_s)
            now_s = self._now()
        return now_s

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            self._flush(int(self._now() - self._measure_s))

    def _flush(self, below: int | None) -> None:
        """Say what the seconds before `below` came to, or all of them."""
        for second in sorted(self._series):
            if below is None or second < below:
                kinds = {kind: tally.encode() for kind, tally in self._series.pop(second).items()}
                self._say({"second": second, "kinds": kinds})


def poisson(rng: random.Random, start_s: float, rate: float) -> Iterator[float]:
    """Times of independent arrivals, so many a second on average, without end."""
    at_s = start_s
    while True:
        at_s += rng.expovariate(rate)
        yield at_s


def say(message: dict[str, Any]) -> None:
    """One line to whoever started this process. Raise BrokenPipeError when it is gone."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def work() -> None:
    """All of a loading process."""
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    assignment = json.loads(await reader.readline())
    plan = Plan.decode(assignment["plan"])
    process: int = assignment["process"]
    world = World(plan, assignment["owners"], process)
    numbers = plan.clients_of(process)
    clients = [Client(plan.client(), number, plan.seed) for number in numbers]
    load = Load(plan, world, clients, process, say)
    stop = asyncio.Event()
    loading = loop.create_task(_prepare(load, SCENARIOS[plan.scenario].loads))
    listening = loop.create_task(reader.readline())
    try:
        await asyncio.wait({loading, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return  # told to stop
        loading.result()
        line = await listening
        if line:
            gc.collect()
            gc.freeze()  # its pauses would look like those of the cluster
            listening = loop.create_task(reader.readline())
            listening.add_done_callback(lambda _: stop.set())
            ending = await load.run(json.loads(line)["start_s"], stop)
            say({"end": ending.encode()})
    finally:
        for task in (loading, listening):
            task.cancel()
        await asyncio.gather(loading, listening, return_exceptions=True)
        await asyncio.gather(*(client.kv.close() for client in clients))


async def _prepare(load: Load, loads: bool) -> None:
    if loads:
        await load.load_keys()
    say({"ready": True})


def main() -> int:
    """Until the work is done; what went wrong is said in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process hears it
    try:
        import uvloop

        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        loop_factory = None
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(work())
    except BrokenPipeError:
        return 1
    except Exception as error:
        text = str(error) if isinstance(error, RaftKVError) else f"{type(error).__name__}: {error}"
        say({"failed": text, "unavailable": isinstance(error, Unavailable)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
