"""Transactions over several groups, by the production daemons in the simulator, request by request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from raftkv.daemons import lock_waits, transactions
from raftkv.machines.locks import LOCK_MS
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import TXN_BEAT, TXN_COMMIT, TXN_DECIDE, TXN_LOCK, TXN_PREPARE, make_txid
from raftkv.protocol.errors import (
    Aborted,
    BadRequest,
    BadShard,
    Conflict,
    Expired,
    Locked,
    NotLeader,
    RaftKVError,
    Unavailable,
    WrongGroup,
)
from raftkv.protocol.limits import LOCK_WAIT_S_MAX
from raftkv.protocol.messages import ReadOp, Verb
from raftkv.protocol.transactions import CoordinateOp, State
from raftkv.sim.cluster import COORDINATORS_GID, shards_of
from tests.acceptance.rigs import Raw, Task
from tests.daemons.transaction_rig import TxnClient, TxnRig

BOGUS = 77
"""The gid of a group of coordinators that doesn't exist."""


def error_of(work: Any, client: TxnClient) -> RaftKVError:
    with pytest.raises(RaftKVError) as caught:
        client.do(work)
    return caught.value


# ---- commits


def test_a_commit_over_two_groups_is_applied_in_both() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        one, two = rig.keys()
        txid = client.txid()
        parts = rig.part({one: b"1", two: b"2"})
        assert client.do(client.commit(txid, parts)) is State.COMMITTED
        assert client.do(client.values([one, two])) == [b"1", b"2"]
        assert client.do(client.status(txid)) is State.COMMITTED
        assert client.do(client.commit(txid, parts)) is State.COMMITTED, "and again"
        assert isinstance(client.do(client.commit(txid, rig.part({one: b"3"}))), BadRequest)
        for key in (one, two):
            shard = shard_of(key, rig.shards)
            state, revision = client.do(client.read(ReadOp.OUTCOME, shard, txid))
            assert (state, revision) == (State.COMMITTED, 1)
            assert client.do(client.read(ReadOp.OUTCOME, shard, client.txid())) is None
            assert client.do(client.read(ReadOp.CHECK, shard, [key])) == [1]
        rig.wait_clean(2.0)
        rig.wait_equal()


def test_many_shards_of_one_group_are_asked_at_once() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        keys = rig.keys(40)
        came = rig.arm(rig.cluster.serving_groups[0], "group got prepare", lambda process: 0.0, times=100)
        assert client.do(client.commit(client.txid(), rig.part(dict.fromkeys(keys, b"v")))) is State.COMMITTED
        assert len(came) == 1
        assert client.do(client.values(keys)) == [b"v"] * 40


def test_what_was_read_must_still_be_so() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        one, two = rig.keys()
        client.do(client.clerk.kv.put(one, b"0"))
        parts = rig.part({one: b"1", two: b"2"}, {one: 1, two: 0})
        assert client.do(client.commit(client.txid(), parts)) is State.COMMITTED
        again = client.do(client.commit(client.txid(), parts))
        assert isinstance(again, Conflict) and set(again.keys) <= {one, two} and again.keys
        assert client.do(client.values([one, two])) == [b"1", b"2"]
        rig.wait_clean(2.0)


def test_two_that_meet_never_both_go_half_way() -> None:
    with TxnRig() as rig:
        clients = [TxnClient(rig) for _ in range(6)]
        one, two = rig.keys()
        for turn in range(5):
            tasks = [
                client.clerk.spawn(client.commit(client.txid(), rig.part({one: b"%d" % n, two: b"%d" % n})))
                for n, client in enumerate(clients)
            ]
            rig.finish_all(tasks, 30.0)
            winners = [n for n, task in enumerate(tasks) if task.result is State.COMMITTED]
            assert all(isinstance(task.result, (Conflict, State)) for task in tasks), [t.result for t in tasks]
            values = clients[0].do(clients[0].values([one, two]))
            assert values[0] == values[1]
            assert turn == 0 or winners or values[0] is not None
            rig.wait_clean(5.0)
        rig.wait_equal()


