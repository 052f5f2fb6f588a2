"""Leave of the last group, whose shards have nowhere to go: only when nothing is in them, and nothing comes any more.

    1. The controllers log the *intent*: a drain with a number of its own, of the latest configuration.
    2. The group logs the *drain*: at apply, in that configuration and with no key in any shard, it stops serving them.
    3. The controllers log the Leave, as long as that drain isn't over. Its configuration gives up all shards.

Every change of the map ends a drain; so does whoever gives it up, and age. A group whose drain is over serves again:
when it takes a later configuration, or when the controllers say that it is over (`lift`). Numbers only grow, so nothing
late can be mistaken for the drain that is going on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgpack

from raftkv.machines.results import DRAIN_OVER, LAST_GROUP, OK, UNAVAILABLE, Result
from raftkv.machines.rows import DRAIN_KEY, KIND_LOCK, KIND_PREPARED, KIND_VALUE, pack_u64, prefix_end, unpack_u64
from raftkv.machines.shard_states import ShardEvent, ShardState

if TYPE_CHECKING:
    from raftkv.machines.shards import Shard, Shards
    from raftkv.storage.engine import Overlay, StorageEngine

DRAIN_MAX_MS: Final = 10_000
"""Of map time: an intent that its author has forgotten ends then."""


class Intent(NamedTuple):
    """The drain that was begun last: `gids` are all groups of the map, none when it is over."""

    num: int
    gids: tuple[int, ...]
    began_ms: int


class Intents:
    """The controllers' part."""

    def __init__(self) -> None:
        self.load(None)

    def load(self, engine: StorageEngine | None) -> None:
        row = None if engine is None else engine.get(DRAIN_KEY)
        self._last = Intent(0, (), 0)
        if row is not None:
            num, gids, began_ms = msgpack.unpackb(row)
            self._last = Intent(num, tuple(gids), began_ms)

    @property
    def over(self) -> int:
        """This drain and all with lower numbers are over."""
        return self._last.num - 1 if self._last.gids else self._last.num

    def begin(self, view: Overlay, gids: tuple[int, ...], map_time_ms: int) -> int:
        """The number of the drain that goes on now: a new one, unless the same is going on already."""
        if self._last.gids != gids:
            self._keep(view, Intent(self._last.num + 1, gids, map_time_ms))
        return self._last.num

    @property
    def any_is_on(self) -> bool:
        return bool(self._last.gids)

    def is_on(self, num: int) -> bool:
        return self.any_is_on and self._last.num == num

    def end(self, view: Overlay, num: int | None = None) -> None:
        """End that drain, or whichever is going on."""
        if self._last.gids and num in (None, self._last.num):
            self._keep(view, self._last._replace(gids=()))

    def end_forgotten(self, view: Overlay, map_time_ms: int) -> None:
        if self._last.gids and map_time_ms - self._last.began_ms >= DRAIN_MAX_MS:
            self.end(view)

    def _keep(self, view: Overlay, intent: Intent) -> None:
        self._last = intent
        view.put(DRAIN_KEY, msgpack.packb(intent))


class Drain:
    """The group's part: `num` is the drain that its shards are drained for, 0 if they aren't."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.load(None)

    def load(self, engine: StorageEngine | None) -> None:
        row = None if engine is None else engine.get(DRAIN_KEY)
        self.num = 0 if row is None else unpack_u64(row)

    def begin(self, view: Overlay, num: int, config_num: int, lists: int) -> Result:
        """Stop serving, if nothing is in the shards. `lists`: how many other groups copy from this one."""
        shards = self._shards
        if config_num > shards.config_num:
            return [UNAVAILABLE, f"group {shards.gid} does not know configuration {config_num} yet"]
        if config_num < shards.config_num or num < self.num:
            return [DRAIN_OVER]
        if not self.num:
            mine = {number for number, owner in enumerate(shards.owners) if owner.last == shards.gid}
            if lists or not mine == shards.here.keys() == shards.serving.keys():
                return [UNAVAILABLE, f"shards are on their way to or from group {shards.gid}"]
            if any(_holds_data(view, shard) for shard in shards.here.values()):
                return [LAST_GROUP, shards.gid]
            for shard in list(shards.here.values()):
                shards.change(view, shard, ShardEvent.DRAINED)
        self._set(view, num)
        return [OK, num]

    def lift(self, view: Overlay, num: int) -> Result:
        """That drain is over: serve again."""
        if num == self.num != 0:
            for shard in list(self._shards.here.values()):
                self._shards.change(view, shard, ShardEvent.LIFTED)
            self._set(view, 0)
        return [OK, self.num]

    def config_taken(self, view: Overlay) -> None:
        """Before a configuration is taken: whatever it is, the drain is over with it."""
        if self.num:
            self.lift(view, self.num)

    def is_drained(self, number: int) -> bool:
        here = self._shards.here.get(number)
        return here is not None and here.state == ShardState.DRAINED

    def _set(self, view: Overlay, num: int) -> None:
        self.num = num
        view.put(DRAIN_KEY, pack_u64(num))


def _holds_data(view: Overlay, shard: Shard) -> bool:
    """Sessions and outcomes don't count: the stamp floor of the next life replaces them."""
    prefixes = [shard.prefix + kind for kind in (KIND_VALUE, KIND_LOCK, KIND_PREPARED)]
    return any(True for prefix in prefixes for _ in view.scan(prefix, prefix_end(prefix)))
