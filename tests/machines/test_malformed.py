"""Hostile commands: refused before the log; in the log they get an answer and hurt nobody."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.machines import coordinator as coord
from raftkv.machines import moves as op
from raftkv.machines.controller import JOIN, LEAVE, MOVE, REGISTER
from raftkv.machines.coordinator import CoordinatorMachine
from raftkv.machines.kv import APPEND, CAS, CONFIG, DELETE, MAP_TIME, PUT
from raftkv.machines.machine import decode_command
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import (
    TXN_BEAT,
    TXN_COMMIT,
    TXN_DECIDE,
    TXN_LOCK,
    TXN_PREPARE,
    TXN_RESOLVE,
    make_txid,
    refuse_txn_shape,
)
from raftkv.protocol import errors
from raftkv.raft.entry import Entry, EntryKind
from tests.machines.streams import junk, spoil
from tests.machines.support import Client, Controllers, Replica, kv_replica


def good_kv_commands(client: Client) -> list[list[Any]]:
    return [
        client.command(PUT, b"k", b"v", None),
        client.command(PUT, b"k", b"v", 3),
        client.command(APPEND, b"k", b"v"),
        client.command(DELETE, b"k"),
        client.command(CAS, b"k", b"v", b"w"),
        [MAP_TIME, 77],
        [CONFIG, b"\x93\x01"],
        [op.IMPORT_START, 3, 1, 1, 2, 70],
        [op.IMPORT_CHUNK, 3, 1, 1, 70, 0, [[b"kx", bytes(10)], [b"ky", None]], b"ky", 71],
        [op.IMPORT_ASK, 3, 1, 1, 70],
        [op.IMPORT_INSTALL, 3, 1, 1, 70, 2, [], 5, 4, 0, 90],
        [op.IMPORT_DROP, 3, 1, 1, 70],
        [op.IMPORT_RELEASED, 3, 1],
        [op.EXPORT_LIST, 3, 2, 1, 1],
        [op.EXPORT_ASK, 3, 2, 1, 1, 70, 71],
        [op.EXPORT_RELEASE, 3, 2, 1],
        *good_txn_commands(),
    ]


TXID = make_txid(5, b"entropy8")
K_SHARD = shard_of(b"k", 10)


def good_txn_commands() -> list[list[Any]]:
    part = [K_SHARD, [[b"k", 0]], [[b"k", b"v"]]]
    return [
        [TXN_COMMIT, TXID, [part]],
        [TXN_PREPARE, TXID, 1, 3, [part, [(K_SHARD + 1) % 10, [], []]]],
        [TXN_DECIDE, TXID, True, [K_SHARD]],
        [TXN_DECIDE, TXID, False, [0, K_SHARD + 1]],
        [TXN_RESOLVE, 1, 3],
        [TXN_LOCK, TXID, TXID, K_SHARD, [b"k"]],
        [TXN_BEAT, TXID, [K_SHARD]],
    ]


def good_coordinator_commands() -> list[list[Any]]:
    return [
        [coord.BEGIN, TXID, b"d" * 16, [1, 2]],
        [coord.DECIDE, TXID, True],
        [coord.FENCE, TXID, [1, 2]],
        [coord.FENCE, TXID, []],
        [coord.SETTLE, TXID, False],
        [coord.END, [TXID]],
        [coord.MAP_TIME, 77],
        [coord.TAKE_OVER],
    ]


def good_controller_commands(client: Client) -> list[list[Any]]:
    return [
        client.command(JOIN, [[7, ["h:1"]], [8, ["h:2", "h:3"]]], shard=-1),
        client.command(LEAVE, [1], shard=-1),
        client.command(MOVE, 3, 2, shard=-1),
        client.command(REGISTER, 1, ["t:1", "t:2"], shard=-1),
        [64, bytes(16), 10],
    ]


def check_refusal(replica: Replica[Any], command: Any) -> None:
    """Whatever it is: no exception but a typed one, one answer, and the two places agree."""
    rows = dict(replica.engine.rows)
    try:
        replica.machine.validate(command)
        refusal = None
    except errors.RaftKVError as error:
        assert isinstance(error, (errors.BadRequest, errors.TooLarge))
        refusal = error.to_result()
    (result,) = replica.run(command)
    assert type(result) is list
    assert type(result[0]) is int
    if refusal is None:
        assert result[0] != 8 or "did not give shard" in result[1], (command, result)
    elif refusal[1] != "clients may not send this command":
        assert result == refusal
        assert replica.engine.rows == rows


@pytest.mark.parametrize("seed", range(6))
def test_spoiled_commands(seed: int) -> None:
    rng = random.Random(seed)
    controllers = Controllers()
    controllers.join(1, 2)
    for replica, good in ((kv_replica(), good_kv_commands), (controllers, good_controller_commands)):
        client = Client(5)
        for _ in range(150):
            for command in good(client):
                check_refusal(replica, spoil(rng, command))


@pytest.mark.parametrize("seed", range(6))
def test_spoiled_commands_of_coordinators(seed: int) -> None:
    """Only the leader makes them; whatever is in the log is answered all the same, and only what is right counts."""
    rng = random.Random(seed)
    replica = Replica(CoordinatorMachine())
    for _ in range(300):
        for good in good_coordinator_commands():
            rows, command = dict(replica.engine.rows), spoil(rng, good)
            (result,) = replica.run(command)
            assert type(result) is list and type(result[0]) is int
            assert result[0] in (0, 9) or replica.engine.rows == rows, command


@pytest.mark.parametrize("command", good_txn_commands())
def test_good_transactions_pass_the_shape(command: list[Any]) -> None:
    """What is refused beside them is refused for what is spoiled."""
    assert refuse_txn_shape(command, 10) is None
    assert kv_replica().run_one(command)[0] in (0, 5)


@pytest.mark.parametrize("seed", range(3))
def test_junk(seed: int) -> None:
    rng = random.Random(seed)
    for replica in (kv_replica(), Controllers()):
        for _ in range(400):
            check_refusal(replica, junk(rng))


@given(st.binary(max_size=80))
def test_any_bytes_as_a_clients_command(encoded: bytes) -> None:
    try:
        command = decode_command(encoded)
    except errors.BadRequest:
        return
    for replica in (REPLICA, CONTROLLERS):
        check_refusal(replica, command)


@given(st.binary(max_size=80))
def test_any_bytes_as_an_entry(data: bytes) -> None:
    for replica in (REPLICA, CONTROLLERS):
        results = replica.apply(Entry.make(1, 1, EntryKind.COMMANDS, 0, data))
        assert all(type(result) is list for result in results)


REPLICA = kv_replica()
CONTROLLERS = Controllers()


def test_neighbours_in_an_entry_are_not_hurt() -> None:
    rng = random.Random(1)
    alone, mixed, client = kv_replica(), kv_replica(), Client(1)
    for turn in range(100):
        good = [client.command(APPEND, b"k", b"%d" % turn), client.command(PUT, b"%d" % turn, b"v", None)]
        bad = [[PUT, junk(rng)], junk(rng), good[0][: rng.randrange(8)]]
        results = mixed.run(bad[0], good[0], bad[1], good[1], bad[2])
        assert results[1::2] == alone.run(*good)
    assert mixed.engine.rows == alone.engine.rows


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xc1",
        b"\x91",
        b"\x91\x01\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x01\xa2\xff\xff",
        b"\x91\x81\x01\x02",
        b"\x91\x81\x91\x01\x02",
        b"\x01",
        b"\xc4\x01x",
        b"\x80",
        b"\x91" * 2000 + b"\x01",
    ],
)
def test_bytes_that_are_no_command(encoded: bytes) -> None:
    with pytest.raises(errors.BadRequest):
        REPLICA.machine.validate(decode_command(encoded))


def test_deep_nesting_can_not_spoil_an_entry() -> None:
    """Just below the decoder's own limit a command decodes alone but not inside an entry's array."""
    for depth in range(500, 1100, 7):
        encoded = b"\x91" * depth + b"\x01"
        with pytest.raises(errors.BadRequest):
            REPLICA.machine.validate(decode_command(encoded))


def test_what_passes_decodes_inside_an_entry() -> None:
    rng = random.Random(2)
    client = Client(1)
    for _ in range(2000):
        command = spoil(rng, rng.choice(good_kv_commands(client)))
        encoded = msgpack.packb(command)
        try:
            REPLICA.machine.validate(decode_command(encoded))
        except errors.RaftKVError:
            continue
        assert REPLICA.machine.decode(b"\x91" + encoded) == [command]
