"""Transactions at one group, command by command: who votes what, who holds what, what is left."""

from __future__ import annotations

from typing import Any

import pytest

from raftkv.machines import participants
from raftkv.machines.kv import PUT, KvMachine
from raftkv.machines.locks import LOCK_MS
from raftkv.machines.participants import COMMITTED, NO, NOT_HERE, OUTCOME_LIFETIME_MS, YES
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
from raftkv.protocol.errors import Locked, WrongGroup
from tests.machines.support import Client, Replica, addresses_of, kv_replica, map_time_command

NOW_MS = 10_000_000
SHARDS = 10
ONE, TWO = b"1", b"2"
S1, S2 = shard_of(ONE, SHARDS), shard_of(TWO, SHARDS)
OK, WRONG_GROUP, LOCKED, CONFLICT, ABORTED, BAD, EXPIRED = 0, 2, 3, 4, 5, 8, 9


def txid_of(number: int, age_ms: int = 0) -> bytes:
    return make_txid(NOW_MS - age_ms, b"%8d" % number)


A, B, C = txid_of(1), txid_of(2), txid_of(3)


def group() -> Replica[KvMachine]:
    replica = kv_replica()
    assert replica.run_one(map_time_command(NOW_MS))[0] == OK
    return replica


def part(key: bytes, value: bytes | None = None, version: int | None = None, *, write: bool = True) -> list[Any]:
    reads = [] if version is None else [[key, version]]
    return [shard_of(key, SHARDS), reads, [[key, value]] if write else []]


def prepare(txid: bytes, *parts: list[Any], term: int = 1, gid: int = 7) -> list[Any]:
    return [TXN_PREPARE, txid, gid, term, list(parts)]


def value(replica: Replica[KvMachine], key: bytes) -> tuple[bytes | None, int]:
    return replica.machine.get(replica.engine, shard_of(key, SHARDS), key)


def test_the_keys_are_of_different_shards() -> None:
    assert S1 != S2


# ---- one group


def test_a_commit_at_one_group_is_one_entry() -> None:
    replica = group()
    result = replica.run_one([TXN_COMMIT, A, [part(ONE, b"a", 0), part(TWO, b"b")]])
    assert result == [OK, [[S1, 1], [S2, 1]]]
    assert value(replica, ONE) == (b"a", 1)
    assert replica.run_one([TXN_COMMIT, A, [part(ONE, b"other")]]) == [OK, [[S1, 1]]], "it has been"
    assert value(replica, ONE) == (b"a", 1)


def test_a_conflict_is_its_end_in_all_shards() -> None:
    replica = group()
    replica.run_one([TXN_COMMIT, A, [part(ONE, b"a")]])
    assert replica.run_one([TXN_COMMIT, B, [part(ONE, b"b", 0), part(TWO, b"b")]]) == [CONFLICT, [ONE]]
    assert replica.run_one([TXN_COMMIT, B, [part(TWO, b"b")]])[0] == ABORTED
    assert value(replica, TWO) == (None, 0)


def test_nothing_changes_if_only_absent_keys_are_deleted() -> None:
    replica = group()
    assert replica.run_one([TXN_COMMIT, A, [part(ONE, None)]]) == [OK, [[S1, 0]]]
    assert value(replica, ONE) == (None, 0)


def test_what_a_coordinator_has_prepared_only_that_one_ends() -> None:
    replica = group()
    replica.run_one(prepare(A, part(ONE, b"a")))
    assert replica.run_one([TXN_COMMIT, A, [part(ONE, b"a")]])[0] == BAD
    assert replica.machine.in_doubt() == [(A, 7, S1, NOW_MS)]


# ---- votes


