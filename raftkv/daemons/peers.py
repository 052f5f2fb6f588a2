"""The other replicas of the group: links to them, admission of theirs, formation of the group.

Each replica dials every other one and sends its own messages on that link; what it hears comes on the links
that the others dialled. Every link begins with a hello both ways. A hello is checked against this
replica's identity and, once the group is formed, against the store ids of its membership: nothing
that a foreign or wiped replica says ever reaches the core.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from raftkv.daemons.formation import Formation, wiped_reason
from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.replica import Replica
from raftkv.protocol.connection import Connection
from raftkv.protocol.errors import (
    BadVersion,
    Malformed,
    RaftKVError,
    ReplicaMustBeReplaced,
    WrongCluster,
    WrongPeer,
)
from raftkv.protocol.messages import (
    PROTOCOL_VERSION,
    Hello,
    decode_raft,
    encode_hello_reply,
)
from raftkv.protocol.peer_link import PeerLink
from raftkv.raft.membership import Membership
from raftkv.storage.identity import Identity

log = logging.getLogger(__name__)


class Peers:
    """Links to the peers of one replica, before and after it has a membership.

    `on_formed(membership)` is called once, when a fresh replica learns its group's first membership.
    """

    def __init__(
        self,
        options: DaemonOptions,
        identity: Callable[[], Identity],
        rng: random.Random,
        *,
        formed: bool,
        on_formed: Callable[[Membership], None],
        fatal: Callable[[str], None],
    ) -> None:
        self._options = options
        self._identity = identity
        self._fatal = fatal
        self._on_formed = on_formed
        self.replica: Replica | None = None
        store_id = identity().store_id
        self._formation = None if formed else Formation(options.replica, store_id, options.peers)
        self._inbound: dict[int, Connection] = {}
        self._up: set[int] = set()
        self._regressed: dict[int, str] = {}
        self._warned: dict[int, str] = {}
        self._links = {peer: self._link(peer, rng) for peer in sorted(options.peers) if peer != options.replica}

    def _link(self, peer: int, rng: random.Random) -> PeerLink:
        return PeerLink(
            self._options.peers[peer],
            self.hello,
            rng=rng,
            on_up=partial(self._link_up, peer),
            on_down=partial(self._link_down, peer),
            on_refused=partial(self._link_refused, peer),
            ssl=self._options.client_ssl,
        )

    # ---- life

    def start(self) -> None:
        for link in self._links.values():
            link.start()
        self._try_alone()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        for connection in list(self._inbound.values()):
            connection.close()

    def identity_changed(self) -> None:
        """The cluster id became known, or the group formed: introduce ourselves again."""
        for link in self._links.values():
            link.reconnect()
        self._try_alone()

    def missing(self) -> tuple[int, ...]:
        """The peers that a fresh group still waits for."""
        return self._formation.missing if self._formation is not None else ()

    # ---- what we say

    def hello(self) -> Hello:
        identity = self._identity()
        stores: list[tuple[int, bytes]] = []
        if self.replica is not None:
            stores = list(self.replica.raft.membership.stores)
        return Hello(
            version=PROTOCOL_VERSION,
            cluster_id=identity.cluster_id,
            role=self._options.role,
            gid=self._options.gid,
            replica=self._options.replica,
            store_id=identity.store_id,
            purpose="peer",
            formed=self.replica is not None,
            stores=stores,
            peers=sorted(self._options.peers),
        )

    def send(self, peer: int, frame: bytes) -> None:
        """Send, or drop: Raft copes with loss."""
        if peer in self._up:
            self._links[peer].send(frame)

    def address_of(self, peer: int) -> str | None:
        """Where clients reach `peer`."""
        if peer == self._options.replica:
            return self._options.address
        return self._options.peers.get(peer)

    # ---- what they say

    def admit(self, connection: Connection, hello: Hello) -> int:
        """Answer a peer's hello on an inbound connection; return its replica id, raise to refuse it."""
        self._check(hello)
        previous = self._inbound.get(hello.replica)
        if previous is not None and previous is not connection:
            previous.close()
        self._inbound[hello.replica] = connection
        connection.send(encode_hello_reply(self.hello()))
        self._heard(hello)
        self._links[hello.replica].hurry()
        return hello.replica

    def inbound_lost(self, peer: int, connection: Connection) -> None:
        if self._inbound.get(peer) is connection:
            del self._inbound[peer]

    def on_frame(self, peer: int, frame: list[Any]) -> None:
        """A frame on an admitted peer's connection; raise Malformed if it isn't a message of that peer."""
        message = decode_raft(frame)
        if message.source != peer:
            raise Malformed(f"replica {peer} sent a message in the name of replica {message.source}")
        if self.replica is not None:
            self.replica.step(message)

    def regressed(self, peer: int, reason: str) -> None:
        """The core found that `peer` lost what it had acknowledged: it isn't heard any more, and is told why."""
        self._regressed[peer] = f"replica {peer} must be replaced: {reason}"
        connection = self._inbound.pop(peer, None)
        if connection is not None:
            connection.refuse(ReplicaMustBeReplaced(self._regressed[peer]))

    def _check(self, hello: Hello) -> None:
        """Raise a typed error unless `hello` comes from a rightful peer."""
        mine = self._identity()
        options = self._options
        if hello.version != PROTOCOL_VERSION:
            raise BadVersion(PROTOCOL_VERSION, hello.version)
        if mine.cluster_id and hello.cluster_id and mine.cluster_id != hello.cluster_id:
            raise WrongCluster(mine.cluster_id, hello.cluster_id)
        if (hello.role, hello.gid) != (options.role, options.gid):
            raise WrongPeer(
                f"{options.name} takes no messages from a {hello.role}"
                + (f" of group {hello.gid}" if hello.gid else "")
            )
        if hello.replica not in options.peers or hello.replica == options.replica:
            raise WrongPeer(f"{options.name} has no peer with id {hello.replica}")
        if list(hello.peers) != sorted(options.peers):
            raise WrongPeer(
                f"{options.name} has peers {sorted(options.peers)}, replica {hello.replica} has {list(hello.peers)}"
            )
        if self.replica is not None:
            known = self.replica.raft.membership.store_of(hello.replica)
            if known != hello.store_id:
                raise ReplicaMustBeReplaced(wiped_reason(hello.replica))
            if hello.replica in self._regressed:
                raise ReplicaMustBeReplaced(self._regressed[hello.replica])

    def _heard(self, hello: Hello) -> None:
        formation = self._formation
        if formation is None or not self.may_form:
            return
        try:
            membership = formation.heard(hello)
        except ReplicaMustBeReplaced as error:
            self._fatal(f"{self._options.name}: {error}")
            return
        if membership is not None:
            self._form(membership)

    @property
    def may_form(self) -> bool:
        """A group forms only once it knows its cluster; controllers are what makes a cluster."""
        return self._options.role == "controller" or bool(self._identity().cluster_id)

    def _try_alone(self) -> None:
        if self._formation is not None and self.may_form:
            membership = self._formation.alone()
            if membership is not None:
                self._form(membership)

    def _form(self, membership: Membership) -> None:
        self._formation = None
        self._on_formed(membership)

    # ---- link events

    def _link_up(self, peer: int, reply: Hello) -> None:
        try:
            self._check(reply)
        except ReplicaMustBeReplaced as error:
            # It is the other one that must be replaced: it hears so when it dials us.
            raise WrongPeer(f"it must be replaced: {error}") from None
        self._warned.pop(peer, None)
        self._up.add(peer)
        self._heard(reply)
        if self.replica is not None:
            self.replica.peer_up(peer)

    def _link_down(self, peer: int) -> None:
        self._up.discard(peer)
        if self.replica is not None:
            self.replica.peer_down(peer)

    def _link_refused(self, peer: int, error: RaftKVError) -> None:
        if isinstance(error, ReplicaMustBeReplaced):
            self._fatal(f"{self._options.name}: refused by replica {peer}: {error}")
        else:
            self._warn(peer, f"no link with replica {peer} at {self._options.peers[peer]}: {error}")

    def _warn(self, peer: int, text: str) -> None:
        if self._warned.get(peer) != text:
            self._warned[peer] = text
            log.warning("%s: %s", self._options.name, text)
