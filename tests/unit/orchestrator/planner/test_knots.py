"""Durations by size."""

from __future__ import annotations

import pytest

from orchestrator.planner.knots import duration_s, read_knots
from outrider.errors import ConfigError


def test_between_knots_is_a_line() -> None:
    knots = read_knots("step", "1:22,32:22,128:28")
    assert knots == ((1, 0.022), (32, 0.022), (128, 0.028))
    assert duration_s(knots, 1) == duration_s(knots, 20) == pytest.approx(0.022)
    assert duration_s(knots, 80) == pytest.approx(0.025)
    assert duration_s(knots, 128) == pytest.approx(0.028)


def test_outside_of_the_knots() -> None:
    knots = ((8, 0.01), (32, 0.02))
    assert duration_s(knots, 1) == 0.01
    # Compute grows in proportion beyond what was stated.
    assert duration_s(knots, 64) == pytest.approx(0.04)


def test_a_single_figure_holds_for_every_size() -> None:
    knots = read_knots("draft", "2.5")
    assert duration_s(knots, 1) == duration_s(knots, 1_000) == pytest.approx(0.0025)


@pytest.mark.parametrize(
    "text", ["", "1:", "a:2", "1:2,x", "32:1,1:2", "4:1,4:2", "0:1", "1:0", "1:-2", "1:nan"]
)
def test_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^the name: "):
        read_knots("the name", text)
