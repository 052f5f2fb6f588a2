"""Safety rules of the store, each with a way to switch it off in a test.

An ablation patches the product for the time of a test. The simulation must then find a violation, by a checker
that has a name, within a bounded number of seeds of a scenario that puts the rule to the test.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from raftkv.daemons import snapshots
from raftkv.daemons.formation import Formation
from raftkv.daemons.peers import Peers
from raftkv.daemons.replica import Replica
from raftkv.daemons.snapshots import SnapshotTransfers
from raftkv.machines.kv import KvMachine
from raftkv.machines.rows import Incarnation, ShardMeta
from raftkv.machines.sessions import Session, SessionTable
from raftkv.machines.shard_states import ShardEvent, ShardState
from raftkv.protocol.errors import ReplicaMustBeReplaced
from raftkv.protocol.messages import Hello
from raftkv.raft.actions import HardState, Send, SnapshotChunkWanted
from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership
from raftkv.raft.messages import AppendReply
from raftkv.raft.reads import Reads
from raftkv.raft.replication import Replication
from raftkv.sim.scenario import Scenario, load, parse
from raftkv.storage import wal, wal_format, wal_recovery
from raftkv.storage.checkpoint import SNAPSHOT_ID_BYTES, Checkpoint, Manifest, describe
from raftkv.storage.disk import Disk, DiskFile
from raftkv.storage.store import Store

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Ablation:
    """`names`: what the violation may be called. `seeds`: within how many it must be found. `beside`: what the patch
    changes that is no rule; in force also when the scenario must pass."""

    patch: Patch
    scenario: Scenario
    names: tuple[str, ...]
    seeds: int = 50
    beside: Patch | None = None


def scenario(name: str, faults: dict[str, float], **settings: Any) -> Scenario:
    document: dict[str, Any] = {
        "virtual_seconds": 30,
        "cluster": {"groups": 1, "snapshot_entries": [5, 60], "snapshot_kib": [0.5, 8], "wal_segment_kib": 32},
        "nemesis": {"every_s": [0.3, 0.9], "faults": faults},
    }
    for key, value in settings.items():
        if isinstance(value, dict):
            document[key] = {**document.get(key, {}), **value}
        else:
            document[key] = value
    return parse(document, name)


# ---- the log and the disk


def vote_not_persisted(patch: pytest.MonkeyPatch) -> None:
    encode = wal_format.encode_hard_state
    patch.setattr(wal, "encode_hard_state", lambda state: encode(HardState(state.term, None)))


def no_fsync_before_ack(patch: pytest.MonkeyPatch) -> None:
    def write_only(self: Disk, file: DiskFile, writes: Sequence[tuple[int, bytes]]) -> None:
        for offset, data in writes:
            file.write(offset, data)

    patch.setattr(Disk, "write_all_and_sync", write_only)


def ack_before_fsync(patch: pytest.MonkeyPatch) -> None:
    take = Raft.take_actions

    def take_actions(self: Raft) -> list[Any]:
        actions = take(self)
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, AppendReply):
                action.after = 0
        return actions

    patch.setattr(Raft, "take_actions", take_actions)


def leader_counts_itself_at_once(patch: pytest.MonkeyPatch) -> None:
    def maybe_commit(self: Replication) -> None:
        node = self.node
        election = node.election
        index = election.quorum_of([p.match for p in election.counted], node.log.last_index)
        if index > node.commit_index and self.may_commit(index):
            self.commit_to(index)

    patch.setattr(Replication, "maybe_commit", maybe_commit)


def torn_tail_kept(patch: pytest.MonkeyPatch) -> None:
    """A batch counts when its header can be read, whatever the checksums of its records say."""

    def decode_batch(data: bytes, position: int, header: wal_format.SegmentHeader) -> wal_format.Batch:
        durable, length = wal_format.decode_batch_header(data, position, header)
        at = position + wal_format.BATCH_HEADER_BYTES
        end = at + length
        records: list[Any] = []
        while at + wal_format._RECORD.size <= end:
            size, _, kind = wal_format._RECORD.unpack_from(data, at)
            body = data[at + wal_format._RECORD.size : at + 8 + size]
            if size == 0:
                break
            try:
                decoded = Entry.decode(body) if kind == wal_format.ENTRY else wal_format._decode_state(kind, body)
            except (ValueError, struct.error):
                break
            records.append(decoded)
            at += 8 + size
        return wal_format.Batch(position, wal_format.align(end), durable, tuple(records))

    patch.setattr(wal_recovery, "decode_batch", decode_batch)


# ---- consensus


def older_term_committed_by_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Replication, "may_commit", lambda self, index: True)


def read_before_own_term_commit(patch: pytest.MonkeyPatch) -> None:
    flush, began = Reads.flush, Reads.round_began

    def flush_now(self: Reads) -> None:
        if self.queued is not None and self.node.role == "leader":
            self.node.replication.begin_round()
        else:
            flush(self)

    def round_began(self: Reads, round_number: int) -> None:
        replication = self.node.replication
        term_start, replication.term_start = replication.term_start, 0
        began(self, round_number)
        replication.term_start = term_start

    patch.setattr(Reads, "flush", flush_now)
    patch.setattr(Reads, "round_began", round_began)


def any_ack_confirms_a_read(patch: pytest.MonkeyPatch) -> None:
    on_reply = Replication.on_reply

    def count_all(self: Replication, message: AppendReply) -> None:
        on_reply(self, replace(message, round=self.node.round))

    patch.setattr(Replication, "on_reply", count_all)


def read_without_quorum(patch: pytest.MonkeyPatch) -> None:
    began = Reads.round_began

    def confirmed_at_once(self: Reads, round_number: int) -> None:
        began(self, round_number)
        while self.batches:
            self._confirmed(self.batches.popleft())

    patch.setattr(Reads, "round_began", confirmed_at_once)


def wiped_disk_accepted(patch: pytest.MonkeyPatch) -> None:
    """A replica counts by its number, not by its store."""
    check, heard = Peers._check, Formation.heard

    def check_but_store(self: Peers, hello: Hello) -> None:
        try:
            check(self, hello)
        except ReplicaMustBeReplaced:
            return

    def adopt(self: Formation, hello: Hello) -> Membership | None:
        if hello.formed:
            stores = {int(member): bytes(known) for member, known in hello.stores}
            return Membership(tuple(sorted(stores)), (), tuple(sorted(stores.items())))
        return heard(self, hello)

    patch.setattr(Peers, "_check", check_but_store)
    patch.setattr(Formation, "heard", adopt)


# ---- applying and sessions


def session_not_in_the_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SessionTable, "flush", lambda self, view: self._changed.clear())


def duplicate_applied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Session, "recall", lambda self, seq, first_unacked, stamp_ms, horizon_ms: None)


def waiter_matched_by_index_only(patch: pytest.MonkeyPatch) -> None:
    """A leader that was deposed answers whoever waits for an index with what comes to stand there."""
    write, end = Replica._write, Replica._end_waiters

    def write_any_term(self: Replica, entry: Entry, view: Any, results: list[Any]) -> bool:
        waiting = self._waiters.get(entry.index)
        if waiting is not None:
            waiters = waiting[1][: len(results)]
            ok: list[Any] = [result if result[0] == 0 else [0, 1] for result in results]
            self._waiters[entry.index] = (entry.term, waiters)
            results = ok[: len(waiters)]
        return write(self, entry, view, results)

    def keep_waiters(self: Replica, pending_error: Any, below_term: int | None) -> None:
        kept, self._waiters = self._waiters, {}
        end(self, pending_error, below_term)
        coming = range(self.applied_index + 1, self.raft.last_index + 1)  # the others would wait for ever
        self._waiters = {index: waiting for index, waiting in kept.items() if index in coming}

    patch.setattr(Replica, "_write", write_any_term)
    patch.setattr(Replica, "_end_waiters", keep_waiters)


def ownership_not_checked_at_apply(patch: pytest.MonkeyPatch) -> None:
    """A group executes what is in its log, whoever owns the shard; and nothing is refused before it is logged."""

    def execute(self: KvMachine, view: Any, command: Any) -> Any:
        shards = self._shards
        if command[1] not in shards.here:
            meta = ShardMeta(ShardState.SERVING, Incarnation(self.config_num, 0), 0, 0, 0)
            shards.arrive(view, command[1], ShardEvent.FIRST_ASSIGNED, meta)
        return execute_once(self, view, command)

    execute_once = KvMachine._execute_once
    patch.setattr(KvMachine, "_execute_once", execute)
    nothing_refused_before_the_log(patch)


def nothing_refused_before_the_log(patch: pytest.MonkeyPatch) -> None:
    """Not a safety rule: without it, ownership at apply is the only defence."""
    patch.setattr(KvMachine, "serves", lambda self, shard: True)


def snapshot_with_a_remembered_label(patch: pytest.MonkeyPatch) -> None:
    """The label of a snapshot is what was applied when it was ready, not what it holds."""
    patch.setattr(Store, "make_checkpoint", mislabelled_checkpoint)
    patch.setattr(Store, "_open_received", lambda self, directory, manifest: self._engine_factory(directory))


async def mislabelled_checkpoint(self: Store) -> Checkpoint:
    self._checkpoints += 1
    directory = f"{self._directory}/checkpoints/{self._checkpoints}"
    await self.flush()
    await self.engine.checkpoint(directory)
    membership = self.engine_membership
    assert membership is not None
    manifest = Manifest(self.applied, membership, await describe(self._disk, directory))
    return Checkpoint(self._disk, directory, self._disk.entropy(SNAPSHOT_ID_BYTES), manifest)


# ---- bugs that the simulation found, put back


def checkpoint_released_while_it_is_read(patch: pytest.MonkeyPatch) -> None:
    async def read(self: SnapshotTransfers, checkpoint: Checkpoint, action: SnapshotChunkWanted) -> bytes:
        return await checkpoint.read(action.offset, action.length)

    patch.setattr(SnapshotTransfers, "_read", read)
    patch.setattr(snapshots, "CHECKPOINT_IDLE_S", 0.02)  # not a rule: it makes the rare case frequent


def damaged_checkpoint_offered_again(patch: pytest.MonkeyPatch) -> None:
    usable = SnapshotTransfers._usable_checkpoint

    async def usable_again(self: SnapshotTransfers, to: int) -> Checkpoint:
        self._released.discard(to)
        return await usable(self, to)

    patch.setattr(SnapshotTransfers, "_usable_checkpoint", usable_again)


CRASHES = {"kill": 4.0, "kill_leader": 4.0, "kill_group": 4.0, "power_loss": 4.0, "power_group": 4.0, "power_all": 1.0}
CUTS = {"isolate": 4.0, "isolate_leader": 6.0, "reset": 4.0, "kill_leader": 3.0, "pause": 4.0, "half_open": 2.0}
NOT_LINEARIZABLE = (
    "not-linearizable", "stale-read", "lost-write", "duplicate", "phantom", "fork", "version-conflict", "version-order",
    "order-against-real-time", "future-read",
)  # fmt: skip
LOG = ("LogMatching", "StateMachineSafety", "LeaderCompleteness", "CommittedOnQuorum", "SafetyViolation")

FORGED_MAPS = scenario("forged maps", {"forged_map": 10, "kill_leader": 2}, cluster={"groups": 2})

ABLATIONS: dict[str, Ablation] = {
    "vote not persisted": Ablation(vote_not_persisted, load("crashes"), ("DurableVoteNeverChanges", "ElectionSafety")),
    "fsync skipped before ack": Ablation(
        no_fsync_before_ack,
        load("crashes"),
        ("DurableTermNeverFalls", "DurableVoteNeverChanges", "DurableEntriesStay", "UnexpectedExit"),
    ),
    "ack before fsync": Ablation(ack_before_fsync, load("crashes"), ("CommittedOnQuorum",)),
    "leader counts itself before its fsync": Ablation(
        leader_counts_itself_at_once, load("crashes"), ("CommittedOnQuorum",)
    ),
    "torn tail kept": Ablation(
        torn_tail_kept,
        scenario(
            "torn",
            {"power_while_writing": 8, "power_group": 2, "slow_disk": 2},
            workload={"value_bytes": [600, 4000]},
        ),
        (*LOG, "UnexpectedException", "UnexpectedExit"),
    ),
    "older-term entry committed by count": Ablation(
        older_term_committed_by_count, scenario("reigns", CUTS | CRASHES), ("LeaderCommitsOwnTerm", *LOG)
    ),
    "read before the no-op": Ablation(
        read_before_own_term_commit, scenario("reigns", CUTS | CRASHES), NOT_LINEARIZABLE
    ),
    "acks of an earlier round confirm a read": Ablation(
        any_ack_confirms_a_read,
        scenario(
            "late acks",
            {"late_answers": 10},
            workload={"clients": 6, "think_s": 0.05, "follower_reads": 0.0},
            nemesis={"at_once": 1},
        ),
        NOT_LINEARIZABLE,
    ),
    "read without a quorum": Ablation(
        read_without_quorum,
        scenario(
            "late acks and few keys",
            {"late_answers": 10},
            workload={"clients": 8, "think_s": 0.03, "follower_reads": 0.0, "keys": 6},
            nemesis={"at_once": 1},
        ),
        NOT_LINEARIZABLE,
    ),
    "wiped disk accepted as voter": Ablation(
        wiped_disk_accepted,
        scenario(
            "wipes",
            {"wiped_disk": 10, "isolate": 5, "isolate_leader": 3, "kill_leader": 4, "slow_disk": 3},
            nemesis={"at_once": 5},
        ),
        (*LOG, *NOT_LINEARIZABLE, "DurableTermNeverFalls", "DurableVoteNeverChanges", "DurableEntriesStay"),
    ),
    "session not in the batch with its value": Ablation(
        session_not_in_the_batch,
        scenario("lost answers", {**CRASHES, "reset": 10, "clog": 3}),
        ("ReplicasEqual", "RevisionNeverFalls", *NOT_LINEARIZABLE),
    ),
    "duplicate applied": Ablation(
        duplicate_applied, scenario("lost answers", {"reset": 10, "clog": 3, "kill_leader": 3}), NOT_LINEARIZABLE
    ),
    "ownership not re-checked at apply": Ablation(
        ownership_not_checked_at_apply, FORGED_MAPS, ("OneGroupServesAShard", "UnexpectedException", *NOT_LINEARIZABLE)
    ),
    "waiter matched by index only": Ablation(
        waiter_matched_by_index_only, scenario("reigns", CUTS), (*NOT_LINEARIZABLE, "UnexpectedException")
    ),
    "snapshot labelled with the remembered index": Ablation(
        snapshot_with_a_remembered_label,
        scenario("catching up", {"isolate": 6, "power_loss": 4, "kill": 4}),
        ("ReplicasEqual", "RevisionNeverFalls", "UnexpectedException", "UnexpectedExit", *LOG, *NOT_LINEARIZABLE),
    ),
    "checkpoints are released after their readers": Ablation(
        checkpoint_released_while_it_is_read,
        scenario(
            "slow reading",
            {"isolate": 6, "kill": 4, "stalled_disk": 10, "slow_disk": 4},
            cluster={"snapshot_entries": [5, 60], "snapshot_kib": [0.25, 4]},
        ),
        ("UnexpectedExit",),
    ),
    "a refused checkpoint is not offered again": Ablation(
        damaged_checkpoint_offered_again,
        scenario(
            "damage on the way",
            {"flipped_snapshot": 6, "isolate": 5, "kill": 4},
            cluster={"snapshot_entries": [5, 60], "snapshot_kib": [0.25, 4]},
        ),
        ("NotWell",),
    ),
}
