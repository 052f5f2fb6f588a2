"""Random schedules: 300 in every run, 12,000 longer ones in `make test-all`.

RAFTKV_SEED moves the range of seeds. A failure names its seed; that one again, alone:
`RAFTKV_SEED=<seed> pytest tests/raft/test_schedules.py -k one_seed`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest

from tests.raft.schedules import Schedule

BASE_SEED = int(os.environ.get("RAFTKV_SEED", "0"))
CHUNKS = 24
CHUNK_SEEDS = 500

PROBES = (
    "ReadReady",
    "ReadFailed",
    "MembershipChanged",
    "SnapshotComplete",
    "SnapshotReleased",
    "cut off",
    "deposed",
    "stepped down",
    "window full",
    "busy",
)
RARE_PROBES = (*PROBES, "TransferEnded", "install failed")


def run(seeds: range, record: Callable[[str, object], None], steps: int) -> Counter[str]:
    record("raft schedules", f"seeds {seeds.start}…{seeds.stop - 1} ({steps} steps each)")
    probes: Counter[str] = Counter()
    for seed in seeds:
        schedule = Schedule(seed, steps=steps)
        try:
            schedule.run()
        except Exception as error:
            error.add_note(f"seed {seed}, {steps} steps, at {schedule.cluster.now_ms} ms")
            raise
        probes.update(schedule.cluster.probes)
    return probes


def test_schedules(record_property: Callable[[str, object], None]) -> None:
    probes = run(range(BASE_SEED, BASE_SEED + 300), record_property, 50)
    # The schedules are worth something only if they get to the rare states.
    assert not [name for name in PROBES if not probes[name]], probes


def test_one_seed() -> None:
    Schedule(BASE_SEED).run()


def test_a_seed_is_one_history() -> None:
    def trace() -> list[str]:
        schedule = Schedule(BASE_SEED + 7)
        actions: list[str] = []
        schedule.cluster.observer = lambda server, action: actions.append(f"{server.replica} {action}")
        schedule.run()
        return actions

    first = trace()
    assert len(first) > 100 and first == trace()


@pytest.mark.long
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_many_schedules(chunk: int, record_property: Callable[[str, object], None]) -> None:
    start = BASE_SEED + 1_000_000 + chunk * CHUNK_SEEDS
    probes = run(range(start, start + CHUNK_SEEDS), record_property, 90)
    assert not [name for name in RARE_PROBES if not probes[name]], probes
