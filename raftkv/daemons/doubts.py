"""Transactions in doubt: prepared here, and hearing nothing for too long. The group's leader asks the coordinators.

Time counts from when this leader noticed it. Whatever the coordinators answer is in their log; what it means here is
decided when the entry that says so is applied. This module must never end a transaction on its own account.
"""

from __future__ import annotations

import asyncio
import logging
import random

from raftkv.daemons.failpoints import Failpoints
from raftkv.daemons.group_calls import GroupCalls, named_client
from raftkv.daemons.map_follower import ControllerPolls
from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.proposals import submit
from raftkv.daemons.replica import Replica
from raftkv.machines.kv import KvMachine
from raftkv.machines.txn_commands import TXN_DECIDE
from raftkv.protocol.errors import RaftKVError, Unavailable
from raftkv.protocol.messages import Verb
from raftkv.protocol.transactions import CoordinateOp, State, decode_states_reply
from raftkv.storage.store import Store

log = logging.getLogger(__name__)

LOOK_S = 1.0
DOUBT_S = 3.0
"""So long a prepared transaction is believed to be under way."""
ASKED_MAX = 1_000
"""Transactions in one question."""

Key = tuple[bytes, int]


class Doubts:
    """Watches while its replica leads. `polls` knows where the coordinators are."""

    def __init__(
        self,
        options: DaemonOptions,
        store: Store,
        machine: KvMachine,
        polls: ControllerPolls,
        rng: random.Random,
        failpoints: Failpoints,
    ) -> None:
        self._name = options.name
        self._machine = machine
        self._polls = polls
        self._rng = rng
        self._failpoints = failpoints
        self._calls = GroupCalls(named_client(options, store), "coordinator", ssl=options.client_ssl)
        self.replica: Replica | None = None

    def stop(self) -> None:
        self._calls.close()

    async def watch(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        since: dict[Key, float] = {}
        while True:
            await asyncio.sleep(LOOK_S * (0.75 + self._rng.random() / 2))
            now = loop.time()
            doubts = self._machine.in_doubt()
            since = {(txid, shard): since.get((txid, shard), now) for txid, _, shard, _ in doubts}
            asked: dict[int, dict[bytes, list[int]]] = {}
            for txid, coordinators, shard, _ in doubts:
                if now - since[txid, shard] >= DOUBT_S:
                    asked.setdefault(coordinators, {}).setdefault(txid, []).append(shard)
            for coordinators, txns in asked.items():
                try:
                    await self._settle(coordinators, dict(list(txns.items())[:ASKED_MAX]))
                except (RaftKVError, OSError) as error:
                    log.debug("%s: %d transactions are in doubt: %s", self._name, len(txns), error)

    async def _settle(self, coordinators: int, txns: dict[bytes, list[int]]) -> None:
        addresses = self._polls.coordinators.get(coordinators)
        if addresses is None:
            raise Unavailable(f"nobody knows where group {coordinators} of coordinators is")
        await self._failpoints.reach("group asked in doubt")
        body = [CoordinateOp.DOUBT, list(txns)]
        states = decode_states_reply(await self._calls.ask(coordinators, addresses, Verb.COORDINATE, body))
        assert self.replica is not None
        ended = {txid: state for txid, state in states.items() if txid in txns and state > State.BEGUN}
        results = [
            submit(self.replica, [TXN_DECIDE, txid, state == State.COMMITTED, txns[txid]])
            for txid, state in ended.items()
        ]
        for result in results:
            await result
        if ended:
            log.info("%s: %d transactions that were in doubt have ended", self._name, len(ended))
