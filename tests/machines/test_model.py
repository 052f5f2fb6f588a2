"""Sequences of commands against a naive model: a dict, and sessions that remember everything."""

from __future__ import annotations

import random
from typing import Any

import pytest

from raftkv.machines.kv import APPEND, CAS, DELETE, PUT, KvMachine
from raftkv.machines.sessions import Session
from raftkv.machines.slots import shard_of
from tests.machines.support import Client, Replica, kv_replica

SHARDS = 10
KEYS = [b"%d" % number for number in range(12)] + [b"{1}x", b"{1}y"]


class Model:
    """What a single, immortal server without bounds would do."""

    def __init__(self) -> None:
        self.values: dict[bytes, tuple[bytes, int]] = {}
        self.revisions = [0] * SHARDS
        self.last_deletes = [0] * SHARDS
        self.replies: dict[tuple[int, bytes, int], list[Any]] = {}
        self.acknowledged: dict[tuple[int, bytes], int] = {}

    def answer(self, command: list[Any]) -> list[Any]:
        _, shard, client_id, seq, first_unacked, _ = command[:6]
        if seq < self.acknowledged.get((shard, client_id), 0):
            return [9]
        known = self.replies.get((shard, client_id, seq))
        if known is None:
            known = self.replies[shard, client_id, seq] = self.apply(shard, command[0], *command[6:])
            acknowledged = self.acknowledged.get((shard, client_id), 0)
            self.acknowledged[shard, client_id] = max(acknowledged, first_unacked)
        return known

    def apply(self, shard: int, op: int, key: bytes, *args: Any) -> list[Any]:
        value, version = self.values.get(key, (None, 0))
        if op == DELETE and value is None:
            return [0, False, self.last_deletes[shard]]
        if op == PUT and args[1] is not None and args[1] != version:
            return [13, version]
        if op == CAS and args[0] != value:
            return [12, value, version]
        revision = self.revisions[shard] = self.revisions[shard] + 1
        if op == DELETE:
            del self.values[key]
            self.last_deletes[shard] = revision
            return [0, True, revision]
        new = {PUT: lambda: args[0], CAS: lambda: args[1], APPEND: lambda: (value or b"") + args[0]}[op]()
        self.values[key] = (new, revision)
        return [0, revision]

    def get(self, key: bytes) -> tuple[bytes | None, int]:
        return self.values.get(key, (None, self.last_deletes[shard_of(key, SHARDS)]))


def random_command(rng: random.Random, client: Client, known: tuple[bytes | None, int], key: bytes) -> list[Any]:
    value, version = known
    op = rng.choice([PUT, APPEND, DELETE, CAS])
    new = rng.randbytes(rng.randrange(6))
    arguments: dict[int, list[Any]] = {
        PUT: [new, rng.choice([None, 0, version, version + 1])],
        APPEND: [new],
        DELETE: [],
        CAS: [rng.choice([value or b"", b"?"]), new],
    }
    command = client.command(op, key, *arguments[op])
    command[4] = max(1, command[3] - rng.randrange(6))
    return command


def check_reads(replica: Replica[KvMachine], model: Model) -> None:
    for key in KEYS:
        shard = shard_of(key, SHARDS)
        assert replica.machine.get(replica.engine, shard, key) == model.get(key)
    for shard in range(SHARDS):
        pairs: list[list[Any]] = []
        after, more = None, True
        while more:
            page, more = replica.machine.scan(replica.engine, shard, b"", after, 2, 10**6)
            pairs += page
            after = page[-1][0] if page else None
        expected = sorted([key, *pair] for key, pair in model.values.items() if shard_of(key, SHARDS) == shard)
        assert pairs == expected


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_the_model(seed: int) -> None:
    rng = random.Random(seed)
    replica, model = kv_replica(cache_weight=rng.choice([1, 8192])), Model()
    clients = [Client(number) for number in range(4)]
    sent: list[list[Any]] = []
    for _ in range(60):
        commands = []
        for _ in range(rng.randrange(1, 6)):
            if sent and rng.random() < 0.3:
                commands.append(rng.choice(sent[-20:]))
                continue
            key = rng.choice(KEYS)
            commands.append(random_command(rng, rng.choice(clients), model.get(key), key))
            sent.append(commands[-1])
        rng.shuffle(commands)
        expected = [model.answer(command) for command in commands]
        results = replica.run(*commands)
        for result, wanted in zip(results, expected, strict=True):
            assert result == wanted if wanted[0] != 9 else result[0] == 9
        if rng.random() < 0.1:
            replica.machine.load(replica.engine)
    check_reads(replica, model)


def test_the_model_forgets_what_the_rows_forget() -> None:
    """The rows keep exactly the replies that the model's clients have not acknowledged."""
    rng = random.Random(5)
    replica, model, client = kv_replica(), Model(), Client(1)
    for _ in range(200):
        command = random_command(rng, client, model.get(b"1"), b"1")
        assert replica.run_one(command) == model.answer(command)
    shard = shard_of(b"1", SHARDS)
    acknowledged = model.acknowledged[shard, client.client_id]
    (row,) = [row for key, row in replica.engine.rows.items() if client.client_id in key]
    kept = {seq for _, _, seq in model.replies if seq >= acknowledged}
    assert set(Session.decode(row).replies) == kept
