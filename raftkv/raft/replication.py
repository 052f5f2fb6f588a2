"""The leader's half of log replication (Raft §5.3, §5.4.2; thesis §10.2 for pipelining and parallel writes).

Appends are emitted lazily, in `flush`: what was proposed in one loop turn travels together, and followers that
wait for the same entries get one and the same message object. The leader counts itself only through what its own
disk has confirmed, and commits only entries of its own term by counting; it never overwrites its own log.
"""

from __future__ import annotations

from raftkv.raft.actions import PeerRegressed, Send
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import Busy, NotLeader, Transferring
from raftkv.raft.messages import AppendEntries, AppendReply
from raftkv.raft.progress import PROBE, REPLICATE, SNAPSHOT, Progress
from raftkv.raft.state import LEADER, NEVER_MS, Node

MEMBERSHIP = int(EntryKind.MEMBERSHIP)
NOOP = int(EntryKind.NOOP)


class Replication:
    """Proposals, the flow of entries to every follower, and the commit index."""

    __slots__ = ("base_ms", "base_stamp_ms", "dirty", "heartbeat_ms", "node", "term_start", "uncommitted_bytes")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.dirty = False
        """There may be something to send."""
        self.heartbeat_ms = NEVER_MS
        self.term_start = 0
        """Index of the no-op of this reign; everything from there on is of the leader's own term."""
        self.uncommitted_bytes = 0
        self.base_ms = 0
        self.base_stamp_ms = 0

    # ---- reign

    def reign_begins(self) -> None:
        node = self.node
        log = node.log
        self.base_ms = node.now_ms
        self.base_stamp_ms = log.last_stamp_ms
        waiting = log.slice(node.commit_index + 1, log.last_index)
        self.uncommitted_bytes = sum([len(entry.encoded) for entry in waiting])
        self.term_start = log.last_index + 1
        self.append(NOOP, b"", None)
        self.begin_round()
        self.heartbeat_ms = node.now_ms + node.config.heartbeat_ms

    @property
    def has_committed_in_term(self) -> bool:
        return self.node.commit_index >= self.term_start

    def begin_round(self) -> int:
        """A fresh quorum round: every follower hears of it with the next flush."""
        node = self.node
        node.round += 1
        self.dirty = True
        node.reads.round_began(node.round)
        return node.round

    def tick(self) -> None:
        """Leader: heartbeats."""
        node = self.node
        if node.now_ms >= self.heartbeat_ms:
            self.heartbeat_ms = node.now_ms + node.config.heartbeat_ms
            self.begin_round()
            node.election.check_quorum()
            if node.role == LEADER:
                node.transfer.heartbeat()

    # ---- proposals

    def propose(self, kind: int, data: bytes, memo: object | None, *, reserved: bool) -> Entry:
        node = self.node
        if node.role != LEADER:
            raise NotLeader(node.leader)
        if node.transfer.target is not None:
            raise Transferring(node.transfer.target)
        limit = node.config.uncommitted_bytes_max
        if reserved:
            limit += node.config.reserve_bytes
        waiting = self.uncommitted_bytes
        if waiting and waiting + len(data) > limit:
            raise Busy(limit)
        return self.append(kind, data, memo)

    def append(self, kind: int, data: bytes, memo: object | None) -> Entry:
        node = self.node
        log = node.log
        entry = Entry.make(node.term, log.last_index + 1, kind, self.stamp_now(), data, memo)
        log.append(entry)
        self.uncommitted_bytes += len(entry.encoded)
        self.dirty = True
        if kind == MEMBERSHIP:
            node.changes.appended(entry)
        return entry

    def stamp_now(self) -> int:
        """Replicated time: the log's last stamp at take-over, and this leader's monotonic clock since."""
        last = self.node.log.last_stamp_ms
        if self.node.role != LEADER:
            return last
        stamp = self.base_stamp_ms + self.node.now_ms - self.base_ms
        return stamp if stamp > last else last

    # ---- sending

    def flush(self) -> None:
        """Send what the windows allow, then the newest round to whoever has not been told of it."""
        if not self.dirty:
            return
        self.dirty = False
        node = self.node
        last = node.log.last_index
        after = node.after()
        newest = node.round
        config = node.config
        built: dict[int, AppendEntries] = {}
        for p in list(node.progress.values()):
            if p.state is REPLICATE:
                while (
                    p.next <= last
                    and len(p.inflight) < config.inflight_messages_max
                    and p.inflight_bytes < config.inflight_bytes_max
                ):
                    if not self._send_entries(p, built, after):
                        break
            elif p.state is PROBE and not p.paused:
                p.paused = self._send_entries(p, built, after)
                p.probe_round = newest
            if p.round_sent < newest:
                self._send_heartbeat(p, after)

    def _send_entries(self, p: Progress, built: dict[int, AppendEntries], after: int) -> bool:
        """Send entries from `p.next` on; False if they are no longer in the log."""
        node = self.node
        log = node.log
        message = built.get(p.next)
        if message is None:
            prev_index = p.next - 1
            prev_term = log.term_at(prev_index)
            if prev_term is None:
                node.snapshots.want(p)
                return False
            entries = log.slice_bytes(p.next, node.config.append_bytes_max)
            message = AppendEntries(
                node.term, node.replica, prev_index, prev_term, entries, node.commit_index, node.round
            )
            built[p.next] = message
        entries = message.entries
        if len(entries) == 1:
            p.sent(entries[0].index, len(entries[0].encoded))
        elif entries:
            p.sent(entries[-1].index, sum([len(entry.encoded) for entry in entries]))
        p.round_sent = node.round
        node.out.append(Send(p.replica, message, after))
        return True

    def _send_heartbeat(self, p: Progress, after: int) -> None:
        """An append without entries. To a follower whose log isn't matched it vouches for no more than is."""
        node = self.node
        log = node.log
        prev_index = log.start_index if p.state is SNAPSHOT else p.next - 1
        prev_term = log.term_at(prev_index)
        if prev_term is None:
            node.snapshots.want(p)
            prev_index, prev_term = log.start_index, log.start_term
        commit = node.commit_index if p.state is REPLICATE else min(p.match, node.commit_index)
        p.round_sent = node.round
        node.out.append(
            Send(
                p.replica,
                AppendEntries(node.term, node.replica, prev_index, prev_term, (), commit, node.round),
                after,
            )
        )

    # ---- replies

    def on_reply(self, message: AppendReply) -> None:
        node = self.node
        if node.role != LEADER:
            return
        p = node.progress.get(message.source)
        if p is None:
            return
        p.last_heard_ms = node.now_ms
        if message.round > p.acked_round:
            assert message.round <= node.round, (message.round, node.round)
            p.acked_round = message.round
            node.reads.round_acked(message.round)
        if message.ok:
            self._on_match(p, message.match_index, message.round)
        else:
            self._on_reject(p, message)

    def _on_match(self, p: Progress, index: int, acked_round: int) -> None:
        node = self.node
        assert index <= node.log.last_index, (p.replica, index, node.log.last_index)
        raised = p.acked(index, node.round)
        state = p.state
        if state is PROBE:
            if index >= p.next - 1:
                p.become_replicate(acked_round)
                self.dirty = True
        elif state is SNAPSHOT:
            if index >= node.log.start_index:
                node.snapshots.release(p.replica)
                p.become_replicate(acked_round)
                self.dirty = True
        elif p.next <= node.log.last_index:
            self.dirty = True
        if raised:
            if index > node.commit_index:
                self.maybe_commit()
            if node.transfer.target == p.replica:
                node.transfer.progressed(p)

    def _on_reject(self, p: Progress, message: AppendReply) -> None:
        """Back up by conflict term (Raft §5.3, end): both sides skip what can't match.

        A rejection names the refused previous index in `match_index`; older news is passed over.
        """
        node = self.node
        if message.last_index < p.match and message.round > p.match_round and not p.regressed:
            # A reply to a round begun after the acknowledgement came in: no reordering explains it.
            node.out.append(PeerRegressed(p.replica, p.match, message.last_index))
            p.regressed = True
            p.match = 0
            node.election.recount()
        if p.state is SNAPSHOT or message.match_index <= p.match:
            return
        if p.state is PROBE and message.match_index != p.next - 1:
            return
        guess = max(p.match, node.log.last_not_beyond(message.hint_index, message.hint_term)) + 1
        stuck = p.state is PROBE and guess >= p.next
        p.become_probe(guess)
        p.paused = stuck  # the same probe again only with the next heartbeat
        self.dirty = True

    # ---- commit

    def maybe_commit(self) -> None:
        """Advance the commit index to what a quorum has on disk, if that is of this term (Raft §5.4.2)."""
        node = self.node
        election = node.election
        index = election.quorum_of([p.match for p in election.counted], node.log.stable_index)
        if index > node.commit_index and self.may_commit(index):
            self.commit_to(index)

    def may_commit(self, index: int) -> bool:
        """Only entries of the own term are committed by counting (Figure 8)."""
        return index >= self.term_start

    def commit_to(self, index: int) -> None:
        """The commit index moves up to `index`, on any role."""
        node = self.node
        begin = node.commit_index
        assert begin < index <= node.log.last_index, (begin, index, node.log.last_index)
        node.commit_index = index
        if node.role == LEADER:
            start = node.log.start_index
            committed = node.log.entries[begin - start : index - start]
            self.uncommitted_bytes -= sum([len(entry.encoded) for entry in committed])
            node.changes.committed()

    # ---- hints of the transport

    def peer_unreachable(self, peer: int) -> None:
        p = self.node.progress.get(peer)
        if p is not None and p.state is not SNAPSHOT:
            p.become_probe(p.match + 1)
            p.paused = True

    def peer_reachable(self, peer: int) -> None:
        p = self.node.progress.get(peer)
        if p is None:
            return
        if p.state is SNAPSHOT:
            self.node.snapshots.retry(peer)
        else:
            p.become_probe(p.match + 1)
            self.dirty = True
