"""Histograms, and what the meters make of requests."""

from __future__ import annotations

from raftkv.daemons.histogram import Histogram


def test_buckets_include_their_upper_ends_and_add_up() -> None:
    histogram = Histogram((1.0, 2.5))
    for value in (0.0, 1.0, 1.1, 2.5, 2.6, 100.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.cumulative() == [("1.0", 2), ("2.5", 4), ("+Inf", 6)]
    assert (histogram.count, round(histogram.total, 6)) == (6, 107.2)
