"""Joining what the relay benchmark's workers sent with what its clients read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.relaying.samples import Row, added_ns, flatness, markdown, quantiles_ms, result_line

ROW = Row(
    sessions=10,
    drafts=False,
    flood=False,
    seconds=2.0,
    tokens=20_000,
    messages=10_000,
    commits=10_000,
    drafts_relayed=0,
    cpu_s=1.0,
    cpu_main_s=0.7,
    cpu_kernel_s=0.2,
    generator_cpu_s=0.8,
    memory_mib=100.0,
    added_p50_ms=0.5,
    added_p99_ms=1.5,
    added_p999_ms=3.0,
    own_p50_ms=0.25,
    own_p99_ms=0.75,
)


def test_a_commit_arrives_with_the_message_that_reaches_its_length() -> None:
    sent = np.array([[7, 2, 100], [8, 1, 110], [7, 5, 200], [7, 6, 210]])
    read = np.array([[7, 2, 2, 150], [7, 6, 4, 260], [8, 1, 1, 115]])
    assert added_ns(sent, read).tolist() == [50, 5, 60, 50]


@pytest.mark.parametrize("lost", [[9, 1, 100], [7, 3, 100], [6, 1, 100]])
def test_a_commit_that_never_arrives_is_an_error(lost: list[int]) -> None:
    read = np.array([[7, 2, 2, 150], [8, 9, 9, 115]])
    with pytest.raises(ValueError, match="1 of 2 commits never arrived"):
        added_ns(np.array([[7, 2, 100], lost]), read)


def test_figures_follow_from_what_was_counted() -> None:
    assert (ROW.tokens_per_core, ROW.token_us, ROW.busy, ROW.joined) == (20_000, 50, 0.5, 2)
    assert quantiles_ms(np.arange(0, 1_000_001, 1_000)) == pytest.approx((0.5, 0.99, 0.999))


def test_flatness_is_the_dearest_over_the_cheapest_token() -> None:
    costs = {10: 1.0, 1_000: 1.5, 10_000: 0.75}
    rows = [replace(ROW, sessions=count, cpu_s=cpu_s) for count, cpu_s in costs.items()]
    assert flatness(rows) == 2.0
    # A window that the machine has spoilt does not count if there are others.
    assert flatness([*rows, *rows, *(replace(row, cpu_s=9.0) for row in rows)]) == 2.0


def test_the_result_line_names_the_worst_and_keeps_loads_apart() -> None:
    rows = [
        ROW,
        replace(ROW, sessions=1_000, cpu_s=1.25, added_p99_ms=1.75, own_p99_ms=0.8),
        replace(ROW, drafts=True, cpu_s=2.0, added_p99_ms=4.0),
        replace(ROW, flood=True, cpu_s=0.5, added_p99_ms=900.0),
    ]
    assert result_line(rows) == (
        "result: orchestrator tokens_per_core=16000 added_p99_ms=1.75 flatness=1.25"
        " generator_p99_ms=0.80 drafts_tokens_per_core=10000 drafts_added_p99_ms=4.00"
        " flood_tokens_per_core=40000"
    )
    assert result_line(rows[:2]).endswith("flatness=1.25 generator_p99_ms=0.80")


def test_the_result_line_has_its_keys_even_if_nothing_was_measured() -> None:
    assert result_line([]) == "result: orchestrator tokens_per_core=na added_p99_ms=na flatness=na"


def test_the_table_says_that_workers_are_synthetic() -> None:
    text = markdown([ROW], ["a note"])
    assert "synthetic" in text
    assert "- a note" in text
    assert "| 10 | no | paced | 10,000 | 50% | 20,000 | 50.0 | 1.25 | 70% | 20% | 2.00 |" in text
