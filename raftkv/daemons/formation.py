"""How the replicas of a new group come to trust each other, and how a wiped one is kept out.

A replica is its store: the random id minted with its data directory. A group is *formed* once every
replica, with a directory that never voted, has heard of all the others that theirs are new too; each then
records the same first membership, with all store ids, before it casts its first vote. From then on
only those stores count. A wiped directory has another store id: the formed replicas refuse it, so a majority can't
forget what it acknowledged (the 3-of-5 example in openraft's FAQ).

A replica that missed the moment (it crashed, or the others were quicker) adopts the membership from any
formed peer, if that membership names its own store: it never voted, so nothing can be lost.

Pure: hellos in, a membership or an error out.
"""

from __future__ import annotations

from collections.abc import Iterable

from raftkv.protocol.errors import ReplicaMustBeReplaced
from raftkv.protocol.messages import Hello
from raftkv.raft.membership import Membership


class Formation:
    """The state of a replica that has no membership yet."""

    def __init__(self, replica: int, store_id: bytes, peers: Iterable[int]) -> None:
        self._replica = replica
        self._fresh: dict[int, bytes] = {replica: store_id}
        self._peers = tuple(sorted(peers))

    @property
    def missing(self) -> tuple[int, ...]:
        """The peers not heard from yet."""
        return tuple(peer for peer in self._peers if peer not in self._fresh)

    def heard(self, hello: Hello) -> Membership | None:
        """Take a peer's hello; return the membership once there is one.

        Raise ReplicaMustBeReplaced when the peer belongs to a formed group that knows another store
        under this replica's number, or none.
        """
        if not hello.formed:
            self._fresh[hello.replica] = hello.store_id
            return self.alone()
        stores = {int(member): bytes(store) for member, store in hello.stores}
        if stores.get(self._replica) != self._fresh[self._replica]:
            raise ReplicaMustBeReplaced(wiped_reason(self._replica))
        return Membership(tuple(sorted(stores)), (), tuple(sorted(stores.items())))

    def alone(self) -> Membership | None:
        """The first membership, if no peer is missing (at once in a group of one)."""
        if self.missing:
            return None
        return Membership(self._peers, (), tuple(sorted(self._fresh.items())))


def wiped_reason(replica: int) -> str:
    """Why a formed group refuses replica `replica`, and what to do."""
    return (
        f"the group knows replica {replica} with another data directory than this one; "
        "an empty or foreign directory is not taken back as a voter, since it forgot what it had acknowledged. "
        "Bring its own directory back, or replace the replica"
    )
