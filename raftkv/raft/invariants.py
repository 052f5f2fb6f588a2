"""What must hold after every step, and between one step and the next (Raft, Figure 3; LogCabin's Invariants).

For tests and the simulator: it only looks, at one replica (`ReplicaChecker`) and at all of them together
(`ClusterChecker`). The work per step is bounded by what changed, so that it can run after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry
from raftkv.raft.progress import PROBE, SNAPSHOT
from raftkv.raft.quorum import quorum_size
from raftkv.raft.state import CANDIDATE, FOLLOWER, LEADER, LEARNER, PRECANDIDATE


class InvariantViolation(AssertionError):
    """`name` is the invariant's, as tests of ablated rules expect it."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


def violated(name: str, detail: object) -> NoReturn:
    raise InvariantViolation(name, str(detail))


class ReplicaChecker:
    """State and delta invariants of one incarnation of one replica."""

    def __init__(self, raft: Raft) -> None:
        self.term = raft.term
        self.vote = raft.vote
        self.role = raft.role
        self.commit_index = raft.commit_index
        self.applied_index = raft.applied_index
        self.start_index = raft.start_index
        self.persisted_seq = 0
        self.entries: list[Entry] = []
        """The log as last seen, from `entries_start` + 1 on; entries are immutable objects."""
        self.entries_start = raft.start_index
        self.truncated = 0
        """How often entries were cut off."""

    def check(self, raft: Raft) -> list[Entry]:
        """Check, remember, and return the entries that are new in the log since the last call."""
        self._check_state(raft)
        self._check_delta(raft)
        new = self._new_entries(raft)
        self.term, self.vote, self.role = raft.term, raft.vote, raft.role
        self.commit_index, self.applied_index = raft.commit_index, raft.applied_index
        self.start_index = raft.start_index
        self.persisted_seq = raft.node.persisted_seq
        return new

    def _check_state(self, raft: Raft) -> None:
        node = raft.node
        log = node.log
        bounds = (log.start_index, node.applied_index, node.emitted_index, node.commit_index, log.last_index)
        if list(bounds) != sorted(bounds):
            violated("IndexOrder", f"start ≤ applied ≤ emitted ≤ commit ≤ last: {bounds}")
        if not log.stable_index <= max(log.queued_index, log.start_index) <= log.last_index:
            violated("IndexOrder", (log.stable_index, log.queued_index, log.last_index))
        if log.last_index - log.start_index != len(log.entries) or log.bytes < 0:
            violated("LogAccounting", (log.start_index, log.last_index, len(log.entries), log.bytes))
        if node.term < log.last_term:
            violated("TermOfLog", f"term {node.term} is below its log's {log.last_term}")
        if node.role not in (FOLLOWER, LEARNER, PRECANDIDATE, CANDIDATE, LEADER):
            violated("Role", node.role)
        if node.role == CANDIDATE and node.vote != node.replica:
            violated("CandidateVotesForItself", node.vote)
        if (node.role == LEADER) != (node.leader == node.replica):
            violated("Role", f"{node.role} and its leader is {node.leader}")
        if node.role in (CANDIDATE, PRECANDIDATE) and not node.is_voter:
            violated("OnlyVotersCampaign", node.membership)
        newest_index, newest = node.changes.history[-1]
        if newest is not node.membership or newest_index > log.last_index:
            violated("MembershipInForce", (newest_index, log.last_index))
        if node.role == LEADER:
            self._check_leader(raft)
        elif node.progress or node.snapshots.streams or node.reads.batches or node.transfer.target is not None:
            violated("NoLeaderStateOnOthers", node.role)

    def _check_leader(self, raft: Raft) -> None:
        node = raft.node
        log = node.log
        if node.installing or node.snapshots.reception is not None:
            violated("LeaderTakesNoSnapshot", node.installing)
        members = set(node.membership.members) - {node.replica}
        if set(node.progress) != members:
            violated("ProgressOfMembers", (sorted(node.progress), sorted(members)))
        if log.last_term != node.term and log.last_index > log.start_index:
            violated("LeaderOpensTerm", "no entry of the leader's own term at the end of its log")
        config = node.config
        for p in node.progress.values():
            if not p.match < p.next <= log.last_index + 1 or p.match > log.last_index:
                violated("ProgressOrder", (p.replica, p.match, p.next, log.last_index))
            if p.inflight_bytes != sum(sent for _, sent in p.inflight):
                violated("WindowAccounting", (p.replica, p.inflight_bytes))
            if len(p.inflight) > config.inflight_messages_max:
                violated("WindowBound", (p.replica, len(p.inflight)))
            if p.inflight_bytes > config.inflight_bytes_max + config.append_bytes_max and len(p.inflight) > 1:
                violated("WindowBound", (p.replica, p.inflight_bytes))
            if p.state is PROBE and len(p.inflight) > 1:
                violated("OneProbeAtATime", (p.replica, len(p.inflight)))
            if (p.state is SNAPSHOT) != (p.replica in node.snapshots.streams):
                violated("StreamOfState", (p.replica, p.state))
        waiting = log.entries[node.commit_index - log.start_index :]
        if len(waiting) < 64 and node.replication.uncommitted_bytes != sum(e.size_bytes for e in waiting):
            violated("UncommittedBytes", node.replication.uncommitted_bytes)

    def _check_delta(self, raft: Raft) -> None:
        if raft.term < self.term:
            violated("TermNeverFalls", (self.term, raft.term))
        if raft.term == self.term and self.vote is not None and raft.vote != self.vote:
            violated("OneVoteATerm", (raft.term, self.vote, raft.vote))
        if raft.commit_index < self.commit_index:
            violated("CommitNeverFalls", (self.commit_index, raft.commit_index))
        if raft.applied_index < self.applied_index:
            violated("AppliedNeverFalls", (self.applied_index, raft.applied_index))
        if raft.start_index < self.start_index:
            violated("StartNeverFalls", (self.start_index, raft.start_index))
        if raft.node.persisted_seq < self.persisted_seq:
            violated("PersistedNeverFalls", (self.persisted_seq, raft.node.persisted_seq))
        if raft.role == LEADER and self.role != LEADER and self.role not in (CANDIDATE, PRECANDIDATE, FOLLOWER):
            violated("Role", f"{self.role} became leader")

    def _new_entries(self, raft: Raft) -> list[Entry]:
        log = raft.node.log
        seen, seen_start = self.entries, self.entries_start
        if log.start_index > seen_start:
            del seen[: log.start_index - seen_start]
            seen_start = self.entries_start = log.start_index
        entries = log.entries
        common = min(len(seen), len(entries))
        while common and seen[common - 1] is not entries[common - 1]:
            common -= 1
        if common < len(seen):
            self.truncated += 1
            if raft.role == LEADER and self.role == LEADER and raft.term == self.term:
                violated("LeaderAppendOnly", f"entry {seen_start + common + 1} was replaced")
            if seen_start + common < self.commit_index and log.start_index < self.commit_index:
                violated("CommittedNeverCut", (seen_start + common + 1, self.commit_index))
        new = entries[common:]
        del seen[common:]
        seen.extend(new)
        before = entries[common - 1] if common else None
        for entry in new:
            if before is not None and (
                entry.index != before.index + 1 or entry.term < before.term or entry.stamp_ms < before.stamp_ms
            ):
                violated("LogGrowsInOrder", (before, entry))
            before = entry
        return new


