"""The shards that are here in some state, and who owns what: what the parts of the key-value machine share.

Every change goes into the entry's view and into memory at once. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from raftkv.machines.locks import ShardLocks
from raftkv.machines.rows import (
    CONFIG_NUM_KEY,
    DATA_END,
    DATA_PREFIX,
    FLOOR_KEY,
    HISTORY_KEY,
    KIND_SESSION,
    KIND_VALUE,
    META_END,
    META_PREFIX,
    NO_OWNER,
    OwnerHistory,
    ShardMeta,
    config_key,
    meta_key,
    pack_history,
    pack_meta,
    pack_u64,
    prefix_end,
    shard_of_meta_key,
    shard_prefix,
    unpack_history,
    unpack_meta,
    unpack_u64,
)
from raftkv.machines.shard_map import NO_GROUP, ShardMap
from raftkv.machines.shard_states import ShardEvent, ShardState, next_state

if TYPE_CHECKING:
    from raftkv.storage.engine import Overlay, StorageEngine

META_KEY_BYTES = len(meta_key(0))


class Shard:
    """One shard that is here in some state; `revision` and `last_delete_revision` run ahead of the meta
    row within an entry, and are written once at its end. `locks` is what transactions hold in it."""

    __slots__ = (
        "incarnation",
        "last_delete_revision",
        "locks",
        "number",
        "prefix",
        "revision",
        "session_prefix",
        "stamp_floor_ms",
        "state",
        "value_prefix",
    )

    def __init__(self, number: int, meta: ShardMeta) -> None:
        self.number = number
        self.state, self.incarnation, self.revision, self.last_delete_revision, self.stamp_floor_ms = meta
        self.prefix = shard_prefix(number, self.incarnation)
        self.value_prefix = self.prefix + KIND_VALUE
        self.session_prefix = self.prefix + KIND_SESSION
        self.locks = ShardLocks()

    def meta(self) -> ShardMeta:
        return ShardMeta(self.state, self.incarnation, self.revision, self.last_delete_revision, self.stamp_floor_ms)


class Shards:
    """The shards of group `gid`, the latest configuration, and each shard's owners so far.

    `serving` is always the same dict. `changes` counts what may matter to whoever moves shards. `floor_ms` is the map
    time at which all shards were given up last: a first assignment refuses what was first sent before it.
    """

    def __init__(self, gid: int) -> None:
        self.gid = gid
        self.here: dict[int, Shard] = {}
        self.serving: dict[int, Shard] = {}
        self.changes = 0
        self.load(None)

    def load(self, engine: StorageEngine | None) -> None:
        """Forget everything, and take what the engine holds."""
        self.config: ShardMap | None = None
        self.owners: list[OwnerHistory] = []
        self.floor_ms = 0
        self.here.clear()
        self.serving.clear()
        self._counted: dict[int, Shard] = {}
        self.changes += 1
        row = None if engine is None else engine.get(CONFIG_NUM_KEY)
        if engine is None or row is None:
            return
        encoded = engine.get(config_key(unpack_u64(row)))
        history = engine.get(HISTORY_KEY)
        assert encoded is not None and history is not None, "configuration rows are missing"
        self.config = ShardMap.decode(encoded)
        self.owners = unpack_history(history)
        floor = engine.get(FLOOR_KEY)
        self.floor_ms = 0 if floor is None else unpack_u64(floor)
        for key, meta_row in engine.scan(META_PREFIX, META_END):
            if len(key) == META_KEY_BYTES:
                self._place(Shard(shard_of_meta_key(key), unpack_meta(meta_row)))

    @property
    def config_num(self) -> int:
        return 0 if self.config is None else self.config.num

    @property
    def count(self) -> int:
        """The cluster's number of shards; 0 before the first configuration."""
        return len(self.owners)

    def owner(self, number: int) -> OwnerHistory:
        """Nobody's, for a number that is no shard's."""
        return self.owners[number] if 0 <= number < len(self.owners) else NO_OWNER

    def is_ours(self, number: int, config_num: int) -> bool:
        """Whether this group owns the shard as of the latest configuration, and got it in `config_num`."""
        last, _, since = self.owner(number)
        return last == self.gid and since == config_num

    def past_owners(self, engine: StorageEngine, number: int) -> Iterator[int]:
        """The other groups that ever owned the shard, the latest first, once each; from the rows of the
        configurations, so `engine` must hold what was applied last."""
        seen = {self.gid, NO_GROUP}
        for config in self._past_configs(engine):
            owner = config.owner(number)
            if owner not in seen:
                seen.add(owner)
                yield owner

    def addresses_of(self, engine: StorageEngine, gid: int) -> tuple[str, ...]:
        """Where the group is, or was when it left; empty if no configuration has it."""
        return next((config.groups[gid] for config in self._past_configs(engine) if gid in config.groups), ())

    def _past_configs(self, engine: StorageEngine) -> Iterator[ShardMap]:
        """The latest, and then backwards."""
        for num in range(self.config_num, 0, -1):
            encoded = engine.get(config_key(num))
            assert encoded is not None, f"configuration {num} is missing"
            yield ShardMap.decode(encoded)

    def dead_ranges(self) -> list[tuple[bytes, bytes]]:
        """Between the data of the shards that are here: where those that were here have been."""
        found = []
        start = DATA_PREFIX
        for prefix in sorted(shard.prefix for shard in self.here.values()):
            found.append((start, prefix))
            start = prefix_end(prefix)
        return [*found, (start, DATA_END)]

    # ---- changes

    def take_config(self, view: Overlay, config: ShardMap, encoded: bytes) -> list[int]:
        """Take the next configuration; the shards that have no earlier owner than this group in it.

        One that gives up all shards forgets their owners.
        """
        before = self.owners or [NO_OWNER] * config.shards
        if config.given_up_ms:
            before = [NO_OWNER] * config.shards
            self.floor_ms = config.given_up_ms
            view.put(FLOOR_KEY, pack_u64(self.floor_ms))
        first = [
            number
            for number, owner in enumerate(config.owners)
            if owner == self.gid and before[number].last == NO_GROUP
        ]
        self.owners = [known.then(owner, config.num) for known, owner in zip(before, config.owners, strict=True)]
        self.config = config
        self.changes += 1
        view.put(config_key(config.num), encoded)
        view.put(CONFIG_NUM_KEY, pack_u64(config.num))
        view.put(HISTORY_KEY, pack_history(self.owners))
        return first

    def arrive(self, view: Overlay, number: int, event: ShardEvent, meta: ShardMeta) -> Shard:
        """The shard wasn't here, and is now; the state in `meta` is the one that `event` leads to."""
        assert number not in self.here, f"shard {number} is here already"
        shard = Shard(number, meta._replace(state=next_state(ShardState.ABSENT, event)))
        view.put(meta_key(number), pack_meta(shard.meta()))
        self._place(shard)
        return shard

    def change(self, view: Overlay, shard: Shard, event: ShardEvent) -> None:
        """The shard, which stays here, changes its state; with all that has changed of its counters."""
        self.serving.pop(shard.number, None)
        shard.state = next_state(shard.state, event)
        view.put(meta_key(shard.number), pack_meta(shard.meta()))
        self._place(shard)

    def leave(self, view: Overlay, shard: Shard, event: ShardEvent) -> None:
        """The shard isn't here any more: nothing of it is left, under this incarnation's prefix or beside it."""
        assert next_state(shard.state, event) is ShardState.ABSENT
        self.serving.pop(shard.number, None)
        view.delete(meta_key(shard.number))
        view.delete_range(shard.prefix, prefix_end(shard.prefix))
        self._counted.pop(shard.number, None)
        del self.here[shard.number]
        self.changes += 1

    def give_up(self, view: Overlay) -> None:
        """Nothing of any shard is here any more."""
        for shard in list(self.here.values()):
            self.leave(view, shard, ShardEvent.GIVEN_UP)

    def counted(self, shard: Shard) -> None:
        """The shard's counters have advanced: its meta row is written with this entry."""
        self._counted[shard.number] = shard

    def flush(self, view: Overlay) -> None:
        for shard in self._counted.values():
            view.put(meta_key(shard.number), pack_meta(shard.meta()))
        self._counted.clear()

    def _place(self, shard: Shard) -> None:
        self.here[shard.number] = shard
        if shard.state == ShardState.SERVING:
            self.serving[shard.number] = shard
        self.changes += 1
