"""Linearizable reads without the log: ReadIndex, leases, forwarding by followers (Raft §8; thesis §6.4).

A read is confirmed by a quorum round that *began after* it was registered; all reads registered before one flush
share it, and each attempt gets a fresh one. Never is a read answered from a commit index that the leader has not
yet brought up to its own term's no-op. At most `ROUNDS_MAX` rounds of reads run at a time: what comes meanwhile
joins the next one, so reads cannot flood a leader that gets no answers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from raftkv.raft.actions import ReadFailed, ReadReady
from raftkv.raft.errors import NotLeader
from raftkv.raft.messages import ReadIndexReply, ReadIndexRequest
from raftkv.raft.state import LEADER, NEVER_MS, Node

ROUNDS_MAX = 2
SENT_ROUNDS_KEPT_MAX = 128
"""Rounds whose time of sending is remembered for the lease; older ones could extend none."""


@dataclass(slots=True)
class Batch:
    """Reads that share one attempt: ids `first` … `last` (none: last < first), and followers' requests."""

    first: int
    last: int
    remote: list[tuple[int, int]]
    """(follower, context)."""
    round: int = 0
    index: int = 0
    deadline_ms: int = NEVER_MS


class Reads:
    __slots__ = (
        "batches",
        "context",
        "forwarded",
        "lease_until_ms",
        "lease_void",
        "next_id",
        "node",
        "queued",
        "sent_rounds",
        "waiting",
    )

    def __init__(self, node: Node) -> None:
        self.node = node
        self.next_id = 1
        self.queued: Batch | None = None
        """Registered, no attempt begun."""
        self.batches: deque[Batch] = deque()
        """Leader: waiting for their round, in order of round."""
        self.forwarded: dict[int, Batch] = {}
        """Follower: by context, waiting for the leader's answer."""
        self.waiting: list[Batch] = []
        """Confirmed, waiting for the state machine to reach `index`."""
        # Contexts must not repeat over restarts: a late answer to an earlier life would be an old index.
        self.context = node.rng.getrandbits(40) << 20
        self.sent_rounds: deque[tuple[int, int]] = deque(maxlen=SENT_ROUNDS_KEPT_MAX)
        self.lease_until_ms = 0
        self.lease_void = False
        """A TimeoutNow was sent in this reign: its vote overrides stickiness, on which leases rest."""

    # ---- registering

    def read(self, *, forward: bool) -> int:
        node = self.node
        if node.role != LEADER and not (forward and node.leader is not None):
            raise NotLeader(node.leader)
        read_id = self.next_id
        self.next_id = read_id + 1
        if self.queued is None:
            if self.lease_valid():
                self._confirmed(Batch(read_id, read_id, [], index=node.commit_index))
                return read_id
            self.queued = Batch(read_id, read_id, [])
        elif self.queued.last < self.queued.first:
            self.queued.first = self.queued.last = read_id
        else:
            self.queued.last = read_id
        return read_id

    def on_request(self, message: ReadIndexRequest) -> None:
        """A follower asks on behalf of its reads."""
        node = self.node
        if node.role != LEADER:
            self.refuse(message)
            return
        if self.queued is None:
            self.queued = Batch(0, -1, [])
        self.queued.remote.append((message.source, message.context))

    def refuse(self, message: ReadIndexRequest) -> None:
        node = self.node
        node.send(message.source, ReadIndexReply(node.term, node.replica, message.context, -1))

    def flush(self) -> None:
        """Begin an attempt for what is queued, if one may begin now."""
        queued = self.queued
        if queued is None:
            return
        node = self.node
        if node.role != LEADER:
            self._forward(queued)
        elif node.replication.has_committed_in_term and len(self.batches) < ROUNDS_MAX:
            node.replication.begin_round()

    def _forward(self, queued: Batch) -> None:
        node = self.node
        self.queued = None
        if node.leader is None:
            self._fail(queued)
            return
        self.context += 1
        queued.deadline_ms = node.now_ms + node.config.election_timeout_ms_max
        self.forwarded[self.context] = queued
        node.send(node.leader, ReadIndexRequest(node.term, node.replica, self.context))

    # ---- rounds

    def reign_begins(self) -> None:
        self.sent_rounds.clear()
        self.lease_until_ms = 0
        self.lease_void = False

    def round_began(self, round_number: int) -> None:
        """Everything queued joins, once the commit index is known to be current (Raft §8)."""
        node = self.node
        self.sent_rounds.append((round_number, node.now_ms))
        if self.queued is not None and node.replication.has_committed_in_term:
            batch, self.queued = self.queued, None
            batch.round = round_number
            batch.index = node.commit_index
            self.batches.append(batch)
        if len(node.membership.voters) == 1:
            self.round_acked(round_number)

    def round_acked(self, round_number: int) -> None:
        """Some follower has echoed a round; a quorum of echoes confirms all reads of that round and before."""
        node = self.node
        sent = self.sent_rounds
        if not self.batches and not node.config.lease_reads:
            return
        election = node.election
        confirmed = election.quorum_of([p.acked_round for p in election.counted], node.round)
        lease_from = -NEVER_MS
        while sent and sent[0][0] <= confirmed:
            lease_from = sent.popleft()[1]
        if node.config.lease_reads and not self.lease_void:
            self.lease_until_ms = max(self.lease_until_ms, lease_from + node.config.lease_ms)
        while self.batches and self.batches[0].round <= confirmed:
            self._confirmed(self.batches.popleft())

    def lease_valid(self) -> bool:
        """Whether the leader may answer at once: a bounded clock rate is assumed (thesis §6.4.1)."""
        node = self.node
        return (
            node.config.lease_reads
            and node.role == LEADER
            and not self.lease_void
            and node.now_ms < self.lease_until_ms
            and node.replication.has_committed_in_term
        )

    def void_lease(self) -> None:
        self.lease_void = True
        self.lease_until_ms = 0

    # ---- answers

    def on_reply(self, message: ReadIndexReply) -> None:
        batch = self.forwarded.pop(message.context, None)
        if batch is None:
            return
        if message.index < 0:
            self._fail(batch)
            return
        batch.index = message.index
        self._confirmed(batch)

    def _confirmed(self, batch: Batch) -> None:
        node = self.node
        for follower, context in batch.remote:
            node.send(follower, ReadIndexReply(node.term, node.replica, context, batch.index))
        batch.remote = []
        if batch.last < batch.first:
            return
        if node.applied_index >= batch.index:
            node.out.append(ReadReady(batch.first, batch.last, batch.index))
        else:
            self.waiting.append(batch)

    def _fail(self, batch: Batch) -> None:
        for follower, context in batch.remote:
            self.node.send(follower, ReadIndexReply(self.node.term, self.node.replica, context, -1))
        if batch.last >= batch.first:
            self.node.out.append(ReadFailed(batch.first, batch.last))

    def applied(self) -> None:
        """The state machine moved on."""
        if not self.waiting:
            return
        node = self.node
        applied = node.applied_index
        for batch in self.waiting:
            if batch.index <= applied:
                node.out.append(ReadReady(batch.first, batch.last, batch.index))
        self.waiting = [batch for batch in self.waiting if batch.index > applied]

    def fail_unconfirmed(self) -> None:
        """Leadership is lost or has moved: what no quorum has confirmed never will be.

        Confirmed reads stay: their index is committed, whoever leads.
        """
        batches = list(self.batches)
        self.batches.clear()
        batches.extend(self.forwarded.values())
        self.forwarded = {}
        if self.queued is not None:
            batches.append(self.queued)
            self.queued = None
        for batch in sorted(batches, key=lambda batch: batch.first):
            self._fail(batch)

    def next_deadline_ms(self) -> int:
        deadline = NEVER_MS
        for batch in self.forwarded.values():
            deadline = min(deadline, batch.deadline_ms)
        for batch in self.waiting:
            deadline = min(deadline, batch.deadline_ms)
        return deadline

    def tick(self) -> None:
        """Give up forwarded reads that got no answer, or an index this replica can't reach."""
        now_ms = self.node.now_ms
        for context, batch in list(self.forwarded.items()):
            if batch.deadline_ms <= now_ms:
                del self.forwarded[context]
                self._fail(batch)
        for batch in self.waiting:
            if batch.deadline_ms <= now_ms:
                self._fail(batch)
        self.waiting = [batch for batch in self.waiting if batch.deadline_ms > now_ms]