def test_what_can_not_be_a_transaction_is_refused_before_the_log() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        one, two = rig.keys()
        good = rig.part({one: b"1", two: b"2"})
        wrong_shard = [[(good[0][0] + 1) % rig.shards, *good[0][1:]]]
        for parts, error in (
            ([], BadRequest),
            (wrong_shard, BadRequest),
            ([[rig.shards, [], []]], BadShard),
            ([[0, [[one]], []]], BadRequest),
        ):
            assert isinstance(client.do(client.commit(client.txid(), parts)), error), parts
        assert isinstance(client.do(client.commit(b"\xff" * 16, good)), BadRequest)
        too_old = make_txid(0, b"entropy!")
        for process in rig.coordinators.processes:
            machine = rig.coordinator_machine(process)
            assert not machine.open and not machine.is_expired(too_old), "nobody's clock has run for an hour"
        assert client.do(client.status(client.txid())) is State.UNKNOWN
        assert isinstance(error_of(client.resolve(client.txid(), [rig.shards]), client), BadShard)


def test_status_is_answered_by_any_replica_the_rest_by_the_leader() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        one, two = rig.keys()
        txid = client.txid()
        client.do(client.commit(txid, rig.part({one: b"1", two: b"2"})))
        leader = rig.leader(rig.coordinators)
        for process in rig.coordinators.processes:
            raw = Raw(client.clerk, process)
            assert client.do(raw.request(Verb.COORDINATE, [CoordinateOp.STATUS, txid])) == [State.COMMITTED]
            if process is not leader:
                for body in (
                    [CoordinateOp.COMMIT, txid, rig.part({one: b"1"})],
                    [CoordinateOp.RESOLVE, txid, [1]],
                    [CoordinateOp.DOUBT, [txid]],
                ):
                    error = error_of(raw.request(Verb.COORDINATE, body), client)
                    assert isinstance(error, NotLeader) and error.leader_address == leader.options.address
            assert isinstance(error_of(raw.request(Verb.COORDINATE, [9]), client), BadRequest)


def test_a_transaction_of_long_ago_is_expired() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        one, two = rig.keys()
        old = client.txid()
        for process in rig.cluster.groups[0].processes:
            process.jump_clock(3_700.0)
        rig.wait_until(
            lambda: all(rig.coordinator_machine(p).is_expired(old) for p in rig.coordinators.processes), "time passes"
        )
        parts = rig.part({one: b"1", two: b"2"})
        assert client.do(client.status(old)) is State.EXPIRED
        assert isinstance(client.do(client.commit(old, parts)), Expired)
        assert isinstance(error_of(client.resolve(old, [part[0] for part in parts]), client), Expired)
        assert client.do(client.commit(client.txid(), parts)) is State.COMMITTED


# ---- deaths

COORDINATOR_STEPS = (
    "coordinator logged begin",
    "coordinator got a vote",
    "coordinator got all votes",
    "coordinator logged decision",
    "coordinator answered",
    "coordinator got an acknowledgement",
    "coordinator got all acknowledgements",
)
DECIDED = COORDINATOR_STEPS[3:]
GROUP_STEPS = ("group got prepare", "group logged prepare", "group got decision", "group logged decision")


def check_outcome(rig: TxnRig, client: TxnClient, txid: bytes, keys: list[bytes], result: Any) -> State:
    """One outcome everywhere, that which the client was told; no lock is left."""
    rig.wait_clean()
    state: State = client.do(client.status(txid))
    assert state in (State.COMMITTED, State.ABORTED)
    assert (result is State.COMMITTED) == (state is State.COMMITTED), result
    assert client.do(client.values(keys)) == [b"new" if state is State.COMMITTED else None] * len(keys)
    for key in keys:
        outcome = client.do(client.read(ReadOp.OUTCOME, shard_of(key, rig.shards), txid))
        assert outcome is None or outcome[0] == state
    rig.wait_equal()
    return state


