"""What is measured only where metrics are asked for: requests, fsyncs, the engine's slow calls, the loop's punctuality.

Plain numbers, kept by the daemon as it goes; metrics.py makes metrics of them when somebody scrapes. For processes
only: the clock is the machine's, so the simulator must have none of this.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from raftkv.daemons.histogram import LAG_BOUNDS_S, LONG_BOUNDS_S, REQUEST_BOUNDS_S, SYNC_BOUNDS_S, Histogram
from raftkv.daemons.service import Session
from raftkv.protocol.connection import Connection
from raftkv.protocol.errors import RaftKVError
from raftkv.protocol.messages import Verb, encode_error_reply, encode_reply
from raftkv.storage.disk import DiskFile, OsDisk
from raftkv.storage.rocks import RocksEngine

Clock = Callable[[], float]
"""Seconds since some instant, with a resolution well below a request's duration."""

LAG_PERIOD_S = 0.5


class VerbMeter(Histogram):
    """Durations of the answered requests of one verb, in s; `refused` counts those among them that got an error."""

    __slots__ = ("refused",)

    def __init__(self) -> None:
        super().__init__(REQUEST_BOUNDS_S)
        self.refused: Counter[int] = Counter()
        """By the error's wire code."""


class RequestMeter:
    """All requests of a daemon, by verb; those with a verb that nobody knows are of verb 0."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.verbs = {0: VerbMeter(), **{int(verb): VerbMeter() for verb in Verb}}

    def session(self, connection: Connection) -> MeteredSession:
        return MeteredSession(connection, self)


class MeteredSession(Session):
    """A session that notes when requests begin and end. What it adds to each costs well below a microsecond."""

    __slots__ = ("_began", "_clock", "_verbs")

    def __init__(self, connection: Connection, meter: RequestMeter) -> None:
        super().__init__(connection)
        self._clock = meter.clock
        self._verbs = meter.verbs
        self._began: dict[int, tuple[VerbMeter, float]] = {}

    def begin(self, request_id: int, verb: int) -> None:
        """A request has come in."""
        self._began[request_id] = (self._verbs.get(verb) or self._verbs[0], self._clock())

    def reply(self, request_id: int, body: Any) -> None:
        self._end(request_id)
        self.connection.send(encode_reply(request_id, body))

    def refuse(self, request_id: int, error: RaftKVError) -> None:
        code, fields = error.to_wire()
        self._end(request_id, code)
        self.connection.send(encode_error_reply(request_id, code, fields))

    def deliver(self, request_id: int, result: Any) -> None:
        if isinstance(result, RaftKVError):
            self.refuse(request_id, result)
        elif result[0] == 0:
            self._end(request_id)
            self.connection.send(encode_reply(request_id, result))
        else:
            self._end(request_id, result[0])
            self.connection.send(encode_error_reply(request_id, result[0], result[1:]))

    def _end(self, request_id: int, code: int = 0) -> None:
        begun = self._began.pop(request_id, None)
        if begun is None:  # a client that gave two requests the same id
            return
        meter, began_s = begun
        took_s = self._clock() - began_s
        meter.counts[bisect_left(meter.bounds, took_s)] += 1
        meter.total += took_s
        if code:
            meter.refused[code] += 1


class MeteredDisk(OsDisk):
    """Real files; the log's syncs are timed, in the thread that does them."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.syncs = Histogram(SYNC_BOUNDS_S)
        self.appended_bytes = 0

    def write_all_and_sync(self, file: DiskFile, writes: Sequence[tuple[int, bytes]]) -> None:
        for offset, data in writes:
            file.write(offset, data)
            self.appended_bytes += len(data)
        began_s = self._clock()
        file.sync()
        self.syncs.observe(self._clock() - began_s)


class EngineMeter:
    """The slow calls of a daemon's engines: there is another one after each snapshot that is installed."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.flushes = Histogram(LONG_BOUNDS_S)
        self.checkpoints = Histogram(LONG_BOUNDS_S)

    def engine(self, directory: str, cache_bytes: int) -> MeteredEngine:
        return MeteredEngine(self, directory, cache_bytes)


class MeteredEngine(RocksEngine):
    """RocksDB, with its flushes and checkpoints timed."""

    def __init__(self, meter: EngineMeter, directory: str, cache_bytes: int) -> None:
        super().__init__(directory, cache_bytes=cache_bytes)
        self._meter = meter

    async def flush(self) -> None:
        began_s = self._meter.clock()
        await super().flush()
        self._meter.flushes.observe(self._meter.clock() - began_s)

    async def checkpoint(self, directory: str, keys: Sequence[bytes] = ()) -> list[bytes | None]:
        began_s = self._meter.clock()
        values = await super().checkpoint(directory, keys)
        self._meter.checkpoints.observe(self._meter.clock() - began_s)
        return values

    @property
    def estimated_keys(self) -> int:
        """Rows, those in memory included."""
        return self._number("rocksdb.estimate-num-keys")

    @property
    def table_bytes(self) -> int:
        """Size of the table files in use."""
        return self._number("rocksdb.live-sst-files-size")

    def _number(self, name: str) -> int:
        return self._db.property_int_value(name) or 0


class LoopMeter:
    """How late the loop runs what is due: a timer of its own, twice a second."""

    def __init__(self, clock: Clock) -> None:
        self.lags = Histogram(LAG_BOUNDS_S)
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = self._loop.call_later(LAG_PERIOD_S, self._due, self._clock() + LAG_PERIOD_S)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _due(self, due_s: float) -> None:
        self.lags.observe(max(0.0, self._clock() - due_s))
        self.start()


class Meters:
    """All of them, for one process."""

    def __init__(self, clock: Clock) -> None:
        self.requests = RequestMeter(clock)
        self.disk = MeteredDisk(clock)
        self.engine = EngineMeter(clock)
        self.loop = LoopMeter(clock)
