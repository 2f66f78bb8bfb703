"""Setting a round trip by what is measured."""

from __future__ import annotations

import pytest

from bench.round_trips import approached


def line(offset: float, slope: float, seen: list[float]) -> object:
    def measure(at: float) -> float:
        seen.append(at)
        return offset + slope * at

    return measure


def test_what_calls_cost_by_themselves_is_taken_off() -> None:
    seen: list[float] = []
    found = approached(10.0, line(1.5, 4.0, seen), first=2.5, gain=0.25)  # type: ignore[arg-type]
    assert found == pytest.approx(10.0)
    assert seen == pytest.approx([2.5, 2.125])


def test_below_what_calls_cost_nothing_is_added() -> None:
    seen: list[float] = []
    assert approached(0.5, line(1.5, 4.0, seen), first=0.125, gain=0.25) == 1.5  # type: ignore[arg-type]
    assert seen == pytest.approx([0.125, 0.0])


def test_one_wrong_measure_does_not_decide() -> None:
    seen: list[float] = []
    answers = iter([40.0, 3.0, 8.0, 9.0, 10.5, 10.0])

    def measure(at: float) -> float:
        seen.append(at)
        return next(answers)

    assert approached(10.0, measure, first=2.5, gain=0.25) == 10.0
    assert seen[-1] == seen[-2]
    assert len(seen) == 6
