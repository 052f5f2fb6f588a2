"""The daemons of a chaos run: each listens on a private port, and all that others know are ports of the proxy.

    a peer or client  ->  the public port of the target (the hello says who dials)
    a replica of a group, a coordinator  ->  a port of its own for each controller

Every process dies with this one, however it ends. Ports are from a range of its own, so that a restarted daemon finds
its port free though other tests run beside it.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raftkv.client.controllers import Controllers
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import RaftKVError
from raftkv.protocol.messages import Hello, Verb
from tests.chaos.proxy import Network
from tests.system.cluster import Process

COORDINATORS = -1
"""Their key among the groups; 0 is that of the controllers."""
PORTS = range(10_000, 19_900)
READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0
"""A graceful stop promises about 5 s; the machine may be much too busy."""
POLL_S = 0.05
PR_SET_PDEATHSIG = 1

_ports = itertools.cycle([*PORTS[os.getpid() % 90 * 110 :], *PORTS[: os.getpid() % 90 * 110]])
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Daemon(Process):
    """A daemon that should be running or not, which is known: when it ends by itself, that is a finding."""

    def __init__(self, name: str, arguments: Sequence[str], address: str, public: str, folder: Path) -> None:
        super().__init__(name, arguments, address, folder)
        self.public = public
        self.wanted = False
        self.paused = False
        self._ready_from = 0

    def start(self, *, extra: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        """Start, bound to the life of this process."""
        assert not self.running, self.name
        self._ready_from = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.wanted = True
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "raftkv", *self.arguments, "--data-dir", str(self.data_dir), *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                preexec_fn=_die_with_parent,
            )

    def log_of_this_start(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._ready_from)
            return log.read().decode(errors="replace")

    async def ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until it accepts connections. Raise AssertionError if it ends instead."""
        deadline_s = time.monotonic() + timeout_s
        while "is ready on" not in self.log_of_this_start():
            assert self.running, f"{self.name} did not start: {self.log_of_this_start()[-2000:]}"
            assert time.monotonic() < deadline_s, f"{self.name} is not ready after {timeout_s:g} s"
            await asyncio.sleep(POLL_S)

    def kill(self) -> None:
        """SIGKILL, and gone."""
        self.wanted = self.paused = False
        super().kill()

    def pause(self) -> None:
        self.paused = True
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            self.signal(signal.SIGCONT)

    async def stop_gracefully(self) -> None:
        """SIGTERM; raise AssertionError unless it exits 0 in time."""
        assert self.popen is not None
        self.wanted = False
        self.popen.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while self.running:
            assert time.monotonic() < deadline_s, f"{self.name} has not stopped {STOP_TIMEOUT_S:g} s after SIGTERM"
            await asyncio.sleep(POLL_S)
        status = self.popen.returncode
        assert status == 0, f"{self.name} exits {status} after SIGTERM: {self.log_of_this_start()[-2000:]}"

    async def status_now(self, timeout_s: float = 1.5) -> dict[str, Any] | None:
        """What it says of itself, past the proxy; None if it doesn't."""
        if not self.running or self.paused:
            return None
        try:
            async with asyncio.timeout(timeout_s):
                channel = await Channel.open(self.address, Hello.of_client())
                try:
                    report: dict[str, Any] = await channel.request(Verb.STATUS, [], timeout_s=timeout_s)
                    return report
                finally:
                    channel.close()
        except (RaftKVError, OSError, TimeoutError):
            return None


