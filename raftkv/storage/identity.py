"""Whose data directory this is: a small file, written when the directory is made."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from raftkv.storage.disk import Disk
from raftkv.storage.errors import Corruption, FormatTooNew, OtherCluster, OtherReplica, PeersChanged

VERSION = 1
STORE_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Identity:
    """`cluster_id` is empty until it is known; `store_id` is random and minted with the directory."""

    role: str
    gid: int
    replica: int
    peers: tuple[int, ...]
    cluster_id: bytes = b""
    store_id: bytes = b""

    def encode(self) -> bytes:
        """crc32 u32 of the rest; a msgpack array that begins with the version."""
        fields = [VERSION, self.role, self.gid, self.replica, sorted(self.peers), self.cluster_id, self.store_id]
        body: bytes = msgpack.packb(fields)
        return zlib.crc32(body).to_bytes(4, "big") + body

    @classmethod
    def decode(cls, path: str, data: bytes) -> Identity:
        """Raises Corruption, FormatTooNew."""
        body = data[4:]
        if len(data) < 5 or zlib.crc32(body) != int.from_bytes(data[:4], "big"):
            raise Corruption(path, 0, "bad checksum of the identity")
        fields: list[Any] = msgpack.unpackb(body)
        if fields[0] != VERSION:
            raise FormatTooNew(path, int(fields[0]), VERSION)
        role, gid, replica, peers, cluster_id, store_id = fields[1:]
        return cls(role, gid, replica, tuple(peers), cluster_id, store_id)


def check_identity(directory: str, found: Identity, expected: Identity) -> None:
    """That `found`, of the directory, is what the daemon was started as.

    An empty cluster id on either side is not known yet and fits any; the store id is the directory's.
    Raises OtherReplica, PeersChanged, OtherCluster.
    """
    if found.role != expected.role:
        raise OtherReplica(directory, "a", found.role, f"a {expected.role}")
    if found.gid != expected.gid:
        raise OtherReplica(directory, "group", found.gid, expected.gid)
    if found.replica != expected.replica:
        raise OtherReplica(directory, "replica", found.replica, expected.replica)
    if tuple(sorted(found.peers)) != tuple(sorted(expected.peers)):
        raise PeersChanged(directory, _listed(found.peers), _listed(expected.peers))
    if found.cluster_id and expected.cluster_id and found.cluster_id != expected.cluster_id:
        raise OtherCluster(directory, found.cluster_id, expected.cluster_id)


def mint(disk: Disk, expected: Identity) -> Identity:
    """The identity of a new directory."""
    return replace(expected, peers=tuple(sorted(expected.peers)), store_id=disk.entropy(STORE_ID_BYTES))


def _listed(peers: tuple[int, ...]) -> str:
    return ",".join(map(str, sorted(peers)))
