"""Real daemons on loopback, for tests: start, kill, pause, restart, look inside.

Every process is started with its own data directory under one folder and is gone at the end, whatever
the test did.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from ssl import SSLContext
from typing import Any

from raftkv.client.sync import SyncControllers, SyncRaftKV
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import RaftKVError
from raftkv.protocol.messages import Hello, Verb

_PORT_BASE = 10_000
"""Below the blocks that `raftkv local` takes for itself."""
_PORTS_PER_WORKER = 1_000
_next_port = itertools.count(os.getpid())  # so that two runs on one machine rarely meet


def free_port() -> int:
    """A port below the range from which the system picks its own, and not used before by this test run."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = _PORT_BASE + worker * _PORTS_PER_WORKER + next(_next_port) % _PORTS_PER_WORKER
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Process:
    """One daemon: `arguments` start it, again and again, on the same data."""

    def __init__(self, name: str, arguments: Sequence[str], address: str, folder: Path) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.address = address
        self.data_dir = folder / name
        self.log_path = folder / f"{name}.log"
        self.redis_port = 0
        self.popen: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self, *, extra: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        assert not self.running, self.name
        self._log_start = len(self.log())
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "raftkv", *self.arguments, "--data-dir", str(self.data_dir), *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )

    def wait_ready(self, timeout_s: float = 15.0) -> None:
        """Until this start has printed its ready line: from then on it handles signals."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if "is ready on" in self.log()[self._log_start :]:
                return
            assert self.running, f"{self.name} ended: {self.log()[self._log_start :]}"
            time.sleep(0.02)
        raise AssertionError(f"{self.name} is not ready after {timeout_s} s")

    @property
    def running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def signal(self, number: signal.Signals) -> None:
        assert self.popen is not None
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and gone."""
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()

    def terminate(self, timeout_s: float = 15.0) -> int:
        """SIGTERM; the exit status."""
        assert self.popen is not None
        self.wait_ready()
        self.popen.terminate()
        return self.popen.wait(timeout_s)

    def wait(self, timeout_s: float = 15.0) -> int:
        assert self.popen is not None
        return self.popen.wait(timeout_s)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def status(self, ssl: SSLContext | None = None) -> dict[str, Any]:
        return asyncio.run(status_of(self.address, ssl))


