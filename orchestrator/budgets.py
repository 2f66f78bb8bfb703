"""How far, how wide and how often drafters guess for a session, and what they are worth. Pure.

The currency is the verify step: what a drafter cannot deliver within the steps that pass while
its guesses travel is not worth making, and what the verifier does not take up need not be sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from outrider.domain import DraftBudget, GrowReport, StepReport

SPEEDUP_MIN = 1.05
"""A drafter is unbound from a session whose estimated speed-up stays below."""

_STEP_SHARE = 1.0 / 16.0
_STEP_UNKNOWN_S = 0.03
_NODES_MIN, _NODES_MAX = 64, 512
_PAY_FREE = 1.0 / 16.0
"""Where guesses pay from this probability on, as many are worth making as will fit; where only
surer ones do, fewer."""
_PAY_DEAR = 0.25
"""Where only guesses surer than this pay, third choices are left out."""
FLUSHES_PER_STEP = 8
"""So often a drafter may send, by verify steps: what it joins for longer, a step begins without."""
_FLUSH_MIN_S, _FLUSH_MAX_S = 0.0005, 0.05
_PROBABILITY_MIN = 1.0 / 256.0
"""Verifiers take up nothing below this, whatever tokens cost."""
_PAY_SHARE = 0.1
"""A guess that is so much less probable than what pays now may pay once its path is committed."""
_CHANGE_MIN = 0.25
"""A budget that differs by less is not sent again."""
_AGREEMENT_UNKNOWN = 0.7


@dataclass(slots=True)
class VerifierPace:
    """Moving averages over a verifier's steps."""

    step_s: float = 0.0
    plain_s: float = 0.0
    """What steps would take without guesses."""
    pay_min: float = 0.0

    def observe(self, step: StepReport) -> None:
        """Take in a step; those without decoding rows say nothing."""
        if not step.rows:
            return
        share = _STEP_SHARE if self.step_s else 1.0
        self.step_s += share * (step.duration_s - self.step_s)
        self.plain_s += share * (step.plain_s - self.plain_s)
        self.pay_min += share * (step.pay_min - self.pay_min)

    def speedup(self, tokens_per_step: float) -> float:
        """Of a session that commits so many tokens a step, over one without drafters."""
        if not (self.step_s and self.plain_s):
            return tokens_per_step
        # A guess costs everybody's step; what a step costs beyond its guesses is not their fault.
        return tokens_per_step * min(1.0, self.plain_s / self.step_s)


def budget_of(
    pace: VerifierPace, grow: GrowReport | None, rtt_s: float, limits: DraftBudget
) -> DraftBudget:
    """Set a budget for a session of a verifier and a drafter.

    `rtt_s` is the way from the drafter to the verifier and back. `limits` bounds the result and
    is returned as it is while nothing has been measured.
    """
    if not pace.step_s:
        return limits
    grow_s = grow.duration_s if grow is not None else 0.0
    # Steps that pass between a commit and the first guess that knows of it.
    behind = (rtt_s + grow_s) / pace.step_s
    pays = max(_PAY_FREE, pace.pay_min)
    return DraftBudget(
        nodes_max=min(limits.nodes_max, max(_NODES_MIN, round(_NODES_MAX * _PAY_FREE / pays))),
        depth_max=limits.depth_max,
        flush_interval_s=min(_FLUSH_MAX_S, max(_FLUSH_MIN_S, pace.step_s / FLUSHES_PER_STEP)),
        width_max=min(limits.width_max, 2 if pays > _PAY_DEAR else 3),
        # What a far drafter guesses is of use only once the paths to it have been committed.
        probability_min=max(_PROBABILITY_MIN, _PAY_SHARE * pace.pay_min) * 0.5**behind,
    )


def changed(old: DraftBudget, new: DraftBudget) -> bool:
    """True if a budget differs so much that the drafter should know."""
    pairs = (
        (old.nodes_max, new.nodes_max),
        (old.depth_max, new.depth_max),
        (old.flush_interval_s, new.flush_interval_s),
        (old.probability_min, new.probability_min),
    )
    return old.width_max != new.width_max or any(
        abs(after - before) > _CHANGE_MIN * max(before, 1e-9) for before, after in pairs
    )


@dataclass(frozen=True, slots=True)
class DrafterPace:
    """What is known of a drafter, for choosing among many."""

    step_s: float
    """Duration of a growing step; 0 if guesses come without one."""
    leaves_max: int
    """Leaves a step, over all its sessions; 0: no bound."""
    rtt_s: float
    """From the drafter to the verifier and back."""
    sessions: int
    """That it has already."""
    agreement: float | None = None
    """Share of its guesses that were right; None: not known yet."""


def expected_tokens(drafter: DrafterPace, step_s: float) -> float:
    """Estimate tokens a verify step of `step_s` commits for one more session of a drafter.

    A chain with the drafter's agreement, as deep as the drafter can grow within a step, and
    a restart after each miss, during which the guesses are late by round trip and growing step.
    """
    step_s = step_s or _STEP_UNKNOWN_S
    agreement = min(0.99, _AGREEMENT_UNKNOWN if drafter.agreement is None else drafter.agreement)
    depth = 64.0
    if drafter.step_s:
        turns = 1.0
        if drafter.leaves_max:
            # Everybody's best leaf takes its turn.
            turns = max(1.0, (drafter.sessions + 1) / drafter.leaves_max)
        depth = step_s / (drafter.step_s * turns)
    gain = agreement * (1.0 - math.pow(agreement, depth)) / (1.0 - agreement)
    behind = (drafter.rtt_s + drafter.step_s) / step_s
    # A miss ends a run of 1 / (1 - agreement) tokens; the steps that it leaves bare win nothing.
    run = 1.0 / max(1e-6, (1.0 - agreement))
    bare = behind / (run / (1.0 + gain) + behind)
    return 1.0 + gain * (1.0 - bare)
