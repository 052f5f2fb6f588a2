"""Which shard a key belongs to.

The slot function is Redis Cluster's (redis.io, "Redis cluster specification", key distribution model),
so that keys which share a `{tag}` share a slot. It must never change: it decides where data lies.
"""

from __future__ import annotations

from binascii import crc_hqx
from typing import Final

SLOTS: Final = 16384
"""Redis Cluster's number of slots; also the greatest number of shards a cluster can have."""


def hash_tag(key: bytes) -> bytes:
    """The part of the key that is hashed: what stands in the first `{…}`, if that isn't empty."""
    opened = key.find(b"{")
    if opened >= 0:
        closed = key.find(b"}", opened + 1)
        if closed > opened + 1:
            return key[opened + 1 : closed]
    return key


def slot_of(key: bytes) -> int:
    """The key's slot in [0, 16384): CRC16 (XMODEM) of its hash tag."""
    return crc_hqx(hash_tag(key) if b"{" in key else key, 0) & (SLOTS - 1)


def shard_of(key: bytes, shards: int) -> int:
    """The key's shard in [0, shards); shards own contiguous, equal ranges of slots."""
    return (crc_hqx(hash_tag(key) if b"{" in key else key, 0) & (SLOTS - 1)) * shards // SLOTS
