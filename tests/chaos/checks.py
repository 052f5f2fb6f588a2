"""What must hold after everything has healed; of the history, `raftkv.sim.check` is the judge.

Each function returns problems as text, an empty list if all is well, and measures rather than assumes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV
from raftkv.machines.coordinator import CoordinatorMachine
from raftkv.machines.kv import KvMachine
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import RaftKVError, WrongGroup
from raftkv.protocol.limits import SCAN_PAIRS_MAX
from raftkv.protocol.messages import FOLLOWER_OK, Hello, ReadOp, Verb
from raftkv.sim.check.tokens import show
from raftkv.sim.txn_invariants import decisions_differ, locks_left
from raftkv.storage.rocks import RocksEngine
from tests.chaos.cluster import ChaosCluster, Daemon
from tests.system.engines import engine_dir, misplaced

Content = dict[tuple[int, bytes], tuple[bytes, int]]
"""(shard, key) -> (value, version)"""


async def wait_moved(cluster: ChaosCluster, timeout_s: float) -> tuple[list[str], float]:
    """Until every replica has the latest map and serves what that gives it, and nothing is owed to anybody; and how
    long it took."""
    start_s = time.monotonic()
    async with Controllers(cluster.controller_addresses, timeout_s=timeout_s) as controllers:
        latest = await controllers.query()
    while True:
        problems: list[str] = []
        reports = await asyncio.gather(*(daemon.status_now(3.0) for daemon in cluster.data_daemons))
        for daemon, report in zip(cluster.data_daemons, reports, strict=True):
            if report is None or report["state"] == "unformed":
                problems.append(f"no status of {daemon.name}")
                continue
            wanted = [[shard, "serving"] for shard in latest.shards_of(report["gid"])]
            if report["config_num"] != latest.num or report["shards"] != wanted:
                problems.append(
                    f"{daemon.name} is at configuration {report['config_num']} of {latest.num} with {report['shards']} "
                    f"instead of {wanted}"
                )
            problems += [f"{daemon.name}: {row}" for row in report["migrations"]]
        took_s = time.monotonic() - start_s
        if not problems or took_s > timeout_s:
            return [f"not moved within {timeout_s:g} s: {text}" for text in problems], took_s
        await asyncio.sleep(0.2)


async def wait_settled(cluster: ChaosCluster, timeout_s: float) -> tuple[list[str], float]:
    """Until each group has one leader that all follow, and all have applied all there is; and how long it took."""
    start_s = time.monotonic()
    while True:
        problems: list[str] = []
        for gid, group in cluster.groups.items():
            reports = await asyncio.gather(*(daemon.status_now(3.0) for daemon in group))
            problems += _unsettled(gid, group, reports)
        took_s = time.monotonic() - start_s
        if not problems or took_s > timeout_s:
            return [f"not settled within {timeout_s:g} s: {text}" for text in problems], took_s
        await asyncio.sleep(0.2)


def _unsettled(gid: int, group: Sequence[Daemon], reports: Sequence[dict[str, Any] | None]) -> list[str]:
    silent = [daemon.name for daemon, report in zip(group, reports, strict=True) if report is None]
    if silent:
        return [f"no status of {', '.join(silent)}"]
    known = [report for report in reports if report is not None]
    leaders = [report["replica"] for report in known if report["state"] == "leader"]
    if len(leaders) != 1 or {report["leader"] for report in known} != set(leaders):
        return [f"group {gid}: leaders {leaders}, followed {[report['leader'] for report in known]}"]
    places = {(report["term"], report["last_index"], report["applied_index"]) for report in known}
    if len(places) != 1 or known[0]["last_index"] != known[0]["applied_index"]:
        return [f"group {gid}: (term, last index, applied index) are {sorted(places)}"]
    if gid >= 0 and len({report.get("config_num") for report in known}) != 1:  # of coordinators only the leader follows
        return [f"group {gid}: configurations {[report.get('config_num') for report in known]}"]
    return []


async def wait_unlocked(cluster: ChaosCluster, timeout_s: float) -> tuple[list[str], float]:
    """Until no replica of any group knows of a lock, and no coordinator of an open transaction; and how long it
    took."""
    start_s = time.monotonic()
    while True:
        problems: list[str] = []
        daemons = [*cluster.data_daemons, *cluster.coordinators]
        reports = await asyncio.gather(*(daemon.status_now(3.0) for daemon in daemons))
        for daemon, report in zip(daemons, reports, strict=True):
            if report is None:
                problems.append(f"no status of {daemon.name}")
            else:
                left = {name: report[name] for name in ("prepared", "explicit_locks", "open") if report.get(name)}
                problems += [f"{daemon.name} has {left}"] if left else []
        took_s = time.monotonic() - start_s
        if not problems or took_s > timeout_s:
            return [f"transactions are left after {timeout_s:g} s: {text}" for text in problems], took_s
        await asyncio.sleep(0.2)


async def wait_served(cluster: ChaosCluster, timeout_s: float) -> tuple[list[str], float]:
    """Until a new client has written and read a key in every shard; and how long it took."""
    start_s = time.monotonic()
    problems: list[str] = []

    async def one(kv: RaftKV, number: int) -> None:
        key = b"fresh-%d" % number
        try:
            await kv.put(key, b"%d" % number)
            found = await kv.get(key)
            if found is None or found.value != b"%d" % number:
                problems.append(f"{show(key)} reads {found} after it was written")
        except RaftKVError as error:
            problems.append(f"{show(key)} is not served: {error}")

    async with RaftKV(cluster.controller_addresses, timeout_s=timeout_s) as kv, asyncio.TaskGroup() as group:
        for number in range(4 * cluster.shards):
            group.create_task(one(kv, number))
    return problems, time.monotonic() - start_s


async def replicas_differ(cluster: ChaosCluster) -> tuple[list[str], int]:
    """Key for key, as each replica itself answers; and how many keys there are."""
    problems: list[str] = []
    served: list[int] = []
    keys = 0
    for gid, group in cluster.groups.items():
        if gid <= 0:
            continue
        contents = [await content_of(daemon, cluster.shards) for daemon in group]
        first_shards, first = contents[0]
        served += first_shards
        keys += len(first)
        for daemon, (shards, content) in zip(group[1:], contents[1:], strict=True):
            if shards != first_shards:
                problems.append(f"{group[0].name} serves shards {first_shards}, {daemon.name} {shards}")
            for place in sorted(first.keys() | content.keys()):
                if first.get(place) != content.get(place):
                    text = f"{group[0].name} {first.get(place)}, {daemon.name} {content.get(place)}"
                    problems.append(f"key {show(place[1])} of shard {place[0]}: {text}"[:500])
    if sorted(served) != list(range(cluster.shards)):
        problems.append(f"shards served: {sorted(served)}, not each of {cluster.shards} once")
    return problems[:20], keys


async def engines_differ(cluster: ChaosCluster, told: Mapping[bytes, bool]) -> tuple[list[str], int]:
    """Stop everything gracefully, and look into the engines: problems, and how many rows the shards have. `told`: by
    txid, whether a client heard that it is committed."""
    async with Controllers(cluster.controller_addresses, timeout_s=30.0) as controllers:
        latest = await controllers.query()
    await asyncio.gather(*(daemon.stop_gracefully() for daemon in [*cluster.data_daemons, *cluster.coordinators]))
    groups = {gid: [daemon.data_dir for daemon in group] for gid, group in cluster.groups.items() if gid > 0}
    problems, rows = await asyncio.to_thread(misplaced, groups, latest.owners)
    return problems + await asyncio.to_thread(_transactions_differ, cluster, told), rows


def _transactions_differ(cluster: ChaosCluster, told: Mapping[bytes, bool]) -> list[str]:
    """What the first replicas have recorded of transactions is compared with what clients were told, then what the
    second ones have, and so on."""
    problems: list[str] = []
    count = max(len(group) for group in cluster.groups.values())
    for number in range(count):
        with ExitStack() as stack:
            groups = []
            for gid, group in cluster.groups.items():
                if gid > 0:
                    engine = _engine_of(stack, group[number % len(group)])
                    machine = KvMachine(gid)
                    machine.load(engine)
                    groups.append((machine, engine))
            coordinator = None
            if cluster.coordinators:
                engine = _engine_of(stack, cluster.coordinators[number % len(cluster.coordinators)])
                coordinator = (CoordinatorMachine(), engine)
                coordinator[0].load(engine)
            left = locks_left([machine for machine, _ in groups], coordinator)
            found = [text for text in (decisions_differ(groups, coordinator, told), left) if text is not None]
            problems += [f"replicas {number} of all: {text}" for text in found]
    return problems


def _engine_of(stack: ExitStack, daemon: Daemon) -> RocksEngine:
    return stack.enter_context(closing(RocksEngine(str(engine_dir(daemon.data_dir)))))


async def content_of(daemon: Daemon, shards: int) -> tuple[list[int], Content]:
    """The shards that the replica serves, and what is in them, by its own reads."""
    content: Content = {}
    served: list[int] = []
    channel = await Channel.open(daemon.address, Hello.of_client(), timeout_s=10)
    try:
        for shard in range(shards):
            after: bytes | None = None
            more = True
            while more:
                body = [-1, FOLLOWER_OK, ReadOp.SCAN, shard, b"", after, SCAN_PAIRS_MAX, 1 << 20]
                try:
                    pairs, more = await channel.request(Verb.READ, body, timeout_s=30)
                except WrongGroup:
                    break
                if after is None:
                    served.append(shard)
                for key, value, version in pairs:
                    content[shard, key] = (value, version)
                    after = key
    finally:
        channel.close()
    return served, content


def bad_logs(cluster: ChaosCluster) -> list[str]:
    """Nothing that was done to a daemon is a reason for a traceback."""
    problems = []
    for daemon in cluster.daemons:
        log = daemon.log()
        for sign in ("Traceback", "bug in raftkv"):
            where = log.find(sign)
            if where >= 0:
                problems.append(f"{daemon.name} logs: {log[max(0, where - 300) : where + 2000]}")
                break
    return problems
