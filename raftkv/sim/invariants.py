"""What must hold inside the cluster after every turn of every daemon.

It only looks at the daemons, never acts on them. The Raft invariants (one leader a term, log matching, one command
per index on all replicas, commits on the disks of a quorum, …) are those of raft/invariants.py; here they are put over
real daemons and their incarnations, with what only a crash can show: no durable term, vote or entry is ever forgotten.
"""

from __future__ import annotations

from typing import NamedTuple

from raftkv.daemons.replica import Replica
from raftkv.machines.kv import KvMachine
from raftkv.machines.rows import Incarnation
from raftkv.machines.shard_map import NO_GROUP
from raftkv.machines.shard_states import ShardState
from raftkv.raft.core import Raft
from raftkv.raft.invariants import ClusterChecker, ReplicaChecker, violated
from raftkv.sim.probes import Probes
from raftkv.sim.process import DaemonProcess

HELD = (ShardState.SERVING, ShardState.EXPORTING, ShardState.DRAINED)
"""All of the shard is here: it isn't on its way."""


class Promise(NamedTuple):
    """What a replica's disk holds for certain."""

    term: int
    vote: int | None
    last_index: int
    last_term: int | None


class GroupInvariants:
    """Of one Raft group, over the whole run."""

    def __init__(self, name: str, processes: dict[int, DaemonProcess], probes: Probes) -> None:
        self.name = name
        self.processes = processes
        self._probes = probes
        self._cluster = ClusterChecker()
        self._checkers: dict[int, tuple[Replica, ReplicaChecker]] = {}
        self._former: dict[int, Raft] = {}
        """Who last ran on a disk that was taken away: its acknowledgements may still be under way."""
        self._hard_states: dict[int, tuple[int, int | None]] = {}
        self._promises: dict[int, Promise] = {}
        self._seen: dict[int, tuple[object, ...]] = {}
        self._reigns: dict[int, tuple[tuple[Raft, int] | None, int]] = {}
        self.elections = 0

    def forget(self, replica: int) -> None:
        """The replica gets another disk: what its disk had promised is not asked of this one."""
        self._promises.pop(replica, None)
        self._hard_states.pop(replica, None)
        if replica in self._checkers:
            self._former[replica] = self._checkers[replica][0].raft

    def check(self, process: DaemonProcess) -> None:
        """After a turn of one of the daemons. Raises InvariantViolation."""
        daemon = process.daemon
        if daemon is None or (replica := daemon.replica) is None:
            return
        if replica._turn_scheduled or replica.snapshots.installing:
            return  # what the core was told is not carried out yet
        raft = replica.raft
        node = raft.node
        number = raft.replica
        known = self._checkers.get(number)
        seen = (replica, node.term, node.vote, node.role, node.log.last_index, node.log.stable_index,
                node.commit_index, node.applied_index, node.persisted_seq, node.log.start_index)  # fmt: skip
        if seen == self._seen.get(number):
            return
        self._seen[number] = seen
        if known is None or known[0] is not replica:
            self._check_restart(number, raft)
            if known is not None:
                self._probe_restart(known[0].raft, raft)
            checker = ReplicaChecker(raft)
            self._checkers[number] = (replica, checker)
            self._cluster.restarted(number, raft.applied_index)
            new = []
        else:
            checker = known[1]
            was_leader = checker.role == "leader"
            new = checker.check(raft)
            if raft.role == "leader" and not was_leader:
                self.elections += 1
            self._probe(replica, checker)
        self._check_own_term(number, raft)
        self._cluster.check(raft, new, self._is_durable)
        self._note_promise(number, raft)

    def _check_own_term(self, replica: int, raft: Raft) -> None:
        """A leader counts replicas for entries of its own term only (Raft §5.4.2)."""
        reign = (raft, raft.term) if raft.role == "leader" else None
        before, commit_index = self._reigns.get(replica, (None, 0))
        if reign is not None and reign == before and raft.commit_index > commit_index:
            term = raft.term_at(raft.commit_index)
            if term is not None and term != raft.term:
                violated(
                    "LeaderCommitsOwnTerm",
                    f"replica {replica} of {self.name}, leader of term {raft.term}, committed "
                    f"entry {raft.commit_index} of term {term}",
                )
        self._reigns[replica] = (reign, raft.commit_index)

    def _probe(self, replica: Replica, checker: ReplicaChecker) -> None:
        """Note the rare states that a replica is in."""
        hits = self._probes.hits
        raft = replica.raft
        if checker.truncated and "entries overwritten after a conflict" not in hits:
            self._probes.hit("entries overwritten after a conflict")
        if raft.start_index and "log compacted" not in hits:
            self._probes.hit("log compacted")
        if "segment rolled" not in hits and replica.store.wal.segments > 1:
            self._probes.hit("segment rolled")
        if raft.role != "leader" and replica._read_waiters:
            self._probes.hit("follower reads through its leader")

    def _probe_restart(self, before: Raft, now: Raft) -> None:
        if before.role == "leader":
            self._probes.hit("leader restarted")
        if now.start_index > before.node.log.stable_index:
            self._probes.hit("log restarted at the applied index")
        if now.applied_index < min(before.applied_index, now.last_index):
            self._probes.hit("engine behind the log at start")
        if now.last_index > before.node.log.stable_index:
            self._probes.hit("unconfirmed write survived a crash")
        if now.last_index < before.last_index:
            self._probes.hit("unconfirmed write lost by a crash")

    def _is_durable(self, replica: int, index: int, term: int) -> bool:
        """Whether the replica's disk holds the entry, or the effect of it; also while it is down."""
        rafts = [self._checkers[replica][0].raft] if replica in self._checkers else []
        if replica in self._former:
            rafts.append(self._former[replica])
        return any(
            raft.start_index >= index or (raft.node.log.stable_index >= index and raft.term_at(index) == term)
            for raft in rafts
        )

    def _note_promise(self, replica: int, raft: Raft) -> None:
        if raft.node.after() == 0:
            self._hard_states[replica] = (raft.term, raft.vote)
        hard_state = self._hard_states.get(replica)
        if hard_state is not None:
            index = raft.node.log.stable_index
            self._promises[replica] = Promise(*hard_state, index, raft.term_at(index))

    def _check_restart(self, replica: int, raft: Raft) -> None:
        """The disk gave back what had been durable."""
        promise = self._promises.get(replica)
        if promise is None:
            return
        who = f"replica {replica} of {self.name}"
        if raft.term < promise.term:
            violated("DurableTermNeverFalls", f"{who} had term {promise.term}, came back with {raft.term}")
        if raft.term == promise.term and promise.vote is not None and raft.vote != promise.vote:
            violated(
                "DurableVoteNeverChanges",
                f"{who} had voted for {promise.vote} in term {promise.term}, came back with {raft.vote}",
            )
        if raft.last_index < promise.last_index:
            violated("DurableEntriesStay", f"{who} had {promise.last_index} entries, came back with {raft.last_index}")
        if promise.last_term is not None and raft.start_index < promise.last_index:
            term = raft.term_at(promise.last_index)
            if term != promise.last_term:
                violated(
                    "DurableEntriesStay",
                    f"{who}: entry {promise.last_index} was of term {promise.last_term}, came back as of {term}",
                )


