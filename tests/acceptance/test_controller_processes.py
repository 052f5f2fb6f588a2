"""The controller scenarios of the course on three real controllers: part of `make soak`.

The scenarios are those of test_controller. No group runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.acceptance import test_controller as scenarios
from tests.acceptance.real_rig import RealRig
from tests.acceptance.test_controller import Administered
from tests.chaos.cluster import Daemon

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]
both_networks = pytest.mark.parametrize("unreliable", [False, True], ids=["reliable", "unreliable"])

TEN = tuple(range(1, 11))

Record = Callable[[str, object], None]


class RealControllersRig(Administered[Daemon], RealRig):
    """Three controllers, and an administrator."""

    def __init__(self, folder: Path, *, shards: int = 10, unreliable: bool = False) -> None:
        super().__init__(0, folder, unreliable=unreliable, controllers=3, shards=shards)

    def __enter__(self) -> RealControllersRig:
        super().__enter__()
        try:
            self.await_cluster()
        except BaseException:
            self._dispose()
            raise
        return self


@pytest.mark.parametrize("shards", [10, 12])
def test_basic_leave_join(shards: int, tmp_path: Path) -> None:
    with RealControllersRig(tmp_path, shards=shards) as rig:
        scenarios.basic_leave_join(rig)


def test_basic_historical_queries(tmp_path: Path) -> None:
    """Each server is killed in turn."""
    with RealControllersRig(tmp_path) as rig:
        changes = [
            partial(rig.join_gids, *TEN),
            partial(rig.join_gids, 11),
            partial(rig.join_gids, 12, 13),
            partial(rig.leave, 11),
            partial(rig.leave, 12, 13),
        ]
        scenarios.historical_queries(rig, changes)


def test_basic_move(tmp_path: Path) -> None:
    with RealControllersRig(tmp_path) as rig:
        scenarios.basic_move(rig)


@both_networks
def test_basic_concurrent_leave_join_and_minimal_transfer(unreliable: bool, tmp_path: Path) -> None:
    with RealControllersRig(tmp_path, unreliable=unreliable) as rig:
        scenarios.concurrent_leave_join(rig)


def test_minimal_again(tmp_path: Path) -> None:
    with RealControllersRig(tmp_path) as rig:
        scenarios.minimal_again(rig)


def test_multi_leave_join(tmp_path: Path) -> None:
    with RealControllersRig(tmp_path) as rig:
        scenarios.multi_leave_join(rig)


@both_networks
def test_multi_concurrent_leave_join_and_minimal_transfer(unreliable: bool, tmp_path: Path) -> None:
    with RealControllersRig(tmp_path, unreliable=unreliable) as rig:
        scenarios.multi_concurrent_leave_join(rig)


@pytest.mark.parametrize("end", ["stop", "kill", "isolate", "pause"])
def test_multi_agree_config(end: str, tmp_path: Path, record_property: Record) -> None:
    with RealControllersRig(tmp_path) as rig:
        rig.join_gids(*TEN, 11)
        rig.leave(11)
        scenarios.agree_config(rig, end, TEN, 12, record_property)
