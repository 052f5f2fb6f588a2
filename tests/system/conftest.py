"""Clusters of real processes, shared by the tests of one module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.cluster import Cluster, running


@pytest.fixture(scope="module")
def two_groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three controllers and two groups of three, joined. Tests leave it whole: every process running."""
    with running(Cluster(tmp_path_factory.mktemp("two-groups"), groups=2)) as cluster:
        yield cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
