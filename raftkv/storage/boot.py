"""How the engine and the log go together after a crash: a pure function of what both say.

They may be apart either way. The log may be ahead: entries are replayed. The engine may be ahead, because
an entry commits with a majority and not with this disk, or because the crash came between the swap of an
installed snapshot and the reset of the log.
"""

from __future__ import annotations

from dataclasses import dataclass

from raftkv.raft.actions import HardState
from raftkv.raft.membership import Membership
from raftkv.storage.errors import DirectoryDamaged, StateLost
from raftkv.storage.wal import WalState


@dataclass(frozen=True, slots=True)
class Applied:
    """What the engine's state is: everything through `index`, whose term and stamp these are."""

    index: int = 0
    term: int = 0
    stamp_ms: int = 0


@dataclass(frozen=True, slots=True)
class Restart:
    """The log must be reset to this, before anything else."""

    hard_state: HardState
    index: int
    term: int
    membership: Membership | None


def reconcile(directory: str, applied: Applied, membership: Membership | None, log: WalState) -> Restart | None:
    """None: the log is kept, and its entries above `applied` are replayed as they commit.

    `membership` is the engine's, at `applied`. If the log ends below `applied`, or has another term there,
    it restarts there; the current term is raised to the applied one at least, and the vote is empty if it was.
    Raises StateLost if the log starts above `applied` + 1, DirectoryDamaged if the two contradict each other.
    """
    if log.start_index > applied.index:
        raise StateLost(directory, log.start_index, applied.index)
    if _term_at(log, applied.index) == applied.term:
        return None
    if log.start_index == applied.index:
        raise DirectoryDamaged(
            directory,
            f"entry {applied.index} is of term {log.start_term} in the log and of {applied.term} in the engine",
        )
    hard_state = log.hard_state
    if applied.term > hard_state.term:
        hard_state = HardState(applied.term, None)
    return Restart(hard_state, applied.index, applied.term, membership)


def _term_at(log: WalState, index: int) -> int | None:
    if index == log.start_index:
        return log.start_term
    position = index - log.start_index - 1
    return log.entries[position].term if position < len(log.entries) else None
