"""Each safety rule, switched off in the real daemons, is noticed: proof that the simulation can fail."""

from __future__ import annotations

import pytest

from raftkv.sim.run import Report, run_seed
from tests.sim import ablations
from tests.sim.ablations import FORGED_MAPS, Ablation, nothing_refused_before_the_log
from tests.sim.move_ablations import MOVE_ABLATIONS
from tests.sim.txn_ablations import TXN_ABLATIONS

ABLATIONS = ablations.ABLATIONS | MOVE_ABLATIONS | TXN_ABLATIONS

QUICK = ("vote not persisted", "leader counts itself before its fsync", "older-term entry committed by count")


def first_violation(ablation: Ablation) -> Report | None:
    for seed in range(1, ablation.seeds + 1):
        report = run_seed(seed, ablation.scenario)
        if not report.passed:
            return report
    return None


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=() if rule in QUICK else pytest.mark.long) for rule in ABLATIONS]
)
def test_is_noticed_when_switched_off(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ablation = ABLATIONS[rule]
    ablation.patch(monkeypatch)
    report = first_violation(ablation)
    assert report is not None, f"{ablation.seeds} seeds without this rule, and nothing was noticed"
    assert any(name in text for name in ablation.names for text in report.violations), report.violations


CONTROLS = {
    f"{ablation.scenario.name}, {ablation.beside.__name__}" if ablation.beside else ablation.scenario.name: ablation
    for ablation in ABLATIONS.values()
}


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_with_all_rules_the_same_scenarios_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    control = CONTROLS[name]
    if control.beside is not None:
        control.beside(monkeypatch)
    report = run_seed(1, control.scenario)
    assert report.passed, report.violations


def test_ownership_at_apply_is_enough_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_refused_before_the_log(monkeypatch)
    report = run_seed(1, FORGED_MAPS)
    assert report.passed, report.violations
    assert report.faults_by_kind["forged_map"] > 0