@pytest.mark.parametrize("step", COORDINATOR_STEPS)
def test_the_coordinators_leader_dies(step: str) -> None:
    with TxnRig(3) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        came = rig.crash_at(rig.coordinators, step)
        txid = client.txid()
        result = client.do(client.commit(txid, rig.part(dict.fromkeys(keys, b"new"))))
        rig.wait_until(lambda: len(came) == 1, step, 2.0)
        state = check_outcome(rig, client, txid, keys, result)
        assert (state is State.COMMITTED) == (step in DECIDED)
        other = dict.fromkeys(rig.keys(prefix=b"other"), b"new")
        assert client.do(client.commit(client.txid(), rig.part(other))) is State.COMMITTED, "and it goes on"


@pytest.mark.parametrize("step", COORDINATOR_STEPS)
def test_the_coordinators_leader_dies_and_so_does_the_next_one(step: str) -> None:
    with TxnRig(4) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        came = rig.crash_at(rig.coordinators, step)
        also = rig.crash_at(rig.coordinators, "coordinator took over")
        txid = client.txid()
        result = client.do(client.commit(txid, rig.part(dict.fromkeys(keys, b"new"))))
        rig.wait_until(lambda: len(also) == 1, "a leader took over")
        assert len(came) == 1
        check_outcome(rig, client, txid, keys, result)


@pytest.mark.parametrize("step", GROUP_STEPS)
def test_a_groups_leader_dies(step: str) -> None:
    with TxnRig(5) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        came = rig.crash_at(rig.cluster.serving_groups[1], step)
        txid = client.txid()
        result = client.do(client.commit(txid, rig.part(dict.fromkeys(keys, b"new"))))
        check_outcome(rig, client, txid, keys, result)
        assert len(came) == 1


def test_no_lock_outlives_its_leader_by_more_than_a_second() -> None:
    """All of the coordinators' leader, votes collected and forgotten: from the next leader on it takes a second."""
    with TxnRig(6) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        rig.crash_at(rig.coordinators, "coordinator got all votes")
        client.clerk.spawn(client.commit(client.txid(), rig.part(dict.fromkeys(keys, b"new"))))
        rig.wait_until(lambda: len(rig.locks_left()) > 4, "it is prepared everywhere")
        rig.wait_until(lambda: rig.coordinators.leader() is None, "the leader is gone")
        rig.wait_until(lambda: rig.coordinators.leader() is not None, "somebody leads")
        assert rig.wait_clean() < 1.0


def test_a_group_without_a_majority_aborts_within_the_deadline() -> None:
    with TxnRig(7) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        group = rig.group_of_shard(shard_of(keys[1], rig.shards))
        for process in group.processes[:2]:
            process.kill()
        txid = client.txid()
        task = client.clerk.spawn(client.commit(txid, rig.part(dict.fromkeys(keys, b"new"))))
        rig.finish(task, 8.0)
        assert isinstance(task.result, Aborted)
        assert f"group {group.gid} has not voted" in str(task.result)
        assert client.do(client.status(txid)) is State.ABORTED
        rig.start_dead()
        check_outcome(rig, client, txid, keys, task.result)


def test_all_coordinators_lose_their_power() -> None:
    with TxnRig(8) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        stalled = rig.arm(rig.coordinators, "coordinator logged decision", lambda process: 30.0)
        txid = client.txid()
        task = client.clerk.spawn(client.commit(txid, rig.part(dict.fromkeys(keys, b"new"))))
        rig.wait_until(lambda: len(stalled) == 1, "it is decided")
        for process in rig.coordinators.processes:
            process.lose_power()
        rig.sleep(1.0)
        rig.start_dead()
        rig.finish(task, 30.0)
        assert check_outcome(rig, client, txid, keys, task.result) is State.COMMITTED


def test_a_leader_that_was_cut_off_decides_nothing() -> None:
    with TxnRig(9) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        leader = rig.leader(rig.coordinators)
        rest = [host for host in rig.coordinators.hosts if host != leader.host]
        stalled = rig.arm(rig.coordinators, "coordinator got all votes", lambda process: 0.5)
        txid = client.txid()
        task = client.clerk.spawn(client.commit(txid, rig.part(dict.fromkeys(keys, b"new"))))
        rig.wait_until(lambda: len(stalled) == 1, "all votes are there")
        rig.cut([leader.host], rest)
        rig.wait_until(lambda: rig.coordinators.leader() not in (None, leader), "another one leads")
        rig.sleep(1.0)
        assert not [left for left in rig.locks_left() if left.startswith("g")]
        rig.heal()
        rig.finish(task, 30.0)
        assert check_outcome(rig, client, txid, keys, task.result) is State.ABORTED


