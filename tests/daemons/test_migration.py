"""The pace of a copy."""

from __future__ import annotations

import pytest

from raftkv.daemons.migration import REST_S_MAX, rest_s


def test_a_copy_leaves_half_of_the_time_to_others_and_more_when_it_is_slowed_down() -> None:
    assert rest_s(0.004, 0.004) == pytest.approx(0.004)
    assert rest_s(0.008, 0.004) == pytest.approx(0.016)
    assert rest_s(0.002, 0.004) == pytest.approx(0.002)
    assert rest_s(0.004, float("inf")) == pytest.approx(0.004)  # nothing is known yet
    assert rest_s(10.0, 0.004) == REST_S_MAX  # it goes on, however slowly


def test_a_page_that_took_no_time_by_the_loops_clock_sets_no_pace() -> None:
    assert rest_s(0.0, 0.0) == 0.0
    assert rest_s(0.002, 0.0) == rest_s(0.002, 0.001) == pytest.approx(0.004)
