"""The checks behind /readyz and `raftkv health`, on a replica in all the states in which it can't do its part."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from raftkv.daemons.readiness import Check, readiness
from raftkv.storage.errors import WriteStall
from tests.daemons.rig import Rig


def problems(rig: Rig, later_s: float = 0.0, config_num: int | None = None) -> dict[str, str]:
    now_s = asyncio.get_running_loop().time() + later_s
    checks = readiness(rig.replica, "", now_s, config_num)
    return {name: problem for name, problem in checks if problem is not None}


def test_before_the_group_is_formed() -> None:
    assert readiness(None, "1 at h:1, 2 at h:2", 0, 0) == [
        Check("formed", "the group is not formed yet; waits for 1 at h:1, 2 at h:2")
    ]


def test_a_replica_knows_a_leader_or_is_not_ready() -> None:
    async def run() -> None:
        rig = await Rig(voters=3).start()
        assert problems(rig) == {"leader": "no leader of the group is known"}
        await rig.lead()
        assert problems(rig) == {}
        assert problems(rig, config_num=0) == {"configuration": "no configuration is known yet"}
        assert problems(rig, config_num=7) == {}
        assert (rig.replica.leader_changes, rig.replica.failed) == (1, 0)

    asyncio.run(run())


def test_a_stalled_engine_makes_a_replica_fall_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        rig = await (await Rig().start()).lead()
        engine = rig.store.engine

        def stalled(*args: Any) -> None:
            raise WriteStall("data")

        with monkeypatch.context() as patch:
            patch.setattr(engine, "write", stalled)
            rig.put(1)
            await rig.until(lambda: rig.replica.behind_since_s is not None)
            assert rig.replica.pending == 1
            assert problems(rig) == {}  # for a moment it may be
            text = problems(rig, later_s=3)["applied"]
            assert f"up to {rig.replica.raft.commit_index} are committed" in text
            rig.put(2)
            assert rig.replica.failed == 1
        await rig.until(lambda: rig.replica.behind_since_s is None)
        assert problems(rig, later_s=3) == {}
        assert rig.replica.pending == 0
        assert [token for token, _ in rig.answers] == [2, 1]

    asyncio.run(run())


def test_a_snapshot_that_is_being_installed() -> None:
    async def run() -> None:
        rig = await (await Rig().start()).lead()
        rig.replica.snapshots.installing = True
        assert problems(rig) == {"applied": "a snapshot is being installed"}

    asyncio.run(run())


def test_commands_that_are_lost_with_the_leadership_are_counted() -> None:
    async def run() -> None:
        rig = await (await Rig(voters=3).start()).lead()
        rig.put(1)
        await rig.until(lambda: rig.replica.pending == 1)
        rig.replica.stop()
        assert (rig.replica.failed, rig.replica.pending) == (1, 0)

    asyncio.run(run())
