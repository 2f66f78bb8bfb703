"""What the policy is told about the fleets. Pure data."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FleetName(enum.Enum):
    """A fleet that is sized on its own."""

    ORCHESTRATORS = "orchestrators"
    VERIFIERS = "verifiers"
    DRAFTERS = "drafters"


@dataclass(frozen=True, slots=True)
class OrchestratorSignals:
    """All orchestrators together."""

    ready: int
    """That have answered."""
    sessions: int
    sessions_max: int
    """That they take, all together."""
    connections: int = 0
    """Of HTTP clients."""
    connections_max: int = 0
    cpu_cores: float | None = None
    """That they kept busy since the last look; None: not known yet."""


@dataclass(frozen=True, slots=True)
class VerifierSignals:
    """All verifiers together."""

    ready: int
    """That take sessions."""
    sessions: int
    sessions_max: int
    """That those which are ready take, all together."""
    waiting: int = 0
    """Admitted sessions that wait for KV."""
    refused: int = 0
    """Requests refused for lack of room since the last look."""
    queue_wait_s: float | None = None
    """95th percentile, since the last look, of the time until a verifier has taken a session;
    None: no session began."""
    kv_share: float | None = None
    """Of all KV in use; None: nobody says."""
    draining: int = 0
    """That are leaving, with sessions perhaps."""


@dataclass(frozen=True, slots=True)
class SpeculationFigures:
    """What verifiers and drafters are like now: means over those that say something."""

    rows: float
    """Sessions that decode on a verifier which decodes any."""
    plain_s: float
    """Duration of a verify step without guesses."""
    pay_min: float = 0.0
    """Least probability with which guesses pay in such a step: the price of verifying one."""
    draft_step_s: float | None = None
    """Duration of a drafter's growing step, 0 if it needs none; None: no drafter says."""
    leaves_max: int = 0
    """Of such a step; 0: no bound."""
    rtt_s: float = 0.0
    """Drafter to orchestrator to verifier and back."""
    gain: float | None = None
    """Tokens a verify step that drafters win for a session they serve; None: not known."""


@dataclass(frozen=True, slots=True)
class DrafterSignals:
    """All drafters together."""

    ready: int
    sessions: int
    """Attachments of sessions to drafters."""
    sessions_max: int
    figures: SpeculationFigures | None = None
    """None: no verifier has taken a step yet."""


@dataclass(frozen=True, slots=True)
class Signals:
    """One look at the fleets."""

    measured_s: float
    """When, on the clock of whoever decides."""
    orchestrators: OrchestratorSignals
    verifiers: VerifierSignals
    drafters: DrafterSignals
    missing: int = 0
    """Orchestrators that are there but could not be asked: what they hold is not counted."""
