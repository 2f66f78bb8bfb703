"""How many orchestrators: by sessions, connections and processor time. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.scaling.signals import OrchestratorSignals


@dataclass(frozen=True, slots=True)
class OrchestratorGoals:
    """How full an orchestrator should be."""

    share: float = 0.7
    """Of the sessions, and of the connections, that it takes."""
    cpu_cores: float = 0.7
    """Its event loop has one."""


def wanted_orchestrators(
    goals: OrchestratorGoals, signals: OrchestratorSignals, current: int
) -> tuple[int, tuple[str, ...]]:
    """Return how many would do, and why."""
    if not signals.ready:
        return current, ("none has answered",)
    wants = {
        f"{signals.sessions} sessions of {signals.sessions_max}": _by_share(
            signals.sessions, signals.sessions_max, signals.ready, goals.share
        ),
    }
    if signals.connections_max:
        said = f"{signals.connections} connections of {signals.connections_max}"
        wants[said] = _by_share(
            signals.connections, signals.connections_max, signals.ready, goals.share
        )
    if signals.cpu_cores is not None:
        said = f"{signals.cpu_cores:.2f} cores busy"
        wants[said] = math.ceil(signals.cpu_cores / goals.cpu_cores - 1e-9)
    wanted = max(1, *wants.values())
    reasons = tuple(f"{said} want {count}" for said, count in wants.items() if count >= wanted)
    return wanted, reasons or (f"{signals.sessions} sessions want one",)


def _by_share(used: int, room: int, replicas: int, share: float) -> int:
    """Replicas with which a share of the room is in use."""
    if not room:
        return 0
    return math.ceil(used * replicas / (room * share) - 1e-9)
