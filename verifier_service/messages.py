"""What the edge says to the engine's thread, and what it hears back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from outrider.domain import (
    Candidates,
    Commit,
    CommitReport,
    Draft,
    KvPeer,
    PromptLogprobs,
    PullOutcome,
    PullReport,
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


@dataclass(frozen=True, slots=True)
class Lend:
    """A peer's request for a block; it is held until it is given back."""

    digest: bytes
    reply: Callable[[int | None], bool]
    """Takes the block's number, or None if there is no such block; False: nobody waits any more."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """A lent block is needed no longer."""

    block: int


@dataclass(frozen=True, slots=True)
class PulledBlock:
    """A block has come from a peer; those of a pull come in order."""

    pull: int
    data: bytearray
    taken: Callable[[], None]
    """To be called once the data is needed no longer."""


@dataclass(frozen=True, slots=True)
class PullOver:
    """A pull has ended, all that has come having been told of."""

    pull: int
    outcome: PullOutcome
    first_s: float
    """Until the peer answered; 0 if it did not."""
    took_s: float
    size_bytes: int


Command: TypeAlias = (
    Open | Offer | Repeat | Abort | Disconnect | Drain | Lend | GiveBack | PulledBlock | PullOver
)


@dataclass(frozen=True, slots=True)
class PullOrder:
    """From the engine's thread to the edge: fetch these blocks."""

    pull: int
    peer: KvPeer
    digests: tuple[bytes, ...]
    wait_s: float
    """It is of no use later than this."""


@dataclass(frozen=True, slots=True)
class CallOff:
    """From the engine's thread to the edge: what a pull brings is of no use any more."""

    pull: int


Errand: TypeAlias = PullOrder | CallOff


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
    kv_pulls: list[PullReport] = field(default_factory=list)
    step: StepReport | None = None
