"""The replicas of one Raft group as a client sees them: which one leads, which ones didn't answer lately.

Shared by all requests to the group, so what one learns saves the others an attempt. Only hints: every answer
may be outdated. Never does I/O.
"""

from __future__ import annotations

import random

SUSPECT_S = 0.5
"""A replica that couldn't be reached isn't asked again before, unless there is no other."""

SILENT_S = 1.0
"""The same, for one that let an attempt time out."""


class Replicas:
    """`role` and `gid` say who is expected at the addresses. `leader` is the address to ask first."""

    __slots__ = ("_cursor", "_rng", "_suspect_until", "addresses", "gid", "leader", "role")

    def __init__(self, role: str, gid: int, addresses: tuple[str, ...], rng: random.Random) -> None:
        assert addresses, "a group has at least one replica"
        self.role = role
        self.gid = gid
        self.addresses = addresses
        self.leader: str | None = None
        self._rng = rng
        self._cursor = rng.randrange(len(addresses))  # so that not all clients begin with the same one
        self._suspect_until: dict[str, float] = {}

    @property
    def silence(self) -> str:
        """What it is called when no answer came."""
        if self.role == "coordinator":
            return "no leader of the coordinators answered, or a group did not answer them"
        return f"no leader of {f'group {self.gid}' if self.role == 'shardkv' else f'the {self.role}s'} answered"

    def pick(self, now: float) -> str:
        """The leader if it is known; else the replicas in turn, those last that are suspect."""
        leader = self.leader
        if leader is not None:
            return leader
        return self._first_good(now, self._cursor)

    def pick_any(self, now: float) -> str:
        """One for a read that followers may answer: each in turn."""
        self._cursor = (self._cursor + 1) % len(self.addresses)
        return self._first_good(now, self._cursor)

    def answered(self, address: str) -> None:
        """It answered as the leader."""
        self.leader = address
        if self._suspect_until:
            self._suspect_until.pop(address, None)

    def not_leader(self, address: str, hint: str | None, now: float) -> None:
        """`address` says that it doesn't lead, and perhaps who does."""
        if hint is not None and hint != address and self._suspect_until.get(hint, 0.0) <= now:
            self.leader = hint
        else:
            self._leave(address)

    def failed(self, address: str, now: float, *, silent: bool) -> None:
        """It couldn't be reached, or didn't answer in time."""
        self._suspect_until[address] = now + (SILENT_S if silent else SUSPECT_S)
        self._leave(address)

    def _leave(self, address: str) -> None:
        """Whoever asked `address` asks the next one; idempotent, since many may have asked it at once."""
        if self.leader == address:
            self.leader = None
        if self.leader is None and self.addresses[self._cursor] == address:
            self._cursor = (self._cursor + 1) % len(self.addresses)

    def _first_good(self, now: float, start: int) -> str:
        count = len(self.addresses)
        in_turn = [self.addresses[(start + step) % count] for step in range(count)]
        if not self._suspect_until:
            return in_turn[0]
        return min(in_turn, key=lambda address: max(self._suspect_until.get(address, 0.0), now))
