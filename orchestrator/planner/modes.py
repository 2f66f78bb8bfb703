"""The ways to decode that are compared, and what each would reach. Pure but for the seed."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import replace

from orchestrator.planner import formulas
from orchestrator.planner.formulas import Best, Figures
from orchestrator.planner.knots import Knots
from orchestrator.planner.tree_simulation import TreeResult, TreeScenario, simulate

VERIFIERS_SIMULATED_MAX = 4
"""A larger fleet is simulated in proportion: verifiers share nothing but drafters."""
SESSION_STEPS = 2_000
"""Verify steps times sessions of one simulation: noise of about one and a half per cent."""
_STEPS_MIN = 12


class Mode(enum.Enum):
    """A way to decode."""

    TARGET_ONLY = "target-only"
    COLOCATED_CHAIN = "colocated-chain"
    COLOCATED_TREE = "colocated-tree"
    LOCKSTEP = "lockstep"
    """A chain drafted elsewhere, everybody waiting for everybody."""
    PEARL = "pearl"
    PULL = "pull"
    PUSH = "push"
    REMOTE_TREE = "remote-tree"
    """Outrider: drafters elsewhere grow trees ahead of what is verified."""


COLOCATED = (Mode.COLOCATED_CHAIN, Mode.COLOCATED_TREE)

OVER_NETWORK = (Mode.LOCKSTEP, Mode.PEARL, Mode.PULL, Mode.PUSH, Mode.REMOTE_TREE)


def tokens_per_s(
    mode: Mode,
    scenario: TreeScenario,
    *,
    colocated_draft: Knots | None = None,
    hit_rate: float = 0.85,
    session_steps: int = SESSION_STEPS,
) -> float:
    """Predict what a fleet commits in a mode.

    The remote tree is simulated, the others are computed, for one drafter to each verifier.
    `colocated_draft` is the draft step on the verifier's own device, by default the drafter's.
    """
    if mode is Mode.REMOTE_TREE:
        return simulate_fleet(scenario, session_steps=session_steps).tokens_per_s
    rows_of = Counter(
        len(range(verifier, scenario.sessions, scenario.verifiers))
        for verifier in range(min(scenario.verifiers, scenario.sessions))
    )
    rate = 0.0
    for rows, verifiers in rows_of.items():
        figures = Figures(
            step=scenario.step,
            draft=(colocated_draft if mode in COLOCATED else None) or scenario.draft_knots,
            agreement=scenario.agreement,
            leaves=scenario.leaves,
            rows=rows,
            nodes_max=scenario.nodes_max,
            hit_rate=hit_rate,
        )
        rate += verifiers * _best(mode, figures, scenario.rtt_s).tokens_per_s
    return rate


def _best(mode: Mode, figures: Figures, rtt_s: float) -> Best:
    match mode:
        case Mode.COLOCATED_CHAIN:
            return formulas.colocated_chain(figures)
        case Mode.COLOCATED_TREE:
            return formulas.colocated_tree(figures)
        case Mode.LOCKSTEP:
            return formulas.lockstep(figures, rtt_s)
        case Mode.PEARL:
            return formulas.pearl(figures, rtt_s)
        case Mode.PULL:
            return formulas.pull(figures, rtt_s)
        case Mode.PUSH:
            return formulas.push(figures, rtt_s)
        case _:
            return formulas.target_only(figures)


def simulate_fleet(scenario: TreeScenario, *, session_steps: int = SESSION_STEPS) -> TreeResult:
    """Simulate the remote tree on a fleet of any size, a large one by a part of it.

    `tokens_per_s` is the whole fleet's; the other fields are the part's.
    """
    part = _part(scenario)
    rows = -(-part.sessions // part.verifiers)
    steps = max(_STEPS_MIN, session_steps // part.sessions)
    result = simulate(replace(part, steps=steps, warmup_steps=min(20, 5 + 60 // rows)))
    # By speed-up: a part has its own rounding of sessions to verifiers.
    return replace(result, tokens_per_s=result.speedup * scenario.target_only_tokens_per_s)


def _part(scenario: TreeScenario) -> TreeScenario:
    """The smallest part of a fleet that has its ratios, as nearly as few verifiers allow."""
    verifiers = min(scenario.verifiers, scenario.sessions)

    def error(part: int) -> tuple[float, int]:
        share = part / verifiers
        off = 0.0
        for count in (scenario.sessions, scenario.drafters):
            if count:
                scaled = count * share
                off += abs(max(1, round(scaled)) - scaled) / scaled
        return round(off, 6), part

    best = min(range(1, min(verifiers, VERIFIERS_SIMULATED_MAX) + 1), key=error)
    if verifiers <= VERIFIERS_SIMULATED_MAX and error(best)[0] > 0.0:
        best = verifiers
    share = best / verifiers
    return replace(
        scenario,
        verifiers=best,
        sessions=max(best, round(scenario.sessions * share)),
        drafters=max(1, round(scenario.drafters * share)) if scenario.drafters else 0,
        silent_drafters=round(scenario.silent_drafters * share),
    )
