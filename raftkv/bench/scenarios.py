"""What the requests of each scenario do, and on which keys.

A scenario is a row of SCENARIOS: kinds of requests with their shares. Keys are `bench:` and a number; which group
serves them is that of the map at the start. Nothing here measures: what a request raises is its outcome.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from raftkv.bench.plan import KEY_PREFIX, BadPlan, Plan
from raftkv.bench.zipf import Scrambled, Zipf
from raftkv.client.attempts import run_transaction
from raftkv.client.kv import RaftKV
from raftkv.client.tasks import gather_ordered
from raftkv.client.transactions import Transaction
from raftkv.machines.slots import shard_of
from raftkv.protocol.errors import TooLarge
from raftkv.protocol.limits import TXN_BYTES_MAX

COMMON_KEYS = 4
"""The few keys of `--conflict`: of all keys, or of each group's."""
SCAN_PAIRS_MAX = 100
"""YCSB's."""
SCAN_DIGITS = 2
"""A scan is over the keys that share all but so many digits: as many keys as SCAN_PAIRS_MAX."""


class KeyMissing(Exception):
    """A key that was loaded isn't there."""


class Client:
    """One client of the SDK with one request at a time; `number` counts those of all processes."""

    def __init__(self, kv: RaftKV, number: int, seed: int) -> None:
        self.kv = kv
        self.number = number
        self.rng = random.Random(f"{seed} client {number}")
        self.failed_attempts = 0

    async def read(self, key: bytes) -> None:
        if await self.kv.get(key) is None:
            raise KeyMissing

    async def transact(self, body: Callable[[Transaction], Awaitable[None]]) -> None:
        attempts = self.kv.attempts()
        try:
            await run_transaction(attempts, body)
        finally:
            self.failed_attempts += attempts.failures


