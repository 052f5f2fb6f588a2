"""The harness of the Raft scenarios: N cores on virtual time under the course's network, and its helpers.

Built on `tests.raft.network`, whose invariants run after every step. What is different here:

* the state machine is a list of commands, and the *position* in it (1, 2, 3 …) is what the scenarios call an index:
  a leader opens its term with an entry of its own, so the index in the log runs ahead of it;
* a crash keeps exactly what was durable; with `snapshots`, every replica keeps its state and drops its log whenever
  (log index + 1) is a multiple of 10, whether or not a follower still needs the log;
* messages travel as their encoded bytes, are counted as they are sent, and obey the network model of the scenarios.

It checks always that each replica applies in order, that all apply the same, and that a snapshot is the state at
its index. It must never help: nothing here tells a replica what it could not learn from a message or a timer. One
notice there is, as the scenarios have it: that a peer was out of reach, up to 7 s after the fact.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from raftkv.protocol.frames import LENGTH_BYTES, decode_body, encode_body
from raftkv.protocol.raft_codec import decode_raft, encode_raft
from raftkv.raft.actions import Action, HardState, SnapshotComplete, SnapshotWanted
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import RaftRefusal
from raftkv.raft.invariants import InvariantViolation
from raftkv.raft.membership import Membership
from raftkv.raft.messages import AppendEntries, InstallSnapshot, Message, ReadIndexRequest, RequestVote, TimeoutNow
from tests.raft.network import Cluster, Faults, Server

REQUESTS = (AppendEntries, RequestVote, InstallSnapshot, TimeoutNow, ReadIndexRequest)
"""What counts as a call; all other messages are replies."""

LATENCY_US_MIN, LATENCY_US_MAX = 500, 1000
"""Of the reliable network: virtual time must move."""
HOLD_MS_MAX = 26
LOSS = 0.1
REORDERED = 2 / 3
UNREACHABLE_MS_MAX = 7000
SNAPSHOT_ENTRIES = 10
TEST_MS_MAX = 120_000

T = TypeVar("T")
Steps = Generator[int, None, T]
"""A client's script: what it yields is the time (ms) until its next step."""


@dataclass
class Task(Generic[T]):
    done: bool = False
    result: T | None = None


@dataclass(frozen=True)
class Started:
    """An accepted command: its position in the list of commands if it is committed, and the leader's term."""

    position: int
    term: int


