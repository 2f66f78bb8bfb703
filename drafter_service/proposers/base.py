"""What a proposer is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from drafter_service.mirror import Mirror
from outrider.domain import Candidates, ModelInfo
from outrider.draft_tree import Advance


class Proposer(Protocol):
    """Grows the trees of many sessions. Called by one thread only.

    A proposer may keep state for each mirror, from `open` to `close`; all of it can be rebuilt
    from the mirror's committed tokens.
    """

    @property
    def info(self) -> ModelInfo:
        """Identity, for the handshake."""
        ...

    @property
    def leaves_max(self) -> int:
        """Leaves, over all sessions, that a step expands; 0 if steps have no such bound."""
        ...

    def open(self, mirror: Mirror) -> None:
        """Begin with a session whose tree is empty."""
        ...

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        """The mirror followed a commit of `tokens`; its tree is re-rooted already."""
        ...

    def close(self, mirror: Mirror) -> None:
        """Free what is kept for a session."""
        ...

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """Do one step over all sessions, attaching guesses with `mirror.attach`.

        Returns False if nothing is left to do before the next commit.
        """
        ...


@runtime_checkable
class CandidateTaker(Protocol):
    """A proposer that learns from the target's candidates; its `info` says how many it wants."""

    def take(self, mirror: Mirror, candidates: Candidates) -> None:
        """Take in what a step computed for a session, before the step's commit is followed.

        Some may be missing, and ids are not checked: they may be outside the vocabulary.
        """
        ...


@runtime_checkable
class Overlapping(Protocol):
    """A proposer whose steps have time for other work."""

    def overlap(self, work: Callable[[], None]) -> bool:
        """Do `work` in each step that computes something, from now on, where it costs least.

        That is while an accelerator computes, or before the processor does, on the thread that
        called `grow`; the step's own guesses are not attached yet. False if no step computes.
        """
        ...


class GuessesOnce(Protocol):
    """State of a session for which a proposer guesses once for each text."""

    proposed_length: int
    """Length of the committed tokens for which guesses were made."""


StateT = TypeVar("StateT", bound=GuessesOnce)


def with_new_text(
    mirrors: Iterable[Mirror], states: Mapping[tuple[int, int], StateT]
) -> Iterator[tuple[Mirror, StateT]]:
    """Yield the sessions, with their states by `Mirror.key`, whose text has changed; each once."""
    for mirror in mirrors:
        state = states[mirror.key]
        if state.proposed_length != len(mirror.log):
            state.proposed_length = len(mirror.log)
            yield mirror, state
