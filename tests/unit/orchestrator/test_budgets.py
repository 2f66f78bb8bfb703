"""Budgets from what was measured, and what a drafter is expected to win."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.budgets import (
    DrafterPace,
    VerifierPace,
    budget_of,
    changed,
    expected_tokens,
)
from outrider.domain import DraftBudget, GrowReport, StepReport

LIMITS = DraftBudget(nodes_max=1_024, depth_max=64, width_max=4)
STEP_S = 0.022


def pace(*, pay_min: float = 0.0) -> VerifierPace:
    found = VerifierPace()
    for _ in range(64):
        found.observe(StepReport(STEP_S, 1, 32, plain_s=STEP_S, pay_min=pay_min))
    return found


def grow(step_s: float = 0.0025) -> GrowReport:
    return GrowReport(step_s, 16, 0.0)


def test_nothing_measured_is_the_limits() -> None:
    assert budget_of(VerifierPace(), None, 0.0, LIMITS) == LIMITS


def test_farther_drafters_run_farther_ahead() -> None:
    near = budget_of(pace(), grow(), 0.002, LIMITS)
    far = budget_of(pace(), grow(), 0.02, LIMITS)
    assert far.probability_min < near.probability_min


def test_a_drafter_flushes_a_few_times_in_a_step() -> None:
    budget = budget_of(pace(), grow(), 0.002, LIMITS)
    assert STEP_S / 16 < budget.flush_interval_s <= STEP_S / 4


def test_what_is_not_verified_is_not_drafted() -> None:
    busy = budget_of(pace(pay_min=0.5), grow(), 0.002, LIMITS)
    idle = budget_of(pace(), grow(), 0.002, LIMITS)
    assert busy.nodes_max < idle.nodes_max
    assert busy.width_max < idle.width_max
    assert busy.probability_min > idle.probability_min
    # Enough is left to notice when it pays again.
    assert busy.nodes_max >= 16
    assert busy.probability_min < 0.5


def test_limits_hold() -> None:
    limits = DraftBudget(nodes_max=20, depth_max=5, width_max=1)
    budget = budget_of(pace(), grow(), 0.05, limits)
    assert (budget.nodes_max, budget.depth_max, budget.width_max) == (20, 5, 1)


def test_small_changes_are_not_sent() -> None:
    budget = budget_of(pace(), grow(), 0.002, LIMITS)
    assert not changed(budget, budget)
    assert not changed(budget, replace(budget, nodes_max=round(budget.nodes_max * 1.1)))
    for other in (
        replace(budget, nodes_max=2 * budget.nodes_max),
        replace(budget, depth_max=2 * budget.depth_max),
        replace(budget, width_max=budget.width_max + 1),
        replace(budget, flush_interval_s=2 * budget.flush_interval_s),
        replace(budget, probability_min=2 * budget.probability_min),
    ):
        assert changed(budget, other)


def test_speedup_counts_what_guesses_cost() -> None:
    found = VerifierPace()
    found.observe(StepReport(0.04, 1, 20, plain_s=0.02))
    assert found.speedup(2.0) == pytest.approx(1.0)
    # Steps of prefill alone say nothing.
    found.observe(StepReport(9.0, 0, 256, plain_s=9.0))
    assert found.speedup(2.0) == pytest.approx(1.0)


def drafter(**values: float | None) -> DrafterPace:
    base = DrafterPace(step_s=0.0025, leaves_max=16, rtt_s=0.002, sessions=0, agreement=0.8)
    return replace(base, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "worse",
    [
        drafter(step_s=0.025),
        drafter(rtt_s=0.3),
        drafter(sessions=200),
        drafter(agreement=0.05),
    ],
)
def test_slow_far_busy_and_wrong_drafters_are_expected_to_win_less(worse: DrafterPace) -> None:
    best = expected_tokens(drafter(), STEP_S)
    assert 1.0 <= expected_tokens(worse, STEP_S) < best - 0.2


def test_the_unknown_is_given_a_chance() -> None:
    assert expected_tokens(drafter(agreement=None), STEP_S) > expected_tokens(
        drafter(agreement=0.4), STEP_S
    )
    assert expected_tokens(drafter(), 0.0) > 1.0


def test_a_drafter_without_steps_is_as_deep_as_its_agreement() -> None:
    found = expected_tokens(drafter(step_s=0.0, leaves_max=0, rtt_s=0.0), STEP_S)
    assert found == pytest.approx(1.0 + 0.8 / 0.2, rel=0.01)