class Peer(Server):
    """One replica: its disk, and the list of commands that it has applied."""

    def __init__(self, rig: Rig, replica: int, membership: Membership) -> None:
        self.rig = rig
        self.commands: list[bytes] = []
        super().__init__(rig, replica, membership)

    # ---- life and death

    def boot(self) -> None:
        """From the last snapshot; the log behind it is applied as soon as its entries are known to be committed."""
        index, _, _, body, _ = self.disk.engine[0]
        self.stream_index = index
        self.commands = self.rig.check_snapshot(index, body) if body else []
        super().boot()

    def crash(self) -> None:
        """Only what was durable stays: nothing that a sync was still writing."""
        assert self.raft is not None
        self.raft = None
        self.incarnation += 1

    @property
    def state_bytes(self) -> int:
        """Size of the durable Raft state: term, vote, log start, membership and the entries kept."""
        disk = self.disk
        hard = disk.hard_state
        head = [hard.term, hard.vote, disk.start_index, disk.start_term, disk.start_membership.encode()]
        return len(encode_body(head)) + sum(entry.size_bytes for entry in disk.entries)

    # ---- state machine

    def apply(self, raft: Raft) -> None:
        queue, self.apply_queue = self.apply_queue, []
        snapshot: tuple[Entry, bytes] | None = None
        for entry in queue:
            self.take(entry)
            if self.rig.snapshots and (entry.index + 1) % SNAPSHOT_ENTRIES == 0:
                snapshot = (entry, encode_body([entry.index, entry.stamp_ms, self.commands]))
        if queue:
            raft.applied(queue[-1].index)
        if snapshot is not None:
            self.compact(raft, *snapshot)

    def take(self, entry: Entry) -> None:
        """One more entry of the apply stream, under the eye of the safety checker."""
        if entry.index != self.stream_index + 1:
            raise InvariantViolation(
                "AppliedInOrder", f"replica {self.replica} got {entry.index} after {self.stream_index}"
            )
        self.stream_index = entry.index
        if entry.kind == EntryKind.COMMANDS:
            self.commands.append(entry.data)
        self.rig.check_applied(self, entry)

    def compact(self, raft: Raft, entry: Entry, body: bytes) -> None:
        """Keep the state as of `entry`, then forget the log up to it."""
        disk = self.disk
        index = entry.index
        disk.engine = [(index, entry.term, entry.stamp_ms, body, raft.membership)]
        raft.compact(index)
        del disk.entries[: index - disk.start_index]
        disk.start_index, disk.start_term = index, entry.term
        disk.start_membership = raft.start_membership

    # ---- snapshots

    def handle_snapshot(self, raft: Raft, action: Action) -> None:
        if not isinstance(action, SnapshotWanted):
            super().handle_snapshot(raft, action)
            return
        to = action.to

        def offer(raft: Raft) -> None:
            index, term, _, body, membership = self.disk.engine[0]
            snapshot_id = self.rig.rng.randbytes(8)
            self.offered[snapshot_id] = (to, body)
            raft.snapshot_offered(to, snapshot_id, index, term, membership, len(body), self.rig.now_ms)

        self.later(1, offer)

    def install(self, raft: Raft, complete: SnapshotComplete) -> None:
        body = bytes(self.partial.pop(complete.snapshot_id))
        self.commands = self.rig.check_snapshot(complete.index, body)
        self.stream_index = complete.index
        self.apply_queue = []
        stamp_ms: int = decode_body(body)[1]
        disk = self.disk
        for persist in self.syncing:  # the reset of the WAL comes behind what was queued, and makes it void
            persist.hard_state, persist.entries = None, ()
        disk.hard_state = HardState(raft.term, raft.vote)
        disk.start_index, disk.start_term = complete.index, complete.index_term
        disk.start_membership = complete.membership
        disk.entries = []
        disk.engine = [(complete.index, complete.index_term, stamp_ms, body, complete.membership)]
        self.rig.installed += 1
        raft.snapshot_installed(complete.snapshot_id, self.rig.now_ms, stamp_ms=stamp_ms)


