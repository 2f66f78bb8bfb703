"""Who is refused is told when to come back, each another time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.waitlist import LINE_MAX_S, WAIT_MAX_S, WAIT_MIN_S, Waitlist


def test_each_is_told_the_next_time_at_which_there_is_room():
    waitlist = Waitlist()
    assert [waitlist.wait_s(10.0, 0.5) for _ in range(3)] == [0.5, 1.0, 1.5]


def test_what_was_promised_passes():
    waitlist = Waitlist()
    for _ in range(4):
        waitlist.wait_s(10.0, 0.5)
    assert waitlist.wait_s(11.0, 0.5) == pytest.approx(1.5)
    assert waitlist.wait_s(60.0, 0.5) == pytest.approx(0.5)


def test_a_crowd_makes_nobody_wait_for_long():
    waitlist = Waitlist()
    assert max(waitlist.wait_s(0.0, 0.5) for _ in range(1_000)) == LINE_MAX_S


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e3)), max_size=50))
def test_advice_is_within_bounds(asked: list[tuple[float, float]]) -> None:
    waitlist, now_s = Waitlist(), 100.0
    for later_s, interval_s in asked:
        now_s += later_s
        wait_s = waitlist.wait_s(now_s, interval_s)
        assert WAIT_MIN_S - 1e-9 <= wait_s <= WAIT_MAX_S + 1e-9
