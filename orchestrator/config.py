"""Settings of the orchestrator; read once by `__main__`, frozen, passed down."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.domain import DraftBudget


@dataclass(frozen=True)
class DriverConfig:
    """Bounds and times of session handling."""

    sessions_max: int = 1_024
    """Sessions at once, one for each choice; more are refused with RESOURCE_EXHAUSTED."""
    choices_max: int = 16
    """Choices of one request; more are refused with INVALID_ARGUMENT."""
    drafters_per_session: int = 2
    budget_limits: DraftBudget = field(
        default_factory=lambda: DraftBudget(nodes_max=512, depth_max=64, width_max=3)
    )
    """Bounds of what drafters are told."""
    silence_s: float = 5.0
    """Without a commit for this long, the verifier is asked to repeat."""
    verifier_timeout_s: float = 60.0
    """Without a commit for this long, the verifier counts as lost."""
    sweep_interval_s: float = 0.5
    prefix_lookup_s: float = 0.005
    """Admission waits so long for Redis to say who holds a prompt's beginning."""
    prompt_bytes_max: int = 4 * 1024 * 1024
    stop_strings_max: int = 16
    stop_bytes_max: int = 1_024
    stop_ids_max: int = 256


@dataclass(frozen=True)
class OrchestratorConfig:
    """Everything an orchestrator process needs to know."""

    host: str
    port: int
    redis_url: str | None
    verifiers: tuple[str, ...]
    """Static addresses, host:port."""
    drafters: tuple[str, ...]
    name: str
    drain_s: float
    driver: DriverConfig
