"""What the edge says to the growing thread, and what it hears back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from outrider.domain import (
    BindSpec,
    Candidates,
    Commit,
    Draft,
    DraftBudget,
    GrowReport,
    ModelInfo,
    Rejection,
    Resync,
)


@dataclass(frozen=True, slots=True)
class Bind:
    """Mirror a session."""

    connection: int
    spec: BindSpec


@dataclass(frozen=True, slots=True)
class Follow:
    """A commit; None stands for bytes that were not one."""

    connection: int
    session: int
    commit: Commit | None
    candidates: Candidates | None = None
    """Of the step that made it, if this drafter asks for them."""


@dataclass(frozen=True, slots=True)
class SetBudget:
    """Change a session's budget."""

    connection: int
    session: int
    binding: int
    budget: DraftBudget


@dataclass(frozen=True, slots=True)
class Unbind:
    """Forget a session; a newer attachment is left alone."""

    connection: int
    session: int
    binding: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Forget every session of a connection."""

    connection: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Refuse new attachments from now on."""


Command: TypeAlias = Bind | Follow | SetBudget | Unbind | Disconnect | Drain


@dataclass(slots=True)
class Outputs:
    """What one pass of the loop has to say to one connection."""

    bound: list[tuple[int, int]] = field(default_factory=list)
    """(session, binding)"""
    rejections: list[Rejection] = field(default_factory=list)
    drafts: list[tuple[int, int, Draft]] = field(default_factory=list)
    """(session, binding, draft)"""
    resyncs: list[Resync] = field(default_factory=list)
    step: GrowReport | None = None
    swapped: ModelInfo | None = None
    """What guesses from now on."""
