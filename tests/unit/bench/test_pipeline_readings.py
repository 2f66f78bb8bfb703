"""Figures from the times of tokens and steps."""

from __future__ import annotations

import pytest

from bench.pipeline_readings import rate, read_steps
from bench.pipeline_setting import Setting
from bench.streams import Observed
from outrider.errors import Unavailable


def test_a_rate_counts_whole_steps_of_each_session() -> None:
    # Steps of 100 ms with two tokens each; the sessions are out of phase.
    one = [(0.05 + 0.1 * n, 2) for n in range(20)]
    other = [(0.09 + 0.1 * n, 2) for n in range(20)]
    assert rate(Observed([one, other], 0.06, 1.52)) == pytest.approx(40.0)


def test_a_session_that_says_nothing_is_an_error() -> None:
    with pytest.raises(Unavailable, match=r"a session had 1 deliveries within 1.0 s"):
        rate(Observed([[(0.1, 1), (0.2, 1)], [(0.5, 1), (1.5, 1)]], 0.0, 1.0))


def test_steps_say_how_busy_how_fruitful_and_how_slow_they_are() -> None:
    setting = Setting(sessions=2, verifiers=4)
    # Two of the verifiers have a session each; steps of 22 ms begin every 25 ms.
    steps = [[(0.025 * n, 0.025 * n + 0.022, 8) for n in range(40)] for _ in range(2)]
    tokens = [[(0.025 * n + 0.022, 3) for n in range(40)] for _ in range(2)]
    found = read_steps([*steps, [], []], Observed(tokens, 0.0, 1.0), setting)
    assert found.occupancy == pytest.approx(0.88)
    assert found.tau == pytest.approx(3.0)
    assert found.stretch == pytest.approx(25 / 22)


def test_no_step_is_an_error() -> None:
    with pytest.raises(Unavailable, match="no verify step"):
        read_steps([[]], Observed([[(0.5, 1)]], 0.0, 1.0), Setting())