# ---- resolve, doubt


def test_resolve_of_what_nobody_knows_is_an_abort_for_ever() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        parts = rig.part(dict.fromkeys(keys, b"new"))
        shards = [part[0] for part in parts]
        txid = client.txid()
        assert client.do(client.resolve(txid, shards)) is State.ABORTED
        assert isinstance(client.do(client.commit(txid, parts)), Aborted), "it comes too late"
        assert client.do(client.resolve(txid, shards)) is State.ABORTED
        gid = rig.group_of_shard(shards[0]).gid
        one_group = [part for part in parts if part[0] == shards[0]]
        assert isinstance(error_of(client.txn(gid, [TXN_COMMIT, txid, one_group]), client), Aborted)
        check_outcome(rig, client, txid, keys, None)


def test_resolve_finds_what_went_to_one_group() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        shard = shard_of(key, rig.shards)
        txid = client.txid()
        command = [TXN_COMMIT, txid, rig.part({key: b"new"})]
        assert client.do(client.txn(rig.group_of_shard(shard).gid, command)) == [0, [[shard, 1]]]
        assert client.do(client.status(txid)) is State.UNKNOWN
        assert client.do(client.resolve(txid, [shard])) is State.COMMITTED
        assert client.do(client.status(txid)) is State.COMMITTED
        rig.wait_clean(2.0)


@pytest.mark.parametrize("step", ["coordinator logged fence", "coordinator got all outcomes", "coordinator answered"])
@pytest.mark.parametrize("committed", [False, True])
def test_the_leader_dies_while_it_resolves(step: str, committed: bool) -> None:
    with TxnRig(2) as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        shard = shard_of(key, rig.shards)
        txid = client.txid()
        if committed:
            command = [TXN_COMMIT, txid, rig.part({key: b"new"})]
            client.do(client.txn(rig.group_of_shard(shard).gid, command))
        came = rig.crash_at(rig.coordinators, step)
        expected = State.COMMITTED if committed else State.ABORTED
        assert client.do(client.resolve(txid, [shard])) is expected
        assert len(came) == 1
        rig.wait_clean()
        assert client.do(client.status(txid)) is expected


def test_a_commit_under_way_is_resolved_by_its_own_outcome() -> None:
    with TxnRig() as rig:
        client, other = TxnClient(rig), TxnClient(rig)
        keys = rig.keys()
        parts = rig.part(dict.fromkeys(keys, b"new"))
        rig.arm(rig.coordinators, "coordinator got all votes", lambda process: 1.0)
        txid = client.txid()
        tasks: list[Task[Any]] = [client.clerk.spawn(client.commit(txid, parts))]
        rig.sleep(0.2)  # a question that comes before the commit is a fence, and aborts it
        tasks.append(other.clerk.spawn(other.resolve(txid, [part[0] for part in parts])))
        tasks.append(client.clerk.spawn(client.commit(txid, parts)))
        rig.sleep(0.2)
        assert client.do(client.status(txid)) is State.BEGUN
        rig.finish_all(tasks, 5.0)
        assert [task.result for task in tasks] == [State.COMMITTED] * 3
        check_outcome(rig, client, txid, keys, State.COMMITTED)


def test_a_group_in_doubt_asks() -> None:
    """Something was prepared in the name of the coordinators, of which they have no record."""
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        gid = rig.group_of_shard(shard_of(key, rig.shards)).gid
        txid = client.txid()
        command = [TXN_PREPARE, txid, COORDINATORS_GID, 1 << 20, rig.part({key: b"never"})]
        assert client.do(client.txn(gid, command)) == [0, 1]
        assert rig.locks_left()
        assert 2.0 < rig.wait_clean(10.0) < 7.0
        assert client.do(client.status(txid)) is State.ABORTED
        assert client.do(client.values([key])) == [None]


