"""What Raft peers say to each other.

Immutable by convention (slotted, not frozen: these are on the hot path). Every message carries the
sender's `term` and its replica id as `source`; the addressee is in the `Send` action, so that one
message object, encoded once, can go to several peers.

`round` numbers the leader's quorum rounds (thesis §6.4): every AppendEntries carries the newest one
and its reply echoes it, so a reply confirms only reads that were registered before that round began.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership


@dataclass(slots=True)
class RequestVote:
    """Raft §5.2, §5.4; `pre` is a pre-vote (thesis §9.6), `transfer` overrides leader stickiness."""

    term: int
    source: int
    last_index: int
    last_term: int
    pre: bool
    transfer: bool


@dataclass(slots=True)
class VoteReply:
    """A granted pre-vote echoes the request's term; any refusal carries the voter's own."""

    term: int
    source: int
    granted: bool
    pre: bool


@dataclass(slots=True)
class AppendEntries:
    """Raft §5.3; with no entries it is the heartbeat."""

    term: int
    source: int
    prev_index: int
    prev_term: int
    entries: tuple[Entry, ...]
    commit: int
    round: int
    frame: bytes | None = field(default=None, repr=False, compare=False)
    """Cache of the encoded frame, for the transport: a message may go to several peers."""


@dataclass(slots=True)
class AppendReply:
    """`ok`: the follower's log matches the leader's through `match_index`, durably.

    Otherwise (`hint_index`, `hint_term`) is the follower's guess where the logs may still match: the
    last index at or below prev_index whose term does not exceed prev_term (fast back-up, Raft §5.3), and
    `match_index` names the prev_index that was refused, so that the leader knows old news.
    `last_index` is the last index of the follower's log; `commit` its commit index.
    """

    term: int
    source: int
    ok: bool
    match_index: int
    hint_index: int
    hint_term: int
    last_index: int
    commit: int
    round: int


@dataclass(slots=True)
class InstallSnapshot:
    """One chunk of snapshot `snapshot_id` (Raft §7).

    The snapshot is one stream of `total_bytes` bytes; `chunk` starts at `offset`. `index`, `index_term`
    and `membership` label the state in it. `crc` is crc32 of the chunk.
    """

    term: int
    source: int
    snapshot_id: bytes
    index: int
    index_term: int
    membership: Membership
    total_bytes: int
    offset: int
    chunk: bytes
    crc: int


@dataclass(slots=True)
class SnapshotReply:
    """Ask for the stream from `next_offset`; `done` once the state is installed (or not needed).

    `match_index` is what the follower's log is known to match through when `done`. `failed`: this
    snapshot can't be received (bad checksum, no space): start again with a new one.
    """

    term: int
    source: int
    snapshot_id: bytes
    next_offset: int
    done: bool
    failed: bool
    match_index: int


@dataclass(slots=True)
class TimeoutNow:
    """Leadership transfer (thesis §3.10): campaign at once, without a pre-vote."""

    term: int
    source: int


@dataclass(slots=True)
class ReadIndexRequest:
    """A follower asks the leader for a read index; `context` names the attempt."""

    term: int
    source: int
    context: int


@dataclass(slots=True)
class ReadIndexReply:
    """`index` < 0: not answered (no longer leader); the follower fails the reads of `context`."""

    term: int
    source: int
    context: int
    index: int


Message = (
    RequestVote
    | VoteReply
    | AppendEntries
    | AppendReply
    | InstallSnapshot
    | SnapshotReply
    | TimeoutNow
    | ReadIndexRequest
    | ReadIndexReply
)
