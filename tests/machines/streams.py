"""Random streams of entries for the machines: what clients, shells, retries and hostile bytes may put
into a log. One seed makes one stream, under any PYTHONHASHSEED.

`python -m tests.machines.streams SEED` prints a digest of all that a stream does.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import msgpack

from raftkv.machines import coordinator as coord
from raftkv.machines import moves as op
from raftkv.machines.controller import INIT, JOIN, LEAVE, MOVE, REGISTER, ShardMapMachine
from raftkv.machines.coordinator import CoordinatorMachine
from raftkv.machines.kv import APPEND, CAS, DELETE, PUT, KvMachine
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import (
    TXN_BEAT,
    TXN_COMMIT,
    TXN_DECIDE,
    TXN_LOCK,
    TXN_PREPARE,
    TXN_RESOLVE,
    make_txid,
)
from raftkv.raft.entry import Entry, EntryKind
from tests.machines.support import CLUSTER_ID, Replica, addresses_of, config_command, map_time_command

SHARDS = 10
LIFETIME_MS = 5_000
"""Short, so that a stream sees many expiries."""


def junk(rng: random.Random, depth: int = 0) -> Any:
    """Anything that msgpack can carry."""
    kind = rng.randrange(10 if depth < 3 else 7)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind <= 2:
        return rng.choice([0, 1, -1, 32, 33, 64, 65, 2**31, 2**63, 2**64 - 1, -(2**63), rng.randrange(100)])
    if kind == 3:
        return rng.random()
    if kind <= 5:
        return rng.randbytes(rng.choice([0, 1, 16, 16, 40]))
    if kind == 6:
        return rng.choice(["", "h:1", "ä", "x" * 300])
    if kind == 9:
        return {str(number): junk(rng, depth + 1) for number in range(rng.randrange(3))}
    return [junk(rng, depth + 1) for _ in range(rng.randrange(5))]


def spoil(rng: random.Random, command: list[Any]) -> Any:
    """A command with something wrong in it; now and then it is still right."""
    spoiled = list(command)
    choice = rng.randrange(5)
    if choice == 0:
        return junk(rng)
    if choice == 1:
        del spoiled[rng.randrange(len(spoiled))]
    elif choice == 2:
        spoiled.insert(rng.randrange(len(spoiled) + 1), junk(rng))
    else:
        spoiled[rng.randrange(len(spoiled))] = junk(rng)
    return spoiled


class Sender:
    """A client with several requests in flight, that repeats itself, and acknowledges now and then."""

    def __init__(self, rng: random.Random, name: int) -> None:
        self.rng = rng
        self.client_id = name.to_bytes(16, "big")
        self.seqs: dict[int, int] = {}
        self.acked: dict[int, int] = {}
        self.sent: list[list[Any]] = []

    def next(self, op: int, shard: int, now_ms: int, *args: Any) -> list[Any]:
        rng = self.rng
        if self.sent and rng.random() < 0.25:
            return list(rng.choice(self.sent[-12:]))
        seq = self.seqs[shard] = self.seqs.get(shard, 0) + 1
        if rng.random() < 0.5:
            self.acked[shard] = max(self.acked.get(shard, 0), seq - 1 - rng.randrange(4))
        stamp_ms = max(0, now_ms - rng.choice([0, 0, 100, 2_000, 6_000]) + rng.choice([0, 0, 500]))
        command = [op, shard, self.client_id, seq, self.acked.get(shard, 0) + 1, stamp_ms, *args]
        self.sent.append(command)
        return list(command)


def move_command(rng: random.Random, num: int, index: int) -> list[Any]:
    """A command that moves a shard: often one that fits, after some of the commands before it."""
    shard = rng.randrange(SHARDS)
    config_num = rng.choice([1, num, num, max(1, num - 1)])
    list_id = rng.choice([7, index, max(1, index - rng.randrange(12))])
    attempt = rng.choice([1, 1, 2])
    import_id = [shard, config_num, attempt, 7]
    rows = [[b"k" + rng.randbytes(2), rng.choice([None, bytes(9) + b"v"])], [b"c" + rng.randbytes(16), bytes(17)]]
    kind = rng.randrange(9)
    if kind == 0:
        return [op.IMPORT_START, *import_id[:3], 2, 7]
    if kind == 1:
        return [op.IMPORT_CHUNK, *import_id, rng.randrange(3), rows, rng.choice([None, b"kx"]), index]
    if kind == 2:
        return [op.IMPORT_ASK, *import_id]
    if kind == 3:
        return [op.IMPORT_INSTALL, *import_id, rng.randrange(4), rows, 9, 8, 0, 100 * index]
    if kind == 4:
        return rng.choice([[op.IMPORT_DROP, *import_id], [op.IMPORT_RELEASED, shard, config_num]])
    if kind == 5:
        return [op.EXPORT_ASK, shard, 2, config_num, attempt, list_id, list_id]
    if kind == 6:
        return [op.EXPORT_RELEASE, shard, 2, config_num]
    return [op.EXPORT_LIST, shard, 2, config_num, attempt]


def txid_of(rng: random.Random, now_ms: int) -> bytes:
    """One of few at a time, so that commands meet; some are older than the horizon."""
    age_ms = rng.choice([0, 0, 0, 1_000, 4_000_000])
    made_ms = max(0, now_ms - age_ms) // 2_000 * 2_000
    return make_txid(made_ms, rng.choice([b"a", b"b", b"c"]) * 8)


def txn_command(rng: random.Random, keys: list[bytes], now_ms: int) -> list[Any]:
    """A command of a transaction: often one that has something to do with those before it."""
    txid, term = txid_of(rng, now_ms), rng.choice([1, 1, 2, 3])
    parts: dict[int, list[Any]] = {}
    for key in rng.sample(keys, rng.randrange(1, 4)):
        part = parts.setdefault(shard_of(key, SHARDS), [shard_of(key, SHARDS), [], []])
        if rng.random() < 0.6:
            part[1].append([key, rng.choice([0, 0, 1, 2, 5])])
        if rng.random() < 0.7:
            part[2].append([key, rng.choice([None, b"", rng.randbytes(5)])])
    shards = sorted(parts)
    kind = rng.randrange(9)
    if kind <= 1:
        return [TXN_COMMIT, txid, list(parts.values())]
    if kind <= 3:
        return [TXN_PREPARE, txid, rng.choice([1, 1, 2]), term, list(parts.values())]
    if kind <= 5:
        return [TXN_DECIDE, txid, rng.random() < 0.5, shards]
    if kind == 6:
        return [TXN_RESOLVE, rng.choice([1, 1, 2]), term]
    if kind == 7:
        return [TXN_BEAT, txid, shards]
    key = rng.choice(keys)
    return [TXN_LOCK, txid, txid_of(rng, now_ms), shard_of(key, SHARDS), [key]]


def coordinator_entries(seed: int, entries: int) -> Iterator[Entry]:
    """For a `CoordinatorMachine`."""
    rng = random.Random(seed)
    now_ms = 0
    for index in range(1, entries + 1):
        now_ms += rng.choice([0, 10, 400, 60_000])
        kind = EntryKind.COMMANDS if rng.random() < 0.9 else rng.choice(list(EntryKind))
        commands: list[Any] = []
        for _ in range(rng.randrange(6)):
            txid = txid_of(rng, now_ms)
            shards = rng.sample(range(SHARDS), rng.randrange(1, 4))
            command: Any = rng.choice(
                [
                    [coord.BEGIN, txid, rng.choice([b"d", b"e"]) * 16, shards],
                    [coord.DECIDE, txid, rng.random() < 0.5],
                    [coord.FENCE, txid, rng.choice([shards, []])],
                    [coord.SETTLE, txid, rng.random() < 0.5],
                    [coord.END, [txid, txid_of(rng, now_ms)]],
                    [coord.MAP_TIME, now_ms],
                    [coord.TAKE_OVER],
                ]
            )
            commands.append(spoil(rng, command) if rng.random() < 0.1 else command)
        yield Entry.make(1, index, kind, now_ms, msgpack.packb(commands))


def kv_entries(seed: int, entries: int) -> Iterator[Entry]:
    """For a `KvMachine` of group 1 with LIFETIME_MS. Group 1 owns some of the shards, then more."""
    rng = random.Random(seed)
    senders = [Sender(rng, number) for number in range(12)]
    keys = [b"%d" % number for number in range(25)] + [b"{3}a", b"{3}b", b"", b"\xff\xff"]
    groups = {gid: tuple(addresses_of(gid)) for gid in (1, 2)}
    num, now_ms, owners = 0, 0, [0] * SHARDS
    active = senders[:3]
    for index in range(1, entries + 1):
        now_ms += rng.choice([0, 10, 100, 400])
        if rng.random() < 0.03:  # the others are silent for long enough that their sessions go
            active = rng.sample(senders, 3)
        kind = EntryKind.COMMANDS if rng.random() < 0.9 else rng.choice(list(EntryKind))
        commands: list[Any] = []
        for _ in range(rng.randrange(8)):
            key, value = rng.choice(keys), rng.randbytes(rng.choice([0, 1, 5, 200]))
            op = rng.choice([PUT, PUT, APPEND, APPEND, DELETE, CAS])
            args: list[Any] = [key]
            if op != DELETE:
                args.append(value)
            if op == PUT:
                args.append(rng.choice([None, 0, 1, 5]))
            elif op == CAS:
                args[1:] = [rng.choice([b"", value]), value]
            command: Any = rng.choice(active).next(op, shard_of(key, SHARDS), now_ms, *args)
            commands.append(spoil(rng, command) if rng.random() < 0.1 else command)
        if num == 0 or rng.random() < 0.03:
            if num < 5:
                owners = [rng.choice([1, 1, 2]) for _ in owners] if num else [1] * 5 + [2] * 5
                num += 1
            config = ShardMap(num + rng.choice([0, 0, 1]) * (num == 5), tuple(owners), groups)
            commands.insert(rng.randrange(len(commands) + 1), config_command(config))
        if rng.random() < 0.2:
            commands.insert(rng.randrange(len(commands) + 1), map_time_command(now_ms))
        for _ in range(rng.choice([0, 0, 1, 3])):
            moving = move_command(rng, num, index)
            moving = spoil(rng, moving) if rng.random() < 0.1 else moving
            commands.insert(rng.randrange(len(commands) + 1), moving)
        for _ in range(rng.choice([0, 1, 3])):
            txn = txn_command(rng, keys, now_ms)
            txn = spoil(rng, txn) if rng.random() < 0.1 else txn
            commands.insert(rng.randrange(len(commands) + 1), txn)
        data = msgpack.packb(commands) if kind == EntryKind.COMMANDS else b""
        if rng.random() < 0.01:
            data = rng.randbytes(9)
        yield Entry.make(1, index, kind, now_ms, data)


def controller_entries(seed: int, entries: int) -> Iterator[Entry]:
    """For a `ShardMapMachine` with LIFETIME_MS."""
    rng = random.Random(seed)
    senders = [Sender(rng, number) for number in range(4)]
    now_ms = 0
    for index in range(1, entries + 1):
        now_ms += rng.choice([0, 10, 100, 400])
        kind = EntryKind.COMMANDS if rng.random() < 0.8 else rng.choice(list(EntryKind))
        commands: list[Any] = []
        for _ in range(rng.randrange(4)):
            gids = [rng.randrange(1, 9) for _ in range(rng.choice([1, 1, 2, 3]))]
            op = rng.choice([JOIN, LEAVE, MOVE, JOIN, LEAVE, MOVE, REGISTER])
            args: list[Any] = [gids]
            if op == JOIN:
                args = [[[gid, addresses_of(gid)] for gid in gids]]
            elif op == MOVE:
                args = [rng.randrange(-1, SHARDS + 1), gids[0]]
            elif op == REGISTER:
                args = [gids[0], addresses_of(rng.choice(gids))]
            command: Any = rng.choice(senders).next(op, -1, now_ms, *args)
            commands.append(spoil(rng, command) if rng.random() < 0.1 else command)
        if index == 1 or rng.random() < 0.02:
            commands.append([INIT, CLUSTER_ID, SHARDS])
        yield Entry.make(1, index, kind, now_ms, msgpack.packb(commands))


def new_kv(**options: Any) -> Replica[KvMachine]:
    return Replica(KvMachine(1, session_lifetime_ms=LIFETIME_MS, **options))


def new_controllers(**options: Any) -> Replica[ShardMapMachine]:
    return Replica(ShardMapMachine(session_lifetime_ms=LIFETIME_MS, **options))


def new_coordinators(**options: Any) -> Replica[CoordinatorMachine]:
    """It has no caches that could be of another size."""
    return Replica(CoordinatorMachine())


def digest(seed: int, entries: int = 150) -> str:
    """Of every result and every row, entry by entry, in the order in which rows were written."""
    running = hashlib.sha256()
    kv, controllers, coordinators = new_kv(), new_controllers(), new_coordinators()
    for entry in kv_entries(seed, entries):
        running.update(repr(kv.apply(entry)).encode())
    for entry in controller_entries(seed, entries):
        running.update(repr(controllers.apply(entry)).encode())
    for entry in coordinator_entries(seed, entries):
        running.update(repr(coordinators.apply(entry)).encode())
    running.update(repr((kv.engine.rows, controllers.engine.rows, coordinators.engine.rows)).encode())
    return running.hexdigest()


if __name__ == "__main__":
    print(digest(int(sys.argv[1])))
