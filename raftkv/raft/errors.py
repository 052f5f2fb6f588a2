"""What the core refuses, and what it treats as proof that safety is already lost.

RaftRefusal                a request was refused, definitely not done
├── NotLeader(leader)      ask `leader`, if it is known
├── Busy(limit_bytes)      too many uncommitted bytes: later
├── Transferring(target)   leadership is being handed to `target`: later
└── ChangeRefused(reason)  this membership change or transfer can't be made (now)
SafetyViolation            the log contradicts what was committed: the process must stop
"""

from __future__ import annotations


class RaftRefusal(Exception):
    """A request that the core refused; it has had no effect."""


class NotLeader(RaftRefusal):
    def __init__(self, leader: int | None) -> None:
        super().__init__("no leader is known" if leader is None else f"replica {leader} is the leader")
        self.leader = leader


class Busy(RaftRefusal):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"more than {limit_bytes} bytes wait to be committed")
        self.limit_bytes = limit_bytes


class Transferring(RaftRefusal):
    def __init__(self, target: int) -> None:
        super().__init__(f"leadership is moving to replica {target}")
        self.target = target


class ChangeRefused(RaftRefusal):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SafetyViolation(Exception):
    """Committed history is contradicted: a bug, or a disk that lied. Nothing may go on from here."""
