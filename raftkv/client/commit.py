"""The end of one transaction: which way its commit goes, and what became of it when the answer was lost.

A transaction whose shards are all at one group is one request to that group; any other one goes to the coordinators. A
commit may be repeated on the way it took, as often as it must. It takes the other one only after an answer that is
certain for *every* attempt so far; otherwise the coordinators resolve it. Whatever this module raises but
CommitUnknown means that nothing was written and nothing will be.
"""

from __future__ import annotations

import asyncio
from typing import Any

from raftkv.client.calls import Route
from raftkv.client.cluster import Cluster, bad_reply, result_of
from raftkv.client.retry import Call
from raftkv.client.txn_status import coordinators_of, resolve_at
from raftkv.machines.txn_commands import TXN_COMMIT
from raftkv.protocol.errors import (
    Aborted,
    CommitUnknown,
    Expired,
    Malformed,
    OutcomeUnknown,
    RaftKVError,
    TooOld,
    Unavailable,
    WrongGroup,
)
from raftkv.protocol.frames import encode_body
from raftkv.protocol.messages import Verb
from raftkv.protocol.transactions import CoordinateOp, State, decode_state_reply

RESOLVE_SHARE = 0.25
"""Of the time for a commit, this much is left for asking what became of it."""


class _SeveralGroups(Exception):
    """The shards are not, or not yet, at one group; and it is certain that nothing was committed at any."""


class Commit:
    """One commit of `parts`, as `txn_commands` has them. `run` is called once."""

    def __init__(self, cluster: Cluster, txid: bytes, parts: list[list[Any]], timeout_s: float) -> None:
        self._cluster = cluster
        self._txid = txid
        self._parts = parts
        self._shards = [part[0] for part in parts]
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        commit_s = timeout_s * (1 - RESOLVE_SHARE) if cluster.router.coordinator_gids else timeout_s
        name = f"commit of transaction {txid.hex()}"
        self._call = cluster.caller.call(name, None, is_write=True, timeout_s=commit_s)
        self._coordinators: int | None = None  # the gid, once it has gone to them
        self._is_resolved = False

    @property
    def may_have_applied(self) -> bool:
        """Whether nobody may say yet that it is not committed, and never will be."""
        return self._call.may_have_applied and not self._is_resolved

    async def run(self) -> None:
        """Return when it is committed. Raise Conflict, Aborted; CommitUnknown; Timeout and others."""
        with self._cluster.unsettled(self._call):
            try:
                try:
                    await self._at_one_group()
                except _SeveralGroups:
                    self._coordinators = await self._find_coordinators()
                    await self._at_coordinators()
            except Expired as error:  # certainly: it would be OutcomeUnknown if an earlier attempt might have applied
                raise TooOld(error.reason) from None
            except OutcomeUnknown as error:
                await self._resolve(error.request.removeprefix(f"{self._call.what} (").removesuffix(")"))

    # ---- one group

    async def _at_one_group(self) -> None:
        encoded = encode_body([TXN_COMMIT, self._txid, self._parts])
        body = lambda route: [route.config_num, encoded]  # noqa: E731
        await self._cluster.caller.ask(self._call, self._home, Verb.TXN, body, result_of(list))

    async def _home(self, call: Call) -> Route:
        """Before each attempt: the group that has all shards. Raise _SeveralGroups if that is over."""
        refused_by = call.asked_gid if type(call.last_error) is WrongGroup else None
        route = await self._cluster.router.common_route(call, self._shards)
        if route is None:
            if call.unknown:
                raise call.judge_final(Unavailable("its shards are not at one group any more"))
            raise _SeveralGroups
        on_its_way = refused_by == route.replicas.gid and len(self._shards) > 1
        if on_its_way and not call.unknown and self._cluster.router.coordinator_gids:
            raise _SeveralGroups  # they follow each shard by itself
        return route

    # ---- the coordinators

    async def _find_coordinators(self) -> int:
        gids = await self._cluster.router.find_coordinators(self._call)
        if not gids:
            raise Unavailable(
                f"{self._call.what}: its keys are at several groups, and no coordinator is registered; nothing was "
                "written; start some with `raftkv coordinator`"
            )
        return coordinators_of(self._txid, gids)

    async def _coordinators_route(self, call: Call) -> Route:
        assert self._coordinators is not None
        return await self._cluster.router.coordinators_route(call, self._coordinators)

    async def _at_coordinators(self) -> None:
        body = [CoordinateOp.COMMIT, self._txid, self._parts]
        await self._cluster.caller.ask(self._call, self._coordinators_route, Verb.COORDINATE, body, _committed)

    # ---- an answer was lost

    async def _resolve(self, problem: str) -> None:
        """Nothing is sent any more that could commit it; the coordinators find out, and see to it that it stays so."""
        left_s = self._deadline - asyncio.get_running_loop().time()
        call = self._cluster.caller.call(
            f"outcome of transaction {self._txid.hex()}",
            None,
            is_write=True,  # a write's patience: it goes to every shard
            timeout_s=max(left_s, self._timeout_s * RESOLVE_SHARE),
        )
        try:
            if self._coordinators is None:
                gids = await self._cluster.router.find_coordinators(call)
                if not gids:
                    raise CommitUnknown(self._txid, f"{problem}; no coordinator is registered that could find out")
                self._coordinators = coordinators_of(self._txid, gids)
            state = await resolve_at(self._cluster, call, self._coordinators, self._txid, self._shards)
        except CommitUnknown:
            raise
        except RaftKVError as error:
            raise CommitUnknown(self._txid, f"{problem}; nor could the coordinators tell: {error}") from None
        self._is_resolved = True
        if state == State.ABORTED:
            raise Aborted("its answer was lost, and it was given up since")


def _committed(body: Any) -> None:
    state = _state(body)
    if state == State.ABORTED:
        raise Aborted("the coordinators gave it up")
    if state != State.COMMITTED:
        raise bad_reply("a commit")


def _state(body: Any) -> State:
    try:
        return decode_state_reply(body)
    except Malformed:
        raise bad_reply("a commit") from None
