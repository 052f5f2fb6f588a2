"""The histogram of latencies: its error, and that it doesn't matter how many it was recorded in."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.bench.histogram import Histogram, bounds_ns, bucket_of

ERROR = 0.01
TIMES_NS = st.integers(0, 10**13)


def recorded(times_ns: list[int]) -> Histogram:
    histogram = Histogram()
    for time_ns in times_ns:
        histogram.record(time_ns)
    return histogram


@given(TIMES_NS)
def test_a_time_is_within_its_bucket_and_the_bucket_is_narrow(time_ns: int) -> None:
    low, high = bounds_ns(bucket_of(time_ns))
    assert low <= time_ns < high
    assert max(time_ns - (low + high - 1) / 2, (low + high - 1) / 2 - time_ns) <= ERROR * time_ns


def test_the_buckets_have_no_gaps() -> None:
    bounds = [bounds_ns(bucket) for bucket in range(4_000)]
    assert bounds[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))


@given(st.lists(TIMES_NS, min_size=1), st.floats(0.1, 100))
def test_percentiles_are_those_of_the_sorted_times(times_ns: list[int], per_cent: float) -> None:
    histogram = recorded(times_ns)
    exact = sorted(times_ns)[max(0, math.ceil(per_cent / 100 * len(times_ns) - 1e-9) - 1)]
    found = histogram.percentile_ns(per_cent)
    assert found is not None
    assert abs(found - exact) <= ERROR * exact
    assert histogram.percentile_ns(100) == max(times_ns)


@given(st.lists(st.lists(TIMES_NS), max_size=5))
def test_merging_is_exact(parts: list[list[int]]) -> None:
    """Also over the pipe from a loading process."""
    merged = Histogram()
    for part in parts:
        merged.add(Histogram.decode(json.loads(json.dumps(recorded(part).encode()))))
    times_ns = [time_ns for part in parts for time_ns in part]
    whole = recorded(times_ns)
    assert list(merged.buckets()) == list(whole.buckets())
    assert (merged.count, merged.min_ns, merged.max_ns) == (whole.count, whole.min_ns, whole.max_ns)
    assert merged.mean_ns == (sum(times_ns) / len(times_ns) if times_ns else None)


@pytest.mark.parametrize("per_cent", [50, 99.9, 100])
def test_nothing_has_no_percentile(per_cent: float) -> None:
    assert Histogram().percentile_ns(per_cent) is None
