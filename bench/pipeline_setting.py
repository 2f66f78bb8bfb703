"""A fleet of the pipelining benchmark, and what it should reach by calculation. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.planner import formulas
from orchestrator.planner.formulas import Figures
from orchestrator.planner.scenario import TreeScenario
from orchestrator.planner.tree_simulation import simulate

GOOD = (0.8, 0.1, 0.05)
POOR = (0.3, 0.05, 0.02)
HOPELESS = (0.05, 0.0, 0.0)
_SIMULATED_STEPS_MIN = 200
NODES_MAX = 32
"""Guesses of a verify step: the verifier's default."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One scenario; times in milliseconds, as a planner's input has them."""

    step_ms: tuple[tuple[int, float], ...] = ((1, 22.0), (32, 22.0), (128, 28.0), (512, 100.0))
    """(tokens, duration) of a verify step."""
    draft_ms: float = 2.5
    """Of a draft step, whatever its size."""
    leaves: int = 16
    """Most that a draft step expands."""
    agreement: tuple[float, ...] = GOOD
    """Share of contexts for which a drafter's first, second, third choice is right."""
    sessions: int = 1
    verifiers: int = 1
    drafters: int = 1
    silent: bool = False
    """The drafters are bound and say nothing."""
    jitter: float = 0.01

    @property
    def target_spec(self) -> str:
        """Spec of the synthetic target."""
        step = ",".join(f"{size}:{ms:g}" for size, ms in self.step_ms)
        return f"synthetic:target?seed=1&step={step}&jitter={self.jitter:g}"

    @property
    def draft_spec(self) -> str:
        """Spec of the synthetic draft model."""
        agree = ",".join(f"{share:g}" for share in self.agreement)
        return (
            f"synthetic:draft?seed=1&step=1:{self.draft_ms:g}&jitter={self.jitter:g}&agree={agree}"
        )

    def slowed(self, factor: float) -> Setting:
        """The same with all durations multiplied."""
        return replace(
            self,
            step_ms=tuple((size, ms * factor) for size, ms in self.step_ms),
            draft_ms=self.draft_ms * factor,
        )

    def row(self) -> dict[str, Any]:
        """The planner's keys, but the round trip; labelled as synthetic."""
        row = asdict(self)
        del row["silent"], row["jitter"]
        return {**row, "synthetic": True}


@dataclass(frozen=True, slots=True)
class Expected:
    """Committed tokens a second by calculation, at the round trip that was measured."""

    target_only: float
    simulation: float
    """Of this very protocol, without overheads."""
    simulated_occupancy: float
    colocated_chain: float
    colocated_tree: float
    lockstep: float
    pull: float
    push: float


def expected(setting: Setting, rtt_s: float, steps: int = 2_000) -> Expected:
    """Calculate; the closed forms are those of one verifier with its share of the sessions."""
    step = tuple((size, ms / 1_000) for size, ms in setting.step_ms)
    scenario = TreeScenario(
        step=step,
        draft_step_s=setting.draft_ms / 1_000,
        leaves=setting.leaves,
        agreement=tuple(share for share in setting.agreement if share),
        rtt_s=rtt_s,
        sessions=setting.sessions,
        verifiers=setting.verifiers,
        drafters=setting.drafters,
        silent_drafters=setting.drafters if setting.silent else 0,
        nodes_max=NODES_MAX,
        # Many sessions average out what one needs many steps for.
        steps=max(_SIMULATED_STEPS_MIN, steps // setting.sessions),
    )
    simulated = simulate(scenario)
    verifiers = min(setting.verifiers, setting.sessions)
    figures = Figures(
        step=step,
        draft=((1, setting.draft_ms / 1_000),),
        agreement=tuple(share for share in setting.agreement if share),
        leaves=setting.leaves,
        rows=-(-setting.sessions // verifiers),
        nodes_max=NODES_MAX,
    )
    return Expected(
        target_only=scenario.target_only_tokens_per_s,
        simulation=simulated.tokens_per_s,
        simulated_occupancy=simulated.occupancy,
        colocated_chain=verifiers * formulas.colocated_chain(figures).tokens_per_s,
        colocated_tree=verifiers * formulas.colocated_tree(figures).tokens_per_s,
        lockstep=verifiers * formulas.lockstep(figures, rtt_s).tokens_per_s,
        pull=verifiers * formulas.pull(figures, rtt_s).tokens_per_s,
        push=verifiers * formulas.push(figures, rtt_s).tokens_per_s,
    )
