"""Times of tokens and steps, read back."""

from __future__ import annotations

import pytest

from bench.timelines import (
    busy_share,
    crossing,
    rate_between,
    rate_curve,
    settled_s,
    spread,
    step_gaps_s,
)


def test_a_rate_counts_what_comes_after_the_begin_up_to_the_end() -> None:
    assert rate_between([(1.0, 9), (1.5, 2), (3.0, 4), (3.1, 9)], 1.0, 3.0) == 3.0


def test_a_busy_share_cuts_steps_at_the_window() -> None:
    steps = [(0.0, 1.5, 1), (2.0, 2.5, 1), (2.75, 9.0, 1), (10.0, 11.0, 1)]
    assert busy_share(steps, 1.0, 3.0) == pytest.approx((0.5 + 0.5 + 0.25) / 2)


def test_gaps_lie_between_steps_that_are_wholly_inside() -> None:
    steps = [(0.0, 1.0, 1), (1.1, 2.0, 1), (2.3, 3.0, 1), (3.0, 4.0, 1), (4.9, 6.0, 1)]
    assert step_gaps_s(steps, 1.0, 5.0) == pytest.approx([0.3, 0.0])


def test_a_spread_names_values_that_occurred() -> None:
    seen = spread([value / 1_000 for value in range(100, 0, -1)])
    assert (seen.p50_ms, seen.p90_ms, seen.p99_ms, seen.max_ms) == pytest.approx((50, 90, 99, 100))
    assert seen.count == 100
    with pytest.raises(ValueError, match="nothing"):
        spread([])


def test_a_curve_is_the_mean_of_aligned_runs_in_sliding_windows() -> None:
    runs = [[(0.25, 4), (0.75, 2)], [(0.5, 2), (1.0, 6)]]
    curve = rate_curve(runs, 0.0, 1.0, width_s=0.5, stride_s=0.25)
    assert [end for end, _ in curve] == pytest.approx([0.5, 0.75, 1.0])
    assert [rate for _, rate in curve] == pytest.approx([6.0, 4.0, 8.0])


class TestSettled:
    def test_the_first_window_that_lasts_counts(self) -> None:
        assert settled_s([(1.0, 5), (2.0, 9), (3.0, 12), (4.0, 11), (5.0, 9.5)], 10) == 3.0

    def test_an_early_peak_does_not(self) -> None:
        assert settled_s([(1.0, 11), (2.0, 5), (3.0, 5), (4.0, 10)], 10) == 4.0

    def test_never_is_none(self) -> None:
        assert settled_s([(1.0, 5), (2.0, 9)], 10) is None


class TestCrossing:
    def test_it_lies_between_the_points_on_either_side(self) -> None:
        assert crossing([(1.0, 1.5), (5.0, 1.25), (10.0, 0.75)], 1.0) == pytest.approx(7.5)

    def test_a_line_that_begins_below_crosses_at_once_and_one_above_never(self) -> None:
        assert crossing([(1.0, 0.5), (2.0, 0.4)], 1.0) == 1.0
        assert crossing([(1.0, 1.5), (2.0, 1.4)], 1.0) is None