def test_a_yes_locks_and_hides() -> None:
    replica = group()
    assert replica.run_one(prepare(A, part(ONE, b"a", 0), part(TWO, version=0, write=False))) == [OK, YES]
    assert replica.run_one(prepare(A, part(ONE, b"a", 0), part(TWO, version=0, write=False))) == [OK, YES], "again"
    with pytest.raises(Locked) as locked:
        value(replica, ONE)
    assert locked.value.txn == A
    assert value(replica, TWO) == (None, 0), "who only reads hides nothing"
    client = Client(1)
    for key in (ONE, TWO):
        assert replica.run_one(client.command(PUT, key, b"v", None, stamp_ms=NOW_MS)) == [LOCKED, A]
        assert replica.run_one(prepare(B, part(key, b"b"))) == [CONFLICT, [key]]
    assert replica.run_one(prepare(B, part(TWO, version=0, write=False))) == [OK, YES], "readers go together"
    assert replica.machine.writer_blocked_by(S1, ONE) == A
    assert replica.machine.is_prepared(S1, A) and not replica.machine.is_prepared(S1, B)


def test_a_no_takes_no_lock() -> None:
    replica = group()
    replica.run_one(prepare(A, part(ONE, b"a")))
    assert replica.run_one(prepare(B, part(ONE, b"b"), part(TWO, b"b"))) == [CONFLICT, [ONE]]
    assert [txid for txid, *_ in replica.machine.in_doubt()] == [A]


def test_a_prepare_again_is_a_yes_only_with_the_same_content() -> None:
    replica = group()
    ours = prepare(A, part(ONE, b"1", 0), part(TWO, b"2"))
    assert [replica.run_one(ours) for _ in range(2)] == [[OK, YES]] * 2
    assert replica.run_one(prepare(A, part(ONE, b"1", 0), term=2)) == [OK, YES]
    for other in (part(ONE, b"x", 0), part(ONE, b"1"), part(ONE, write=False, version=0)):
        assert replica.run_one(prepare(A, other, term=2))[0] == BAD
    assert replica.run_one([TXN_DECIDE, A, True, [S1, S2]])[0] == OK
    assert value(replica, ONE)[0] == b"1"


def test_the_decision_and_what_it_leaves() -> None:
    replica = group()
    replica.run_one(prepare(A, part(ONE, b"a"), part(TWO, b"a")))
    unlocks = replica.machine.unlocks
    assert replica.run_one([TXN_DECIDE, A, True, [S1]]) == [OK, [[S1, YES, 1]]]
    assert replica.machine.unlocks != unlocks
    assert value(replica, ONE) == (b"a", 1)
    assert replica.run_one([TXN_DECIDE, A, False, [S1]]) == [OK, [[S1, YES, 1]]], "what is recorded stays"
    assert replica.run_one([TXN_DECIDE, A, True, [S2]]) == [OK, [[S2, YES, 1]]]
    assert replica.machine.outcome(replica.engine, S2, A) == (True, 1, NOW_MS)
    assert replica.run_one(prepare(A, part(ONE, b"a"))) == [OK, COMMITTED]
    assert replica.machine.in_doubt() == []


def test_an_abort_is_a_tombstone_even_before_the_prepare() -> None:
    replica = group()
    assert replica.run_one([TXN_DECIDE, A, False, [S1, S2]]) == [OK, [[S1, NO, 0], [S2, NO, 0]]]
    assert replica.run_one(prepare(A, part(ONE, b"a")))[0] == ABORTED
    assert replica.run_one([TXN_DECIDE, A, True, [S1]]) == [OK, [[S1, NO, 0]]]
    assert replica.run_one([TXN_DECIDE, B, True, [S1]]) == [OK, [[S1, YES, 0]]], "a commit is heard without a prepare"


