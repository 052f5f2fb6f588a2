"""The follower's half of log replication (Raft §5.3; Figure 2, AppendEntries RPC).

The log is cut only where an entry really conflicts, and never at or below the commit index: there it is proof that
history is lost, and the replica stops. One reply for all appends of a turn, sent once they are on disk; a round
it has not echoed yet is echoed at once, because leadership can be confirmed without waiting for a disk.
"""

from __future__ import annotations

from raftkv.raft.actions import Send
from raftkv.raft.entry import Entry
from raftkv.raft.errors import SafetyViolation
from raftkv.raft.messages import AppendEntries, AppendReply
from raftkv.raft.replication import MEMBERSHIP
from raftkv.raft.state import FOLLOWER, LEADER, LEARNER, Node


class Following:
    """Takes entries from the leader; owes it one acknowledgement a turn."""

    __slots__ = ("ack_index", "ack_round", "ack_term", "ack_to", "node", "promised_index", "round_echoed")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.ack_to: int | None = None
        """The leader that is owed a reply at the next flush, its term, and what may be said in it."""
        self.ack_term = 0
        self.ack_index = 0
        self.ack_round = 0
        self.round_echoed = 0
        self.promised_index = 0
        """An acknowledgement up to here waits for the disk already."""

    def on_append(self, message: AppendEntries) -> None:
        node = self.node
        self.follow(message.source)
        if self.ack_term != node.term or self.ack_to not in (None, message.source):
            self.ack_to = None
            self.ack_term = node.term
            self.ack_index = self.ack_round = self.round_echoed = self.promised_index = 0
        log = node.log
        prev_index = message.prev_index
        entries = message.entries
        commit_index = node.commit_index
        if node.installing:
            entries = ()
        if prev_index < commit_index:
            entries = self._beyond_commit(prev_index, message.prev_term, entries)
            prev_index = commit_index
        elif log.term_at(prev_index) != message.prev_term:
            if prev_index == commit_index:
                raise SafetyViolation(
                    f"replica {node.replica}: committed entry {prev_index} is of term "
                    f"{log.term_at(prev_index)}, leader {message.source} has term {message.prev_term} there"
                )
            self._reject(message)
            return
        if entries:
            self._take(entries)
            matched = entries[-1].index
        else:
            matched = prev_index
        if message.commit > commit_index and not node.installing:
            commit = message.commit if message.commit < matched else matched
            if commit > commit_index:
                node.replication.commit_to(commit)
        if self.ack_to is None:
            self.ack_to = message.source
            self.ack_index = matched
            self.ack_round = message.round
        else:
            if matched > self.ack_index:
                self.ack_index = matched
            if message.round > self.ack_round:
                self.ack_round = message.round

    def follow(self, leader: int) -> None:
        """A message that only this term's leader sends: there is one, and it lives."""
        node = self.node
        if node.leader != leader or node.role not in (FOLLOWER, LEARNER):
            if node.role == LEADER:
                raise SafetyViolation(f"replicas {node.replica} and {leader} both lead term {node.term}")
            node.become_follower(node.term, leader)
        node.election.heard_leader()

    def _beyond_commit(self, prev_index: int, prev_term: int, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """What of `entries` lies beyond the commit index: all before is known to match, or else all is lost."""
        node = self.node
        log = node.log
        commit_index = node.commit_index
        known = entries[: commit_index - prev_index]
        pairs = [(prev_index, prev_term)]
        if known:
            pairs.append((known[-1].index, known[-1].term))
        for index, term in pairs:
            mine = log.term_at(index)
            if mine is not None and mine != term:
                raise SafetyViolation(
                    f"replica {node.replica}: committed entry {index} is of term {mine}, the leader's of {term}"
                )
        return entries[len(known) :]

    def _take(self, entries: tuple[Entry, ...]) -> None:
        """Append what is new; cut the log only where an entry conflicts (Figure 2)."""
        node = self.node
        log = node.log
        first = entries[0].index
        last = log.last_index
        if first <= last:
            known = 0
            for entry in entries:
                index = entry.index
                if index > last:
                    break
                if log.term_at(index) != entry.term:
                    if index <= node.commit_index:
                        raise SafetyViolation(f"replica {node.replica}: committed entry {index} would be cut off")
                    log.truncate(index)
                    node.changes.truncated(index)
                    break
                known += 1
            if known:
                entries = entries[known:]
                if not entries:
                    return
        log.extend(entries)
        for entry in entries:
            if entry.kind == MEMBERSHIP:
                node.changes.appended(entry)

    def _reject(self, message: AppendEntries) -> None:
        """Say where the logs may still match: never below the commit index, where they do."""
        node = self.node
        log = node.log
        hint = log.last_not_beyond(message.prev_index, message.prev_term)
        if hint < node.commit_index:
            hint = node.commit_index
        term = log.term_at(hint)
        assert term is not None, (hint, log.start_index, log.last_index)
        node.send(
            message.source,
            AppendReply(
                node.term,
                node.replica,
                False,
                message.prev_index,
                hint,
                term,
                log.last_index,
                node.commit_index,
                message.round,
            ),
        )
        self.round_echoed = max(self.round_echoed, message.round)

    def refuse_old(self, source: int) -> None:
        """A leader of an older term learns of the newer one, and steps down (thesis §4.2.3)."""
        node = self.node
        log = node.log
        node.send(
            source,
            AppendReply(node.term, node.replica, False, 0, 0, 0, log.last_index, node.commit_index, 0),
        )

    def flush(self) -> None:
        """After the turn's Persist was emitted: the one acknowledgement, to leave when that is durable."""
        to = self.ack_to
        if to is None:
            return
        self.ack_to = None
        node = self.node
        if self.ack_term != node.term or node.leader != to:
            return
        stable = node.log.stable_index
        if stable >= self.ack_index:
            self._send_ack(to, self.ack_index, node.after())
            return
        if self.ack_round > self.round_echoed:
            self._send_ack(to, min(stable, self.ack_index), node.after())
        if self.ack_index > self.promised_index:
            self.promised_index = self.ack_index
            self._send_ack(to, self.ack_index, max(node.next_seq - 1, node.after()))

    def _send_ack(self, to: int, index: int, after: int) -> None:
        node = self.node
        self.round_echoed = max(self.round_echoed, self.ack_round)
        reply = AppendReply(
            node.term,
            node.replica,
            True,
            index,
            index,
            0,
            node.log.last_index,
            node.commit_index,
            self.ack_round,
        )
        node.out.append(Send(to, reply, after))
