"""Replicas that apply the same log are equal, row for row, whatever happened to each in between."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raftkv.machines import sessions
from raftkv.machines.machine import SessionedMachine
from raftkv.storage.disk import OsDisk
from raftkv.storage.engine import Overlay, StorageEngine
from raftkv.storage.memory import MemoryEngine
from raftkv.storage.rocks import RocksEngine
from tests.machines.streams import (
    controller_entries,
    coordinator_entries,
    digest,
    kv_entries,
    new_controllers,
    new_coordinators,
    new_kv,
)
from tests.machines.support import Replica

STREAMS: dict[str, tuple[Any, Any]] = {
    "kv": (new_kv, kv_entries),
    "controllers": (new_controllers, controller_entries),
    "coordinators": (new_coordinators, coordinator_entries),
}


def reload(replica: Replica[Any], make: Any) -> None:
    """Go on with a new machine on a copy of the rows, as after a restart or a snapshot install."""
    replica.machine = make(cache_weight=random.Random(len(replica.engine.rows)).choice([1, 5, 8192])).machine
    replica.machine.load(replica.engine)


@pytest.mark.parametrize("role", STREAMS)
@pytest.mark.parametrize("seed", range(12))
def test_reloaded_replicas_stay_equal(role: str, seed: int) -> None:
    make, stream = STREAMS[role]
    rng = random.Random(seed)
    steady: Replica[Any] = make()
    replicas = [make(), make(cache_weight=1), make(cache_weight=20)]
    for entry in stream(seed, 250):
        results = steady.apply(entry)
        for number, replica in enumerate(replicas):
            commands = replica.machine.decode(entry.data) if number else None
            assert replica.apply(entry, commands) == results
            if rng.random() < 0.1:
                reload(replica, make)
    for replica in replicas:
        assert replica.engine.rows == steady.engine.rows
        assert replica.machine.map_time_ms == steady.machine.map_time_ms
        assert replica.machine.sweep_pending == steady.machine.sweep_pending


def test_with_tight_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds so small that sessions are full and sweeps stop in the middle: replicas stay equal."""
    monkeypatch.setattr(sessions, "SESSION_REPLIES_MAX", 3)
    monkeypatch.setattr(sessions, "SESSION_REPLY_BYTES_MAX", 60)
    monkeypatch.setattr(sessions.SessionTable.sweep, "__defaults__", (2,))
    busy = pending = 0
    for seed in range(10):
        rng = random.Random(seed)
        steady, reloaded = new_kv(), new_kv(cache_weight=3)
        for entry in kv_entries(seed, 200):
            results = steady.apply(entry)
            assert reloaded.apply(entry) == results
            assert reloaded.engine.rows == steady.engine.rows
            assert reloaded.machine.sweep_pending == steady.machine.sweep_pending
            busy += sum(result[0] == 6 for result in results)
            pending += steady.machine.sweep_pending
            if rng.random() < 0.1:
                reload(reloaded, new_kv)
    assert busy > 20
    assert pending > 100


def test_a_stream_reaches_what_it_is_meant_to_reach() -> None:
    """Every kind of answer comes up, so the equality above means something."""
    codes: Counter[int] = Counter()
    for role in STREAMS:
        make, stream = STREAMS[role]
        for seed in range(4):
            replica = make()
            for entry in stream(seed, 250):
                codes.update(result[0] for result in replica.apply(entry))
    expected = {0, 2, 8, 9, 12, 13, 18, 19, 20, 27, 29}
    assert set(codes) >= {*expected, 28}, codes
    assert min(codes[code] for code in expected) >= 5, codes


@pytest.mark.parametrize("role", STREAMS)
def test_every_engine_ends_with_the_same_rows(role: str, tmp_path: Path) -> None:
    make, stream = STREAMS[role]
    model: Replica[SessionedMachine] = make()

    async def run() -> None:
        engines: list[StorageEngine] = [
            MemoryEngine(OsDisk(), str(tmp_path / "memory")),
            RocksEngine(str(tmp_path / "rocks")),
        ]
        machines = [make().machine for _ in engines]
        for machine, engine in zip(machines, engines, strict=True):
            machine.load(engine)
        for entry in stream(99, 150):
            results = model.apply(entry)
            for machine, engine in zip(machines, engines, strict=True):
                view = Overlay(engine)
                assert machine.apply(view, entry) == results
                engine.write(view.changes, view.range_deletes)
        for engine in engines:
            assert dict(engine.scan(b"\x00", b"\xff")) == model.engine.rows
            engine.close()

    asyncio.run(run())


def test_hash_seeds_make_no_difference() -> None:
    expected = digest(7)
    for hash_seed in ("1", "4242"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.machines.streams", "7"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


@pytest.mark.long
@pytest.mark.parametrize("role", STREAMS)
def test_many_streams(role: str) -> None:
    make, stream = STREAMS[role]
    for seed in range(1000, 1150):
        rng = random.Random(seed)
        steady, reloaded = make(), make(cache_weight=rng.choice([1, 3, 8192]))
        for entry in stream(seed, 200):
            assert reloaded.apply(entry) == steady.apply(entry), seed
            if rng.random() < 0.2:
                reload(reloaded, make)
        assert reloaded.engine.rows == steady.engine.rows, seed
