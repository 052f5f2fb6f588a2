"""The controllers' machine: the numbered configurations, and the changes that make new ones; where coordinators are.

Every configuration is kept. A change that is refused, for whatever reason, makes no configuration;
neither does the registration of coordinators.
Nothing here may raise on a command from the log.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgpack

from raftkv.machines.balance import rebalance
from raftkv.machines.drains import Intents
from raftkv.machines.machine import Command, SessionedMachine, header_problem
from raftkv.machines.results import (
    BAD_SHARD,
    DRAIN_OVER,
    GROUP_EXISTS,
    LAST_GROUP,
    NO_SUCH_GROUP,
    OK,
    UNAVAILABLE,
    Result,
    bad_request,
)
from raftkv.machines.rows import (
    CLUSTER_KEY,
    CONFIG_NUM_KEY,
    CONTROLLER_SHARD,
    COORDINATORS_KEY,
    KIND_SESSION,
    MAP_TIME_KEY,
    Incarnation,
    config_key,
    pack_u64,
    prefix_end,
    shard_prefix,
    unpack_u64,
)
from raftkv.machines.sessions import SESSION_CACHE_WEIGHT, SESSION_LIFETIME_MS
from raftkv.machines.shard_map import NO_GROUP, ShardMap
from raftkv.protocol import errors
from raftkv.protocol.limits import GID_MAX, ID_BYTES, SHARDS_MAX
from raftkv.raft.entry import Entry, EntryKind

if TYPE_CHECKING:
    from raftkv.storage.engine import Overlay, StorageEngine

INIT: Final = 64
JOIN: Final = 65
LEAVE: Final = 66
MOVE: Final = 67
GIVE_UP: Final = 68
DRAIN: Final = 69
LIFT: Final = 70
LEAVE_DRAINED: Final = 71
REGISTER: Final = 72

COMMAND_SHARD: Final = -1
"""What stands for the shard in the header of a command to the controllers."""
GROUPS_MAX: Final = 1024
"""Groups in one map; with the bounds below, an encoded map is far smaller than a frame."""
ADDRESSES_MAX: Final = 16
"""Replicas of one group."""
COORDINATORS_MAX: Final = 16
"""Groups of coordinators: every answer to a CONFIG names them."""
ADDRESS_CHARACTERS_MAX: Final = 255
CONFIGS_CACHED_MAX: Final = 64
"""Configurations kept decoded: those that were asked for last."""

_ITEMS: Final = {INIT: 3, JOIN: 7, LEAVE: 7, MOVE: 8, GIVE_UP: 7, DRAIN: 8, LIFT: 7, LEAVE_DRAINED: 8, REGISTER: 8}
_ADDRESS: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", re.ASCII)
_SESSION_PREFIX: Final = shard_prefix(CONTROLLER_SHARD, Incarnation(0, 0)) + KIND_SESSION


class ShardMapMachine(SessionedMachine):
    """The state machine of the controllers."""

    def __init__(
        self, *, session_lifetime_ms: int = SESSION_LIFETIME_MS, cache_weight: int = SESSION_CACHE_WEIGHT
    ) -> None:
        super().__init__(session_lifetime_ms, cache_weight)
        self._engine: StorageEngine | None = None
        self._system_ops = frozenset((INIT,))
        self._handlers = dict.fromkeys((JOIN, LEAVE, MOVE, GIVE_UP, LEAVE_DRAINED), self._change)
        self._handlers |= {DRAIN: self._drain, LIFT: self._lift, REGISTER: self._register}
        self._changes: dict[int, Callable[[ShardMap, Command], Result | ShardMap]] = {
            JOIN: _join,
            LEAVE: _leave,
            GIVE_UP: self._give_up,
            LEAVE_DRAINED: self._leave_drained,
            MOVE: _move,
        }
        self._intents = Intents()
        self._reset()

    def _reset(self, engine: StorageEngine | None = None) -> None:
        self._latest: ShardMap | None = None
        self._recent: OrderedDict[int, ShardMap] = OrderedDict()
        self._cluster_id = b""
        self._coordinators: dict[int, tuple[str, ...]] = {}
        self._intents.load(engine)
        self._sessions.clear(engine)
        self._set_map_time(0)

    def load(self, engine: StorageEngine) -> None:
        self._reset(engine)
        self._engine = engine
        row = engine.get(MAP_TIME_KEY)
        self._set_map_time(0 if row is None else unpack_u64(row))
        row = engine.get(COORDINATORS_KEY)
        if row is not None:
            self._coordinators = {gid: tuple(addresses) for gid, addresses in msgpack.unpackb(row)}
        row = engine.get(CLUSTER_KEY)
        if row is not None:
            self._cluster_id = msgpack.unpackb(row)[0]
            num = engine.get(CONFIG_NUM_KEY)
            assert num is not None, "the configuration number's row is missing"
            self._latest = self.config(unpack_u64(num))

    # ---- what a shell asks

    @property
    def cluster_id(self) -> bytes:
        """16 bytes, once INIT was applied; empty before."""
        return self._cluster_id

    @property
    def latest(self) -> ShardMap | None:
        """The configuration with the highest number; None before INIT was applied."""
        return self._latest

    @property
    def config_num(self) -> int:
        return 0 if self._latest is None else self._latest.num

    @property
    def drains_over(self) -> int:
        """Drains up to this number are over: groups that are drained for one of them serve again."""
        return self._intents.over

    @property
    def coordinators(self) -> dict[int, tuple[str, ...]]:
        """The addresses of each group of coordinators, by gid, ascending."""
        return self._coordinators

    @property
    def wants_ticks(self) -> bool:
        """Whether something ends with map time soon: old sessions, or a drain that nobody ends."""
        return self.sweep_pending or self._intents.any_is_on

    def config(self, num: int) -> ShardMap:
        """Configuration `num`, -1 for the latest. Raise NoSuchConfig, or Unavailable before INIT."""
        if num == -1 and self._latest is not None:
            return self._latest
        known = self._recent.get(num)
        if known is None:
            encoded = None if self._engine is None or num < 0 else self._engine.get(config_key(num))
            if encoded is None and not self._cluster_id:
                raise errors.Unavailable(_UNFORMED)
            if encoded is None:
                raise errors.NoSuchConfig(num)
            known = ShardMap.decode(encoded)
            self._remember(known)
        self._recent.move_to_end(num)
        return known

    # ---- shape: the same before the log and at apply

    def _refuse_shape(self, command: Command) -> Result | None:
        if type(command) is not list or not command or type(command[0]) is not int:
            return bad_request("the command is not an array that begins with its number")
        op = command[0]
        items = _ITEMS.get(op)
        if items is None:
            return bad_request("unknown command")
        if op == INIT:
            return _refuse_init(command)
        problem = header_problem(command, items)
        if problem is None and command[1] != COMMAND_SHARD:
            problem = "a command to the controllers names a shard in its header"
        if problem is not None:
            return bad_request(problem)
        if op == JOIN:
            return _refuse_join(command[6])
        if op in (LEAVE, GIVE_UP, DRAIN, LEAVE_DRAINED):
            refusal = _refuse_gids(command[6])
            if refusal is not None or len(command) == _ITEMS[LEAVE] or type(command[7]) is int:
                return refusal
            return bad_request("the number after the gids is not a number")
        if op == REGISTER:
            return _refuse_join([[command[6], command[7]]])
        if op == LIFT:
            return None if type(command[6]) is int else bad_request("the drain's number is not a number")
        if type(command[6]) is not int or type(command[7]) is not int:
            return bad_request("the shard or the gid is not a number")
        return None

    # ---- applying

    def _begin_entry(self, view: Overlay, entry: Entry) -> None:
        """Map time is the stamp of what was applied last; it advances with entries of any kind."""
        if entry.stamp_ms > self._map_time_ms:
            self._set_map_time(entry.stamp_ms)
            view.put(MAP_TIME_KEY, pack_u64(entry.stamp_ms))
            self._intents.end_forgotten(view, entry.stamp_ms)
        if entry.kind == EntryKind.TICK:
            self._sessions.sweep(view, [(_SESSION_PREFIX, prefix_end(_SESSION_PREFIX))], self._horizon_ms)

    def _flush(self, view: Overlay) -> None:
        self._sessions.flush(view)

    def _execute_system(self, view: Overlay, command: Command) -> Result:
        """INIT: the first one founds the cluster, any other changes nothing."""
        if not self._cluster_id:
            _, self._cluster_id, shards = command
            view.put(CLUSTER_KEY, msgpack.packb([self._cluster_id, shards]))
            self._keep(view, ShardMap.initial(shards))
        return [OK, self.config_num]

    def _execute_once(self, view: Overlay, command: Command) -> Result:
        return self._answer_once(view, _SESSION_PREFIX + command[2], 0, command)

    def _change(self, view: Overlay, _place: None, command: Command) -> Result:
        outcome = self._outcome(command)
        if not isinstance(outcome, ShardMap):
            return outcome
        self._keep(view, outcome)
        return [OK, outcome.num]

    def _outcome(self, command: Command) -> Result | ShardMap:
        """The configuration that the command makes, or its result when it makes none."""
        latest = self._latest
        if latest is None:
            return [UNAVAILABLE, _UNFORMED]
        return self._changes[command[0]](latest, command)

    def _drain(self, view: Overlay, _place: None, command: Command) -> Result:
        """Begin to empty the map of its last groups, if configuration command[7] is still the latest."""
        latest = self._latest
        if latest is None:
            return [UNAVAILABLE, _UNFORMED]
        outcome = _leave(latest, command)
        if isinstance(outcome, ShardMap) or latest.num != command[7]:
            return [DRAIN_OVER]
        if outcome[0] != LAST_GROUP:
            return outcome
        return [OK, self._intents.begin(view, tuple(sorted(command[6])), self._map_time_ms)]

    def _lift(self, view: Overlay, _place: None, command: Command) -> Result:
        self._intents.end(view, command[6])
        return [OK, command[6]]

    def _register(self, view: Overlay, _place: None, command: Command) -> Result:
        """Where the replicas of one group of coordinators are, from now on."""
        gid, addresses = command[6], tuple(command[7])
        if gid not in self._coordinators and len(self._coordinators) >= COORDINATORS_MAX:
            return bad_request(f"there would be more than {COORDINATORS_MAX} groups of coordinators")
        if self._coordinators.get(gid) != addresses:
            self._coordinators = dict(sorted({**self._coordinators, gid: addresses}.items()))
            view.put(COORDINATORS_KEY, msgpack.packb(list(self._coordinators.items())))
        return [OK, gid]

    def _leave_drained(self, latest: ShardMap, command: Command) -> Result | ShardMap:
        return self._give_up(latest, command) if self._intents.is_on(command[7]) else [DRAIN_OVER]

    def _give_up(self, latest: ShardMap, command: Command) -> Result | ShardMap:
        """A LEAVE that may be that of the last group: its shards go to nobody, with what is in them."""
        outcome = _leave(latest, command)
        if isinstance(outcome, ShardMap) or outcome[0] != LAST_GROUP:
            return outcome
        return ShardMap(latest.num + 1, (NO_GROUP,) * latest.shards, {}, max(1, self._map_time_ms))

    def _keep(self, view: Overlay, config: ShardMap) -> None:
        self._intents.end(view)
        view.put(config_key(config.num), config.encode())
        view.put(CONFIG_NUM_KEY, pack_u64(config.num))
        self._latest = config
        self._remember(config)

    def _remember(self, config: ShardMap) -> None:
        self._recent[config.num] = config
        while len(self._recent) > CONFIGS_CACHED_MAX:
            self._recent.popitem(last=False)


_UNFORMED: Final = "the cluster is not formed yet: wait until a majority of the controllers runs"


def _join(latest: ShardMap, command: Command) -> Result | ShardMap:
    groups = dict(latest.groups)
    for gid, addresses in command[6]:
        if gid in groups:
            return [GROUP_EXISTS, gid]
        groups[gid] = tuple(addresses)
    if len(groups) > GROUPS_MAX:
        return bad_request(f"there would be more than {GROUPS_MAX} groups")
    return _rebalanced(latest, groups)


def _leave(latest: ShardMap, command: Command) -> Result | ShardMap:
    groups = dict(latest.groups)
    for gid in command[6]:
        if groups.pop(gid, None) is None:
            return [NO_SUCH_GROUP, gid]
    if not groups:
        return [LAST_GROUP, command[6][-1]]
    return _rebalanced(latest, groups)


def _move(latest: ShardMap, command: Command) -> Result | ShardMap:
    shard, gid = command[6], command[7]
    if not 0 <= shard < latest.shards:
        return [BAD_SHARD, shard, latest.shards]
    if gid not in latest.groups:
        return [NO_SUCH_GROUP, gid]
    if latest.owners[shard] == gid:
        return [OK, latest.num]
    owners = (*latest.owners[:shard], gid, *latest.owners[shard + 1 :])
    return ShardMap(latest.num + 1, owners, latest.groups)


def _rebalanced(latest: ShardMap, groups: dict[int, tuple[str, ...]]) -> ShardMap:
    ascending = {gid: groups[gid] for gid in sorted(groups)}
    return ShardMap(latest.num + 1, rebalance(latest.owners, ascending), ascending)


def _refuse_init(command: Command) -> Result | None:
    if len(command) != _ITEMS[INIT]:
        return bad_request("wrong number of items in the command")
    _, cluster_id, shards = command
    if type(cluster_id) is not bytes or len(cluster_id) != ID_BYTES:
        return bad_request("the cluster id is not 16 bytes")
    if type(shards) is not int or not 0 < shards <= SHARDS_MAX:
        return bad_request(f"the number of shards is not in 1 … {SHARDS_MAX}")
    return None


def _refuse_join(groups: Any) -> Result | None:
    if type(groups) is not list or not all(type(group) is list and len(group) == 2 for group in groups):
        return bad_request("the groups are not an array of [gid, addresses]")
    refusal = _refuse_gids([gid for gid, _ in groups])
    if refusal is not None:
        return refusal
    for gid, addresses in groups:
        if not 0 < gid <= GID_MAX:
            return bad_request(f"a gid must be in 1 … {GID_MAX}")
        if type(addresses) is not list or not addresses:
            return bad_request(f"group {gid} has no addresses")
        if len(addresses) > ADDRESSES_MAX:
            return bad_request(f"group {gid} has more than {ADDRESSES_MAX} addresses")
        if not all(type(address) is str and _is_address(address) for address in addresses):
            return bad_request(f"an address of group {gid} is not HOST:PORT")
        if len(set(addresses)) != len(addresses):
            return bad_request(f"group {gid} has an address twice")
    return None


def _refuse_gids(gids: Any) -> Result | None:
    if type(gids) is not list or not gids:
        return bad_request("no group is named")
    if len(gids) > GROUPS_MAX:
        return bad_request(f"more than {GROUPS_MAX} groups are named")
    if not all(type(gid) is int for gid in gids):
        return bad_request("a gid is not a number")
    if len(set(gids)) != len(gids):
        return bad_request("a gid is named twice")
    return None


def _is_address(text: str) -> bool:
    """HOST:PORT, decided by ASCII alone, so that every replica agrees whatever its libraries know."""
    match = _ADDRESS.fullmatch(text) if len(text) <= ADDRESS_CHARACTERS_MAX else None
    return match is not None and 0 < int(match[1]) < 65_536
