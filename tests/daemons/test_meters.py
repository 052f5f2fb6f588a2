"""What is counted of requests, syncs and the loop's punctuality, with a clock that the test moves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from raftkv.daemons.meters import EngineMeter, LoopMeter, MeteredDisk, RequestMeter
from raftkv.daemons.service import Service
from raftkv.protocol.connection import Connection
from raftkv.protocol.errors import Busy, Conflict
from raftkv.protocol.messages import Hello, Verb, encode_reply


class FakeConnection:
    closing = congested = False
    peername = "test"
    on_frame: Any = None
    on_lost: Any = None
    on_drained: Any = None

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)


class FakePeers:
    def hello(self) -> Hello:
        return Hello.of_client()


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_requests_are_counted_by_verb_and_outcome_and_timed() -> None:
    async def run() -> None:
        clock, kept = Clock(), []
        meter = RequestMeter(clock)

        def write(session: Any, request_id: int, body: list[Any]) -> None:
            kept.append((session, request_id))

        def busy(session: Any, request_id: int, body: list[Any]) -> None:
            raise Busy("too much")

        service = Service(cast(Any, FakePeers()), {Verb.WRITE: write, Verb.READ: busy}, "test", meter.session)
        connection = FakeConnection()
        service._admit_client(cast(Connection, connection), Hello.of_client())
        for request_id in (1, 2, 3, 4):
            connection.on_frame(connection, [10, request_id, int(Verb.WRITE)])
        connection.on_frame(connection, [10, 5, int(Verb.READ)])
        connection.on_frame(connection, [10, 6, 99])
        session = kept[0][0]
        clock.now_s += 0.003
        session.deliver(1, [0, 7])
        session.reply(2, [0])
        clock.now_s += 0.2
        session.deliver(3, [Conflict.code, [b"k"]])
        session.deliver(4, Busy("closed"))
        session.reply(4, [0])  # answered already: a handler's mistake isn't counted twice

        writes = meter.verbs[Verb.WRITE]
        assert (writes.count, dict(writes.refused)) == (4, {Conflict.code: 1, Busy.code: 1})
        assert abs(writes.total - (2 * 0.003 + 2 * 0.203)) < 1e-6
        assert [count for end, count in writes.cumulative() if end in ("0.0025", "0.005", "0.25")] == [0, 2, 4]
        assert dict(meter.verbs[Verb.READ].refused) == {Busy.code: 1}
        assert meter.verbs[0].count == 1
        assert len(connection.sent) == 1 + 7 and encode_reply(1, [0, 7]) in connection.sent

    asyncio.run(run())


def test_without_a_meter_nothing_is_noted() -> None:
    async def run() -> None:
        service = Service(cast(Any, FakePeers()), {Verb.WRITE: lambda s, r, b: s.deliver(r, [0])}, "test")
        connection = FakeConnection()
        service._admit_client(cast(Connection, connection), Hello.of_client())
        connection.on_frame(connection, [10, 1, int(Verb.WRITE)])
        assert connection.sent[1:] == [encode_reply(1, [0])]

    asyncio.run(run())


def test_syncs_are_timed_and_bytes_counted(tmp_path: Path) -> None:
    disk = MeteredDisk(Clock())
    file = disk.open_file(str(tmp_path / "f"), new=True)
    disk.write_all_and_sync(file, [(0, b"abc"), (3, b"de")])
    file.close()
    disk.close()
    assert (tmp_path / "f").read_bytes() == b"abcde"
    assert (disk.appended_bytes, disk.syncs.count) == (5, 1)


def test_the_engine_s_slow_calls_are_timed(tmp_path: Path) -> None:
    async def run() -> None:
        meter = EngineMeter(Clock())
        engine = meter.engine(str(tmp_path / "e"), 1 << 20)
        engine.write({b"k%d" % number: b"v" * 100 for number in range(50)})
        assert (engine.estimated_keys, engine.table_bytes) == (50, 0)
        await engine.flush()
        assert engine.table_bytes > 0
        assert await engine.checkpoint(str(tmp_path / "c"), (b"k1",)) == [b"v" * 100]
        engine.close()
        assert (meter.flushes.count, meter.checkpoints.count) == (1, 1)

    asyncio.run(run())


def test_a_late_loop_is_noticed() -> None:
    async def run() -> None:
        clock = Clock()
        meter = LoopMeter(clock)
        meter._due(clock.now_s - 0.2)
        meter._due(clock.now_s + 1)
        meter.stop()
        assert meter.lags.count == 2 and abs(meter.lags.total - 0.2) < 1e-9

    asyncio.run(run())
