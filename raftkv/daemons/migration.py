"""How shards arrive: the leader of the group that gets them copies them, asks for them, and has them released.

All that counts is in the logs of the two groups (machines/imports.py, machines/exports.py). What is done next is read
from the machine at every step, so another leader simply goes on. An errand that meets an error waits and begins its
step again: nothing that another group says or doesn't say can end this daemon, or hold up the shards of a third one.
It must never install what wasn't read from a frozen shard, nor give up an ask without the holder's word.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

from raftkv.daemons.group_calls import GroupCalls, named_client
from raftkv.daemons.histogram import LONG_BOUNDS_S, Histogram
from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.proposals import propose
from raftkv.daemons.replica import Replica
from raftkv.daemons.tasks import Tasks
from raftkv.machines import moves as op
from raftkv.machines.kv import KvMachine
from raftkv.machines.rows import ImportProgress, Incarnation
from raftkv.machines.shard_states import ShardState
from raftkv.protocol.errors import ListLost, NotHolder, RaftKVError, Superseded, Unavailable
from raftkv.protocol.messages import Verb
from raftkv.protocol.migration import (
    ShardBody,
    ShardOp,
    ShardPage,
    decode_list_reply,
    decode_page_reply,
    encode_shard_body,
)
from raftkv.storage.engine import StorageEngine
from raftkv.storage.store import Store

log = logging.getLogger(__name__)

IMPORTS_AT_ONCE = 4
"""Shards that are copied from one group at the same time; the others wait their turn."""
PASSES_MAX = 8
"""Rounds of changes, after which the ask is made however much is still being written."""
SMALL_ROWS = 1_000
SMALL_BYTES = 256 * 1024
"""A pass of no more than this: what follows it will be as small, and is what clients have to wait for."""
LIST_AGAIN_S = 120.0
"""How often the source is told that its list is still wanted; it keeps one for ten minutes."""
BACKOFF_S_MIN = 0.05
BACKOFF_S_MAX = 1.0
THROTTLE_S_MIN = 0.02
"""A debt of less time than this isn't waited for."""
THROTTLED_S = 1.0
"""So long after such a wait a copy counts as throttled: in between, it copies a few pages."""
CLOCK_STEP_S = 0.001
"""The loop's clock may stand still as long as this: uvloop reads it once a turn, in whole milliseconds."""
REST_S_MAX = 0.1
"""After a page of the first pass this group's imports rest for as long as it took, and longer by as much as it took
longer than the quickest one so far: so they notice that clients, or other imports, need the processors and disks.
Later passes don't rest: they race with those who write."""
FULL_BYTES = 32 * 1024
"""A smaller page says nothing about the quickest."""


class Errand:
    """One shard on its way, or one release: what isn't worth logging about it.

    `waits_for` is one line for people: why it can't go on. `in_line`: its source has no slot for it yet; it was held
    back by the throttle until `throttled_s`. `attempt` is the number of the next attempt; `frozen` the list for which
    the holder has said, to this leader, that the shard is frozen; `is_small` what is known of the last pass.
    """

    __slots__ = (
        "attempt",
        "backoff_s",
        "began_s",
        "frozen",
        "in_line",
        "is_small",
        "listed_s",
        "rows",
        "size_bytes",
        "throttled_s",
        "waits_for",
    )

    def __init__(self, now: float) -> None:
        self.began_s = now
        self.waits_for: str | None = None
        self.in_line = False
        self.throttled_s = float("-inf")
        self.backoff_s = BACKOFF_S_MIN
        self.attempt = 1
        self.listed_s = float("-inf")
        self.frozen = 0
        self.is_small = False
        self.rows = 0
        self.size_bytes = 0


