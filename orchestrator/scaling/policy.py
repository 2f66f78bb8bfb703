"""What to do about each fleet now, and why. Pure: signals and memory in, decisions and memory out.

Without fresh signals everything stays as it is: what nobody has measured is no reason to change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from orchestrator.scaling.drafters import DrafterGoals, DrafterMemory, wanted_drafters
from orchestrator.scaling.orchestrators import OrchestratorGoals, wanted_orchestrators
from orchestrator.scaling.pacing import Limits, PaceMemory, pace
from orchestrator.scaling.signals import FleetName, Signals
from orchestrator.scaling.verifiers import VerifierGoals, wanted_verifiers
from orchestrator.scaling.worth import Planner, ask_planner
from outrider.errors import ConfigError

DEFAULT_LIMITS: Mapping[FleetName, Limits] = {
    FleetName.ORCHESTRATORS: Limits(floor=1, ceiling=16),
    FleetName.VERIFIERS: Limits(floor=1, ceiling=16),
    # Cheap to add, and to take away: what they know is disposable.
    FleetName.DRAFTERS: Limits(floor=0, ceiling=64, down_share=0.25, down_period_s=60.0),
}


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What is wanted of the fleets. Raises `ConfigError`."""

    limits: Mapping[FleetName, Limits] = field(default_factory=lambda: DEFAULT_LIMITS)
    """Of the fleets that are to be scaled; others are left alone."""
    orchestrators: OrchestratorGoals = field(default_factory=OrchestratorGoals)
    verifiers: VerifierGoals = field(default_factory=VerifierGoals)
    drafters: DrafterGoals = field(default_factory=DrafterGoals)
    stale_after_s: float = 60.0
    """Signals that are older change nothing."""
    shrink_within_s: float = 10.0
    """Nothing shrinks on signals that are older: what has come since needs its room."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.stale_after_s) and self.stale_after_s > 0.0):
            raise ConfigError(f"stale_after_s: must be positive, got {self.stale_after_s}")
        for fleet in (FleetName.ORCHESTRATORS, FleetName.VERIFIERS):
            limits = self.limits.get(fleet)
            if limits is not None and limits.floor < 1:
                raise ConfigError(f"floor: of {fleet.value} must be at least 1")


@dataclass(frozen=True, slots=True)
class Memory:
    """What the policy keeps from one decision to the next."""

    paces: Mapping[FleetName, PaceMemory] = field(default_factory=dict)
    drafters: DrafterMemory = field(default_factory=DrafterMemory)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about one fleet."""

    fleet: FleetName
    current: int
    wanted: int
    """What would do, if it could be had at once."""
    replicas: int
    """What to have now."""
    reasons: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.replicas != self.current

    def __str__(self) -> str:
        """For people."""
        what = f"{self.current} -> {self.replicas}" if self.changes else f"stays {self.current}"
        return f"{self.fleet.value} {what} (wanted {self.wanted}): {'; '.join(self.reasons)}"


def decide(
    config: PolicyConfig,
    memory: Memory,
    current: Mapping[FleetName, int],
    signals: Signals | None,
    now_s: float,
    planner: Planner = ask_planner,
) -> tuple[tuple[Decision, ...], Memory]:
    """Decide for each fleet that has limits and a current number of replicas.

    `signals` is the last look, None if there was none. The planner may compute for seconds.
    """
    held = _why_held(config, signals, now_s)
    if held is not None or signals is None:
        decisions = (
            _held(fleet, limits, current[fleet], held or "")
            for fleet, limits in config.limits.items()
            if fleet in current
        )
        return tuple(decisions), memory
    decided: list[Decision] = []
    for fleet, limits in config.limits.items():
        if fleet not in current:
            continue
        decision, memory = _decide(
            fleet, limits, config, memory, current[fleet], signals, now_s, planner
        )
        decided.append(decision)
    return tuple(decided), memory


def _why_held(config: PolicyConfig, signals: Signals | None, now_s: float) -> str | None:
    if signals is None:
        return "held: nothing has been measured yet"
    age_s = now_s - signals.measured_s
    if age_s > config.stale_after_s:
        return f"held: measured {age_s:.0f} s ago"
    if signals.missing:
        return f"held: {signals.missing} orchestrators could not be asked"
    return None


def _held(fleet: FleetName, limits: Limits, current: int, reason: str) -> Decision:
    # An operator's floor needs no measurement.
    replicas = max(current, limits.floor)
    return Decision(fleet, current, replicas, replicas, (reason,))


def _decide(
    fleet: FleetName,
    limits: Limits,
    config: PolicyConfig,
    memory: Memory,
    current: int,
    signals: Signals,
    now_s: float,
    planner: Planner,
) -> tuple[Decision, Memory]:
    least = 0
    match fleet:
        case FleetName.ORCHESTRATORS:
            wanted, reasons = wanted_orchestrators(
                config.orchestrators, signals.orchestrators, current
            )
        case FleetName.VERIFIERS:
            verifiers = wanted_verifiers(config.verifiers, signals.verifiers, current)
            wanted, least, reasons = verifiers.wanted, verifiers.least, verifiers.reasons
        case FleetName.DRAFTERS:
            drafters = wanted_drafters(
                config.drafters,
                memory.drafters,
                signals.drafters,
                signals.verifiers,
                current,
                now_s,
                planner,
            )
            wanted, reasons = drafters.wanted, drafters.reasons
            memory = replace(memory, drafters=drafters.memory)
    if now_s - signals.measured_s > config.shrink_within_s:
        least = current
        reasons += ("this look is too old to shrink on",)
    paced = pace(
        limits,
        memory.paces.get(fleet, PaceMemory()),
        current=current,
        wanted=wanted,
        now_s=now_s,
        least=least,
    )
    memory = replace(memory, paces={**memory.paces, fleet: paced.memory})
    decision = Decision(fleet, current, wanted, paced.replicas, (*reasons, *paced.reasons))
    return decision, memory