def test_doubt_about_what_is_known() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        rig.arm(rig.coordinators, "coordinator got all votes", lambda process: 0.5)
        begun, unknown = client.txid(), client.txid()
        task = client.clerk.spawn(client.commit(begun, rig.part(dict.fromkeys(keys, b"new"))))
        rig.sleep(0.2)
        doubt = [CoordinateOp.DOUBT, [begun, unknown]]
        assert client.do(client.surely(doubt)) == [[begun, State.BEGUN], [unknown, State.ABORTED]]
        rig.finish(task, 5.0)
        assert client.do(client.surely(doubt)) == [[begun, State.COMMITTED], [unknown, State.ABORTED]]


# ---- locks


def prepare(rig: TxnRig, client: TxnClient, key: bytes, value: bytes = b"prepared") -> tuple[bytes, int]:
    """A prepared transaction whose coordinators nobody knows: it stays until it is decided by hand."""
    gid = rig.group_of_shard(shard_of(key, rig.shards)).gid
    txid = client.txid()
    assert client.do(client.txn(gid, [TXN_PREPARE, txid, BOGUS, 1, rig.part({key: value})])) == [0, 1]
    return txid, gid


def decide(rig: TxnRig, client: TxnClient, key: bytes, txid: bytes, gid: int, commit: bool) -> None:
    states = client.do(client.txn(gid, [TXN_DECIDE, txid, commit, [shard_of(key, rig.shards)]]))
    assert states[1][0][1] == int(commit)


def test_plain_operations_wait_for_a_lock_and_see_what_it_leaves() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        txid, gid = prepare(rig, client, key)
        readers = [TxnClient(rig) for _ in range(2)]
        reads = [reader.clerk.spawn(reader.values([key])) for reader in readers]
        check = client.clerk.spawn(client.read(ReadOp.CHECK, shard_of(key, rig.shards), [key]))
        scan = client.clerk.spawn(client.read(ReadOp.SCAN, shard_of(key, rig.shards), b"", None, 10, 1000))
        write = client.clerk.spawn(client.clerk.kv.put(key, b"later", if_version=1))
        rig.sleep(0.2)
        assert not any(task.done for task in (*reads, check, scan, write))
        leader = rig.leader(rig.group_of_shard(shard_of(key, rig.shards)))
        assert leader.daemon is not None and leader.daemon.status()["waiting_for_locks"] == 5
        decide(rig, client, key, txid, gid, True)
        rig.finish_all([*reads, check, scan, write], 0.2)
        assert [task.result for task in reads] == [[b"prepared"]] * 2
        assert check.result == [1] and scan.result == [[[key, b"prepared", 1]], False]
        assert write.result == 2
        assert leader.daemon.status()["waiting_for_locks"] == 0


def test_a_commit_at_one_group_waits_for_the_decision_on_the_one_before() -> None:
    """A client that has been told that its transaction is committed begins the next before every group has heard so."""
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        number = shard_of(key, rig.shards)
        writing, reading = rig.part({key: b"1"}), rig.part({}, {key: 2})
        for parts, before_commits in ((writing, True), (reading, False), (writing, None)):
            txid, gid = prepare(rig, client, key)
            task = client.clerk.spawn(client.txn(gid, [TXN_COMMIT, client.txid(), parts]))
            rig.sleep(LOCK_WAIT_S_MAX / 2)
            assert not task.done
            if before_commits is None:
                rig.finish_all([task], LOCK_WAIT_S_MAX + 0.2)
                assert isinstance(task.error, Conflict) and task.error.keys == [key]
            else:
                decide(rig, client, key, txid, gid, before_commits)
                rig.finish(task, 0.2)
                assert task.result == [0, [[number, 2]]]


def test_writers_go_on_in_the_order_in_which_they_came() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        txid, gid = prepare(rig, client, key)
        writers = [TxnClient(rig) for _ in range(5)]
        tasks = []
        for number, writer in enumerate(writers):
            tasks.append(writer.clerk.spawn(writer.clerk.kv.append(key, b"%d" % number)))
            rig.sleep(0.05)
        decide(rig, client, key, txid, gid, False)
        rig.finish_all(tasks, 1.0)
        assert client.do(client.values([key])) == [b"01234"]


