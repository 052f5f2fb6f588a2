"""One seed, one run: safety phase with faults, then everything heals and must be well again, then the verdict."""

from __future__ import annotations

import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from raftkv.client.kv import RaftKV
from raftkv.raft.invariants import InvariantViolation
from raftkv.sim.check.history import History, Kind
from raftkv.sim.check.linearizability import check_linearizability
from raftkv.sim.check.transactions import check_transactions
from raftkv.sim.check.verdict import Verdict
from raftkv.sim.cluster import Cluster
from raftkv.sim.nemesis import Nemesis
from raftkv.sim.probes import Probes, listening
from raftkv.sim.process import ClientProcess
from raftkv.sim.scenario import Scenario
from raftkv.sim.scheduler import VirtualTimeStandsStill
from raftkv.sim.workload import read_all_transactions, read_everything

SLICE_S = 0.25
QUIET_TIMEOUT_S = 40.0
FINAL_READS_TIMEOUT_S = 60.0

Judge = Callable[[History], Verdict]


@dataclass
class Report:
    """What came of one seed. `verdict` is 'passed', 'violated' or 'undecided'; `violations` say what was wrong."""

    seed: int
    scenario: str
    trace_hash: str = ""
    operations: int = 0
    unknown: int = 0
    faults: int = 0
    faults_by_kind: dict[str, int] = field(default_factory=dict)
    virtual_seconds: float = 0.0
    real_seconds: float = 0.0
    """Of all, the check of the history (`checked_seconds`) included."""
    checked_seconds: float = 0.0
    cpu_seconds: float = 0.0
    verdict: str = "passed"
    violations: list[str] = field(default_factory=list)
    elections: int = 0
    crashes: int = 0
    snapshots_installed: int = 0
    longest_operation_s: float = 0.0
    healed_after_s: float | None = None
    probes: dict[str, int] = field(default_factory=dict)
    timeline: list[tuple[float, str]] = field(default_factory=list)
    history: History = field(default_factory=History)

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def check(history: History) -> Verdict:
    """Registers by themselves, transactions among each other: they have no key in common."""
    registers = [operation for operation in history.operations if operation.kind is not Kind.TXN]
    verdicts = [check_linearizability(registers)]
    if len(registers) < len(history.operations):
        verdicts.append(check_transactions(history))
    return Verdict.both(verdicts)


def run_seed(
    seed: int,
    scenario: Scenario,
    *,
    judge: Judge | None = check,
    show: Callable[[logging.LogRecord], None] | None = None,
    prepare: Callable[[Cluster], None] | None = None,
) -> Report:
    """Run a seed of a scenario. `judge` checks its history; `prepare` may change the cluster before it starts."""
    began, began_cpu = time.perf_counter(), time.process_time()
    probes = Probes()
    report = Report(seed, scenario.name)
    with _no_collections(), listening(probes, show):
        cluster = Cluster(str(seed), scenario, probes)
        if prepare is not None:
            prepare(cluster)
        run = _Run(cluster, report)
        try:
            run.all_phases()
        except (InvariantViolation, VirtualTimeStandsStill) as violation:
            cluster.violations.append(f"{type(violation).__name__}: {violation}")
        run.finish()
        _clear_away(cluster)
    checking = time.perf_counter()
    if judge is not None and not report.violations:
        verdict = judge(report.history)
        report.verdict = str(verdict.result)
        if not verdict.passed:
            report.violations.append(str(verdict))
    report.checked_seconds = time.perf_counter() - checking
    report.real_seconds = time.perf_counter() - began
    report.cpu_seconds = time.process_time() - began_cpu
    return report


