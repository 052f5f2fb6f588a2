"""For all tests: what they start can be interrupted, and no time of day decides whether they pass."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"  # what the developer's own file says is no part of a test


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT is as a terminal has it: a job in the background starts without, and a program that ends leaves it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
