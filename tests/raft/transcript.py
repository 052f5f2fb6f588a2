"""Transcripts: a text file of commands for a small cluster, each followed by what it must print.

    campaign 1
    ----
    1 precandidate in term 0
    1 → 2 RequestVote term=1 last=0/0 pre

Nothing happens unasked: time stands still until `tick`, messages wait until `deliver`, and on a slow disk writes
wait until `sync`. Run with RAFTKV_REWRITE=1 to write what is printed into the files, and read the diff.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from raftkv.raft.actions import (
    Action,
    Commit,
    HardState,
    MembershipChanged,
    PeerRegressed,
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
    TransferEnded,
)
from raftkv.raft.changes import AddLearner, Promote, Remove
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import RaftRefusal
from raftkv.raft.invariants import ClusterChecker, ReplicaChecker
from raftkv.raft.membership import Membership
from raftkv.raft.messages import (
    AppendEntries,
    AppendReply,
    InstallSnapshot,
    Message,
    ReadIndexReply,
    ReadIndexRequest,
    RequestVote,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
)
from tests.raft.network import Disk
from tests.raft.solo import entries as make_entries

SEPARATOR = "----"


def show_entry(entry: Entry) -> str:
    at = f"{entry.index}/{entry.term}"
    if entry.kind == EntryKind.NOOP:
        return f"{at} no-op"
    if entry.kind == EntryKind.MEMBERSHIP:
        return f"{at} {show_membership(Membership.decode(entry.data))}"
    return f"{at} {entry.data.decode()}"


def show_entries(entries: tuple[Entry, ...]) -> str:
    if len(entries) > 6:
        return f"[{show_entry(entries[0])}, … {len(entries) - 2} more …, {show_entry(entries[-1])}]"
    return "[" + ", ".join(show_entry(entry) for entry in entries) + "]"


def show_membership(membership: Membership) -> str:
    voters = ",".join(map(str, membership.voters))
    learners = ",".join(map(str, membership.learners))
    return f"voters={voters}" + (f" learners={learners}" if learners else "")


def show_message(message: Message) -> str:
    head = f"{type(message).__name__} term={message.term}"
    match message:
        case RequestVote():
            flags = (" pre" if message.pre else "") + (" transfer" if message.transfer else "")
            return f"{head} last={message.last_index}/{message.last_term}{flags}"
        case VoteReply():
            return f"{head} {'granted' if message.granted else 'refused'}{' pre' if message.pre else ''}"
        case AppendEntries():
            body = f"prev={message.prev_index}/{message.prev_term} commit={message.commit} round={message.round}"
            return f"{head} {body}" + (f" {show_entries(message.entries)}" if message.entries else "")
        case AppendReply():
            if message.ok:
                return f"{head} ok match={message.match_index} round={message.round}"
            hint = f"hint={message.hint_index}/{message.hint_term} last={message.last_index}"
            return f"{head} refused prev={message.match_index} {hint} round={message.round}"
        case InstallSnapshot():
            part = f"{message.offset}+{len(message.chunk)} of {message.total_bytes}"
            return f"{head} {message.snapshot_id.decode()} at {message.index}/{message.index_term} bytes {part}"
        case SnapshotReply():
            state = "done" if message.done else "failed" if message.failed else f"next={message.next_offset}"
            return f"{head} {message.snapshot_id.decode()} {state} match={message.match_index}"
        case TimeoutNow():
            return head
        case ReadIndexRequest():
            return head
        case ReadIndexReply():
            return f"{head} index={message.index}"


class Peer:
    """A replica, its disk and its engine."""

    def __init__(self, replica: int, disk: Disk) -> None:
        self.replica = replica
        self.disk = disk
        self.raft: Raft | None = None
        self.slow_disk = False
        self.unsynced: list[Persist] = []
        self.held: list[Send] = []
        self.received = bytearray()
        self.checker: ReplicaChecker | None = None


class Transcript:
    def __init__(self) -> None:
        self.peers: dict[int, Peer] = {}
        self.mail: list[tuple[int, int, Message]] = []
        self.cuts: set[tuple[int, int]] = set()
        self.now_ms = 0
        self.lines: list[str] = []
        self.checker = ClusterChecker()
        self.bodies: dict[bytes, bytes] = {}
        self.options: dict[str, int] = {}

    # ---- running a file

    def run_file(self, text: str) -> str:
        """Run the commands of a transcript; return it with what they print now."""
        output: list[str] = []
        lines = text.splitlines()
        at = 0
        while at < len(lines):
            line = lines[at]
            output.append(line)
            at += 1
            if not line.strip() or line.startswith("#"):
                continue
            if at < len(lines) and lines[at] == SEPARATOR:
                at += 1
                while at < len(lines) and lines[at].strip():
                    at += 1
            output.append(SEPARATOR)
            self.lines = []
            self.execute(line.split())
            output.extend(self.lines or ["ok"])
        return "\n".join(output) + "\n"

    def execute(self, words: list[str]) -> None:
        name, *arguments = words
        plain = [argument for argument in arguments if "=" not in argument]
        named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        method: Callable[..., None] = getattr(self, "do_" + name.replace("-", "_"))
        try:
            method(*plain, **named)
        except RaftRefusal as refusal:
            self.say(f"{type(refusal).__name__}: {refusal}")

    def say(self, line: str) -> None:
        self.lines.append(line)

    # ---- commands

    def do_config(self, **named: str) -> None:
        """Options of RaftConfig for nodes made from here on."""
        self.options |= {name: int(value) for name, value in named.items()}

    def do_nodes(self, count: str, learners: str = "", log: str = "", term: str = "") -> None:
        """Make and boot this many; learners=4,5 of them have no vote."""
        no_votes = tuple(int(word) for word in learners.split(",") if word)
        everybody = range(1, int(count) + 1)
        membership = Membership(tuple(r for r in everybody if r not in no_votes), no_votes)
        for replica in everybody:
            disk = Disk(start_membership=membership, engine=[(0, 0, 0, b"", membership)])
            self.peers[replica] = Peer(replica, disk)
            self.do_boot(str(replica))

    def do_log(self, replica: str, terms: str, term: str = "") -> None:
        """Restart a node with a log of these terms (and in this term, if not the last of them)."""
        peer = self.peers[int(replica)]
        peer.raft = None
        numbers = [int(word) for word in terms.split(",")]
        membership = peer.disk.start_membership
        peer.disk = Disk(start_membership=membership, engine=[(0, 0, 0, b"", membership)])
        peer.disk.entries = list(make_entries(*numbers))
        peer.disk.hard_state = HardState(int(term or numbers[-1]), None)
        self.do_boot(replica)

    def do_keep(self, replica: str, count: str) -> None:
        """Restart a node on an old copy of its directory: with this many entries, and nothing applied."""
        peer = self.peers[int(replica)]
        peer.raft = None
        del peer.disk.entries[int(count) :]
        peer.disk.engine = [(0, 0, 0, b"", peer.disk.start_membership)]
        self.do_boot(replica)

    def do_boot(self, replica: str) -> None:
        peer = self.peers[int(replica)]
        assert peer.raft is None
        disk = peer.disk
        peer.unsynced, peer.held = [], []
        peer.raft = Raft(
            RaftConfig(peer.replica, **self.options),  # type: ignore[arg-type]
            random.Random(peer.replica),
            self.now_ms,
            hard_state=disk.hard_state,
            start_index=disk.start_index,
            start_term=disk.start_term,
            start_membership=disk.start_membership,
            entries=tuple(disk.entries),
            applied_index=disk.engine[-1][0],
            stamp_ms=0,
        )
        peer.checker = ReplicaChecker(peer.raft)
        self.checker.restarted(peer.replica, peer.raft.applied_index)
        self.drain(peer)

    def do_crash(self, replica: str) -> None:
        """Lose what isn't synced."""
        self.peers[int(replica)].raft = None

    def do_slow_disk(self, replica: str) -> None:
        self.peers[int(replica)].slow_disk = True

    def do_sync(self, replica: str, count: str = "99") -> None:
        """Complete the oldest writes that wait on this disk."""
        peer = self.peers[int(replica)]
        for persist in peer.unsynced[: int(count)]:
            self.complete(peer, persist)
        self.drain(peer)

    def do_tick(self, replica: str, by: str) -> None:
        """Let time pass for one node, or for `all`; each is ticked once, then."""
        self.now_ms += int(by)
        for peer in self.peers.values():
            if peer.raft is not None and replica in ("all", str(peer.replica)):
                peer.raft.tick(self.now_ms)
                self.drain(peer)

    def do_campaign(self, replica: str) -> None:
        """Let the node's election timeout pass, for it alone."""
        peer, raft = self.up(replica)
        self.now_ms = max(self.now_ms, raft.next_deadline_ms)
        raft.tick(self.now_ms)
        self.drain(peer)

    def do_propose(self, replica: str, *words: str) -> None:
        peer, raft = self.up(replica)
        for word in words:
            raft.propose(word.encode(), self.now_ms)
        self.drain(peer)

    def do_propose_many(self, replica: str, count: str, size: str = "1") -> None:
        """Each in a turn of its own."""
        peer, raft = self.up(replica)
        for _ in range(int(count)):
            raft.propose(b"x" * int(size), self.now_ms)
            self.drain(peer)

    def do_read(self, replica: str) -> None:
        peer, raft = self.up(replica)
        self.say(f"{replica} read {raft.read(self.now_ms, forward=True)}")
        self.drain(peer)

    def do_transfer(self, replica: str, target: str) -> None:
        peer, raft = self.up(replica)
        raft.transfer(int(target), self.now_ms)
        self.drain(peer)

    def do_add_learner(self, replica: str, learner: str) -> None:
        peer, raft = self.up(replica)
        raft.propose_membership(AddLearner(int(learner)), self.now_ms)
        self.drain(peer)

    def do_promote(self, replica: str, learner: str) -> None:
        peer, raft = self.up(replica)
        raft.propose_membership(Promote(int(learner)), self.now_ms)
        self.drain(peer)

    def do_remove(self, replica: str, member: str) -> None:
        peer, raft = self.up(replica)
        raft.propose_membership(Remove(int(member)), self.now_ms)
        self.drain(peer)

    def do_compact(self, replica: str, index: str) -> None:
        peer, raft = self.up(replica)
        at = int(index)
        term = raft.term_at(at)
        raft.compact(at)
        disk = peer.disk
        del disk.entries[: at - disk.start_index]
        disk.start_index, disk.start_term = at, term or 0
        disk.start_membership = raft.start_membership
        self.say(f"{replica} keeps {raft.first_index} … {raft.last_index}")

    def do_cut(self, *pairs: str) -> None:
        """`cut 1-2` in both directions, `cut 1>2` in one."""
        for pair in pairs:
            source, way, to = int(pair[0]), pair[1], int(pair[2])
            self.cuts.add((source, to))
            if way == "-":
                self.cuts.add((to, source))

    def do_isolate(self, replica: str) -> None:
        for other in self.peers:
            self.cuts |= {(int(replica), other), (other, int(replica))}

    def do_heal(self) -> None:
        self.cuts = set()

    def do_lose(self, kind: str = "", to: str = "", source: str = "") -> None:
        """Throw away mail that waits: all of it, or of one kind, to or from one node."""
        kept = []
        for mail in self.mail:
            name = type(mail[2]).__name__
            if kind in ("", name) and to in ("", str(mail[1])) and source in ("", str(mail[0])):
                self.say(f"lost: {mail[0]} → {mail[1]} {name}")
            else:
                kept.append(mail)
        self.mail = kept

    def do_deliver(self, to: str = "") -> None:
        """Deliver the mail that waits now, to all or one; what it causes waits for the next time."""
        waiting = [mail for mail in self.mail if to in ("", str(mail[1]))]
        self.mail = [mail for mail in self.mail if to not in ("", str(mail[1]))]
        for source, target, message in waiting:
            peer = self.peers.get(target)
            if (source, target) in self.cuts:
                continue
            if peer is None or peer.raft is None:
                continue
            peer.raft.step(message, self.now_ms)
            self.drain(peer)

    def do_settle(self, quiet: str = "") -> None:
        """Deliver until no mail waits; with `quiet`, print roles only."""
        mark = len(self.lines)
        for _ in range(200):
            if not self.mail:
                break
            self.do_deliver()
        else:
            self.say("mail without end")
        if quiet:
            self.lines[mark:] = [line for line in self.lines[mark:] if " in term " in line]

    def do_status(self) -> None:
        for peer in self.peers.values():
            raft = peer.raft
            if raft is None:
                self.say(f"{peer.replica} down")
                continue
            log = f"log={raft.start_index}..{raft.last_index}/{raft.last_term}"
            self.say(
                f"{peer.replica} {raft.role} term={raft.term} leader={raft.leader} {log} "
                f"commit={raft.commit_index} applied={raft.applied_index} {show_membership(raft.membership)}"
            )

    def do_terms(self) -> None:
        """The terms of everybody's entries."""
        for peer in self.peers.values():
            raft = peer.raft
            if raft is not None:
                terms = " ".join(str(entry.term) for entry in raft.node.log.entries)
                self.say(f"{peer.replica}: {terms}")

    def do_progress(self, replica: str) -> None:
        _, raft = self.up(replica)
        for p in raft.node.progress.values():
            window = f"inflight={len(p.inflight)}/{p.inflight_bytes}"
            self.say(
                f"{p.replica} {p.state.value} match={p.match} next={p.next} {window}"
                + (" paused" if p.paused else "")
                + (" regressed" if p.regressed else "")
            )

    # ---- the shell

    def up(self, replica: str) -> tuple[Peer, Raft]:
        peer = self.peers[int(replica)]
        assert peer.raft is not None, f"{replica} is down"
        return peer, peer.raft

    def complete(self, peer: Peer, persist: Persist) -> None:
        peer.unsynced.remove(persist)
        peer.disk.write(persist)
        assert peer.raft is not None
        peer.raft.persisted(persist.seq)
        ready = [send for send in peer.held if send.after <= persist.seq]
        peer.held = [send for send in peer.held if send.after > persist.seq]
        for send in ready:
            self.post(peer, send)

    def post(self, peer: Peer, send: Send) -> None:
        self.say(f"{peer.replica} → {send.to} {show_message(send.message)}")
        self.mail.append((peer.replica, send.to, send.message))

    def drain(self, peer: Peer) -> None:
        raft = peer.raft
        assert raft is not None and peer.checker is not None
        while actions := raft.take_actions():
            for action in actions:
                self.handle(peer, raft, action)
            if not peer.slow_disk:
                for persist in list(peer.unsynced):
                    self.complete(peer, persist)
        new = peer.checker.check(raft)
        self.checker.check(raft, new, lambda r, i, t: self.peers[r].disk.holds(i, t))

    def handle(self, peer: Peer, raft: Raft, action: Action) -> None:
        me = peer.replica
        match action:
            case Send():
                if action.after <= raft.node.persisted_seq:
                    self.post(peer, action)
                else:
                    peer.held.append(action)
            case Persist():
                peer.unsynced.append(action)
                if peer.slow_disk:
                    hard = f" term={action.hard_state.term} vote={action.hard_state.vote}" if action.hard_state else ""
                    entries = f" {show_entries(action.entries)}" if action.entries else ""
                    self.say(f"{me} writes #{action.seq}{hard}{entries}")
            case Commit():
                self.say(f"{me} commits {show_entries(action.entries)}")
                last = action.entries[-1]
                membership = peer.disk.engine[-1][4]
                for entry in action.entries:
                    if entry.kind == EntryKind.MEMBERSHIP:
                        membership = Membership.decode(entry.data)
                peer.disk.engine = [(last.index, last.term, last.stamp_ms, b"", membership)]
                raft.applied(last.index)
            case ReadReady():
                self.say(f"{me} read {action.first_id}…{action.last_id} ready at {action.index}")
            case ReadFailed():
                self.say(f"{me} read {action.first_id}…{action.last_id} failed")
            case RoleChanged():
                leader = f", led by {action.leader}" if action.leader not in (None, me) else ""
                self.say(f"{me} {action.role} in term {action.term}{leader}")
            case MembershipChanged():
                self.say(f"{me} {show_membership(action.membership)} from {action.index} on")
            case SnapshotWanted():
                index, term, _, _, membership = peer.disk.engine[-1]
                self.say(f"{me} offers {action.to} a snapshot at {index}/{term}")
                snapshot_id = b"s%d" % (len(self.bodies) + 1)
                self.bodies[snapshot_id] = b"state at %d" % index
                total_bytes = len(self.bodies[snapshot_id])
                raft.snapshot_offered(action.to, snapshot_id, index, term, membership, total_bytes, self.now_ms)
            case SnapshotChunkWanted():
                chunk = self.bodies[action.snapshot_id][action.offset : action.offset + action.length]
                raft.snapshot_chunk(action.to, action.snapshot_id, action.offset, chunk, self.now_ms)
            case SnapshotReleased():
                self.say(f"{me} releases {action.snapshot_id.decode()} of {action.to}")
            case SnapshotChunkReceived():
                message = action.message
                if message.offset == 0:
                    peer.received.clear()
                peer.received += message.chunk
                raft.snapshot_stored(message.snapshot_id, len(peer.received), self.now_ms)
            case SnapshotComplete():
                assert bytes(peer.received) == b"state at %d" % action.index
                self.say(f"{me} installs {action.snapshot_id.decode()} at {action.index}/{action.index_term}")
                disk = peer.disk
                disk.start_index, disk.start_term = action.index, action.index_term
                disk.start_membership, disk.entries = action.membership, []
                disk.hard_state = raft.hard_state
                disk.engine = [(action.index, action.index_term, 0, b"", action.membership)]
                raft.snapshot_installed(action.snapshot_id, self.now_ms)
            case PeerRegressed():
                self.say(f"{me} finds that {action.peer} lost {action.last_index + 1} … {action.acked_index}")
            case TransferEnded():
                self.say(f"{me} gives up the transfer to {action.target}")


def check_file(path: Path, rewrite: bool) -> tuple[str, str]:
    """(expected, actual) text of one file; with `rewrite`, the file is made to agree."""
    expected = path.read_text()
    actual = Transcript().run_file(expected)
    if rewrite and actual != expected:
        path.write_text(actual)
        expected = actual
    return expected, actual
