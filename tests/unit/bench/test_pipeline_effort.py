"""How long the pipelining benchmark says that it takes."""

from __future__ import annotations

import pytest

from bench.pipeline_effort import PARTS, QUICK, Countdown, Effort, seconds_of


def test_a_whole_run_fits_into_three_quarters_of_an_hour() -> None:
    assert sum(seconds_of(part, Effort()) for part in PARTS) < 45 * 60


def test_every_part_fits_into_a_minute_if_quick() -> None:
    assert max(seconds_of(part, QUICK) for part in PARTS) <= 65


def test_what_is_left_shrinks_with_time_and_with_every_part() -> None:
    effort = Effort()
    both_s = seconds_of("rtt", effort) + seconds_of("floor", effort)
    countdown = Countdown(["rtt", "floor"], effort, 100.0)
    countdown.begins("rtt", 100.0)
    assert countdown.left_s(100.0) == both_s
    assert countdown.left_s(130.0) == both_s - 30.0
    # However long a part takes, the next one still has to come.
    assert countdown.left_s(9_999.0) == pytest.approx(seconds_of("floor", effort))
    countdown.begins("floor", 160.0)
    assert countdown.left_s(170.0) == seconds_of("floor", effort) - 10.0
    assert countdown.says(221.0).startswith("02:01, about ")