def test_whoever_has_waited_long_enough_is_told() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        txid, gid = prepare(rig, client, key)
        leader = rig.leader(rig.group_of_shard(shard_of(key, rig.shards)))
        raw = Raw(client.clerk, leader)
        shard = shard_of(key, rig.shards)
        read = client.clerk.spawn(raw.request(Verb.READ, [1, 0, ReadOp.GET, shard, key]))
        command = raw.command(1, key, b"v", None, stamp_ms=rig.controllers_machine().map_time_ms)
        write = client.clerk.spawn(raw.write(command))
        rig.finish_all([read, write], LOCK_WAIT_S_MAX + 0.2)
        for task in (read, write):
            assert isinstance(task.error, Locked) and task.error.txn == txid
            assert task.ended_s is not None and task.ended_s - task.started_s > LOCK_WAIT_S_MAX - 0.1
        decide(rig, client, key, txid, gid, False)
        assert client.do(raw.write(command)) == [0, 1], "the refusal was not the request's last answer"


def test_there_is_a_bound_on_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_waits, "WAITING_MAX", 3)
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        prepare(rig, client, key)
        raw = Raw(client.clerk, rig.leader(rig.group_of_shard(shard_of(key, rig.shards))))
        client.do(raw.open())
        body = [1, 0, ReadOp.GET, shard_of(key, rig.shards), key]
        tasks = [client.clerk.spawn(raw.request(Verb.READ, body)) for _ in range(5)]
        rig.sleep(0.2)
        assert [task.done for task in tasks] == [False, False, False, True, True]


def test_a_new_leader_knows_nobody_who_waits() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        group = rig.group_of_shard(shard_of(key, rig.shards))
        prepare(rig, client, key)
        leader = rig.leader(group)
        raw = Raw(client.clerk, leader)
        read = client.clerk.spawn(raw.request(Verb.READ, [1, 0, ReadOp.GET, shard_of(key, rig.shards), key]))
        rig.sleep(0.2)
        assert not read.done
        client.do(raw.request(Verb.TRANSFER, [-1]))
        rig.finish_all([read], 2.0)
        assert isinstance(read.error, Locked)


# ---- explicit locks


def test_an_explicit_lock_ends_some_seconds_after_its_client() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        shard = shard_of(key, rig.shards)
        gid = rig.group_of_shard(shard).gid
        rig.sleep(50.0)  # the group's map time is old
        txid = client.txid()
        assert client.do(client.txn(gid, [TXN_LOCK, txid, txid, shard, [key]])) == [0, [0]]
        assert client.do(client.values([key])) == [None], "plain reads pass"
        for _ in range(8):
            rig.sleep(LOCK_MS / 3_000)
            assert client.do(client.txn(gid, [TXN_BEAT, txid, [shard]]))[0] == 0, "it lives as long as it beats"
        began = rig.now
        put = client.clerk.spawn(client.clerk.kv.put(key, b"at last"))
        rig.finish(put, 30.0)
        assert LOCK_MS - 2_000 < 1_000 * (rig.now - began) < LOCK_MS + 6_000
        assert isinstance(error_of(client.txn(gid, [TXN_BEAT, txid, [shard]]), client), Aborted)
        leader = rig.leader(rig.group_of_shard(shard))
        assert shards_of(leader).explicit_locks == 0


def test_a_new_leader_gives_locks_when_it_knows_the_time() -> None:
    """Else they would end at once when it hears it: what the group has logged of it is old."""
    with TxnRig() as rig:
        client = TxnClient(rig)
        key = rig.keys(1)[0]
        shard = shard_of(key, rig.shards)
        group = rig.group_of_shard(shard)
        rig.sleep(50.0)
        txid = client.txid()
        for process in [rig.leader(group), *rig.cluster.groups[0].processes]:
            process.kill()
        rig.sleep(3.0)
        lock = [TXN_LOCK, txid, txid, shard, [key]]
        assert "by which time a lock ends" in str(error_of(client.txn(group.gid, lock), client))
        rig.start_dead()

        async def until_given() -> Any:
            while True:
                try:
                    return await client.txn(group.gid, lock)
                except Unavailable:
                    await asyncio.sleep(0.05)

        assert client.do(until_given()) == [0, [0]]
        for _ in range(3):
            rig.sleep(LOCK_MS / 2_500)
            assert client.do(client.txn(group.gid, [TXN_BEAT, txid, [shard]]))[0] == 0


