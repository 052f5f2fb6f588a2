"""Commands that read one key and write it: while one write of a key is under way, all that come after it gather, and
make the next one together. So a counter that a thousand clients increment costs one conditional write a round, and
nobody loses against anybody of this daemon; only against writers elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from raftkv.daemons.redis.replies import Refusal
from raftkv.daemons.redis.strings import View
from raftkv.protocol.errors import RaftKVError

BATCH_MAX = 1_024

Deliver = Callable[[Any, Any], None]
Run = Callable[[View], Any]
Transact = Callable[[Sequence[bytes], Run, Deliver, Any], None]
Waiting = tuple[Run, Deliver, Any]


class Lanes:
    """The keys that are being changed. `transact` carries a batch out at one instant."""

    def __init__(self, transact: Transact) -> None:
        self._transact = transact
        self._waiting: dict[bytes, deque[Waiting]] = {}

    def add(self, key: bytes, run: Run, deliver: Deliver, token: Any) -> None:
        """`deliver` gets what `run` returns or refuses with, or a RaftKVError."""
        queue = self._waiting.get(key)
        if queue is not None:
            queue.append((run, deliver, token))
            return
        self._waiting[key] = deque()
        self._start(key, [(run, deliver, token)])

    def _start(self, key: bytes, batch: list[Waiting]) -> None:
        replies: list[Any] = []
        self._transact([key], partial(_run_all, batch, replies), partial(self._done, key, batch), replies)

    def _done(self, key: bytes, batch: list[Waiting], replies: list[Any], result: Any) -> None:
        queue = self._waiting[key]
        if queue:
            self._start(key, [queue.popleft() for _ in range(min(len(queue), BATCH_MAX))])
        else:
            del self._waiting[key]
        failed = isinstance(result, RaftKVError)
        for number, (_, deliver, token) in enumerate(batch):
            deliver(token, result if failed else replies[number])


def _run_all(batch: list[Waiting], replies: list[Any], view: View) -> None:
    replies.clear()
    for run, _, _ in batch:
        view.sent_bytes = 0
        try:
            replies.append(run(view))
        except Refusal as refusal:
            replies.append(refusal)
