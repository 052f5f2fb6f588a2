"""What the core asks of its shell, in order, with the durability each step waits for.

The contract, which the shell must keep:

* `Persist` actions go to the WAL in the order of their `seq`; when one is durable the shell calls
  `Raft.persisted(seq)` (a later seq implies the earlier ones).
* A `Send` leaves only when `persisted` has reached its `after` (0: at once). A term and a vote are on
  disk before any message of that term; a follower's entries before its ack. A leader's AppendEntries
  leave while its own fsync runs; it counts itself only in `persisted`.
* `Commit` entries are applied in order; the shell reports with `Raft.applied(index)`.
* From `SnapshotComplete` until `snapshot_installed` or `snapshot_failed` no Persist is emitted: engine and WAL
  are the installation's alone. It writes `Raft.hard_state` with the new log start.
"""

from __future__ import annotations

from dataclasses import dataclass

from raftkv.raft.entry import Entry
from raftkv.raft.membership import Membership
from raftkv.raft.messages import InstallSnapshot, Message


@dataclass(frozen=True, slots=True)
class HardState:
    """What Raft must never forget (Figure 2): the current term and whom it voted for in it."""

    term: int = 0
    vote: int | None = None


@dataclass(slots=True)
class Persist:
    """Append to the WAL. The first entry's index says where: anything at or after it is replaced."""

    seq: int
    hard_state: HardState | None
    entries: tuple[Entry, ...]


@dataclass(slots=True)
class Send:
    to: int
    message: Message
    after: int


@dataclass(slots=True)
class Commit:
    """These entries are committed: apply them in order."""

    entries: tuple[Entry, ...]


@dataclass(slots=True)
class ReadReady:
    """Reads `first_id` … `last_id` (inclusive) may be answered from any state at or beyond `index`.

    Emitted only once `Raft.applied` has reached `index`.
    """

    first_id: int
    last_id: int
    index: int


@dataclass(slots=True)
class ReadFailed:
    """Reads `first_id` … `last_id` will not be answered: no leader, or it changed."""

    first_id: int
    last_id: int


@dataclass(slots=True)
class RoleChanged:
    """Role, term or leader changed. On loss of leadership every waiter of an older term ends now."""

    role: str
    """'leader', 'follower', 'candidate', 'precandidate' or 'learner'."""
    term: int
    leader: int | None


@dataclass(slots=True)
class MembershipChanged:
    """The membership in force (on append, or on its roll-back)."""

    membership: Membership
    index: int


@dataclass(slots=True)
class SnapshotWanted:
    """Follower `to` needs a snapshot: make or reuse a checkpoint, answer with `Raft.snapshot_offered`."""

    to: int


@dataclass(slots=True)
class SnapshotChunkWanted:
    """Read `length` bytes of `snapshot_id` at `offset`, answer with `Raft.snapshot_chunk`."""

    to: int
    snapshot_id: bytes
    offset: int
    length: int


@dataclass(slots=True)
class SnapshotChunkReceived:
    """Follower side: store this chunk, then call `Raft.snapshot_stored`.

    The first chunk (offset 0) starts the reception anew; chunks come in order of offset.
    """

    message: InstallSnapshot


@dataclass(slots=True)
class SnapshotComplete:
    """Follower side: all bytes are stored. Verify, make durable, swap the engine, restart the WAL at
    (index, index_term) with this membership; then call `Raft.snapshot_installed` (or `_failed`)."""

    snapshot_id: bytes
    index: int
    index_term: int
    membership: Membership


@dataclass(slots=True)
class SnapshotReleased:
    """Follower `to` no longer streams `snapshot_id`: its checkpoint may go."""

    to: int
    snapshot_id: bytes


@dataclass(slots=True)
class PeerRegressed:
    """`peer`'s log lost entries that it had acknowledged: an old directory was brought back, or its
    disk lies. Its acks no longer count; it must be replaced."""

    peer: int
    acked_index: int
    last_index: int


@dataclass(slots=True)
class TransferEnded:
    """A leadership transfer was given up after an election timeout (success shows as RoleChanged)."""

    target: int


Action = (
    Persist
    | Send
    | Commit
    | ReadReady
    | ReadFailed
    | RoleChanged
    | MembershipChanged
    | SnapshotWanted
    | SnapshotChunkWanted
    | SnapshotChunkReceived
    | SnapshotComplete
    | SnapshotReleased
    | PeerRegressed
    | TransferEnded
)