class _Run:
    def __init__(self, cluster: Cluster, report: Report) -> None:
        self.cluster = cluster
        self.report = report
        self.scheduler = cluster.world.scheduler
        self.nemesis = Nemesis(cluster, cluster.scenario.nemesis)
        cluster.on_exit = self.nemesis.process_exited

    def all_phases(self) -> None:
        """Return early when something is violated: what comes after it says nothing."""
        cluster, scenario = self.cluster, self.cluster.scenario
        cluster.start()
        self.nemesis.start()
        self._until(scenario.virtual_seconds)
        self._wait(self._enough, 2 * scenario.virtual_seconds)
        if cluster.violations:
            return
        cluster.workload.stopping = True
        self.nemesis.heal()
        healed_at = self.scheduler.now
        for number, process in enumerate(cluster.workload.processes):
            if not process.running:
                cluster.workload.start(number)
        deadline = healed_at + scenario.liveness_seconds
        if not self._wait(lambda: cluster.trouble() is None, deadline):
            if not cluster.violations:
                cluster.violate(f"NotWell: {scenario.liveness_seconds:g} s after healing: {cluster.trouble()}")
            return
        self.report.healed_after_s = self.scheduler.now - healed_at
        if not self._wait(lambda: cluster.workload.quiet, self.scheduler.now + QUIET_TIMEOUT_S):
            if not cluster.violations:
                cluster.violate("NotWell: clients still wait for their last operations")
            return
        self._read_everything()
        if cluster.violations:
            return
        if not self._wait(lambda: cluster.trouble() is None, self.scheduler.now + scenario.liveness_seconds):
            cluster.violate(f"NotWell: replicas don't agree: {cluster.trouble()}")
            return
        for group in cluster.groups:
            difference = group.difference()
            if difference is not None:
                cluster.violate(f"ReplicasEqual: {group.name}: {difference}")
        difference = cluster.decisions_differ()
        if difference is not None:
            cluster.violate(f"DecisionNeverChanges: {difference}")
        left = cluster.left_behind()
        if left is not None:
            cluster.violate(f"NothingLeftBehind: {left}")

    def _enough(self) -> bool:
        """Whether the seed counts."""
        scenario = self.cluster.scenario
        return self.cluster.recorder.completed >= scenario.operations_min and self.nemesis.total >= scenario.faults_min

    def _read_everything(self) -> None:
        cluster = self.cluster
        process = ClientProcess(cluster.world, "final", cluster.failed)
        refused: list[str] = []
        done = False

        async def main() -> None:
            nonlocal done
            kv = RaftKV(cluster.controllers, rng=cluster.world.rng("final"))
            plan = cluster.scenario.workload
            refused.extend(await read_everything(kv, cluster.recorder, plan, process.host, cluster.workload.keys))
            if cluster.scenario.transactions.users:
                refused.extend(await read_all_transactions(kv, cluster.transactions, process.host))
            await kv.close()
            done = True

        process.launch(main)
        ended = self._wait(lambda: done, self.scheduler.now + FINAL_READS_TIMEOUT_S)
        if cluster.violations:
            return
        if not ended:
            cluster.violate("NotWell: fresh reads and writes are not answered")
        elif refused:
            cluster.violate(f"NotWell: {len(refused)} fresh operations were refused, first {refused[0]}")
        process.dispose()

    def _until(self, time_s: float) -> None:
        while self.scheduler.now < time_s and not self.cluster.violations:
            self.scheduler.run_until(min(time_s, self.scheduler.now + SLICE_S))

    def _wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        while self.scheduler.now < deadline and not self.cluster.violations:
            if condition():
                return True
            self._until(self.scheduler.now + SLICE_S)
        return condition() and not self.cluster.violations

    def finish(self) -> None:
        cluster, report = self.cluster, self.report
        recorder = cluster.recorder
        recorder.close()
        cluster.transactions.close()
        report.history = recorder.history
        for line in recorder.history.lines():
            self.scheduler.note(line.encode())
        report.trace_hash = self.scheduler.trace_hash
        report.operations = recorder.completed
        report.unknown = recorder.unknown
        report.longest_operation_s = recorder.longest_s
        report.faults_by_kind = dict(sorted(self.nemesis.counts.items()))
        report.faults = self.nemesis.total
        report.virtual_seconds = self.scheduler.now
        report.violations = list(cluster.violations)
        report.verdict = "violated" if cluster.violations else "passed"
        report.elections = cluster.elections
        report.crashes = sum(process.incarnation - 1 for process in cluster.daemons)
        report.probes = cluster.probes.hits
        report.snapshots_installed = cluster.probes.hits.get("snapshot installed", 0)
        report.timeline = sorted(self.nemesis.timeline + cluster.exits, key=lambda item: item[0])


def _clear_away(cluster: Cluster) -> None:
    """Let go of all that was simulated, in order, and in silence: coroutines that end unfinished complain."""
    complain, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of what they would still have awaited
            cluster.dispose()
            gc.collect()
    finally:
        sys.unraisablehook = complain


@contextmanager
def _no_collections() -> Iterator[None]:
    """Garbage is collected between runs only: a finaliser in the midst of one would come at a moment that
    depends on what was allocated before it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
