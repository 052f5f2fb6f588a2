"""The controller's side of the runtime: Join, Leave, Move through the log; Query and long polls from it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack

from raftkv.daemons.replica import Replica
from raftkv.daemons.service import Session, Verb
from raftkv.machines.controller import INIT, ShardMapMachine
from raftkv.machines.machine import decode_command
from raftkv.protocol import messages
from raftkv.protocol.errors import Busy, RaftKVError, Unavailable
from raftkv.protocol.limits import ID_BYTES
from raftkv.protocol.messages import decode_config_body, decode_control_body
from raftkv.storage.store import Store

log = logging.getLogger(__name__)

TICK_S = 1.0
"""How often the leader lets map time advance when nothing else is logged: explicit locks live for ten seconds of it."""
PARKED_POLLS_MAX = 10_000


class Poll(NamedTuple):
    """A CONFIG request: `wait_until_s` is when a long poll has waited enough (loop time)."""

    session: Session
    request_id: int
    num: int
    wait_after: int
    wait_until_s: float


class ControllerRole:
    """What a controller does beyond being a replica."""

    def __init__(self, store: Store, shards: int, entropy: Callable[[int], bytes]) -> None:
        self.machine = ShardMapMachine()
        self._store = store
        self._shards = shards
        self._entropy = entropy
        self._replica: Replica | None = None
        self._loop = asyncio.get_running_loop()
        self._parked: dict[Poll, asyncio.TimerHandle] = {}
        self._announced_num = 0
        self._tick_timer: asyncio.TimerHandle | None = None
        self.verbs: dict[int, Verb] = {
            messages.Verb.CONFIG: self._config,
            messages.Verb.CONTROL: self._control,
        }

    def attach(self, replica: Replica) -> None:
        self._replica = replica
        self.applied()

    def stop(self) -> None:
        for timer in self._parked.values():
            timer.cancel()
        self._parked.clear()
        if self._tick_timer is not None:
            self._tick_timer.cancel()

    def status(self) -> dict[str, Any]:
        return {
            "config_num": self.machine.config_num,
            "map_time_ms": self.machine.map_time_ms,
            "shards": [],
            "coordinators": [[gid, list(addresses)] for gid, addresses in self.machine.coordinators.items()],
        }

    # ---- events of the replica

    def role_changed(self, role: str, term: int, leader: int | None) -> None:
        if self._tick_timer is not None:
            self._tick_timer.cancel()
            self._tick_timer = None
        if role == "leader":
            if not self.machine.cluster_id:
                self._found_cluster()
            self._tick_timer = self._loop.call_later(TICK_S, self._tick)

    def applied(self) -> None:
        machine = self.machine
        if machine.cluster_id and not self._store.identity.cluster_id:
            self._store.set_cluster_id(machine.cluster_id)
            log.info("this is cluster %s, of %d shards", machine.cluster_id.hex(), machine.config(0).shards)
        if machine.config_num > self._announced_num:
            self._announced_num = machine.config_num
            parked, self._parked = self._parked, {}
            for poll, timer in parked.items():
                timer.cancel()
                self._answer(poll, None)

    def _found_cluster(self) -> None:
        """The first leader chooses the cluster's id; the log decides which of several INITs counts."""
        assert self._replica is not None
        command = [INIT, self._entropy(ID_BYTES), self._shards]
        self._replica.submit(msgpack.packb(command), command, _ignore, None)

    def _tick(self) -> None:
        assert self._replica is not None
        raft = self._replica.raft
        behind_ms = raft.stamp_now(self._replica.now_ms()) - self.machine.map_time_ms
        if self.machine.wants_ticks or behind_ms >= TICK_S * 1000:
            self._replica.propose_tick()
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)

    # ---- verbs

    def _control(self, session: Session, request_id: int, body: list[Any]) -> None:
        replica = self._ready()
        raw = decode_control_body(body)
        command = decode_command(raw)
        self.machine.validate(command)
        replica.submit(raw, command, session.deliver, request_id)

    def _config(self, session: Session, request_id: int, body: list[Any]) -> None:
        num, wait_after, wait_ms = decode_config_body(body)
        wait_until_s = self._loop.time() + wait_ms / 1000
        poll = Poll(session, request_id, num, wait_after, wait_until_s)
        self._ready().read(self._answer, poll, follower_ok=True)

    def _ready(self) -> Replica:
        if self._replica is None:
            raise Unavailable("this controller waits for the other controllers to start")
        return self._replica

    def _answer(self, poll: Poll, error: RaftKVError | None) -> None:
        """The applied state is fresh: answer, or park the poll until there is something new."""
        if error is not None:
            poll.session.refuse(poll.request_id, error)
            return
        try:
            self._ready().check_readable()
            config = self.machine.config(poll.num)
        except RaftKVError as refusal:
            poll.session.refuse(poll.request_id, refusal)
            return
        wait_s = poll.wait_until_s - self._loop.time()
        if poll.num == -1 and config.num <= poll.wait_after and wait_s > 0 and not poll.session.closed:
            if len(self._parked) >= PARKED_POLLS_MAX:
                poll.session.refuse(poll.request_id, Busy("too many clients wait for a configuration"))
                return
            self._parked[poll] = self._loop.call_later(wait_s, self._waited_enough, poll)
            return
        machine = self.machine
        coordinators = list(machine.coordinators.items())
        answer = [config.encode(), machine.map_time_ms, machine.drains_over, coordinators]
        poll.session.reply(poll.request_id, answer)

    def _waited_enough(self, poll: Poll) -> None:
        self._parked.pop(poll, None)
        self._ready().read(self._answer, poll, follower_ok=True)


def _ignore(token: Any, result: Any) -> None:
    """For commands whose effect, not whose answer, is wanted."""