class Migrations:
    """Runs while its replica leads, from `start` to `stop`."""

    def __init__(
        self, options: DaemonOptions, store: Store, machine: KvMachine, tasks: Tasks, rng: random.Random
    ) -> None:
        self._name = options.name
        self._gid = options.gid
        self._bytes_per_s = options.move_bytes_per_s
        self._store = store
        self._machine = machine
        self._tasks = tasks
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._calls = GroupCalls(named_client(options, store), ssl=options.client_ssl)
        self.replica: Replica | None = None
        self._seen = -1
        self._running = False
        self._imports: dict[int, tuple[Errand, asyncio.Task[None]]] = {}
        self._releases: dict[tuple[int, int], tuple[Errand, asyncio.Task[None]]] = {}
        self._slots: dict[int, asyncio.Semaphore] = {}
        self._paid_until_s = 0.0
        self._copying = asyncio.Lock()
        self._quickest_s = float("inf")
        self.copied_bytes = 0
        """Keys and values that have arrived, all passes counted."""
        self.durations_s = Histogram(LONG_BOUNDS_S)
        """Of the shards that have arrived, from the first question on; of those that this leader has seen begin."""

    def start(self) -> None:
        self._running = True
        self._seen = -1
        self.applied()

    def stop(self) -> None:
        self._running = False
        for _, task in [*self._imports.values(), *self._releases.values()]:
            task.cancel()
        self._imports.clear()
        self._releases.clear()
        self._slots.clear()
        self._calls.close()

    def applied(self) -> None:
        """Something was applied: begin what is to be done and isn't being done yet."""
        machine = self._machine
        if not self._running or machine.changes == self._seen:
            return
        self._seen = machine.changes
        now = self._loop.time()
        for shard in sorted({*machine.importing(), *machine.awaited_shards()}):
            if shard not in self._imports and self._is_wanted(shard):
                errand = Errand(now)
                self._imports[shard] = errand, self._tasks.start(self._import(shard, errand), f"import shard {shard}")
        for shard, config_num, gid in machine.releases():
            if (shard, config_num) not in self._releases:
                errand = Errand(now)
                task = self._tasks.start(self._release(shard, config_num, gid, errand), f"release shard {shard}")
                self._releases[shard, config_num] = errand, task

    def status(self) -> list[dict[str, Any]]:
        """What is on its way to this group, and what it waits for; empty at a replica that doesn't lead.

        `waits_for` is why it can't go on, `slowed_by` why it is in no hurry: nothing is wrong then. Either may be None.
        """
        found = []
        now = self._loop.time()
        going_on = {
            self._machine.holder(shard)
            for shard, (errand, _) in self._imports.items()
            if not errand.in_line and errand.waits_for is None
        }
        for shard, (errand, _) in sorted(self._imports.items()):
            source_gid = self._machine.holder(shard)
            # what kept it last time is over when others from there go on
            waits_for = None if errand.in_line and source_gid in going_on else errand.waits_for
            under_way = self._machine.import_of(shard)
            progress = None if under_way is None else under_way[1]
            config_num = self._machine.owned_since(shard) if under_way is None else under_way[0].config_num
            found.append(
                {
                    "shard": shard,
                    "from": source_gid,
                    "to": self._gid,
                    "config_num": config_num,
                    "state": self._machine.state(shard).name.lower(),
                    "phase": _phase(progress),
                    "bytes": 0 if progress is None else progress.size_bytes,
                    "age_s": round(now - errand.began_s, 3),
                    "waits_for": waits_for,
                    "slowed_by": self._slowed_by(errand, source_gid, now) if waits_for is None else None,
                }
            )
        for (shard, config_num), (errand, _) in sorted(self._releases.items()):
            found.append(
                {
                    "shard": shard,
                    "from": self._machine.release_source(shard, config_num),
                    "to": self._gid,
                    "config_num": config_num,
                    "state": self._machine.state(shard).name.lower(),
                    "phase": "release",
                    "bytes": 0,
                    "age_s": round(now - errand.began_s, 3),
                    "waits_for": errand.waits_for,
                    "slowed_by": None,
                }
            )
        return found

    def _slowed_by(self, errand: Errand, source_gid: int, now: float) -> str | None:
        if errand.in_line:
            return f"its turn: {IMPORTS_AT_ONCE} shards are copied from group {source_gid} at the same time"
        if now < errand.throttled_s + THROTTLED_S:
            return f"throttled to {self._bytes_per_s / 1e6:.3g} MB/s (--move-bytes-per-s)"
        return None

    # ---- one shard

    def _is_wanted(self, shard: int) -> bool:
        """A shard that is still on its way from here isn't: it comes back when it has arrived there."""
        machine = self._machine
        if machine.import_of(shard) is not None:
            return True
        return machine.owns(shard) and machine.state(shard) is ShardState.ABSENT

    async def _import(self, shard: int, errand: Errand) -> None:
        while self._is_wanted(shard):
            slots = self._slots.setdefault(self._machine.holder(shard), asyncio.Semaphore(IMPORTS_AT_ONCE))
            errand.in_line = slots.locked()
            async with slots:
                errand.in_line = False
                try:
                    while self._is_wanted(shard):
                        await self._step(shard, errand)
                        errand.waits_for = None
                        errand.backoff_s = BACKOFF_S_MIN
                except (RaftKVError, OSError) as error:
                    errand.waits_for = str(error)
            if self._is_wanted(shard):
                await self._back_off(errand)
        if self._imports.get(shard, (None,))[0] is errand:
            del self._imports[shard]

    async def _step(self, shard: int, errand: Errand) -> None:
        """The next thing to do, by what is logged; it changes what is logged, or raises."""
        under_way = self._machine.import_of(shard)
        if under_way is None:
            await self._begin(shard, errand)
            return
        incarnation, progress = under_way
        if progress.asked:
            await self._finish(shard, incarnation, progress, errand)
        elif progress.passes and not progress.next_since and (errand.is_small or progress.passes > PASSES_MAX):
            await self._propose(op.IMPORT_ASK, shard, *incarnation, progress.list_id)
        else:
            await self._copy(shard, incarnation, progress, errand)

    async def _begin(self, shard: int, errand: Errand) -> None:
        """Look for the holder, backwards through the owners, and have it keep a list from now on.

        An owner that doesn't answer may never have had the shard: an earlier one has it then, and says so.
        """
        machine = self._machine
        config_num = machine.owned_since(shard)
        owners = machine.past_owners(self._engine(), shard)
        silence: Unavailable | None = None
        while (gid := next(owners, None)) is not None:
            body = ShardBody(ShardOp.LIST, shard, self._gid, config_num, errand.attempt)
            try:
                list_id = decode_list_reply(await self._ask(gid, body))
            except NotHolder:
                self._engine()
                continue
            except Unavailable as error:
                silence = silence or error
                self._engine()
                continue
            except ListLost as error:
                errand.attempt = error.attempt + 1
                return
            errand.listed_s = self._loop.time()
            log.info("%s: copies shard %d from group %d (configuration %d)", self._name, shard, gid, config_num)
            await self._propose(op.IMPORT_START, shard, config_num, errand.attempt, gid, list_id)
            return
        if silence is not None:
            raise silence
        raise Unavailable(f"no group that ever owned shard {shard} has it; one of them is about to pass it on")

    async def _copy(self, shard: int, incarnation: Incarnation, progress: ImportProgress, errand: Errand) -> None:
        """One page of the copy, or of the changes since."""
        if progress.passes:
            size_bytes = await self._copy_page(shard, incarnation, progress, errand)
        else:
            async with self._copying:
                began_s = self._loop.time()
                size_bytes = await self._copy_page(shard, incarnation, progress, errand)
                await self._rest(self._loop.time() - began_s, size_bytes)
        await self._throttle(size_bytes, errand)

    async def _copy_page(self, shard: int, incarnation: Incarnation, progress: ImportProgress, errand: Errand) -> int:
        """Its size in bytes."""
        try:
            if self._loop.time() - errand.listed_s > LIST_AGAIN_S:
                await self._ask(progress.source_gid, ShardBody(ShardOp.LIST, shard, self._gid, *incarnation))
                errand.listed_s = self._loop.time()
            page = await self._page(shard, incarnation, progress)
        except ListLost:
            await self._drop(shard, incarnation, progress, errand)
            return 0
        if not progress.next_since:
            errand.rows = errand.size_bytes = 0
        errand.rows += len(page.rows)
        size_bytes = sum(len(suffix) + len(row or b"") for suffix, row in page.rows)
        errand.size_bytes += size_bytes
        self.copied_bytes += size_bytes
        await self._chunk(shard, incarnation, progress, page)
        if page.cursor is None:
            errand.is_small = errand.rows <= SMALL_ROWS and errand.size_bytes <= SMALL_BYTES
        return size_bytes

    async def _finish(self, shard: int, incarnation: Incarnation, progress: ImportProgress, errand: Errand) -> None:
        """The ask is logged: have the shard frozen, and take what has changed until then."""
        source_gid, list_id = progress.source_gid, progress.list_id
        if errand.frozen != list_id:
            body = ShardBody(ShardOp.ASK, shard, self._gid, *incarnation, list_id, progress.since)
            try:
                await self._ask(source_gid, body)
            except (Superseded, ListLost):
                await self._drop(shard, incarnation, progress, errand)
                return
            errand.frozen = list_id
        try:
            page = await self._page(shard, incarnation, progress)
        except RaftKVError:
            errand.frozen = 0  # ask again: it may be repeated
            raise
        if page.final is None:
            errand.frozen = 0
            raise Unavailable(f"group {source_gid} has not frozen shard {shard}")
        if page.cursor is not None:
            await self._chunk(shard, incarnation, progress, page)
            return
        revision, last_delete_revision, floor_ms, map_time_ms = page.final
        await self._propose(
            op.IMPORT_INSTALL, shard, *incarnation, list_id, progress.chunks, page.rows, revision,
            last_delete_revision, floor_ms, map_time_ms,
        )  # fmt: skip
        took_s = self._loop.time() - errand.began_s
        self.durations_s.observe(took_s)
        log.info("%s: shard %d has arrived from group %d after %.1f s", self._name, shard, source_gid, took_s)

    async def _drop(self, shard: int, incarnation: Incarnation, progress: ImportProgress, errand: Errand) -> None:
        """This attempt is over, by the holder's word."""
        errand.attempt = incarnation.attempt + 1
        errand.is_small = False
        log.info("%s: the copy of shard %d from group %d ends", self._name, shard, progress.source_gid)
        await self._propose(op.IMPORT_DROP, shard, *incarnation, progress.list_id)

    async def _page(self, shard: int, incarnation: Incarnation, progress: ImportProgress) -> ShardPage:
        whole = not progress.passes
        body = ShardBody(
            ShardOp.PULL if whole else ShardOp.CHANGES, shard, self._gid, *incarnation, progress.list_id,
            progress.since, progress.cursor,
        )  # fmt: skip
        return decode_page_reply(await self._ask(progress.source_gid, body))

    async def _chunk(self, shard: int, incarnation: Incarnation, progress: ImportProgress, page: ShardPage) -> None:
        await self._propose(
            op.IMPORT_CHUNK,
            shard,
            *incarnation,
            progress.list_id,
            progress.chunks,
            page.rows,
            page.cursor,
            page.read_index,
        )

    # ---- one release

    async def _release(self, shard: int, config_num: int, gid: int, errand: Errand) -> None:
        """Until it is acknowledged: the source still keeps what has arrived here."""
        while True:
            try:
                await self._ask(gid, ShardBody(ShardOp.RELEASE, shard, self._gid, config_num))
                await self._propose(op.IMPORT_RELEASED, shard, config_num)
                break
            except (RaftKVError, OSError) as error:
                errand.waits_for = str(error)
            await self._back_off(errand)
        if self._releases.get((shard, config_num), (None,))[0] is errand:
            del self._releases[shard, config_num]

    # ---- inside

    async def _ask(self, gid: int, body: ShardBody) -> Any:
        addresses = self._machine.addresses_of(self._engine(), gid)
        return await self._calls.ask(gid, addresses, Verb.SHARD, encode_shard_body(body))

    def _engine(self) -> StorageEngine:
        """With all that the machine knows; raise Busy while it stalls."""
        assert self.replica is not None
        self.replica.check_readable()
        return self._store.engine

    async def _propose(self, *command: Any) -> None:
        assert self.replica is not None
        await propose(self.replica, list(command))

    async def _back_off(self, errand: Errand) -> None:
        await asyncio.sleep(errand.backoff_s * (0.5 + self._rng.random() / 2))
        errand.backoff_s = min(2 * errand.backoff_s, BACKOFF_S_MAX)

    async def _rest(self, took_s: float, size_bytes: int) -> None:
        """After a page of the first pass."""
        if size_bytes >= FULL_BYTES:
            self._quickest_s = min(self._quickest_s, took_s)
        await asyncio.sleep(rest_s(took_s, self._quickest_s))

    async def _throttle(self, size_bytes: int, errand: Errand) -> None:
        """Keep all imports together below the rate."""
        now = self._loop.time()
        self._paid_until_s = max(now, self._paid_until_s) + size_bytes / self._bytes_per_s
        if self._paid_until_s - now > THROTTLE_S_MIN:
            errand.throttled_s = self._paid_until_s
            await asyncio.sleep(self._paid_until_s - now)


def rest_s(took_s: float, quickest_s: float) -> float:
    """How long to rest after a page that took `took_s`; what the loop's clock can't tell from nothing is 0."""
    slowness = max(1.0, took_s / max(quickest_s, CLOCK_STEP_S))
    return min(took_s * slowness, REST_S_MAX)


def _phase(progress: ImportProgress | None) -> str:
    if progress is None:
        return "search"
    if progress.asked:
        return "handover"
    return "changes" if progress.passes else "copy"
