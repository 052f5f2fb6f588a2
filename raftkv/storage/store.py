"""Everything in one data directory, kept consistent over any crash.

    LOCK          held for the life of the process
    identity      whose directory this is; written last when the directory is made, so it marks it whole
    CURRENT       the name of the engine directory in use; replacing this file is the atomic swap
    wal/          the log's segments
    engine/N/     the engine's files; any N but the current one is left over
    incoming/     a snapshot being received; left over at start-up
    checkpoints/  snapshots being sent; left over at start-up

The applied row and the membership row are written with every batch of the state machine, so the engine
always knows what it contains. The log is compacted only below what the engine has flushed.

It must never: let the log start above the engine's durable state, or use a directory that is not this
replica's. Keys that begin with a zero byte are the store's own.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import replace

from raftkv.raft.actions import HardState
from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership
from raftkv.storage.boot import Applied, reconcile
from raftkv.storage.checkpoint import SNAPSHOT_ID_BYTES, Checkpoint, Manifest, Receiver, describe
from raftkv.storage.disk import TEMPORARY_SUFFIX, Disk, join
from raftkv.storage.engine import Changes, EngineFactory, StorageEngine
from raftkv.storage.errors import (
    Corruption,
    DirectoryDamaged,
    DiskFailed,
    EngineFailed,
    EngineUnreadable,
    FormatTooNew,
    NotADataDirectory,
    SnapshotDamaged,
    StorageError,
)
from raftkv.storage.identity import Identity, check_identity, mint
from raftkv.storage.wal import SEGMENT_BYTES, Wal, WalState
from raftkv.storage.wal_format import LogStart
from raftkv.storage.wal_recovery import Replay, recover

APPLIED_KEY = b"\x00applied"
MEMBERSHIP_KEY = b"\x00membership"
ROW_VERSION = 1
_APPLIED_ROW = struct.Struct(">BQQQ")


class Store:
    """See the module. Make it with `open`; all methods are for the loop's thread."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        engine_factory: EngineFactory,
        identity: Identity,
        engine: StorageEngine,
        engine_number: int,
        wal: Wal,
        log: WalState,
    ) -> None:
        self.identity = identity
        self.engine = engine
        self.wal = wal
        self.hard_state: HardState = log.hard_state
        """This and the next four are as of the opening: what the core starts from."""
        self.start_index: int = log.start_index
        self.start_term: int = log.start_term
        self.membership: Membership | None = log.membership
        """That at the log start. None: the group was never formed, as far as this replica knows."""
        self.entries: list[Entry] = log.entries
        self._disk = disk
        self._directory = directory
        self._engine_factory = engine_factory
        self._engine_number = engine_number
        self._receiver: Receiver | None = None
        self._receiving = asyncio.Lock()
        self._flushed = self.applied
        """Opening an engine without a log of its own shows only what is durable."""
        self._checkpoints = 0

    @classmethod
    def open(
        cls,
        disk: Disk,
        directory: str,
        engine_factory: EngineFactory,
        expected_identity: Identity,
        *,
        wal_segment_bytes: int = SEGMENT_BYTES,
    ) -> Store:
        """Lock, check and recover the directory, or make it. Blocking.

        Raises DirectoryInUse, NotADataDirectory, OtherReplica, PeersChanged, OtherCluster, DirectoryDamaged,
        Corruption, FormatTooNew, StateLost, EngineUnreadable, DiskFailed.
        """
        try:
            disk.make_directory(directory)
            disk.lock(join(directory, "LOCK"))
        except OSError as error:
            raise DiskFailed.of(error, directory) from error
        try:
            return cls._open_locked(disk, directory, engine_factory, expected_identity, wal_segment_bytes)
        except BaseException as error:
            disk.unlock(join(directory, "LOCK"))
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise DiskFailed.of(error, directory) from error
            raise

    @classmethod
    def _open_locked(
        cls,
        disk: Disk,
        directory: str,
        engine_factory: EngineFactory,
        expected: Identity,
        segment_bytes: int,
    ) -> Store:
        identity_path = join(directory, "identity")
        if disk.exists(identity_path):
            identity = Identity.decode(identity_path, disk.read(identity_path))
            check_identity(directory, identity, expected)
            if expected.cluster_id and not identity.cluster_id:
                identity = replace(identity, cluster_id=expected.cluster_id)
                disk.write_durably(identity_path, identity.encode())
            is_new = False
        else:
            _clear_unfinished(disk, directory, engine_factory)
            identity = mint(disk, expected)
            is_new = True
        engine_number = _current_engine(disk, directory, is_new)
        for name in ("incoming", "checkpoints"):
            disk.remove_tree(join(directory, name))
            disk.make_directory(join(directory, name))
        for name in disk.list(join(directory, "engine")):
            if name != str(engine_number):
                disk.remove_tree(join(directory, "engine", name))
        wal, log = Wal.open(disk, join(directory, "wal"), segment_bytes=segment_bytes, may_create=is_new)
        engine = None
        try:
            engine = engine_factory(join(directory, "engine", str(engine_number)))
            log = _agree(directory, engine, wal, log)
            if is_new:
                disk.write_durably(identity_path, identity.encode())
            return cls(disk, directory, engine_factory, identity, engine, engine_number, wal, log)
        except BaseException:
            wal.close()
            if engine is not None:
                engine.close()
            raise

    # -- state --------------------------------------------------------------------------------

    @property
    def applied(self) -> Applied:
        """What the engine contains, durable or not."""
        return read_applied(self._directory, self.engine)

    @property
    def flushed(self) -> Applied:
        """What of that is durable for certain."""
        return self._flushed

    @property
    def is_fresh(self) -> bool:
        """This replica has never known its group's membership, and has no data."""
        return self.membership is None and not self.entries and self._flushed.index == 0

    @property
    def engine_membership(self) -> Membership | None:
        """The membership at the applied index."""
        return read_membership(self._directory, self.engine)

    def set_cluster_id(self, cluster_id: bytes) -> None:
        """Adopt a cluster, durably. Raises OtherCluster, DiskFailed."""
        wanted = replace(self.identity, cluster_id=cluster_id)
        check_identity(self._directory, self.identity, wanted)
        if wanted != self.identity:
            try:
                self._disk.write_durably(join(self._directory, "identity"), wanted.encode())
            except OSError as error:
                raise DiskFailed.of(error, self._directory) from error
            self.identity = wanted

    def meta_changes(
        self, changes: Changes, index: int, term: int, stamp_ms: int, membership: Membership | None = None
    ) -> None:
        """Add to a batch that the state is the one after entry `index`; `membership` if the entry set it."""
        changes[APPLIED_KEY] = _APPLIED_ROW.pack(ROW_VERSION, index, term, stamp_ms)
        if membership is not None:
            changes[MEMBERSHIP_KEY] = membership.encode()

    def form(self, membership: Membership, hard_state: HardState, done: Callable[[], None]) -> None:
        """Begin the log with the group's first membership; for a directory that `is_fresh`."""
        assert self.applied.index == 0 and self.wal.last_index == 0
        self.engine.write({MEMBERSHIP_KEY: membership.encode()})
        self.membership = membership
        self.wal.reset(hard_state, 0, 0, membership, done)

    async def flush(self) -> int:
        """Make the engine's state durable; the applied index that is durable now. Raises EngineFailed."""
        applied, engine = self.applied, self.engine
        await engine.flush()
        if engine is self.engine and applied.index > self._flushed.index:
            self._flushed = applied
        return self._flushed.index

    def compact(self, index: int, term: int, membership: Membership) -> None:
        """Start the log after `index`, at most the flushed one; `term` and `membership` are those there."""
        assert index <= self._flushed.index, (index, self._flushed)
        self.wal.compact(index, term, membership)

    # -- snapshots, sending -------------------------------------------------------------------

    async def make_checkpoint(self) -> Checkpoint:
        """A snapshot of the state now. Raises EngineFailed, DiskFailed; leaves nothing behind then."""
        self._checkpoints += 1
        directory = join(self._directory, "checkpoints", str(self._checkpoints))
        try:
            await self.flush()
            rows = await self.engine.checkpoint(directory, (APPLIED_KEY, MEMBERSHIP_KEY))
            applied = _decode_applied(directory, rows[0])
            membership = _decode_membership(directory, rows[1])
            assert membership is not None, "a group that was never formed has nothing to send"
            manifest = Manifest(applied, membership, await describe(self._disk, directory))
        except BaseException as error:
            self._disk.discard([directory, directory + TEMPORARY_SUFFIX])  # RocksDB makes it under that name
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise DiskFailed.of(error, directory) from error
            raise
        return Checkpoint(self._disk, directory, self._disk.entropy(SNAPSHOT_ID_BYTES), manifest)

    # -- snapshots, receiving -----------------------------------------------------------------

    async def receive_chunk(self, snapshot_id: bytes, total_bytes: int, offset: int, chunk: bytes) -> int:
        """Store a chunk; the next offset wanted. Offset 0 begins anew; a chunk out of order is not stored.

        Raises SnapshotDamaged (a full disk included): the snapshot has to come again, as another one.
        """
        async with self._receiving:
            receiver = self._receiver
            is_this = receiver is not None and receiver.snapshot_id == snapshot_id
            if offset == 0 and not (is_this and receiver is not None and receiver.next_offset > 0):
                self._drop_incoming()
                free_bytes = self._disk.free_bytes(self._directory)
                if total_bytes > free_bytes:
                    raise SnapshotDamaged(f"it takes {total_bytes} bytes, and the disk has {free_bytes} left")
                directory = join(self._directory, "incoming", snapshot_id.hex())
                self._receiver = receiver = Receiver(self._disk, directory, snapshot_id, total_bytes)
            elif receiver is None or not is_this:
                return 0
            elif offset != receiver.next_offset or receiver.complete:
                return receiver.next_offset
            try:
                await receiver.feed(chunk)
            except OSError as error:
                self._drop_incoming()
                raise SnapshotDamaged(f"{error.filename or receiver.directory}: {error.strerror}") from error
            except SnapshotDamaged:
                self._drop_incoming()
                raise
            return receiver.next_offset

    async def install(
        self, snapshot_id: bytes, index: int, term: int, membership: Membership, hard_state: HardState
    ) -> None:
        """Replace engine and log by the received snapshot. Nothing may be applied meanwhile.

        At every instant a crash finds the old state or the new one: replacing CURRENT is the swap, and if
        the log is not reset then, start-up does it, by the rule in `boot`. Raises SnapshotDamaged (nothing
        has changed), DiskFailed (whether it has changed is unknown: end the process).
        """
        async with self._receiving:
            await self._install(snapshot_id, index, term, membership, hard_state)

    async def _install(
        self, snapshot_id: bytes, index: int, term: int, membership: Membership, hard_state: HardState
    ) -> None:
        receiver = self._receiver
        if receiver is None or receiver.snapshot_id != snapshot_id or not receiver.complete:
            raise SnapshotDamaged("it has not arrived whole")
        manifest = receiver.manifest
        assert manifest is not None
        if (manifest.applied.index, manifest.applied.term, manifest.membership) != (index, term, membership):
            self._drop_incoming()
            raise SnapshotDamaged("its manifest contradicts its label")
        number = self._engine_number + 1
        directory = join(self._directory, "engine", str(number))
        try:
            await self._disk.run("remove_tree", directory)
            await self._disk.run("rename", receiver.directory, directory)
        except OSError as error:
            raise DiskFailed.of(error, directory) from error
        self._receiver = None
        engine = self._open_received(directory, manifest)
        try:
            await self._disk.run("write_durably", join(self._directory, "CURRENT"), b"%d\n" % number)
        except OSError as error:
            engine.close()
            raise DiskFailed.of(error, self._directory) from error
        old_engine, old_number = self.engine, self._engine_number
        self.engine, self._engine_number, self._flushed = engine, number, manifest.applied
        durable = asyncio.get_running_loop().create_future()

        def done() -> None:
            if not durable.done():
                durable.set_result(None)

        self.wal.reset(hard_state, index, term, membership, done)
        await old_engine.abandon()
        self._disk.discard([join(self._directory, "engine", str(old_number))])
        await durable

    def _open_received(self, directory: str, manifest: Manifest) -> StorageEngine:
        """The engine in `directory`, checked against the manifest; removed again if it is no good."""
        try:
            engine = self._engine_factory(directory)
            try:
                if read_applied(directory, engine) != manifest.applied:
                    raise SnapshotDamaged("its applied row contradicts its manifest")
                if read_membership(directory, engine) != manifest.membership:
                    raise SnapshotDamaged("its membership row contradicts its manifest")
            except BaseException:
                engine.close()
                raise
            return engine
        except StorageError as error:
            self._disk.discard([directory])
            if isinstance(error, SnapshotDamaged):
                raise
            reason = error.reason if isinstance(error, EngineUnreadable | EngineFailed) else str(error)
            raise SnapshotDamaged(reason) from error

    def _drop_incoming(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._disk.discard([self._receiver.directory])
            self._receiver = None

    def close(self) -> None:
        """Close everything; what isn't flushed comes back from the log."""
        if self._receiver is not None:
            self._receiver.close()
        self.wal.close()
        self.engine.close()
        self._disk.unlock(join(self._directory, "LOCK"))


def read_applied(path: str, engine: StorageEngine) -> Applied:
    return _decode_applied(path, engine.get(APPLIED_KEY))


def read_membership(path: str, engine: StorageEngine) -> Membership | None:
    return _decode_membership(path, engine.get(MEMBERSHIP_KEY))


def _decode_applied(path: str, row: bytes | None) -> Applied:
    if row is None:
        return Applied()
    if row[:1] > bytes([ROW_VERSION]):
        raise FormatTooNew(path, row[0], ROW_VERSION)
    try:
        return Applied(*_APPLIED_ROW.unpack(row)[1:])
    except struct.error as error:
        raise Corruption(path, 0, f"its applied row can't be read: {error}") from error


def _decode_membership(path: str, row: bytes | None) -> Membership | None:
    try:
        return Membership.decode(row) if row is not None else None
    except ValueError as error:
        raise Corruption(path, 0, f"its membership row can't be read: {error}") from error


def _clear_unfinished(disk: Disk, directory: str, engine_factory: EngineFactory) -> None:
    """Without identity, a directory was never finished: remove what is there, if it holds no data.

    Raises NotADataDirectory for the files of somebody else, DirectoryDamaged for a lost identity.
    """
    names = set(disk.list(directory)) - {"LOCK", "lost+found"}
    strange = sorted(names - {"CURRENT", "CURRENT.tmp", "checkpoints", "engine", "identity.tmp", "incoming", "wal"})
    if strange:
        raise NotADataDirectory(directory, strange[0])
    if _holds_data(disk, directory, engine_factory):
        raise DirectoryDamaged(directory, "it holds data but its identity is missing")
    for name in sorted(names):
        disk.remove_tree(join(directory, name))
    disk.sync_directory(directory)


def _holds_data(disk: Disk, directory: str, engine_factory: EngineFactory) -> bool:
    wal = join(directory, "wal")
    if disk.is_directory(wal):
        try:
            found = recover(disk, wal)
        except Corruption:
            return True
        if found is not None:
            found.file.close()
            if found.replay != Replay(HardState(), LogStart()):
                return True
    engines = join(directory, "engine")
    for name in disk.list(engines) if disk.is_directory(engines) else []:
        try:
            engine = engine_factory(join(engines, name))
        except EngineUnreadable:
            continue  # half made
        has_rows = engine.get(APPLIED_KEY) is not None or engine.get(MEMBERSHIP_KEY) is not None
        engine.close()
        if has_rows:
            return True
    return False


def _current_engine(disk: Disk, directory: str, is_new: bool) -> int:
    path = join(directory, "CURRENT")
    if is_new:
        disk.make_directory(join(directory, "engine"))
        disk.write_durably(path, b"1\n")
        return 1
    if not disk.exists(path):
        raise DirectoryDamaged(directory, "CURRENT is missing")
    try:
        number = int(disk.read(path))
    except ValueError:
        raise Corruption(path, 0, "it does not hold a number") from None
    if not disk.is_directory(join(directory, "engine", str(number))):
        raise DirectoryDamaged(directory, f"engine/{number} is missing")
    return number


def _agree(directory: str, engine: StorageEngine, wal: Wal, log: WalState) -> WalState:
    """Bring engine and log together by the rule in `boot`; the log as it is now."""
    applied, membership = read_applied(directory, engine), read_membership(directory, engine)
    restart = reconcile(directory, applied, membership, log)
    if restart is not None:
        if restart.membership is None:
            raise DirectoryDamaged(directory, "the engine has data but no membership")
        wal.reset_now(restart.hard_state, restart.index, restart.term, restart.membership)
        return WalState(restart.hard_state, restart.index, restart.term, restart.membership, [])
    if membership is None and log.membership is not None:
        # Formed, and the engine's first rows were lost by a crash: they are the log's.
        engine.write({MEMBERSHIP_KEY: log.membership.encode()})
    return log
