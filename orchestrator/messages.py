"""Events that a session is told of, and commands that it answers with. Plain data.

What is made for every commit is a named tuple: a frozen dataclass takes three times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from outrider.domain import (
    Commit,
    FinishReason,
    PromptLogprobs,
    Rejection,
    SessionSpec,
    SpeculationCounters,
    TokenLogprobs,
)
from outrider.errors import OutriderError

# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    """The driver chose a verifier."""

    address: str


@dataclass(frozen=True, slots=True)
class NotPlaced:
    """No verifier is left to choose."""

    reason: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The verifier admitted the session."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The verifier refused or ended the session."""

    rejection: Rejection


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The verifier computed log-probabilities of a stretch of the prompt."""

    piece: PromptLogprobs


class Report(Protocol):
    """What a `CommitReport` holds; reading the counters may be what decodes them."""

    @property
    def counters(self) -> SpeculationCounters: ...
    @property
    def sources(self) -> tuple[int, ...]: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]: ...


class Committed(NamedTuple):
    """The verifier decided tokens."""

    commit: Commit
    report: Report


@dataclass(frozen=True, slots=True)
class VerifierLost:
    """The verifier's stream broke, or it owes a commit for too long."""

    reason: str


@dataclass(frozen=True, slots=True)
class MovePays:
    """Another verifier would serve the session so much better that a move pays."""

    address: str


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing came from the verifier for a while; perhaps a commit was lost."""


@dataclass(frozen=True, slots=True)
class DrafterAttached:
    """The driver chose a drafter and gave the attachment this number."""

    binding: int
    address: str


@dataclass(frozen=True, slots=True)
class DrafterGone:
    """An attachment ended: refused (then for good), or the drafter's stream broke."""

    binding: int
    refused: bool = False


@dataclass(frozen=True, slots=True)
class DrafterUseless:
    """A drafter's guesses win too little; the session may be better off without."""

    binding: int


@dataclass(frozen=True, slots=True)
class DrafterAvailable:
    """A drafter has become ready somewhere, or it is time to try one again."""


@dataclass(frozen=True, slots=True)
class DrafterGap:
    """A drafter saw a gap in the commits."""

    binding: int
    epoch: int
    have_length: int


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody listens any more."""


Event: TypeAlias = (
    Placed
    | NotPlaced
    | Opened
    | Refused
    | PromptScored
    | Committed
    | VerifierLost
    | MovePays
    | Silence
    | DrafterAttached
    | DrafterGone
    | DrafterUseless
    | DrafterAvailable
    | DrafterGap
    | ClientGone
)


# --- commands ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlaceVerifier:
    """Choose a verifier that is not excluded; answer with Placed or NotPlaced."""

    exclude: frozenset[str]


@dataclass(frozen=True, slots=True)
class OpenOnVerifier:
    """Open the session on the verifier that was placed."""

    spec: SessionSpec


@dataclass(frozen=True, slots=True)
class AbortOnVerifier:
    """Free the session on a verifier, which is no longer the session's when this is read."""

    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class AskRepeat:
    """Ask the verifier for the commits after `have_length`."""

    epoch: int
    have_length: int


@dataclass(frozen=True, slots=True)
class AttachDrafters:
    """Choose up to `count` drafters that are not excluded; answer each with DrafterAttached."""

    count: int
    exclude: frozenset[str]


@dataclass(frozen=True, slots=True)
class BindDrafter:
    """Send prompt and committed tokens to a drafter."""

    binding: int
    epoch: int
    committed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnbindDrafter:
    """Detach a drafter."""

    binding: int
    address: str


class RelayCommit(NamedTuple):
    """Pass a commit on. `verbatim`: the verifier's own bytes may be relayed unread."""

    bindings: tuple[int, ...]
    commit: Commit
    verbatim: bool


@dataclass(frozen=True, slots=True)
class DeliverPrompt:
    """Hand the prompt's log-probabilities to the client: once, all of them, before any output."""

    tokens: tuple[TokenLogprobs, ...]
    """From the prompt's second token on."""


class Deliver(NamedTuple):
    """Hand output to the client."""

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each id if they were asked for."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell the client that the output is complete."""

    reason: FinishReason
    completion_tokens: int
    counters: SpeculationCounters


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the client that there will be no more output."""

    error: OutriderError


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the session; always the last command."""


Command: TypeAlias = (
    PlaceVerifier
    | OpenOnVerifier
    | AbortOnVerifier
    | AskRepeat
    | AttachDrafters
    | BindDrafter
    | UnbindDrafter
    | RelayCommit
    | DeliverPrompt
    | Deliver
    | Finish
    | Fail
    | Forget
)
