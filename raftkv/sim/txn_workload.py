"""Clients that run transactions through the SDK: lists that grow, a bank, a ring of pointers.

Lists (`l0`, …) are read and appended to, several in one transaction, sometimes one without any; every element is
unique, so that the history can be checked for cycles (Kingsbury's list-append). Accounts (`b0`, …) hand money on, and
their sum is constant in whatever commits; the pointers of the ring (`r0`, …) change places, and it stays one ring:
those two are checked here, by whoever reads all of it. What a client was told of a transaction is kept, to be
compared with what the groups and the coordinators have recorded. The chaos on real processes has the same users.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from raftkv.client.kv import RaftKV, Value
from raftkv.client.transactions import Transaction, TxnPhase
from raftkv.client.txn_status import TxnStatus
from raftkv.protocol.errors import OutcomeUnknown, RaftKVError
from raftkv.sim.check.history import History, Operation, Status, Step
from raftkv.sim.probes import Probes
from raftkv.sim.scenario import TxnPlan, draw

START_BALANCE = 100
IMPATIENT_S = (0.001, 0.3)
DWELL_S = (0.01, 3.0)


class Recorder(Protocol):
    """Where transactions are written down, beside the plain operations of the same run."""

    history: History
    probes: Probes

    def now_ns(self) -> int:
        """By the history's clock."""

    def token(self) -> bytes:
        """An element that is unique in the run."""

    def name(self, host: str) -> str:
        """A new name for a user of `host`'s: `host/…`."""

    def ended(self, client: str, call_ns: int, now_ns: int, status: Status) -> None:
        """A transaction of `client`'s was called at `call_ns`, and has ended."""


@dataclass
class Open:
    """One transaction of a client, as far as it has come. Until it is told otherwise, its outcome is unknown.

    Of one that `writes` nothing, a failed commit says nothing of what is recorded: that may be a commit of no writes.
    """

    client: str
    kind: str
    call_ns: int
    steps: list[Step] = field(default_factory=list)
    txid: bytes = b""
    may_be_committed: bool = False
    writes: bool = False

    def operation(self, return_ns: int | None, status: Status) -> Operation:
        return Operation.txn(self.client, self.steps, self.call_ns, return_ns, status)


Body = Callable[[Transaction, Open], Awaitable[None]]


class TxnRecorder:
    """What came of the transactions of a run. `told`: by txid, whether its client heard that it is committed;
    `outcomes`: how many of each kind ended how; `lists`: those in use, the ones that grew too long are `full`."""

    def __init__(self, recorder: Recorder, plan: TxnPlan, violate: Callable[[str], None]) -> None:
        self.recorder = recorder
        self.plan = plan
        self.violate = violate
        self.told: dict[bytes, bool] = {}
        self.outcomes: Counter[tuple[str, Status]] = Counter()
        self.lists = [b"l%d" % number for number in range(plan.lists)]
        self.full: list[bytes] = []
        self._open: dict[int, Open] = {}

    def begin(self, client: str, kind: str) -> Open:
        opened = Open(client, kind, self.recorder.now_ns())
        self._open[id(opened)] = opened
        return opened

    def end(self, opened: Open, status: Status) -> None:
        del self._open[id(opened)]
        recorder = self.recorder
        now_ns = recorder.now_ns()
        recorder.ended(opened.client, opened.call_ns, now_ns, status)
        recorder.probes.hit(f"transaction {status}")
        self.outcomes[opened.kind, status] += 1
        if opened.steps:
            recorder.history.add(opened.operation(None if status is Status.UNKNOWN else now_ns, status))
        if opened.txid and (status is Status.OK or (status is Status.FAIL and opened.writes)):
            self.tell(opened.txid, status is Status.OK)

    def tell(self, txid: bytes, committed: bool) -> None:
        """A client hears how its transaction ended; perhaps not for the first time."""
        if self.told.setdefault(txid, committed) != committed:
            self.violate(f"DecisionNeverChanges: transaction {txid.hex()} was told committed and aborted")

    def has_grown(self, key: bytes, elements: int) -> None:
        """Somebody read a list of so many elements: it is followed by an empty one once that is enough."""
        if elements >= self.plan.elements and key in self.lists:
            self.full.append(key)
            self.lists[self.lists.index(key)] = b"l%d" % (len(self.lists) + len(self.full) - 1)

    def give_up(self, host: str) -> None:
        """The process is gone: nobody will hear what became of its transactions."""
        for key, opened in list(self._open.items()):
            if opened.client.startswith(f"{host}/"):
                status = Status.UNKNOWN if opened.may_be_committed else Status.FAIL
                opened.txid = b""  # nobody was told
                self.end(opened, status)
                assert key not in self._open

    def close(self) -> None:
        for host in sorted({opened.client.split("/")[0] for opened in self._open.values()}):
            self.give_up(host)

    # ---- what must hold in every committed read of all

    def check_bank(self, balances: list[int]) -> None:
        if sum(balances) != START_BALANCE * len(balances):
            self.violate(f"BankKeepsItsMoney: {sum(balances)} of {START_BALANCE * len(balances)} in {balances}")

    def check_ring(self, following: list[int]) -> None:
        at, seen = 0, 0
        while seen <= len(following):
            at, seen = following[at], seen + 1
            if at == 0:
                break
        if seen != len(following):
            self.violate(f"RingStaysARing: {following}")


