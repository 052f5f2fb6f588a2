"""What must hold of transactions: at every instant, that one which has ended is prepared nowhere; and once everything
has healed, that no lock is left and that each ended in one way everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raftkv.machines.coordinator import CoordinatorMachine, TxnState
from raftkv.machines.kv import KvMachine
from raftkv.machines.locks import unpack_outcome
from raftkv.machines.rows import KIND_OUTCOME, RECORD_PREFIX, prefix_end
from raftkv.protocol.limits import ID_BYTES
from raftkv.raft.invariants import violated
from raftkv.sim.process import DaemonProcess
from raftkv.storage.engine import StorageEngine

Coordinator = tuple[CoordinatorMachine, StorageEngine]


class EndInvariant:
    """END only after every shard has applied the decision; by the most advanced replica of each group."""

    def __init__(self) -> None:
        self._applied: dict[int, int] = {}
        self._open: dict[bytes, tuple[int, ...]] = {}
        self._ended: dict[bytes, tuple[int, ...]] = {}

    def check(self, process: DaemonProcess) -> None:
        """After a turn of a coordinator or of a replica of a group. Raises InvariantViolation."""
        replica = process.daemon.replica if process.daemon is not None else None
        if replica is None:
            return
        machine = replica.machine
        if not isinstance(machine, KvMachine | CoordinatorMachine):
            return
        gid = process.options.gid if isinstance(machine, KvMachine) else 0
        if replica.applied_index <= self._applied.get(gid, 0):
            return
        self._applied[gid] = replica.applied_index
        if isinstance(machine, CoordinatorMachine):
            for txid in self._open.keys() - machine.open.keys():
                self._ended[txid] = self._open[txid]
            self._open = {txid: record.shards for txid, record in machine.open.items()}
        else:
            for txid, _, shard, _ in machine.in_doubt():
                if shard in self._ended.get(txid, ()):
                    violated("EndOnlyAfterAll", f"transaction {txid.hex()} has ended, and is prepared in shard {shard}")


def locks_left(groups: Iterable[KvMachine], coordinator: Coordinator | None) -> str | None:
    """What transactions still hold in the shards, or have not come to their end at the coordinators."""
    for machine in groups:
        held = machine.held_locks(1)
        if held:
            txid, shard, kind, keys, age_ms = held[0]
            return f"shard {shard}: {kind} lock of transaction {txid.hex()} on {keys}, {age_ms} ms old"
    if coordinator is not None and coordinator[0].open:
        txid, record = next(iter(sorted(coordinator[0].open.items())))
        return f"transaction {txid.hex()} is {record.state.name.lower()} and has not ended"
    return None


def decisions_differ(
    groups: Iterable[tuple[KvMachine, StorageEngine]], coordinator: Coordinator | None, told: Mapping[bytes, bool]
) -> str | None:
    """By what shards and coordinators have recorded; what they have dropped since says nothing."""
    known: dict[bytes, tuple[bool, str]] = {txid: (committed, "its client") for txid, committed in told.items()}
    for txid, committed, where in _recorded(groups, coordinator):
        other = known.setdefault(txid, (committed, where))
        if other[0] != committed:
            words = [("committed" if is_committed else "aborted") for is_committed in (other[0], committed)]
            return f"transaction {txid.hex()} is {words[0]} for {other[1]}, {words[1]} for {where}"
    return None


def _recorded(
    groups: Iterable[tuple[KvMachine, StorageEngine]], coordinator: Coordinator | None
) -> Iterable[tuple[bytes, bool, str]]:
    if coordinator is not None:
        machine, engine = coordinator
        for key, _ in engine.scan(RECORD_PREFIX, prefix_end(RECORD_PREFIX)):
            txid = key[len(RECORD_PREFIX) :]
            record = machine.record(engine, txid)
            assert record is not None
            if record.state in (TxnState.COMMITTED, TxnState.ABORTED):
                yield txid, record.state is TxnState.COMMITTED, "the coordinators"
    for group, engine in groups:
        for prefix in group.prefixes():
            start = prefix + KIND_OUTCOME
            for key, row in engine.scan(start, prefix_end(start)):
                if len(key) != len(start) + ID_BYTES:
                    continue  # a row of the group's, about a shard
                yield key[len(start) :], unpack_outcome(row).committed, f"a shard ({prefix.hex()})"
