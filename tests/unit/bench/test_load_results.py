"""The load benchmark's figures, against sums done by hand."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bench.load import arrivals
from bench.load_results import (
    SPECULATED,
    TARGET_ONLY,
    Goal,
    LoadResults,
    Run,
    Served,
    markdown,
    read_load,
    result_line,
    write_load,
)
from bench.machine import origin
from outrider.errors import ConfigError

SLOW = Run(TARGET_ONLY, 1.0, 4.0, (Served(0.5, 2.5, 21), Served(3.0, 4.0, 11)))
FAST = Run(SPECULATED, 1.0, 2.0, (Served(0.5, 1.0, 21), Served(1.0, 1.5, 11)))
ALONE = Run(SPECULATED, 2.0, 2.0, (Served(0.5, 1.0, 21),))
SETTING = {"concurrency": 4, "model": "tiny", "dtype": "float32"}
RESULTS = LoadResults(origin(["x"]), SETTING, Goal(2.0, 0.1), (SLOW, FAST, ALONE))


def test_goodput_counts_requests_that_keep_both_goals() -> None:
    assert SLOW.tokens_per_s == 8.0
    assert SLOW.requests[0].per_token_s == pytest.approx(0.1)
    assert SLOW.goodput(RESULTS.goal) == 0.25
    assert FAST.goodput(RESULTS.goal) == 1.0
    assert FAST.goodput(Goal(2.0, 0.03)) == 0.5


def test_only_rates_of_both_sides_are_compared() -> None:
    assert RESULTS.rates == [1.0]
    assert RESULTS.ratio(1.0) == 2.0
    assert result_line(RESULTS).startswith(
        "result: load min_ratio=2.000 saturation_ratio=2.000 goodput_ratio=4.00"
    )
    assert result_line(LoadResults(RESULTS.origin, SETTING, RESULTS.goal)).endswith("=na")
    assert "| 1 | target-only | 8.0 |" in markdown(RESULTS)


def test_repeats_are_compared_pair_by_pair() -> None:
    """Other arrivals are other work: a repeat with few requests has few tokens a second."""
    one = [replace(SLOW, seconds=2.0), replace(FAST, seconds=4.0)]
    other = [replace(SLOW, seconds=4.0), replace(FAST, seconds=3.2)]
    # Of the medians it would be 9 over 12.
    assert replace(RESULTS, runs=(*one, *other)).ratio(1.0) == pytest.approx((0.5 + 1.25) / 2)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "load.json"
    write_load(RESULTS, path)
    assert read_load(path) == RESULTS
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no results of this version"):
        read_load(path)


def test_arrivals_are_a_poisson_process() -> None:
    """Of 4,000 gaps mean and deviation are 1/rate within 5 %: three standard errors."""
    times = arrivals(20.0, 200.0, seed=5)
    assert times == arrivals(20.0, 200.0, seed=5) == sorted(times)
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.05, rel=0.08)
    assert arrivals(1e-6, 1.0, seed=1) == [0.0]
