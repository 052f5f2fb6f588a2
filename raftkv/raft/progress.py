"""What the leader knows about one follower, and how much it may send it.

A leaf: it holds numbers and moves between three states, and sends nothing itself.

* PROBE: where the logs match is a guess. One message at a time, then wait for its reply or a heartbeat's.
* REPLICATE: it is known. `next` runs ahead of the acknowledgements, within a window of messages and bytes.
* SNAPSHOT: what comes next is no longer in the log. Heartbeats only, while a snapshot is streamed.
"""

from __future__ import annotations

from collections import deque
from enum import Enum


class ProgressState(Enum):
    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


PROBE, REPLICATE, SNAPSHOT = ProgressState.PROBE, ProgressState.REPLICATE, ProgressState.SNAPSHOT


class Progress:
    """`match`: durable at the follower and equal to the leader's log; `next`: the next index to send."""

    __slots__ = (
        "acked_round",
        "inflight",
        "inflight_bytes",
        "last_heard_ms",
        "match",
        "match_round",
        "next",
        "paused",
        "probe_round",
        "regressed",
        "replica",
        "round_sent",
        "state",
    )

    def __init__(self, replica: int, next_index: int, now_ms: int) -> None:
        self.replica = replica
        self.state = PROBE
        self.match = 0
        self.next = next_index
        self.paused = False
        """In PROBE: a probe is under way."""
        self.probe_round = 0
        """The newest round when it was sent."""
        self.inflight: deque[tuple[int, int]] = deque()
        """(last index, bytes) of each AppendEntries with entries that is not acknowledged."""
        self.inflight_bytes = 0
        self.round_sent = 0
        self.acked_round = 0
        self.match_round = 0
        """The newest round when `match` was last raised: replies to later rounds are later news."""
        self.last_heard_ms = now_ms
        """When the follower last answered in this term; the leader's reign begins with a full allowance."""
        self.regressed = False
        """Lost what it had acknowledged: it is served, but nothing it says counts for a quorum."""

    def sent(self, last_index: int, sent_bytes: int) -> None:
        """Entries up to `last_index` are on their way. A probe's `next` waits for the reply."""
        self.inflight.append((last_index, sent_bytes))
        self.inflight_bytes += sent_bytes
        if self.state is REPLICATE:
            self.next = last_index + 1

    def acked(self, index: int, newest_round: int) -> bool:
        """Raise `match`; False for old news. Frees the window."""
        if index <= self.match:
            return False
        self.match = index
        self.match_round = newest_round
        if index >= self.next:
            self.next = index + 1
        inflight = self.inflight
        while inflight and inflight[0][0] <= index:
            self.inflight_bytes -= inflight.popleft()[1]
        return True

    def become_probe(self, next_index: int) -> None:
        """Guess that the logs match below `next_index`; whatever is in flight is given up as lost."""
        self.state = PROBE
        self.next = max(next_index, self.match + 1)
        self.paused = False
        self._clear_window()

    def become_replicate(self, acked_round: int) -> None:
        """The logs match: go on behind what is already in flight (the probe's own entries).

        A reply to a later round that doesn't acknowledge them says that they were lost.
        """
        self.state = REPLICATE
        if acked_round > self.probe_round:
            self._clear_window()
        self.next = max(self.match, self.inflight[-1][0] if self.inflight else 0) + 1
        self.paused = False

    def become_snapshot(self) -> None:
        self.state = SNAPSHOT
        self.paused = False
        self._clear_window()

    def _clear_window(self) -> None:
        self.inflight.clear()
        self.inflight_bytes = 0
