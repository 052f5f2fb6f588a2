"""Who takes part in a group: voters, learners, and the store each of them was admitted with.

A replica is its *store* (a random id minted with its data directory), not its number: a wiped
directory under an old number is a different store and is no voter.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack


@dataclass(frozen=True, slots=True)
class Membership:
    """Replica ids in ascending order; `stores` maps every one of them to its 16-byte store id."""

    voters: tuple[int, ...]
    learners: tuple[int, ...] = ()
    stores: tuple[tuple[int, bytes], ...] = ()

    def __post_init__(self) -> None:
        assert list(self.voters) == sorted(set(self.voters)), self.voters
        assert list(self.learners) == sorted(set(self.learners)), self.learners
        assert not set(self.voters) & set(self.learners), (self.voters, self.learners)

    @property
    def quorum(self) -> int:
        return len(self.voters) // 2 + 1

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self.voters + self.learners))

    def store_of(self, replica: int) -> bytes | None:
        for member, store in self.stores:
            if member == replica:
                return store
        return None

    def encode(self) -> bytes:
        """A msgpack array: [voters, learners, [[replica, store id], …]]."""
        encoded: bytes = msgpack.packb([self.voters, self.learners, self.stores])
        return encoded

    @classmethod
    def decode(cls, encoded: bytes) -> Membership:
        """Raise ValueError on anything that `encode` does not produce."""
        try:
            voters, learners, stores = msgpack.unpackb(encoded)
            return cls(
                tuple(int(v) for v in voters),
                tuple(int(v) for v in learners),
                tuple((int(replica), bytes(store)) for replica, store in stores),
            )
        except (ValueError, TypeError, AssertionError, msgpack.UnpackException) as error:
            raise ValueError(f"not an encoded membership: {error!r}") from error
