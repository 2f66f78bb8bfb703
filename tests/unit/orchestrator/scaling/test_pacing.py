"""Bounds, windows and steps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scaling.pacing import Limits, PaceMemory, pace
from outrider.errors import ConfigError

LIMITS = Limits(floor=1, ceiling=100, tolerance=0.0)


def run(limits: Limits, wishes: list[int], *, tick_s: float = 15.0, start: int = 4) -> list[int]:
    """Follow wishes, one a tick."""
    memory, current = PaceMemory(), start
    went = []
    for tick, wanted in enumerate(wishes):
        paced = pace(limits, memory, current=current, wanted=wanted, now_s=tick * tick_s)
        memory, current = paced.memory, paced.replicas
        went.append(current)
    return went


def test_more_is_given_at_once_but_not_without_measure() -> None:
    went = run(LIMITS, [50] * 13)
    assert went[0] == 8, "as many again, or four"
    assert went[1:4] == [8, 8, 8], "within a minute no more"
    assert went[4] == 16
    assert went[-1] == 50


def test_less_is_taken_once_it_has_lasted_and_slowly() -> None:
    went = run(LIMITS, [10] * 4 + [2] * 100, start=10)
    assert set(went[:24]) == {10}, "the window of five minutes remembers the ten"
    steps = [before - after for before, after in itertools.pairwise(went)]
    assert max(steps) == 1
    assert went[-1] == 2
    taken_at = [tick for tick, step in enumerate(steps) if step]
    assert min(b - a for a, b in itertools.pairwise(taken_at)) >= 8, "two minutes"


def test_a_lull_takes_nothing() -> None:
    assert set(run(LIMITS, [10, 10, 2, 2, 2, 10, 10] * 10, start=10)) == {10}


def test_a_spike_shorter_than_the_window_adds_nothing() -> None:
    limits = replace(LIMITS, up_window_s=60.0)
    assert set(run(limits, [4, 4, 9, 9, 4, 4] * 5)) == {4}


def test_small_differences_are_not_followed() -> None:
    limits = replace(LIMITS, tolerance=0.1)
    assert set(run(limits, [21, 19, 22, 18] * 20, start=20)) == {20}


def test_who_begins_to_look_takes_nothing_at_once() -> None:
    went = run(LIMITS, [1] * 30, start=30)
    assert set(went[:20]) == {30}


def test_what_is_in_use_is_kept() -> None:
    limits = replace(LIMITS, down_window_s=0.0, down_share=1.0)
    paced = pace(limits, PaceMemory(), current=9, wanted=2, now_s=0.0, least=7)
    paced = pace(limits, paced.memory, current=9, wanted=2, now_s=1.0, least=7)
    assert paced.replicas == 7
    assert "what is in use needs 7" in paced.reasons


def test_bounds_are_given_as_reasons() -> None:
    paced = pace(LIMITS, PaceMemory(), current=100, wanted=500, now_s=0.0)
    assert paced.replicas == 100
    assert paced.reasons == ("500 wanted, the ceiling is 100",)
    paced = pace(LIMITS, PaceMemory(), current=1, wanted=0, now_s=0.0)
    assert paced.reasons == ("0 wanted, the floor is 1",)


@given(
    wishes=st.lists(st.integers(-5, 500), min_size=1, max_size=60),
    floor=st.integers(0, 10),
    room=st.integers(0, 50),
    start=st.integers(0, 80),
    window_s=st.sampled_from([0.0, 60.0, 300.0]),
)
def test_bounds_always_hold(
    wishes: list[int], floor: int, room: int, start: int, window_s: float
) -> None:
    limits = Limits(floor, floor + room, up_window_s=window_s, down_window_s=window_s)
    for replicas in run(limits, wishes, start=start):
        assert floor <= replicas <= floor + room


def test_wrong_limits_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="floor, ceiling"):
        Limits(floor=3, ceiling=2)
    with pytest.raises(ConfigError, match="down_pods"):
        Limits(floor=0, ceiling=2, down_pods=0)
    with pytest.raises(ConfigError, match="down_window_s"):
        Limits(floor=0, ceiling=2, down_window_s=float("nan"))
