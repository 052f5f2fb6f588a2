"""Clients that use the store through the SDK and write down what they did and saw.

A client process has one `RaftKV` and some users, each sequential, so that a history's client never calls while an
operation of its own is open. Every value written is unique, which is what makes histories quick to check. Few users
share a key. After an unknown outcome a user goes on under a new name.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from raftkv.client.kv import RaftKV, Value
from raftkv.protocol.errors import CasMismatch, OutcomeUnknown, RaftKVError, VersionMismatch
from raftkv.sim.check.history import History, Kind, Operation, Output, Status
from raftkv.sim.probes import Probes
from raftkv.sim.process import ClientProcess, Process, World
from raftkv.sim.scenario import WorkPlan, draw
from raftkv.sim.txn_workload import TxnRecorder, TxnUser


class Recorder:
    """The history, and the operations that are still open."""

    def __init__(self, world: World, probes: Probes) -> None:
        self.history = History()
        self.completed = 0
        self.unknown = 0
        self.failed = 0
        self.longest_s = 0.0
        self.probes = probes
        self._world = world
        self._open: dict[int, Operation] = {}
        self._tokens = 0
        self.users = 0

    def now_ns(self) -> int:
        return round(self._world.scheduler.now * 1e9)

    def token(self) -> bytes:
        """Unique in the run, and as text easy to find in a time-line."""
        self._tokens += 1
        return b"%d." % self._tokens

    def name(self, host: str) -> str:
        self.users += 1
        return f"{host}/{self.users}"

    def begin(
        self,
        client: str,
        kind: Kind,
        key: bytes,
        value: bytes | None,
        expected: bytes | None = None,
        if_version: int | None = None,
    ) -> Operation:
        """An operation goes out. Until `end` it counts as one of unknown outcome."""
        operation = Operation.write(
            client, kind, key, value, None, self.now_ns(), None, expected=expected, if_version=if_version
        )
        self._open[id(operation)] = operation
        return operation

    def end(self, operation: Operation, output: Output | None, error: RaftKVError | None) -> bool:
        """It was answered, or failed; whether its outcome is unknown now."""
        del self._open[id(operation)]
        returned_ns = self.now_ns()
        self.longest_s = max(self.longest_s, (returned_ns - operation.call_ns) / 1e9)
        if error is not None:
            self.probes.hit(f"client got {type(error).__name__}")
        if output is not None:
            self.completed += 1
            done = Operation.write(
                operation.client,
                operation.kind,
                operation.key,
                operation.value,
                output,
                operation.call_ns,
                returned_ns,
                expected=operation.expected,
                if_version=operation.if_version,
            )
            self.history.add(done)
            return False
        if operation.kind is Kind.GET:
            self.failed += 1
            return False  # a read without an answer says nothing
        if isinstance(error, OutcomeUnknown) or error is None or not error.definite:
            self.unknown += 1
            self.history.add(operation)
            return True
        self.failed += 1
        return False

    def ended(self, client: str, call_ns: int, now_ns: int, status: Status) -> None:
        """For transactions."""
        self.longest_s = max(self.longest_s, (now_ns - call_ns) / 1e9)
        self.completed += status is Status.OK
        self.failed += status is Status.FAIL
        self.unknown += status is Status.UNKNOWN

    def give_up(self, host: str) -> None:
        """The process is gone: nobody will hear what became of its operations."""
        for key, operation in list(self._open.items()):
            if operation.client.startswith(f"{host}/"):
                del self._open[key]
                if operation.kind is not Kind.GET:
                    self.unknown += 1
                    self.history.add(operation)

    def close(self) -> None:
        """The run is over."""
        for host in sorted({operation.client.split("/")[0] for operation in self._open.values()}):
            self.give_up(host)


class User:
    """One sequential user of a client."""

    def __init__(self, host: str, kv: RaftKV, recorder: Recorder, rng: random.Random, plan: WorkPlan) -> None:
        self._host = host
        self._kv = kv
        self._recorder = recorder
        self._rng = rng
        self._value_bytes = plan.value_bytes
        self._kinds = list(plan.mix)
        self._weights = list(plan.mix.values())
        self._name = recorder.name(host)
        self._seen: dict[bytes, Value | None] = {}

    async def act(self, key: bytes) -> None:
        """One operation on `key`, of a kind that it allows."""
        if key.startswith(b"a"):
            kind = "get" if self._rng.random() < 0.4 else "append"
        else:
            kind = self._rng.choices(self._kinds, self._weights)[0]
        seen = self._seen.get(key)
        if kind == "get":
            await self.get(key)
        elif kind == "cas":
            expected = seen.value if seen is not None else b"none"
            await self._write(Kind.CAS, key, self._value(), expected=expected)
        elif kind == "put_if":
            await self._write(Kind.PUT, key, self._value(), if_version=seen.version if seen is not None else 0)
        elif kind == "delete":
            await self._write(Kind.DELETE, key, None)
        elif kind == "append":
            await self._write(Kind.APPEND, key, self._recorder.token())
        else:
            await self._write(Kind.PUT, key, self._value())

    async def get(self, key: bytes) -> bool:
        """Read; whether there was an answer."""
        recorder = self._recorder
        operation = recorder.begin(self._name, Kind.GET, key, None)
        try:
            found = await self._kv.get(key)
        except RaftKVError as error:
            recorder.end(operation, None, error)
            return False
        self._seen[key] = found
        output = Output.read(None) if found is None else Output.read(found.value, found.version)
        recorder.end(operation, output, None)
        return True

    async def put(self, key: bytes) -> bool:
        """Write; whether it was acknowledged."""
        return await self._write(Kind.PUT, key, self._value())

    async def scan(self, prefix: bytes, keys: Sequence[bytes]) -> None:
        """Scan `prefix`, under which `keys` are: a read of each of them, at some instant of its own.

        What it finds is written down as that: by readers who are all there at the same time.
        """
        recorder = self._recorder
        reads = [recorder.begin(recorder.name(self._host), Kind.GET, key, None) for key in keys]
        found: dict[bytes, Value] = {}
        failure: RaftKVError | None = None
        try:
            async for key, value in self._kv.scan(prefix):
                found[key] = value
        except RaftKVError as error:
            failure = error
        for read in reads:
            value_read = found.get(read.key)
            output = Output.read(None) if value_read is None else Output.read(value_read.value, value_read.version)
            recorder.end(read, None if failure is not None else output, failure)
        if failure is None:
            recorder.completed -= len(reads) - 1  # one operation of the client's

    async def _write(
        self,
        kind: Kind,
        key: bytes,
        value: bytes | None,
        *,
        expected: bytes | None = None,
        if_version: int | None = None,
    ) -> bool:
        recorder = self._recorder
        operation = recorder.begin(self._name, kind, key, value, expected, if_version)
        output: Output | None = None
        failure: RaftKVError | None = None
        try:
            output = await self._call(kind, key, value, expected, if_version)
        except CasMismatch as error:
            failure = error
            absent = error.version == 0
            output = Output.mismatched(error.version, None if absent else error.current)
        except VersionMismatch as error:
            failure = error
            output = Output.mismatched(error.version)
        except RaftKVError as error:
            failure = error
        if recorder.end(operation, output, failure):
            self._name = recorder.name(self._host)
        return output is not None

    async def _call(
        self, kind: Kind, key: bytes, value: bytes | None, expected: bytes | None, if_version: int | None
    ) -> Output:
        kv = self._kv
        if kind is Kind.DELETE:
            self._seen.pop(key, None)
            return Output.deleted(await kv.delete(key))
        assert value is not None
        if kind is Kind.APPEND:
            return Output.written(await kv.append(key, value))
        if kind is Kind.CAS:
            assert expected is not None
            version = await kv.cas(key, expected, value)
        else:
            version = await kv.put(key, value, if_version=if_version)
        self._seen[key] = Value(value, version)
        return Output.written(version)

    def _value(self) -> bytes:
        token = self._recorder.token()
        length = int(draw(self._rng, self._value_bytes))
        return token + b"x" * max(0, length - len(token))


class Workload:
    """All client processes of a run."""

    def __init__(
        self,
        world: World,
        plan: WorkPlan,
        controllers: Sequence[str],
        recorder: Recorder,
        transactions: TxnRecorder,
        on_failure: Callable[[Process, str, BaseException], None],
    ) -> None:
        self.world = world
        self.plan = plan
        self.recorder = recorder
        self.transactions = transactions
        self.stopping = False
        self._controllers = list(controllers)
        rng = world.rng("workload")
        self.keys = [b"a%d" % i if i % 4 == 0 else b"k%d" % i for i in range(plan.keys)]
        users = [(client, worker) for client in range(plan.clients) for worker in range(plan.workers)]
        self._keys_of: dict[tuple[int, int], list[bytes]] = {user: [] for user in users}
        for key in self.keys:
            for user in rng.sample(users, min(plan.users_per_key, len(users))):
                self._keys_of[user].append(key)
        self._think_s = draw(rng, plan.think_s)
        self._follower_reads = [rng.random() < plan.follower_reads for _ in range(plan.clients)]
        self._timeouts_s = [draw(rng, plan.timeout_s) for _ in range(plan.clients)]
        self.processes = [ClientProcess(world, f"k{number}", on_failure) for number in range(plan.clients)]
        self.clients: dict[int, RaftKV] = {}
        self.idle: dict[int, int] = {}

    def start(self, number: int) -> None:
        """Begin an incarnation of client process `number`, unless it runs."""
        process = self.processes[number]
        if not process.running:
            process.launch(lambda: self._main(number))

    def kill(self, number: int) -> None:
        process = self.processes[number]
        process.kill()
        self.recorder.give_up(process.host)
        self.transactions.give_up(process.host)

    @property
    def quiet(self) -> bool:
        """Every user of every living client has ended."""
        return all(
            not process.running or self.idle.get(number, 0) == process.incarnation
            for number, process in enumerate(self.processes)
        )

    async def _main(self, number: int) -> None:
        process = self.processes[number]
        incarnation = process.incarnation
        rng = self.world.rng(f"{process.host}/{incarnation}")
        kv = RaftKV(
            self._controllers,
            timeout_s=self._timeouts_s[number],
            rng=rng,
            reads="follower" if self._follower_reads[number] else "leader",
        )
        self.clients[number] = kv
        loop = asyncio.get_running_loop()
        users = []
        for worker in range(self.plan.workers):
            user = User(process.host, kv, self.recorder, random.Random(rng.getrandbits(64)), self.plan)
            keys = self._keys_of[number, worker]
            if keys:
                users.append(loop.create_task(self._use(user, keys, random.Random(rng.getrandbits(64)))))
        for _ in range(self.transactions.plan.users):
            own = random.Random(rng.getrandbits(64))
            users.append(loop.create_task(self._transact(TxnUser(process.host, kv, self.transactions, own), own)))
        for task in users:
            await task
        await kv.close()
        self.idle[number] = incarnation

    async def _use(self, user: User, keys: list[bytes], rng: random.Random) -> None:
        scans = self.plan.scans
        while not self.stopping:
            if scans and rng.random() < scans:
                prefix = rng.choice((b"a", b"k1", b"k"))
                await user.scan(prefix, [key for key in self.keys if key.startswith(prefix)])
            else:
                await user.act(rng.choice(keys))
            await asyncio.sleep(rng.expovariate(1 / self._think_s))

    async def _transact(self, user: TxnUser, rng: random.Random) -> None:
        think_s = draw(rng, self.transactions.plan.think_s)
        while not self.stopping:
            await user.act()
            await asyncio.sleep(rng.expovariate(1 / think_s))


async def read_everything(
    kv: RaftKV, recorder: Recorder, plan: WorkPlan, host: str, keys: Sequence[bytes]
) -> list[str]:
    """Read every key and write one in every turn, after all is well again; what was not served."""
    user = User(host, kv, recorder, random.Random(0), plan)
    refused = []
    for key in keys:
        if not await user.get(key):
            refused.append(f"get {key!r}")
        if not key.startswith(b"a") and not await user.put(key):
            refused.append(f"put {key!r}")
        if not await user.get(key):
            refused.append(f"get {key!r} again")
    return refused


async def read_all_transactions(kv: RaftKV, transactions: TxnRecorder, host: str) -> list[str]:
    """Read all that transactions have written, in transactions, after all is well again; what was not served."""
    user = TxnUser(host, kv, transactions, random.Random(0), replace(transactions.plan, retried=1.0))
    work = {"lists": user.read_all_lists, "bank": user.audit_bank, "ring": user.audit_ring}
    return [f"read of the {name}" for name, read in work.items() if not await read()]
