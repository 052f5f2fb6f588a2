"""Who takes part: the membership in force, and its changes one server at a time (Raft §6; thesis §4).

The newest membership in the log is in force from its append on, committed or not, and goes with its entry when
that is cut off. A leader begins a change only when the previous one is committed *and* it has committed an entry
of its own term: without the second, two leaders can act on memberships whose quorums don't meet (Ongaro,
raft-dev, July 2015).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from raftkv.raft.actions import MembershipChanged
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import ChangeRefused, NotLeader, Transferring
from raftkv.raft.membership import Membership
from raftkv.raft.progress import REPLICATE, Progress
from raftkv.raft.state import FOLLOWER, LEADER, LEARNER, Node


@dataclass(frozen=True, slots=True)
class AddLearner:
    """A new replica, with the id of its store: it gets the log, and has no vote."""

    replica: int
    store: bytes = b""


@dataclass(frozen=True, slots=True)
class Promote:
    """A learner that has caught up becomes a voter."""

    replica: int


@dataclass(frozen=True, slots=True)
class Remove:
    """A voter or learner leaves; the leader itself too, which steps down when that is committed."""

    replica: int


@dataclass(frozen=True, slots=True)
class RecordStores:
    """Write down the store ids of the members; nobody's rights change."""

    stores: tuple[tuple[int, bytes], ...]


Change = AddLearner | Promote | Remove | RecordStores


class Changes:
    """The memberships in the log, oldest first; the first one is that at the log's start, or before it."""

    __slots__ = ("history", "leaving", "node")

    def __init__(self, node: Node, start_membership: Membership) -> None:
        self.node = node
        self.history: list[tuple[int, Membership]] = [(node.log.start_index, start_membership)]
        self.leaving = False
        """This leader is no longer a voter, and that is committed: it leaves with the next flush."""
        for entry in node.log.entries:
            if entry.kind == EntryKind.MEMBERSHIP:
                self.history.append((entry.index, Membership.decode(entry.data)))
        node.membership = self.history[-1][1]

    @property
    def newest_index(self) -> int:
        return self.history[-1][0]

    # ---- the leader's part

    def propose(self, change: Change) -> Entry:
        node = self.node
        if node.role != LEADER:
            raise NotLeader(node.leader)
        if node.transfer.target is not None:
            raise Transferring(node.transfer.target)
        if self.newest_index > node.commit_index:
            raise ChangeRefused("the previous change of membership is not committed yet")
        if not self.may_change():
            raise ChangeRefused("the leader has not committed an entry of its term yet")
        membership = self._changed(change)
        return node.replication.append(int(EntryKind.MEMBERSHIP), membership.encode(), None)

    def may_change(self) -> bool:
        """The barrier: an entry of the leader's own term is committed."""
        return self.node.replication.has_committed_in_term

    def _changed(self, change: Change) -> Membership:
        node = self.node
        old = node.membership
        if isinstance(change, RecordStores):
            if sorted(replica for replica, _ in change.stores) != list(old.members):
                raise ChangeRefused("stores must be named for every member, and no other")
            return replace(old, stores=tuple(sorted(change.stores)))
        replica = change.replica
        if isinstance(change, AddLearner):
            if replica in old.members:
                raise ChangeRefused(f"replica {replica} is a member already")
            stores = tuple(sorted((*old.stores, (replica, change.store)))) if change.store else old.stores
            return Membership(old.voters, tuple(sorted((*old.learners, replica))), stores)
        if isinstance(change, Promote):
            if replica not in old.learners:
                raise ChangeRefused(f"replica {replica} is no learner")
            self._require_caught_up(node.progress[replica])
            learners = tuple(other for other in old.learners if other != replica)
            return Membership(tuple(sorted((*old.voters, replica))), learners, old.stores)
        if replica not in old.members:
            raise ChangeRefused(f"replica {replica} is no member")
        voters = tuple(other for other in old.voters if other != replica)
        if not voters:
            raise ChangeRefused("the last voter can't be removed")
        return Membership(
            voters,
            tuple(other for other in old.learners if other != replica),
            tuple((other, store) for other, store in old.stores if other != replica),
        )

    def _require_caught_up(self, p: Progress) -> None:
        lag = self.node.log.last_index - p.match
        if p.state is not REPLICATE or lag > self.node.config.promote_lag_entries_max or p.regressed:
            raise ChangeRefused(f"learner {p.replica} has not caught up: it is {lag} entries behind")

    def committed(self) -> None:
        """Leader: the commit index moved."""
        if not self.node.is_voter and self.newest_index <= self.node.commit_index:
            self.leaving = True

    def flush(self) -> None:
        """A removed leader leaves: the rest hear of the commit first, and the best of them is told to campaign."""
        if not self.leaving:
            return
        self.leaving = False
        node = self.node
        if node.role != LEADER or node.is_voter:
            return
        node.replication.begin_round()
        node.replication.flush()
        best = max(node.election.counted, key=lambda p: (p.match, -p.replica), default=None)
        if best is not None:
            node.transfer.order(best.replica)
        node.become_follower(node.term, None)

    # ---- every replica's part

    def appended(self, entry: Entry) -> None:
        self.history.append((entry.index, Membership.decode(entry.data)))
        self._in_force()

    def truncated(self, index: int) -> None:
        """Entries from `index` on were cut off: an uncommitted change among them is undone."""
        if self.newest_index < index:
            return
        while self.newest_index >= index:
            self.history.pop()
        self._in_force()

    def compacted(self, index: int) -> None:
        while len(self.history) > 1 and self.history[1][0] <= index:
            del self.history[0]

    def reset(self, index: int, membership: Membership) -> None:
        """A snapshot with this membership was installed."""
        self.history = [(index, membership)]
        self._in_force()

    def start_membership(self) -> Membership:
        """The membership at the log's start."""
        return self.history[0][1]

    def _in_force(self) -> None:
        node = self.node
        index, membership = self.history[-1]
        node.membership = membership
        node.out.append(MembershipChanged(membership, index))
        if node.role == LEADER:
            self._serve(membership)
            return
        assert node.role in (FOLLOWER, LEARNER), node.role  # a campaign ends before an entry is taken
        if node.role != (FOLLOWER if node.is_voter else LEARNER):
            node.set_role(FOLLOWER, node.leader)
            node.election.restart_timer()

    def _serve(self, membership: Membership) -> None:
        """Leader: begin to serve new members, end to serve those that are gone."""
        node = self.node
        for member in membership.members:
            if member != node.replica and member not in node.progress:
                node.progress[member] = Progress(member, node.log.last_index + 1, node.now_ms)
        for member in list(node.progress):
            if member not in membership.members:
                node.snapshots.release(member)
                del node.progress[member]
        node.election.recount()
        node.transfer.membership_changed()
        node.replication.dirty = True
