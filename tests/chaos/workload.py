"""Clients that use the store through the SDK, and the history of what they saw.

Each user is sequential; a few users share a key, and a key is retired after some operations, so that histories can
be decided. Every written value is unique. After an unknown outcome a user goes on under a new name. A wait is the
time from a call until the user's next answer, however many calls were given up meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from raftkv.client.kv import RaftKV, Value
from raftkv.client.tasks import gather_ordered
from raftkv.protocol.errors import CasMismatch, RaftKVError, VersionMismatch
from raftkv.sim.check.history import History, Kind, Operation, Output, Status
from raftkv.sim.probes import Probes
from raftkv.sim.scenario import draw
from raftkv.sim.txn_workload import TxnRecorder, TxnUser

USERS_PER_KEY = 4
OPERATIONS_PER_KEY = 120
FINAL_READS_AT_ONCE = 8
BALLAST_KEYS = 600
BALLAST_VALUE_BYTES = 8_000
BALLAST_AT_ONCE = 32

Mix = dict[str, float]
REGISTER_MIX: Mix = {"get": 40, "put": 20, "append": 18, "cas": 12, "put_if": 5, "delete": 5}
APPEND_MIX: Mix = {"get": 40, "append": 60}


@dataclass(frozen=True)
class Wait:
    """How long a user waited for an answer."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass
class Slot:
    """A place for one key at a time; `generation` counts the keys that were there."""

    name: str
    mix: Mix
    generation: int = 0
    operations: int = 0

    @property
    def key(self) -> bytes:
        return f"{self.name}.{self.generation}".encode()


