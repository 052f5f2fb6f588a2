"""What a command came to: plain values that a printer turns into bytes.

Results hold data, never formatted output; what failed is an exception, not a result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raftkv.machines.shard_map import ShardMap


@dataclass(frozen=True, slots=True)
class Done:
    """The command did what it was asked to; `fields` are shown by `-o json` only, `text` by the other forms."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    text: str = "OK"


@dataclass(frozen=True, slots=True)
class Found:
    """The value of a key."""

    key: bytes
    value: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no such key."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Pairs:
    """Keys and values as they arrive, in key order."""

    pairs: AsyncIterator[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines as they arrive, already in the form of a file."""

    lines: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Configuration:
    """One configuration of the shard map."""

    shard_map: ShardMap


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """One replica as `Status` saw it; what is None was not answered."""

    role: str
    gid: int | None
    replica: int | None
    address: str
    state: str  # as the replica says (leader, follower, …, unformed), or down
    term: int | None = None
    commit_index: int | None = None
    applied_index: int | None = None
    lag: int | None = None  # entries that the leader has committed and this replica has not applied
    has_left: bool = False  # its group is in no configuration any more, and still holds shards


@dataclass(frozen=True, slots=True)
class ShardHealth:
    """One shard: the group that owns it (0: none) and its state there, as its leader says."""

    shard: int
    gid: int
    state: str


@dataclass(frozen=True, slots=True)
class MoveHealth:
    """One shard on its way between two groups, as the leader of the one that gets it says.

    Of one that waits for its owner to begin, its holder says so.
    """

    shard: int
    source: int
    target: int
    config_number: int
    phase: str  # waiting, search, copy, changes, handover; release: it has arrived, and is still kept at its source
    size_bytes: int  # copied so far
    age_s: float | None  # None: nobody knows
    waits_for: str | None  # one line, while it doesn't go on
    slowed_by: str | None = None  # one line, while it could go on faster, and isn't meant to


@dataclass(frozen=True, slots=True)
class Moves:
    """What a change of the map would move: (shard, from gid, to gid), by shard; gid 0 is nobody."""

    moves: Sequence[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class ClusterHealth:
    """The whole cluster; it is healthy when `problems` is empty."""

    config_number: int | None
    replicas: Sequence[ReplicaHealth]
    shards: Sequence[ShardHealth]
    moves: Sequence[MoveHealth]
    problems: Sequence[str]


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """A transaction that its coordinators have not ended, as their leader says."""

    txid: str
    state: str  # begun, committed, aborted, fenced
    coordinator: int
    shards: Sequence[int]
    age_s: float


@dataclass(frozen=True, slots=True)
class HeldLocks:
    """What a transaction holds in one shard, as the leader of the group says."""

    txid: str
    gid: int
    shard: int
    kind: str  # prepared, or explicit
    keys: Sequence[bytes]
    age_s: float


@dataclass(frozen=True, slots=True)
class Transactions:
    """What is open; `unlisted` says what was only counted, `unanswered` are the groups that didn't say."""

    transactions: Sequence[OpenTransaction]
    locks: Sequence[HeldLocks]
    unlisted: Sequence[str]
    unanswered: Sequence[str]


@dataclass(frozen=True, slots=True)
class Text:
    """Help: lines for a person."""

    text: str


Result = Done | Found | Missing | Pairs | Lines | Configuration | Moves | ClusterHealth | Transactions | Text


def count(number: int, noun: str) -> str:
    """`1 write`, `2 writes`, `2 processes`: a number of things in a message."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"
