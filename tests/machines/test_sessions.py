"""Exactly once: retries, watermark, bounds, expiry and the sweep (acceptance rows 52–54)."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest

from raftkv.machines import sessions
from raftkv.machines.kv import APPEND, CAS, CAS_CURRENT_BYTES_MAX, DELETE, MAP_TIME, PUT, KvMachine
from raftkv.machines.rows import (
    KIND_SESSION,
    SWEEP_CURSOR_KEY,
    Incarnation,
    meta_key,
    pack_meta,
    shard_prefix,
    unpack_meta,
)
from raftkv.machines.sessions import (
    SESSION_REPLIES_MAX,
    SESSION_REPLY_BYTES_MAX,
    Session,
    SessionTable,
)
from raftkv.machines.slots import shard_of
from raftkv.storage.engine import Overlay
from tests.machines.support import Client, DictEngine, Replica, kv_replica, map_time_command

HOUR_MS = 3_600_000
KEY = b"k"
SHARD = shard_of(KEY, 10)

ACKNOWLEDGED = [9, "its reply was acknowledged before"]
TOO_OLD = [9, "first sent longer ago than a session lives"]


def value_of(replica: Replica[KvMachine], key: bytes = KEY) -> bytes | None:
    return replica.machine.get(replica.engine, shard_of(key, 10), key)[0]


def session_rows(replica: Replica[KvMachine]) -> dict[bytes, bytes]:
    prefixes = tuple(shard_prefix(shard, Incarnation(1, 0)) + KIND_SESSION for shard in range(10))
    return {key: row for key, row in replica.engine.rows.items() if key.startswith(prefixes)}


# ---- retries


@pytest.mark.parametrize("reload_between", [False, True])
def test_a_retry_applies_once(reload_between: bool) -> None:
    """Row 52: the retry may come in a later entry, from another leader, after a restart."""
    replica, client = kv_replica(), Client(1)
    command = client.command(APPEND, KEY, b"x")
    assert replica.run(command, command) == [[0, 1], [0, 1]]
    for _ in range(3):
        if reload_between:
            replica.machine.load(replica.engine)
        assert replica.run_one(command) == [0, 1]
    assert value_of(replica) == b"x"


def test_every_final_reply_is_given_again() -> None:
    replica, client = kv_replica(), Client(1)
    commands = [
        client.command(PUT, KEY, b"a", 0, first_unacked=1),
        client.command(PUT, KEY, b"b", 0, first_unacked=1),
        client.command(CAS, KEY, b"x", b"c", first_unacked=1),
        client.command(CAS, b"{k}other", b"x", b"c", first_unacked=1),
        client.command(DELETE, KEY, first_unacked=1),
        client.command(DELETE, KEY, first_unacked=1),
        client.command(APPEND, KEY, b"d", first_unacked=1),
    ]
    first = [replica.run_one(command) for command in commands]
    assert first == [[0, 1], [13, 1], [12, b"a", 1], [12, None, 0], [0, True, 2], [0, False, 2], [0, 3]]
    rows = dict(replica.engine.rows)
    assert replica.run(*reversed(commands)) == first[::-1]
    replica.machine.load(replica.engine)
    assert replica.run(*commands) == first
    assert replica.engine.rows == rows


def test_a_retry_of_an_acknowledged_request_is_refused() -> None:
    """Row 53: refused, not applied again, and nothing is said of its outcome."""
    replica, client = kv_replica(), Client(1)
    first = client.command(APPEND, KEY, b"1")
    second = client.command(APPEND, KEY, b"2")
    assert replica.run(first, second) == [[0, 1], [0, 2]]
    rows = dict(replica.engine.rows)
    assert replica.run_one(first) == ACKNOWLEDGED
    replica.machine.load(replica.engine)
    assert replica.run_one(first) == ACKNOWLEDGED
    assert value_of(replica) == b"12"
    assert replica.engine.rows == rows


def test_an_acknowledged_seq_that_never_arrived_is_refused_too() -> None:
    replica, client = kv_replica(), Client(1)
    late = client.command(APPEND, KEY, b"late")
    assert replica.run_one(client.command(APPEND, KEY, b"2"))[0] == 0
    assert replica.run_one(late) == ACKNOWLEDGED


def test_several_in_flight_in_any_order_of_arrival() -> None:
    replica, client = kv_replica(), Client(1)
    commands = [client.command(APPEND, KEY, b"%d" % seq, first_unacked=1) for seq in range(1, 6)]
    order = [4, 0, 3, 1, 2]
    replies = {i: replica.run_one(commands[i]) for i in order}
    assert value_of(replica) == b"51423"
    assert {i: replica.run_one(commands[i]) for i in range(5)} == replies
    acknowledges_three = client.command(APPEND, KEY, b"6", first_unacked=4)
    replica.run(acknowledges_three)
    assert [replica.run_one(command)[0] for command in commands] == [9, 9, 9, 0, 0]
    (row,) = session_rows(replica).values()
    assert sorted(Session.decode(row).replies) == [4, 5, 6]


def test_seqs_are_counted_per_client_and_shard() -> None:
    replica = kv_replica()
    other_key = next(b"%d" % n for n in range(100) if shard_of(b"%d" % n, 10) != SHARD)
    one, two = Client(1), Client(2)
    for client in (one, two):
        for key in (KEY, other_key):
            assert replica.run_one(client.command(APPEND, key, b"x", seq=1))[0] == 0
    assert value_of(replica) == value_of(replica, other_key) == b"xx"
    assert len(session_rows(replica)) == 4


@pytest.mark.parametrize("refusal", ["too large", "wrong group"])
def test_other_refusals_leave_the_seq_open(refusal: str) -> None:
    replica, client = (kv_replica() if refusal == "too large" else Replica(KvMachine(1))), Client(1)
    if refusal == "too large":
        replica.run(Client(2).command(PUT, KEY, b"v" * (1024 * 1024), None))
    command = client.command(APPEND, KEY, b"x")
    assert replica.run_one(command)[0] == (7 if refusal == "too large" else 2)
    if refusal == "too large":
        replica.run(Client(2).command(PUT, KEY, b"v", None, seq=2))
    else:
        replica.run_one([32, kv_replica().machine.config.encode()])  # type: ignore[union-attr]
    assert replica.run_one(command)[0] == 0


# ---- bounds


def test_replies_are_bounded_in_count_then_busy() -> None:
    replica, client = kv_replica(), Client(1)
    for _ in range(SESSION_REPLIES_MAX):
        assert replica.run_one(client.command(APPEND, KEY, b"x", first_unacked=1))[0] == 0
    rows = dict(replica.engine.rows)
    refused = client.command(APPEND, KEY, b"y", first_unacked=1)
    for _ in range(2):
        assert replica.run_one(refused)[0] == 6
        replica.machine.load(replica.engine)
    assert replica.engine.rows == rows, "Busy isn't recorded"
    assert replica.run_one(client.command(APPEND, KEY, b"x", seq=7, first_unacked=1)) == [0, 7], "known ones answer"
    acknowledging = [*refused[:4], 2, *refused[5:]]
    assert replica.run_one(acknowledging) == [0, SESSION_REPLIES_MAX + 1], "the seq was left open"
    (row,) = session_rows(replica).values()
    assert len(Session.decode(row).replies) == SESSION_REPLIES_MAX


def test_replies_are_bounded_in_bytes_then_busy() -> None:
    replica, client = kv_replica(), Client(1)
    replica.run(Client(2).command(PUT, KEY, b"v" * CAS_CURRENT_BYTES_MAX, None))
    codes = [
        replica.run_one(client.command(CAS, KEY, b"", b"", first_unacked=1))[0] for _ in range(SESSION_REPLIES_MAX)
    ]
    assert 0 < codes.count(6) < len(codes)
    assert codes == sorted(codes, reverse=True), "mismatches, then Busy for all that follow"
    longest_reply = 200
    assert all(len(row) <= 17 + SESSION_REPLY_BYTES_MAX + longest_reply for row in session_rows(replica).values())
    seq = codes.count(12) + 1
    assert replica.run_one(client.command(CAS, KEY, b"", b"", seq=seq, first_unacked=2))[0] == 12


def test_engine_bytes_per_client() -> None:
    """At most 300 bytes a client, whatever its last reply was; readers leave nothing."""
    replica = kv_replica()
    replica.run(Client(0).command(PUT, KEY, b"v" * CAS_CURRENT_BYTES_MAX, None))
    clients = 1000
    for number in range(1, clients + 1):
        client = Client(number, stamp_ms=2**40)
        for _ in range(3):
            replica.run(
                client.command(APPEND, b"{k}2", b"x"),
                client.command(CAS, KEY, b"no", b"", seq=2**40 + number, first_unacked=2**40 + number),
            )
        for _ in range(3):
            replica.machine.get(replica.engine, SHARD, KEY)
            replica.machine.scan(replica.engine, SHARD, b"", None, 10, 1000)
    rows = session_rows(replica)
    assert len(rows) == clients + 1
    sizes = [len(key) + len(row) for key, row in rows.items()]
    assert max(sizes) <= 200
    assert min(sizes) == 32 + 17 + 21


def test_large_values_leave_nothing_in_the_sessions() -> None:
    """The course's MemGet, MemPut and MemAppend: no value is kept beside the key's own row."""
    replica, value = kv_replica(), b"v" * 2**20
    for number in range(1, 6):
        client = Client(number)
        commands = [
            client.command(PUT, KEY, value, None, first_unacked=1),
            client.command(CAS, KEY, b"", value, first_unacked=1),
            client.command(CAS, KEY, value, value, first_unacked=1),
            client.command(APPEND, KEY, b"x", first_unacked=1),
        ]
        assert [replica.run_one(command)[0] for command in commands] == [0, 12, 0, 7]
        assert [replica.run_one(command)[0] for command in commands] == [0, 12, 0, 7]
    assert sum(map(len, session_rows(replica).values())) <= 5 * 100


@pytest.mark.long
def test_memory_per_client() -> None:
    """100,000 clients with one put each: the process grows by ≤ 300 bytes a client and shard, engine in
    memory included; 1 MiB values leave nothing behind in the sessions."""
    replica = kv_replica()
    big = Client(2**30)
    for _ in range(4):
        assert replica.run_one(big.command(PUT, KEY, b"v" * 2**20, None))[0] == 0
    warm = 20_000
    for number in range(warm):
        replica.run(Client(number).command(PUT, KEY, b"v" * 1000, None))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    clients = 100_000
    for number in range(warm, warm + clients):
        replica.run(Client(number).command(PUT, KEY, b"v" * 1000, None))
    after, _ = tracemalloc.get_traced_memory()
    for _ in range(clients):
        replica.machine.get(replica.engine, SHARD, KEY)
    read, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / clients <= 300
    assert (read - after) / clients < 10


def test_the_cache_is_bounded_and_never_changes_an_answer() -> None:
    plain, tiny = kv_replica(), kv_replica(cache_weight=1)
    clients = [Client(number) for number in range(40)]
    for turn in range(6):
        commands = [client.command(APPEND, KEY, b"%d" % turn) for client in clients]
        commands += commands[::3]
        assert plain.run(*commands) == tiny.run(*commands)
    assert plain.engine.rows == tiny.engine.rows
    table = SessionTable(10)
    view = Overlay(DictEngine())
    for number in range(1000):
        table.find(view, b"%d" % number)
        assert table.cached_rows <= 20


def test_the_cache_counts_replies_too() -> None:
    full = Session()
    for seq in range(1, 201):
        full.record(seq, 1, 0, [0, seq])
    rows = {b"%d" % number: full.encode() for number in range(100)}
    table, view = SessionTable(1000), Overlay(DictEngine(rows))
    for key in rows:
        table.find(view, key)
        assert table.cached_rows <= 10


# ---- expiry


def test_a_request_older_than_the_lifetime_is_refused() -> None:
    replica, client = kv_replica(), Client(1)
    replica.run(map_time_command(2 * HOUR_MS))
    assert replica.run_one(client.command(APPEND, KEY, b"x", stamp_ms=HOUR_MS - 1)) == TOO_OLD
    assert not session_rows(replica), "nothing is recorded"
    assert replica.run_one(client.command(APPEND, KEY, b"x", seq=1, stamp_ms=HOUR_MS)) == [0, 1]


def test_an_evicted_session_is_not_taken_for_a_new_client() -> None:
    """Row 54: after the row is gone the retry is rejected, never applied blindly."""
    replica, client = kv_replica(), Client(1)
    command = client.command(APPEND, KEY, b"x", stamp_ms=5)
    assert replica.run_one(command) == [0, 1]
    replica.run(map_time_command(HOUR_MS + 5))
    assert replica.run_one(command) == [0, 1], "at the horizon the session is still there"
    replica.run(map_time_command(HOUR_MS + 6))
    assert not session_rows(replica)
    assert replica.run_one(command) == TOO_OLD
    replica.machine.load(replica.engine)
    assert replica.run_one(command) == TOO_OLD
    assert value_of(replica) == b"x"
    assert replica.run_one(client.command(APPEND, KEY, b"y", stamp_ms=HOUR_MS)) == [0, 2], "it may go on"
    assert replica.run_one(command) == TOO_OLD


def test_a_row_lives_by_its_highest_stamp() -> None:
    """An old retry, arriving last, must not shorten the life of what came before it."""
    replica, client = kv_replica(), Client(1)
    old = client.command(APPEND, KEY, b"1", first_unacked=1, stamp_ms=5)
    young = client.command(APPEND, KEY, b"2", first_unacked=1, stamp_ms=1000)
    replica.run(young, old)
    replica.run(map_time_command(HOUR_MS + 500))
    assert len(session_rows(replica)) == 1
    assert replica.run_one(young) == [0, 1]
    assert replica.run_one(old) == TOO_OLD


def test_lifetime_is_configurable() -> None:
    replica = kv_replica(session_lifetime_ms=100)
    replica.run(map_time_command(200))
    assert replica.run_one(Client(1).command(APPEND, KEY, b"x", stamp_ms=99)) == TOO_OLD
    assert replica.run_one(Client(1).command(APPEND, KEY, b"x", stamp_ms=100)) == [0, 1]


def test_a_shard_that_began_again_refuses_older_stamps() -> None:
    """The floor in the meta row, written by hand: drains come later."""
    replica = kv_replica()
    row = replica.engine.rows[meta_key(SHARD)]
    replica.engine.rows[meta_key(SHARD)] = pack_meta(unpack_meta(row)._replace(stamp_floor_ms=70))
    replica.machine.load(replica.engine)
    assert replica.run_one(Client(1).command(APPEND, KEY, b"x", stamp_ms=69)) == TOO_OLD
    assert replica.run_one(Client(1).command(APPEND, KEY, b"x", stamp_ms=70)) == [0, 1]


# ---- the sweep


def test_the_sweep_is_bounded_and_goes_on_from_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.SessionTable.sweep, "__defaults__", (7,))
    replica, twin = kv_replica(), kv_replica()
    clients = [Client(number) for number in range(60)]
    for number, client in enumerate(clients):
        stamp_ms = 10 if number % 3 else 2 * HOUR_MS
        command = client.command(APPEND, b"%d" % number, b"x", stamp_ms=stamp_ms)
        replica.run(command)
        twin.run(command)
    kept = {key: row for key, row in session_rows(replica).items() if Session.decode(row).highest_stamp_ms > 10}
    assert len(kept) == 20
    entries = 0
    while True:
        before = len(session_rows(replica))
        result = replica.run_one([MAP_TIME, HOUR_MS + 11])
        twin.machine.load(twin.engine)
        assert twin.run_one([MAP_TIME, HOUR_MS + 11]) == result
        assert twin.engine.rows == replica.engine.rows
        assert twin.machine.sweep_pending == replica.machine.sweep_pending
        entries += 1
        assert before - len(session_rows(replica)) <= 7
        assert replica.machine.sweep_pending == (SWEEP_CURSOR_KEY in replica.engine.rows)
        if not replica.machine.sweep_pending:
            break
    assert entries == 9, "60 rows, 7 at a time"
    assert session_rows(replica) == kept
    for number, client in enumerate(clients):
        retry = client.command(APPEND, b"%d" % number, b"x", seq=1, stamp_ms=10)
        assert replica.run_one(retry) == TOO_OLD, "whether its row is there or gone"


def test_the_sweep_sees_what_its_own_entry_did() -> None:
    replica, client = kv_replica(), Client(1)
    command = client.command(APPEND, KEY, b"x", stamp_ms=5)
    results = replica.run(command, map_time_command(HOUR_MS + 6), command)
    assert results == [[0, 1], [0, HOUR_MS + 6], TOO_OLD]
    assert not session_rows(replica)
    renewed = client.command(APPEND, KEY, b"y", stamp_ms=HOUR_MS + 6)
    assert replica.run(map_time_command(0), renewed, map_time_command(0), renewed)[1::2] == [[0, 2], [0, 2]]
    assert len(session_rows(replica)) == 1


@pytest.mark.parametrize("others", range(12))
def test_a_swept_session_is_forgotten_by_the_cache(others: int) -> None:
    """Wherever it was cached: a client that comes back leaves the row that any new client would."""
    replica, client = kv_replica(cache_weight=4), Client(1)
    replica.run(client.command(APPEND, KEY, b"x", stamp_ms=5))
    for number in range(others):
        replica.run(Client(100 + number).command(APPEND, KEY, b"y", stamp_ms=HOUR_MS))
    replica.run(map_time_command(HOUR_MS + 6))
    replica.run(client.command(APPEND, KEY, b"z", first_unacked=1, stamp_ms=HOUR_MS))
    (row,) = [row for key, row in session_rows(replica).items() if client.client_id in key]
    assert list(Session.decode(row).replies) == [2]


def test_a_reply_is_stored_as_msgpack_whatever_its_shape() -> None:
    for result in ([0, 2**63], [0, 0], [0, True, 5], [12, None, 0], [12, b"v" * 128, 9], [13, 7]):
        session = Session()
        session.record(1, 1, 0, result)
        (reply,) = session.replies.values()
        assert msgpack.unpackb(reply[10:]) == result
        assert Session.decode(session.encode()).recall(1, 1, 0, 0) == result
