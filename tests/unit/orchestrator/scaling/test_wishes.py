"""What each fleet would need, from its own signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from orchestrator.planner.drafter_choice import DrafterChoice, Prices
from orchestrator.planner.scenario import TreeScenario
from orchestrator.planner.tree_simulation import simulate
from orchestrator.scaling.drafters import DrafterGoals, DrafterMemory, Mode, wanted_drafters
from orchestrator.scaling.orchestrators import OrchestratorGoals, wanted_orchestrators
from orchestrator.scaling.signals import (
    DrafterSignals,
    OrchestratorSignals,
    SpeculationFigures,
    VerifierSignals,
)
from orchestrator.scaling.verifiers import VerifierGoals, wanted_verifiers
from orchestrator.scaling.worth import Service, agreement_by_rank, agreement_of

VERIFIERS = VerifierSignals(ready=4, sessions=128, sessions_max=256, queue_wait_s=0.1, kv_share=0.5)
FIGURES = SpeculationFigures(
    rows=32.0, plain_s=0.022, pay_min=0.05, draft_step_s=0.0025, leaves_max=16, gain=1.2
)
DRAFTERS = DrafterSignals(ready=4, sessions=128, sessions_max=1_024, figures=FIGURES)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, 3),  # 128 of 64 each, three quarters full
        ({"sessions": 250}, 6),
        ({"kv_share": 0.9}, 5),
        ({"queue_wait_s": 1.5}, 6),
        ({"queue_wait_s": 0.7}, 4),
        ({"queue_wait_s": 60.0}, 8),
        ({"waiting": 3}, 5),
        ({"refused": 200}, 8),
        ({"sessions": 0, "kv_share": 0.0, "queue_wait_s": None}, 1),  # nobody is there
    ],
)
def test_verifiers_by_the_signal_that_wants_most(change: Mapping[str, object], wanted: int) -> None:
    wish = wanted_verifiers(VerifierGoals(), replace(VERIFIERS, **change), current=4)  # type: ignore[arg-type]
    assert wish.wanted == wanted, wish.reasons
    assert wish.reasons


def test_verifiers_that_leave_are_waited_for() -> None:
    idle = replace(VERIFIERS, sessions=1, kv_share=0.0)
    assert wanted_verifiers(VerifierGoals(), idle, current=4).least == 1
    leaving = replace(idle, draining=1)
    assert wanted_verifiers(VerifierGoals(), leaving, current=4).least == 4


def test_verifiers_that_are_not_ready_do_not_count_as_room() -> None:
    busy = replace(VERIFIERS, ready=3, sessions_max=192)
    wish = wanted_verifiers(VerifierGoals(), busy, current=5)
    assert (wish.wanted, wish.least) == (3, 5), "which ones go is not ours to choose"


@pytest.mark.parametrize(
    ("sessions", "kv_share", "least"), [(0, 0.6, 4), (144, 0.0, 4), (192, 0.3, 5), (0, None, 2)]
)
def test_what_is_in_use_is_sessions_or_kv_whichever_needs_more(
    sessions: int, kv_share: float | None, least: int
) -> None:
    """One of five is not ready, and might be the one that stays."""
    using = replace(VERIFIERS, sessions=sessions, kv_share=kv_share)
    assert wanted_verifiers(VerifierGoals(), using, current=5).least == least


def test_without_any_verifier_nothing_is_known() -> None:
    gone = VerifierSignals(ready=0, sessions=0, sessions_max=0)
    assert wanted_verifiers(VerifierGoals(), gone, current=4).wanted == 4


@pytest.mark.parametrize(
    ("signals", "wanted"),
    [
        (OrchestratorSignals(2, sessions=100, sessions_max=2_048), 1),
        (OrchestratorSignals(2, sessions=2_000, sessions_max=2_048), 3),
        (OrchestratorSignals(2, 1, 2_048, connections=8_000, connections_max=8_192), 3),
        (OrchestratorSignals(2, sessions=1, sessions_max=2_048, cpu_cores=1.9), 3),
        (OrchestratorSignals(0, sessions=0, sessions_max=0), 7),
    ],
)
def test_orchestrators_by_sessions_connections_and_processor_time(
    signals: OrchestratorSignals, wanted: int
) -> None:
    assert wanted_orchestrators(OrchestratorGoals(), signals, current=7)[0] == wanted


# --- drafters ---


class Oracle:
    """A planner whose answer is given."""

    def __init__(self, speedup: float, drafters: int = 8) -> None:
        self.speedup, self.drafters = speedup, drafters

    def __call__(self, scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
        rates = {1: 100.0, self.drafters: 300.0}
        return DrafterChoice(self.drafters, self.speedup, rates)


class Drafting:
    """A conversation with the policy, a minute apart."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.memory = oracle, DrafterMemory()
        self.now_s = 1_000.0

    def ask(
        self, drafters: DrafterSignals = DRAFTERS, verifiers: VerifierSignals = VERIFIERS
    ) -> int:
        """Return what is wanted now."""
        wish = wanted_drafters(
            DrafterGoals(), self.memory, drafters, verifiers, 4, self.now_s, self.oracle
        )
        assert wish.reasons
        self.memory = wish.memory
        self.now_s += 60.0
        return wish.wanted


