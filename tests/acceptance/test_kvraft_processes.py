"""The key-value scenarios of the course on real processes, behind the fault proxy: part of `make soak`.

The scenarios are those of test_kvraft and test_kvsrv; real_rig says what network, time and limits are here. One group
serves, one controller that nothing ever happens to hands out the map.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.kv_rows import Appender, Record, Row, Scale, User, VersionedPutter, work_row
from tests.acceptance.real_rig import RealRig
from tests.acceptance.rigs import NO_LIMIT
from tests.acceptance.test_kvraft import (
    ROWS,
    no_read_from_the_old_leader,
    one_partition,
    one_partition_versioned,
    snapshot_rpc,
    snapshot_size,
    speed,
    unreliable_one_key,
)
from tests.acceptance.test_kvsrv import ROWS as SINGLE_SERVER_ROWS
from tests.acceptance.test_kvsrv import append_shows_what_was_there, lock, put_concurrent, unreliable_one_key_2

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]

SCALE = Scale(3, 5.0, 2000)
SCALE_2025 = Scale(3, 1.0, 600)
SCALE_SINGLE_SERVER = Scale(3, 1.0, 600)

rows = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
single_server_rows = pytest.mark.parametrize("row", SINGLE_SERVER_ROWS, ids=[row.name for row in SINGLE_SERVER_ROWS])
both_networks = pytest.mark.parametrize("unreliable", [False, True], ids=["reliable", "unreliable"])


def run_row(row: Row, scale: Scale, kind: type[User], folder: Path, record: Record) -> None:
    with RealRig(row.servers, folder, unreliable=row.unreliable, max_raft_state=row.max_raft_state) as rig:
        work_row(rig, row, scale, kind, record)
        record("longest operation", rig.recorder.longest_s)
        if row.unreliable:
            assert rig.network.counts["reset"], "nothing was wrong with the network"
        rig.calm()  # a replica is asked but once for what it holds
        rig.wait_equal()


@rows
def test_kvraft(row: Row, tmp_path: Path, record_property: Record) -> None:
    run_row(row, SCALE, Appender, tmp_path, record_property)


@rows
def test_kvraft_versioned(row: Row, tmp_path: Path, record_property: Record) -> None:
    run_row(row, SCALE_2025, VersionedPutter, tmp_path, record_property)


@pytest.mark.parametrize("max_raft_state", [NO_LIMIT, 1000], ids=["4a", "4b"])
@pytest.mark.parametrize("versioned", [False, True], ids=["appends", "versioned"])
def test_speed(max_raft_state: int, versioned: bool, tmp_path: Path, record_property: Record) -> None:
    with RealRig(3, tmp_path, max_raft_state=max_raft_state) as rig:
        speed(rig, 1000, versioned, record_property)


def test_unreliable_one_key_4a(tmp_path: Path) -> None:
    with RealRig(3, tmp_path, unreliable=True) as rig:
        unreliable_one_key(rig)


def test_one_partition_4a(tmp_path: Path, record_property: Record) -> None:
    with RealRig(5, tmp_path) as rig:
        one_partition(rig, record_property)


def test_one_partition_no_read_from_the_old_leader_4a(tmp_path: Path) -> None:
    with RealRig(5, tmp_path) as rig:
        no_read_from_the_old_leader(rig)


def test_one_partition_versioned_4b(tmp_path: Path) -> None:
    with RealRig(5, tmp_path) as rig:
        one_partition_versioned(rig)


@pytest.mark.parametrize("versioned", [False, True], ids=["puts", "versioned"])
def test_snapshot_rpc_4b(versioned: bool, tmp_path: Path, record_property: Record) -> None:
    with RealRig(3, tmp_path, max_raft_state=1000) as rig:
        snapshot_rpc(rig, versioned, record_property)


@pytest.mark.parametrize("versioned", [False, True], ids=["puts", "versioned"])
def test_snapshot_size_4b(versioned: bool, tmp_path: Path, record_property: Record) -> None:
    with RealRig(3, tmp_path, max_raft_state=1000, shards=1) as rig:
        snapshot_size(rig, versioned, record_property)


# ---- one server


@single_server_rows
def test_kvsrv(row: Row, tmp_path: Path, record_property: Record) -> None:
    run_row(row, SCALE_SINGLE_SERVER, Appender, tmp_path, record_property)


@single_server_rows
def test_append_shows_what_was_there(row: Row, tmp_path: Path) -> None:
    with RealRig(1, tmp_path, unreliable=row.unreliable) as rig:
        append_shows_what_was_there(rig, row)


def test_unreliable_one_key_2(tmp_path: Path) -> None:
    with RealRig(1, tmp_path, unreliable=True) as rig:
        unreliable_one_key_2(rig)


@both_networks
def test_put_concurrent(unreliable: bool, tmp_path: Path, record_property: Record) -> None:
    with RealRig(1, tmp_path, unreliable=unreliable) as rig:
        put_concurrent(rig, 3.0 if unreliable else 1.0, record_property)


def test_unreliable_net(tmp_path: Path, record_property: Record) -> None:
    """100 puts, each done exactly once although many a connection broke under them."""
    with RealRig(1, tmp_path, unreliable=True) as rig:
        clerk = rig.clerk()

        async def main() -> None:
            for number in range(100):
                assert await clerk.put(b"k", b"%d" % number, number) == number + 1

        clerk.do(main(), 100)
        assert clerk.do(clerk.get(b"k")) == (b"99", 100)
        resets = rig.network.counts["reset"]
        record_property("resets", resets)
        assert resets >= 5, "the network is too good"


@both_networks
@pytest.mark.parametrize("locks", [1, 2], ids=["one_lock", "two_nested"])
@pytest.mark.parametrize("clients", [1, 10])
def test_lock(clients: int, unreliable: bool, locks: int, tmp_path: Path, record_property: Record) -> None:
    with RealRig(1, tmp_path, unreliable=unreliable) as rig:
        lock(rig, clients, unreliable, locks, record_property)