class ShardInvariants:
    """At most one group serves a shard at any instant, none lets go of what nobody else has, and a shard's revision
    never falls, wherever it is; by the most advanced replica of each group."""

    def __init__(self) -> None:
        self._applied: dict[int, int] = {}
        self._serving: dict[int, frozenset[int]] = {}
        self._held: dict[int, frozenset[int]] = {}
        self._revisions: dict[int, tuple[int, Incarnation]] = {}
        self._seen: dict[DaemonProcess, tuple[Replica, int]] = {}

    def check(self, process: DaemonProcess) -> None:
        daemon = process.daemon
        if daemon is None or (replica := daemon.replica) is None:
            return
        applied = replica.applied_index
        if self._seen.get(process) == (replica, applied):
            return
        self._seen[process] = (replica, applied)
        gid = process.options.gid
        if applied <= self._applied.get(gid, -1):
            return
        self._applied[gid] = applied
        machine = replica.machine
        assert isinstance(machine, KvMachine)
        states = machine.shard_states()
        self._check_revisions(gid, machine)
        self._check_held(gid, machine, frozenset(shard for shard, state in states if state in HELD))
        serving = frozenset(shard for shard, state in states if state is ShardState.SERVING)
        if serving == self._serving.get(gid):
            return
        self._serving[gid] = serving
        for other, shards in self._serving.items():
            if other != gid and serving & shards:
                violated("OneGroupServesAShard", f"groups {gid} and {other} both serve {sorted(serving & shards)}")

    def _check_revisions(self, gid: int, machine: KvMachine) -> None:
        """Of what is served; a shard that begins anew (attempt 0) counts anew."""
        for number, shard in machine._shards.serving.items():
            revision, incarnation = self._revisions.get(number, (0, shard.incarnation))
            self._revisions[number] = (shard.revision, shard.incarnation)
            if shard.revision < revision and (shard.incarnation.attempt or shard.incarnation == incarnation):
                violated(
                    "RevisionNeverFalls", f"shard {number}, once at {revision}, is at {shard.revision} in group {gid}"
                )

    def _check_held(self, gid: int, machine: KvMachine, held: frozenset[int]) -> None:
        """What a group lets go of is somewhere else, unless a configuration has given it up."""
        before = self._held.get(gid, held)
        self._held[gid] = held
        for shard in sorted(before - held):
            given_up = machine._shards.owner(shard).before == NO_GROUP
            if not given_up and not any(shard in others for others in self._held.values()):
                violated("NoShardIsLost", f"group {gid} lets go of shard {shard}, and nobody has it")
