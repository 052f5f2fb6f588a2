"""Reachability probes: proof that the simulation got to the rare states, and a report of those it never reached.

A probe is a name and a count. Some are hit by the simulator itself; most are recognised by what the daemons log
(by the template of the record, nothing is formatted) or by the class of the error that a client got.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOGGED = {
    "%s: %s in term %d, leader %s": "role changed",
    "%s: the group is formed, voters %s": "group formed",
    "%s: snapshot at index %d goes to replica %d": "snapshot sent",
    "%s: snapshot at index %d is installed": "snapshot installed",
    "%s: snapshot at index %d is refused: %s": "snapshot refused",
    "%s: snapshot from replica %d is refused: %s": "snapshot chunk refused",
    "%s: no snapshot for replica %d: %s": "snapshot not to be had",
    "%s: replica %d must be replaced: %s": "regressed peer refused",
    "%s: the leadership transfer to %d timed out": "leadership transfer timed out",
    "%s: leadership not handed over: %s": "leadership not handed over",
    "%s: configuration %d is in the log": "configuration logged by a group",
    "%s: copies shard %d from group %d (configuration %d)": "import begun",
    "%s: the copy of shard %d from group %d ends": "import dropped",
    "%s: shard %d has arrived from group %d after %.1f s": "shard arrived",
    "%s: no controller answers at %s: %s": "controllers silent for long",
    "%s: the controllers answer again": "controllers back",
    "%s: the storage engine is stalled (%s); writes wait": "engine stalled",
}
"""Template of a log record → probe."""

ERRORS = (
    "OutcomeUnknown", "Timeout", "CasMismatch", "VersionMismatch", "Busy", "NotLeader", "Expired",
)  # fmt: skip

NAMED = (
    "crash with a write in flight",
    "power lost while starting",
    "power lost while writing",
    "write torn by a crash",
    "segment rolled",
    "log compacted",
    "log restarted at the applied index",
    "engine behind the log at start",
    "unconfirmed write survived a crash",
    "unconfirmed write lost by a crash",
    "entries overwritten after a conflict",
    "leader restarted",
    "leadership transfer begun",
    "follower reads through its leader",
    "map changed by join",
    "map changed by leave",
    "map changed by move",
    "map not changed",
    "last group stayed",
    "last group came back",
    "snapshot damaged",
    "user timeout",
    "watcher got no answer",
    "hostile bytes sent",
    "connection congested",
    "exit: full or failing disk",
    "exit: damaged data",
    "exit: must be replaced",
)

KNOWN = tuple(dict.fromkeys((*LOGGED.values(), *NAMED, *(f"client got {name}" for name in ERRORS))))


class Probes:
    """Counts of one run."""

    def __init__(self) -> None:
        self.hits: dict[str, int] = {}

    def hit(self, name: str, count: int = 1) -> None:
        self.hits[name] = self.hits.get(name, 0) + count

    def missed(self) -> list[str]:
        return [name for name in KNOWN if name not in self.hits]


class _Handler(logging.Handler):
    """Counts templates; with `show` also passes every record on."""

    def __init__(self, probes: Probes, show: Callable[[logging.LogRecord], None] | None) -> None:
        super().__init__()
        self._probes = probes
        self._show = show

    def handle(self, record: logging.LogRecord) -> bool:
        name = LOGGED.get(str(record.msg))
        if name is not None:
            self._probes.hit(name)
        if self._show is not None:
            self._show(record)
        return True


@contextmanager
def listening(
    probes: Probes, show: Callable[[logging.LogRecord], None] | None = None, level: int = logging.INFO
) -> Iterator[None]:
    """Hear what the product logs, instead of anybody else."""
    logger = logging.getLogger("raftkv")
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers[:] = [_Handler(probes, show)]
    try:
        yield
    finally:
        logger.level, logger.propagate, logger.handlers[:] = before[0], before[1], before[2]
        logger.setLevel(before[0])
