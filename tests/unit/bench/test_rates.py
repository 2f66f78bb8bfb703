"""Rates from the times of tokens."""

from __future__ import annotations

import pytest

from bench.rates import Run, tau_reached


def run(*times_s: tuple[float, ...]) -> Run:
    return Run(times_s, tuple(tuple(range(len(row))) for row in times_s))


def test_the_decode_rate_leaves_out_others_prefill_and_the_batch_running_empty() -> None:
    # Alone until 3.0, both until 5.0, alone again after that.
    measured = run((1.0, 2.0, 3.0, 3.5, 4.0, 4.5, 5.0), (3.0, 3.5, 4.0, 4.5, 5.0, 9.0))
    assert measured.decode_rate == pytest.approx(8 / 2.0)
    assert measured.total_rate == pytest.approx(13 / 9.0)


def test_tokens_of_one_commit_all_count() -> None:
    assert run((1.0, 2.0, 2.0, 2.0, 3.0)).decode_rate == pytest.approx(4 / 2.0)


def test_without_a_time_when_all_decode_there_is_no_rate() -> None:
    with pytest.raises(ValueError, match="more tokens"):
        _ = run((1.0, 2.0), (2.0, 3.0)).decode_rate


def test_tau_is_reached_when_a_whole_window_exceeds_it() -> None:
    commits = [(1.0, 1), (2.0, 2), (3.0, 1), (4.0, 2), (5.0, 2), (6.0, 9)]
    assert tau_reached(commits, 1.5, 3) == 4.0
    # Exactly 1.5 does not exceed it.
    assert tau_reached(commits, 1.5, 2) == 5.0
    assert tau_reached(commits[:3], 1.5, 3) is None
    assert tau_reached([(1.0, 9)], 1.5, 2) is None
