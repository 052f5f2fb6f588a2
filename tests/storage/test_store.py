"""One data directory: whose it is, what it holds together, what it refuses."""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from raftkv.raft.actions import HardState
from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership
from raftkv.storage.boot import Applied
from raftkv.storage.checkpoint import MAGIC, Checkpoint, Manifest, Part
from raftkv.storage.disk import OsDisk
from raftkv.storage.errors import (
    Corruption,
    DirectoryDamaged,
    DirectoryInUse,
    DiskFailed,
    EngineUnreadable,
    FormatTooNew,
    NotADataDirectory,
    OtherCluster,
    OtherReplica,
    PeersChanged,
    SnapshotDamaged,
    StateLost,
    StorageError,
)
from raftkv.storage.identity import Identity
from raftkv.storage.rocks import RocksEngine
from raftkv.storage.store import APPLIED_KEY, Store
from tests.storage.fake_disk import UNBOUNDED_BYTES
from tests.storage.helpers import MEMBERS, entries, entry, run, settle
from tests.storage.store_helpers import IDENTITY, Machine, stream


@pytest.fixture
def machine() -> Machine:
    return Machine.make()


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) > 20
    return text


# -- life -------------------------------------------------------------------------------------------


def test_a_new_store_is_fresh_and_has_a_store_id_that_stays(machine: Machine) -> None:
    store = machine.open()
    assert store.is_fresh and store.membership is None and store.entries == []
    assert store.applied == Applied(0, 0, 0)
    assert len(store.identity.store_id) == 16
    store.close()
    again = machine.open()
    assert again.identity == store.identity and again.is_fresh


def test_two_directories_have_two_store_ids(machine: Machine) -> None:
    first = machine.open().identity.store_id
    assert replace(machine, directory="other").open().identity.store_id != first


def test_what_was_logged_and_applied_comes_back(machine: Machine) -> None:
    async def scenario() -> None:
        store = machine.open()
        await machine.form(store)
        assert not store.is_fresh
        await machine.append(store, HardState(1, 2), [])
        await machine.log_and_apply(store, 1, 9)

    run(scenario())
    machine.disk.power_loss()
    store = machine.open()
    machine.check(store)
    assert store.hard_state == HardState(1, 2) and store.membership == MEMBERS
    assert store.entries == entries(1, 9) and not store.is_fresh
    assert store.engine_membership == MEMBERS


def test_the_engine_knows_the_membership_at_its_index(machine: Machine) -> None:
    changed = Membership((1, 2))

    async def scenario() -> None:
        store = machine.open()
        await machine.form(store)
        await machine.log_and_apply(store, 1, 3)
        await machine.append(store, None, [entry(4)])
        machine.apply(store, [entry(4)], changed)
        assert await store.flush() == 4
        assert store.flushed == Applied(4, 1, 4)
        store.compact(3, 1, MEMBERS)
        await settle()
        with pytest.raises(AssertionError):
            store.compact(5, 1, changed)

    run(scenario())
    machine.disk.power_loss()
    store = machine.open()
    machine.check(store)
    assert (store.start_index, store.membership) == (3, MEMBERS)
    assert store.engine_membership == changed


def test_a_flush_promises_no_more_than_was_applied_when_it_began(machine: Machine) -> None:
    async def scenario() -> None:
        store = machine.open()
        await machine.form(store)
        await machine.log_and_apply(store, 1, 3)
        flushing = asyncio.ensure_future(store.flush())
        await asyncio.sleep(0)
        machine.apply(store, [entry(4)])
        assert await flushing == 3

    run(scenario())


