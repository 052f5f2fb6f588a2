"""The loading processes: starts them, lets them begin at once, and puts together what they say.

Whatever happens, none of them outlives this: they stop when their standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raftkv.bench.load import Ending
from raftkv.bench.plan import KEY_PREFIX, BadPlan, Plan, Series, Tally, add_series
from raftkv.bench.scenarios import World
from raftkv.client.tasks import gather_ordered
from raftkv.machines.shard_map import ShardMap

LINE_BYTES_MAX = 1 << 26
HEAD_START_S = 0.1
"""For the word to begin, to reach all processes before it is time."""
END_S = 2.0
"""So long a process may take to end after its standard input did."""
SHOW_S = 0.2
DELETES_AT_ONCE = 64
DELETES_BATCH = 1_024

Show = Callable[[str, float, float, str], None]
"""show(what is going on, how much of it is done, of how much, a text on it)"""


class LoadFailed(Exception):
    """A loading process failed, and there is nothing to report; str() is one line for people.

    `unavailable`: because the cluster didn't answer in time.
    """

    def __init__(self, text: str, *, unavailable: bool = False) -> None:
        super().__init__(text)
        self.unavailable = unavailable


class Stopped(Exception):
    """`stop` was called before anything was measured."""


@dataclass(frozen=True, slots=True)
class Measured:
    """All that the processes measured. `interrupted`: `stop` was called before the time was up."""

    plan: Plan
    shard_map: ShardMap
    series: Series
    ending: Ending
    interrupted: bool


class Run:
    """One measurement of `plan`, shown to `show` while it goes on."""

    def __init__(self, plan: Plan, show: Show) -> None:
        self._plan = plan
        self._show = show
        self._series: Series = {}
        self._ending = Ending()
        self._loaded: dict[int, int] = {}
        self._children: list[Process] = []
        self._stopped = False

    def stop(self, task: asyncio.Task[Any]) -> None:
        """End early: `measure`, which `task` runs, returns soon, or raises Stopped or CancelledError."""
        self._stopped = True
        if not self._children:
            task.cancel()
        for child in self._children:
            assert child.stdin is not None
            child.stdin.close()

    async def measure(self) -> Measured:
        """Raise BadPlan, LoadFailed, Stopped; RaftKVError if the cluster doesn't say what its groups are."""
        plan = self._plan
        async with plan.admin() as controllers:
            shard_map = await controllers.query()
        if not shard_map.groups:
            raise BadPlan("the cluster has no groups yet: add one with `raftkv-ctl Join GID:ADDR,…`")
        World(plan, shard_map.owners).check()
        try:
            for process in range(plan.processes):
                await self._start(process, shard_map.owners)
            await self._each(self._until_ready)
            start_s = time.monotonic() + HEAD_START_S
            for child in self._children:
                self._send(child, {"start_s": start_s})
            ticking = asyncio.get_running_loop().create_task(self._tick(start_s))
            try:
                await self._each(self._until_end)
            finally:
                ticking.cancel()
        finally:
            await asyncio.gather(*map(end, self._children))
        if self._ending.measured_s == 0:
            raise Stopped
        return Measured(plan, shard_map, self._series, self._ending, self._stopped)

    async def _each(self, follow: Callable[[int, Process], Any]) -> None:
        if self._stopped:
            raise Stopped
        followed = [follow(process, child) for process, child in enumerate(self._children)]
        await gather_ordered(followed, len(followed))

    async def _start(self, process: int, owners: Sequence[int]) -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # nothing from the directory of whoever measures
            "-m",
            "raftkv.bench.load",
            stdin=PIPE,
            stdout=PIPE,
            stderr=None if os.environ.get("RAFTKV_TRACEBACK") else subprocess.DEVNULL,
            limit=LINE_BYTES_MAX,
            start_new_session=True,  # the terminal's Ctrl-C is for this process
        )
        self._children.append(child)
        self._send(child, {"plan": asdict(self._plan), "process": process, "owners": list(owners)})

    def _send(self, child: Process, message: dict[str, Any]) -> None:
        assert child.stdin is not None
        if not child.stdin.is_closing():
            child.stdin.write(json.dumps(message).encode() + b"\n")

    async def _hear(self, process: int, child: Process) -> dict[str, Any]:
        """Its next message. Raise LoadFailed, Stopped."""
        assert child.stdout is not None
        line = await child.stdout.readline()
        if line:
            message: dict[str, Any] = json.loads(line)
            if "failed" in message:
                raise LoadFailed(message["failed"], unavailable=message["unavailable"])
            return message
        status = await child.wait()
        if self._stopped and status == 0:
            raise Stopped
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise LoadFailed(
            f"loading process {process + 1} of {self._plan.processes} (pid {child.pid}) {how}: "
            "what was measured is incomplete and not reported; run it again"
        )

    async def _until_ready(self, process: int, child: Process) -> None:
        while "ready" not in (message := await self._hear(process, child)):
            self._loaded[process] = message["loaded"]
            self._show("loading keys", sum(self._loaded.values()), self._plan.keys, "")

    async def _until_end(self, process: int, child: Process) -> None:
        while "end" not in (message := await self._hear(process, child)):
            kinds = {kind: Tally.decode(encoded) for kind, encoded in message["kinds"].items()}
            add_series(self._series, message["second"], kinds)
        self._ending.add(Ending.decode(message["end"]))

    async def _tick(self, start_s: float) -> None:
        plan = self._plan
        while True:
            now_s = time.monotonic() - start_s
            if now_s < plan.warmup_s:
                self._show("warming up", now_s, plan.warmup_s, "")
            else:
                self._show("measuring", min(now_s - plan.warmup_s, plan.duration_s), plan.duration_s, self._latest())
            await asyncio.sleep(SHOW_S)

    def _latest(self) -> str:
        """The last second that all processes have reported, in a few words."""
        if len(self._series) < 2:
            return ""
        tally = Tally()
        for kind in self._series[max(self._series) - (len(self._children) > 1)].values():
            tally.add(kind)
        p99_ns = tally.latency.percentile_ns(99)
        p99 = "" if p99_ns is None else f", p99 {p99_ns / 1e6:.1f} ms"
        bad = tally.requests - tally.done
        return f"{tally.done:,}/s{p99}" + (f", {bad:,} failed or unknown" if bad else "")


async def end(child: Process) -> None:
    """Let it end, or have it end; until it is gone.

    (Not by `child.kill`, which may reap it before asyncio does; then asyncio complains, and knows no exit status.)
    """
    assert child.stdin is not None
    child.stdin.close()
    try:
        async with asyncio.timeout(END_S):
            await child.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        await child.wait()


async def delete_keys(plan: Plan, show: Show) -> int:
    """Delete every key of every benchmark; how many there were. Raise RaftKVError."""
    deleted = 0
    async with plan.client() as kv:
        while True:
            keys = [key async for key, _ in kv.scan(KEY_PREFIX, limit=DELETES_BATCH)]
            if not keys:
                return deleted
            await gather_ordered([kv.delete(key) for key in keys], DELETES_AT_ONCE)
            deleted += len(keys)
            show("deleting keys", deleted, deleted + len(keys), "")
