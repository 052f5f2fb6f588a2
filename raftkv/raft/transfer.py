"""Handing leadership over (thesis §3.10): catch the target up, then tell it to campaign at once.

Proposals are refused meanwhile; after an election timeout without success the attempt is given up and they are
taken again. A lease never outlives the order to campaign.
"""

from __future__ import annotations

from raftkv.raft.actions import TransferEnded
from raftkv.raft.errors import ChangeRefused, NotLeader
from raftkv.raft.messages import TimeoutNow
from raftkv.raft.progress import Progress
from raftkv.raft.state import FOLLOWER, LEADER, NEVER_MS, Node


class Transfer:
    """The leader's side: `target` is None when no transfer is under way."""

    __slots__ = ("deadline_ms", "node", "target")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.target: int | None = None
        self.deadline_ms = NEVER_MS

    def start(self, target: int | None) -> None:
        node = self.node
        if node.role != LEADER:
            raise NotLeader(node.leader)
        if self.target is not None and target in (None, self.target):
            return
        if self.target is not None:
            raise ChangeRefused(f"leadership is already moving to replica {self.target}")
        if target == node.replica:
            raise ChangeRefused(f"replica {target} leads already")
        chosen = self._best() if target is None else node.progress.get(target)
        if chosen is None or chosen.replica not in node.membership.voters:
            raise ChangeRefused("there is no other voter" if target is None else f"replica {target} is no voter")
        if chosen.regressed:
            raise ChangeRefused(f"replica {chosen.replica} lost part of its log and must be replaced")
        self.target = chosen.replica
        self.deadline_ms = node.now_ms + node.config.election_timeout_ms_max
        self.progressed(chosen)

    def _best(self) -> Progress | None:
        """The voter with the longest matching log that was heard last; the lowest number of equals."""
        candidates = self.node.election.counted
        return max(candidates, key=lambda p: (p.match, p.last_heard_ms, -p.replica), default=None)

    def progressed(self, p: Progress) -> None:
        """Give the order once the target has the whole log."""
        if p.match == self.node.log.last_index:
            self.order(p.replica)

    def order(self, target: int) -> None:
        self.node.reads.void_lease()
        self.node.send(target, TimeoutNow(self.node.term, self.node.replica))

    def heartbeat(self) -> None:
        """Repeat the order: it may have been lost."""
        p = self.node.progress.get(self.target) if self.target is not None else None
        if p is not None:
            self.progressed(p)

    def tick(self) -> None:
        if self.target is not None and self.node.now_ms >= self.deadline_ms:
            self.give_up()

    def give_up(self) -> None:
        assert self.target is not None
        self.node.out.append(TransferEnded(self.target))
        self.clear()

    def membership_changed(self) -> None:
        if self.target is not None and self.target not in self.node.membership.voters:
            self.give_up()

    def clear(self) -> None:
        self.target = None
        self.deadline_ms = NEVER_MS

    def reign_begins(self) -> None:
        self.clear()

    def on_timeout_now(self, message: TimeoutNow) -> None:
        """The target's side; one that is no voter ignores it."""
        if self.node.role == FOLLOWER and self.node.leader in (None, message.source):
            self.node.election.timeout_now()