def test_whoever_asks_for_a_held_lock_waits() -> None:
    with TxnRig() as rig:
        client, other = TxnClient(rig), TxnClient(rig)
        key = rig.keys(1)[0]
        shard = shard_of(key, rig.shards)
        gid = rig.group_of_shard(shard).gid
        old, young = client.txid(age_ms=100), client.txid()
        client.do(client.txn(gid, [TXN_LOCK, old, old, shard, [key]]))
        task = other.clerk.spawn(other.txn(gid, [TXN_LOCK, young, young, shard, [key]]))
        rig.sleep(0.2)
        assert not task.done
        client.do(client.txn(gid, [TXN_COMMIT, old, rig.part({key: b"old"})]))
        rig.finish(task, 0.2)
        assert task.result == [0, [1]]
        again = client.txid(age_ms=50)
        assert client.do(client.txn(gid, [TXN_LOCK, again, again, shard, [key]])) == [0, [1]], "it is older: it wounds"
        assert isinstance(error_of(client.txn(gid, [TXN_COMMIT, young, rig.part({key: b"y"})]), client), Aborted)


# ---- shards on their way


def test_a_group_refuses_what_it_does_not_serve() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        one, two = rig.keys()
        gid = rig.group_of_shard(shard_of(one, rig.shards)).gid
        txid = client.txid()
        for command in (
            [TXN_COMMIT, txid, rig.part({one: b"1", two: b"2"})],
            [TXN_PREPARE, txid, 1, 1, rig.part({two: b"2"})],
            [TXN_LOCK, txid, txid, shard_of(two, rig.shards), [two]],
            [TXN_BEAT, txid, [shard_of(two, rig.shards)]],
            [TXN_DECIDE, txid, False, [shard_of(two, rig.shards)]],
        ):
            error = error_of(client.txn(gid, command), client)
            assert isinstance(error, WrongGroup), command
        both = [shard_of(one, rig.shards), shard_of(two, rig.shards)]
        assert client.do(client.txn(gid, [TXN_DECIDE, txid, False, both])) == [0, [[both[0], 0, 0], [both[1], -1, 0]]]
        for bad in ([1, 2], ["x"], [TXN_COMMIT, txid], [99, txid]):
            assert isinstance(error_of(client.txn(gid, bad), client), BadRequest)


@pytest.mark.parametrize(
    "step", ["coordinator logged begin", "coordinator got all votes", "coordinator logged decision"]
)
def test_a_shard_moves_in_the_midst_of_it(step: str) -> None:
    with TxnRig(11) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        shard = shard_of(keys[0], rig.shards)
        to = rig.group_of_shard(shard_of(keys[1], rig.shards)).gid
        stalled = rig.arm(rig.coordinators, step, lambda process: 3.0)
        txid = client.txid()
        task = client.clerk.spawn(client.commit(txid, rig.part(dict.fromkeys(keys, b"new"))))
        rig.wait_until(lambda: len(stalled) == 1, step)
        client.do(client.clerk.controllers.move(shard, to))
        leader = rig.leader(next(group for group in rig.cluster.serving_groups if group.gid == to))
        rig.wait_until(lambda: shards_of(leader).serves(shard), "it has moved")
        rig.finish(task, 10.0)
        assert check_outcome(rig, client, txid, keys, task.result) is State.COMMITTED


def test_a_group_leaves_with_something_prepared_and_the_leader_dies() -> None:
    """It is resolved where the shards went, or at the group that has left."""
    with TxnRig(12) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        leaving = rig.group_of_shard(shard_of(keys[0], rig.shards)).gid
        stalled = rig.arm(rig.coordinators, "coordinator got all votes", lambda process: 60.0)
        txid = client.txid()
        task = client.clerk.spawn(client.commit(txid, rig.part(dict.fromkeys(keys, b"new"))))
        rig.wait_until(lambda: len(stalled) == 1, "all votes are there")
        client.do(client.clerk.controllers.leave([leaving]))
        leader = rig.leader(rig.coordinators)
        leader.kill()
        rig.sleep(0.2)
        rig.start_dead()
        rig.finish(task, 30.0)
        assert check_outcome(rig, client, txid, keys, task.result) is State.ABORTED


