"""The policy steers fleets whose pods load and drain, in virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.planner.drafter_choice import DrafterChoice, Prices
from orchestrator.planner.tree_simulation import TreeScenario
from orchestrator.scaling.drafters import DrafterMemory, Mode
from orchestrator.scaling.pacing import Limits
from orchestrator.scaling.policy import DEFAULT_LIMITS, Memory, PolicyConfig, decide
from orchestrator.scaling.signals import (
    DrafterSignals,
    FleetName,
    OrchestratorSignals,
    Signals,
    VerifierSignals,
)
from outrider.errors import ConfigError
from tests.support.fleet_plant import (
    EACH_VERIFIER,
    TICK_S,
    Plant,
    Seen,
    optimum,
    quick_planner,
    simulated,
    true_scenario,
    turns,
)

ORCHESTRATORS, VERIFIERS, DRAFTERS = FleetName
HOUR_S = 3_600.0


def config(**limits: Limits) -> PolicyConfig:
    """Bounds as given, the defaults for the others."""
    chosen = {FleetName(name): limit for name, limit in limits.items()}
    return PolicyConfig(limits={**DEFAULT_LIMITS, **chosen})


def no_planner(scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
    """Where drafters are beside the point."""
    return DrafterChoice(1, 2.0, {1: 100.0})


def plant(load: Callable[[float], int], **others: object) -> Plant:
    """Orchestrators and verifiers only, unless drafters are asked for."""
    limits = {name: DEFAULT_LIMITS[name] for name in (ORCHESTRATORS, VERIFIERS)}
    settings: dict[str, object] = {"config": PolicyConfig(limits=limits), "planner": no_planner}
    settings |= others
    return Plant(settings.pop("config"), load, **settings)  # type: ignore[arg-type]


def check_waits(seen: list[Seen], goal_s: float = 1.0) -> None:
    late = [each for each in seen if each.queue_wait_s > goal_s]
    assert not late, f"{len(late)} of {len(seen)} looks, first at {late[0].at_s:g} s"


@pytest.mark.parametrize("sessions", [1, 40, 200, 700])
def test_a_steady_load_is_met_and_nothing_moves_any_more(sessions: int) -> None:
    fleets = plant(lambda _: sessions)
    fleets.run(HOUR_S)
    settled = fleets.run(2 * HOUR_S)
    check_waits(settled)
    assert len({tuple(each.replicas.values()) for each in settled}) == 1
    assert not fleets.cut
    occupancy = sessions / (settled[-1].ready[VERIFIERS] * EACH_VERIFIER)
    assert occupancy <= 0.85
    assert occupancy > 0.4 or settled[-1].ready[VERIFIERS] <= 2


def test_noise_moves_nothing() -> None:
    rng = random.Random(1)
    fleets = plant(lambda _: round(rng.gauss(400, 25)))
    fleets.run(HOUR_S)
    settled = [each.replicas[VERIFIERS] for each in fleets.run(4 * HOUR_S)]
    assert turns(settled) <= 2
    assert max(settled) - min(settled) <= 2
    assert not fleets.cut


def test_a_ramp_is_followed_up_and_down() -> None:
    """A working day: from 50 sessions to 750 in four hours, and back."""

    def day(now_s: float) -> int:
        return round(400 - 350 * math.cos(2 * math.pi * now_s / (8 * HOUR_S)))

    fleets = plant(day, verifiers=2)
    fleets.run(HOUR_S / 2)
    seen = fleets.run(8 * HOUR_S)
    check_waits(seen)
    replicas = [each.replicas[VERIFIERS] for each in seen]
    assert turns(replicas) <= 3
    assert max(replicas) >= 15
    assert min(replicas[-120:]) <= 3
    assert not fleets.cut
    assert not sum(each.refused for each in seen)


def test_a_spike_is_met_within_minutes_and_not_chased() -> None:
    def spike(now_s: float) -> int:
        return 600 if HOUR_S <= now_s < HOUR_S + 1_200 else 100

    fleets = plant(spike, verifiers=3)
    before = fleets.run(HOUR_S)
    assert before[-1].replicas[VERIFIERS] == 3
    during = fleets.run(1_200)
    met = next(each.at_s for each in during if each.queue_wait_s <= 1.0)
    assert met - HOUR_S <= 300, "two rounds of doubling, each as long as loading takes"
    check_waits(during[30:])
    after = fleets.run(2 * HOUR_S)
    replicas = [each.replicas[VERIFIERS] for each in before + during + after]
    assert turns(replicas) <= 1
    assert replicas[-1] == 3
    assert not fleets.cut


def test_without_measurements_everything_stays() -> None:
    fleets = plant(lambda now_s: 400 if now_s < HOUR_S else 10, blind=lambda now_s: now_s > 3_000)
    fleets.run(3_000)
    before = fleets.history[-1].replicas
    blind = fleets.run(2 * HOUR_S)
    fresh_s = PolicyConfig().stale_after_s
    held = [each for each in blind if each.at_s > 3_000 + fresh_s + TICK_S]
    assert all(each.replicas == before for each in held)
    assert all("held" in decision.reasons[0] for each in held for decision in each.decisions)


def test_an_orchestrator_that_cannot_be_asked_holds_everything() -> None:
    fleets = plant(lambda _: 400)
    fleets.run(HOUR_S)
    assert fleets._signals is not None
    signals = replace(fleets._signals, missing=1)
    current = {VERIFIERS: 3, ORCHESTRATORS: 1}
    decisions, memory = decide(
        PolicyConfig(), fleets.memory, current, signals, fleets.now_s - TICK_S, no_planner
    )
    assert [decision.replicas for decision in decisions] == [1, 3]
    assert memory is fleets.memory


def test_nothing_shrinks_on_a_look_that_others_have_come_since() -> None:
    """Half a minute old is good enough to grow on, and too old to take room away."""
    quick = Limits(floor=1, ceiling=9, down_window_s=0.0, down_share=1.0, tolerance=0.0)
    policy = config(verifiers=quick)
    for sessions, wanted, fresh, late in ((48, 1, 1, 3), (240, 5, 5, 5)):
        verifiers = VerifierSignals(ready=3, sessions=sessions, sessions_max=3 * EACH_VERIFIER)
        orchestrators = OrchestratorSignals(ready=1, sessions=sessions, sessions_max=1_024)
        signals = Signals(0.0, orchestrators, verifiers, DrafterSignals(0, 0, 0))
        for now_s, replicas in ((1.0, fresh), (30.0, late)):
            # Whoever has just begun takes nothing, so it has looked before.
            _, memory = decide(policy, Memory(), {VERIFIERS: 3}, signals, 0.0, no_planner)
            (decision,), _ = decide(policy, memory, {VERIFIERS: 3}, signals, now_s, no_planner)
            assert decision.wanted == wanted
            assert decision.replicas == replicas


def test_a_floor_holds_even_when_nothing_is_known() -> None:
    bounds = config(verifiers=Limits(floor=3, ceiling=9))
    decisions, _ = decide(bounds, Memory(), {VERIFIERS: 1}, None, 0.0, no_planner)
    assert [decision.replicas for decision in decisions] == [3]
    assert "nothing has been measured" in str(decisions[0])


def test_verifiers_that_die_are_not_taken_for_a_lull() -> None:
    fleets = plant(lambda _: 400, verifiers=9)
    fleets.run(HOUR_S)
    pods = fleets.pods[VERIFIERS]
    before = pods.replicas
    # Half of them are lost, and loading for ten minutes: a failed zone.
    lost = pods.ready // 2
    pods.ready -= lost
    pods.loading += [fleets.now_s + 600.0] * lost
    during = fleets.run(600)
    assert min(each.replicas[VERIFIERS] for each in during) >= before
    fleets.run(HOUR_S)
    assert abs(fleets.history[-1].replicas[VERIFIERS] - before) <= 2
    assert not fleets.cut


@pytest.mark.parametrize("seed", range(6))
def test_floors_hold_and_no_session_is_cut_whatever_comes(seed: int) -> None:
    rng = random.Random(seed)
    bounds = config(
        orchestrators=Limits(floor=2, ceiling=5),
        verifiers=Limits(floor=2, ceiling=12, down_window_s=60.0, down_share=0.5),
        drafters=Limits(floor=1, ceiling=9),
    )
    level = 100

    def load(_: float) -> int:
        nonlocal level
        if rng.random() < 0.1:
            level = rng.choice([0, 5, 100, 300, 800, 2_000])
        return max(0, level + rng.randint(-level // 5, level // 5))

    fleets = plant(
        load, config=bounds, verifiers=2, orchestrators=2, drafters=1,
        blind=lambda _: rng.random() < 0.2,
    )  # fmt: skip
    for each in fleets.run(6 * HOUR_S):
        assert each.replicas[VERIFIERS] in range(2, 13)
        assert each.replicas[ORCHESTRATORS] in range(2, 6)
        assert each.replicas[DRAFTERS] in range(1, 10)
    assert not fleets.cut


def test_a_thousand_workers() -> None:
    wide = Limits(floor=1, ceiling=2_000)
    bounds = config(orchestrators=wide, verifiers=wide, drafters=replace(wide, floor=0))
    fleets = Plant(
        bounds,
        lambda now_s: 30_000 if now_s < 3 * HOUR_S else 12_000,
        verifiers=500, drafters=100, orchestrators=20,
    )  # fmt: skip
    grown = fleets.run(3 * HOUR_S)
    check_waits(grown[240:])
    ready = grown[-1].ready
    assert 600 <= ready[VERIFIERS] <= 700
    assert turns([each.replicas[VERIFIERS] for each in grown]) <= 1
    assert turns([each.replicas[DRAFTERS] for each in grown]) <= 2
    shrunk = fleets.run(5 * HOUR_S)
    check_waits(shrunk)
    assert 240 <= shrunk[-1].ready[VERIFIERS] <= 300
    assert not fleets.cut


# --- drafters ---


@pytest.mark.parametrize(
    ("sessions", "verifiers", "agreement"),
    [(8, 2, 0.8), (64, 4, 0.8), (120, 4, 0.7)],
)
@pytest.mark.parametrize("start", [1, 8])
def test_drafters_follow_the_planners_optimum(
    sessions: int, verifiers: int, agreement: float, start: int
) -> None:
    """Within 15% of the tokens per second that `outrider plan` would get, knowing the truth."""
    bounds = config(verifiers=Limits(floor=verifiers, ceiling=verifiers))
    fleets = Plant(
        bounds, lambda _: sessions, verifiers=verifiers, drafters=start,
        agreement=lambda _: agreement, planner=quick_planner, simulates=True,
    )  # fmt: skip
    fleets.run(HOUR_S / 2)
    settled = [each.replicas[DRAFTERS] for each in fleets.run(HOUR_S / 2)]
    assert turns(settled) <= 1
    best = optimum(sessions, verifiers, agreement)
    # Sizes differ in what they cost, too: not more than a step of the planner's own.
    scale = verifiers / true_scenario(sessions, verifiers, 1, agreement).verifiers
    assert settled[-1] <= 2 * best.drafters * scale + 1
    got = simulated(true_scenario(sessions, verifiers, settled[-1], agreement), 800)
    wanted = simulated(
        true_scenario(sessions, verifiers, round(best.drafters * scale), agreement), 800
    )
    assert got.tokens_per_s >= 0.85 * wanted.tokens_per_s


def test_drafters_go_when_their_guesses_become_worthless_and_come_back_by_a_canary() -> None:
    def agreement(now_s: float) -> float:
        return 0.02 if HOUR_S <= now_s < 6 * HOUR_S else 0.8

    bounds = config(verifiers=Limits(floor=4, ceiling=4))
    fleets = Plant(bounds, lambda _: 64, verifiers=4, drafters=2, agreement=agreement)
    good = fleets.run(HOUR_S)
    assert good[-1].ready[DRAFTERS] >= 2
    bad = fleets.run(5 * HOUR_S)
    replicas = [each.replicas[DRAFTERS] for each in bad]
    assert 0 in replicas[:120], "sent home within half an hour"
    gone = replicas[replicas.index(0) :]
    assert max(gone) == 1, "a canary, no more"
    assert sum(gone) / len(gone) < 0.25, "mostly none"
    assert gone.count(1) > 0
    back = fleets.run(3 * HOUR_S)
    assert back[-1].ready[DRAFTERS] == good[-1].ready[DRAFTERS]
    assert fleets.memory.drafters.mode is Mode.ON


def test_an_idle_fleet_has_no_drafters() -> None:
    fleets = Plant(config(), lambda now_s: 30 if now_s < HOUR_S else 0, drafters=1)
    assert fleets.run(HOUR_S)[-1].replicas[DRAFTERS] >= 1
    assert fleets.run(HOUR_S)[-1].replicas[DRAFTERS] == 0


def test_a_fleet_without_verifiers_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="floor: of verifiers"):
        config(verifiers=Limits(floor=0, ceiling=3))


def test_fleets_without_limits_are_left_alone() -> None:
    only = PolicyConfig(limits={DRAFTERS: Limits(floor=0, ceiling=3)})
    decisions, _ = decide(
        only, Memory(drafters=DrafterMemory()), {VERIFIERS: 3, DRAFTERS: 5}, None, 0.0
    )
    assert [(each.fleet, each.replicas) for each in decisions] == [(DRAFTERS, 5)]
