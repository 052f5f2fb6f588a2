"""Drives transactions over several groups: votes, decision, the word of it to every shard; what a leader of the
coordinators does. Design §11, docs/decisions/0006-transactions.md.

What counts is what the coordinators' log says when an entry is applied; nothing here decides anything. What a group
says is its log's word too. So whoever leads next goes on from the records alone, and this module may forget
everything at any moment. It addresses shards, never groups: where a shard is, is found out anew with each attempt.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Coroutine, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import msgpack

from raftkv.daemons.failpoints import Failpoints
from raftkv.daemons.group_calls import GroupCalls, named_client
from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.places import Places
from raftkv.daemons.proposals import propose, submit
from raftkv.daemons.replica import Replica
from raftkv.daemons.service import Session
from raftkv.daemons.tasks import Tasks
from raftkv.machines import coordinator as op
from raftkv.machines.coordinator import CoordinatorMachine, Record, TxnState
from raftkv.machines.participants import NOT_HERE, YES
from raftkv.machines.results import raise_if_refused
from raftkv.machines.shard_map import NO_GROUP, ShardMap
from raftkv.machines.txn_commands import (
    TXN_DECIDE,
    TXN_PREPARE,
    TXN_RESOLVE,
    is_txid,
    refuse_parts,
    txid_ms,
)
from raftkv.protocol.errors import (
    Aborted,
    BadRequest,
    BadShard,
    Busy,
    Conflict,
    Expired,
    OutcomeUnknown,
    RaftKVError,
    TooLarge,
    WrongGroup,
)
from raftkv.protocol.limits import ID_BYTES
from raftkv.protocol.messages import Verb
from raftkv.protocol.transactions import State, decode_decide_reply, decode_resolve_reply
from raftkv.storage.store import Store

log = logging.getLogger(__name__)

PREPARE_TIMEOUT_S = 5.0
"""For all votes; then the transaction is aborted."""
OPEN_MAX = 4_096
"""Transactions that haven't come to their end; beyond it `Busy`."""
OPEN_BYTES_MAX = 64 * 1024 * 1024
"""Of the keys and values that wait for votes."""
WAITERS_MAX = 64
"""Requests that wait for the same transaction."""
DOUBTS_MAX = 256
"""Questions of groups that wait for the log."""
ASKS_AT_ONCE = 128
"""Questions to one group that are under way."""
END_DELAY_S = 0.02
"""Ends are logged together."""
SHOWN_MAX = 1_000
"""Transactions in a status."""
BACKOFF_S_MIN = 0.02
BACKOFF_S_MAX = 1.0
DEPARTED_BACKOFF_S_MAX = 10.0
"""For a group that has left: it may be gone for ever."""

NO = (Conflict, Aborted, Expired, BadRequest, TooLarge)
"""What a group answers to a PREPARE when it votes no."""

Verdict = asyncio.Future[RaftKVError | None]
"""None when all shards have voted yes; else why not."""
Waiter = tuple[Session, int, bool]
"""Who asked, the request's id, and whether it was a COMMIT (else a RESOLVE)."""


class Work:
    """One transaction that hasn't come to its end; what isn't in the log of it. `unvoted`: the parts of the shards that
    haven't said yes yet."""

    __slots__ = ("branches", "digest", "parts", "shards", "size_bytes", "state", "txid", "unvoted", "waiters")

    def __init__(self, txid: bytes, digest: bytes, shards: Sequence[int], parts: list[Any], size_bytes: int) -> None:
        self.txid = txid
        self.digest = digest
        self.shards = tuple(shards)
        self.parts = parts
        self.size_bytes = size_bytes
        self.state = TxnState.BEGUN
        self.waiters: list[Waiter] = []
        self.branches: list[asyncio.Task[None]] = []
        self.unvoted: dict[int, Any] = {}


