"""An in-memory cluster of Raft cores on virtual time, from one seed.

Each `Server` is the shell that a core needs, reduced to what matters: a disk that syncs late and in order, an
engine that comes back from a crash at any prefix since its last flush, a state machine that folds entries into a
digest. The `Network` between them drops, delays, duplicates and reorders messages and can be cut one way. A crash
loses everything not synced. The invariants run after every step.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TypeVar

from raftkv.raft.actions import (
    Action,
    Commit,
    HardState,
    Persist,
    ReadFailed,
    ReadReady,
    RoleChanged,
    Send,
    SnapshotChunkReceived,
    SnapshotChunkWanted,
    SnapshotComplete,
    SnapshotReleased,
    SnapshotWanted,
)
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import Busy, RaftRefusal
from raftkv.raft.invariants import ClusterChecker, InvariantViolation, ReplicaChecker
from raftkv.raft.membership import Membership
from raftkv.raft.messages import Message
from raftkv.raft.state import NEVER_MS

SNAPSHOT_HEAD_BYTES = 8 + 16 + 8
T = TypeVar("T", bound=Action)


@dataclass
class Faults:
    """Probabilities and delays (ms) of the network and the disks."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay_ms_max: int = 1
    """Each message takes 1 … this many ms, so that any two may be reordered."""
    slow: float = 0.0
    """This part of the messages takes up to `slow_ms_max`."""
    slow_ms_max: int = 2000
    sync_ms_max: int = 2
    apply_ms_max: int = 0
    store_ms_max: int = 1
    """For a chunk of a snapshot; the installation takes up to 20 times as long."""


@dataclass
class Disk:
    """What survives a crash: the WAL as synced, and the engine as flushed (or later)."""

    hard_state: HardState = field(default_factory=HardState)
    start_index: int = 0
    start_term: int = 0
    start_membership: Membership = field(default_factory=lambda: Membership(()))
    entries: list[Entry] = field(default_factory=list)
    engine: list[tuple[int, int, int, bytes, Membership]] = field(default_factory=list)
    """(index, term, stamp, digest, membership) of applied states; the first is flushed."""

    def write(self, persist: Persist) -> None:
        if persist.hard_state is not None:
            self.hard_state = persist.hard_state
        if persist.entries:
            first = persist.entries[0].index
            keep = first - self.start_index - 1
            if keep < 0:  # begins below a log start that has moved meanwhile
                self.entries = [e for e in persist.entries if e.index > self.start_index]
            else:
                assert keep <= len(self.entries), "a gap in the WAL"
                del self.entries[keep:]
                self.entries.extend(persist.entries)

    def holds(self, index: int, term: int) -> bool:
        if index <= self.start_index or index <= self.engine[0][0]:
            return True
        offset = index - self.start_index - 1
        return offset < len(self.entries) and self.entries[offset].term == term


