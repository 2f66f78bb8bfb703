"""What drafters are worth, from what is measured: agreement inferred, then the planner asked. Pure.

Drafters that are short win little, and so do good ones at a verifier that is full. Neither says
that their guesses are bad. So the gain that is measured is explained by all that bounds it: how
deep drafters get within a step, the distance, what the verifier takes up. What remains is the
agreement, and with that the planner says what another number of drafters would win.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.planner.drafter_choice import DrafterChoice, Prices, best_drafters
from orchestrator.planner.modes import VERIFIERS_SIMULATED_MAX
from orchestrator.planner.tree_simulation import TreeScenario
from orchestrator.scaling.signals import SpeculationFigures

AGREEMENT_MAX = 0.97
_AGREEMENT_MIN = 0.01
_BISECTIONS = 12
_DRAFT_STEP_MIN_S = 1e-4
"""What a lookup takes; the planner wants a duration."""
_LEAVES_MAX = 256
"""As good as no bound."""
_SESSIONS_SIMULATED_MAX = 512

# Figures are rounded to these factors before the planner is asked: answers are kept, and do not
# follow noise.
_ROWS_STEP, _TIME_STEP, _SHARE_STEP = 1.2, 1.15, 0.04


@dataclass(frozen=True, slots=True)
class Service:
    """Who serves whom now."""

    verifiers: int
    sessions: int
    """Decoding, on all verifiers."""
    drafters: int
    attachments: int
    """Of sessions to drafters."""
    nodes_max: int
    """Guesses that a verify step takes at most."""


def agreement_by_rank(agreement: float) -> tuple[float, float, float]:
    """Probability that a drafter's first, second and third choice is right.

    Only one number can be read off a gain. Draft models that are right often are so with a second
    choice about a third of the remaining times, poor ones hardly ever: with these, gains of
    simulated trees lead back to the agreement that they were simulated with.
    """
    left = (1.0 - agreement) * min(1.0, 2.0 * agreement)
    return agreement, 0.35 * left, 0.15 * left


Planner = Callable[[TreeScenario, Prices | None], DrafterChoice]


@functools.lru_cache(maxsize=256)
def ask_planner(scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
    """Ask the planner, seconds of computing; what was asked of late is remembered."""
    return best_drafters(scenario, prices)


def agreement_of(figures: SpeculationFigures, service: Service) -> float | None:
    """Infer how often a drafter's first choice is right; None while no gain is known."""
    if figures.gain is None or not service.drafters or not service.attachments:
        return None
    low, high = _AGREEMENT_MIN, AGREEMENT_MAX
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if expected_gain(middle, figures, service) < figures.gain:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def expected_gain(agreement: float, figures: SpeculationFigures, service: Service) -> float:
    """Tokens a verify step that a session served now should win with such guesses.

    A chain, whose depth is bounded by what a drafter grows within a step, by what pays, and by
    the session's part of the step's guesses. After a miss guesses are late by the way there and
    a growing step, which leaves some steps bare.
    """
    served = max(1.0, service.attachments / max(1, service.drafters))
    draft_step_s = figures.draft_step_s or 0.0
    # Everybody's best leaf takes its turn.
    turns = max(1.0, served / figures.leaves_max) if figures.leaves_max else 1.0
    depth = 64.0
    if draft_step_s:
        depth = min(depth, figures.plain_s / (draft_step_s * turns))
    if figures.pay_min > 0.0:
        depth = min(depth, math.log(figures.pay_min) / math.log(agreement))
    share = min(1.0, service.attachments / max(1, service.sessions))
    guessed_rows = max(1.0, figures.rows * share)
    depth = min(depth, service.nodes_max / guessed_rows)
    gain = _chain(agreement, max(0.0, depth))
    behind = (figures.rtt_s + draft_step_s * turns) / figures.plain_s
    run = 1.0 / (1.0 - agreement)
    bare = behind / (run / (1.0 + gain) + behind)
    return gain * (1.0 - bare)


def _chain(agreement: float, depth: float) -> float:
    """Tokens that a chain wins; a fraction of a guess is one for that fraction of the rows."""
    whole = math.floor(depth)
    gain = agreement * (1.0 - agreement**whole) / (1.0 - agreement)
    return gain + (depth - whole) * agreement ** (whole + 1)


def scenario_of(
    figures: SpeculationFigures,
    agreement: float,
    *,
    verifiers: int,
    sessions: int,
    drafters_per_session: int,
    nodes_max: int,
) -> tuple[TreeScenario, float]:
    """Lay out for the planner what is measured, and the share of the fleet that this is.

    A large fleet is shown in part, with rounded figures, so that an answer serves for long.
    """
    shown = min(verifiers, VERIFIERS_SIMULATED_MAX)
    rows = max(1.0 / shown, _rounded(sessions / verifiers, _ROWS_STEP))
    shown_sessions = max(1, min(_SESSIONS_SIMULATED_MAX, round(rows * shown)))
    plain_s = _rounded(figures.plain_s, _TIME_STEP)
    busy = max(1, round(rows))
    # What the dearest guess that pays must be worth tells what verifying costs: beyond `rows`
    # tokens the step grows by so much for each. Capped: there, no guess pays.
    slope = min(1.0, _SHARE_STEP * round(figures.pay_min / _SHARE_STEP)) / busy
    step = ((busy, plain_s), (busy + nodes_max, plain_s * (1.0 + slope * nodes_max)))
    draft_step_s = max(_DRAFT_STEP_MIN_S, figures.draft_step_s or 0.0)
    agreement = min(AGREEMENT_MAX, max(_SHARE_STEP, _SHARE_STEP * round(agreement / _SHARE_STEP)))
    scenario = TreeScenario(
        step=step,
        draft_step_s=_rounded(draft_step_s, _TIME_STEP),
        leaves=figures.leaves_max or _LEAVES_MAX,
        agreement=agreement_by_rank(agreement),
        rtt_s=_rounded(figures.rtt_s, _TIME_STEP) if figures.rtt_s > 1e-4 else 0.0,
        sessions=shown_sessions,
        verifiers=shown,
        drafters_per_session=drafters_per_session,
        nodes_max=nodes_max,
    )
    return scenario, shown / verifiers


def _rounded(value: float, factor: float) -> float:
    """Round to a power of a factor."""
    return float(factor ** round(math.log(value, factor))) if value > 0.0 else 0.0
