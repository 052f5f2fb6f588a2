"""One Raft core alone, for tests of single rules: the test plays all its peers, its disk and its clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from raftkv.raft.actions import Action, Commit, HardState, Persist, Send
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.invariants import ReplicaChecker
from raftkv.raft.membership import Membership
from raftkv.raft.messages import AppendEntries, AppendReply, Message, RequestVote, VoteReply

A = TypeVar("A", bound=Action)
M = TypeVar("M", bound=Message)

ELECTION_MS_MIN = 500
ELECTION_MS_MAX = 1000


def entries(*terms: int, first: int = 1, size: int = 1) -> tuple[Entry, ...]:
    """A log of these terms; the data tell index and term."""
    return tuple(
        Entry.make(term, first + at, EntryKind.COMMANDS, 0, (b"%d.%d" % (first + at, term)).ljust(size))
        for at, term in enumerate(terms)
    )


def follower(
    replica: int = 1,
    *,
    voters: Sequence[int] = (1, 2, 3),
    learners: Sequence[int] = (),
    log: Sequence[int | Entry] = (),
    term: int | None = None,
    vote: int | None = None,
    start: tuple[int, int] = (0, 0),
    applied: int | None = None,
    config: RaftConfig | None = None,
    make: Callable[..., Raft] = Raft,
    seed: int = 1,
) -> Raft:
    """A replica just booted with this log (terms, or entries)."""
    kept = [
        item if isinstance(item, Entry) else entries(item, first=start[0] + 1 + at)[0] for at, item in enumerate(log)
    ]
    last_term = kept[-1].term if kept else start[1]
    return make(
        config or RaftConfig(replica),
        random.Random(seed),
        0,
        hard_state=HardState(last_term if term is None else term, vote),
        start_index=start[0],
        start_term=start[1],
        start_membership=Membership(tuple(voters), tuple(learners)),
        entries=kept,
        applied_index=start[0] if applied is None else applied,
        stamp_ms=0,
    )


def sync(raft: Raft, actions: list[Action]) -> list[Action]:
    """Complete the writes among the actions; return those and what follows from them."""
    everything = list(actions)
    while True:
        seqs = [action.seq for action in actions if isinstance(action, Persist)]
        committed = [action.entries[-1].index for action in actions if isinstance(action, Commit)]
        if not seqs and not committed:
            return everything
        if seqs:
            raft.persisted(seqs[-1])
        if committed:
            raft.applied(committed[-1])
        actions = raft.take_actions()
        everything += actions


def drain(raft: Raft) -> list[Action]:
    """What happens now, with a disk and a state machine that take no time."""
    before = ReplicaChecker(raft)
    actions = sync(raft, raft.take_actions())
    before.check(raft)
    return actions


def of(actions: list[Action], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def sent(actions: list[Action], kind: type[M], to: int | None = None) -> list[M]:
    return [
        action.message
        for action in actions
        if isinstance(action, Send) and isinstance(action.message, kind) and to in (None, action.to)
    ]


def time_out(raft: Raft, now_ms: int | None = None) -> int:
    """Let the election timeout pass; return the time."""
    at_ms = raft.next_deadline_ms if now_ms is None else now_ms
    raft.tick(at_ms)
    return at_ms


def candidate(raft: Raft) -> int:
    """Bring it to a real campaign; return the time. Nothing is drained after that."""
    now_ms = time_out(raft)
    if raft.role == "precandidate":
        for voter in raft.membership.voters:
            if voter != raft.replica and raft.role == "precandidate":
                raft.step(VoteReply(raft.term + 1, voter, True, True), now_ms)
    assert raft.role == "candidate"
    return now_ms


def leader(raft: Raft, *, matched: bool = True) -> int:
    """Have it elected; its followers then have the whole log (if `matched`) and the no-op is committed."""
    now_ms = candidate(raft)
    drain(raft)
    for voter in raft.membership.voters:
        if voter != raft.replica and raft.role != "leader":
            raft.step(VoteReply(raft.term, voter, True, False), now_ms)
    assert raft.role == "leader"
    drain(raft)
    if matched:
        for member in raft.membership.members:
            if member != raft.replica:
                ack(raft, member, raft.last_index, now_ms)
        drain(raft)
        assert raft.commit_index == raft.last_index
    return now_ms


def ack(raft: Raft, source: int, index: int, now_ms: int = 0, round_number: int | None = None) -> None:
    echoed = raft.node.round if round_number is None else round_number
    raft.step(AppendReply(raft.term, source, True, index, index, 0, index, 0, echoed), now_ms)


def reject(raft: Raft, source: int, prev: int, hint: tuple[int, int], last: int, now_ms: int = 0) -> None:
    raft.step(AppendReply(raft.term, source, False, prev, hint[0], hint[1], last, 0, raft.node.round), now_ms)


def append(
    term: int,
    source: int,
    prev: tuple[int, int],
    new: Sequence[Entry] = (),
    commit: int = 0,
    round_number: int = 1,
) -> AppendEntries:
    return AppendEntries(term, source, prev[0], prev[1], tuple(new), commit, round_number)


def vote_request(
    term: int, source: int, last: tuple[int, int], *, pre: bool = False, transfer: bool = False
) -> RequestVote:
    return RequestVote(term, source, last[0], last[1], pre, transfer)