# -- whose it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "error", "text"),
    [
        (replace(IDENTITY, role="controller", gid=0), OtherReplica, "belongs to a shardkv, not a controller"),
        (replace(IDENTITY, gid=101), OtherReplica, "belongs to group 100, not 101"),
        (replace(IDENTITY, replica=2), OtherReplica, "belongs to replica 1, not 2"),
        (replace(IDENTITY, peers=(1, 2, 3, 4)), PeersChanged, "replicas 1,2,3, not 1,2,3,4"),
        (replace(IDENTITY, cluster_id=b"\x02" * 16), OtherCluster, "cluster 0101"),
    ],
)
def test_the_directory_of_another_is_refused(
    machine: Machine, other: Identity, error: type[StorageError], text: str
) -> None:
    machine.open().set_cluster_id(b"\x01" * 16)
    machine.disk.kill()
    machine.identity = other
    with pytest.raises(error) as caught:
        machine.open()
    assert text in one_line(caught.value) and "data" in str(caught.value)
    machine.identity = IDENTITY
    assert machine.open().identity.cluster_id == b"\x01" * 16  # the refusal left the lock and the rest alone


def test_the_order_of_the_peers_does_not_matter(machine: Machine) -> None:
    machine.open().close()
    machine.identity = replace(IDENTITY, peers=(3, 1, 2))
    machine.open()


def test_a_cluster_id_is_adopted_once_and_durably(machine: Machine) -> None:
    store = machine.open()
    store.set_cluster_id(b"\x07" * 16)
    store.set_cluster_id(b"\x07" * 16)
    with pytest.raises(OtherCluster):
        store.set_cluster_id(b"\x08" * 16)
    machine.disk.power_loss()
    assert machine.open().identity.cluster_id == b"\x07" * 16


def test_a_cluster_id_given_at_the_start_is_kept(machine: Machine) -> None:
    machine.open().close()
    machine.identity = replace(IDENTITY, cluster_id=b"\x09" * 16)
    machine.open()
    machine.disk.power_loss()
    machine.identity = IDENTITY
    assert machine.open().identity.cluster_id == b"\x09" * 16


def test_a_directory_in_use_is_refused(machine: Machine) -> None:
    store = machine.open()
    with pytest.raises(DirectoryInUse) as caught:
        machine.open()
    assert "data directory data is in use" in one_line(caught.value)
    store.close()
    machine.open()


