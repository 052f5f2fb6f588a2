"""Safety rules of moving shards, each with a way to switch it off; see `ablations`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from raftkv.daemons.migration import Migrations
from raftkv.machines import exports
from raftkv.machines import moves as op
from raftkv.machines.exports import Exports
from raftkv.machines.imports import Imports, _write
from raftkv.machines.kv import MAP_TIME, KvMachine
from raftkv.machines.results import OK, Result
from raftkv.machines.rows import KIND_SESSION, export_key, meta_key, prefix_end
from raftkv.machines.shard_states import ShardEvent, ShardState, next_state
from raftkv.machines.shards import Shard, Shards
from raftkv.protocol.errors import RaftKVError
from raftkv.protocol.migration import ShardBody, ShardOp
from raftkv.sim.scenario import Scenario
from tests.sim.ablations import NOT_LINEARIZABLE, Ablation, scenario

# ---- what moves


def sessions_not_moved(patch: pytest.MonkeyPatch) -> None:
    """Neither a page of the copy nor one of the changes has a session's row."""
    pull, changes = Exports.pull, Exports.changes

    def without(rows: list[Any]) -> list[Any]:
        return [row for row in rows if row[0][:1] != KIND_SESSION]

    def pull_without(self: Exports, *args: Any) -> Any:
        rows, cursor = pull(self, *args)
        return without(rows), cursor

    def changes_without(self: Exports, *args: Any) -> Any:
        rows, cursor = changes(self, *args)
        return without(rows), cursor

    patch.setattr(Exports, "pull", pull_without)
    patch.setattr(Exports, "changes", changes_without)


def revision_counter_not_moved(patch: pytest.MonkeyPatch) -> None:
    """The new owner counts from nought; what was copied keeps the versions that it had."""
    install = Imports.install

    def install_without(self: Imports, view: Any, command: Any) -> Result:
        return install(self, view, [*command[:7], 0, *command[8:]])

    patch.setattr(Imports, "install", install_without)


def delta_without_deletes(patch: pytest.MonkeyPatch) -> None:
    """The changes are the rows that were written; those that went are passed over."""
    changes = Exports.changes

    def rows_that_are(self: Exports, *args: Any) -> Any:
        rows, cursor = changes(self, *args)
        return [row for row in rows if row[1] is not None], cursor

    patch.setattr(Exports, "changes", rows_that_are)


def delta_from_a_later_base(patch: pytest.MonkeyPatch) -> None:
    """The next pass begins where the last page of this one was read, not where the first one was."""
    small_pages(patch)
    chunk = Imports.chunk

    def chunk_forgetting(self: Imports, view: Any, command: Any) -> Result:
        number = command[1]
        known = self.progress.get(number)
        if known is not None:
            self.progress[number] = known._replace(next_since=0)
        result = chunk(self, view, command)
        if known is not None and not result[1]:
            self.progress[number] = known
        return result

    patch.setattr(Imports, "chunk", chunk_forgetting)


def small_pages(patch: pytest.MonkeyPatch) -> None:
    """The copy of a shard of a few rows takes several pages, as that of a large one does."""
    patch.setattr(exports, "PAGE_ROWS_MAX", 3)


def touched_keys_not_noted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Exports, "note_changes", lambda self, view, index: None)


# ---- who serves


def old_owner_serves_on(patch: pytest.MonkeyPatch) -> None:
    """Until it is released the source reads and writes a shard that it has frozen: before the log, and at apply."""
    served_while_frozen(patch)
    execute, scan = KvMachine._execute_once, KvMachine.scan

    def execute_any(self: KvMachine, view: Any, command: Any) -> Result:
        with _served(self, command[1], ShardState.EXPORTING):
            return execute(self, view, command)

    def scan_any(self: KvMachine, engine: Any, shard: int, *args: Any) -> Any:
        with _served(self, shard, ShardState.EXPORTING):
            return scan(self, engine, shard, *args)

    patch.setattr(KvMachine, "_execute_once", execute_any)
    patch.setattr(KvMachine, "scan", scan_any)


def served_while_frozen(patch: pytest.MonkeyPatch) -> None:
    """The source answers reads until it is released; writes are still refused at apply."""
    serves, get = KvMachine.serves, KvMachine.get

    def serves_frozen(self: KvMachine, shard: int) -> bool:
        with _served(self, shard, ShardState.EXPORTING):
            return serves(self, shard)

    def get_of_any(self: KvMachine, engine: Any, shard: int, key: bytes) -> Any:
        with _served(self, shard, ShardState.EXPORTING):
            return get(self, engine, shard, key)

    patch.setattr(KvMachine, "serves", serves_frozen)
    patch.setattr(KvMachine, "get", get_of_any)


def read_while_imported(patch: pytest.MonkeyPatch) -> None:
    """The new owner answers reads from what it has copied so far."""
    get = KvMachine.get

    def get_of_any(self: KvMachine, engine: Any, shard: int, key: bytes) -> Any:
        with _served(self, shard, ShardState.IMPORTING):
            return get(self, engine, shard, key)

    patch.setattr(KvMachine, "get", get_of_any)