class ClusterChecker:
    """Invariants over all replicas and all time (Raft, Figure 3). One for a whole run."""

    def __init__(self) -> None:
        self.leaders: dict[int, int] = {}
        self.known: dict[tuple[int, int], tuple[bytes, int]] = {}
        """(index, term) → (encoded entry, term of the entry before it)."""
        self.committed: dict[int, Entry] = {}
        self.commit_index = 0
        self.commit_term = 0
        self._seen_commit: dict[int, int] = {}

    def restarted(self, replica: int, applied_index: int) -> None:
        self._seen_commit[replica] = applied_index

    def check(self, raft: Raft, new: list[Entry], is_durable: Callable[[int, int, int], bool] | None = None) -> None:
        """After a step of `raft`, whose log got the `new` entries.

        `is_durable(replica, index, term)` tells whether a replica's disk holds that entry, or the effect of it.
        """
        if raft.role == LEADER:
            self._check_leader(raft)
        if new:
            self._check_matching(raft, new)
        seen = self._seen_commit.get(raft.replica, 0)
        if raft.commit_index > seen:
            self._check_commit(raft, seen, is_durable)
            self._seen_commit[raft.replica] = raft.commit_index

    def _check_leader(self, raft: Raft) -> None:
        known = self.leaders.setdefault(raft.term, raft.replica)
        if known != raft.replica:
            violated("ElectionSafety", f"replicas {known} and {raft.replica} lead term {raft.term}")
        if raft.term > self.commit_term and self.commit_index > raft.start_index:
            entry = self.committed[self.commit_index]
            if raft.term_at(self.commit_index) != entry.term:
                violated(
                    "LeaderCompleteness",
                    f"leader {raft.replica} of term {raft.term} lacks entry {entry.index} of term {entry.term}",
                )

    def _check_matching(self, raft: Raft, new: list[Entry]) -> None:
        before = raft.term_at(new[0].index - 1)
        for entry in new:
            fact = (entry.encoded, before if before is not None else -1)
            if self.known.setdefault((entry.index, entry.term), fact) != fact:
                violated("LogMatching", f"two logs differ at or before ({entry.index}, {entry.term})")
            before = entry.term

    def _check_commit(self, raft: Raft, seen: int, is_durable: Callable[[int, int, int], bool] | None) -> None:
        for index in range(max(seen, raft.start_index) + 1, raft.commit_index + 1):
            entry = raft.node.log.entry_at(index)
            known = self.committed.setdefault(index, entry)
            if known.encoded != entry.encoded:
                violated("StateMachineSafety", f"replica {raft.replica} committed another entry at {index}")
        if raft.commit_index > self.commit_index:
            self.commit_index = raft.commit_index
            self.commit_term = raft.term
            if is_durable is not None and raft.commit_index > raft.start_index:
                self._check_quorum(raft, is_durable)

    def _check_quorum(self, raft: Raft, is_durable: Callable[[int, int, int], bool]) -> None:
        index = raft.commit_index
        entry = self.committed[index]
        membership = raft.membership
        holders = [voter for voter in membership.voters if is_durable(voter, index, entry.term)]
        if len(holders) < quorum_size(len(membership.voters)):
            violated(
                "CommittedOnQuorum",
                f"entry {index} of term {entry.term} is on the disks of {holders} of {membership.voters} only",
            )
