"""The replica's consensus core: events in, actions out; pure, and the only door to this package.

`Raft` holds no rule of its own. It passes events to the part that owns the concern, and in `take_actions` drains
what they caused, in the one order that keeps the durability contract of `actions.py`:

    membership · reads · appends to followers → Persist → acknowledgement → Commit → snapshot install

It never does I/O, never reads a clock (time is the shell's monotonic `now_ms`, which never falls) and never blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from raftkv.raft.actions import Action, Commit, HardState, Persist
from raftkv.raft.changes import Change, Changes
from raftkv.raft.config import RaftConfig
from raftkv.raft.election import Election
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.following import Following
from raftkv.raft.log import Log
from raftkv.raft.membership import Membership
from raftkv.raft.messages import (
    AppendEntries,
    AppendReply,
    InstallSnapshot,
    Message,
    ReadIndexReply,
    ReadIndexRequest,
    RequestVote,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
)
from raftkv.raft.progress import REPLICATE, SNAPSHOT
from raftkv.raft.reads import Reads
from raftkv.raft.replication import Replication
from raftkv.raft.snapshots import Snapshots
from raftkv.raft.state import LEADER, Node
from raftkv.raft.transfer import Transfer


class Raft:
    """One replica. See `actions.py` for what the shell owes it."""

    __slots__ = ("_following", "_handlers", "node")

    def __init__(
        self,
        config: RaftConfig,
        rng: random.Random,
        now_ms: int,
        *,
        hard_state: HardState,
        start_index: int,
        start_term: int,
        start_membership: Membership,
        entries: Sequence[Entry],
        applied_index: int,
        stamp_ms: int,
    ) -> None:
        """Resume from what is on disk.

        The log begins just after (`start_index`, `start_term`), where `start_membership` was in force; `entries`
        follow without a gap. `applied_index` ≥ `start_index` is where the state machine stands; `stamp_ms` the
        greatest replicated time known at the log's start.
        """
        log = Log(start_index, start_term, stamp_ms, entries)
        assert hard_state.term >= log.last_term, (hard_state, log.last_term)
        node = self.node = Node(config, rng, now_ms, hard_state, log, start_membership, applied_index)
        node.changes = Changes(node, start_membership)
        node.role = "follower" if node.is_voter else "learner"
        node.election = Election(node)
        node.replication = Replication(node)
        node.reads = Reads(node)
        node.transfer = Transfer(node)
        self._following = Following(node)
        node.snapshots = Snapshots(node, self._following)
        self._handlers: dict[type, Callable[[Any], None]] = {
            AppendEntries: self._following.on_append,
            AppendReply: lambda message: node.replication.on_reply(message),
            RequestVote: lambda message: node.election.on_request(message),
            VoteReply: lambda message: node.election.on_reply(message),
            InstallSnapshot: lambda message: node.snapshots.on_chunk(message),
            SnapshotReply: lambda message: node.snapshots.on_reply(message),
            TimeoutNow: lambda message: node.transfer.on_timeout_now(message),
            ReadIndexRequest: lambda message: node.reads.on_request(message),
            ReadIndexReply: lambda message: node.reads.on_reply(message),
        }

    # ---- events

    def tick(self, now_ms: int) -> None:
        """Time has passed; call it at or after `next_deadline_ms`."""
        node = self._at(now_ms)
        if node.role == LEADER:
            node.replication.tick()
            node.transfer.tick()
            node.snapshots.tick()
        else:
            node.election.tick()
        node.reads.tick()

    @property
    def next_deadline_ms(self) -> int:
        """When `tick` has something to do. Any event may move it, to earlier too: look after each."""
        node = self.node
        reads_ms = node.reads.next_deadline_ms()
        if node.role != LEADER:
            return min(reads_ms, node.election.deadline_ms)
        return min(
            reads_ms,
            node.replication.heartbeat_ms,
            node.transfer.deadline_ms,
            node.snapshots.next_deadline_ms(),
        )

    def step(self, message: Message, now_ms: int) -> None:
        """Take in a message from a peer; the shell has made sure that `source` is who it says.

        Raise SafetyViolation if it contradicts committed history: the process must then end.
        """
        node = self._at(now_ms)
        if message.source == node.replica:
            return
        term = message.term
        if term < node.term:
            # A refused pre-vote counts whatever the voter's term; all else from older terms is void.
            if not (isinstance(message, VoteReply) and message.pre):
                self._refuse_old(message)
                return
        elif term > node.term:
            if node.election.adopts_term_of(message):
                from_leader = isinstance(message, AppendEntries | InstallSnapshot)
                node.become_follower(term, message.source if from_leader else None)
            elif isinstance(message, RequestVote) and not message.pre:
                return  # a live leader was heard: the request is ignored, its term too
        self._handlers[type(message)](message)

    def propose(
        self,
        data: bytes,
        now_ms: int,
        *,
        kind: EntryKind = EntryKind.COMMANDS,
        reserved: bool = False,
        memo: object | None = None,
    ) -> Entry:
        """Append an entry to the leader's log; it is committed, or lost with the leadership.

        `reserved` proposals may use the reserve of the bound on uncommitted bytes. Raise NotLeader, Busy or
        Transferring.
        """
        assert kind != EntryKind.MEMBERSHIP, "membership has rules of its own: propose_membership"
        return self._at(now_ms).replication.propose(int(kind), data, memo, reserved=reserved)

    def propose_membership(self, change: Change, now_ms: int) -> Entry:
        """Raise NotLeader, Transferring or ChangeRefused."""
        return self._at(now_ms).changes.propose(change)

    def persisted(self, seq: int) -> None:
        """Persist `seq` and all before it are durable."""
        node = self.node
        assert seq < node.next_seq, (seq, node.next_seq)
        if seq <= node.persisted_seq:
            return
        node.persisted_seq = seq
        node.log.persisted(seq)
        if node.role == LEADER:
            node.replication.maybe_commit()
        else:
            node.election.persisted()

    def applied(self, index: int) -> None:
        """The state machine has applied everything through `index`."""
        node = self.node
        if index <= node.applied_index:
            return
        assert index <= node.emitted_index, (index, node.emitted_index)
        node.applied_index = index
        node.reads.applied()

    def read(self, now_ms: int, *, forward: bool = False) -> int:
        """Register a linearizable read; its id is answered by ReadReady or ReadFailed.

        On a replica that doesn't lead raise NotLeader, unless `forward` and a leader is known.
        """
        return self._at(now_ms).reads.read(forward=forward)

    def transfer(self, target: int | None, now_ms: int) -> None:
        """Hand leadership to `target` (None: the most up-to-date voter). Raise NotLeader or ChangeRefused."""
        self._at(now_ms).transfer.start(target)

    def compact(self, index: int) -> None:
        """Forget entries up to `index`; the state machine has applied and flushed them."""
        node = self.node
        assert index <= node.applied_index, (index, node.applied_index)
        node.log.compact(index)
        node.changes.compacted(index)

    def peer_unreachable(self, peer: int) -> None:
        """The transport lost the connection: what was in flight is lost."""
        self.node.replication.peer_unreachable(peer)

    def peer_reachable(self, peer: int) -> None:
        self.node.replication.peer_reachable(peer)

    # ---- snapshots: the leader's shell

    def snapshot_offered(
        self,
        to: int,
        snapshot_id: bytes,
        index: int,
        index_term: int,
        membership: Membership,
        total_bytes: int,
        now_ms: int,
    ) -> None:
        """Answer SnapshotWanted; SnapshotReleased will follow for this id, sooner or later."""
        self._at(now_ms).snapshots.offered(to, snapshot_id, index, index_term, membership, total_bytes)

    def snapshot_chunk(self, to: int, snapshot_id: bytes, offset: int, chunk: bytes, now_ms: int) -> None:
        """Answer SnapshotChunkWanted."""
        self._at(now_ms).snapshots.chunk(to, snapshot_id, offset, chunk)

    def snapshot_unavailable(self, to: int, now_ms: int, snapshot_id: bytes | None = None) -> None:
        """Answer SnapshotWanted, or SnapshotChunkWanted (then with its id): it can't be made or read.

        The core asks for another one, later.
        """
        self._at(now_ms).snapshots.unavailable(to, snapshot_id)

    # ---- snapshots: the follower's shell

    def snapshot_stored(self, snapshot_id: bytes, next_offset: int, now_ms: int) -> None:
        self._at(now_ms).snapshots.stored(snapshot_id, next_offset)

    def snapshot_installed(self, snapshot_id: bytes, now_ms: int, *, stamp_ms: int = 0) -> None:
        """`stamp_ms`: the replicated time of the installed state."""
        self._at(now_ms).snapshots.installed(snapshot_id, stamp_ms)

    def snapshot_failed(self, snapshot_id: bytes, now_ms: int) -> None:
        self._at(now_ms).snapshots.failed(snapshot_id)

    # ---- results

    def take_actions(self) -> list[Action]:
        """Drain what the events since the last call have caused."""
        node = self.node
        if node.reads.queued is not None:
            node.reads.flush()
        if node.changes.leaving:
            node.changes.flush()
        if node.role == LEADER:
            node.replication.flush()
        if node.snapshots.reception is not None:
            node.snapshots.drop_if_needless()
        log = node.log
        if not node.installing and (node.hard_state_dirty or log.queued_index < log.last_index):
            self._persist()
        self._following.flush()
        if node.emitted_index < node.commit_index:
            node.out.append(Commit(log.slice(node.emitted_index + 1, node.commit_index)))
            node.emitted_index = node.commit_index
        if node.snapshots.reception is not None:
            node.snapshots.flush()
        actions = node.out
        node.out = []
        return actions

    def _persist(self) -> None:
        node = self.node
        seq = node.next_seq
        hard_state = None
        if node.hard_state_dirty:
            hard_state = HardState(node.term, node.vote)
            node.hard_state_dirty = False
            node.hard_state_seq = seq
        node.out.append(Persist(seq, hard_state, node.log.queue(seq)))
        node.next_seq = seq + 1

    def _at(self, now_ms: int) -> Node:
        node = self.node
        if now_ms > node.now_ms:
            node.now_ms = now_ms
        return node

    def _refuse_old(self, message: Message) -> None:
        """Tell a sender of an older term about the newer one, where silence could leave it stuck."""
        if isinstance(message, AppendEntries | InstallSnapshot):
            self._following.refuse_old(message.source)
        elif isinstance(message, RequestVote):
            self.node.election.refuse_old(message)
        elif isinstance(message, ReadIndexRequest):
            self.node.reads.refuse(message)

    # ---- state, read-only

    @property
    def replica(self) -> int:
        return self.node.replica

    @property
    def role(self) -> str:
        return self.node.role

    @property
    def term(self) -> int:
        return self.node.term

    @property
    def vote(self) -> int | None:
        return self.node.vote

    @property
    def hard_state(self) -> HardState:
        """What the WAL is restarted with when a snapshot is installed."""
        return HardState(self.node.term, self.node.vote)

    @property
    def leader(self) -> int | None:
        return self.node.leader

    @property
    def commit_index(self) -> int:
        return self.node.commit_index

    @property
    def applied_index(self) -> int:
        return self.node.applied_index

    @property
    def last_index(self) -> int:
        return self.node.log.last_index

    @property
    def last_term(self) -> int:
        return self.node.log.last_term

    @property
    def first_index(self) -> int:
        """The first index still in the log."""
        return self.node.log.first_index

    @property
    def start_index(self) -> int:
        return self.node.log.start_index

    @property
    def start_term(self) -> int:
        return self.node.log.start_term

    @property
    def start_membership(self) -> Membership:
        """The membership at the log's start."""
        return self.node.changes.start_membership()

    @property
    def membership(self) -> Membership:
        """The membership in force: the newest in the log."""
        return self.node.membership

    @property
    def log_bytes(self) -> int:
        return self.node.log.bytes

    @property
    def stamp_ms(self) -> int:
        """The last stamp in the log."""
        return self.node.log.last_stamp_ms

    def stamp_now(self, now_ms: int) -> int:
        """The stamp that an entry proposed now would carry."""
        return self._at(now_ms).replication.stamp_now()

    @property
    def uncommitted_bytes(self) -> int:
        """Bytes proposed and not committed; 0 on a replica that doesn't lead."""
        return self.node.replication.uncommitted_bytes if self.node.role == LEADER else 0

    @property
    def has_committed_in_term(self) -> bool:
        """Leader: its no-op is committed, so its commit index is current."""
        return self.node.role == LEADER and self.node.replication.has_committed_in_term

    @property
    def transferring(self) -> int | None:
        return self.node.transfer.target

    def lease_valid(self, now_ms: int) -> bool:
        """Re-check after a lease read was evaluated: whether the lease still holds."""
        return self._at(now_ms).reads.lease_valid()

    def term_at(self, index: int) -> int | None:
        return self.node.log.term_at(index)

    def entries_from(self, index: int, max_bytes: int) -> tuple[Entry, ...]:
        """Kept entries from `index` on, as many as fit into `max_bytes`, one at least."""
        return self.node.log.slice_bytes(index, max_bytes)

    def peer_progress(self) -> dict[int, tuple[int, int, str, int]]:
        """Leader: {replica: (match, next, state, last_heard_ms)} of every other member; else empty."""
        return {p.replica: (p.match, p.next, p.state.value, p.last_heard_ms) for p in self.node.progress.values()}

    def snapshot_pins(self) -> int:
        """The lowest index still needed by a follower that is being served; `last_index + 1` if none is.

        Compact only below it. Bounded: followers that don't answer pin nothing, and a log larger than
        `pin_log_bytes_max` isn't kept for anybody.
        """
        node = self.node
        lowest = node.log.last_index + 1
        if node.role != LEADER or node.log.bytes > node.config.pin_log_bytes_max:
            return lowest
        heard_ms = node.now_ms - node.config.election_timeout_ms_max
        for p in node.progress.values():
            if p.state is REPLICATE and p.last_heard_ms >= heard_ms:
                lowest = min(lowest, p.match + 1)
            elif p.state is SNAPSHOT:
                stream = node.snapshots.streams.get(p.replica)
                if stream is not None and stream.snapshot_id is not None:
                    lowest = min(lowest, stream.index + 1)
        return lowest
