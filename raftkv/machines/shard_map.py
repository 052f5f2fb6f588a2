"""The shard map as a value: which group owns each shard, and where the groups are.

One `ShardMap` is one numbered configuration. It is never changed, only succeeded by the next number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from raftkv.machines.slots import SLOTS

NO_GROUP = 0
"""The gid that owns every shard of a map without groups."""


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Configuration `num`: `owners[shard]` is a gid of `groups`, or 0 when there are no groups.

    `groups` maps gid to the addresses of its replicas, in the order they were given; gids ascend.
    `given_up_ms`, if not 0: all shards were given up with what was in them, at this map time. Whoever gets
    one next begins with an empty one, and refuses what was first sent before.
    """

    num: int
    owners: tuple[int, ...]
    groups: Mapping[int, tuple[str, ...]] = field(hash=False)
    given_up_ms: int = 0

    @classmethod
    def initial(cls, shards: int) -> ShardMap:
        """Configuration 0: no groups, every shard without an owner."""
        return cls(0, (NO_GROUP,) * shards, {})

    @property
    def shards(self) -> int:
        return len(self.owners)

    def owner(self, shard: int) -> int:
        """The owner's gid, 0 when there is none. Raise IndexError if there is no such shard."""
        if shard < 0:
            raise IndexError(f"shard {shard}")
        return self.owners[shard]

    def shards_of(self, gid: int) -> list[int]:
        return [shard for shard, owner in enumerate(self.owners) if owner == gid]

    def encode(self) -> bytes:
        """A msgpack array: [num, [owner per shard], [[gid, [address…]]… by gid]], and `given_up_ms` if it isn't 0."""
        groups = [[gid, list(self.groups[gid])] for gid in sorted(self.groups)]
        given_up = [self.given_up_ms] if self.given_up_ms else []
        encoded: bytes = msgpack.packb([self.num, self.owners, groups, *given_up])
        return encoded

    @classmethod
    def decode(cls, encoded: bytes) -> ShardMap:
        """Raise ValueError on anything that `encode` does not produce."""
        try:
            unpacked = msgpack.unpackb(encoded)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ValueError(f"not an encoded shard map: {type(error).__name__}") from error
        problem = _problem(unpacked)
        if problem is not None:
            raise ValueError(f"not an encoded shard map: {problem}")
        num, owners, groups, *given_up = unpacked
        return cls(num, tuple(owners), {gid: tuple(addresses) for gid, addresses in groups}, *given_up)

    def __str__(self) -> str:
        owners = " ".join(map(str, self.owners))
        groups = " ".join(f"{gid}:[{' '.join(self.groups[gid])}]" for gid in sorted(self.groups))
        return f"{{Num:{self.num} Shards:[{owners}] Groups:map[{groups}]}}"


def _problem(unpacked: Any) -> str | None:
    """What is wrong with a decoded shard map's shape, or None."""
    if type(unpacked) is not list or len(unpacked) not in (3, 4):
        return "not three or four items"
    num, owners, groups, *given_up = unpacked
    if type(num) is not int or num < 0:
        return "bad number"
    if type(owners) is not list or not 0 < len(owners) <= SLOTS:
        return "bad number of shards"
    if type(groups) is not list:
        return "groups are not an array"
    gids: list[int] = []
    for group in groups:
        if type(group) is not list or len(group) != 2 or type(group[0]) is not int or group[0] <= NO_GROUP:
            return "bad group"
        if type(group[1]) is not list or not all(type(address) is str for address in group[1]):
            return "bad addresses"
        gids.append(group[0])
    if gids != sorted(set(gids)):
        return "gids do not ascend"
    if given_up and (gids or type(given_up[0]) is not int or given_up[0] <= 0):
        return "shards are given up, though there are groups, or at no time"
    allowed = set(gids) if gids else {NO_GROUP}
    if not all(type(owner) is int and owner in allowed for owner in owners):
        return "a shard's owner is not a group of the map"
    return None
