"""A simulated cluster with coordinators, and clients that send transactions without the SDK."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgpack

from raftkv.daemons.group_calls import GroupCalls
from raftkv.machines.controller import ShardMapMachine
from raftkv.machines.coordinator import CoordinatorMachine
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import make_txid
from raftkv.protocol.errors import Busy, OutcomeUnknown, RaftKVError, Unavailable
from raftkv.protocol.messages import Hello, ReadOp, Verb
from raftkv.protocol.transactions import CoordinateOp, State, decode_state_reply
from raftkv.sim.cluster import COORDINATORS_GID, Group, shards_of
from raftkv.sim.process import DaemonProcess
from tests.acceptance.kv_rig import Clerk, Rig

AGAIN = (Busy, Unavailable, OutcomeUnknown)
Part = list[Any]


class TxnRig(Rig):
    """Two groups, which own the shards in turn, three coordinators, one controller."""

    def __init__(self, seed: int = 0, *, groups: int = 2, shards: int = 10, servers: int = 3, **options: Any) -> None:
        super().__init__(servers, seed, groups=groups, shards=shards, coordinators=3, **options)
        self.wait_until(lambda: bool(self.controllers_machine().coordinators), "the coordinators are registered")

    # ---- who is there

    @property
    def coordinators(self) -> Group:
        assert self.cluster.coordinators is not None
        return self.cluster.coordinators

    def controllers_machine(self) -> ShardMapMachine:
        daemon = self.cluster.groups[0].processes[0].daemon
        assert daemon is not None and isinstance(daemon._role.machine, ShardMapMachine)
        return daemon._role.machine

    def coordinator_machine(self, process: DaemonProcess) -> CoordinatorMachine:
        assert process.daemon is not None and isinstance(process.daemon._role.machine, CoordinatorMachine)
        return process.daemon._role.machine

    def group_of_shard(self, shard: int) -> Group:
        gid = self.controllers_machine().config(-1).owner(shard)
        return next(group for group in self.cluster.serving_groups if group.gid == gid)

    def keys(self, count: int = 2, prefix: bytes = b"k") -> list[bytes]:
        """Keys whose shards are at different groups, in turn."""
        latest = self.controllers_machine().config(-1)
        found: list[bytes] = []
        gids = sorted(latest.groups)
        number = 0
        while len(found) < count:
            key = prefix + b"%d" % number
            number += 1
            if latest.owner(shard_of(key, self.shards)) == gids[len(found) % len(gids)]:
                found.append(key)
        return found

    def part(self, writes: Mapping[bytes, bytes | None], reads: dict[bytes, int] | None = None) -> list[Part]:
        """The parts of a transaction."""
        parts: dict[int, Part] = {}
        for key, version in (reads or {}).items():
            parts.setdefault(shard_of(key, self.shards), [0, [], []])[1].append([key, version])
        for key, value in writes.items():
            parts.setdefault(shard_of(key, self.shards), [0, [], []])[2].append([key, value])
        return [[shard, reads_of, writes_of] for shard, (_, reads_of, writes_of) in sorted(parts.items())]

    # ---- what there must not be

    def locks_left(self) -> list[str]:
        """Prepared transactions and open records, at any replica that is up."""
        left = []
        for group in self.cluster.serving_groups:
            for process in group.processes:
                if self.is_up(process) and shards_of(process).in_doubt():
                    left.append(f"{process.host} has {len(shards_of(process).in_doubt())} prepared")
        for process in self.coordinators.processes:
            if self.is_up(process) and self.coordinator_machine(process).open:
                left.append(f"{process.host} has {len(self.coordinator_machine(process).open)} open")
        return left

    def wait_clean(self, within_s: float = 30.0) -> float:
        return self.wait_until(lambda: not self.locks_left(), "no lock is left", within_s)

    def start_dead(self) -> None:
        for process in self.cluster.daemons:
            if not process.running:
                process.start()

    # ---- failpoints

    def arm(self, group: Group, name: str, action: Callable[[DaemonProcess], float], times: int = 1) -> list[str]:
        """At every replica; the first `times` that come by there do it. What came by is in the list."""
        came: list[str] = []
        for process in group.processes:
            process.failpoints.arm(name, self._action(process, name, action, times, came))
        return came

    def _action(
        self, process: DaemonProcess, name: str, action: Callable[[DaemonProcess], float], times: int, came: list[str]
    ) -> Callable[[], float]:
        def act() -> float:
            if len(came) >= times:
                return 0.0
            came.append(process.host)
            return action(process)

        return act

    def crash_at(self, group: Group, name: str, times: int = 1) -> list[str]:
        """The process ends right there, and is started again a while later."""

        def crash(process: DaemonProcess) -> float:
            self.scheduler.after(0.5, self._start_again, process)
            process.excused_until = float("inf")
            process.exit(f"failpoint {name}")
            return 0.0

        return self.arm(group, name, crash, times)

    def _start_again(self, process: DaemonProcess) -> None:
        if not process.running:
            process.start()


class TxnClient:
    """In a clerk's process: questions to the coordinators and to groups, each again until it has an answer."""

    def __init__(self, rig: TxnRig) -> None:
        self.rig = rig
        self.clerk: Clerk = rig.clerk()
        self.rng: random.Random = self.clerk.rng
        self._coordinators = GroupCalls(Hello.of_client, "coordinator")
        self._groups = GroupCalls(Hello.of_client)

    def do(self, work: Coroutine[Any, Any, Any], within_s: float = 60.0) -> Any:
        return self.clerk.do(work, within_s)

    def txid(self, age_ms: int = 0) -> bytes:
        return make_txid(self.rig.controllers_machine().map_time_ms - age_ms, self.rng.randbytes(8))

    async def coordinate(self, body: list[Any]) -> Any:
        """One pass over the replicas."""
        addresses = list(self.rig.coordinators.addresses.values())
        return await self._coordinators.ask(COORDINATORS_GID, addresses, Verb.COORDINATE, body)

    async def surely(self, body: list[Any]) -> Any:
        import asyncio

        while True:
            try:
                return await self.coordinate(body)
            except AGAIN:
                await asyncio.sleep(0.05)

    async def commit(self, txid: bytes, parts: list[Part]) -> State | RaftKVError:
        """The state, or the error that says no."""
        try:
            return decode_state_reply(await self.surely([CoordinateOp.COMMIT, txid, parts]))
        except RaftKVError as error:
            return error

    async def resolve(self, txid: bytes, shards: list[int]) -> State:
        return decode_state_reply(await self.surely([CoordinateOp.RESOLVE, txid, shards]))

    async def status(self, txid: bytes) -> State:
        return decode_state_reply(await self.surely([CoordinateOp.STATUS, txid]))

    async def txn(self, gid: int, command: list[Any]) -> Any:
        """A TXN, once, at the leader of that group."""
        group = next(group for group in self.rig.cluster.serving_groups if group.gid == gid)
        addresses = list(group.addresses.values())
        return await self._groups.ask(gid, addresses, Verb.TXN, [1, msgpack.packb(command)])

    async def read(self, operation: ReadOp, shard: int, *args: Any, gid: int = 0) -> Any:
        group = self.rig.group_of_shard(shard)
        addresses = list(group.addresses.values())
        return await self._groups.ask(group.gid, addresses, Verb.READ, [1, 0, operation, shard, *args])

    async def values(self, keys: list[bytes]) -> list[bytes | None]:
        found = [await self.clerk.kv.get(key) for key in keys]
        return [None if value is None else value.value for value in found]
