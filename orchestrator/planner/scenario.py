"""What the tree simulation is asked, and what it answers. Pure data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.planner.knots import Knots, check_knots, duration_s
from outrider.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TreeScenario:
    """Sessions on verifiers, with drafters a network away. Raises `ConfigError`.

    Session i is bound to verifier `i % verifiers`, and to drafters `i % drafters` and those that
    follow it.
    """

    step: Knots = ((1, 0.022), (32, 0.022))
    """(tokens, seconds) of a verify step; tokens are rows plus guesses."""
    draft_step_s: float | Knots = 0.0025
    """Seconds of a draft step, or (leaves, seconds)."""
    leaves: int = 16
    """Most leaves that a draft step expands, over all sessions of the drafter."""
    agreement: tuple[float, ...] = (0.8, 0.1, 0.05)
    """Probability that a drafter's first, second, ... choice is the target's token."""
    rtt_s: float = 0.002
    """Round trip drafter to orchestrator to verifier and back."""
    flushes_per_step: float | None = None
    """So often a drafter sends what it has for a session, by verify steps; None: at once."""
    sessions: int = 1
    verifiers: int = 1
    drafters: int = 1
    drafters_per_session: int = 1
    """More than one is a reserve against silence only: drafters of one kind guess the same."""
    silent_drafters: int = 0
    """The first so many drafters never answer."""
    nodes_max: int = 31
    """Most guesses of one verify step, over all its sessions; tips do not count."""
    steps: int = 2_000
    """Verify steps to simulate on each verifier."""
    duration_s: float | None = None
    """Simulated seconds instead of a number of steps."""
    warmup_steps: int = 20
    """Verify steps on each verifier before anything is counted."""
    seed: int = 1

    def __post_init__(self) -> None:
        check_knots("step", self.step)
        check_knots("draft_step_s", self.draft_knots)
        counts = ("leaves", "sessions", "verifiers", "drafters_per_session", "steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("drafters", "silent_drafters", "nodes_max", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)}")
        check_agreement("agreement", self.agreement)
        if not (math.isfinite(self.rtt_s) and self.rtt_s >= 0.0):
            raise ConfigError(f"rtt_s: must not be negative, got {self.rtt_s}")
        if self.flushes_per_step is not None and not self.flushes_per_step > 0.0:
            raise ConfigError(f"flushes_per_step: must be positive, got {self.flushes_per_step}")
        if self.duration_s is not None and not self.duration_s > 0.0:
            raise ConfigError(f"duration_s: must be positive, got {self.duration_s}")

    @property
    def draft_knots(self) -> Knots:
        """`draft_step_s` as knots."""
        if isinstance(self.draft_step_s, tuple):
            return self.draft_step_s
        return ((1, self.draft_step_s),)

    @property
    def target_only_tokens_per_s(self) -> float:
        """What the same sessions decode on the same verifiers without any guess."""
        rate = 0.0
        for verifier in range(min(self.verifiers, self.sessions)):
            rows = len(range(verifier, self.sessions, self.verifiers))
            rate += rows / duration_s(self.step, rows)
        return rate


@dataclass(frozen=True, slots=True)
class TreeResult:
    """What a simulation saw after its warm-up."""

    tokens_per_s: float
    """Committed by all sessions together."""
    tokens_per_step: float
    """Committed per verify step and session: tau."""
    occupancy: float
    """Share of the time that verifiers compute, those without sessions included."""
    speedup: float
    """Over target-only decoding of the same sessions."""
    drafter_occupancy: float
    """Share of the time that drafters compute, silent ones included."""
    nodes_per_step: float
    """Guesses verified per verify step, all its sessions together."""
    acceptance_rate: float
    """Accepted guesses over verified ones; 0 if none was verified."""
    duration_s: float
    """Simulated seconds that were counted."""
    tokens_by_session: tuple[int, ...]


def check_agreement(name: str, agreement: tuple[float, ...]) -> None:
    """Raise `ConfigError` naming `name` unless these are probabilities of disjoint events."""
    for probability in agreement:
        if not 0.0 < probability <= 1.0:
            raise ConfigError(f"{name}: must lie above 0 and at most at 1, got {probability}")
    if math.fsum(agreement) > 1.0 + 1e-9:
        raise ConfigError(
            f"{name}: at most one choice is right, so probabilities add up to at most 1,"
            f" got {math.fsum(agreement):g}"
        )
