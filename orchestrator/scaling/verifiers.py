"""How many verifiers: by queue wait, KV and occupancy. Pure.

Each signal alone can ask for more; all must agree to fewer. Occupancy is bounded by the room that
there is, so it never asks for more than a third at once; waiting and refusals, which have no
bound, do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.scaling.signals import VerifierSignals


@dataclass(frozen=True, slots=True)
class VerifierGoals:
    """How a verifier should fare."""

    queue_wait_s: float = 1.0
    """Within which 95% of the sessions are taken."""
    kv_share: float = 0.8
    occupancy: float = 0.75
    """Sessions over the sessions that it takes."""
    growth_max: float = 2.0
    """What is there is multiplied by so much at most for the sake of a queue."""


@dataclass(frozen=True, slots=True)
class VerifierWish:
    """What verifiers would do."""

    wanted: int
    least: int
    """So many must stay for what is in use now: whoever leaves hands its sessions to them."""
    reasons: tuple[str, ...]


def wanted_verifiers(goals: VerifierGoals, signals: VerifierSignals, current: int) -> VerifierWish:
    """Say how many would do, and why."""
    ready = signals.ready
    if not ready:
        return VerifierWish(max(1, current), current, ("none is ready",))
    wants: dict[str, int] = {}
    each = signals.sessions_max / ready
    said = f"{signals.sessions} sessions of {signals.sessions_max}"
    by_sessions = math.ceil(signals.sessions / (each * goals.occupancy) - 1e-9) if each else 0
    wants[said] = by_sessions
    by_kv = 0
    if signals.kv_share is not None:
        by_kv = math.ceil(ready * signals.kv_share / goals.kv_share - 1e-9)
        wants[f"{signals.kv_share:.0%} of KV in use"] = by_kv
    growth_max = math.ceil(ready * goals.growth_max)
    if signals.queue_wait_s is not None and signals.queue_wait_s > goals.queue_wait_s / 2:
        # Half the goal is no reason to grow, but one not to shrink.
        pressure = max(1.0, signals.queue_wait_s / goals.queue_wait_s)
        said = f"p95 queue wait of {signals.queue_wait_s:.2f} s"
        wants[said] = min(growth_max, math.ceil(ready * pressure - 1e-9))
    if signals.waiting:
        said = f"{signals.waiting} sessions that wait for KV"
        share = signals.waiting / max(1, signals.sessions)
        wants[said] = min(growth_max, max(ready + 1, math.ceil(ready * (1.0 + share))))
    if signals.refused:
        said = f"{signals.refused} requests refused for lack of room"
        more = math.ceil(signals.refused / max(1.0, each))
        wants[said] = min(growth_max, ready + more)
    wanted = max(1, *wants.values())
    reasons = tuple(f"{said} want {count}" for said, count in wants.items() if count >= wanted)
    reasons = reasons or (f"{signals.sessions} sessions want one",)
    # Who is gone must not be among those that what is left needs: some may not be ready, and
    # nobody knows which ones a StatefulSet takes away.
    least = max(1, by_sessions, by_kv) + max(0, current - ready)
    if signals.draining:
        least = current
        reasons += (f"{signals.draining} are still leaving",)
    return VerifierWish(wanted, min(current, least), reasons)