def test_shards_that_were_given_up_need_no_word() -> None:
    with TxnRig(14) as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        stalled = rig.arm(rig.coordinators, "coordinator got all votes", lambda process: 1.0)
        task = client.clerk.spawn(client.commit(client.txid(), rig.part(dict.fromkeys(keys, b"new"))))
        rig.wait_until(lambda: len(stalled) == 1, "all votes are there")
        for group in rig.cluster.serving_groups:
            for process in group.processes:
                process.kill()
        rig.finish(task, 5.0)
        assert task.result is State.COMMITTED
        rig.sleep(5.0)
        assert len(rig.locks_left()) == 3, "each coordinator has it open"
        gids = [group.gid for group in rig.cluster.serving_groups]
        client.do(client.clerk.controllers.leave(gids, force=True))
        rig.wait_clean(5.0)


def test_coordinators_that_start_before_there_is_a_map() -> None:
    with TxnRig(13, join=False) as rig:
        client = TxnClient(rig)
        assert isinstance(client.do(client.commit(client.txid(), [[0, [], [[b"k", b"v"]]]])), BadRequest)
        rig.join({group.gid: list(group.addresses.values()) for group in rig.cluster.serving_groups})
        keys = rig.keys()
        assert client.do(client.commit(client.txid(), rig.part(dict.fromkeys(keys, b"v")))) is State.COMMITTED


# ---- limits


def test_a_bound_on_what_is_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "OPEN_MAX", 2)
    with TxnRig() as rig:
        client = TxnClient(rig)
        rig.arm(rig.coordinators, "coordinator got all votes", lambda process: 1.0, times=100)
        tasks = []
        for number in range(5):
            keys = rig.keys(prefix=b"%d-" % number)
            tasks.append(client.clerk.spawn(client.commit(client.txid(), rig.part(dict.fromkeys(keys, b"v")))))
        rig.sleep(0.5)
        leader = rig.leader(rig.coordinators)
        assert leader.daemon is not None and leader.daemon.status()["in_progress"] == 2
        rig.finish_all(tasks, 20.0)
        assert all(task.result is State.COMMITTED for task in tasks), "the others were told to come again"


def test_nothing_is_left_of_a_thousand_transactions() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)

        async def many() -> int:
            committed = 0
            for turn in range(20):
                keys = [rig.keys(prefix=b"%d-%d-" % (turn, n)) for n in range(50)]
                works = [client.commit(client.txid(), rig.part(dict.fromkeys(pair, b"v"))) for pair in keys]
                committed += sum(state is State.COMMITTED for state in await asyncio.gather(*works))
            return committed

        assert client.do(many(), 120.0) == 1000
        rig.wait_clean(3.0)
        leader = rig.leader(rig.coordinators)
        assert leader.daemon is not None
        driver: Any = leader.daemon._role._transactions  # type: ignore[union-attr]
        assert not driver._works and not driver._ended and driver._size_bytes == 0
        assert len(driver._running) == 1, "the one that logs the ends"
        assert len(leader.daemon._tasks._tasks) < 5


def test_a_leader_that_steps_down_says_so() -> None:
    with TxnRig() as rig:
        client = TxnClient(rig)
        keys = rig.keys()
        stalled = rig.arm(rig.coordinators, "coordinator got all votes", lambda process: 20.0)
        leader = rig.leader(rig.coordinators)
        raw = Raw(client.clerk, leader)
        body = [CoordinateOp.COMMIT, client.txid(), rig.part(dict.fromkeys(keys, b"new"))]
        task = client.clerk.spawn(raw.request(Verb.COORDINATE, body))
        rig.wait_until(lambda: len(stalled) == 1, "all votes are there")
        client.do(raw.request(Verb.TRANSFER, [-1]))
        rig.finish_all([task], 2.0)
        assert task.error is not None and not task.error.definite and not isinstance(task.error, Unavailable)
        rig.wait_clean()