class Server:
    """One replica's shell and its disk; `raft` is None while it is down."""

    def __init__(self, cluster: Cluster, replica: int, membership: Membership) -> None:
        self.cluster = cluster
        self.replica = replica
        self.disk = Disk(start_membership=membership)
        self.disk.engine = [(0, 0, 0, b"", membership)]
        self.raft: Raft | None = None
        self.incarnation = 0
        self.sync_ms_max: int | None = None
        """Of this disk, if it differs from the others'."""
        self.boot()

    # ---- life and death

    def boot(self) -> None:
        assert self.raft is None
        disk = self.disk
        index, term, stamp, digest, membership = disk.engine[0]
        self.incarnation += 1
        hard_state = disk.hard_state
        at = index - disk.start_index
        behind = at > len(disk.entries)
        if behind or (at > 0 and disk.entries[at - 1].term != term):
            # The engine is ahead of the WAL (design §5, Boot).
            self.cluster.probes["engine ahead of the log"] += 1
            disk.start_index, disk.start_term, disk.start_membership = index, term, membership
            disk.entries = []
            if term > hard_state.term:
                disk.hard_state = hard_state = HardState(term, None)
        self.held: list[Send] = []
        self.syncing: list[Persist] = []
        self.apply_queue: list[Entry] = []
        self.read_floor: dict[int, int] = {}
        self.offered: dict[bytes, tuple[int, bytes]] = {}
        self.partial: dict[bytes, bytearray] = {}
        self.log: list[Action] = []
        self.applied_digest = digest
        self.raft = self.cluster.make_raft(
            self,
            hard_state=hard_state,
            start_index=disk.start_index,
            start_term=disk.start_term,
            start_membership=disk.start_membership,
            entries=tuple(disk.entries),
            applied_index=index,
            stamp_ms=stamp,
        )
        self.checker = ReplicaChecker(self.raft)
        self.truncations = 0
        self.store_done_ms = 0
        self.cluster.checker.restarted(self.replica, index)
        self.armed_ms = NEVER_MS
        self.was_leader = 0
        """The term it leads, for the probes."""
        self.step(lambda raft: None)

    def crash(self) -> None:
        """Lose what isn't synced; what was being written may or may not have got through, in order."""
        assert self.raft is not None
        rng = self.cluster.rng
        if rng.random() < 0.5:
            for persist in self.syncing[: rng.randint(0, len(self.syncing))]:
                self.disk.write(persist)
        states = len(self.disk.engine)
        kept = states - 1 if rng.random() < 0.5 else rng.randrange(states)
        self.disk.engine = [self.disk.engine[kept]]
        self.raft = None
        self.incarnation += 1

    def later(self, delay_ms: int, what: Callable[[Raft], object]) -> None:
        """Do this to the core, unless it has died until then."""
        incarnation = self.incarnation

        def run() -> None:
            if incarnation == self.incarnation:
                self.step(what)

        self.cluster.at(delay_ms, run)

    def arm(self, raft: Raft) -> None:
        """See to it that the core is ticked at its deadline; a deadline that moves away is noticed then."""
        deadline_ms = raft.next_deadline_ms
        if deadline_ms >= self.armed_ms:
            return
        self.armed_ms = deadline_ms
        incarnation = self.incarnation

        def ring() -> None:
            if incarnation != self.incarnation or self.armed_ms != deadline_ms:
                return
            self.armed_ms = NEVER_MS
            self.step(lambda raft: raft.tick(self.cluster.now_ms))

        self.cluster.at(max(deadline_ms - self.cluster.now_ms, 0), ring)

    # ---- steps

    def step(self, what: Callable[[Raft], object]) -> None:
        """One event, everything it causes here and now, and the invariants."""
        raft = self.raft
        assert raft is not None
        what(raft)
        self.pump(raft)

    def pump(self, raft: Raft) -> None:
        while True:
            actions = raft.take_actions()
            if not actions:
                break
            for action in actions:
                self.cluster.observe(self, action)
                self.handle(raft, action)
        self.arm(raft)
        new = self.checker.check(raft)
        truncated = self.checker.truncated
        if truncated > self.truncations:
            self.truncations = truncated
            self.cluster.probes["cut off"] += 1
        for p in raft.node.progress.values():
            if len(p.inflight) >= raft.node.config.inflight_messages_max:
                self.cluster.probes["window full"] += 1
        self.cluster.checker.check(raft, new, self.cluster.is_durable)

    def handle(self, raft: Raft, action: Action) -> None:
        cluster = self.cluster
        if isinstance(action, Send):
            if action.after <= raft.node.persisted_seq:
                cluster.transmit(self.replica, action.to, action.message)
            else:
                self.held.append(action)
        elif isinstance(action, Persist):
            self.syncing.append(action)
            if len(self.syncing) == 1:
                self.sync_next()
        elif isinstance(action, Commit):
            self.apply_queue.extend(action.entries)
            lag = cluster.faults.apply_ms_max
            if lag:
                self.later(cluster.rng.randint(0, lag), self.apply)
            else:
                self.apply(raft)
        elif isinstance(action, ReadReady):
            for read_id in range(action.first_id, action.last_id + 1):
                floor = self.read_floor.pop(read_id)
                if action.index < floor:
                    raise InvariantViolation(
                        "LinearizableRead", f"read at {action.index}, {floor} was committed before"
                    )
                cluster.reads_done += 1
            assert raft.applied_index >= action.index
        elif isinstance(action, ReadFailed):
            for read_id in range(action.first_id, action.last_id + 1):
                del self.read_floor[read_id]
        else:
            self.handle_snapshot(raft, action)

    def sync_next(self) -> None:
        """Group commit: all that is queued goes with one sync."""
        batch = list(self.syncing)

        def done(raft: Raft) -> None:
            for persist in batch:
                self.disk.write(persist)
            del self.syncing[: len(batch)]
            raft.persisted(batch[-1].seq)
            seq = raft.node.persisted_seq
            ready = [send for send in self.held if send.after <= seq]
            self.held = [send for send in self.held if send.after > seq]
            for send in ready:
                self.cluster.transmit(self.replica, send.to, send.message)
            if self.syncing:
                self.sync_next()

        sync_ms_max = self.cluster.faults.sync_ms_max if self.sync_ms_max is None else self.sync_ms_max
        self.later(self.cluster.rng.randint(0, sync_ms_max), done)

    # ---- state machine

    def apply(self, raft: Raft) -> None:
        queue, self.apply_queue = self.apply_queue, []
        engine = self.disk.engine
        for entry in queue:
            index, _, stamp, digest, membership = engine[-1]
            assert entry.index == index + 1, (entry.index, index)
            if entry.kind == EntryKind.MEMBERSHIP:
                membership = Membership.decode(entry.data)
            digest = blake2b(digest + entry.encoded, digest_size=16).digest()
            engine.append((entry.index, entry.term, max(stamp, entry.stamp_ms), digest, membership))
            self.cluster.applied(self, entry, digest)
        if queue:
            raft.applied(queue[-1].index)

    def flush_and_compact(self) -> None:
        """Flush the engine, and drop the log below what no follower is being served from."""

        def compact(raft: Raft) -> None:
            del self.disk.engine[:-1]
            index = min(self.disk.engine[-1][0], raft.snapshot_pins() - 1)
            if index > raft.start_index:
                term = raft.term_at(index)
                assert term is not None
                raft.compact(index)
                disk = self.disk
                if index <= disk.start_index + len(disk.entries):
                    del disk.entries[: index - disk.start_index]
                else:
                    disk.entries = []
                disk.start_index, disk.start_term = index, term
                disk.start_membership = raft.start_membership

        self.step(compact)

    # ---- snapshots

    def handle_snapshot(self, raft: Raft, action: Action) -> None:
        cluster = self.cluster
        if isinstance(action, SnapshotWanted):
            to = action.to

            def offer(raft: Raft) -> None:
                if cluster.rng.random() < 0.1:
                    raft.snapshot_unavailable(to, cluster.now_ms)
                    return
                index, term, stamp, digest, membership = self.disk.engine[-1]
                del self.disk.engine[:-1]
                body = index.to_bytes(8, "big") + digest.ljust(16, b"\0") + stamp.to_bytes(8, "big")
                body += bytes(cluster.snapshot_padding_bytes)
                snapshot_id = cluster.rng.randbytes(8)
                self.offered[snapshot_id] = (to, body)
                raft.snapshot_offered(to, snapshot_id, index, term, membership, len(body), cluster.now_ms)

            self.later(cluster.rng.randint(0, 5), offer)
        elif isinstance(action, SnapshotChunkWanted):
            wanted = action

            def read(raft: Raft) -> None:
                if wanted.snapshot_id in self.offered:
                    body = self.offered[wanted.snapshot_id][1]
                    chunk = body[wanted.offset : wanted.offset + wanted.length]
                    assert len(chunk) == wanted.length
                    raft.snapshot_chunk(wanted.to, wanted.snapshot_id, wanted.offset, chunk, cluster.now_ms)

            self.later(1, read)
        elif isinstance(action, SnapshotReleased):
            self.offered.pop(action.snapshot_id, None)
        elif isinstance(action, SnapshotChunkReceived):
            message = action.message
            if message.offset == 0:
                self.partial = {message.snapshot_id: bytearray()}
            partial = self.partial[message.snapshot_id]
            assert message.offset == len(partial)
            partial += message.chunk

            def stored(raft: Raft) -> None:
                end = message.offset + len(message.chunk)
                raft.snapshot_stored(message.snapshot_id, end, cluster.now_ms)

            # In order: chunks go to one file.
            delay_ms = cluster.rng.randint(1, cluster.faults.store_ms_max)
            self.store_done_ms = max(cluster.now_ms + delay_ms, self.store_done_ms)
            self.later(self.store_done_ms - cluster.now_ms, stored)
        elif isinstance(action, SnapshotComplete):
            complete = action
            delay_ms = cluster.rng.randint(0, 20 * cluster.faults.store_ms_max)
            self.later(delay_ms, lambda raft: self.install(raft, complete))

    def install(self, raft: Raft, complete: SnapshotComplete) -> None:
        cluster = self.cluster
        if cluster.rng.random() < 0.05:
            cluster.probes["install failed"] += 1
            raft.snapshot_failed(complete.snapshot_id, cluster.now_ms)
            return
        body = bytes(self.partial.pop(complete.snapshot_id))
        index = int.from_bytes(body[:8], "big")
        digest = body[8:24]
        stamp = int.from_bytes(body[24:32], "big")
        assert index == complete.index
        assert digest == cluster.digests[index], "the snapshot is not the state at its index"
        disk = self.disk
        for persist in self.syncing:  # the WAL's reset goes behind what was queued before it
            disk.write(persist)
        disk.start_index, disk.start_term = complete.index, complete.index_term
        disk.start_membership = complete.membership
        disk.entries = []
        disk.hard_state = HardState(raft.term, raft.vote)
        disk.engine = [(index, complete.index_term, stamp, digest, complete.membership)]
        self.apply_queue = []
        raft.snapshot_installed(complete.snapshot_id, cluster.now_ms, stamp_ms=stamp)


