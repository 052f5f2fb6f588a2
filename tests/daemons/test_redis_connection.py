"""A Redis connection on a replica: order, what waits for a quorum, what becomes of refusals, back-pressure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest

from raftkv.machines.kv import PUT
from raftkv.machines.txn_commands import TXN_PREPARE, make_txid
from raftkv.protocol.errors import Busy, Locked, OutcomeUnknown, Timeout
from raftkv.protocol.limits import WRITE_HIGH_WATER_BYTES
from raftkv.raft.messages import RequestVote
from tests.daemons.redis_rig import RedisRig, many

Script = Callable[[RedisRig], Awaitable[None]]


def on_a_leader(script: Script) -> None:
    async def run() -> None:
        await script(await RedisRig().start())

    asyncio.run(run())


def test_a_write_is_answered_when_a_majority_has_it() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        connection.data_received(many("SET a 1"))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert transport.sent == b""
        await rig.rig.commit_all()
        assert transport.sent == b"+OK\r\n"

    on_a_leader(script)


def test_a_read_is_answered_when_a_majority_confirms_the_leader() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        for commands, answer in (("GET a", b"$-1\r\n"), ("EXISTS a b", b":0\r\n"), ("SETNX a 1", b":1\r\n")):
            connection.data_received(many(commands))
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert transport.sent == b"", commands
            await rig.rig.commit_all()
            assert transport.drain() == answer
        connection.data_received(many("SETNX a 2"))  # it writes nothing, and so is a read
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert transport.sent == b""
        await rig.rig.commit_all()
        assert transport.drain() == b":0\r\n"

    on_a_leader(script)


def test_a_pipeline_sees_its_own_writes_and_not_later_ones() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        connection.data_received(many("SET a 1", "SET b 2", "GET a", "GET b", "SET a 3", "INCR a", "GET a", "PING"))
        for _ in range(8):
            await rig.rig.commit_all()
        assert transport.sent == b"+OK\r\n+OK\r\n$1\r\n1\r\n$1\r\n2\r\n+OK\r\n:4\r\n$1\r\n4\r\n+PONG\r\n"

    on_a_leader(script)


def test_the_replies_of_a_run_leave_in_one_write() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        connection.data_received(many(*(f"SET k{number} v" for number in range(50)), *["PING"] * 10))
        await rig.rig.commit_all()
        assert transport.out == [b"+OK\r\n" * 50 + b"+PONG\r\n" * 10]

    on_a_leader(script)


def test_a_session_row_keeps_one_reply_however_many_writes_are_under_way() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        for _ in range(3):
            connection.data_received(many(*(f"SET k{number} v" for number in range(1000))))
            await rig.rig.commit_all()
        await rig.rig.until(lambda: transport.sent == b"+OK\r\n" * 3000)
        assert rig.rig.replica.machine.sessions_in_memory == 1  # type: ignore[attr-defined]
        rows = [row for key, row in rig.rig.store.engine.scan(b"", b"\xff" * 8) if key.endswith(client_id(rig))]
        assert len(rows) == 1 and len(rows[0]) < 100

    on_a_leader(script)


def client_id(rig: RedisRig) -> bytes:
    return rig.listener.direct._client_id


def step_down(rig: RedisRig) -> None:
    """Another one is a candidate of a later term, and has all that this one has."""
    raft = rig.rig.replica.raft
    rig.rig.replica.step(RequestVote(raft.term + 5, 1, raft.last_index + 5, raft.term, False, True))


def test_what_is_in_the_log_of_a_deposed_leader_is_unknown() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        connection.data_received(many("SET a 1", "SET b 2", "PING"))
        await asyncio.sleep(0.01)
        step_down(rig)
        await rig.rig.until(lambda: bool(transport.sent))
        lines = transport.sent.split(b"\r\n")
        assert lines[0].startswith(b"-ERR outcome unknown") and lines[1].startswith(b"-ERR outcome unknown")
        assert lines[2] == b"+PONG" and rig.listener.forward.waiting == []

    on_a_leader(script)


def test_what_a_deposed_leader_never_logged_goes_elsewhere() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        step_down(rig)
        await rig.rig.until(lambda: not rig.rig.replica.is_leader)
        connection.data_received(many("SET a 1", "SET b 2", "GET a"))
        forward = rig.listener.forward
        assert forward.answer(b"one") == [b"SET", b"a", b"1"]
        assert forward.answer(OutcomeUnknown("x")) == [b"SET", b"b", b"2"]
        assert forward.answer(Timeout("x")) == [b"GET", b"a"]
        lines = transport.sent.split(b"\r\n")
        assert lines[:2] == [b"$3", b"one"]
        assert lines[2].startswith(b"-ERR outcome unknown") and lines[3].startswith(b"-CLUSTERDOWN")

    on_a_leader(script)


async def lock(rig: RedisRig, key: bytes) -> None:
    """A transaction over several groups has prepared a write of the key."""
    command = [TXN_PREPARE, make_txid(1 << 40, b"x" * 8), 1, 1, [[0, [], [[key, b"theirs"]]]]]
    rig.rig.submit_raw(command, "prepared")
    await rig.rig.commit_all()
    assert rig.rig.answers[-1] == ("prepared", [0, 1])


def test_what_a_transaction_holds_goes_elsewhere_in_the_order_of_each_key() -> None:
    async def script(rig: RedisRig) -> None:
        await lock(rig, b"held")
        connection, transport = rig.connect()
        connection.data_received(many("SET a 1", "SET held 2", "SET b 3", "SET held 4", "PING"))
        await rig.rig.commit_all()
        forward = rig.listener.forward
        assert transport.sent == b""
        assert len(forward.waiting) == 1  # one after the other
        assert forward.answer(1) == [b"SET", b"held", b"2"]
        assert forward.answer(Locked(b"t" * 16)) == [b"SET", b"held", b"4"]
        lines = transport.sent.split(b"\r\n")
        assert lines[:3] == [b"+OK", b":1", b"+OK"] and lines[3].startswith(b"-TRYAGAIN") and lines[4] == b"+PONG"

    on_a_leader(script)


def test_what_was_overtaken_on_its_key_is_not_done_any_more() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        connection._queue.extend([[b"SET", b"k", b"1"], [b"SET", b"other", b"2"], [b"SET", b"k", b"3"]])
        connection._start(3)
        locked = Locked(b"t" * 16).to_result()
        for number, result in enumerate([locked, locked, [0, 9]]):
            connection._wrote(number, result)
        assert rig.listener.forward.answer(5) == [b"SET", b"other", b"2"]
        lines = transport.sent.split(b"\r\n")
        assert lines[0].startswith(b"-TRYAGAIN") and lines[1:3] == [b":5", b"+OK"]

    on_a_leader(script)


def test_a_read_of_a_locked_key_waits_elsewhere_and_the_rest_goes_on() -> None:
    async def script(rig: RedisRig) -> None:
        await lock(rig, b"held")
        connection, transport = rig.connect()
        connection.data_received(many("GET a", "GET held", "GET b"))
        await rig.rig.commit_all()
        assert transport.sent == b"$-1\r\n"
        assert rig.listener.forward.answer(b"theirs") == [b"GET", b"held"]
        await rig.rig.commit_all()
        assert transport.sent == b"$-1\r\n$6\r\ntheirs\r\n$-1\r\n"

    on_a_leader(script)


def test_who_waits_for_a_lock_is_not_overtaken() -> None:
    async def script(rig: RedisRig) -> None:
        rig.listener.role.waited_for.add(b"queued")
        connection, _ = rig.connect()
        connection.data_received(many("SET queued 1"))
        assert rig.listener.forward.answer(1) == [b"SET", b"queued", b"1"]

    on_a_leader(script)


def test_two_connections_change_one_key_with_one_write() -> None:
    async def script(rig: RedisRig) -> None:
        pairs = [rig.connect() for _ in range(20)]
        before = rig.rig.replica.raft.last_index
        for connection, _ in pairs:
            connection.data_received(many("INCR n", "INCR n"))
        for _ in range(8):
            await rig.rig.commit_all()
        answers = sorted(int(line[1:]) for _, transport in pairs for line in transport.sent.split(b"\r\n") if line)
        assert answers == list(range(1, 41))
        assert rig.rig.replica.raft.last_index - before <= 4

    on_a_leader(script)


def test_a_change_that_others_overtake_is_made_again_on_what_they_wrote() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        native = [PUT, 0, b"n" * 16, 1, 1, 1 << 40, b"n", b"41", None]
        rig.rig.submit_raw(native, "native")
        connection.data_received(many("INCR n"))  # reads before that is applied
        for _ in range(4):
            await rig.rig.commit_all()
        assert transport.sent == b":42\r\n"

    on_a_leader(script)


def test_a_watched_key_that_changes_stops_exec() -> None:
    async def script(rig: RedisRig) -> None:
        one, one_out = rig.connect()
        other, _ = rig.connect()
        for number, expected in enumerate([b"*-1\r\n", b"*2\r\n:6\r\n$1\r\n6\r\n"]):
            one.data_received(many("SET w 5", "WATCH w"))
            for _ in range(4):
                await rig.rig.commit_all()
            if number == 0:
                other.data_received(many("SET w 5"))
                await rig.rig.commit_all()
            one_out.drain()
            one.data_received(many("MULTI", "INCR w", "GET w", "EXEC"))
            for _ in range(4):
                await rig.rig.commit_all()
            assert one_out.drain() == b"+OK\r\n+QUEUED\r\n+QUEUED\r\n" + expected

    on_a_leader(script)


def test_a_busy_log_is_said_so() -> None:
    async def script(rig: RedisRig) -> None:
        def busy(raw: bytes, command: Any, deliver: Any, token: Any) -> None:
            deliver(token, Busy("too many commands wait for the log"))

        rig.rig.replica.submit = busy  # type: ignore[method-assign]
        connection, transport = rig.connect()
        connection.data_received(many("SET a 1", "PING"))
        assert transport.sent.startswith(b"-BUSY ") and transport.sent.endswith(b"+PONG\r\n")

    on_a_leader(script)


def test_who_does_not_read_is_neither_answered_nor_read_from() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        connection.data_received(many("SET big x"))
        await rig.rig.commit_all()
        rig.rig.submit_raw([PUT, 0, b"n" * 16, 1, 1, 1 << 40, b"big", b"x" * 500_000, None], "native")
        await rig.rig.commit_all()
        transport.drain()
        connection.data_received(many(*["GET big"] * 40))
        for _ in range(10):
            await rig.rig.commit_all()
        assert len(transport.sent) < WRITE_HIGH_WATER_BYTES + 2 * 500_100
        assert not transport.reading
        received = 0
        for _ in range(60):
            received += len(transport.drain())
            await rig.rig.commit_all()
        assert received == 40 * len(b"$500000\r\n" + b"x" * 500_000 + b"\r\n")
        assert transport.reading

    on_a_leader(script)


def test_many_commands_that_wait_stop_the_reading() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        connection.data_received(many(*["SET a 1"] * 3000))
        assert not transport.reading
        for _ in range(6):
            await rig.rig.commit_all()
        assert transport.sent == b"+OK\r\n" * 3000
        assert connection._transport is transport and transport.reading

    on_a_leader(script)


def test_bytes_of_unfinished_requests_are_bounded_for_all_together() -> None:
    async def script(rig: RedisRig) -> None:
        rig.listener.held_bytes_max = 1000
        one, one_out = rig.connect()
        other, other_out = rig.connect()
        one.data_received(b"*1\r\n$900\r\n" + b"x" * 700)
        other.data_received(b"*1\r\n$900\r\n" + b"x" * 700)
        closed = [one_out.closed, other_out.closed]
        assert closed == [False, True]
        assert b"-ERR too many bytes" in other_out.sent
        one.data_received(b"x" * 200 + b"\r\n")
        assert b"unknown command" in one_out.sent
        other.connection_lost(None)
        one.connection_lost(None)
        assert rig.listener.held_bytes == 0

    on_a_leader(script)


def test_what_came_before_the_end_is_answered() -> None:
    async def script(rig: RedisRig) -> None:
        connection, transport = rig.connect()
        connection.data_received(many("SET a 1", "GET a"))
        assert connection.eof_received()
        for _ in range(4):
            await rig.rig.commit_all()
        assert transport.sent == b"+OK\r\n$1\r\n1\r\n" and transport.closed

    on_a_leader(script)


def test_answers_to_a_connection_that_is_gone_are_dropped() -> None:
    async def script(rig: RedisRig) -> None:
        for commands in ("SET a 1", "GET a", "INCR a", "DEL a b", "WATCH a"):
            connection, transport = rig.connect()
            connection.data_received(many(commands))
            connection.connection_lost(None)
            for _ in range(3):
                await rig.rig.commit_all()
            assert transport.sent == b""

    on_a_leader(script)


@pytest.mark.parametrize("command", ["MSET a 1 b 2", "DEL a b", "MSETNX a 1 b 2", "UNLINK a b c"])
def test_several_keys_are_written_by_one_entry(command: str) -> None:
    async def script(rig: RedisRig) -> None:
        connection, _ = rig.connect()
        connection.data_received(many("MSET b 0 c 0") if command[0] in "DU" else b"")
        await rig.rig.commit_all()
        before = rig.rig.replica.raft.last_index
        connection.data_received(many(command))
        await rig.rig.commit_all()
        assert rig.rig.replica.raft.last_index == before + 1
        assert rig.listener.role.commits[-1][0] == 0

    on_a_leader(script)


def test_the_commands_are_what_the_followers_decode() -> None:
    async def script(rig: RedisRig) -> None:
        seen: list[Any] = []
        submit = rig.rig.replica.submit

        def watched(raw: bytes, command: Any, deliver: Any, token: Any) -> None:
            seen.append((msgpack.unpackb(raw), command))
            submit(raw, command, deliver, token)

        rig.rig.replica.submit = watched  # type: ignore[method-assign]
        connection, _ = rig.connect()
        connection.data_received(many("SET a 1", "DEL a", "MSET a 1 b 2", "INCR a"))
        for _ in range(4):
            await rig.rig.commit_all()
        assert len(seen) == 4 and all(decoded == command for decoded, command in seen)

    on_a_leader(script)
