"""The short chaos of `make test-all`. The seed is printed; RAFTKV_CHAOS_SEED repeats one.

A seed draws the faults and the load; when they meet what is up to the machine, so it repeats a run only roughly.
Without root there is no small disk to fill: the report says that this fault was skipped, and why.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from tests.chaos.faults import MAP, NETWORK, PROCESS
from tests.chaos.run import Plan, run


@pytest.mark.long
@pytest.mark.timeout(1_500)
def test_short_chaos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("RAFTKV_CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))
    plan = Plan(minutes=3.0, seed=seed, each=2)
    lines: list[str] = []
    report = asyncio.run(run(plan, lines.append, tmp_path / "chaos"))
    with capsys.disabled():
        print(f"\n{report}")
    assert not report.problems, "\n".join([*lines, str(report)])
    assert report.operations >= 1_000
    assert report.committed >= 100
    for kind in PROCESS:
        if kind != "full_disk" or not report.full_disk_skipped:
            assert report.faults[kind] >= 2, kind
    assert all(report.faults[kind] for kind in NETWORK)
    assert all(report.faults[kind] >= 2 for kind in MAP)
