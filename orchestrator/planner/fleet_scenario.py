"""What the fleet simulation is asked, and what it answers. Pure data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.placement import WorkerView, choose_drafters, choose_verifier
from orchestrator.planner.tree_simulation import TreeScenario
from outrider.domain import ModelInfo
from outrider.errors import ConfigError

ChooseVerifier = Callable[[Sequence[WorkerView], str, Collection[str]], WorkerView | None]
ChooseDrafters = Callable[[Sequence[WorkerView], ModelInfo, int, Collection[str]], list[WorkerView]]


@dataclass(frozen=True, slots=True)
class Policies:
    """Who decides: the product's own decisions unless others are put to the test."""

    choose_verifier: ChooseVerifier = choose_verifier
    choose_drafters: ChooseDrafters = choose_drafters


@dataclass(frozen=True, slots=True)
class FleetScenario:
    """A fleet and its traffic. Raises `ConfigError`."""

    verifiers: int = 1_000
    drafters: int = 5_000
    verifier_sessions_max: int = 64
    drafter_sessions_max: int = 64
    drafters_per_session: int = 1
    arrivals_per_s: float | None = None
    """Sessions that begin, as a Poisson process; by default what keeps `load`."""
    load: float = 0.25
    """Share of all verifiers' sessions in use."""
    prompt_tokens_mean: float = 500.0
    output_tokens_mean: float = 300.0
    tokens_spread: float = 1.0
    """Standard deviation of the logarithm of either length; 0 makes all alike."""
    prefill_tokens_per_s: float = 20_000.0
    """Of one session on its verifier."""
    deaths_per_hour: float = 1.0
    """Of each pod."""
    restart_s: float = 60.0
    """After which a dead pod is back."""
    detection_s: float = 2.0
    """After which a session notices that its verifier or drafter is dead."""
    duration_s: float = 30.0
    """What is counted."""
    warmup_s: float = 15.0
    """What is simulated before, from an empty fleet."""
    tick_s: float = 0.1
    """Sessions' speeds change so often."""
    shortlist: int = 16
    """How many of the least loaded pods placement is shown; 0 shows all, as the product does."""
    tree: TreeScenario = field(default_factory=TreeScenario)
    """Step times, agreement and round trip."""
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("verifiers", "verifier_sessions_max", "drafter_sessions_max"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("drafters", "drafters_per_session", "shortlist"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)}")
        positive = ("prompt_tokens_mean", "output_tokens_mean", "prefill_tokens_per_s")
        for name in (*positive, "duration_s", "tick_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name}: must be positive, got {value}")
        spans = ("tokens_spread", "deaths_per_hour", "restart_s", "detection_s", "warmup_s")
        for name in spans:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"{name}: must not be negative, got {value}")
        if self.arrivals_per_s is not None and not self.arrivals_per_s > 0.0:
            raise ConfigError(f"arrivals_per_s: must be positive, got {self.arrivals_per_s}")
        if not 0.0 < self.load <= 1.0:
            raise ConfigError(f"load: must lie above 0 and at most at 1, got {self.load}")


@dataclass(frozen=True, slots=True)
class PlacementCost:
    """What a decision of a policy takes, in microseconds, on this machine."""

    verifier_us: float
    """Median, over the views that placement was shown."""
    drafters_us: float
    verifier_all_us: float
    """Median, over views of all pods."""
    drafters_all_us: float


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What a simulation saw after its warm-up."""

    arrivals_per_s: float
    """Stated, or what the load asked for."""
    tokens_per_s: float
    speedup: float
    """Tokens over what the same sessions would have decoded without guesses."""
    sessions_mean: float
    verifier_utilisation: float
    """Share of the time that verifiers compute."""
    verifier_sessions_share: float
    """Share of the verifiers' sessions in use."""
    drafter_utilisation: float
    time_per_token_p50_s: float
    """Over sessions that ended, first token to last."""
    time_per_token_p95_s: float
    started: int
    finished: int
    refused: int
    """Found no room."""
    moved: int
    """Went on at another verifier when theirs died."""
    rebound: int
    """Were given another drafter when theirs died."""
    lost: int
    """Lost their verifier and found no room elsewhere."""
    verifier_deaths: int
    drafter_deaths: int
    placement: PlacementCost