HOLDER = """
import sys, time
from raftkv.storage.disk import OsDisk
OsDisk().lock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_a_directory_held_by_another_process_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    directory = str(tmp_path / "data")
    Path(directory).mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, f"{directory}/LOCK"], stdout=subprocess.PIPE, text=True)
    disk = OsDisk()
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(DirectoryInUse, match=f"in use by process {holder.pid}"):
            Store.open(disk, directory, RocksEngine, IDENTITY)
    finally:
        holder.kill()
        holder.wait()
    store = Store.open(disk, directory, RocksEngine, IDENTITY, wal_segment_bytes=1 << 16)
    store.close()
    disk.close()


# -- what is missing or damaged ---------------------------------------------------------------------


async def used(machine: Machine, last: int = 20) -> None:
    store = machine.open()
    await machine.form(store)
    await machine.log_and_apply(store, 1, last)
    await store.flush()
    store.close()
    await settle()


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ("wal", Corruption, "the log is missing"),
        ("engine", DirectoryDamaged, "engine/1 is missing"),
        ("CURRENT", DirectoryDamaged, "CURRENT is missing"),
        ("identity", DirectoryDamaged, "it holds data but its identity is missing"),
        ("engine/1/STATE", StateLost, "the log starts after entry 15, the engine ends at 0"),
    ],
)
def test_a_directory_with_a_part_missing_is_refused(
    machine: Machine, path: str, error: type[StorageError], text: str
) -> None:
    async def scenario() -> None:
        await used(machine)
        store = machine.open()
        store.compact(15, 1, MEMBERS)
        await settle()
        store.close()

    run(scenario())
    machine.disk.remove_tree(f"data/{path}")
    machine.backing.unflushed.clear()
    for _ in range(2):
        with pytest.raises(error) as caught:
            machine.open()
        assert text in one_line(caught.value)


def test_an_empty_log_directory_is_a_missing_log(machine: Machine) -> None:
    run(used(machine))
    machine.disk.remove_tree("data/wal")
    machine.disk.make_directory("data/wal")
    with pytest.raises(Corruption, match="the log is missing"):
        machine.open()


@pytest.mark.parametrize(
    ("path", "offset", "error"),
    [
        ("identity", 9, Corruption),
        ("CURRENT", 0, StorageError),
        ("wal/000000000001.wal", 520, Corruption),
        ("engine/1/STATE", 30, EngineUnreadable),
    ],
)
def test_a_damaged_file_is_refused_by_name(machine: Machine, path: str, offset: int, error: type[StorageError]) -> None:
    run(used(machine))
    machine.disk.flip(f"data/{path}", offset, 6)
    with pytest.raises(error) as caught:
        machine.open()
    assert "data" in one_line(caught.value)
    machine.disk.flip(f"data/{path}", offset, 6)
    machine.check(machine.open())


def test_later_formats_are_refused(machine: Machine) -> None:
    run(used(machine))
    store = machine.open()
    row = store.engine.get(APPLIED_KEY)
    assert row is not None
    store.engine.write({APPLIED_KEY: b"\x02" + row[1:]})
    run(store.engine.flush())
    store.close()
    with pytest.raises(FormatTooNew, match="has format 2, this version reads up to 1"):
        machine.open()


def test_a_directory_with_strange_files_is_not_taken_for_a_new_one(machine: Machine) -> None:
    machine.disk.make_directory("data")
    machine.disk.write_durably("data/thesis.txt", b"years of work")
    with pytest.raises(NotADataDirectory, match=r"holds 'thesis\.txt' and is not a data directory"):
        machine.open()
    assert machine.disk.read("data/thesis.txt") == b"years of work"


@pytest.mark.parametrize("also_lost", ["", "wal", "engine"])
def test_a_lost_identity_is_not_taken_for_a_new_directory(machine: Machine, also_lost: str) -> None:
    run(used(machine, last=1))
    machine.disk.remove("data/identity")
    if also_lost:
        machine.disk.remove_tree(f"data/{also_lost}")
    for _ in range(2):
        with pytest.raises(DirectoryDamaged, match="it holds data but its identity is missing"):
            machine.open()


def test_the_root_of_a_file_system_is_a_new_directory(machine: Machine) -> None:
    machine.disk.make_directory("data/lost+found")
    assert machine.open().is_fresh
    assert machine.disk.exists("data/lost+found")


@pytest.mark.parametrize("capacity_bytes", [10, 600, 4000])
def test_a_full_disk_at_the_start_is_one_clear_line(capacity_bytes: int) -> None:
    machine = Machine.make()
    machine.disk.capacity_bytes = capacity_bytes
    with pytest.raises(StorageError) as caught:
        machine.open()
    assert "No space left on device" in one_line(caught.value)
    machine.disk.capacity_bytes = None
    assert machine.open().is_fresh


def test_a_directory_that_may_not_be_written_is_one_clear_line(machine: Machine) -> None:
    machine.disk.fail("make_directory", errno.EACCES)
    with pytest.raises(DiskFailed, match="Permission denied"):
        machine.open()


# -- snapshots --------------------------------------------------------------------------------------


async def checkpoint_of(machine: Machine, last: int = 12) -> tuple[Store, Checkpoint]:
    store = machine.open()
    await machine.form(store)
    await machine.log_and_apply(store, 1, last)
    return store, await store.make_checkpoint()


def other_machine(machine: Machine) -> Machine:
    return Machine(machine.disk, machine.backing, "other", replace(IDENTITY, replica=2))


def test_a_checkpoint_says_what_it_holds_and_can_be_read_in_any_pieces(machine: Machine) -> None:
    async def scenario() -> None:
        store, checkpoint = await checkpoint_of(machine)
        machine.apply(store, entries(13, 20))
        assert (checkpoint.index, checkpoint.term, checkpoint.stamp_ms) == (12, 1, 12)
        assert checkpoint.membership == MEMBERS and len(checkpoint.id) == 16
        whole = await checkpoint.read(0, checkpoint.total_bytes + 100)
        assert len(whole) == checkpoint.total_bytes and whole.startswith(MAGIC)
        rng = random.Random(1)
        for _ in range(100):
            offset, length = rng.randrange(len(whole) + 5), rng.randrange(400)
            assert await checkpoint.read(offset, length) == whole[offset : offset + length]
        assert len(machine.disk.list("data/checkpoints")) == 1
        checkpoint.release()
        checkpoint.release()
        await settle()
        assert machine.disk.list("data/checkpoints") == []

    run(scenario())


@pytest.mark.parametrize("chunk_bytes", [1, 13, 700, 10_000])
def test_a_snapshot_replaces_engine_and_log(machine: Machine, chunk_bytes: int) -> None:
    async def scenario() -> None:
        store, checkpoint = await checkpoint_of(machine)
        receiver_machine = other_machine(machine)
        receiver = receiver_machine.open()
        await receiver_machine.form(receiver)
        await receiver_machine.append(receiver, HardState(1, 1), entries(1, 5))
        receiver_machine.apply(receiver, entries(1, 5))
        await stream(checkpoint, receiver, chunk_bytes)
        await receiver.install(checkpoint.id, 12, 1, MEMBERS, HardState(4, 3))
        assert receiver.applied == receiver.flushed == Applied(12, 1, 12)
        assert dict(receiver.engine.scan(b"k", b"l")) == dict(store.engine.scan(b"k", b"l"))
        assert receiver.engine_membership == MEMBERS
        assert receiver.wal.start_index == receiver.wal.last_index == 12
        await receiver_machine.append(receiver, None, entries(13, 14, term=4))
        await settle()
        assert machine.disk.list("other/engine") == ["2"]

    run(scenario())
    machine.disk.power_loss()
    again = other_machine(machine).open()
    assert again.applied == Applied(12, 1, 12) and again.hard_state == HardState(4, 3)
    assert (again.start_index, again.entries) == (12, entries(13, 14, term=4))


def test_chunks_twice_out_of_order_or_of_an_unknown_snapshot_are_not_stored(machine: Machine) -> None:
    async def scenario() -> None:
        _, checkpoint = await checkpoint_of(machine)
        receiver = other_machine(machine).open()
        whole = await checkpoint.read(0, checkpoint.total_bytes)
        total = len(whole)

        async def send(offset: int, length: int, name: bytes = checkpoint.id) -> int:
            return await receiver.receive_chunk(name, total, offset, whole[offset : offset + length])

        assert await send(500, 100) == 0  # a chunk from the middle of something unknown
        assert await send(0, 500) == 500
        assert await send(0, 500) == 500  # again
        assert await send(200, 500) == 500
        assert await send(900, 100) == 500  # one before it was lost
        assert await send(500, 100, b"x" * 16) == 0
        assert await send(500, total) == total
        assert await send(500, 100) == total
        with pytest.raises(SnapshotDamaged, match="not arrived whole"):
            await receiver.install(b"x" * 16, 12, 1, MEMBERS, HardState(1))
        await receiver.install(checkpoint.id, 12, 1, MEMBERS, HardState(1))
        with pytest.raises(SnapshotDamaged, match="not arrived whole"):
            await receiver.install(checkpoint.id, 12, 1, MEMBERS, HardState(1))

    run(scenario())


def test_pipelined_chunks_are_stored_in_order(machine: Machine) -> None:
    async def scenario() -> None:
        _, checkpoint = await checkpoint_of(machine)
        receiver = other_machine(machine).open()
        whole = await checkpoint.read(0, checkpoint.total_bytes)
        machine.disk.latency_s = lambda job: 0.0005
        offsets = list(range(0, len(whole), 300))
        answers = await asyncio.gather(
            *(receiver.receive_chunk(checkpoint.id, len(whole), o, whole[o : o + 300]) for o in offsets)
        )
        assert answers == [*offsets[1:], len(whole)]
        await receiver.install(checkpoint.id, 12, 1, MEMBERS, HardState(1))

    run(scenario())


def test_a_newer_snapshot_takes_the_place_of_a_half_received_one(machine: Machine) -> None:
    async def scenario() -> None:
        store, first = await checkpoint_of(machine)
        receiver = other_machine(machine).open()
        await receiver.receive_chunk(first.id, first.total_bytes, 0, await first.read(0, 300))
        await machine.log_and_apply(store, 13, 20)
        second = await store.make_checkpoint()
        await stream(second, receiver)
        await receiver.install(second.id, 20, 1, MEMBERS, HardState(1))
        assert receiver.applied.index == 20
        await settle()
        assert machine.disk.list("other/incoming") == []

    run(scenario())


def test_every_damaged_byte_of_a_snapshot_is_noticed_before_anything_changes(machine: Machine) -> None:
    async def scenario() -> None:
        _, checkpoint = await checkpoint_of(machine, last=4)
        receiver = other_machine(machine).open()
        whole = await checkpoint.read(0, checkpoint.total_bytes)
        for offset in range(0, len(whole), 3):
            damaged = bytearray(whole)
            damaged[offset] ^= 0x10
            name = offset.to_bytes(16, "big")
            with pytest.raises(SnapshotDamaged):
                for start in range(0, len(whole), 400):
                    await receiver.receive_chunk(name, len(whole), start, bytes(damaged[start : start + 400]))
                await receiver.install(name, 4, 1, MEMBERS, HardState(1))
        await settle()
        assert receiver.is_fresh and receiver.applied == Applied()
        assert machine.disk.list("other/incoming") == []

    run(scenario())


@pytest.mark.parametrize(
    "parts",
    [
        (Part("../identity", 3, 0),),
        (Part("/etc/passwd", 3, 0),),
        (Part(".hidden", 3, 0),),
        (Part("", 3, 0),),
        (Part("a/b", 3, 0),),
        (Part("a", -3, 0), Part("b", 6, 0)),
        (Part("a", 1, 0), Part("a", 2, 0)),
        (Part("a", 1 << 60, 0),),
    ],
)
def test_a_hostile_manifest_is_refused(machine: Machine, parts: tuple[Part, ...]) -> None:
    async def scenario() -> None:
        store = machine.open()
        data = Manifest(Applied(4, 1, 4), MEMBERS, parts).encode() + b"abc"
        with pytest.raises(SnapshotDamaged):
            await store.receive_chunk(b"x" * 16, len(data), 0, data)
        await settle()
        assert machine.disk.list("data/incoming") == []

    run(scenario())


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 100, MAGIC + b"\xff" * 40, MAGIC[:-1] + b"\x02" + bytes(40), MAGIC + bytes(40)]
)
def test_what_is_not_a_snapshot_is_refused(machine: Machine, data: bytes) -> None:
    async def scenario() -> None:
        store = machine.open()
        with pytest.raises(SnapshotDamaged):
            await store.receive_chunk(b"x" * 16, len(data), 0, data)
            await store.install(b"x" * 16, 1, 1, MEMBERS, HardState(1))

    run(scenario())


def test_a_snapshot_with_another_label_or_other_rows_is_refused(machine: Machine) -> None:
    async def scenario() -> None:
        store, checkpoint = await checkpoint_of(machine)
        other = other_machine(machine)
        receiver = other.open()
        await stream(checkpoint, receiver)
        with pytest.raises(SnapshotDamaged, match="label"):
            await receiver.install(checkpoint.id, 13, 1, MEMBERS, HardState(1))
        whole = await checkpoint.read(0, checkpoint.total_bytes)
        (part,) = (p for p in checkpoint._parts)
        false = Manifest(Applied(13, 1, 13), MEMBERS, (part,)).encode() + whole[-part.size_bytes :]
        await receiver.receive_chunk(b"x" * 16, len(false), 0, false)
        with pytest.raises(SnapshotDamaged, match="row"):
            await receiver.install(b"x" * 16, 13, 1, MEMBERS, HardState(1))
        await settle()
        assert machine.disk.list("other/engine") == ["1"] and receiver.is_fresh
        receiver.close()
        assert other.open().is_fresh
        assert store.applied.index == 12

    run(scenario())


def test_a_full_disk_refuses_the_snapshot_and_leaves_the_rest(machine: Machine) -> None:
    async def scenario() -> None:
        _, checkpoint = await checkpoint_of(machine)
        receiver = other_machine(machine).open()
        used_bytes = UNBOUNDED_BYTES - machine.disk.room_bytes()
        machine.disk.capacity_bytes = used_bytes + 100
        with pytest.raises(SnapshotDamaged, match=r"it takes \d+ bytes, and the disk has 100 left"):
            await stream(checkpoint, receiver)
        machine.disk.capacity_bytes = None
        machine.disk.fail("write", errno.ENOSPC, path_part="incoming")  # taken by others meanwhile
        with pytest.raises(SnapshotDamaged) as caught:
            await stream(checkpoint, receiver)
        assert "No space left" in one_line(caught.value)
        await settle()
        assert machine.disk.list("other/incoming") == []
        machine.disk.capacity_bytes = None
        await stream(checkpoint, receiver)
        await receiver.install(checkpoint.id, 12, 1, MEMBERS, HardState(1))

    run(scenario())


def test_a_checkpoint_that_fails_leaves_nothing(machine: Machine) -> None:
    async def scenario() -> None:
        store, _ = await checkpoint_of(machine)
        await machine.log_and_apply(store, 13, 13)
        machine.disk.fail("sync", errno.EIO, path_part="checkpoints")
        with pytest.raises(StorageError):
            await store.make_checkpoint()
        await settle()
        assert machine.disk.list("data/checkpoints") == ["1"]

    run(scenario())


# -- the whole of it over RocksDB and real files ----------------------------------------------------


def test_over_rocksdb_and_real_files(tmp_path: Path) -> None:
    disk = OsDisk()
    rng = random.Random(1)

    def open_store(name: str, replica: int) -> Store:
        return Store.open(
            disk, f"{tmp_path}/{name}", RocksEngine, replace(IDENTITY, replica=replica), wal_segment_bytes=1 << 16
        )

    async def log_and_apply(store: Store, new: list[Entry]) -> None:
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        store.wal.append(None, new, lambda: durable.set_result(None))
        await durable
        for e in new:
            changes: dict[bytes, bytes | None] = {b"k%06d" % e.index: e.data}
            store.meta_changes(changes, e.index, e.term, e.stamp_ms)
            store.engine.write(changes)

    async def scenario() -> dict[bytes, bytes]:
        store = open_store("a", 1)
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        store.form(MEMBERS, HardState(1, 1), lambda: durable.set_result(None))
        await durable
        for first in range(1, 2000, 40):
            await log_and_apply(store, [entry(i, 1, rng.randbytes(300)) for i in range(first, first + 40)])
        checkpoint = await store.make_checkpoint()
        store.compact(checkpoint.index, checkpoint.term, checkpoint.membership)
        follower = open_store("b", 2)
        await stream(checkpoint, follower, 50_000)
        assert checkpoint.index == 2000
        await follower.install(checkpoint.id, 2000, 1, MEMBERS, HardState(2, None))
        checkpoint.release()
        await log_and_apply(follower, entries(2001, 2003, term=2))
        state = dict(follower.engine.scan(b"k", b"l"))
        assert len(state) == 2003
        follower.close()
        store.close()
        return state

    state = run(scenario())
    first, second = open_store("a", 1), open_store("b", 2)
    assert (first.start_index, first.entries) == (2000, [])
    assert first.wal.bytes_on_disk < 3 << 16
    assert (second.start_index, second.entries) == (2000, entries(2001, 2003, term=2))
    assert second.hard_state == HardState(2, None)
    assert dict(second.engine.scan(b"k", b"l")) == state
    first.close()
    second.close()
    disk.close()
    assert sorted(path.name for path in (tmp_path / "b" / "engine").iterdir()) == ["2"]
    assert list((tmp_path / "a" / "checkpoints").iterdir()) == []


REPLICA = """
import asyncio, sys
from raftkv.raft.actions import HardState
from raftkv.storage.disk import OsDisk
from raftkv.storage.rocks import RocksEngine
from raftkv.storage.store import Store
from tests.storage.helpers import MEMBERS, entry
from tests.storage.store_helpers import IDENTITY

