"""Fleets at the granularity of sessions."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.placement import WorkerView, choose_drafters, choose_verifier
from orchestrator.planner.fleet_simulation import (
    FleetResult,
    FleetScenario,
    Policies,
    _FleetSimulation,
    simulate_fleet,
)
from orchestrator.planner.pods import Pods
from orchestrator.planner.speed_table import GRID, SpeedTable
from outrider.domain import ModelInfo
from outrider.errors import ConfigError

INFO = ModelInfo("m", "f", "t", 100, 1_000, "float32", proposer="language-model")
ROWS_MAX = 8

# Speed-up 3 with a drafter for oneself, 1.5 with one for many; steps of 20 ms for any batch.
TABLE = SpeedTable(
    speedups=np.tile(np.linspace(3.0, 1.5, len(GRID)), (len(GRID), 1)),
    drafter_occupancies=np.full((len(GRID), len(GRID)), 0.5),
    row_rates=np.full(ROWS_MAX + 1, 50.0),
)
SCENARIO = FleetScenario(
    verifiers=10,
    drafters=20,
    verifier_sessions_max=ROWS_MAX,
    load=0.25,
    prompt_tokens_mean=200.0,
    output_tokens_mean=100.0,
    deaths_per_hour=0.0,
    duration_s=10.0,
    warmup_s=5.0,
)


def run(scenario: FleetScenario, policies: Policies | None = None) -> FleetResult:
    clock = itertools.count()
    return simulate_fleet(scenario, TABLE, policies or Policies(), lambda: next(clock) * 1e-6)


def test_a_load_is_kept() -> None:
    result = run(replace(SCENARIO, verifiers=40, drafters=80, tokens_spread=0.3))
    assert result.verifier_sessions_share == pytest.approx(0.25, rel=0.15)
    assert result.speedup == pytest.approx(3.0, rel=0.05)
    # 20 ms for a step of three tokens.
    assert result.time_per_token_p50_s == pytest.approx(0.02 / 3, rel=0.05)
    assert result.time_per_token_p50_s <= result.time_per_token_p95_s
    assert result.lost == result.moved == result.refused == 0
    assert result.tokens_per_s == pytest.approx(result.arrivals_per_s * 100, rel=0.2)


def test_a_seed_decides_everything() -> None:
    assert run(SCENARIO) == run(SCENARIO)
    assert run(SCENARIO) != run(replace(SCENARIO, seed=2))


def test_without_drafters_sessions_decode_plainly() -> None:
    result = run(replace(SCENARIO, drafters=0))
    assert result.speedup == 1.0
    assert result.time_per_token_p50_s == pytest.approx(0.02, rel=0.01)
    assert result.drafter_utilisation == 0.0


def test_few_drafters_are_busier_and_sessions_slower() -> None:
    many = run(replace(SCENARIO, arrivals_per_s=20.0))
    few = run(replace(SCENARIO, arrivals_per_s=20.0, drafters=1))
    assert few.speedup < many.speedup
    assert few.drafter_utilisation == pytest.approx(0.5, rel=0.1)
    assert many.drafter_utilisation < 0.4


def test_a_fleet_that_is_full_refuses() -> None:
    result = run(replace(SCENARIO, arrivals_per_s=500.0))
    assert result.refused > 0
    assert result.verifier_sessions_share == pytest.approx(1.0, abs=0.05)


def test_sessions_of_a_dead_verifier_go_on_elsewhere() -> None:
    result = run(replace(SCENARIO, deaths_per_hour=60.0, restart_s=1.0))
    assert result.verifier_deaths > 0
    assert result.moved > 0
    assert result.lost == 0
    assert result.drafter_deaths > 0
    assert result.rebound > 0


@pytest.mark.parametrize("verifiers", [1, 10])
def test_pods_count_the_sessions_that_they_have(verifiers: int) -> None:
    """Through deaths of both, with and without a verifier to go to."""
    scenario = replace(
        SCENARIO, verifiers=verifiers, deaths_per_hour=600.0, restart_s=1.0, drafters_per_session=2
    )
    simulation = _FleetSimulation(scenario, TABLE, Policies(), lambda: 0.0)
    result = simulation.run(lambda _: None)
    assert result.verifier_deaths > 0
    assert result.drafter_deaths > 0
    sessions = simulation._sessions
    alive = [session for index in range(verifiers) for session in sessions.on_verifier(index)]
    assert len(alive) == len(sessions)
    for index in range(verifiers):
        assert simulation._verifiers.sessions(index) == len(sessions.on_verifier(index))
    for index in range(scenario.drafters):
        assert simulation._drafters.sessions(index) == len(sessions.on_drafter(index))


def test_a_session_whose_drafter_died_decodes_plainly_until_it_notices() -> None:
    dying = replace(SCENARIO, deaths_per_hour=1_200.0, restart_s=0.5, arrivals_per_s=20.0)
    quick, slow = (run(replace(dying, detection_s=seconds)) for seconds in (0.0, 1.0))
    assert slow.speedup < quick.speedup - 0.1


def test_nobody_to_go_to_is_a_loss() -> None:
    result = run(replace(SCENARIO, verifiers=1, deaths_per_hour=3_600.0, restart_s=1.0))
    assert result.lost > 0
    assert result.moved == 0


@settings(max_examples=15, deadline=None)
@given(
    deaths_per_hour=st.sampled_from([0.0, 200.0]),
    arrivals_per_s=st.sampled_from([5.0, 200.0]),
    drafters=st.integers(0, 6),
    drafters_per_session=st.integers(0, 3),
    drafter_sessions_max=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_sessions_are_conserved_and_speed_is_never_below_plain(
    deaths_per_hour: float,
    arrivals_per_s: float,
    drafters: int,
    drafters_per_session: int,
    drafter_sessions_max: int,
    seed: int,
) -> None:
    result = run(
        replace(
            SCENARIO,
            verifiers=3,
            drafters=drafters,
            drafters_per_session=drafters_per_session,
            drafter_sessions_max=drafter_sessions_max,
            deaths_per_hour=deaths_per_hour,
            arrivals_per_s=arrivals_per_s,
            restart_s=0.5,
            warmup_s=0.0,
            duration_s=4.0,
            seed=seed,
        )
    )
    running = result.started - result.finished - result.lost
    assert 0 <= running <= 3 * ROWS_MAX
    assert result.speedup >= 1.0 - 1e-9
    assert result.verifier_utilisation <= 1.0
    assert result.drafter_utilisation <= 1.0


def test_policies_are_put_to_the_test() -> None:
    """One that sends everybody to the first verifier fills it and refuses the rest."""

    def first(
        views: Sequence[WorkerView], model: str, exclude: Collection[str]
    ) -> WorkerView | None:
        return min(views, key=lambda view: view.address)

    crowded = replace(SCENARIO, arrivals_per_s=40.0, shortlist=0)
    result = run(crowded, Policies(choose_verifier=first))
    assert result.refused > 0
    assert result.verifier_utilisation == pytest.approx(0.1, abs=0.02)
    assert run(crowded).refused == 0


def test_placement_is_timed_by_the_clock_given() -> None:
    result = run(SCENARIO)
    assert result.placement.verifier_us == pytest.approx(1.0)
    assert result.placement.drafters_all_us == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_shortlist_decides_as_all_pods_would(data: st.DataObject) -> None:
    pods = Pods("pod", 12, INFO, 4)
    up = set(range(12))
    for _ in range(data.draw(st.integers(0, 30))):
        index = data.draw(st.integers(0, 11))
        match data.draw(st.sampled_from(["more", "less", "flip"])):
            case "more":
                pods.change(index, 1)
            case "less" if pods.sessions(index):
                pods.change(index, -1)
            case "flip" if index in up:
                pods.kill(index)
                up.remove(index)
            case "flip":
                pods.restart(index)
                up.add(index)
    everybody, few = pods.shortlist(0), pods.shortlist(3)
    assert {pods.index_of(view) for view in everybody} == up
    assert pods.up == len(up)
    assert choose_verifier(few, "m", ()) == choose_verifier(everybody, "m", ())
    assert choose_drafters(few, INFO, 3, ()) == choose_drafters(everybody, INFO, 3, ())


@pytest.mark.parametrize(
    ("field", "value"),
    [("verifiers", 0), ("drafters", -1), ("load", 1.5), ("duration_s", 0.0), ("restart_s", -1.0)],
)
def test_errors_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        replace(SCENARIO, **{field: value})  # type: ignore[arg-type]