class TxnUser:
    """One sequential user of a client; `plan` is the recorder's by default."""

    def __init__(
        self, host: str, kv: RaftKV, recorder: TxnRecorder, rng: random.Random, plan: TxnPlan | None = None
    ) -> None:
        self._host = host
        self._kv = kv
        self._txns = recorder
        self._recorder = recorder.recorder
        self._rng = rng
        self._plan = plan or recorder.plan
        self._kinds = list(self._plan.mix)
        self._weights = list(self._plan.mix.values())
        self._name = self._recorder.name(host)

    async def act(self) -> None:
        kind = self._rng.choices(self._kinds, self._weights)[0]
        if kind == "lists":
            await self._change_lists()
        elif kind == "read":
            await self._read_lists()
        elif kind == "plain":
            await self._plain()
        elif kind == "transfer":
            await self._run(kind, self._transfer)
        elif kind == "swap":
            await self._run(kind, self._swap)
        elif self._rng.random() < 0.5:
            await self.audit_bank()
        else:
            await self.audit_ring()

    async def audit_bank(self) -> bool:
        """Read all accounts; whether that was served."""
        balances: list[int] = []

        async def body(txn: Transaction, opened: Open) -> None:
            balances[:] = [await self._number(txn, b"b", i, START_BALANCE) for i in range(self._plan.accounts)]

        if not await self._run("bank", body):
            return False
        self._txns.check_bank(balances)
        return True

    async def audit_ring(self) -> bool:
        """Read the whole ring; whether that was served."""
        following: list[int] = []
        size = self._plan.ring

        async def body(txn: Transaction, opened: Open) -> None:
            following[:] = [await self._number(txn, b"r", i, (i + 1) % size) for i in range(size)]

        if not await self._run("ring", body):
            return False
        self._txns.check_ring(following)
        return True

    async def read_all_lists(self) -> bool:
        """Also those that are full, as many at a time as are in use; whether that was served."""
        everything = [*self._txns.full, *self._txns.lists]
        step = len(self._txns.lists)
        parts = [everything[at : at + step] for at in range(0, len(everything), step)]
        return all([await self._read_at_once(keys) for keys in parts])

    async def _read_at_once(self, keys: list[bytes]) -> bool:
        async def body(txn: Transaction, opened: Open) -> None:
            for key in keys:
                await self._read(txn, opened, key)

        return await self._run("read", body)

    # ---- lists

    async def _change_lists(self) -> None:
        rng = self._rng
        lists = self._txns.lists
        keys = rng.sample(lists, min(len(lists), rng.randint(1, 3)))
        changed = [key for key in keys if rng.random() < 0.7] or keys[:1]
        tokens = {key: [self._recorder.token() for _ in range(rng.choice((1, 1, 1, 2)))] for key in changed}
        locked = keys if rng.random() < self._plan.locked else []
        reads_again = rng.random() < 0.1
        for_update = rng.random() < self._plan.locked / 2

        async def body(txn: Transaction, opened: Open) -> None:
            if locked:
                await txn.lock(*locked)
                self._recorder.probes.hit("transaction with explicit locks")
                await asyncio.sleep(draw(rng, DWELL_S) * rng.random())
            for key in keys:
                await self._read(txn, opened, key, for_update=for_update)
                for token in tokens.get(key, ()):
                    await txn.append(key, token)
                    opened.steps.append(Step.append(key, token))
            if reads_again:
                await self._read(txn, opened, changed[0])

        await self._run("lists", body)

    async def _read_lists(self) -> None:
        lists = self._txns.lists
        await self._read_at_once(self._rng.sample(lists, min(len(lists), self._rng.randint(1, 4))))

    async def _read(self, txn: Transaction, opened: Open, key: bytes, *, for_update: bool = False) -> None:
        found = await txn.get(key, for_update=for_update)
        self._note(opened, key, found)

    def _note(self, opened: Open, key: bytes, found: Value | None) -> None:
        elements = [] if found is None else elements_of(found.value)
        opened.steps.append(Step.read(key, elements))
        self._txns.has_grown(key, len(elements))

    async def _plain(self) -> None:
        """A transaction of one step is what a plain read or append is."""
        key = self._rng.choice(self._txns.lists)
        opened = self._txns.begin(self._name, "plain")
        try:
            if self._rng.random() < 0.5:
                self._note(opened, key, await self._kv.get(key))
            else:
                token = self._recorder.token()
                opened.steps.append(Step.append(key, token))
                opened.may_be_committed = True
                await self._kv.append(key, token)
        except RaftKVError as error:
            self._recorder.probes.hit(f"client got {type(error).__name__}")
            unknown = opened.may_be_committed and (isinstance(error, OutcomeUnknown) or not error.definite)
            self._end(opened, Status.UNKNOWN if unknown else Status.FAIL)
        else:
            self._end(opened, Status.OK)

    # ---- bank and ring

    async def _transfer(self, txn: Transaction, opened: Open) -> None:
        giver, taker = self._rng.sample(range(self._plan.accounts), 2)
        has = await self._number(txn, b"b", giver, START_BALANCE)
        gets = await self._number(txn, b"b", taker, START_BALANCE)
        amount = self._rng.randint(1, 30)
        if has >= amount:
            await txn.put(b"b%d" % giver, b"%d" % (has - amount))
            await txn.put(b"b%d" % taker, b"%d" % (gets + amount))

    async def _swap(self, txn: Transaction, opened: Open) -> None:
        """a → b → c → d becomes a → c → b → d. What is read before the commit need not belong together."""
        size = self._plan.ring
        a = self._rng.randrange(size)
        b = await self._number(txn, b"r", a, (a + 1) % size)
        c = await self._number(txn, b"r", b, (b + 1) % size)
        d = await self._number(txn, b"r", c, (c + 1) % size)
        if len({a, b, c}) == 3:
            await txn.put(b"r%d" % a, b"%d" % c)
            await txn.put(b"r%d" % c, b"%d" % b)
            await txn.put(b"r%d" % b, b"%d" % d)

    async def _number(self, txn: Transaction, prefix: bytes, number: int, absent: int) -> int:
        found = await txn.get(prefix + b"%d" % number)
        return absent if found is None else int(found.value)

    # ---- one transaction

    async def _run(self, kind: str, body: Body) -> bool:
        """Whether it is committed for certain."""
        opened = self._txns.begin(self._name, kind)
        if self._rng.random() < self._plan.retried:
            return await self._run_until_committed(opened, body)
        txn = self._kv.transaction()
        try:
            await txn.begin()
            opened.txid = txn.txid
            await body(txn, opened)
            opened.writes = txn.writes
            if self._rng.random() < self._plan.abandoned:
                self._recorder.probes.hit("transaction abandoned")
                opened.may_be_committed = True
                async with asyncio.timeout(draw(self._rng, IMPATIENT_S)):
                    await txn.commit()
            else:
                opened.may_be_committed = True
                await txn.commit()
        except (RaftKVError, TimeoutError) as error:
            self._recorder.probes.hit(f"client got {type(error).__name__}")
            if txn.phase is TxnPhase.OPEN:
                await txn.abort()
            await self._failed(opened, txn.phase is TxnPhase.UNKNOWN)
            return False
        self._end(opened, Status.OK)
        return True

    async def _run_until_committed(self, opened: Open, body: Body) -> bool:
        async def attempt(txn: Transaction) -> None:
            opened.steps.clear()  # what the attempt before did is certainly not done
            opened.txid = txn.txid
            await body(txn, opened)
            opened.writes = txn.writes
            opened.may_be_committed = True

        try:
            await self._kv.run_transaction(attempt)
        except RaftKVError as error:
            self._recorder.probes.hit(f"client got {type(error).__name__}")
            await self._failed(opened, isinstance(error, OutcomeUnknown))
            return False
        self._end(opened, Status.OK)
        return True

    async def _failed(self, opened: Open, is_unknown: bool) -> None:
        self._end(opened, Status.UNKNOWN if is_unknown else Status.FAIL)
        if is_unknown and self._rng.random() < 0.5:
            try:
                status = await self._kv.txn_status(opened.txid)
            except RaftKVError:
                return
            self._recorder.probes.hit(f"asked for a transaction: {status}")
            if status in (TxnStatus.COMMITTED, TxnStatus.ABORTED):
                self._txns.tell(opened.txid, status is TxnStatus.COMMITTED)

    def _end(self, opened: Open, status: Status) -> None:
        self._txns.end(opened, status)
        if status is Status.UNKNOWN:
            self._name = self._recorder.name(self._host)


def elements_of(value: bytes) -> list[bytes]:
    """The tokens that were appended."""
    return [token + b"." for token in value.split(b".")[:-1]]
