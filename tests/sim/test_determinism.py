"""One seed, one history: alone, in a series, and however Python hashes its strings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from raftkv.sim.run import run_seed
from raftkv.sim.scenario import load

pytestmark = pytest.mark.timeout(400)
SCENARIO = load("mix").with_seconds(8)
SEED = 7

ALONE = f"""
from raftkv.sim.run import run_seed
from tests.sim.test_determinism import SCENARIO
report = run_seed({SEED}, SCENARIO)
print(report.trace_hash, report.operations, report.faults)
"""


def in_a_process_of_its_own(hash_seed: int) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    ran = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def test_the_trace_is_the_same_alone_in_a_series_and_under_any_hash_seed() -> None:
    alone = [in_a_process_of_its_own(hash_seed) for hash_seed in (0, 4242)]
    series = [run_seed(seed, SCENARIO) for seed in (SEED - 1, SEED, SEED)]
    texts = [f"{report.trace_hash} {report.operations} {report.faults}" for report in series]
    assert alone[0] == alone[1] == texts[1] == texts[2]
    assert texts[0] != texts[1]


def test_the_history_is_the_same_too() -> None:
    first, second = (list(run_seed(SEED, SCENARIO).history.lines()) for _ in range(2))
    assert first == second
    assert len(first) > 50
