"""The same scenarios on real processes: daemons and, between all of them and the clerks, the TCP proxy of tests/chaos.

A clerk drives the real SDK in this process, and dials by ports of its own, so that the network knows it by name. The
course's network model is mapped to what the proxy can do:

* reliable: bytes pass on at once;
* unreliable: 10 % of the requests of clerks never arrive and 10 % of the answers are lost, because the connection is
  reset under them; 1 % of what servers send each other meets a reset, half of them in the midst of a frame; everything
  is delayed, by 6.5 ms on average in each direction;
* cut: bytes wait, as TCP's would for an acknowledgement;
* a crash is a SIGKILL.

Bounds on time are three times those of the simulator. Time is the loop's: between two steps of a scenario nothing
moves but the daemons. What is inside a server is asked of it past the proxy, or read from its disk.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import types
from collections.abc import Collection, Coroutine, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from unittest.mock import patch

from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV, Value
from raftkv.client.pool import Pool
from raftkv.machines.slots import shard_of
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import RaftKVError
from raftkv.protocol.messages import FOLLOWER_OK, Hello, ReadOp, Verb
from raftkv.sim.check.linearizability import check_linearizability
from raftkv.sim.cluster import ALL_KEYS
from raftkv.sim.probes import Probes
from raftkv.sim.workload import Recorder
from raftkv.storage.rocks import RocksEngine
from tests.acceptance.rigs import (
    BASE_SEED,
    CLERK_TIMEOUT_S,
    CLIENT_LOSS,
    FORMED_TIMEOUT_S,
    HOLD_S_MAX,
    NO_LIMIT,
    SERVER_RESETS,
    BaseClerk,
    BaseRig,
    Task,
)
from tests.chaos import checks
from tests.chaos.cluster import ChaosCluster, Daemon, free_port
from tests.chaos.proxy import Network

DELAY_S = HOLD_S_MAX / 4
STATUS_TIMEOUT_S = 10.0
LOOK_TIMEOUT_S = 3.0
NEVER = 1_000_000_000
"""Entries, or bytes: the log is not cut before."""

T = TypeVar("T")


class Ways(Pool):
    """Connections by other ports than those that are known: `ways` has them, by address."""

    def __init__(self, ways: dict[str, str]) -> None:
        super().__init__()
        self._ways = ways

    def ready(self, address: str) -> Channel | None:
        return super().ready(self._ways.get(address, address))

    async def get(self, address: str, *, timeout_s: float) -> Channel:
        return await super().get(self._ways.get(address, address), timeout_s=timeout_s)

    def keep_only(self, addresses: Collection[str]) -> None:
        super().keep_only([self._ways.get(address, address) for address in addresses])


class RealClerk(BaseClerk):
    def __init__(self, rig: RealRig, number: int, timeout_s: float) -> None:
        super().__init__()
        self.rig: RealRig = rig
        self.number = number
        self.host = f"k{number}"
        self.rng = random.Random(f"{rig.seed}/clerk {number}")
        self._ways: dict[str, str] = {}
        for daemon in rig.cluster.daemons:
            port, private = free_port(), int(daemon.address.rpartition(":")[2])
            rig.run(rig.network.listen(port, private, daemon.name, self.host))
            self._ways[daemon.public] = f"127.0.0.1:{port}"
        known = rig.cluster.controller_addresses
        with patch("raftkv.client.cluster.Pool", lambda _ssl: Ways(self._ways)):
            self.kv = RaftKV(known, timeout_s=timeout_s, rng=self.rng)
            self.controllers = Controllers(known, timeout_s=timeout_s, rng=self.rng)

    def spawn(self, work: Coroutine[Any, Any, T]) -> Task[T]:
        task: Task[T] = Task(self.rig.now)

        async def carry_out() -> None:
            try:
                result = await work
            except RaftKVError as error:
                task.end(self.rig.now, None, error)
            else:
                task.end(self.rig.now, result, None)

        self.rig.begin(carry_out())
        return task

    def address_of(self, server: Daemon) -> str:
        return self._ways[server.public]

    async def close(self) -> None:
        await self.kv.close()
        await self.controllers.close()


class RealCluster(ChaosCluster):
    """Groups are joined if they are told to."""

    async def start(self) -> None:
        for public, private, target, source in self._links:
            await self.network.listen(public, private, target, source)
        for daemon in self.daemons:
            daemon.start()
        for daemon in self.daemons:
            await daemon.ready()


class RealRig(BaseRig[Daemon]):
    """`controllers` and one group of `servers`, or none, in `folder`. Use it as a context: see `Rig`."""

    slower = 3.0

    def __init__(
        self,
        servers: int,
        folder: Path,
        *,
        unreliable: bool = False,
        max_raft_state: int = NO_LIMIT,
        shards: int = 10,
        controllers: int = 1,
    ) -> None:
        self.seed = BASE_SEED
        self.rng = random.Random(self.seed)
        self.shards = shards
        self.max_raft_state = max_raft_state
        self.unreliable = unreliable
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, about: print(f"nobody heard: {about}"))
        world: Any = types.SimpleNamespace(scheduler=self)  # all that a recorder asks of it is the time
        self.recorder = Recorder(world, Probes())
        self.network = Network(random.Random(self.rng.getrandbits(64)))
        state_bytes = NEVER if max_raft_state == NO_LIMIT else max_raft_state
        options = ["--snapshot-entries", str(NEVER), "--snapshot-bytes", str(state_bytes)]
        replicas = [servers] if servers else []
        self.cluster = RealCluster(
            folder, self.network, replicas=replicas, controllers=controllers, shards=shards, options=options
        )
        self._clerks: list[RealClerk] = []
        self._works: list[asyncio.Task[None]] = []
        self._cuts: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        try:
            self.run(self.cluster.start())
            for source, target in itertools.permutations(self.hosts_of(self.servers), 2):
                self._set_flow(source, target)
            if self.cluster.groups.get(1):
                admin = self.clerk()
                admin.do(admin.controllers.join({1: [server.public for server in self.servers]}), FORMED_TIMEOUT_S)
                admin.do(admin.get(b"is it there?"), FORMED_TIMEOUT_S)
            self.leader()
        except BaseException:
            self._dispose()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._dispose()
        self.recorder.close()
        verdict = check_linearizability(self.recorder.history)
        if kind is None:
            assert verdict.passed, f"seed {self.seed}: {verdict}"
            problems = checks.bad_logs(self.cluster)
            assert not problems, problems
        else:
            print(f"seed {self.seed}; the history until then: {verdict.result}")
            for daemon in self.cluster.daemons:
                print(f"--- {daemon.name}\n{daemon.log()[-3000:]}")

    def _dispose(self) -> None:
        """Everything is gone, whatever state it is in."""
        self.cluster.stop()

        async def end_all() -> None:
            for work in self._works:
                work.cancel()
            await asyncio.gather(*self._works, return_exceptions=True)
            for clerk in self._clerks:
                await clerk.close()
            await self.network.close()

        self.run(end_all())
        self.loop.close()

    # ---- time

    @property
    def now(self) -> float:
        return self.loop.time()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Until it has ended; everything else goes on meanwhile."""
        return self.loop.run_until_complete(work)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """It goes on while time passes."""
        self._works.append(self.loop.create_task(work))

    def sleep(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))
        self.check()

    def finish_all(self, tasks: Sequence[Task[Any]], within_s: float) -> None:
        deadline = self.now + within_s * self.slower
        while not all(task.done for task in tasks):
            late = self.now >= deadline
            open_ = sum(not task.done for task in tasks)
            assert not late, (
                f"seed {self.seed}: {open_} of {len(tasks)} tasks did not end within {self.slower:g} × {within_s:g} s"
            )
            self.run(asyncio.sleep(0))
            works = [work for work in self._works if not work.done()]
            if works:
                left_s = deadline - self.now
                self.run(_first_of(works, left_s))
            self.check()

    def check(self) -> None:
        """Raise what a clerk's work raised, unless it was the store's answer; and daemons run which should."""
        for work in [work for work in self._works if work.done()]:
            self._works.remove(work)
            work.result()
        for daemon in self.cluster.daemons:
            assert daemon.running or not daemon.wanted, f"{daemon.name} ended: {daemon.log_of_this_start()[-3000:]}"

    # ---- who is there

    @property
    def servers(self) -> list[Daemon]:
        return self.cluster.groups[max(self.cluster.groups)]

    @property
    def clerks(self) -> Sequence[RealClerk]:
        return self._clerks

    def clerk(self, timeout_s: float = CLERK_TIMEOUT_S) -> RealClerk:
        clerk = RealClerk(self, len(self._clerks), timeout_s)
        self._clerks.append(clerk)
        for daemon in self.cluster.daemons:
            self._set_flow(clerk.host, daemon.name)
            self._set_flow(daemon.name, clerk.host)
        return clerk

    def host_of(self, process: Daemon) -> str:
        return process.name

    def leader_now(self) -> Daemon | None:
        return self.run(self.cluster.leader(max(self.cluster.groups)))

    # ---- faults

    def _set_flow(self, source: str, target: str) -> None:
        if not self.unreliable:
            return
        flow = self.network.flow(source, target)
        flow.delay_s = DELAY_S
        if source.startswith("k"):
            flow.reset_before = flow.reset_at_answer = CLIENT_LOSS
        elif not target.startswith("k"):
            flow.reset_before = flow.reset_midway = SERVER_RESETS / 2

    def cut(self, left: Iterable[str], right: Iterable[str]) -> None:
        for one, other in itertools.product(list(left), list(right)):
            for source, target in ((one, other), (other, one)):
                self.network.cut(source, target)
                self._cuts.append((source, target))
        self.network.changed()

    def heal(self) -> None:
        for source, target in self._cuts:
            self.network.flow(source, target).cut = False
        self._cuts.clear()
        self.network.changed()

    def calm(self) -> None:
        """From now on the network is reliable and whole."""
        self.unreliable = False
        self._cuts.clear()
        self.network.heal()

    def lose_segments_of(self, process: Daemon) -> None:
        hosts = [*self.hosts_of(self.cluster.daemons), *(clerk.host for clerk in self.clerks)]
        for other in hosts:
            self.network.reset_all(process.name, other)
            self.network.reset_all(other, process.name)

    def crash(self, process: Daemon) -> None:
        process.kill()

    def start(self, process: Daemon) -> None:
        process.start()

    def end(self, process: Daemon, how: str) -> None:
        """How: stop, kill, pause."""
        if how == "stop":
            assert process.popen is not None
            process.wanted = False
            process.popen.terminate()
        elif how == "pause":
            process.pause()
        else:
            assert how == "kill", how
            process.kill()

    def revive(self, process: Daemon) -> None:
        process.resume()
        if not process.wanted:
            assert process.popen is not None
            process.popen.wait()  # if it was told to stop
            process.start()

    def hold_writes(self) -> None:
        """The servers hear nothing of each other."""
        self.partition(*([server] for server in self.servers))

    def release_writes(self) -> None:
        self.heal()

    # ---- what is inside

    def status_of(self, process: Daemon) -> dict[str, Any]:
        async def ask() -> dict[str, Any] | None:
            await process.ready()
            return await process.status_now(STATUS_TIMEOUT_S)

        report = self.run(ask())
        assert report is not None, f"{process.name} tells nothing of itself"
        return report

    def state_bytes(self, process: Daemon) -> int:
        found: int = self.status_of(process)["log_bytes"]
        return found

    def raft_state_max(self) -> int:
        return max(self.state_bytes(server) for server in self.servers)

    def snapshot_bytes(self, process: Daemon) -> int:
        """What is on its disk besides the log; it is killed to look, and started again."""
        process.kill()
        (directory,) = (process.data_dir / "engine").iterdir()
        engine = RocksEngine(os.fspath(directory))
        try:
            return sum(len(key) + len(value) for key, value in engine.scan(*ALL_KEYS))
        finally:
            engine.close()
            process.start()

    def snapshots_made(self, process: Daemon) -> int:
        report = self.status_of(process)
        made: int = report["snapshots_installed"] + (report["first_index"] > 1)
        return made

    def snapshots_installed(self, process: Daemon) -> int:
        installed: int = self.status_of(process)["snapshots_installed"]
        return installed

    def local_get(self, process: Daemon, key: bytes) -> Value | None:
        """None also if it doesn't answer, because it is cut off for instance."""

        async def ask() -> Any:
            channel = await Channel.open(process.address, Hello.of_client())
            try:
                body = [-1, FOLLOWER_OK, ReadOp.GET, shard_of(key, self.shards), key]
                return await channel.request(Verb.READ, body, timeout_s=LOOK_TIMEOUT_S)
            finally:
                channel.close()

        try:
            value, version = self.run(ask())
        except RaftKVError:
            return None
        return None if value is None else Value(value, version)

    def reachable(self) -> list[Daemon]:
        return [server for server in self.servers if server.running and not server.paused]

    def wait_equal(self, within_s: float = 10.0) -> float:
        problems, took_s = self.run(checks.wait_settled(self.cluster, within_s * self.slower))
        if not problems and 1 in self.cluster.groups:
            problems, _ = self.run(checks.replicas_differ(self.cluster))
        assert not problems, problems
        return took_s


async def _first_of(works: Sequence[asyncio.Task[None]], within_s: float) -> None:
    await asyncio.wait(works, timeout=max(within_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