class World:
    """The keys and values of one loading process. `owners`: by shard, the group that serves it."""

    def __init__(self, plan: Plan, owners: Sequence[int], process: int = 0) -> None:
        self.plan = plan
        self.inserted: list[int] = []
        """The numbers of the keys that this process has inserted, as they were acknowledged."""
        self._owners = owners
        self._next_insert = plan.keys + process
        self._values = random.Random(f"{plan.seed} values {process}").randbytes(2 * plan.value_bytes + 1)
        self._zipf = Zipf()
        self._scrambled = Scrambled(plan.keys)

    def key(self, number: int) -> bytes:
        return b"%b%010d" % (KEY_PREFIX, number)

    def value(self, rng: random.Random) -> bytes:
        """Random bytes, which no server can compress."""
        start = rng.randrange(self.plan.value_bytes + 1)
        return self._values[start : start + self.plan.value_bytes]

    def uniform(self, client: Client) -> bytes:
        return self.key(client.rng.randrange(self.plan.keys))

    def hot(self, client: Client) -> bytes:
        """One of the few with the probability `conflict`, else any."""
        rng = client.rng
        if rng.random() >= self.plan.conflict:
            return self.uniform(client)
        return self.key(rng.randrange(min(COMMON_KEYS, self.plan.keys)))

    def zipfian(self, client: Client) -> bytes:
        return self.key(self._scrambled.draw(client.rng))

    def latest(self, client: Client) -> bytes:
        """Zipfian by age: the last one that this process has inserted is the most frequent."""
        age = self._zipf.draw(client.rng, self.plan.keys + len(self.inserted))
        if age < len(self.inserted):
            return self.key(self.inserted[-1 - age])
        return self.key(self.plan.keys - 1 - (age - len(self.inserted)))

    async def insert(self, client: Client) -> None:
        number = self._next_insert
        self._next_insert += self.plan.processes
        await client.kv.put(self.key(number), self.value(client.rng))
        self.inserted.append(number)

    # ---- by group

    @cached_property
    def groups(self) -> list[list[bytes]]:
        """The keys of each of the groups that are to be touched, ascending."""
        gids = sorted({gid for gid in self._owners if gid})
        wanted = self.plan.groups or len(gids)
        if wanted > len(gids):
            raise BadPlan(f"--groups {wanted}: only {len(gids)} of the cluster's groups serve shards")
        by_gid: dict[int, list[bytes]] = {gid: [] for gid in gids[:wanted]}
        for key in map(self.key, range(self.plan.keys)):
            gid = self._owners[shard_of(key, len(self._owners))]
            if gid in by_gid:
                by_gid[gid].append(key)
        return list(by_gid.values())

    @cached_property
    def own_keys(self) -> int:
        """How many of each group's keys belong to one client alone."""
        return (min(map(len, self.groups)) - COMMON_KEYS) // self.plan.clients

    def pair(self, client: Client) -> list[bytes]:
        """Two keys, of two groups if there are two: common ones, or the client's own."""
        rng = client.rng
        first, count = 0, COMMON_KEYS
        if rng.random() >= self.plan.conflict:
            first, count = COMMON_KEYS + client.number * self.own_keys, self.own_keys
        if len(self.groups) == 1:
            return self.sample(self.groups[0], 2, rng, first, count)
        return [keys[first + rng.randrange(count)] for keys in rng.sample(self.groups, 2)]

    def batch(self, client: Client, groups: Sequence[Sequence[bytes]]) -> list[bytes]:
        """`--batch` keys, in turn from each of the groups."""
        size = self.plan.batch
        return [
            key
            for position, keys in enumerate(groups)
            for key in self.sample(keys, len(range(position, size, len(groups))), client.rng)
        ]

    def sample(
        self, keys: Sequence[bytes], size: int, rng: random.Random, first: int = 0, count: int | None = None
    ) -> list[bytes]:
        """So many different ones of `keys`, or of `count` of them from `first`."""
        count = len(keys) if count is None else count
        return [keys[first + position] for position in rng.sample(range(count), size)]

    def check(self) -> None:
        """Raise BadPlan if there are too few keys or groups for the scenario."""
        plan = self.plan
        if not SCENARIOS[plan.scenario].by_group:
            return
        fewest = min(map(len, self.groups))
        need = 1
        if plan.scenario == "txn":
            need = COMMON_KEYS + 2 * plan.clients
        elif plan.scenario.startswith("batch"):
            need = plan.batch
            if plan.batch * (len(self.key(0)) + plan.value_bytes) > TXN_BYTES_MAX:
                raise BadPlan(f"--batch {plan.batch} of {plan.value_bytes} bytes each is more than a transaction holds")
        if plan.scenario in ("batch", "batch-cross") and len(self.groups) < 2:
            raise BadPlan(f"{plan.scenario} needs two groups that serve shards, and --groups not below 2")
        if fewest < need:
            raise BadPlan(f"--keys {plan.keys}: {need} are needed in each group, and one has {fewest}")


Operation = Callable[[World, Client], Awaitable[None]]


async def get(world: World, client: Client) -> None:
    await client.read(world.uniform(client))


async def get_hot(world: World, client: Client) -> None:
    await client.read(world.hot(client))


async def get_lock(world: World, client: Client) -> None:
    key = world.hot(client)

    async def body(txn: Transaction) -> None:
        if await txn.get(key, for_update=True) is None:
            raise KeyMissing

    await client.transact(body)


async def put(world: World, client: Client) -> None:
    await client.kv.put(world.uniform(client), world.value(client.rng))


async def append(world: World, client: Client) -> None:
    """To keys of its own, so that those that are read stay as long as they are."""
    key = KEY_PREFIX + b"append:%010d" % client.rng.randrange(world.plan.keys)
    try:
        await client.kv.append(key, world.value(client.rng))
    except TooLarge:
        await client.kv.put(key, b"")


async def txn(world: World, client: Client) -> None:
    keys = world.pair(client)

    async def body(txn: Transaction) -> None:
        for key in keys:
            if await txn.get(key) is None:
                raise KeyMissing
            await txn.put(key, world.value(client.rng))

    await client.transact(body)


async def batch_single(world: World, client: Client) -> None:
    await _batch(world, client, [client.rng.choice(world.groups)])


async def batch_cross(world: World, client: Client) -> None:
    await _batch(world, client, world.groups)


async def _batch(world: World, client: Client, groups: Sequence[Sequence[bytes]]) -> None:
    keys = world.batch(client, groups)

    async def body(txn: Transaction) -> None:
        for key in keys:
            await txn.put(key, world.value(client.rng))

    await client.transact(body)