def test_a_shard_that_is_elsewhere_acknowledges_nothing() -> None:
    replica = Replica(KvMachine(1))
    owners = tuple(2 if shard == S2 else 1 for shard in range(SHARDS))
    config = ShardMap(1, owners, {gid: tuple(addresses_of(gid)) for gid in (1, 2)})
    replica.run_one([32, config.encode()])
    replica.run_one(map_time_command(NOW_MS))
    assert replica.run_one([TXN_DECIDE, A, False, [S1, S2]]) == [OK, [[S1, NO, 0], [S2, NOT_HERE, 0]]]
    for command in (
        prepare(B, part(ONE, b"b"), part(TWO, b"b")),
        [TXN_COMMIT, B, [part(TWO, b"b")]],
        [TXN_LOCK, B, B, S2, [TWO]],
        [TXN_BEAT, B, [S2]],
    ):
        assert replica.run_one(command) == [WRONG_GROUP, 1, 2]
    with pytest.raises(WrongGroup):
        replica.machine.outcome(replica.engine, S2, B)
    with pytest.raises(WrongGroup):
        replica.machine.check(replica.engine, S2, [TWO])


def test_resolve_shows_what_earlier_terms_have_prepared_and_keeps_them_out() -> None:
    replica = group()
    replica.run_one(prepare(A, part(ONE, b"a"), part(TWO, b"a"), term=3))
    replica.run_one(prepare(B, part(b"9", b"b"), term=4))
    replica.run_one(prepare(C, part(b"xyz", b"b"), term=1, gid=8))
    assert replica.run_one([TXN_RESOLVE, 7, 4]) == [OK, [[A, sorted([S1, S2])]]]
    assert replica.run_one(prepare(txid_of(4), part(b"q", b"q"), term=3))[0] == ABORTED
    assert replica.run_one(prepare(txid_of(5), part(b"q", b"q"), term=4)) == [OK, YES]
    assert replica.run_one([TXN_RESOLVE, 7, 2])[0] == OK, "a late one lowers nothing"
    assert replica.run_one(prepare(txid_of(6), part(b"r", b"r"), term=3))[0] == ABORTED
    replica.machine.load(replica.engine)
    assert replica.run_one(prepare(txid_of(6), part(b"r", b"r"), term=3))[0] == ABORTED


# ---- the horizon


def test_what_is_older_than_the_horizon_and_has_left_no_record_is_expired() -> None:
    replica = group()
    old, just_not = txid_of(1, OUTCOME_LIFETIME_MS + 1), txid_of(2, OUTCOME_LIFETIME_MS)
    rows = dict(replica.engine.rows)
    for command in (
        prepare(old, part(ONE, b"a")),
        [TXN_COMMIT, old, [part(ONE, b"a")]],
        [TXN_LOCK, old, old, S1, [ONE]],
    ):
        assert replica.run_one(command)[0] == EXPIRED
    assert replica.engine.rows == rows
    assert replica.run_one(prepare(just_not, part(ONE, b"a"))) == [OK, YES]
    replica.run_one(map_time_command(2 * NOW_MS))
    assert replica.run_one(prepare(just_not, part(ONE, b"a"))) == [OK, YES], "what is prepared is known"
    assert replica.run_one([TXN_DECIDE, just_not, True, [S1]]) == [OK, [[S1, YES, 1]]]


def test_outcomes_go_an_hour_after_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participants, "SWEEP_ROWS_MAX", 4)
    replica = group()
    keys = [b"%d" % n for n in range(10)]
    for number, key in enumerate(keys):
        assert replica.run_one([TXN_COMMIT, txid_of(number, 5_000), [part(key, b"v")]])[0] == OK

    def left() -> int:
        shards = [shard_of(key, SHARDS) for key in keys]
        found = [replica.machine.outcome(replica.engine, shard, txid_of(n, 5_000)) for n, shard in enumerate(shards)]
        return sum(outcome is not None for outcome in found)

    replica.run_one(map_time_command(NOW_MS + OUTCOME_LIFETIME_MS))
    assert left() == 10
    while replica.machine.sweep_pending:  # that pass saw none old enough; it comes to its end
        replica.run_one(map_time_command(NOW_MS + OUTCOME_LIFETIME_MS))
    counts = [10]
    for _ in range(3):
        replica.run_one(map_time_command(NOW_MS + OUTCOME_LIFETIME_MS + 1))
        counts.append(left())
        assert replica.machine.sweep_pending == (counts[-1] > 0)
    assert counts == [10, 6, 2, 0]
    assert replica.run_one([TXN_COMMIT, txid_of(1, 5_000), [part(b"1", b"v")]])[0] == EXPIRED