NOBODY = replace(DRAFTERS, ready=0, sessions=0, figures=replace(FIGURES, gain=None))


def test_the_planner_is_followed() -> None:
    assert Drafting(Oracle(1.8)).ask() == 8


def test_attachments_need_room() -> None:
    full = replace(DRAFTERS, ready=4, sessions=400, sessions_max=16)
    assert Drafting(Oracle(1.8)).ask(full) == 36, "128 sessions, each drafter nine tenths of four"


def test_no_session_no_drafter_and_back_without_a_canary() -> None:
    drafting = Drafting(Oracle(1.8))
    drafting.ask()
    assert drafting.ask(verifiers=replace(VERIFIERS, sessions=0)) == 0
    assert drafting.ask(NOBODY) == 8, "what was learnt is still known"


def test_drafters_are_sent_home_when_guessing_does_not_pay_for_long() -> None:
    drafting = Drafting(Oracle(1.8))
    drafting.ask()
    drafting.oracle.speedup = 1.01
    assert [drafting.ask() for _ in range(7)] == [8, 8, 8, 8, 8, 0, 0]
    assert drafting.memory.mode is Mode.OFF


def test_a_moment_without_gain_sends_nobody_home() -> None:
    drafting = Drafting(Oracle(1.8))
    for _ in range(12):
        drafting.oracle.speedup = 1.01
        assert [drafting.ask() for _ in range(4)] == [8] * 4
        drafting.oracle.speedup = 1.8
        assert drafting.ask() == 8


def test_back_through_a_canary_and_later_each_time_it_fails() -> None:
    drafting = Drafting(Oracle(1.01))
    while drafting.memory.mode is not Mode.OFF:
        drafting.ask()
    rests = []
    for _ in range(6):
        sent_home_s = drafting.now_s
        while drafting.ask(NOBODY) == 0:
            pass
        rests.append(drafting.now_s - sent_home_s)
        assert drafting.memory.mode is Mode.CANARY
        # It loads its model, and shows that it is still of no use.
        assert drafting.ask(NOBODY) == 1
        one = replace(DRAFTERS, ready=1, sessions=20)
        assert drafting.ask(one) == 1, "not judged in its first minute"
        assert drafting.ask(one) == 0
    assert rests[0] <= 700
    assert rests[3] > 4 * rests[0]
    assert rests[-1] <= 7_300
    while drafting.ask(NOBODY) == 0:
        pass
    drafting.oracle.speedup = 1.5
    assert drafting.ask(replace(DRAFTERS, ready=1, sessions=20)) == 8
    assert drafting.memory.mode is Mode.ON


def test_what_brings_drafters_back_is_more_than_what_keeps_them() -> None:
    drafting = Drafting(Oracle(1.06))
    assert [drafting.ask() for _ in range(20)] == [8] * 20
    drafting.memory = replace(drafting.memory, mode=Mode.CANARY, since_s=drafting.now_s)
    one = replace(DRAFTERS, ready=1, sessions=20)
    assert [drafting.ask(one) for _ in range(2)] == [1, 0]


def test_a_load_that_has_fallen_is_tried_at_once() -> None:
    drafting = Drafting(Oracle(1.01))
    while drafting.memory.mode is not Mode.OFF:
        drafting.ask()
    assert drafting.ask(NOBODY) == 0
    assert drafting.ask(NOBODY, replace(VERIFIERS, sessions=60)) == 1


def test_a_canary_that_never_comes_is_given_up() -> None:
    drafting = Drafting(Oracle(2.0))
    said = [drafting.ask(NOBODY) for _ in range(17)]
    assert said == [1] * 15 + [0, 0]
    assert drafting.memory.mode is Mode.OFF


def test_drafters_that_are_there_are_kept_until_they_have_shown_something() -> None:
    fresh = replace(DRAFTERS, figures=replace(FIGURES, gain=None))
    assert Drafting(Oracle(2.0)).ask(fresh) == 4


def test_an_outage_of_verifiers_changes_nothing() -> None:
    drafting = Drafting(Oracle(1.8))
    drafting.ask()
    assert drafting.ask(verifiers=VerifierSignals(ready=0, sessions=0, sessions_max=0)) == 4


@pytest.mark.parametrize("agreement", [0.8, 0.6, 0.3])
@pytest.mark.parametrize(("rows", "drafters"), [(1, 1), (4, 2), (16, 8)])
def test_agreement_is_read_off_what_drafters_win(
    agreement: float, rows: int, drafters: int
) -> None:
    """However many there are: few drafters win less with the same guesses."""
    scenario = TreeScenario(
        step=((1, 0.022), (64, 0.022)),
        agreement=agreement_by_rank(agreement),
        sessions=2 * rows,
        verifiers=2,
        drafters=drafters,
        steps=600 // rows,
    )
    gain = simulate(scenario).tokens_per_step - 1.0
    figures = replace(FIGURES, rows=rows, pay_min=0.0, rtt_s=0.002, gain=gain)
    service = Service(2, 2 * rows, drafters, 2 * rows, 31)
    assert agreement_of(figures, service) == pytest.approx(agreement, abs=0.15)
