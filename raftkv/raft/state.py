"""The state that the parts of one replica share, and the hub through which they reach each other.

`Node` decides nothing. Each concern (election, replication, reads, changes, snapshots, transfer) has a module
of its own, holds what only it needs, and reads and writes the rest here. The one rule kept here is that of
durability: every message is stamped with the Persist it has to wait for.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from raftkv.raft.actions import Action, HardState, RoleChanged, Send
from raftkv.raft.config import RaftConfig
from raftkv.raft.log import Log
from raftkv.raft.membership import Membership
from raftkv.raft.messages import Message
from raftkv.raft.progress import Progress

if TYPE_CHECKING:
    from raftkv.raft.changes import Changes
    from raftkv.raft.election import Election
    from raftkv.raft.reads import Reads
    from raftkv.raft.replication import Replication
    from raftkv.raft.snapshots import Snapshots
    from raftkv.raft.transfer import Transfer

FOLLOWER = "follower"
PRECANDIDATE = "precandidate"
CANDIDATE = "candidate"
LEADER = "leader"
LEARNER = "learner"

NEVER_MS = 1 << 62
"""A deadline that never comes."""


class Node:
    """Shared state. Times are the shell's monotonic ms, as last seen in `now_ms`."""

    __slots__ = (
        "applied_index",
        "changes",
        "commit_index",
        "config",
        "election",
        "emitted_index",
        "hard_state_dirty",
        "hard_state_seq",
        "installing",
        "leader",
        "log",
        "membership",
        "next_seq",
        "now_ms",
        "out",
        "persisted_seq",
        "progress",
        "reads",
        "replica",
        "replication",
        "rng",
        "role",
        "round",
        "snapshots",
        "term",
        "transfer",
        "vote",
    )

    changes: Changes
    election: Election
    reads: Reads
    replication: Replication
    snapshots: Snapshots
    transfer: Transfer

    def __init__(
        self,
        config: RaftConfig,
        rng: random.Random,
        now_ms: int,
        hard_state: HardState,
        log: Log,
        membership: Membership,
        applied_index: int,
    ) -> None:
        assert log.start_index <= applied_index <= log.last_index, (applied_index, log.start_index)
        self.config = config
        self.replica = config.replica
        self.rng = rng
        self.now_ms = now_ms
        self.term = hard_state.term
        self.vote = hard_state.vote
        self.log = log
        self.membership = membership
        self.role = FOLLOWER
        self.leader: int | None = None
        self.commit_index = applied_index
        self.applied_index = applied_index
        self.emitted_index = applied_index
        """The last index handed out in a Commit."""
        self.progress: dict[int, Progress] = {}
        """On the leader: one for every other member."""
        self.round = 0
        """The newest quorum round; only ever rises, so a term's rounds are its own."""
        self.installing = False
        """The shell swaps in a snapshot: log and commit index stand still, and no Persist is emitted."""
        self.out: list[Action] = []
        self.next_seq = 1
        self.persisted_seq = 0
        self.hard_state_dirty = False
        self.hard_state_seq = 0

    # ---- durability

    def after(self) -> int:
        """The Persist that makes the current term and vote durable; 0 if they are."""
        if self.hard_state_dirty:
            return self.next_seq
        return self.hard_state_seq if self.hard_state_seq > self.persisted_seq else 0

    def send(self, to: int, message: Message) -> None:
        """No message of a term leaves before that term and its vote are on disk."""
        self.out.append(Send(to, message, self.after()))

    def set_hard_state(self, term: int, vote: int | None) -> None:
        assert term > self.term or (term == self.term and self.vote in (None, vote)), (self.term, self.vote)
        self.term = term
        self.vote = vote
        self.hard_state_dirty = True

    # ---- roles

    @property
    def is_voter(self) -> bool:
        return self.replica in self.membership.voters

    def set_role(self, role: str, leader: int | None) -> None:
        """Enter `role` (in the current term), and say so: the caller has a change to tell."""
        if role == FOLLOWER and not self.is_voter:
            role = LEARNER
        self.role = role
        self.leader = leader
        self.out.append(RoleChanged(role, self.term, leader))

    def become_follower(self, term: int, leader: int | None) -> None:
        """Follow in `term`; whatever belonged to another role or an older term ends here."""
        assert term >= self.term, (term, self.term)
        was = (self.role, self.term, self.leader)
        if term > self.term:
            self.set_hard_state(term, None)
        if was[0] == LEADER:
            self.snapshots.release_all()
            self.transfer.clear()
            self.progress = {}
        if was[0] == LEADER or (was[2] is not None and leader != was[2]) or term > was[1]:
            self.reads.fail_unconfirmed()
        role = FOLLOWER if self.is_voter else LEARNER
        if was != (role, term, leader):
            self.set_role(role, leader)
        if was[0] != role:
            self.election.restart_timer()
