"""What the edge says to the engine's thread, and what it hears back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from outrider.domain import (
    Candidates,
    Commit,
    CommitReport,
    Draft,
    PromptLogprobs,
    Rejection,
    Resync,
    SessionSpec,
    StepReport,
)


@dataclass(frozen=True, slots=True)
class Open:
    """Start or continue a session."""

    connection: int
    spec: SessionSpec


@dataclass(frozen=True, slots=True)
class Offer:
    """A draft; None stands for bytes that were not one."""

    connection: int
    session: int
    source: int
    draft: Draft | None


@dataclass(frozen=True, slots=True)
class Repeat:
    """A request for commits that got lost."""

    connection: int
    resync: Resync


@dataclass(frozen=True, slots=True)
class Abort:
    """End a session without a further commit; one of a newer epoch is left alone."""

    connection: int
    session: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Abort every session of a connection."""

    connection: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Refuse new sessions from now on."""


Command: TypeAlias = Open | Offer | Repeat | Abort | Disconnect | Drain


@dataclass(slots=True)
class Outputs:
    """What one pass of the loop has to say to one connection."""

    opened: list[tuple[int, int]] = field(default_factory=list)
    """(session, epoch)"""
    rejections: list[Rejection] = field(default_factory=list)
    commits: list[tuple[int, Commit, CommitReport]] = field(default_factory=list)
    candidates: dict[int, Candidates] = field(default_factory=dict)
    """Of the step that made a session's commit, for sessions that asked for them."""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    """Before the first commit of their sessions."""
    step: StepReport | None = None