# ---- explicit locks


def test_an_explicit_lock_keeps_writers_out_and_lets_readers_pass() -> None:
    replica = group()
    assert replica.run_one([TXN_LOCK, A, A, S1, [ONE]]) == [OK, [0]]
    assert replica.machine.explicit_locks == 1
    assert value(replica, ONE) == (None, 0)
    assert replica.run_one(Client(1).command(PUT, ONE, b"v", None, stamp_ms=NOW_MS)) == [LOCKED, A]
    assert replica.run_one(prepare(B, part(ONE, b"b"))) == [CONFLICT, [ONE]]
    assert replica.run_one([TXN_COMMIT, A, [part(ONE, b"a", 0)]]) == [OK, [[S1, 1]]]
    assert replica.machine.explicit_locks == 0


def test_the_older_one_wounds_unless_the_younger_is_prepared() -> None:
    replica = group()
    old, young = txid_of(1, 5_000), txid_of(2)
    replica.run_one([TXN_LOCK, young, young, S1, [ONE]])
    assert replica.run_one([TXN_LOCK, old, old, S1, [ONE]]) == [OK, [0]]
    assert replica.run_one([TXN_BEAT, young, [S1]])[0] == ABORTED
    assert replica.run_one([TXN_LOCK, young, young, S1, [ONE]])[0] == ABORTED
    third = txid_of(3)
    assert replica.run_one([TXN_LOCK, third, third, S1, [ONE]]) == [LOCKED, old], "the younger one waits"
    assert replica.run_one(prepare(old, part(ONE, b"o"))) == [OK, YES]
    oldest = txid_of(4, 9_000)
    assert replica.run_one([TXN_LOCK, oldest, oldest, S1, [ONE]]) == [LOCKED, old]


def test_a_lock_ends_after_its_clients_last_sign_of_life() -> None:
    replica = group()
    replica.run_one([TXN_LOCK, A, A, S1, [ONE]])
    replica.run_one(map_time_command(NOW_MS + 5_000))
    assert replica.run_one([TXN_BEAT, A, [S1]]) == [OK, NOW_MS + 5_000 + LOCK_MS]
    replica.run_one(map_time_command(NOW_MS + 5_000 + LOCK_MS))
    assert replica.machine.explicit_locks == 1
    unlocks = replica.machine.unlocks
    replica.run_one(map_time_command(NOW_MS + 5_001 + LOCK_MS))
    assert replica.machine.explicit_locks == 0 and replica.machine.unlocks != unlocks
    assert replica.run_one([TXN_BEAT, A, [S1]])[0] == ABORTED


def test_all_of_it_is_there_again_after_a_restart() -> None:
    replica = group()
    replica.run_one(prepare(A, part(ONE, b"a", 0), part(TWO, version=0, write=False)))
    replica.run_one([TXN_LOCK, B, B, shard_of(b"x", SHARDS), [b"x"]])
    before = replica.machine.in_doubt(), replica.machine.explicit_locks
    replica.machine = KvMachine(1)
    replica.machine.load(replica.engine)
    assert (replica.machine.in_doubt(), replica.machine.explicit_locks) == before
    assert replica.machine.writer_blocked_by(S2, TWO) == A


def test_check_gives_versions_of_one_state_or_says_who_is_in_the_way() -> None:
    replica = group()
    replica.run_one([TXN_COMMIT, A, [part(ONE, b"a")]])
    replica.run_one([TXN_COMMIT, B, [part(ONE, None)]])
    assert replica.machine.check(replica.engine, S1, [ONE]) == [2], "an absent key's version is the last delete's"
    replica.run_one(prepare(C, part(ONE, b"c")))
    with pytest.raises(Locked):
        replica.machine.check(replica.engine, S1, [ONE])
