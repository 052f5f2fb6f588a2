"""The key-value scenarios of the course (2024: appends and puts; 2025: versioned puts) on simulated daemons.

Each of the 17 generic rows runs in both manners. In every run one iteration is short and clerks think much between
their operations; the long runs have the course's three iterations of 5 s (2025: 1 s), and clerks think just so much
that a row has some thousands of operations. All histories are checked; undecided is a failure.
"""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from raftkv.protocol.errors import VersionMismatch
from raftkv.protocol.messages import ReadOp, Verb
from tests.acceptance.kv_rig import Rig, seeds
from tests.acceptance.kv_rows import STATE_FACTOR, Appender, Record, Row, Scale, VersionedPutter, run_row, scales
from tests.acceptance.rigs import ELECTION_TIMEOUT_S, NO_LIMIT, BaseClerk, BaseRig, Raw, Task

P = TypeVar("P")

ROWS = (
    Row("basic_4a", 1, 5),
    Row("concurrent_4a", 5, 5),
    Row("unreliable_4a", 5, 5, unreliable=True),
    Row("many_partitions_one_client_4a", 1, 5, partitions=True),
    Row("many_partitions_many_clients_4a", 5, 5, partitions=True),
    Row("persist_one_client_4a", 1, 5, restarts=True),
    Row("persist_concurrent_4a", 5, 5, restarts=True),
    Row("persist_concurrent_unreliable_4a", 5, 5, unreliable=True, restarts=True),
    Row("persist_partition_4a", 5, 5, restarts=True, partitions=True),
    Row("persist_partition_unreliable_4a", 5, 5, unreliable=True, restarts=True, partitions=True),
    Row("persist_partition_unreliable_linearizable_4a", 15, 7, True, True, True, random_keys=True),
    Row("snapshot_recover_4b", 1, 5, restarts=True, max_raft_state=1000),
    Row("snapshot_recover_many_clients_4b", 20, 5, restarts=True, max_raft_state=1000),
    Row("snapshot_unreliable_4b", 5, 5, unreliable=True, max_raft_state=1000),
    Row("snapshot_unreliable_recover_4b", 5, 5, unreliable=True, restarts=True, max_raft_state=1000),
    Row("snapshot_unreliable_recover_concurrent_partition_4b", 5, 5, True, True, True, 1000),
    Row("snapshot_unreliable_recover_concurrent_partition_linearizable_4b", 15, 7, True, True, True, 1000, True),
)

QUICK = Scale(1, 2.0, 120)
LONG = Scale(3, 5.0, 4000)
QUICK_2025 = Scale(1, 1.0, 120)
LONG_2025 = Scale(3, 1.0, 2400)

SPEED_S_PER_OPERATION = 0.0333
SNAPSHOT_BYTES_MAX = 500

rows = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


@rows
@scales(QUICK, LONG)
@seeds(1, 1)
def test_kvraft(row: Row, scale: Scale, seed: int, record_property: Record) -> None:
    run_row(row, scale, Appender, seed, record_property)


@rows
@scales(QUICK_2025, LONG_2025)
@seeds(1, 1)
def test_kvraft_versioned(row: Row, scale: Scale, seed: int, record_property: Record) -> None:
    run_row(row, scale, VersionedPutter, seed, record_property)


# ---- the others


def speed(rig: BaseRig[P], operations: int, versioned: bool, record: Record) -> None:
    clerk = rig.clerk()

    async def main() -> None:
        version = 0
        for number in range(operations):
            token = b"x 0 %d y" % number
            version = await (clerk.put(b"k", token, version) if versioned else clerk.append(b"k", token))
        found = await clerk.get(b"k")
        assert found is not None
        assert found.version == version == operations
        if not versioned:
            assert found.value == b"".join(b"x 0 %d y" % number for number in range(operations))

    task = clerk.spawn(main())
    rig.finish(task, operations * SPEED_S_PER_OPERATION)
    assert task.ended_s is not None
    record("ms per operation", 1000 * (task.ended_s - task.started_s) / operations)


@pytest.mark.parametrize("max_raft_state", [NO_LIMIT, 1000], ids=["4a", "4b"])
@pytest.mark.parametrize("versioned", [False, True], ids=["appends", "versioned"])
@pytest.mark.parametrize(
    "operations", [pytest.param(200, id="quick"), pytest.param(1000, id="long", marks=pytest.mark.long)]
)
def test_speed(max_raft_state: int, versioned: bool, operations: int, record_property: Record) -> None:
    with Rig(3, 0, max_raft_state=max_raft_state) as rig:
        speed(rig, operations, versioned, record_property)


