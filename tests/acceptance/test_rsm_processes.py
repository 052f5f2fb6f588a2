"""The replicated-state-machine scenarios of the course (2025) on real processes: part of `make soak`.

The scenarios are those of test_rsm. What is in flight when servers end is in flight because they can't reach each
other; what a replica has applied is what it itself answers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance import test_rsm as scenarios
from tests.acceptance.real_rig import RealRig

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

Record = Callable[[str, object], None]


def test_basic_4a(tmp_path: Path) -> None:
    with RealRig(3, tmp_path) as rig:
        scenarios.basic(rig)


def test_concurrent_4a(tmp_path: Path) -> None:
    with RealRig(3, tmp_path) as rig:
        scenarios.concurrent(rig)


def test_leader_failure_4a(tmp_path: Path) -> None:
    with RealRig(3, tmp_path) as rig:
        scenarios.leader_failure(rig)


def test_leader_partition_4a(tmp_path: Path, record_property: Record) -> None:
    with RealRig(3, tmp_path) as rig:
        scenarios.leader_partition(rig, record_property)


def test_restart_replay_4a(tmp_path: Path, record_property: Record) -> None:
    with RealRig(3, tmp_path) as rig:
        scenarios.restart_replay(rig, record_property)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_shutdown_4a(end: str, tmp_path: Path, record_property: Record) -> None:
    with RealRig(3, tmp_path) as rig:
        scenarios.shutdown(rig, end, record_property)


def test_restart_submit_4a(tmp_path: Path) -> None:
    with RealRig(3, tmp_path) as rig:
        scenarios.restart_submit(rig)


def test_waiters_of_a_lost_leader_4a(tmp_path: Path) -> None:
    with RealRig(3, tmp_path) as rig:
        scenarios.waiters_of_a_lost_leader(rig)


def test_snapshot_4c(tmp_path: Path, record_property: Record) -> None:
    with RealRig(3, tmp_path, max_raft_state=1000) as rig:
        scenarios.snapshot(rig, record_property)
