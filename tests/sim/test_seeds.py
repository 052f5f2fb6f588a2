"""Seeds of every scenario, as far as the time of a test suite goes; `python -m raftkv.sim` runs as many as wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raftkv.sim.main import explanation
from raftkv.sim.run import Report, run_seed
from raftkv.sim.scenario import load, names

QUICK_SEEDS = {"mix": 1, "crashes": 1, "network": 1, "disks": 1, "resharding": 1}
LONG_SEEDS = {"mix": 15, "overload": 2, "resharding": 12, "transactions": 8}
LONG_SEEDS_OTHERWISE = 5


def check(name: str, seed: int) -> Report:
    report = run_seed(seed, load(name))
    assert report.passed, explanation(report, name, None)
    return report


QUICK = [(name, seed) for name, count in QUICK_SEEDS.items() for seed in range(count)]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("name", "seed"), QUICK)
def test_quick_seeds_pass(name: str, seed: int) -> None:
    check(name, seed)


@pytest.mark.timeout(400)
def test_a_counted_seed_has_what_it_takes() -> None:
    report = check("mix", 11)
    assert report.virtual_seconds >= 60
    assert report.operations >= 1000
    assert report.faults >= 20
    assert report.elections > 3
    assert report.crashes > 0
    assert report.virtual_seconds / report.cpu_seconds >= 5


def test_without_faults_hardly_anything_fails() -> None:
    report = check("calm", 3)
    assert report.faults == 0
    assert report.crashes == 0
    assert report.longest_operation_s < 3, "the groups' start included"


@pytest.mark.timeout(400)
def test_coordinators_are_there_if_a_scenario_says_so() -> None:
    """They are hurt like everybody, and come back like everybody; the clients of this one don't ask them anything."""
    scenario = load("mix").with_seconds(15)
    scenario = replace(scenario, operations_min=0, faults_min=0, cluster=replace(scenario.cluster, coordinators=3))
    first, second = (run_seed(3, scenario) for _ in range(2))
    assert first.passed, first.violations
    assert first.trace_hash == second.trace_hash


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", names())
def test_more_seeds_pass(name: str) -> None:
    for seed in range(1000, 1000 + LONG_SEEDS.get(name, LONG_SEEDS_OTHERWISE)):
        check(name, seed)