async def fanout(world: World, client: Client) -> None:
    reads = [client.read(client.rng.choice(keys)) for keys in world.groups]
    await gather_ordered(reads, len(reads))


async def read_zipfian(world: World, client: Client) -> None:
    await client.read(world.zipfian(client))


async def read_latest(world: World, client: Client) -> None:
    await client.read(world.latest(client))


async def update(world: World, client: Client) -> None:
    await client.kv.put(world.zipfian(client), world.value(client.rng))


async def insert(world: World, client: Client) -> None:
    await world.insert(client)


async def scan(world: World, client: Client) -> None:
    prefix = world.zipfian(client)[:-SCAN_DIGITS]
    found = 0
    async for _ in client.kv.scan(prefix, limit=client.rng.randint(1, SCAN_PAIRS_MAX)):
        found += 1
    if not found:
        raise KeyMissing


async def read_modify_write(world: World, client: Client) -> None:
    """As YCSB has it: others may write in between."""
    key = world.zipfian(client)
    await client.read(key)
    await client.kv.put(key, world.value(client.rng))


@dataclass(frozen=True, slots=True)
class Scenario:
    """`mix`: kind of request → its share of all and what it does. `loads`: its keys are there before it begins;
    `by_group`: it chooses keys by their groups. `conflict`: the share on common keys if no other is asked for."""

    about: str
    mix: Mapping[str, tuple[float, Operation]]
    loads: bool = True
    by_group: bool = False
    conflict: float | None = None


SCENARIOS: Mapping[str, Scenario] = {
    "get": Scenario("Get, uniform keys", {"get": (1, get)}),
    "get-hot": Scenario(
        f"Get; --conflict per cent of them on {COMMON_KEYS} common keys", {"get": (1, get_hot)}, conflict=0.9
    ),
    "get-lock": Scenario(
        "a transaction that locks a key, reads it and ends; --conflict as for get-hot",
        {"get-lock": (1, get_lock)},
        conflict=0.0,
    ),
    "put": Scenario("Put, uniform keys", {"put": (1, put)}, loads=False),
    "append": Scenario("Append, uniform keys, which grow", {"append": (1, append)}, loads=False),
    "mixed": Scenario(
        "60 % Get, 30 % Put, 10 % Append", {"get": (0.6, get), "put": (0.3, put), "append": (0.1, append)}
    ),
    "txn": Scenario(
        f"a transaction that reads and writes two keys in two groups; --conflict: {COMMON_KEYS} keys of each group",
        {"txn": (1, txn)},
        by_group=True,
        conflict=0.1,
    ),
    "batch": Scenario(
        "batch-single and batch-cross, half and half, side by side",
        {"batch-single": (0.5, batch_single), "batch-cross": (0.5, batch_cross)},
        loads=False,
        by_group=True,
    ),
    "batch-single": Scenario(
        "a transaction that writes --batch keys, all in one group",
        {"batch-single": (1, batch_single)},
        loads=False,
        by_group=True,
    ),
    "batch-cross": Scenario(
        "a transaction that writes --batch keys, spread over --groups groups",
        {"batch-cross": (1, batch_cross)},
        loads=False,
        by_group=True,
    ),
    "fanout": Scenario(
        "Gets of one key in each of --groups groups at once: as slow as the slowest",
        {"fanout": (1, fanout)},
        by_group=True,
    ),
    "ycsb-a": Scenario("50 % read, 50 % update", {"read": (0.5, read_zipfian), "update": (0.5, update)}),
    "ycsb-b": Scenario("95 % read, 5 % update", {"read": (0.95, read_zipfian), "update": (0.05, update)}),
    "ycsb-c": Scenario("read", {"read": (1, read_zipfian)}),
    "ycsb-d": Scenario(
        "95 % read of the latest keys, 5 % insert", {"read": (0.95, read_latest), "insert": (0.05, insert)}
    ),
    "ycsb-e": Scenario(
        f"95 % scan of 1 to {SCAN_PAIRS_MAX} keys of a short prefix, 5 % insert",
        {"scan": (0.95, scan), "insert": (0.05, insert)},
    ),
    "ycsb-f": Scenario(
        "50 % read, 50 % read-modify-write",
        {"read": (0.5, read_zipfian), "read-modify-write": (0.5, read_modify_write)},
    ),
}