def unreliable_one_key(rig: BaseRig[P]) -> None:
    clerks = rig.clerks_of(5)

    async def append_ten(clerk: BaseClerk) -> None:
        for number in range(10):
            await clerk.append(b"k", b"x %d %d y" % (clerk.number, number))

    tasks = [clerk.spawn(append_ten(clerk)) for clerk in clerks]
    rig.finish_all(tasks, 60)
    found = clerks[0].do(clerks[0].get(b"k"))
    assert found is not None
    tokens = found.value.removesuffix(b"y").split(b"y")
    assert len(tokens) == 50
    for clerk in clerks:
        mine = [token for token in tokens if token.startswith(b"x %d " % clerk.number)]
        assert mine == [b"x %d %d " % (clerk.number, number) for number in range(10)]


@seeds(3, 20)
def test_unreliable_one_key_4a(seed: int) -> None:
    with Rig(3, seed, unreliable=True) as rig:
        unreliable_one_key(rig)


def split_around_leader(rig: BaseRig[P]) -> tuple[BaseClerk, BaseClerk, BaseClerk]:
    """The leader and one more on one side with two clerks, three servers and a clerk on the other."""
    leader = rig.leader()
    others = [process for process in rig.servers if process is not leader]
    minority, majority = [leader, others[0]], others[1:]
    p1, p2a, p2b = rig.clerks_of(3)
    for clerk in (p1, p2a, p2b):
        clerk.do(clerk.get(b"1"))  # it knows the map, and the leader
    left = [*rig.hosts_of(majority), p1.host]
    rig.cut(left, [*rig.hosts_of(minority), p2a.host, p2b.host])
    return p1, p2a, p2b


def check_pending(rig: BaseRig[P], *tasks: Task[Any]) -> None:
    assert not any(task.done for task in tasks), f"seed {rig.seed}: answered in a minority"


def one_partition(rig: BaseRig[P], record: Record) -> None:
    """A Get in the minority, which the course forgot to check, must not end before the heal, and within 3 s of it."""
    first = rig.clerk()
    first.do(first.put(b"1", b"13"))
    p1, p2a, p2b = split_around_leader(rig)
    p1.do(p1.put(b"1", b"14"))
    value = p1.do(p1.get(b"1"))
    assert value is not None and value.value == b"14"

    put = p2a.spawn(p2a.put(b"1", b"15"))
    get = p2b.spawn(p2b.get(b"1"))
    rig.sleep(1.0)
    check_pending(rig, put, get)
    for expected in (b"14", b"16"):
        if expected == b"16":
            p1.do(p1.put(b"1", b"16"))
        value = p1.do(p1.get(b"1"))
        assert value is not None and value.value == expected
    check_pending(rig, put, get)

    rig.heal()
    healed_s = rig.now
    rig.sleep(ELECTION_TIMEOUT_S)
    rig.finish_all([put, get], 3.0)
    assert get.result is not None and get.result.value in (b"15", b"16")
    final = p1.do(p1.get(b"1"))
    assert final is not None and final.value == b"15"
    assert put.ended_s is not None and get.ended_s is not None
    record("put ended after", put.ended_s - healed_s)
    record("get ended after", get.ended_s - healed_s)


@seeds(3, 20)
def test_one_partition_4a(seed: int, record_property: Record) -> None:
    with Rig(5, seed) as rig:
        one_partition(rig, record_property)


def no_read_from_the_old_leader(rig: BaseRig[P]) -> None:
    """From the cut on it answers no Get: not while it still believes that it leads, nor after."""
    leader = rig.leader()
    p1, p2a, _ = split_around_leader(rig)
    p1_put = p1.spawn(p1.put(b"1", b"14"))
    raw = Raw(p2a, leader, timeout_s=30)
    p2a.do(raw.open())
    read = [1, 0, ReadOp.GET, *raw.command(0, b"1")[1:2], b"1"]
    reads = []
    for _ in range(200):
        reads.append(p2a.spawn(raw.request(Verb.READ, read)))
        rig.sleep(0.02)
    assert rig.finish(p1_put, 1.0) > 0, "the majority has gone on"
    answered = [task for task in reads if task.done and task.error is None]
    assert not answered, f"seed {rig.seed}: {answered[0].result} {answered[0].ended_s}"
    rig.heal()
    rig.finish_all(reads, 3.0)


@seeds(3, 20)
def test_one_partition_no_read_from_the_old_leader_4a(seed: int) -> None:
    with Rig(5, seed) as rig:
        no_read_from_the_old_leader(rig)


