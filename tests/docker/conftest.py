"""The tests of this folder share the names of the containers, so they run one after the other, and share a cluster.

With RAFTKV_DOCKER=required, a machine on which no engine answers fails them; otherwise it skips them.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docker import stack

VARIABLE = "RAFTKV_DOCKER"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster with TLS takes the place of the one that all others share, so its tests come last."""
    items.sort(key=lambda item: item.path == Path(__file__).parent / "test_tls.py")


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """Something that answers, and has the base image; at the end nothing of ours is left."""
    if reason := stack.why_no_engine():
        if os.environ.get(VARIABLE) == "required":
            pytest.fail(f"{reason} (and {VARIABLE}=required)", pytrace=False)
        pytest.skip(reason)
    began_s = time.monotonic()
    made = subprocess.run(["scripts/base-image"], cwd=stack.ROOT, check=False)
    assert made.returncode == 0, "scripts/base-image failed, see above"
    print(f"\nbase image there after {time.monotonic() - began_s:.0f} s")
    stack.fail_on_containers_of_others()
    yield
    stack.remove()
    stack.remove_image()
    assert stack.ours() == []


@dataclass(frozen=True)
class Started:
    """How long it took from `up --build` to the first Put, and how long `up` took of that."""

    first_put_s: float
    up_s: float


@pytest.fixture(scope="session")
def started(engine: None) -> Started:
    """The cluster is up; its image was made with all packages in the build cache."""
    began_s = time.monotonic()
    stack.out("docker", "build", "--target", "packages", ".", timeout_s=580)
    print(f"\npackages in the build cache after {time.monotonic() - began_s:.0f} s")
    began_s = time.monotonic()
    stack.compose("up", "--build", "-d", timeout_s=580)
    up_s = time.monotonic() - began_s
    assert stack.kv("put", "first", "put") == "OK\n"
    return Started(time.monotonic() - began_s, up_s)


@pytest.fixture
def cluster(started: Started) -> Iterator[None]:
    """The cluster is up and healthy."""
    stack.wait_healthy()
    yield
    stack.mend()
