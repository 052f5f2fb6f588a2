"""One chaos run: start, load and faults, heal, liveness, checkers, figures.

`run` never raises for what it finds: that is in `Report.problems`. Whatever happens, all processes are gone when
it returns, and so is the small disk. The folder with history and logs stays if there were problems or it was given.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raftkv.client.kv import RaftKV
from raftkv.sim.check.appends import check_appends
from raftkv.sim.check.history import History, Kind, Status
from raftkv.sim.check.linearizability import check_linearizability
from raftkv.sim.check.transactions import check_transactions
from raftkv.sim.scenario import TxnPlan
from raftkv.sim.txn_workload import TxnRecorder
from raftkv.sim.workload import read_all_transactions
from tests.chaos import checks
from tests.chaos.cluster import ChaosCluster
from tests.chaos.faults import (
    MAP,
    NEED_COORDINATORS,
    NETWORK,
    PROCESS,
    Fault,
    Scene,
    mount_small_disk,
    unmount_small_disk,
)
from tests.chaos.nemesis import AFTERMATH_S, Event, Nemesis, Track
from tests.chaos.proxy import Network
from tests.chaos.workload import Ballast, Recorder, Wait, Workload, visit_all

SMALL_DISK_MB = 64
SETTLE_TIMEOUT_S = 60.0
SERVED_TIMEOUT_S = 30.0
UNLOCKED_TIMEOUT_S = 30.0
"""Whoever gave up a transaction may have left locks, which last for seconds, and then are resolved."""
LIST_ELEMENTS = 100
"""Lists of transactions that are longer would be most of the history."""
WAIT_S_MAX = 120.0
"""No user may wait longer for an answer, whatever goes wrong meanwhile: faults last 10 s, and restarts under load."""
WATCH_S = 0.3
MOVE_BYTES_PER_S = 400_000
"""A shard with its part of the ballast takes a second or two: so faults meet it on its way."""
MOVED_TIMEOUT_S = 120.0
OPTIONS = ("--snapshot-entries", "400", "--snapshot-bytes", "100000")
"""Logs so short that a replica that was away for a while needs a snapshot."""
CHECK_DEADLINE_S = 900.0


@dataclass(frozen=True)
class Plan:
    """`each`: every process fault happens so often at least, so the run may last longer than `minutes`.

    `process`, `network` and `map_changes` name the faults; each may be empty. `spares` are the sizes of groups that are
    not in the map at the start. There are transactions if `transactions` has users; they need `coordinators`.
    """

    minutes: float = 3.0
    seed: int = 1
    each: int = 2
    replicas: Sequence[int] = (3, 3)
    spares: Sequence[int] = (3,)
    coordinators: int = 3
    transactions: TxnPlan = field(default_factory=lambda: TxnPlan(users=2, elements=LIST_ELEMENTS))
    shards: int = 10
    clients: int = 4
    users: int = 3
    think_s: float = 0.05
    options: Sequence[str] = OPTIONS
    move_bytes_per_s: int = MOVE_BYTES_PER_S
    process: Sequence[str] = tuple(PROCESS)
    network: Sequence[str] = tuple(NETWORK)
    map_changes: Sequence[str] = tuple(MAP)


@dataclass
class Report:
    """What happened, and `problems`: empty if the run is clean."""

    seed: int
    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    operations: int = 0
    committed: int = 0
    """Transactions."""
    faults: Counter[str] = field(default_factory=Counter)
    full_disk_skipped: str = ""

    def __str__(self) -> str:
        verdict = f"FAILED, {len(self.problems)} problems" if self.problems else "clean"
        return "\n".join([*self.lines, f"seed {self.seed}: {verdict}", *self.problems])


async def run(plan: Plan, say: Callable[[str], None] = print, folder: Path | None = None) -> Report:
    """Do it all. `say` gets the progress, a line at a time."""
    report = Report(plan.seed)
    rng = random.Random(plan.seed)
    given, folder = folder, folder if folder is not None else Path(tempfile.mkdtemp(prefix="raftkv-chaos-"))
    say(f"chaos: seed {plan.seed}, {plan.minutes:g} minutes, data and logs in {folder}")
    network = Network(random.Random(rng.getrandbits(64)))
    cluster = ChaosCluster(
        folder,
        network,
        replicas=plan.replicas,
        spares=plan.spares,
        coordinators=plan.coordinators,
        shards=plan.shards,
        options=plan.options,
        group_options=["--move-bytes-per-s", str(plan.move_bytes_per_s)],
    )
    scene = Scene(cluster, network, random.Random(rng.getrandbits(64)))
    nemesis = Nemesis(scene, random.Random(rng.getrandbits(64)), say)
    recorder = Recorder()
    transactions = TxnRecorder(recorder, plan.transactions, report.problems.append)
    small = cluster.groups[max(cluster.groups)][-1]
    report.full_disk_skipped = mount_small_disk(small, SMALL_DISK_MB)
    scene.full_disk_victim = None if report.full_disk_skipped else small
    complaints: Counter[str] = Counter()
    asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.update([_complaint(about)]))
    start_s = time.monotonic()
    try:
        await cluster.start()
        ballast = Ballast(cluster.controller_addresses, random.Random(rng.getrandbits(64)))
        await ballast.load()
        say(f"started {len(cluster.daemons)} daemons and loaded them in {time.monotonic() - start_s:.1f} s")
        start_s = time.monotonic()
        await _safety(plan, scene, nemesis, recorder, transactions, rng)
        took_s = time.monotonic() - start_s
        report.lines.append(f"{len(cluster.daemons)} daemons, {took_s / 60:.1f} minutes of load and faults")
        report.lines += await _liveness(scene, recorder, transactions, ballast, report, say)
        report.lines.append(_elections(cluster))
    except (Exception, ExceptionGroup) as error:
        report.problems += _texts(error)
    finally:
        try:
            cluster.stop()
            await network.close()
        finally:  # also when a signal comes in between
            if scene.full_disk_victim is not None:
                unmount_small_disk(scene.full_disk_victim)
    transactions.close()
    recorder.history.header.update(seed=plan.seed, faults=[f"{e.start_ns} {e.kind}: {e.text}" for e in nemesis.events])
    recorder.history.write(folder / "history.jsonl")
    report.problems += checks.bad_logs(cluster)
    report.operations = len(recorder.history)
    report.committed = sum(count for (_, status), count in transactions.outcomes.items() if status is Status.OK)
    report.faults = nemesis.counts
    report.lines += verdict_lines(recorder, report, say)
    report.lines += transaction_lines(recorder, transactions)
    report.lines.append(f"connections and pieces: {dict(sorted(network.counts.items()))}")
    report.lines += stalls(recorder.waits, nemesis.events)
    if complaints:
        report.lines.append(f"exceptions of the clients or the proxy that nobody heard: {_counts(complaints)}")
    if report.full_disk_skipped:
        report.lines.append(f"full_disk skipped: {report.full_disk_skipped}")
    longest_s = max((wait.seconds for wait in recorder.waits), default=0.0)
    if longest_s > WAIT_S_MAX:
        report.problems.append(f"a client waited {longest_s:.1f} s for an answer")
    if given is None and not report.problems:
        shutil.rmtree(folder, ignore_errors=True)
    return report


async def _safety(
    plan: Plan,
    scene: Scene,
    nemesis: Nemesis,
    recorder: Recorder,
    transactions: TxnRecorder,
    rng: random.Random,
) -> None:
    """Load and faults at once, then no faults any more. Raise what a fault or the watch found."""
    cluster = scene.cluster
    workload = Workload(
        cluster.controller_addresses,
        recorder,
        transactions,
        random.Random(rng.getrandbits(64)),
        clients=plan.clients,
        users=plan.users,
        think_s=plan.think_s,
    )
    missing = set() if cluster.coordinators else {*NEED_COORDINATORS}
    if scene.full_disk_victim is None:
        missing.add("full_disk")

    def chosen(faults: Mapping[str, Fault], kinds: Sequence[str]) -> dict[str, Fault]:
        return {kind: faults[kind] for kind in kinds if kind not in missing}

    plan_of_faults = [
        Track(chosen(PROCESS, plan.process), plan.each, (0.5, 3.0)),
        Track(chosen(NETWORK, plan.network), 1, (0.5, 6.0)),
        Track(chosen(MAP, plan.map_changes), plan.each, (0.2, 3.0)),
    ]
    work = asyncio.create_task(workload.run())
    watch = asyncio.create_task(_watch(cluster))
    try:
        tracks = asyncio.ensure_future(nemesis.run(plan_of_faults, 60 * plan.minutes))
        everything: list[asyncio.Future[Any]] = [tracks, work, watch]
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        for ended in everything:
            if ended.done():
                ended.result()
        assert tracks.done(), "the clients ended too early"
    finally:
        tracks.cancel()
        await asyncio.gather(tracks, return_exceptions=True)
        scene.network.heal()
        for daemon in cluster.daemons:
            daemon.resume()
        watch.cancel()
        workload.stop.set()
        await asyncio.gather(watch, return_exceptions=True)
        await work


async def _watch(cluster: ChaosCluster) -> None:
    """Raise AssertionError when a daemon ends that nobody has told to."""
    while True:
        for daemon in cluster.daemons:
            if daemon.wanted and not daemon.running:
                assert daemon.popen is not None
                log = daemon.log_of_this_start()[-3000:]
                raise AssertionError(f"{daemon.name} ended by itself, status {daemon.popen.returncode}: {log}")
        await asyncio.sleep(WATCH_S)


async def _liveness(
    scene: Scene,
    recorder: Recorder,
    transactions: TxnRecorder,
    ballast: Ballast,
    report: Report,
    say: Callable[[str], None],
) -> list[str]:
    """A last blow to everything at once; then it must be well again, without help."""
    cluster = scene.cluster
    say(f"everything heals, after a last {await PROCESS['kill_all'](scene)}")
    problems, served_s = await checks.wait_served(cluster, SERVED_TIMEOUT_S)
    report.problems += problems
    problems, moved_s = await checks.wait_moved(cluster, MOVED_TIMEOUT_S)
    report.problems += problems
    problems, unlocked_s = await checks.wait_unlocked(cluster, UNLOCKED_TIMEOUT_S)
    report.problems += problems
    unserved = await visit_all(cluster.controller_addresses, recorder, SERVED_TIMEOUT_S)
    if transactions.plan.users:
        async with RaftKV(cluster.controller_addresses, timeout_s=SERVED_TIMEOUT_S) as kv:
            unserved += await read_all_transactions(kv, transactions, "final")
    report.problems += [f"not served after healing: {what}" for what in unserved[:10]]
    report.problems += await ballast.lost()
    problems, settled_s = await checks.wait_settled(cluster, SETTLE_TIMEOUT_S)
    report.problems += problems
    problems, keys = await checks.replicas_differ(cluster)
    report.problems += problems
    problems, rows = await checks.engines_differ(cluster, transactions.told)
    report.problems += problems
    return [
        f"after the last restart: all shards read and written after {served_s:.1f} s, every shard at its "
        f"owner {moved_s:.1f} s later, no lock and no open transaction left {unlocked_s:.1f} s after that, "
        f"replicas equal in index {settled_s:.1f} s after the last write, and in all "
        f"{keys} keys",
        f"after a graceful stop of all: each shard's rows ({rows} in all) in the engines of one group, the outcomes of "
        f"{len(transactions.told)} transactions in no engine other than their clients were told",
    ]


def _elections(cluster: ChaosCluster) -> str:
    """From the logs, which outlive the processes."""
    logs = [daemon.log() for daemon in cluster.daemons]
    starts = sum(log.count(" is ready on ") for log in logs)
    won = sum(log.count(": leader in term ") for log in logs)
    installed = sum(len(re.findall(r"snapshot at index \d+ is installed", log)) for log in logs)
    arrived = sum(log.count(" has arrived from group ") for log in logs)
    dropped = sum(len(re.findall(r": the copy of shard \d+ from group \d+ ends", log)) for log in logs)
    return (
        f"daemons became ready {starts} times, {won} elections were won, {installed} snapshots installed; shards "
        f"arrived {arrived} times, and {dropped} copies of one were given up"
    )


def verdict_lines(recorder: Recorder, report: Report, say: Callable[[str], None]) -> list[str]:
    """The history's verdicts, as lines of the report; those that aren't passes are its problems too."""
    history = recorder.history
    say(f"checking {len(history)} operations")
    start_s = time.monotonic()
    plain = History({}, [operation for operation in history.operations if operation.kind is not Kind.TXN])
    linearizability = check_linearizability(plain, deadline_s=CHECK_DEADLINE_S)
    appends = check_appends(plain)
    strict = check_transactions(history)
    verdicts = {"linearizability": linearizability, "unique appends": appends, "strict serializability": strict}
    for name, verdict in verdicts.items():
        if not verdict.passed:
            report.problems.append(f"{name} {verdict}"[:20_000])
    kinds = Counter(str(operation.kind) for operation in history.operations)
    return [
        f"{len(history)} operations on {len(recorder.keys)} keys: {_counts(kinds)}; {_counts(recorder.outcomes)}",
        f"errors that clients got: {_counts(recorder.errors) or 'none'}",
        f"linearizability {linearizability.result}: {linearizability.operations} operations; "
        f"unique appends {appends.result}: {appends.operations} operations; strict serializability of lists "
        f"{strict.result}: {strict.operations} transactions; in {time.monotonic() - start_s:.1f} s",
    ]


def transaction_lines(recorder: Recorder, transactions: TxnRecorder) -> list[str]:
    """How many transactions of each kind ended how; no lines if there were none."""
    outcomes = transactions.outcomes
    if not outcomes:
        return []
    words = {Status.OK: "committed", Status.FAIL: "aborted", Status.UNKNOWN: "unknown"}

    def counted(kinds: Sequence[str]) -> str:
        return " / ".join(str(sum(outcomes[kind, status] for kind in kinds)) for status in words)

    kinds = sorted({kind for kind, _ in outcomes})
    by_kind = ", ".join(f"{kind} {counted([kind])}" for kind in kinds)
    return [
        f"transactions ({' / '.join(words.values())}): {counted(kinds)}; {by_kind}; "
        f"{len(transactions.full) + len(transactions.lists)} lists",
        f"transactions met: {_counts(Counter(recorder.probes.hits))}",
    ]


def stalls(waits: Sequence[Wait], events: Sequence[Event]) -> list[str]:
    """A table: of each kind of fault how often, how long at most, and the longest wait that met it.

    `alone`: of the waits that met faults of no other kind.
    """
    longest: dict[str, float] = {}
    alone: dict[str, float] = {}
    calm_s = 0.0
    aftermath_ns = int(AFTERMATH_S * 1e9)
    for wait in waits:
        met = {e.kind for e in events if e.start_ns <= wait.end_ns and wait.start_ns <= e.end_ns + aftermath_ns}
        for kind in met:
            longest[kind] = max(longest.get(kind, 0.0), wait.seconds)
        if len(met) == 1:
            kind = next(iter(met))
            alone[kind] = max(alone.get(kind, 0.0), wait.seconds)
        if not met:
            calm_s = max(calm_s, wait.seconds)
    counts = Counter(event.kind for event in events)
    lines = [f"{'fault':<24}{'times':>6}{'longest s':>11}{'stall s':>9}{'alone s':>9}"]
    for kind in sorted(counts):
        lasted_s = max((e.end_ns - e.start_ns) / 1e9 for e in events if e.kind == kind)
        only = f"{alone[kind]:9.1f}" if kind in alone else f"{'-':>9}"
        lines.append(f"{kind:<24}{counts[kind]:>6}{lasted_s:>11.1f}{longest.get(kind, 0.0):>9.1f}{only}")
    lines.append(f"{'(none)':<24}{'':>6}{'':>11}{calm_s:>9.1f}{calm_s:>9.1f}")
    return lines


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


def _complaint(about: dict[str, Any]) -> str:
    return f"{about.get('message')}: {about.get('exception')!r}"


def _texts(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [text for inner in error.exceptions for text in _texts(inner)]
    return [f"{type(error).__name__}: {error}"]