def one_partition_versioned(rig: BaseRig[P]) -> None:
    """2025: the minority's conditional put comes too late, and is told so."""
    first = rig.clerk()
    version = first.do(first.put(b"1", b"13", 0))
    p1, p2a, p2b = split_around_leader(rig)
    version = p1.do(p1.put(b"1", b"14", version))
    put = p2a.spawn(p2a.put(b"1", b"15", version))
    get = p2b.spawn(p2b.get(b"1"))
    rig.sleep(1.0)
    check_pending(rig, put, get)
    latest = p1.do(p1.put(b"1", b"16", version))
    check_pending(rig, put, get)
    rig.heal()
    rig.sleep(ELECTION_TIMEOUT_S)
    rig.finish_all([put, get], 3.0)
    assert isinstance(put.error, VersionMismatch) and put.error.version == latest
    assert get.result is not None and get.result.value == b"16"
    final = p1.do(p1.get(b"1"))
    assert final is not None and final == (b"16", latest)


@seeds(3, 20)
def test_one_partition_versioned_4b(seed: int) -> None:
    with Rig(5, seed) as rig:
        one_partition_versioned(rig)


def padded(number: int) -> bytes:
    """So large that fifty don't fit into the log that is kept for a follower which is behind."""
    return b"%0100d" % number


def snapshot_rpc(rig: BaseRig[P], versioned: bool, record: Record) -> None:
    clerk = rig.clerk()
    known: dict[bytes, int] = {}

    def put(key: bytes, value: bytes) -> None:
        known[key] = clerk.do(clerk.put(key, value, known.get(key, 0) if versioned else None))

    def check(key: bytes, value: bytes) -> None:
        found = clerk.do(clerk.get(key))
        assert found is not None and found == (value, known[key])

    put(b"a", b"A")
    check(b"a", b"A")
    s0, s1, s2 = rig.servers
    clerks = [clerk.host for clerk in rig.clerks]
    rig.cut([rig.host_of(s0), rig.host_of(s1), *clerks], [rig.host_of(s2)])
    for number in range(50):
        put(b"%d" % number, padded(number))
    rig.sleep(ELECTION_TIMEOUT_S)
    put(b"b", b"B")
    largest = max(rig.state_bytes(s0), rig.state_bytes(s1))
    assert largest <= STATE_FACTOR * 1000, "the log is not cut while a server is away"

    rig.lose_segments_of(s2)
    rig.heal()
    # Now the one that was away is needed for the quorum.
    rig.cut([rig.host_of(s0), rig.host_of(s2), *clerks], [rig.host_of(s1)])
    put(b"c", b"C")
    put(b"d", b"D")
    for key, value in ((b"a", b"A"), (b"b", b"B"), (b"c", b"C"), (b"d", b"D")):
        check(key, value)
    check(b"1", padded(1))
    check(b"49", padded(49))
    assert rig.snapshots_installed(s2) >= 1, "it can't have caught up from the log"

    rig.heal()
    put(b"e", b"E")
    for key, value in ((b"c", b"C"), (b"e", b"E"), (b"1", padded(1))):
        check(key, value)
    rig.wait_equal()
    largest = max(largest, rig.raft_state_max())
    assert largest <= STATE_FACTOR * 1000
    record("raft state", largest)


@pytest.mark.parametrize("versioned", [False, True], ids=["puts", "versioned"])
@seeds(2, 10)
def test_snapshot_rpc_4b(seed: int, versioned: bool, record_property: Record) -> None:
    with Rig(3, seed, max_raft_state=1000) as rig:
        snapshot_rpc(rig, versioned, record_property)


def snapshot_size(rig: BaseRig[P], versioned: bool, record: Record) -> None:
    """One shard, as the course's service has: each shard has a row of its own."""
    clerk = rig.clerk()

    async def main() -> None:
        version = 0
        for _ in range(200):
            for value in (b"0", b"1"):
                version = await clerk.put(b"x", value, version if versioned else None)
                found = await clerk.get(b"x")
                assert found == (value, version)

    clerk.do(main(), 60)
    rig.wait_equal()
    largest = rig.raft_state_max()
    snapshot = max(rig.snapshot_bytes(process) for process in rig.servers)
    record("raft state", largest)
    record("snapshot", snapshot)
    assert largest <= STATE_FACTOR * 1000
    assert snapshot <= SNAPSHOT_BYTES_MAX
    assert all(rig.snapshots_made(process) for process in rig.servers)


@pytest.mark.parametrize("versioned", [False, True], ids=["puts", "versioned"])
def test_snapshot_size_4b(versioned: bool, record_property: Record) -> None:
    with Rig(3, 0, max_raft_state=1000, shards=1) as rig:
        snapshot_size(rig, versioned, record_property)