@contextmanager
def _served(machine: KvMachine, number: int, state: ShardState) -> Iterator[None]:
    """Meanwhile the shard counts as served, if it is here in that state."""
    shard = machine._shards.here.get(number)
    if shard is None or shard.state is not state:
        yield
        return
    machine._serving[number] = shard
    try:
        yield
    finally:
        del machine._serving[number]


def installed_without_a_freeze(patch: pytest.MonkeyPatch) -> None:
    """The importer doesn't ask, and the source gives its counters all the same."""
    ask = Migrations._ask

    async def ask_but_for_ask(self: Migrations, gid: int, body: ShardBody) -> Any:
        return [0] if body.op == ShardOp.ASK else await ask(self, gid, body)

    def counters(self: Exports, number: int) -> list[Any]:
        shard = self._shards.here[number]
        return [shard.revision, shard.last_delete_revision, shard.stamp_floor_ms]

    patch.setattr(Migrations, "_ask", ask_but_for_ask)
    patch.setattr(Exports, "counters", counters)


def served_by_the_configuration_alone(patch: pytest.MonkeyPatch) -> None:
    """The new owner serves at once, with whatever it has."""
    take = Shards.take_config

    def take_and_serve(self: Shards, view: Any, config: Any, encoded: bytes) -> list[int]:
        take(self, view, config, encoded)
        return [number for number in config.shards_of(self.gid) if number not in self.here]

    patch.setattr(Shards, "take_config", take_and_serve)


# ---- what happens twice, early or late


def install_not_idempotent(patch: pytest.MonkeyPatch) -> None:
    """An install that is logged twice is carried out twice: the progress that the first one has ended and the number
    of its chunk, which both make it stale, aren't looked at; that the shard is here by this very attempt is enough.
    """
    install = KvMachine._install

    def install_again(self: KvMachine, view: Any, command: Any) -> Result:
        result = install(self, view, command)
        _, number, config_num, attempt, _, _, rows, revision, last_delete, floor_ms, _ = command
        shard = self._serving.get(number)
        if result[1] or shard is None or shard.incarnation != (config_num, attempt):
            return result
        _write(view, shard, rows)
        shard.revision, shard.last_delete_revision, shard.stamp_floor_ms = revision, last_delete, floor_ms
        self._shards.counted(shard)
        _forget_cached_sessions(self)
        return [OK, True]

    patch.setattr(KvMachine, "_install", install_again)


def release_before_the_install_is_durable(patch: pytest.MonkeyPatch) -> None:
    """The source is told to release the shard as soon as the install is on its way to this group's log."""
    propose = Migrations._propose

    async def propose_and_release(self: Migrations, *command: Any) -> None:
        if command[0] != op.IMPORT_INSTALL:
            await propose(self, *command)
            return
        number, config_num = command[1], command[2]
        under_way = self._machine.import_of(number)
        assert under_way is not None
        body = ShardBody(ShardOp.RELEASE, number, self._gid, config_num)
        releasing = asyncio.get_running_loop().create_task(self._ask(under_way[1].source_gid, body))
        try:
            await propose(self, *command)
        finally:
            try:
                await releasing
            except RaftKVError:
                pass  # it is released in the end, as always

    patch.setattr(Migrations, "_propose", propose_and_release)


def late_release_obeyed(patch: pytest.MonkeyPatch) -> None:
    """A release takes away the shard that is here, whichever group and configuration it was frozen for: also one that
    has come back, and is served again. The table of states would refuse that too; so it goes as if given up."""
    release = Exports.release

    def release_any(self: Exports, view: Any, command: Any) -> Result:
        number = command[1]
        shard = self._shards.here.get(number)
        if shard is None or shard.state is ShardState.IMPORTING:
            return release(self, view, command)
        if self.lists.pop(number, None) is not None:
            del self._by_prefix[shard.prefix]
            view.delete(export_key(number))
        served = shard.state is ShardState.SERVING
        self._shards.leave(view, shard, ShardEvent.GIVEN_UP if served else ShardEvent.RELEASED)
        return [OK, True]

    patch.setattr(Exports, "release", release_any)


TO_DELETE = b"gd"
"""Prefix of rows that only `deleted_later` has: the prefix of a shard that has left, to be deleted yet."""
DELETED_AFTER_S = 0.3
SHARD_BYTES = 3
"""Of a prefix: what stands before the incarnation."""