class ChaosCluster:
    """Controllers (group 0), coordinators (group -1) if there are to be any, and groups 1 … N behind the proxy.

    `spares` are the sizes of groups that run, and aren't in the map at the start.
    """

    def __init__(
        self,
        folder: Path,
        network: Network,
        *,
        replicas: Sequence[int] = (3, 3),
        spares: Sequence[int] = (),
        controllers: int = 3,
        coordinators: int = 0,
        shards: int = 10,
        options: Sequence[str] = (),
        group_options: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.network = network
        self.shards = shards
        self._links: list[tuple[int, int, str, str | None]] = []
        self.groups: dict[int, list[Daemon]] = {}
        self.groups[0] = self._group(0, controllers, ["--shards", str(shards), *options])
        for gid, count in enumerate([*replicas, *spares], 1):
            self.groups[gid] = self._group(gid, count, [*options, *group_options])
        if coordinators:
            self.groups[COORDINATORS] = self._group(COORDINATORS, coordinators, options)
        self._first = range(1, len(replicas) + 1)

    def _group(self, gid: int, count: int, options: Sequence[str]) -> list[Daemon]:
        kind = {0: "controller", COORDINATORS: "coordinator"}.get(gid, f"group{gid}")
        names = [f"{kind}-{number}" for number in range(count)]
        ports = [(free_port(), free_port()) for _ in names]
        peers = ",".join(f"{number}=127.0.0.1:{public}" for number, (public, _) in enumerate(ports))
        daemons = []
        for number, (name, (public, private)) in enumerate(zip(names, ports, strict=True)):
            self._links.append((public, private, name, None))
            role = ["shardkv", "--gid", str(gid)] if gid > 0 else [kind]
            if gid:
                role += ["--controllers", self._ways_to_controllers(name)]
            arguments = [
                *role, "--id", str(number), "--listen", f"127.0.0.1:{private}", "--peers", peers, *options,
            ]  # fmt: skip
            daemons.append(Daemon(name, arguments, f"127.0.0.1:{private}", f"127.0.0.1:{public}", self.folder))
        return daemons

    def _ways_to_controllers(self, source: str) -> str:
        ways = []
        for controller in self.groups.get(0, []):
            public, private = free_port(), int(controller.address.rpartition(":")[2])
            self._links.append((public, private, controller.name, source))
            ways.append(f"127.0.0.1:{public}")
        return ",".join(ways)

    @property
    def daemons(self) -> list[Daemon]:
        return [daemon for group in self.groups.values() for daemon in group]

    @property
    def data_daemons(self) -> list[Daemon]:
        return [daemon for gid, group in self.groups.items() if gid > 0 for daemon in group]

    @property
    def coordinators(self) -> list[Daemon]:
        return self.groups.get(COORDINATORS, [])

    @property
    def controller_addresses(self) -> list[str]:
        return [daemon.public for daemon in self.groups[0]]

    async def start(self) -> None:
        """Start everything, join all groups but the spare ones; the coordinators are registered then."""
        for public, private, target, source in self._links:
            await self.network.listen(public, private, target, source)
        for daemon in self.daemons:
            daemon.start()
        for daemon in self.daemons:
            await daemon.ready()
        async with Controllers(self.controller_addresses, timeout_s=60) as controllers:
            await controllers.join({gid: self.addresses_of(gid) for gid in self._first})
            async with asyncio.timeout(READY_TIMEOUT_S):
                while self.coordinators and not await controllers.coordinators():
                    await asyncio.sleep(POLL_S)

    def addresses_of(self, gid: int) -> list[str]:
        """Where everybody else finds the group."""
        return [daemon.public for daemon in self.groups[gid]]

    async def leader(self, gid: int) -> Daemon | None:
        """Who leads group `gid` by its own account, in the highest term; None if nobody does."""
        reports = await asyncio.gather(*(daemon.status_now() for daemon in self.groups[gid]))
        leaders = [
            (report["term"], number)
            for number, report in enumerate(reports)
            if report is not None and report["state"] == "leader"
        ]
        return self.groups[gid][max(leaders)[1]] if leaders else None

    def stop(self) -> None:
        """Everything is gone."""
        for daemon in self.daemons:
            daemon.kill()


def free_port() -> int:
    """A port that nobody listens on now, of a range that nobody else's tests use."""
    while True:
        port: int = next(_ports)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _die_with_parent() -> None:
    """In the child: SIGKILL when whoever started it ends, even by SIGKILL."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