async def main():
    store = Store.open(OsDisk(), sys.argv[1], RocksEngine, IDENTITY, wal_segment_bytes=1 << 14)
    if store.is_fresh:
        formed = asyncio.Event()
        store.form(MEMBERS, HardState(1), formed.set)
        await formed.wait()
    def apply(entries):
        for e in entries:
            changes = {b"k%06d" % e.index: e.data}
            store.meta_changes(changes, e.index, e.term, e.stamp_ms)
            store.engine.write(changes)
    applied = store.applied.index
    apply([e for e in store.entries if e.index > applied])
    while True:
        new = [entry(store.wal.last_index + 1 + i) for i in range(3)]
        durable = asyncio.Event()
        store.wal.append(None, new, durable.set)
        await durable.wait()
        apply(new)
        print(new[-1].index, flush=True)
        if new[0].index % 50 < 3 and new[0].index > 40:
            flushed = await store.flush()
            store.compact(max(flushed - 10, store.wal.start_index), 1, MEMBERS)

asyncio.run(main())
"""


def test_a_replica_killed_with_kill_9_again_and_again_loses_nothing_acknowledged(tmp_path: Path) -> None:
    directory = f"{tmp_path}/data"
    disk = OsDisk()
    acknowledged = 0
    for attempt in range(4):
        replica = subprocess.Popen([sys.executable, "-c", REPLICA, directory], stdout=subprocess.PIPE, text=True)
        assert replica.stdout is not None
        for _ in range(40 + 17 * attempt):
            acknowledged = int(replica.stdout.readline())
        replica.kill()
        replica.wait()
        store = Store.open(disk, directory, RocksEngine, IDENTITY, wal_segment_bytes=1 << 14)
        applied = store.applied.index
        assert store.start_index <= applied
        assert [e.index for e in store.entries] == [
            store.start_index + 1 + i for i in range(store.wal.last_index - store.start_index)
        ]
        assert store.wal.last_index >= acknowledged
        assert all(e == entry(e.index) for e in store.entries)
        rows = dict(store.engine.scan(b"k", b"l"))
        assert rows == {b"k%06d" % index: entry(index).data for index in range(1, applied + 1)}
        assert len(list((tmp_path / "data" / "wal").glob("*.wal"))) < 12
        store.close()
    disk.close()


def test_a_damaged_rocksdb_stops_the_start(tmp_path: Path) -> None:
    disk = OsDisk()
    directory = f"{tmp_path}/data"
    store = Store.open(disk, directory, RocksEngine, IDENTITY, wal_segment_bytes=1 << 16)
    store.engine.write({b"a": b"1"})
    run(store.flush())
    store.close()
    (current,) = (tmp_path / "data" / "engine" / "1").glob("CURRENT")
    current.write_bytes(b"MANIFEST-999999\n")
    with pytest.raises(EngineUnreadable) as caught:
        Store.open(disk, directory, RocksEngine, IDENTITY)
    assert directory in one_line(caught.value)
    disk.close()
