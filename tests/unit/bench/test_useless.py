"""How useless drafters are compared with none: fairly, and with what the figure is worth."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from bench.useless import _ORDERS, KINDS, Estimate, UselessResult


def test_each_kind_is_as_often_at_each_place_and_after_each_other() -> None:
    places = Counter((place, kind) for order in _ORDERS for place, kind in enumerate(order))
    assert len(places) == len(KINDS) ** 2
    assert set(places.values()) == {1}
    pairs = Counter(pair for order in _ORDERS for pair in itertools.pairwise(order))
    assert len(pairs) == len(KINDS) * (len(KINDS) - 1)
    assert set(pairs.values()) == {1}


def test_the_interval_holds_the_median_about_as_often_as_it_says() -> None:
    chance = random.Random(1)
    held = 0
    for _ in range(400):
        one = Estimate.of([chance.expovariate(1.0) for _ in range(48)])
        assert one.low <= one.median <= one.high
        held += one.low <= 0.6931 <= one.high
    assert 0.93 <= held / 400 <= 1.0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_values_are_their_own_interval(count: int) -> None:
    one = Estimate.of([float(value) for value in range(count)])
    assert (one.low, one.high) == (0.0, count - 1.0)


def test_the_floor_is_that_of_the_worse_kind() -> None:
    result = UselessResult(
        4,
        alone=(100.0, 100.0, 50.0),
        again=(100.0, 120.0, 50.0),
        silent=(100.0, 110.0, 51.0),
        wrong=(95.0, 99.0, 50.0),
    )
    assert result.ratio("silent").median == 1.0
    assert result.ratio("wrong").median == result.floor == 0.95
    assert result.noise.median == 1.0
