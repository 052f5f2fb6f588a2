"""Scenarios of the simulator, read for real processes."""

from __future__ import annotations

import pytest

from raftkv.sim.nemesis import FAULTS
from raftkv.sim.scenario import load, names
from tests.chaos.faults import MAP, NETWORK, PROCESS
from tests.chaos.scenario import KINDS, plan_of


def test_every_name_is_a_fault_of_both() -> None:
    assert KINDS.keys() <= FAULTS.keys()
    assert {kind for kinds in KINDS.values() for kind in kinds} == {*PROCESS, *NETWORK, *MAP}


@pytest.mark.parametrize("name", names())
def test_every_scenario_can_be_read(name: str) -> None:
    scenario = load(name)
    plan, missing = plan_of(scenario, minutes=1, seed=7, each=2)
    assert (plan.minutes, plan.seed, plan.each) == (1, 7, 2)
    assert len(plan.replicas) + len(plan.spares) == scenario.cluster.groups
    assert plan.options[-1] == scenario.cluster.reads
    planned = {*plan.process, *plan.network, *plan.map_changes}
    for fault in scenario.nemesis.faults:
        assert (fault in missing) != any(kind in planned for kind in KINDS.get(fault, ()))