class Cluster:
    """Controllers, groups 1 … N, each of `replicas` processes, and coordinators if there are to be any."""

    def __init__(
        self,
        folder: Path,
        *,
        groups: int = 1,
        replicas: int = 3,
        controllers: int = 3,
        coordinators: int = 0,
        shards: int = 10,
        options: Sequence[str] = (),
        ssl: SSLContext | None = None,
        redis: str = "",
    ) -> None:
        """`options` are for all daemons; `ssl` is what this object dials them with; `redis` is the mode of the groups'
        Redis listeners, if they are to have any."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ssl = ssl
        self.redis = redis
        self.controllers: list[Process] = []
        self.groups: dict[int, list[Process]] = {}
        peers = [f"127.0.0.1:{free_port()}" for _ in range(controllers)]
        self.controller_addresses = tuple(peers)
        for number, address in enumerate(peers):
            arguments = [
                "controller", "--id", str(number), "--listen", address, "--peers", _peers(peers),
                "--shards", str(shards), *options,
            ]  # fmt: skip
            self.controllers.append(Process(f"controller-{number}", arguments, address, folder))
        for gid in range(1, groups + 1):
            self.add_group(gid, replicas, options)
        self.coordinators: list[Process] = []
        peers = [f"127.0.0.1:{free_port()}" for _ in range(coordinators)]
        for number, address in enumerate(peers):
            arguments = [
                "coordinator", "--id", str(number), "--listen", address, "--peers", _peers(peers),
                "--controllers", ",".join(self.controller_addresses), *options,
            ]  # fmt: skip
            self.coordinators.append(Process(f"coordinator-{number}", arguments, address, folder))

    def add_group(self, gid: int, replicas: int = 3, options: Sequence[str] = ()) -> list[Process]:
        peers = [f"127.0.0.1:{free_port()}" for _ in range(replicas)]
        processes = []
        for number, address in enumerate(peers):
            arguments = [
                "shardkv", "--gid", str(gid), "--id", str(number), "--listen", address, "--peers", _peers(peers),
                "--controllers", ",".join(self.controller_addresses), *options,
            ]  # fmt: skip
            process = Process(f"group{gid}-{number}", arguments, address, self.folder)
            if self.redis:
                process.redis_port = free_port()
                process.arguments += ["--redis-listen", f"127.0.0.1:{process.redis_port}", "--redis-mode", self.redis]
            processes.append(process)
        self.groups[gid] = processes
        return processes

    @property
    def processes(self) -> list[Process]:
        serving = [process for group in self.groups.values() for process in group]
        return [*self.controllers, *serving, *self.coordinators]

    def start(self, *, join: bool = True, environment: dict[str, str] | None = None) -> Cluster:
        """Start everything; with `join`, have all groups joined and serving, and the coordinators registered."""
        for process in self.processes:
            process.start(environment=environment)
        if join:
            with self.admin() as admin:
                admin.join({gid: [p.address for p in group] for gid, group in self.groups.items()})
            self.wait_serving()
            self.wait_registered()
        return self

    def wait_registered(self, timeout_s: float = 30.0) -> None:
        """Until the controllers know of the coordinators."""
        deadline_s = time.monotonic() + timeout_s
        while self.coordinators and not self.leader(0).status(self.ssl)["coordinators"]:
            assert time.monotonic() < deadline_s, "the coordinators are not registered"
            time.sleep(0.05)

    def wait_serving(self, timeout_s: float = 30.0) -> None:
        """Until every shard has answered a read."""
        with self.client(timeout_s=timeout_s) as client:
            for _ in client.scan(b"", limit=1):
                pass

    def admin(self, timeout_s: float = 30.0) -> SyncControllers:
        return SyncControllers(self.controller_addresses, timeout_s=timeout_s, ssl=self.ssl)

    def client(self, timeout_s: float = 30.0) -> SyncRaftKV:
        return SyncRaftKV(self.controller_addresses, timeout_s=timeout_s, ssl=self.ssl)

    def leader(self, gid: int, timeout_s: float = 15.0) -> Process:
        """The process that leads group `gid` (0: the controllers)."""
        return self.leader_of(self.groups[gid] if gid else self.controllers, f"group {gid}", timeout_s)

    def leader_of(self, processes: Sequence[Process], name: str, timeout_s: float = 15.0) -> Process:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for process in processes:
                if process.running:
                    try:
                        if process.status(self.ssl)["state"] == "leader":
                            return process
                    except (RaftKVError, OSError):
                        continue
            time.sleep(0.05)
        raise AssertionError(f"{name} has no leader after {timeout_s} s")

    def follower(self, gid: int) -> Process:
        leader = self.leader(gid)
        return next(p for p in (self.groups[gid] if gid else self.controllers) if p is not leader and p.running)

    def stop(self) -> None:
        for process in self.processes:
            if process.running:
                process.signal(signal.SIGCONT)
                process.kill()


@contextmanager
def running(cluster: Cluster, *, join: bool = True, environment: dict[str, str] | None = None) -> Iterator[Cluster]:
    """The cluster, started; its logs are printed if the test fails."""
    try:
        yield cluster.start(join=join, environment=environment)
    except BaseException:
        for process in cluster.processes:
            print(f"--- {process.name} (running: {process.running})\n{process.log()[-3000:]}")
        raise
    finally:
        cluster.stop()


async def status_of(address: str, ssl: SSLContext | None = None) -> dict[str, Any]:
    """What the daemon at `address` says of itself."""
    channel = await Channel.open(address, Hello.of_client(), ssl=ssl)
    try:
        report: dict[str, Any] = await channel.request(Verb.STATUS, [], timeout_s=3.0)
        return report
    finally:
        channel.close()


def _peers(addresses: Sequence[str]) -> str:
    return ",".join(f"{number}={address}" for number, address in enumerate(addresses))