class Cluster:
    """`replicas` servers (voters 1 … n unless told otherwise), the network between them, and virtual time."""

    raft_class: Callable[..., Raft] = Raft

    def __init__(
        self,
        replicas: int,
        seed: int = 1,
        *,
        faults: Faults | None = None,
        voters: Iterable[int] | None = None,
        config: Callable[[int], RaftConfig] = RaftConfig,
        raft_class: Callable[..., Raft] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.faults = faults or Faults()
        self.config = config
        if raft_class is not None:
            self.raft_class = raft_class
        self.now_ms = 0
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self.event_count = 0
        self.cuts: set[tuple[int, int]] = set()
        self.checker = ClusterChecker()
        self.digests: dict[int, bytes] = {0: b"".ljust(16, b"\0")}
        self.payloads: dict[bytes, int] = {}
        """Committed data → index."""
        self.reads_done = 0
        self.messages: list[tuple[int, int, Message]] = []
        self.message_filter: Callable[[int, int, Message], bool] | None = None
        """Whether to let a message through."""
        self.keep_messages = False
        self.message_count = 0
        self.snapshot_padding_bytes = 100
        self.probes: Counter[str] = Counter()
        """How often the actions, and some rare states, were reached."""
        self.observer: Callable[[Server, Action], None] | None = None
        self.membership = Membership(tuple(voters) if voters is not None else tuple(range(1, replicas + 1)))
        self.servers: dict[int, Server] = {}
        for replica in range(1, replicas + 1):
            self.add_server(replica, self.membership)

    def add_server(self, replica: int, membership: Membership) -> Server:
        server = self.servers[replica] = Server(self, replica, membership)
        return server

    def make_raft(self, server: Server, **state: object) -> Raft:
        rng = random.Random(self.rng.getrandbits(32))
        return self.raft_class(self.config(server.replica), rng, self.now_ms, **state)

    # ---- time

    def at(self, delay_ms: int, what: Callable[[], None]) -> None:
        self.event_count += 1
        heapq.heappush(self.events, (self.now_ms + delay_ms, self.event_count, what))

    def run(self, duration_ms: int, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass; end early (True) when `until` holds."""
        end_ms = self.now_ms + duration_ms
        if until is not None and until():
            return True
        while self.events and self.events[0][0] <= end_ms:
            self.now_ms, _, what = heapq.heappop(self.events)
            what()
            if until is not None and until():
                return True
        self.now_ms = end_ms
        return False

    # ---- network

    def transmit(self, source: int, to: int, message: Message) -> None:
        self.message_count += 1
        if self.keep_messages:
            self.messages.append((source, to, message))
        if self.message_filter is not None and not self.message_filter(source, to, message):
            return
        faults = self.faults
        rng = self.rng
        copies = 1
        if faults.drop and rng.random() < faults.drop:
            copies = 0
        elif faults.duplicate and rng.random() < faults.duplicate:
            copies = 2
        for _ in range(copies):
            delay_ms = rng.randint(1, faults.delay_ms_max) if faults.delay_ms_max > 1 else 1
            if faults.slow and rng.random() < faults.slow:
                delay_ms = rng.randint(1, faults.slow_ms_max)
            self.at(delay_ms, lambda: self.deliver(source, to, message))

    def deliver(self, source: int, to: int, message: Message) -> None:
        if (source, to) in self.cuts:
            return
        server = self.servers.get(to)
        if server is not None and server.raft is not None:
            server.step(lambda raft: raft.step(message, self.now_ms))

    def cut(self, source: int, to: int) -> None:
        """One way."""
        self.cuts.add((source, to))

    def partition(self, *sides: Iterable[int]) -> None:
        """Only servers of one side hear each other; servers not named hear nobody."""
        together = [set(side) for side in sides]
        self.cuts = {
            (a, b)
            for a in self.servers
            for b in self.servers
            if a != b and not any(a in side and b in side for side in together)
        }

    def isolate(self, replica: int) -> None:
        for other in self.servers:
            if other != replica:
                self.cuts |= {(replica, other), (other, replica)}

    def heal(self) -> None:
        self.cuts = set()

    # ---- observation

    def observe(self, server: Server, action: Action) -> None:
        probes = self.probes
        probes[type(action).__name__] += 1
        if isinstance(action, RoleChanged):
            if server.was_leader and action.role != "leader":
                probes["deposed" if action.term > server.was_leader else "stepped down"] += 1
            server.was_leader = action.term if action.role == "leader" else 0
        if self.observer is not None:
            self.observer(server, action)

    def is_durable(self, replica: int, index: int, term: int) -> bool:
        server = self.servers.get(replica)
        return server is not None and server.disk.holds(index, term)

    def applied(self, server: Server, entry: Entry, digest: bytes) -> None:
        known = self.digests.setdefault(entry.index, digest)
        if known != digest:
            raise InvariantViolation("StateMachineSafety", f"replica {server.replica} diverged at {entry.index}")
        if entry.kind == EntryKind.COMMANDS:
            data = entry.data
            if self.payloads.setdefault(data, entry.index) != entry.index:
                raise InvariantViolation("AppliedOnce", f"{data!r} at {self.payloads[data]} and {entry.index}")

    def raft(self, replica: int) -> Raft:
        raft = self.servers[replica].raft
        assert raft is not None, f"server {replica} is down"
        return raft

    def live(self) -> list[Raft]:
        return [server.raft for server in self.servers.values() if server.raft is not None]

    def leader(self) -> int | None:
        """The leader of the highest term, if there is one."""
        leaders = [raft for raft in self.live() if raft.role == "leader"]
        return max(leaders, key=lambda raft: raft.term).replica if leaders else None

    # ---- driving

    def elect(self, timeout_ms: int = 10_000) -> int:
        """Run until a leader has committed in its own term."""

        def elected() -> bool:
            leader = self.leader()
            return leader is not None and self.raft(leader).has_committed_in_term

        assert self.run(timeout_ms, elected), "nobody was elected"
        leader = self.leader()
        assert leader is not None
        return leader

    def campaign(self, replica: int) -> None:
        """Have this one ask for votes at once, as a TimeoutNow would."""

        def campaign(raft: Raft) -> None:
            raft.node.now_ms = self.now_ms
            raft.node.election.campaign(pre=False, transfer=True)

        self.servers[replica].step(campaign)

    def make_leader(self, replica: int) -> None:
        """Have this one win an election and commit its no-op."""
        self.campaign(replica)
        assert self.run(1000, lambda: self.raft(replica).has_committed_in_term), f"{replica} did not win"

    def propose(self, data: bytes, replica: int | None = None) -> Entry | None:
        """Through the leader; None if there is none or it refuses."""
        target = replica if replica is not None else self.leader()
        if target is None:
            return None
        made: list[Entry] = []

        def offer(raft: Raft) -> None:
            try:
                made.append(raft.propose(data, self.now_ms))
            except Busy:
                self.probes["busy"] += 1
            except RaftRefusal:
                pass

        self.servers[target].step(offer)
        return made[0] if made else None

    def read(self, replica: int) -> int | None:
        """Register a read: it must see at least all that is committed anywhere by now."""
        server = self.servers[replica]
        made: list[int] = []

        def ask(raft: Raft) -> None:
            try:
                read_id = raft.read(self.now_ms, forward=True)
            except RaftRefusal:
                return
            server.read_floor[read_id] = self.checker.commit_index
            made.append(read_id)

        server.step(ask)
        return made[0] if made else None

    def converged(self) -> bool:
        """Everybody up has applied everything, and it is the same."""
        rafts = self.live()
        last = {raft.last_index for raft in rafts}
        return len(last) == 1 and all(raft.applied_index == raft.last_index for raft in rafts)