class Transactions:
    """Runs while its replica leads, from `start` to `stop`."""

    def __init__(
        self,
        options: DaemonOptions,
        store: Store,
        machine: CoordinatorMachine,
        places: Places,
        tasks: Tasks,
        rng: random.Random,
        failpoints: Failpoints,
    ) -> None:
        self._name = options.name
        self._gid = options.gid
        self._store = store
        self._machine = machine
        self._places = places
        self._tasks = tasks
        self._rng = rng
        self._failpoints = failpoints
        self._loop = asyncio.get_running_loop()
        self._calls = GroupCalls(named_client(options, store), ssl=options.client_ssl)
        self.replica: Replica | None = None
        self.term: int | None = None
        self.ended: Counter[TxnState] = Counter()
        """Transactions that this process has driven to a decision, by what it was."""
        self._forget()

    def _forget(self) -> None:
        self._has_taken_over = False
        self._works: dict[bytes, Work] = {}
        self._size_bytes = 0
        self._doubts = 0
        self._running: dict[asyncio.Task[None], None] = {}
        self._asks: dict[int, asyncio.Semaphore] = {}
        self._resolved: set[int] = set()
        self._ended: list[bytes] = []
        self._has_ended = asyncio.Event()

    # ---- life

    def start(self, term: int) -> None:
        self.term = term
        self._start(self._take_over(), "take-over")

    def stop(self) -> None:
        """Somebody else leads, or nobody: who waits is told so."""
        self.term = None
        works = self._works
        for task in list(self._running):
            task.cancel()
        self._forget()
        self._calls.close()
        for work in works.values():
            self._refuse(work, OutcomeUnknown(f"transaction {work.txid.hex()}"))

    def map_changed(self) -> None:
        """Every group that the maps name is told once that this term's coordinator is the one that counts."""
        if not self._has_taken_over:
            return
        for gid in self._places.groups():
            if gid not in self._resolved:
                self._resolved.add(gid)
                self._start(self._resolve_group(gid), f"resolve group {gid}")

    def status(self) -> list[dict[str, Any]]:
        """The transactions without an end, so many at most."""
        now_ms = self._machine.map_time_ms
        return [
            {
                "txid": txid,
                "state": record.state.name.lower(),
                "shards": list(record.shards),
                "age_ms": max(0, now_ms - txid_ms(txid)),
            }
            for txid, record in islice(self._machine.open.items(), SHOWN_MAX)
        ]

    @property
    def in_progress(self) -> int:
        """How many this leader is about."""
        return len(self._works)

    # ---- what clients and groups ask

    def commit(self, session: Session, request_id: int, txid: bytes, parts: list[Any]) -> None:
        shard_map = self._check_ready()
        _check_txid(txid)
        raise_if_refused(refuse_parts(parts, shard_map.shards))
        shards = [part[0] for part in parts]
        _check_shards(shards, shard_map)
        packed = msgpack.packb(parts)
        digest = blake2b(packed, digest_size=ID_BYTES).digest()
        work = self._works.get(txid)
        if work is None:
            work = self._open(Work(txid, digest, shards, parts, len(packed)))
            self._start(self._commit(work), "commit")
        elif work.digest not in (b"", digest):
            raise BadRequest("another content was committed under this transaction id")
        self._wait_for(work, (session, request_id, True))

    def resolve(self, session: Session, request_id: int, txid: bytes, shards: Sequence[int]) -> None:
        shard_map = self._check_ready()
        _check_txid(txid)
        _check_shards(shards, shard_map)
        work = self._works.get(txid)
        if work is None:
            work = self._open(Work(txid, b"", shards, [], 0))
            self._start(self._fence(work), "fence")
        self._wait_for(work, (session, request_id, False))

    def doubt(self, session: Session, request_id: int, txids: Sequence[bytes]) -> None:
        self._check_ready()
        for txid in txids:
            _check_txid(txid)
        if self._doubts >= DOUBTS_MAX:
            raise Busy("too many groups are in doubt")
        self._doubts += 1
        self._start(self._answer_doubt(session, request_id, txids), "doubt")

    def _check_ready(self) -> ShardMap:
        assert self.replica is not None
        if not self.replica.is_leader:
            raise self.replica.not_leader()
        if self.term is None or not self._has_taken_over or self._places.latest is None:
            raise Busy("a new leader of the coordinators takes over")
        return self._places.latest

    def _open(self, work: Work) -> Work:
        if len(self._works) >= OPEN_MAX or self._size_bytes + work.size_bytes > OPEN_BYTES_MAX:
            raise Busy("too many transactions are in progress")
        self._works[work.txid] = work
        self._size_bytes += work.size_bytes
        return work

    def _wait_for(self, work: Work, waiter: Waiter) -> None:
        if work.state in (TxnState.COMMITTED, TxnState.ABORTED):
            _answer(waiter, work.state, None)
            return
        work.waiters = [known for known in work.waiters if not known[0].closed]
        if len(work.waiters) >= WAITERS_MAX:
            raise Busy("too many requests wait for this transaction")
        work.waiters.append(waiter)

    # ---- one transaction

    async def _commit(self, work: Work) -> None:
        """Log its beginning, and ask for the votes meanwhile: so a client waits for two rounds of consensus, not three.

        Only of a txid that is new here: all that earlier terms have logged is applied, and of this term's nothing about
        it is under way. If this leader dies before the beginning is logged, the next one finds what the groups have
        prepared (`_resolve_group`), and aborts it.
        """
        assert self.replica is not None
        verdict: Verdict | None = None
        try:
            self.replica.check_readable()
            known = self._machine.record(self._store.engine, work.txid)
            begun = submit(self.replica, [op.BEGIN, work.txid, work.digest, list(work.shards)])
            if known is None and not self._machine.is_expired(work.txid) and not begun.done():
                verdict = self._ask_for_votes(work)
            state = _state_found(await begun)
        except RaftKVError as error:
            self._end_branches(work)
            self._close(work)
            self._refuse(work, error)
            return
        await self._failpoints.reach("coordinator logged begin")
        if state != TxnState.BEGUN:
            self._end_branches(work)
        await self._drive(work, state, verdict)

    async def _fence(self, work: Work) -> None:
        """What is found when it is logged, perhaps an end, is what is gone on from."""
        try:
            result = await self._propose([op.FENCE, work.txid, list(work.shards)])
        except RaftKVError as error:
            self._close(work)
            self._refuse(work, error)
            return
        await self._failpoints.reach("coordinator logged fence")
        await self._drive(work, TxnState(result[1]))

    async def _drive(self, work: Work, state: TxnState, verdict: Verdict | None = None) -> None:
        """To its end, from what the log says of it. `verdict`: the votes have been asked for."""
        known = self._machine.open.get(work.txid)
        if known is not None:
            work.shards = known.shards
        was_fenced = state == TxnState.FENCED
        refusal: RaftKVError | None = None
        if state == TxnState.BEGUN:
            refusal = await self._count_votes(work, verdict or self._ask_for_votes(work))
            if refusal is None:
                await self._failpoints.reach("coordinator got all votes")
            state = await self._log_end(op.DECIDE, work.txid, refusal is None)
            await self._failpoints.reach("coordinator logged decision")
        elif was_fenced:
            states = await self._tell(work, False)
            await self._failpoints.reach("coordinator got all outcomes")
            state = await self._log_end(op.SETTLE, work.txid, YES in states.values())
        self._decided(work, state, refusal)
        await self._failpoints.reach("coordinator answered")
        if work.txid in self._machine.open:
            if not was_fenced:  # what the shards of a fenced one have said is what they have logged
                await self._tell(work, state == TxnState.COMMITTED)
            await self._failpoints.reach("coordinator got all acknowledgements")
            self._ended.append(work.txid)
            self._has_ended.set()
        else:
            self._close(work)

    def _decided(self, work: Work, state: TxnState, refusal: RaftKVError | None) -> None:
        work.state = state
        self.ended[state] += 1
        work.parts = []
        work.unvoted = {}
        self._size_bytes -= work.size_bytes
        work.size_bytes = 0
        waiters, work.waiters = work.waiters, []
        for waiter in waiters:
            _answer(waiter, state, refusal)

    def _refuse(self, work: Work, error: RaftKVError) -> None:
        waiters, work.waiters = work.waiters, []
        for session, request_id, _ in waiters:
            session.refuse(request_id, error)

    def _close(self, work: Work) -> None:
        if self._works.get(work.txid) is work:
            del self._works[work.txid]
            self._size_bytes -= work.size_bytes

    # ---- votes

    def _ask_for_votes(self, work: Work) -> Verdict:
        verdict: Verdict = self._loop.create_future()
        work.unvoted = {part[0]: part for part in work.parts}
        if work.unvoted:
            self._branch(work, self._vote(work, list(work.unvoted), verdict))
        else:
            verdict.set_result(Aborted("its content is not known any more"))
        return verdict

    async def _count_votes(self, work: Work, verdict: Verdict) -> RaftKVError | None:
        """None if all shards say yes; else why not."""
        try:
            async with asyncio.timeout(PREPARE_TIMEOUT_S):
                return await verdict
        except TimeoutError:
            groups = sorted(self._places.by_group(work.unvoted))
            which = f"group {groups[0]} has" if len(groups) == 1 else f"groups {', '.join(map(str, groups))} have"
            return Aborted(f"{which} not voted within {PREPARE_TIMEOUT_S:g} s")
        finally:
            self._end_branches(work)

    async def _vote(self, work: Work, shards: list[int], verdict: Verdict) -> None:
        """Ask the groups that have these shards, until they have voted; several at the same time."""
        left = work.unvoted
        backoff_s = BACKOFF_S_MIN
        while not verdict.done():
            (gid, mine), *others = self._places.by_group(shards).items()
            for _, theirs in others:
                self._branch(work, self._vote(work, theirs, verdict))
            shards = mine
            try:
                parts = [left[shard] for shard in shards]
                await self._ask(gid, [TXN_PREPARE, work.txid, self._gid, self.term, parts])
            except NO as error:
                if not verdict.done():
                    verdict.set_result(error)
                return
            except WrongGroup as error:
                if len(shards) > 1:  # it doesn't say which
                    for shard in shards[1:]:
                        self._branch(work, self._vote(work, [shard], verdict))
                    shards = shards[:1]
                    continue
                self._places.not_here(shards[0], gid, error.holder_gid)
            except (RaftKVError, OSError):
                pass  # it may have got the question: it is asked again, or hears the decision
            else:
                await self._failpoints.reach("coordinator got a vote")
                for shard in shards:
                    left.pop(shard, None)
                if not left and not verdict.done():
                    verdict.set_result(None)
                return
            backoff_s = await self._back_off(backoff_s, BACKOFF_S_MAX / 4)

    # ---- the word of a decision

    async def _tell(self, work: Work, commit: bool) -> dict[int, int]:
        """Until every shard has acknowledged it: how it ended there. A shard that was given up needs no word."""
        states: dict[int, int] = {}
        done: asyncio.Future[None] = self._loop.create_future()
        try:
            self._branch(work, self._tell_shards(work, list(work.shards), commit, states, done))
            await done
        finally:
            self._end_branches(work)
        return states

    async def _tell_shards(
        self, work: Work, shards: list[int], commit: bool, states: dict[int, int], done: asyncio.Future[None]
    ) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            (gid, mine), *others = self._places.by_group(shards).items()
            for _, theirs in others:
                self._branch(work, self._tell_shards(work, theirs, commit, states, done))
            heard = await self._tell_group(gid, work.txid, commit, mine)
            if heard:
                await self._failpoints.reach("coordinator got an acknowledgement")
            states.update(heard)
            if len(states) == len(work.shards) and not done.done():
                done.set_result(None)
            shards = [shard for shard in mine if shard not in states]
            if not shards:
                return
            backoff_s = await self._back_off(backoff_s, BACKOFF_S_MAX)

    async def _tell_group(self, gid: int, txid: bytes, commit: bool, shards: list[int]) -> dict[int, int]:
        """The states of those of the shards that the group serves, by shard; one attempt."""
        if self._places.given_up_ms > txid_ms(txid):
            return dict.fromkeys(shards, NOT_HERE)
        try:
            states = decode_decide_reply(await self._ask(gid, [TXN_DECIDE, txid, commit, shards]))
        except WrongGroup as error:
            self._places.not_here(shards[0], gid, error.holder_gid)
            for shard in shards[1:]:
                self._places.not_here(shard, gid)
            return {}
        except (RaftKVError, OSError):
            return {}
        for shard in shards:
            if states.get(shard, NOT_HERE) == NOT_HERE:
                self._places.not_here(shard, gid)
        return {shard: states[shard] for shard in shards if states.get(shard, NOT_HERE) != NOT_HERE}

    # ---- ends

    async def _log_ends(self) -> None:
        """As long as this replica leads: many at a time."""
        while True:
            await self._has_ended.wait()
            await asyncio.sleep(END_DELAY_S)
            ended, self._ended = self._ended, []
            self._has_ended.clear()
            await self._propose_surely([op.END, ended])
            for txid in ended:
                if txid in self._works:
                    self._close(self._works[txid])

    # ---- a new leader

    async def _take_over(self) -> None:
        """Go on with what the leaders before have left behind."""
        await self._propose_surely([op.TAKE_OVER])
        await self._failpoints.reach("coordinator took over")
        left = sorted(self._machine.open.items())
        if left:
            log.info("%s: takes over %d transactions", self._name, len(left))
        for txid, record in left:
            work = self._works[txid] = Work(txid, record.digest, record.shards, [], 0)
            self._start(self._drive(work, record.state), "take-over of a transaction")
        self._has_taken_over = True
        self.map_changed()
        await self._log_ends()

    async def _resolve_group(self, gid: int) -> None:
        """From its answer on, nothing that an earlier term has prepared can come to be there; what there is, is
        driven to its end."""
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                found = decode_resolve_reply(await self._ask(gid, [TXN_RESOLVE, self._gid, self.term]))
                break
            except (RaftKVError, OSError):
                longest_s = BACKOFF_S_MAX / 4 if self._places.is_member(gid) else DEPARTED_BACKOFF_S_MAX
                backoff_s = await self._back_off(backoff_s, longest_s)
        await self._failpoints.reach("coordinator resolved a group")
        if not found:
            return
        for txid, state in (await self._states_surely(list(found))).items():
            work = self._works.get(txid)
            if state != State.BEGUN and (work is None or not set(found[txid]) <= set(work.shards)):
                stray = Work(txid, b"", found[txid], [], 0)
                self._start(self._drive_stray(stray, state == State.COMMITTED), "stray transaction")

    async def _drive_stray(self, work: Work, commit: bool) -> None:
        """Where something is prepared that the record, if there is one, doesn't name."""
        await self._tell(work, commit)

    async def _answer_doubt(self, session: Session, request_id: int, txids: Sequence[bytes]) -> None:
        try:
            states = await self._states(txids)
        except RaftKVError as error:
            session.refuse(request_id, error)
        else:
            session.reply(request_id, [[txid, int(state)] for txid, state in states.items()])
        self._doubts -= 1

    async def _states_surely(self, txids: Sequence[bytes]) -> dict[bytes, State]:
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                return await self._states(txids)
            except RaftKVError:
                backoff_s = await self._back_off(backoff_s, BACKOFF_S_MAX)

    async def _states(self, txids: Sequence[bytes]) -> dict[bytes, State]:
        """What has become of each; of one without a record that nothing ever will. Raise what a proposal may."""
        assert self.replica is not None
        self.replica.check_readable()
        states: dict[bytes, State] = {}
        fences: dict[bytes, asyncio.Future[Any]] = {}
        for txid in txids:
            record = self._machine.record(self._store.engine, txid)
            if record is None:
                fences[txid] = submit(self.replica, [op.FENCE, txid, []])
            else:
                states[txid] = state_of(record)
        for txid, fence in fences.items():
            result = await fence
            if isinstance(result, RaftKVError):
                raise result
            raise_if_refused(result)
            states[txid] = _STATES[TxnState(result[1])]
        return states

    # ---- inside

    def _start(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._tasks.start(coroutine, name)
        self._running[task] = None
        running = self._running
        task.add_done_callback(lambda task: running.pop(task, None))
        return task

    def _branch(self, work: Work, coroutine: Coroutine[Any, Any, None]) -> None:
        work.branches.append(self._start(coroutine, "branch of a transaction"))

    def _end_branches(self, work: Work) -> None:
        branches, work.branches = work.branches, []
        for task in branches:
            task.cancel()

    async def _ask(self, gid: int, command: list[Any]) -> Any:
        """The answer of the group's leader to a TXN."""
        if gid == NO_GROUP:
            raise Busy("no group serves the shard")
        assert self._places.latest is not None
        async with self._asks.setdefault(gid, asyncio.Semaphore(ASKS_AT_ONCE)):
            body = [self._places.latest.num, msgpack.packb(command)]
            return await self._calls.ask(gid, self._places.addresses_of(gid), Verb.TXN, body)

    async def _propose(self, command: list[Any]) -> list[Any]:
        assert self.replica is not None
        return await propose(self.replica, command)

    async def _propose_surely(self, command: list[Any]) -> list[Any]:
        """Until it is applied, or this task ends with the term."""
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                return await self._propose(command)
            except RaftKVError as error:
                log.debug("%s: command %d: %s", self._name, command[0], error)
                backoff_s = await self._back_off(backoff_s, BACKOFF_S_MAX / 4)

    async def _log_end(self, command: int, txid: bytes, commit: bool) -> TxnState:
        """The state that is found when the decision is applied: the first one counts."""
        return TxnState((await self._propose_surely([command, txid, commit]))[1])

    async def _back_off(self, backoff_s: float, longest_s: float) -> float:
        """Wait, and say how long to wait the next time."""
        await asyncio.sleep(backoff_s * (0.5 + self._rng.random() / 2))
        return min(2 * backoff_s, longest_s)


_STATES = {
    TxnState.BEGUN: State.BEGUN,
    TxnState.COMMITTED: State.COMMITTED,
    TxnState.ABORTED: State.ABORTED,
    TxnState.FENCED: State.BEGUN,
}


def state_of(record: Record) -> State:
    """What those who ask are told of a record."""
    return _STATES[record.state]


def _state_found(result: Any) -> TxnState:
    """When a BEGIN was applied; raise what refused it."""
    if isinstance(result, RaftKVError):
        raise result
    raise_if_refused(result)
    return TxnState(result[1])


def _answer(waiter: Waiter, state: TxnState, refusal: RaftKVError | None) -> None:
    session, request_id, is_commit = waiter
    if is_commit and state != TxnState.COMMITTED:
        session.refuse(request_id, _reason(refusal))
    else:
        session.reply(request_id, [int(_STATES[state])])


def _reason(refusal: RaftKVError | None) -> RaftKVError:
    """Why a transaction was aborted; that is certain, however old a group found it."""
    if refusal is None:
        return Aborted("it was given up, or a leader of the coordinators was replaced")
    return Aborted(str(refusal)) if isinstance(refusal, Expired) else refusal


def _check_txid(txid: bytes) -> None:
    if not is_txid(txid):
        raise BadRequest("the transaction id is not 16 bytes that begin with a time")


def _check_shards(shards: Sequence[int], shard_map: ShardMap) -> None:
    for shard in shards:
        if shard >= shard_map.shards:
            raise BadShard(shard, shard_map.shards)
