"""The event simulation of the protocol."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planner.tree_simulation import Readiness, TreeScenario, simulate
from outrider.errors import ConfigError

FLAT = TreeScenario(
    step=((1, 0.022), (32, 0.022)),
    draft_step_s=0.0025,
    leaves=16,
    agreement=(0.8, 0.1, 0.05),
    nodes_max=31,
    steps=600,
)


# --- published figures ------------------------------------------------------------------------


@pytest.mark.parametrize(("rtt_ms", "speedup"), [(0.5, 3.8), (2, 3.7), (5, 3.6), (10, 3.3)])
def test_reference_by_round_trip(rtt_ms: float, speedup: float) -> None:
    result = simulate(replace(FLAT, rtt_s=rtt_ms / 1e3))
    assert result.speedup == pytest.approx(speedup, rel=0.05)
    assert result.occupancy == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("draft_ms", "leaves", "speedup"), [(6.7, 16, 2.5), (8.2, 16, 2.2), (2.5, 1, 2.7)]
)
def test_reference_by_drafter(draft_ms: float, leaves: int, speedup: float) -> None:
    result = simulate(replace(FLAT, draft_step_s=draft_ms / 1e3, leaves=leaves))
    assert result.speedup == pytest.approx(speedup, rel=0.05)


def test_far_drafters_go_on_growing_what_the_verifier_has_decided_already() -> None:
    """Until the commit reaches them, which matters from 20 ms on."""
    result = simulate(replace(FLAT, rtt_s=0.02))
    # Mirrors that stood still meanwhile would reach 2.65.
    assert result.speedup == pytest.approx(2.89, rel=0.05)


# --- what must hold ---------------------------------------------------------------------------


def test_a_silent_drafter_costs_nothing() -> None:
    silent = simulate(replace(FLAT, silent_drafters=1, steps=50))
    none = simulate(replace(FLAT, drafters=0, steps=50))
    assert silent.speedup == none.speedup == pytest.approx(1.0)
    assert silent.tokens_per_step == 1.0
    assert silent.nodes_per_step == silent.drafter_occupancy == 0.0


def test_a_second_drafter_takes_over_from_a_silent_one() -> None:
    both = replace(FLAT, drafters=2, drafters_per_session=2, silent_drafters=1, steps=300)
    alone = simulate(replace(FLAT, steps=300))
    assert simulate(both).speedup == pytest.approx(alone.speedup, rel=0.01)


def test_drafters_that_always_agree_fill_the_step() -> None:
    result = simulate(replace(FLAT, agreement=(1.0,), nodes_max=4, steps=100))
    assert result.tokens_per_step == pytest.approx(5.0, rel=0.02)
    assert result.acceptance_rate == pytest.approx(1.0, rel=0.02)


def test_guesses_that_cost_more_than_they_win_are_not_verified() -> None:
    # A second token costs 60% more time, and is right in 5% of the cases.
    steep = replace(FLAT, step=((1, 0.01), (2, 0.016)), agreement=(0.05,), steps=100)
    result = simulate(steep)
    assert result.nodes_per_step == 0.0
    assert result.speedup == pytest.approx(1.0)


def test_a_staircase_is_climbed_where_the_next_stair_pays() -> None:
    stairs = ((1, 0.01), (2, 0.014), (3, 0.014), (16, 0.014))
    result = simulate(replace(FLAT, step=stairs, nodes_max=15, steps=300))
    assert result.nodes_per_step > 8
    assert result.speedup > 2.0


def test_sessions_share_verifiers_and_drafters() -> None:
    one = simulate(replace(FLAT, sessions=4, verifiers=1, drafters=2, steps=100))
    four = simulate(replace(FLAT, sessions=16, verifiers=4, drafters=8, steps=50))
    assert four.tokens_per_s == pytest.approx(4 * one.tokens_per_s, rel=0.06)
    assert len(four.tokens_by_session) == 16
    assert max(four.tokens_by_session) < 1.5 * min(four.tokens_by_session)


def test_busy_drafters_serve_each_session_less() -> None:
    loaded = replace(FLAT, sessions=16, step=((1, 0.022), (256, 0.022)), nodes_max=200, steps=30)
    few, many = simulate(loaded), simulate(replace(loaded, drafters=8))
    assert few.drafter_occupancy == pytest.approx(1.0, abs=0.02)
    assert many.tokens_per_step > few.tokens_per_step + 0.2


def test_a_verifier_without_sessions_stands_idle() -> None:
    result = simulate(replace(FLAT, verifiers=4, steps=50))
    assert result.occupancy == pytest.approx(0.25)


def test_a_draft_step_may_depend_on_its_leaves() -> None:
    by_leaves = simulate(replace(FLAT, draft_step_s=((1, 0.0025), (16, 0.0082)), steps=400))
    slow = simulate(replace(FLAT, draft_step_s=0.0082, steps=400))
    fast = simulate(replace(FLAT, steps=400))
    assert slow.speedup < by_leaves.speedup < fast.speedup


def test_what_is_sent_late_is_worth_less() -> None:
    often = [simulate(replace(FLAT, flushes_per_step=n, steps=4_000)).speedup for n in (1, 4, None)]
    assert often[0] < 0.95 * often[1]
    assert often[1] < 0.99 * often[2]


def test_a_seed_decides_everything() -> None:
    short = replace(FLAT, steps=60)
    assert simulate(short) == simulate(short)
    assert simulate(short) != simulate(replace(short, seed=2))


def test_a_duration_may_be_asked_for() -> None:
    result = simulate(replace(FLAT, duration_s=1.0))
    assert result.duration_s == pytest.approx(1.0)
    assert sum(result.tokens_by_session) == pytest.approx(result.tokens_per_s)


def test_round_trips_never_help() -> None:
    rates = [simulate(replace(FLAT, rtt_s=rtt_s, steps=300)).speedup for rtt_s in (0, 0.02, 0.05)]
    assert rates[0] > rates[1] > rates[2] > 1.0


@settings(max_examples=25, deadline=None)
@given(
    scenario=st.builds(
        TreeScenario,
        step=st.sampled_from(
            [((1, 0.022),), ((1, 0.01), (8, 0.012), (64, 0.05)), ((1, 0.001), (4, 0.01))]
        ),
        draft_step_s=st.sampled_from([0.0005, 0.0025, 0.05]),
        leaves=st.integers(1, 8),
        agreement=st.sampled_from([(), (0.05, 0.02), (0.5, 0.2, 0.1), (0.8, 0.1, 0.05), (1.0,)]),
        rtt_s=st.sampled_from([0.0, 0.002, 0.05]),
        sessions=st.integers(1, 5),
        verifiers=st.integers(1, 3),
        drafters=st.integers(0, 3),
        drafters_per_session=st.integers(1, 3),
        silent_drafters=st.integers(0, 2),
        nodes_max=st.integers(0, 20),
        flushes_per_step=st.sampled_from([None, 0.5, 8.0]),
        steps=st.just(20),
        warmup_steps=st.sampled_from([0, 3]),
    )
)
def test_tokens_are_conserved_and_no_step_is_worth_less_than_its_rows(
    scenario: TreeScenario,
) -> None:
    result = simulate(scenario)
    assert sum(result.tokens_by_session) == pytest.approx(result.tokens_per_s * result.duration_s)
    assert 1.0 <= result.tokens_per_step <= 1.0 + scenario.nodes_max
    assert 0.0 <= result.acceptance_rate <= 1.0
    assert 0.0 < result.occupancy <= 1.0 + 1e-9
    assert 0.0 <= result.drafter_occupancy <= 1.0 + 1e-9
    if scenario.silent_drafters >= scenario.drafters:
        assert result.tokens_per_step == 1.0


def test_a_drafter_that_ran_out_of_leaves_goes_on_after_a_commit() -> None:
    # A guess of a guess is too improbable to be expanded, so it stands still in each step.
    result = simulate(replace(FLAT, agreement=(0.005,), steps=50))
    # Two draft steps of 2.5 ms in each verify step of 22 ms.
    assert result.drafter_occupancy == pytest.approx(5 / 22, rel=0.01)
    # Each step begins when the last one has missed, before anything can be there.
    assert result.nodes_per_step == 0.0


# --- waiting ----------------------------------------------------------------------------------


def test_a_start_may_be_held_until_drafts_are_there() -> None:
    """A drafter that is slower than the verifier is worth waiting for, if steps are short."""
    late = replace(FLAT, step=((1, 0.004), (32, 0.004)), draft_step_s=0.001, rtt_s=0.004, steps=400)

    def until_some(ready: Readiness) -> float:
        waited_s = ready.now_s - ready.ready_since_s
        return 0.0 if ready.expected_tokens > 2.0 else max(0.0, 0.01 - waited_s)

    held, eager = simulate(late, until_some), simulate(late)
    assert held.occupancy < 0.99 < eager.occupancy
    assert held.tokens_per_step > eager.tokens_per_step + 0.3


def test_a_hold_ends_in_time_though_no_draft_arrives() -> None:
    silent = replace(FLAT, silent_drafters=1, steps=50)

    def ten_ms(ready: Readiness) -> float:
        return max(0.0, ready.ready_since_s + 0.01 - ready.now_s)

    assert simulate(silent, ten_ms).speedup == pytest.approx(22 / 32, rel=0.01)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", ()),
        ("draft_step_s", -1.0),
        ("leaves", 0),
        ("agreement", (0.9, 0.2)),
        ("agreement", (0.0,)),
        ("rtt_s", float("nan")),
        ("sessions", 0),
        ("verifiers", 0),
        ("drafters", -1),
        ("nodes_max", -1),
        ("steps", 0),
        ("duration_s", 0.0),
    ],
)
def test_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        replace(FLAT, **{field: value})  # type: ignore[arg-type]
