"""The numbers that shape one Raft replica. Values only: nothing here may read a clock or a file."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class RaftConfig:
    """Times in ms, sizes in bytes of encoded entries."""

    replica: int
    election_timeout_ms_min: int = 500
    election_timeout_ms_max: int = 1000
    heartbeat_ms: int = 100

    inflight_messages_max: int = 64
    """AppendEntries sent to one follower and not yet acknowledged."""
    inflight_bytes_max: int = 8 * MIB
    append_bytes_max: int = MIB
    """Entries in one AppendEntries; a single larger entry travels alone."""

    uncommitted_bytes_max: int = 64 * MIB
    """Beyond it proposals get `Busy`: a leader cut off from its quorum must not grow without end."""
    reserve_bytes: int = 4 * MIB
    """On top of `uncommitted_bytes_max`, for proposals that make room or end waits."""

    snapshot_chunk_bytes: int = 256 * KIB
    snapshot_inflight_chunks: int = 2
    pin_log_bytes_max: int = 64 * MIB
    """A log larger than this is no longer kept for followers that lag (`Raft.snapshot_pins`)."""
    promote_lag_entries_max: int = 64
    """A learner may be promoted when it is at most this far behind the leader's log."""

    pre_vote: bool = True
    check_quorum: bool = True
    lease_reads: bool = False

    def __post_init__(self) -> None:
        assert 0 < self.heartbeat_ms < self.election_timeout_ms_min <= self.election_timeout_ms_max
        assert self.inflight_messages_max > 0 and self.inflight_bytes_max > 0 and self.append_bytes_max > 0
        assert self.snapshot_chunk_bytes > 0 and 1 <= self.snapshot_inflight_chunks <= 4
        assert not self.lease_reads or self.check_quorum, "a lease rests on leader stickiness"

    @property
    def lease_ms(self) -> int:
        """How long a confirmed round vouches for the leader, counted from its sending (thesis §6.4.1).

        Shorter than the time for which followers refuse to vote for another; the rest is the margin for
        clocks that run at different rates.
        """
        return self.election_timeout_ms_min * 3 // 4
