"""A replica that comes back is a part of its group again as soon as it listens, however long it was away."""

from __future__ import annotations

import pytest

from raftkv.protocol.peer_link import BACKOFF_S_MAX, PeerLink
from raftkv.sim.process import DaemonProcess
from tests.acceptance.kv_rig import Rig

AWAY_S = 5.0
SEEDS = 6


def applied_index(process: DaemonProcess) -> int:
    assert process.daemon is not None and process.daemon.replica is not None
    return process.daemon.replica.applied_index


def rejoined_after_s(seed: int) -> float:
    """How long a follower that was away needs to have what was written meanwhile."""
    with Rig(3, seed) as rig:
        leader = rig.leader()
        follower = next(process for process in rig.servers if process is not leader)
        clerk = rig.clerk()
        clerk.do(clerk.append(b"key", b"1"))
        follower.kill()
        rig.sleep(AWAY_S)
        clerk.do(clerk.append(b"key", b"2"))
        written = applied_index(leader)
        began_s = rig.now
        rig.start(follower)
        rig.wait_until(lambda: rig.is_up(follower) and applied_index(follower) >= written, "catching up")
        assert rig.leader() is leader
        return rig.now - began_s


def test_its_leader_dials_it_at_once() -> None:
    assert max(rejoined_after_s(seed) for seed in range(SEEDS)) < BACKOFF_S_MAX / 4


def test_its_leader_would_dial_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what it hears from it."""
    monkeypatch.setattr(PeerLink, "hurry", lambda link: None)
    assert max(rejoined_after_s(seed) for seed in range(SEEDS)) > BACKOFF_S_MAX / 4
