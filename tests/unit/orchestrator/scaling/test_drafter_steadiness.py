"""The number of drafters follows what matters, not the noise of what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from orchestrator.planner.drafter_choice import DrafterChoice, Prices
from orchestrator.planner.tree_simulation import TreeScenario
from orchestrator.scaling.drafters import DrafterGoals, DrafterMemory, wanted_drafters
from orchestrator.scaling.signals import DrafterSignals, SpeculationFigures, VerifierSignals

VERIFIERS = VerifierSignals(ready=4, sessions=128, sessions_max=256)
FIGURES = SpeculationFigures(
    rows=32.0, plain_s=0.022, draft_step_s=0.0025, leaves_max=16, rtt_s=0.002, gain=0.5
)
DRAFTERS = DrafterSignals(ready=4, sessions=128, sessions_max=1_024, figures=FIGURES)


class Planning:
    """A conversation with the policy, whose planner answers as it is told."""

    def __init__(self, prices: Prices | None = None) -> None:
        self.goals, self.memory = DrafterGoals(prices=prices), DrafterMemory()
        self.rates: Mapping[int, float] = {}
        self.chosen = 1
        self.asked: list[Prices | None] = []

    def ask(
        self,
        chosen: int,
        rates: Mapping[int, float],
        drafters: DrafterSignals = DRAFTERS,
        verifiers: VerifierSignals = VERIFIERS,
    ) -> int:
        """Return what is wanted if the planner chooses so, for such rates."""
        self.chosen, self.rates = chosen, rates
        wish = wanted_drafters(self.goals, self.memory, drafters, verifiers, 4, 0.0, self._plan)
        self.memory = wish.memory
        return wish.wanted

    def _plan(self, scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
        self.asked.append(prices)
        return DrafterChoice(self.chosen, 1.8, self.rates)


def test_a_flat_curve_is_not_followed() -> None:
    planning = Planning()
    assert planning.ask(4, {4: 100.0, 8: 102.0}) == 4
    assert planning.ask(8, {4: 100.0, 8: 105.0}) == 4, "twice as many for a twentieth"
    assert planning.ask(8, {4: 100.0, 8: 107.0}) == 8
    assert planning.ask(4, {4: 100.0, 8: 104.0}) == 8, "they are there, and win something"
    assert planning.ask(4, {4: 100.0, 8: 100.5}) == 4


def test_prices_are_followed_when_tokens_would_be_much_dearer() -> None:
    """16 for the verifiers and 1 for each drafter."""
    planning = Planning(Prices(verifier=4.0, drafter=1.0))
    assert planning.ask(4, {4: 100.0, 8: 110.0}) == 4
    assert planning.ask(8, {4: 100.0, 8: 125.0}) == 4, "cheaper by 4%"
    assert planning.ask(8, {4: 100.0, 8: 130.0}) == 8, "by 8%"
    assert set(planning.asked) == {planning.goals.prices}


def test_agreement_moves_slowly_while_drafters_are_there() -> None:
    planning = Planning()
    planning.ask(4, {4: 100.0})
    first = planning.memory.agreement
    assert first is not None
    worse = replace(DRAFTERS, figures=replace(FIGURES, gain=0.1))
    fresh = Planning()
    fresh.ask(4, {4: 100.0}, worse)
    assert fresh.memory.agreement is not None
    planning.ask(4, {4: 100.0}, worse)
    assert planning.memory.agreement == pytest.approx(
        first + 0.2 * (fresh.memory.agreement - first)
    )


def test_drafters_that_are_short_are_not_taken_for_bad_ones() -> None:
    """Each session waits for its turn; what it wins says little about the guesses."""
    planning = Planning()
    planning.ask(4, {4: 100.0})
    before = planning.memory.agreement
    short = replace(DRAFTERS, ready=1, figures=replace(FIGURES, gain=0.05))
    planning.ask(4, {4: 100.0}, short)
    assert planning.memory.agreement == before
    planning.ask(4, {4: 100.0}, replace(short, figures=replace(FIGURES, gain=3.0)))
    assert before is not None
    assert planning.memory.agreement is not None
    assert planning.memory.agreement > before, "good ones show even so"


def test_sessions_that_wait_for_kv_need_no_drafters() -> None:
    planning = Planning()
    assert planning.ask(4, {4: 100.0}, verifiers=replace(VERIFIERS, waiting=128)) == 0