@dataclass
class Recorder:
    """The history, the waits and the errors of all users. `probes` count what transactions met."""

    history: History = field(default_factory=History)
    waits: list[Wait] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    keys: dict[bytes, None] = field(default_factory=dict)
    tokens: int = 0
    names: int = 0
    probes: Probes = field(default_factory=Probes)
    _waits_since: dict[str, int] = field(default_factory=dict)
    """Of users of transactions."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def ended(self, client: str, call_ns: int, now_ns: int, status: Status) -> None:
        """A wait ends when a transaction is committed, however many were not."""
        user = client.split("/")[0]
        since_ns = self._waits_since.setdefault(user, call_ns)
        if status is Status.OK:
            del self._waits_since[user]
            self.waits.append(Wait(since_ns, now_ns))

    def token(self) -> bytes:
        """Unique, and not the beginning of another."""
        self.tokens += 1
        return b"%d." % self.tokens

    def name(self, user: str) -> str:
        self.names += 1
        return f"{user}/{self.names}"


class User:
    """One sequential user of `kv`."""

    def __init__(self, name: str, kv: RaftKV, recorder: Recorder, rng: random.Random) -> None:
        self.slots: list[Slot] = []
        self._user = name
        self._name = recorder.name(name)
        self._kv = kv
        self._recorder = recorder
        self._rng = rng
        self._seen: tuple[bytes, Value | None] = (b"", None)
        self._waits_since: int | None = None

    async def work(self, stop: asyncio.Event, think_s: float) -> None:
        """Operations on keys of its slots until `stop` is set."""
        while not stop.is_set():
            slot = self._rng.choice(self.slots)
            if slot.operations >= OPERATIONS_PER_KEY:
                slot.generation += 1
                slot.operations = 0
            slot.operations += 1
            await self.act(slot.key, self._rng.choices(list(slot.mix), list(slot.mix.values()))[0])
            await asyncio.sleep(self._rng.expovariate(1 / think_s))

    async def act(self, key: bytes, kind: str) -> bool:
        """One operation; whether it was answered."""
        recorder = self._recorder
        recorder.keys[key] = None
        seen = self._seen[1] if self._seen[0] == key else None
        value: bytes | None = None
        expected: bytes | None = None
        if_version: int | None = None
        if kind == "append":
            value = recorder.token()
        elif kind not in ("get", "delete"):
            value = recorder.token() + b"x" * int(10 * 300 ** (self._rng.random() ** 3))
        if kind == "cas":
            expected = seen.value if seen is not None else b"none"
        elif kind == "put_if":
            if_version = seen.version if seen is not None else 0
        asked = Kind.PUT if kind == "put_if" else Kind(kind)
        call_ns = time.monotonic_ns()
        output: Output | None = None
        failure: RaftKVError | None = None
        try:
            output = await self._call(asked, key, value, expected, if_version)
        except CasMismatch as error:
            output = Output.mismatched(error.version, None if error.version == 0 else error.current)
        except VersionMismatch as error:
            output = Output.mismatched(error.version)
        except RaftKVError as error:
            failure = error
        return_ns = time.monotonic_ns()
        since_ns = self._waits_since if self._waits_since is not None else call_ns
        if failure is None:
            assert output is not None
            recorder.waits.append(Wait(since_ns, return_ns))
            self._waits_since = None
            recorder.outcomes["ok"] += 1
        else:
            self._waits_since = since_ns
            recorder.errors[type(failure).__name__] += 1
            if asked is Kind.GET or failure.definite:
                recorder.outcomes["failed"] += 1
                return False
            recorder.outcomes["unknown"] += 1
        if asked is Kind.GET:
            assert output is not None
            recorder.history.add(Operation.get(self._name, key, output, call_ns, return_ns))
        else:
            done = Operation.write(
                self._name, asked, key, value, output, call_ns, None if output is None else return_ns,
                expected=expected, if_version=if_version,
            )  # fmt: skip
            recorder.history.add(done)
        if failure is not None:
            self._name = recorder.name(self._user)  # the operation may still be under way
        return failure is None

    async def _call(
        self, kind: Kind, key: bytes, value: bytes | None, expected: bytes | None, if_version: int | None
    ) -> Output:
        kv = self._kv
        if kind is Kind.GET:
            found = await kv.get(key)
            self._seen = (key, found)
            return Output.read(None) if found is None else Output.read(found.value, found.version)
        if kind is Kind.DELETE:
            return Output.deleted(await kv.delete(key))
        assert value is not None
        if kind is Kind.APPEND:
            return Output.written(await kv.append(key, value))
        if kind is Kind.CAS:
            assert expected is not None
            version = await kv.cas(key, expected, value)
        else:
            version = await kv.put(key, value, if_version=if_version)
        self._seen = (key, Value(value, version))
        return Output.written(version)


class Workload:
    """`clients` SDK clients with `users` users each, over `slots` keys at a time, and beside them those users of
    transactions that their plan wants. `name` is in the names of the keys, for a store that others have used."""

    def __init__(
        self,
        controllers: Sequence[str],
        recorder: Recorder,
        transactions: TxnRecorder,
        rng: random.Random,
        *,
        clients: int = 4,
        users: int = 3,
        slots: int = 24,
        think_s: float = 0.05,
        name: str = "",
    ) -> None:
        self.recorder = recorder
        self.stop = asyncio.Event()
        self._controllers = list(controllers)
        self._think_s = think_s
        self._clients: list[RaftKV] = []
        self._users: list[User] = []
        self._transactions: list[tuple[TxnUser, random.Random, float]] = []
        for client in range(clients):
            reads: Literal["leader", "follower"] = "follower" if client % 2 else "leader"
            kv = RaftKV(self._controllers, timeout_s=rng.choice([3.0, 6.0, 12.0]), reads=reads)
            self._clients.append(kv)
            for user in range(users):
                self._users.append(User(f"c{client}u{user}", kv, recorder, random.Random(rng.getrandbits(64))))
            for user in range(transactions.plan.users):
                own = random.Random(rng.getrandbits(64))
                think = draw(own, transactions.plan.think_s)
                self._transactions.append((TxnUser(f"c{client}t{user}", kv, transactions, own), own, think))
        for number in range(slots):
            appended = number % 3 == 0
            slot = Slot(f"a{name}{number}", APPEND_MIX) if appended else Slot(f"k{name}{number}", REGISTER_MIX)
            for chosen in rng.sample(self._users, min(USERS_PER_KEY, len(self._users))):
                chosen.slots.append(slot)
        for idle in [user for user in self._users if not user.slots]:
            idle.slots.append(Slot(f"k{name}{slots}", REGISTER_MIX))

    async def run(self) -> None:
        """Until `stop` is set and the last operations have ended."""
        try:
            async with asyncio.TaskGroup() as group:
                for user in self._users:
                    group.create_task(user.work(self.stop, self._think_s))
                for transactor, rng, think_s in self._transactions:
                    group.create_task(self._transact(transactor, rng, think_s))
        finally:
            for kv in self._clients:
                await kv.close()

    async def _transact(self, user: TxnUser, rng: random.Random, think_s: float) -> None:
        while not self.stop.is_set():
            await user.act()
            await asyncio.sleep(rng.expovariate(1 / think_s))


class Ballast:
    """Values that nobody changes, so that shards have a weight when they move."""

    def __init__(self, controllers: Sequence[str], rng: random.Random) -> None:
        self._controllers = list(controllers)
        self._values = {b"ballast-%d" % number: rng.randbytes(BALLAST_VALUE_BYTES) for number in range(BALLAST_KEYS)}

    async def load(self) -> None:
        async with RaftKV(self._controllers, timeout_s=60) as kv:
            await gather_ordered([kv.put(key, value) for key, value in self._values.items()], BALLAST_AT_ONCE)

    async def lost(self) -> list[str]:
        """What isn't as it was written, as text."""
        problems: list[str] = []

        async def look(kv: RaftKV, key: bytes, value: bytes) -> None:
            try:
                found = await kv.get(key)
            except RaftKVError as error:
                problems.append(f"{key.decode()} is not served: {error}")
                return
            if found is None or found.value != value:
                problems.append(f"{key.decode()} is {'lost' if found is None else 'another one'}")

        async with RaftKV(self._controllers, timeout_s=30) as kv:
            await gather_ordered([look(kv, key, value) for key, value in self._values.items()], BALLAST_AT_ONCE)
        return [f"{len(problems)} values that nobody touched: {', '.join(problems[:5])}"] if problems else []


async def visit_all(controllers: Sequence[str], recorder: Recorder, timeout_s: float) -> list[str]:
    """Read every key, write some, read them again, all in the history: what was not served."""
    refused: list[str] = []
    keys = list(recorder.keys)

    async def visit(user: User, mine: list[bytes]) -> None:
        for number, key in enumerate(mine):
            kinds = ["get"]
            if number % 10 == 0:
                kinds += ["append" if key.startswith(b"a") else "put", "get"]
            for kind in kinds:
                if not await user.act(key, kind):
                    refused.append(f"{kind} {key.decode()}")

    async with RaftKV(controllers, timeout_s=timeout_s) as kv, asyncio.TaskGroup() as group:
        for number in range(FINAL_READS_AT_ONCE):
            user = User(f"final{number}", kv, recorder, random.Random(number))
            group.create_task(visit(user, keys[number::FINAL_READS_AT_ONCE]))
    return refused
