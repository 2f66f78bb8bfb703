"""What a journal says, against what a client has: the state from which a generation goes on. Pure.

Ids that the client has are never decided again; ids that are journaled are replayed. Text is a
function of ids, so it is counted in characters and told from where the client's ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.jobs import Job
from outrider.committed import digest
from outrider.domain import FinishReason, SessionSpec, TokenLogprobs
from outrider.errors import InvalidRequest, Mismatch
from outrider.journal import Continuation, Entry, Journaled, continuation_of

EMPTY_DIGEST = digest(())


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """How far a client has got with one choice."""

    offset: int = 0
    """Output ids that it has."""
    digest: int = EMPTY_DIGEST
    """XXH3-64 over these ids as little-endian uint32."""
    characters: int | None = None
    """Code points of text that it has; None: those of the ids."""
    finished: bool = False
    """It has the choice's end."""


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """A wish to continue a generation."""

    generation: str
    tenant: str
    points: Mapping[int, ResumePoint]
    """By choice; those that are not named have not begun."""
    prompt_logprobs_known: bool = False
    """The client has the prompt's log-probabilities."""

    def point(self, choice: int) -> ResumePoint:
        """Return where the client stands in a choice."""
        return self.points.get(choice) or ResumePoint()


@dataclass(frozen=True, slots=True)
class Restored:
    """One choice as it was journaled, and what of it the client lacks."""

    spec: SessionSpec
    """Its epoch is the one before that of its next opening."""
    tokens: tuple[int, ...]
    """All output so far."""
    point: ResumePoint
    logprobs: tuple[TokenLogprobs, ...]
    """Of the tokens that the client lacks, if they were asked for."""
    finish: FinishReason | None
    """Set if the choice has ended."""


def check_points(request: ResumeRequest, journaled: Journaled, choices: int) -> None:
    """Compare what a client says that it has with the journal, before anything is touched.

    Raises `InvalidRequest` for what was never said, `Mismatch` for what is not journaled.
    """
    for choice, point in request.points.items():
        if not 0 <= choice < choices:
            raise InvalidRequest("choices.choice", f"the generation has no choice {choice}")
        tokens = _continuation(journaled.entries, choice).tokens
        if point.offset > len(tokens):
            raise Mismatch(
                f"the client has {point.offset} ids of choice {choice} and the journal "
                f"{len(tokens)}: Redis was away, so the generation cannot be resumed"
            )
        if digest(tokens[: point.offset]) != point.digest:
            raise InvalidRequest(
                "choices.digest",
                f"differs from that of the first {point.offset} ids of choice {choice}",
            )


def restore(request: ResumeRequest, journaled: Journaled, job: Job) -> tuple[Restored, ...]:
    """Put all choices together as they were journaled. Raises `Mismatch`."""
    choices = tuple(
        _restored(request.point(choice), journaled, choice, spec)
        for choice, spec in enumerate(job.choices)
    )
    if job.prompt_logprobs and not request.prompt_logprobs_known and choices[0].finish is not None:
        raise Mismatch("the prompt's log-probabilities are not kept, and the output is complete")
    return choices


def _restored(point: ResumePoint, journaled: Journaled, choice: int, spec: SessionSpec) -> Restored:
    continuation = _continuation(journaled.entries, choice)
    # The first opening is at the epoch that the take-over set.
    epoch = journaled.epochs.get(choice, 1) - 1
    return Restored(
        replace(spec, epoch=epoch),
        continuation.tokens,
        point,
        continuation.logprobs[point.offset :],
        continuation.finish,
    )


def _continuation(entries: Sequence[Entry], choice: int) -> Continuation:
    try:
        return continuation_of(entries, choice)
    except ValueError as error:
        raise Mismatch(f"the journal is damaged: {error}") from None
