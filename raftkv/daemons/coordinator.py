"""The coordinators' side of the runtime: what became of transactions over several groups, and who drives them.

Its leader follows the controllers, for the map, for map time, and so that they name the coordinators to everybody.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from raftkv.daemons.failpoints import Failpoints
from raftkv.daemons.group_calls import GroupCalls, named_client
from raftkv.daemons.map_follower import LONG_POLL_MS, MAP_TIME_STEP_MS, ControllerPolls
from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.places import Places
from raftkv.daemons.replica import Replica
from raftkv.daemons.service import Session, Verb
from raftkv.daemons.tasks import Tasks
from raftkv.daemons.transactions import Transactions, state_of
from raftkv.machines.controller import COMMAND_SHARD, REGISTER
from raftkv.machines.coordinator import MAP_TIME, CoordinatorMachine, TxnState
from raftkv.protocol import messages
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import RaftKVError, Unavailable
from raftkv.protocol.limits import ID_BYTES
from raftkv.protocol.transactions import CoordinateOp, State, decode_coordinate_body
from raftkv.storage.store import Store

log = logging.getLogger(__name__)

CONTROLLERS_GID = 0


class CoordinatorFollower(ControllerPolls):
    """Keeps the maps, and the coordinators' own map time. `on_map()` is told of each new map."""

    def __init__(
        self,
        options: DaemonOptions,
        store: Store,
        machine: CoordinatorMachine,
        places: Places,
        rng: random.Random,
        on_map: Callable[[], None],
    ) -> None:
        super().__init__(options, store, rng)
        self._gid = options.gid
        self._addresses = tuple(address for _, address in sorted(options.peers.items()))
        self._machine = machine
        self._places = places
        self._on_map = on_map
        self._calls = GroupCalls(named_client(options, store), "controller", ssl=options.client_ssl)

    def stop(self) -> None:
        self._calls.close()

    async def _poll(self, channel: Channel) -> None:
        places, machine = self._places, self._machine
        known = -1 if places.latest is None else places.latest.num
        wait_ms = LONG_POLL_MS if self.coordinators.get(self._gid) == self._addresses else 0
        config, reply = await self._query(channel, -1, known, wait_ms)
        places.take(config)
        self._on_map()
        for num in places.missing():
            places.take((await self._query(channel, num, -1, 0))[0])
            self._on_map()
        if machine.sweep_pending or reply.map_time_ms - machine.map_time_ms >= MAP_TIME_STEP_MS:
            await self._log([MAP_TIME, reply.map_time_ms])
        if reply.coordinators.get(self._gid) != self._addresses:
            await self._register(reply.map_time_ms)

    async def _register(self, map_time_ms: int) -> None:
        """Have the controllers name this group to everybody."""
        header = [COMMAND_SHARD, self._rng.randbytes(ID_BYTES), 1, 1, map_time_ms]
        command = msgpack.packb([REGISTER, *header, self._gid, self._addresses])
        await self._calls.ask(CONTROLLERS_GID, self._controllers, messages.Verb.CONTROL, [command])
        log.info("%s: group %d of coordinators is registered", self._name, self._gid)


class CoordinatorRole:
    """What a coordinator does beyond being a replica."""

    def __init__(
        self, options: DaemonOptions, store: Store, tasks: Tasks, rng: random.Random, failpoints: Failpoints
    ) -> None:
        self.machine = CoordinatorMachine()
        self._gid = options.gid
        self._store = store
        self._tasks = tasks
        self._places = Places()
        self._transactions = Transactions(options, store, self.machine, self._places, tasks, rng, failpoints)
        self._follower = CoordinatorFollower(
            options, store, self.machine, self._places, rng, self._transactions.map_changed
        )
        self._following: asyncio.Task[None] | None = None
        self._replica: Replica | None = None
        self.verbs: dict[int, Verb] = {messages.Verb.COORDINATE: self._coordinate}

    def attach(self, replica: Replica) -> None:
        self._replica = replica
        self._follower.replica = replica
        self._transactions.replica = replica

    def stop(self) -> None:
        self._stop_leading()

    def status(self) -> dict[str, Any]:
        return {
            "config_num": self.config_num,
            "map_time_ms": self.machine.map_time_ms,
            "shards": [],
            "transactions": self._transactions.status(),
            "open": len(self.machine.open),
            "in_progress": self._transactions.in_progress,
        }

    @property
    def ended(self) -> Mapping[TxnState, int]:
        """Transactions that this process has driven to a decision, by what it was."""
        return self._transactions.ended

    @property
    def config_num(self) -> int:
        """The latest configuration known here; 0 before the first."""
        return 0 if self._places.latest is None else self._places.latest.num

    # ---- events of the replica

    def role_changed(self, role: str, term: int, leader: int | None) -> None:
        if role == "leader" and self._transactions.term == term:
            return
        self._stop_leading()
        if role == "leader":
            self._following = self._tasks.start(self._follower.follow(), "map-follower")
            self._transactions.start(term)

    def applied(self) -> None:
        """Whoever waits for something that is applied waits for the proposal."""

    def _stop_leading(self) -> None:
        if self._following is not None:
            self._following.cancel()
            self._following = None
            self._follower.stop()
            self._transactions.stop()

    # ---- verbs

    def _coordinate(self, session: Session, request_id: int, body: list[Any]) -> None:
        request = decode_coordinate_body(body)
        replica = self._ready()
        if request.op == CoordinateOp.STATUS:
            replica.read(self._answer_status, (session, request_id, request.txid), follower_ok=True)
        elif request.op == CoordinateOp.COMMIT:
            assert request.parts is not None
            self._transactions.commit(session, request_id, request.txid, request.parts)
        elif request.op == CoordinateOp.RESOLVE:
            self._transactions.resolve(session, request_id, request.txid, request.shards)
        else:
            self._transactions.doubt(session, request_id, request.txids)

    def _answer_status(self, token: tuple[Session, int, bytes], error: RaftKVError | None) -> None:
        session, request_id, txid = token
        if error is not None:
            session.refuse(request_id, error)
            return
        try:
            self._ready().check_readable()
        except RaftKVError as refusal:
            session.refuse(request_id, refusal)
            return
        record = self.machine.record(self._store.engine, txid)
        if record is not None:
            state = state_of(record)
        else:
            state = State.EXPIRED if self.machine.is_expired(txid) else State.UNKNOWN
        session.reply(request_id, [int(state)])

    def _ready(self) -> Replica:
        if self._replica is None:
            raise Unavailable("this coordinator waits for the other coordinators to start")
        return self._replica