class Rig(Cluster):
    """Replicas 1 … `servers`, all connected. As a context it also checks the end: the test's time, in virtual ms."""

    def __init__(
        self,
        servers: int,
        seed: int,
        *,
        reliable: bool = True,
        snapshots: bool = False,
        latency_us_max: int = LATENCY_US_MAX,
        config: Callable[[int], RaftConfig] = RaftConfig,
    ) -> None:
        self.now_us = 0
        self.peers: dict[int, Peer] = {}
        self.connected = set(range(1, servers + 1))
        self.reliable = reliable
        self.latency_us_max = latency_us_max
        self.long_reordering = False
        self.snapshots = snapshots
        self.arrival_us: dict[tuple[int, int], int] = {}
        """When the last message of a link arrives: the reliable network keeps each link's order."""
        self.failing: set[tuple[int, int]] = set()
        self.requests: Counter[str] = Counter()
        self.replies = 0
        self.bytes = 0
        self.installed = 0
        self.agreed: dict[int, bytes] = {}
        """Log index → entry, as first applied by anyone."""
        self.agreed_commands: list[bytes] = []
        self.turn = 0
        self.tokens = 0
        super().__init__(servers, seed, faults=Faults(sync_ms_max=1), config=config)

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"at {self.now_ms} ms of virtual time; {self.requests.total()} requests: {self.requests}")
        else:
            assert self.now_ms <= TEST_MS_MAX, f"the test took {self.now_ms} ms"

    def add_server(self, replica: int, membership: Membership) -> Server:
        peer = self.peers[replica] = self.servers[replica] = Peer(self, replica, membership)
        return peer

    # ---- time, in µs: latency is below a millisecond

    def at_us(self, time_us: int, what: Callable[[], None]) -> None:
        self.event_count += 1
        heapq.heappush(self.events, (time_us, self.event_count, what))

    def at(self, delay_ms: int, what: Callable[[], None]) -> None:
        self.at_us(self.now_us + delay_ms * 1000, what)

    def run(self, duration_ms: int, until: Callable[[], bool] | None = None) -> bool:
        end_us = self.now_us + duration_ms * 1000
        if until is not None and until():
            return True
        events = self.events
        while events and events[0][0] <= end_us:
            self.now_us, _, what = heapq.heappop(events)
            self.now_ms = self.now_us // 1000
            what()
            if until is not None and until():
                return True
        self.now_us = end_us
        self.now_ms = end_us // 1000
        return False

    def sleep(self, duration_ms: int) -> None:
        self.run(duration_ms)

    def spawn(self, steps: Steps[T]) -> Task[T]:
        """Run a client's script beside everything else."""
        task: Task[T] = Task()

        def resume() -> None:
            try:
                delay_ms = next(steps)
            except StopIteration as stop:
                task.done, task.result = True, stop.value
            else:
                self.at(delay_ms, resume)

        resume()
        return task

    def finish(self, task: Task[T]) -> T:
        assert self.run(TEST_MS_MAX, lambda: task.done), "a client's script did not end"
        result: T | None = task.result
        return result  # type: ignore[return-value]  # None only where T is None

    # ---- network

    def transmit(self, source: int, to: int, message: Message) -> None:
        """One way. Of what is under way when a wire is cut, half still arrives."""
        frame = encode_raft(message)
        is_request = isinstance(message, REQUESTS)
        self.bytes += len(frame)
        if is_request:
            self.requests[type(message).__name__] += 1
        else:
            self.replies += 1
        if not self.is_wired(source, to):
            if is_request:
                self.fail_late(source, to)
            return
        rng = self.rng
        arrival_us = self.now_us + rng.randint(LATENCY_US_MIN, self.latency_us_max)
        if self.reliable:
            arrival_us = max(arrival_us, self.arrival_us.get((source, to), 0) + 1)
            self.arrival_us[source, to] = arrival_us
        elif rng.random() < LOSS:
            return
        elif is_request:
            arrival_us += rng.randint(0, HOLD_MS_MAX) * 1000
        elif self.long_reordering and rng.random() < REORDERED:
            arrival_us += (200 + rng.randrange(1 + rng.randrange(2000))) * 1000
        self.at_us(arrival_us, lambda: self.arrive(source, to, frame))

    def arrive(self, source: int, to: int, frame: bytes) -> None:
        if self.peers[to].raft is None or (not self.is_wired(source, to) and self.rng.random() < 0.5):
            return
        message = decode_raft(decode_body(frame[LENGTH_BYTES:]))
        self.peers[to].step(lambda raft: raft.step(message, self.now_ms))

    def is_wired(self, source: int, to: int) -> bool:
        return source in self.connected and to in self.connected

    def fail_late(self, source: int, to: int) -> None:
        """The caller hears that its call failed, long after; one notice of a link at a time."""
        if (source, to) in self.failing:
            return
        self.failing.add((source, to))
        peer = self.peers[source]
        incarnation = peer.incarnation

        def fail() -> None:
            self.failing.discard((source, to))
            if peer.incarnation == incarnation:
                peer.step(lambda raft: raft.peer_unreachable(to))

        self.at(self.rng.randrange(UNREACHABLE_MS_MAX), fail)

    # ---- faults

    def disconnect(self, *replicas: int) -> None:
        self.connected -= set(replicas)

    def connect(self, *replicas: int) -> None:
        self.connected |= set(replicas)

    def crash(self, *replicas: int) -> None:
        for replica in replicas:
            self.disconnect(replica)
            self.peers[replica].crash()

    def restart(self, *replicas: int) -> None:
        """Crash those that are up; boot all from their disks, connected."""
        for replica in replicas:
            if self.is_up(replica):
                self.crash(replica)
        for replica in replicas:
            self.peers[replica].boot()
            self.connect(replica)

    def is_up(self, replica: int) -> bool:
        return self.peers[replica].raft is not None

    def beside(self, replica: int, steps: int = 1) -> int:
        """The replica so many places further, round the cluster."""
        return (replica - 1 + steps) % len(self.peers) + 1

    # ---- the safety checker

    def check_applied(self, peer: Peer, entry: Entry) -> None:
        if self.agreed.setdefault(entry.index, entry.encoded) != entry.encoded:
            raise InvariantViolation("StateMachineSafety", f"replica {peer.replica} diverged at {entry.index}")
        if entry.kind == EntryKind.COMMANDS and len(peer.commands) > len(self.agreed_commands):
            self.agreed_commands.append(entry.data)

    def check_snapshot(self, index: int, body: bytes) -> list[bytes]:
        """The commands in a snapshot, which must be the state at exactly its index."""
        labelled, _, commands = decode_body(body)
        entries = [Entry.decode(self.agreed[i]) for i in range(1, index + 1)]
        expected = [entry.data for entry in entries if entry.kind == EntryKind.COMMANDS]
        if labelled != index or commands != expected:
            raise InvariantViolation("SnapshotIsState", f"labelled {index}: {len(commands)} commands as of {labelled}")
        return expected

    # ---- helpers of the scenarios

    def token(self, size_bytes: int = 0) -> bytes:
        """A command like no other."""
        self.tokens += 1
        return (b"command %d " % self.tokens).ljust(size_bytes, b"x")

    def start(self, replica: int, command: bytes) -> Started | None:
        """Offer it to this server; None if it doesn't lead, or is down."""
        started = self.start_together(replica, [command])
        return started[0] if started else None

    def start_together(self, replica: int, commands: Sequence[bytes]) -> list[Started]:
        """Offer several at the same moment; the list ends with the first that is refused."""
        peer = self.peers[replica]
        started: list[Started] = []

        def offer(raft: Raft) -> None:
            for command in commands:
                try:
                    entry = raft.propose(command, self.now_ms)
                except RaftRefusal:
                    return
                waiting = raft.node.log.slice(raft.applied_index + 1, raft.last_index)
                position = len(peer.commands) + sum(e.kind == EntryKind.COMMANDS for e in waiting)
                started.append(Started(position, entry.term))

        if peer.raft is not None:
            peer.step(offer)
        return started

    def applied_count(self, position: int, command: bytes | None = None) -> int:
        """How many servers have applied something (or `command`) at this position."""
        return sum(
            len(peer.commands) >= position and (command is None or peer.commands[position - 1] == command)
            for peer in self.peers.values()
            if peer.raft is not None
        )

    def one(self, command: bytes, expected: int, *, retry: bool) -> int:
        """Have it agreed on by `expected` servers within 10 s; its position."""
        return self.finish(self.spawn(self.one_steps(command, expected, retry=retry)))

    def one_steps(self, command: bytes, expected: int, *, retry: bool) -> Steps[int]:
        end_ms = self.now_ms + 10_000
        while self.now_ms < end_ms:
            started = None
            for _ in self.peers:
                self.turn = self.beside(self.turn)
                if self.turn in self.connected and (started := self.start(self.turn, command)) is not None:
                    break
            if started is None:
                yield 50
                continue
            window_ms = self.now_ms + 2000
            while self.now_ms < window_ms:
                if self.applied_count(started.position, command) >= expected:
                    return started.position
                yield 20
            assert retry, f"{command!r}: not on {expected} servers 2 s after {self.turn} took it"
        raise AssertionError(f"{command!r}: no agreement of {expected} servers in 10 s")

    def check_one_leader(self) -> int:
        for _ in range(10):
            self.sleep(self.rng.randint(450, 549))
            leaders: dict[int, int] = {}
            for replica in self.connected:
                raft = self.raft(replica)
                if raft.role == "leader":
                    assert raft.term not in leaders, f"{leaders[raft.term]} and {replica} lead term {raft.term}"
                    leaders[raft.term] = replica
            if leaders:
                return leaders[max(leaders)]
        raise AssertionError("no leader in 10 tries")

    def check_no_leader(self, replicas: Iterable[int]) -> None:
        for replica in replicas:
            assert self.raft(replica).role != "leader", f"{replica} leads without a quorum"

    def check_terms(self) -> int:
        """The term that all connected servers are in."""
        terms = {self.raft(replica).term for replica in self.connected}
        assert len(terms) == 1, terms
        return terms.pop()

    def wait(self, position: int, expected: int, term: int | None = None) -> bytes | None:
        """The command at `position` once `expected` servers applied it; None if a server's term went past `term`."""
        delay_ms = 10
        for _ in range(30):
            if self.applied_count(position) >= expected:
                break
            self.sleep(delay_ms)
            delay_ms = min(2 * delay_ms, 1000)
            if term is not None and any(raft.term > term for raft in self.live()):
                return None
        count = self.applied_count(position)
        assert count >= expected, f"only {count} of {expected} servers applied {position}"
        return self.agreed_commands[position - 1]