def deleted_later(patch: pytest.MonkeyPatch, *, prefix_bytes: int | None = None) -> None:
    """The rows of a shard that leaves go by a later entry, which the leader proposes in the background.

    Not a rule: as it is, they go in the entry with which the shard leaves, when no other incarnation can be here. In a
    program that deletes later the incarnation is what makes it safe, and this one is built so that it could."""
    execute, applied = KvMachine._execute_system, Migrations.applied

    def leave(self: Shards, view: Any, shard: Shard, event: ShardEvent) -> None:
        assert next_state(shard.state, event) is ShardState.ABSENT
        self.serving.pop(shard.number, None)
        view.delete(meta_key(shard.number))
        view.put(TO_DELETE + shard.prefix, b"")
        self._counted.pop(shard.number, None)
        del self.here[shard.number]
        self.changes += 1

    def execute_and_delete(self: KvMachine, view: Any, command: Any) -> Result:
        if command[0] == MAP_TIME:
            for key in [key for key, _ in view.scan(TO_DELETE, prefix_end(TO_DELETE))]:
                prefix = key[len(TO_DELETE) :][:prefix_bytes]
                view.delete_range(prefix, prefix_end(prefix))
                view.delete(key)
                _forget_cached_sessions(self)
        return execute(self, view, command)

    def applied_and_deletes(self: Migrations) -> None:
        applied(self)
        engine = self._store.engine
        is_due = next(engine.scan(TO_DELETE, prefix_end(TO_DELETE)), None) is not None
        if is_due and self._running and not getattr(self, "deleting", False):
            self.deleting = True  # type: ignore[attr-defined]
            self._tasks.start(delete(self), "delete")

    async def delete(self: Migrations) -> None:
        try:
            await asyncio.sleep(DELETED_AFTER_S)
            await self._propose(MAP_TIME, 0)
        except RaftKVError:
            pass
        finally:
            self.deleting = False  # type: ignore[attr-defined]

    patch.setattr(Shards, "leave", leave)
    patch.setattr(KvMachine, "_execute_system", execute_and_delete)
    patch.setattr(Migrations, "applied", applied_and_deletes)


def range_delete_without_incarnation(patch: pytest.MonkeyPatch) -> None:
    """What is deleted late is all of the shard, whichever incarnation of it is here by then."""
    deleted_later(patch, prefix_bytes=SHARD_BYTES)


def _forget_cached_sessions(machine: KvMachine) -> None:
    """The rows were changed behind the cache's back."""
    assert not machine._sessions._changed
    machine._sessions._young.clear()
    machine._sessions._old.clear()


MAP = {"join": 6.0, "leave": 4.0, "move": 12.0}
DELETING = {"get": 40, "put": 20, "append": 20, "delete": 20, "cas": 10, "put_if": 10}


def moving(name: str, faults: dict[str, float], *, shards: int = 6, **settings: Any) -> Scenario:
    settings = {"nemesis": {"every_s": [0.3, 0.9]}, **settings}
    return scenario(name, MAP | faults, cluster={"groups": 3, "shards": shards}, **settings)


MOVES = moving("moves", {})
DEPOSED = moving("moves and new leaders", {"transfer": 8, "kill_leader": 6, "isolate_leader": 4, "pause": 4})
HANDOVER = moving(
    "leaders die at handovers",
    {"kill_at_handover": 3, "move": 20, "join": 1, "leave": 0.5},
    shards=3,
    workload={"clients": 8, "workers": 6, "keys": 48, "think_s": 0.1},
    network={"latency_ms": [3, 8]},
    nemesis={"every_s": [0.2, 0.4], "at_once": 6},
)
SLOW = moving(
    "moves and slow disks",
    {"slow_disk": 24},
    workload={"clients": 8, "follower_reads": 0.0},
    nemesis={"every_s": [0.2, 0.4], "at_once": 8},
)
LATE = moving("moves and late releases", {"late_release": 6})

MOVE_ABLATIONS: dict[str, Ablation] = {
    "sessions not moved": Ablation(
        sessions_not_moved, moving("moves and lost answers", {"reset": 10, "clog": 3}), NOT_LINEARIZABLE
    ),
    "revision counter not moved": Ablation(
        revision_counter_not_moved, MOVES, ("RevisionNeverFalls", *NOT_LINEARIZABLE)
    ),
    "old owner serves on": Ablation(old_owner_serves_on, MOVES, NOT_LINEARIZABLE),
    "delta without deletes": Ablation(
        delta_without_deletes, moving("moves and deletes", {}, workload={"mix": DELETING}), NOT_LINEARIZABLE
    ),
    "delta from a later base": Ablation(delta_from_a_later_base, MOVES, NOT_LINEARIZABLE, beside=small_pages),
    "install not idempotent": Ablation(install_not_idempotent, HANDOVER, ("RevisionNeverFalls", *NOT_LINEARIZABLE)),
    "release before the install is durable": Ablation(
        release_before_the_install_is_durable, DEPOSED, ("NoShardIsLost",)
    ),
    "late release obeyed": Ablation(late_release_obeyed, LATE, ("NoShardIsLost",)),
    "range delete without incarnation": Ablation(
        range_delete_without_incarnation, MOVES, NOT_LINEARIZABLE, beside=deleted_later
    ),
    "a frozen shard is read": Ablation(served_while_frozen, SLOW, NOT_LINEARIZABLE),
    "a shard is read while it is imported": Ablation(read_while_imported, MOVES, NOT_LINEARIZABLE),
    "a shard is installed though its source has not frozen it": Ablation(
        installed_without_a_freeze, MOVES, ("OneGroupServesAShard",)
    ),
    "what is touched during a copy is not noted": Ablation(touched_keys_not_noted, MOVES, NOT_LINEARIZABLE),
    "a new owner serves by the configuration alone": Ablation(
        served_by_the_configuration_alone, MOVES, ("OneGroupServesAShard",)
    ),
}
