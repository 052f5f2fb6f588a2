"""Where shards may be, as a coordinator knows it: the latest maps, and what groups have said of shards on their way.

All of it may be outdated: a group that doesn't serve a shard says so, and then another one is asked. Never does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raftkv.machines.shard_map import NO_GROUP, ShardMap

MAPS_MAX = 64
"""So many of the latest maps are kept: a group that has left since then may still have a shard."""


class Places:
    """`latest` is None before the first map. `given_up_ms`: what was in the shards before that map time is gone."""

    def __init__(self) -> None:
        self.latest: ShardMap | None = None
        self.given_up_ms = 0
        self._maps: dict[int, ShardMap] = {}
        self._elsewhere: dict[int, int] = {}

    def take(self, shard_map: ShardMap) -> None:
        self._maps[shard_map.num] = shard_map
        self.given_up_ms = max(self.given_up_ms, shard_map.given_up_ms)
        if self.latest is None or shard_map.num > self.latest.num:
            self.latest = shard_map
            self._elsewhere.clear()
            for num in [num for num in self._maps if num <= shard_map.num - MAPS_MAX]:
                del self._maps[num]

    def missing(self) -> list[int]:
        """Numbers of earlier maps that are of interest and aren't known, the latest first."""
        if self.latest is None:
            return []
        last = self.latest.num
        return [num for num in range(last - 1, max(0, last - MAPS_MAX), -1) if num not in self._maps]

    def groups(self) -> list[int]:
        """The groups of all these maps: those of the latest one first."""
        by_age = sorted(self._maps.values(), key=lambda shard_map: -shard_map.num)
        return list(dict.fromkeys(gid for shard_map in by_age for gid in sorted(shard_map.groups)))

    def is_member(self, gid: int) -> bool:
        """Whether the group is in the latest map."""
        return self.latest is not None and gid in self.latest.groups

    def addresses_of(self, gid: int) -> tuple[str, ...]:
        """Where the group is, or was when it left; empty if none of these maps has it."""
        for num in sorted(self._maps, reverse=True):
            if gid in self._maps[num].groups:
                return self._maps[num].groups[gid]
        return ()

    def group_of(self, shard: int) -> int:
        """Whom to ask for the shard now; NO_GROUP if no map says."""
        elsewhere = self._elsewhere.get(shard)
        if elsewhere is not None:
            return elsewhere
        return NO_GROUP if self.latest is None or shard >= self.latest.shards else self.latest.owner(shard)

    def by_group(self, shards: Iterable[int]) -> dict[int, list[int]]:
        """The shards by whom to ask for them."""
        groups: dict[int, list[int]] = {}
        for shard in shards:
            groups.setdefault(self.group_of(shard), []).append(shard)
        return groups

    def not_here(self, shard: int, gid: int, holder: int = NO_GROUP) -> None:
        """Group `gid` doesn't serve the shard; it says that `holder` may, if it knows."""
        if self.group_of(shard) != gid:
            return  # another one has been found since
        if holder > NO_GROUP and holder != gid and self.addresses_of(holder):
            self._elsewhere[shard] = holder
            return
        owners = self._owners(shard)
        if owners:
            self._elsewhere[shard] = owners[(owners.index(gid) + 1) % len(owners)] if gid in owners else owners[0]

    def _owners(self, shard: int) -> Sequence[int]:
        """The latest owner, and who owned it before, backwards."""
        by_age = sorted(self._maps.values(), key=lambda shard_map: -shard_map.num)
        owners = dict.fromkeys(shard_map.owner(shard) for shard_map in by_age if shard < shard_map.shards)
        owners.pop(NO_GROUP, None)
        return list(owners)
