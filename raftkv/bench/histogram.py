"""A histogram of times with logarithmic buckets that are divided evenly, as HdrHistogram has them.

Between a power of two and the next there are SUB_BUCKETS buckets. So a bucket is at most 1/128 of its least time wide,
and its middle, which is what it is read as, at most 0.4 % away from what was recorded. Adding two gives exactly the
histogram that would have been recorded in one. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

SUB_BITS = 7
SUB_BUCKETS = 1 << SUB_BITS


class Histogram:
    """Counts of times in whole nanoseconds, each at least 0. Mean, least and greatest are exact."""

    __slots__ = ("_counts", "count", "max_ns", "min_ns", "sum_ns")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.sum_ns = 0
        self.min_ns = 0
        self.max_ns = 0

    def record(self, time_ns: int) -> None:
        bucket = bucket_of(time_ns)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.min_ns = time_ns if self.count == 0 else min(self.min_ns, time_ns)
        self.max_ns = max(self.max_ns, time_ns)
        self.count += 1
        self.sum_ns += time_ns

    def add(self, other: Histogram) -> None:
        """Take in what the other one has recorded."""
        if not other.count:
            return
        for bucket, count in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.min_ns = other.min_ns if self.count == 0 else min(self.min_ns, other.min_ns)
        self.max_ns = max(self.max_ns, other.max_ns)
        self.count += other.count
        self.sum_ns += other.sum_ns

    @property
    def mean_ns(self) -> float | None:
        """None of nothing."""
        return self.sum_ns / self.count if self.count else None

    def percentile_ns(self, per_cent: float) -> float | None:
        """The least recorded time that so many per cent don't exceed, within 0.4 %; None of nothing."""
        if not self.count:
            return None
        wanted = per_cent / 100 * self.count
        seen = 0
        for bucket, count in sorted(self._counts.items()):
            seen += count
            if wanted <= seen < self.count:
                low_ns, high_ns = bounds_ns(bucket)
                return max((low_ns + high_ns - 1) / 2, self.min_ns)
        return self.max_ns

    def buckets(self) -> Iterator[tuple[int, int, int]]:
        """(from, below, count) of each bucket that isn't empty, ascending; nanoseconds."""
        for bucket, count in sorted(self._counts.items()):
            yield (*bounds_ns(bucket), count)

    def encode(self) -> list[Any]:
        """[sum, min, max, [[bucket, count]…]]: numbers and lists, for JSON."""
        return [self.sum_ns, self.min_ns, self.max_ns, [[bucket, self._counts[bucket]] for bucket in self._counts]]

    @classmethod
    def decode(cls, encoded: Sequence[Any]) -> Histogram:
        """What `encode` was called on."""
        histogram = cls()
        histogram.sum_ns, histogram.min_ns, histogram.max_ns, pairs = encoded
        histogram._counts = dict(pairs)
        histogram.count = sum(histogram._counts.values())
        return histogram


def bucket_of(time_ns: int) -> int:
    """The number of its bucket: ascending with the time, without gaps."""
    assert time_ns >= 0
    shift = max(0, time_ns.bit_length() - SUB_BITS - 1)
    return (shift << SUB_BITS) + (time_ns >> shift)


def bounds_ns(bucket: int) -> tuple[int, int]:
    """The least time in the bucket, and the least above it."""
    shift = max(0, (bucket >> SUB_BITS) - 1)
    low = bucket - (shift << SUB_BITS)
    return low << shift, (low + 1) << shift
