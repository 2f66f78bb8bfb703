"""Plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.planner import plan as planning
from orchestrator.planner.modes import Mode, simulate_fleet
from orchestrator.planner.plan import PlanRequest, break_even_rtt_s, load_limit, make_plan
from orchestrator.planner.plan_report import advice
from orchestrator.planner.tree_simulation import TreeScenario
from outrider.errors import ConfigError

NEAR = TreeScenario(step=((1, 0.022), (32, 0.022), (64, 0.04)), nodes_max=31, steps=200)


def test_a_near_drafter_is_worth_a_machine_of_its_own() -> None:
    plan = make_plan(PlanRequest(replace(NEAR, rtt_s=0.002), verifiers=1, session_steps=240))
    assert plan.fastest is Mode.REMOTE_TREE
    assert plan.drafters == 1
    rates = {mode.mode: mode.speedup for mode in plan.modes}
    assert rates[Mode.TARGET_ONLY] == pytest.approx(1.0)
    assert rates[Mode.COLOCATED_CHAIN] == pytest.approx(2.35, rel=0.01)
    assert rates[Mode.COLOCATED_TREE] == pytest.approx(3.14, rel=0.01)
    assert rates[Mode.REMOTE_TREE] == pytest.approx(3.7, rel=0.08)
    assert plan.cheapest is None
    assert plan.modes[0].cost_per_million is None


def test_a_far_one_is_not() -> None:
    far = replace(NEAR, rtt_s=0.05)
    plan = make_plan(PlanRequest(far, verifiers=1, drafters=1, session_steps=200))
    assert plan.fastest is Mode.COLOCATED_TREE
    assert plan.break_even_rtt_s is not None
    assert 0.01 < plan.break_even_rtt_s < 0.025
    assert any("beyond a round trip of" in sentence for sentence in advice(plan))


def test_prices_decide_what_is_cheapest() -> None:
    scenario = replace(NEAR, sessions=2)
    dear = PlanRequest(
        scenario, verifiers=1, verifier_price=1.0, drafter_price=100.0, session_steps=120
    )
    plan = make_plan(dear)
    assert plan.drafters == 1
    assert plan.cheapest is Mode.COLOCATED_TREE
    costs = {mode.mode: mode.cost_per_million for mode in plan.modes}
    plain = costs[Mode.TARGET_ONLY]
    assert plain is not None
    assert plain == pytest.approx(1.0 / 3600 / (2 / 0.022) * 1e6)
    cheap = make_plan(replace(dear, drafter_price=0.01))
    assert cheap.cheapest is Mode.REMOTE_TREE


def test_a_slow_drafter_beside_a_quick_one_of_ones_own_never_wins() -> None:
    slow = replace(NEAR, draft_step_s=0.015)
    assert break_even_rtt_s(slow, ((1, 0.001),), session_steps=100) == 0.0


def test_load_beyond_which_plain_decoding_wins() -> None:
    # From 32 tokens on every token costs its time.
    limit = load_limit(
        replace(NEAR, step=((1, 0.022), (32, 0.022), (33, 0.0227)), drafters=4), session_steps=60
    )
    assert limit is not None
    assert 8 <= limit <= 40
    assert load_limit(replace(NEAR, agreement=(0.01,)), session_steps=60) == 0


def test_what_each_session_needs_decides_the_verifiers() -> None:
    # Plainly 45 tokens/s; 16 sessions on one verifier cannot all have 150.
    scenario = replace(NEAR, sessions=16)
    assert make_plan_verifiers(scenario, 0.0) == 1
    few, many = make_plan_verifiers(scenario, 60.0), make_plan_verifiers(scenario, 140.0)
    assert 1 <= few < many <= 16
    with pytest.raises(ConfigError, match=r"^tokens_per_s_min: "):
        make_plan_verifiers(scenario, 1_000.0)


def make_plan_verifiers(scenario: TreeScenario, need: float) -> int:
    request = PlanRequest(scenario, tokens_per_s_min=need, session_steps=200)
    return planning._fewest_verifiers(request)


def test_one_price_is_no_price() -> None:
    with pytest.raises(ConfigError, match="verifier_price, drafter_price: "):
        PlanRequest(NEAR, verifier_price=1.0)


def test_a_large_fleet_is_simulated_by_its_part() -> None:
    small = replace(NEAR, sessions=6, verifiers=2, drafters=4)
    large = replace(small, sessions=6_000, verifiers=2_000, drafters=4_000)
    assert simulate_fleet(large, session_steps=300).tokens_per_s == pytest.approx(
        1_000 * simulate_fleet(small, session_steps=300).tokens_per_s, rel=0.06
    )


def test_a_fleet_without_drafters_decodes_plainly() -> None:
    assert simulate_fleet(replace(NEAR, drafters=0), session_steps=50).speedup == pytest.approx(1.0)
