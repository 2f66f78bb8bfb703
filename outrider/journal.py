"""A generation's journal: its entries, how they are packed, what is asked of its keeper. Pure."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from outrider.domain import FinishReason, TokenLogprobs

_HEAD = struct.Struct("<IHIIBB")
"""epoch, choice, tokens before, tokens, finish reason, whether log-probabilities follow"""
_SCORE = struct.Struct("<fB")
"""log-probability, number of alternatives"""
_REASONS = (None, FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORTED)


class Entry(NamedTuple):
    """What was committed of one choice at once; a named tuple as there is one for every commit."""

    choice: int
    epoch: int
    """Of the session when it was committed."""
    start: int
    """Output tokens of the choice before these."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token if they were asked for."""
    finish: FinishReason | None = None
    """Set in the choice's last entry."""


def entry_to_bytes(entry: Entry) -> bytes:
    """Pack an entry: 16 bytes, 4 for each token, and 5 + 8 for each alternative if scored."""
    choice, epoch, start, tokens, logprobs, finish = entry
    count = len(tokens)
    reason = 0 if finish is None else _REASONS.index(finish)
    data = _HEAD.pack(epoch, choice, start, count, reason, bool(logprobs))
    data += struct.pack(f"<{count}I", *tokens)
    if not logprobs:
        return data
    scores = (
        _SCORE.pack(score.logprob, len(score.top))
        + b"".join(struct.pack("<If", token, logprob) for token, logprob in score.top)
        for score in logprobs
    )
    return data + b"".join(scores)


def entry_from_bytes(data: bytes) -> Entry:
    """Unpack an entry. Raises `ValueError` if it is none."""
    try:
        epoch, choice, start, count, finish, scored = _HEAD.unpack_from(data)
        tokens = struct.unpack_from(f"<{count}I", data, _HEAD.size)
        at = _HEAD.size + 4 * count
        logprobs: list[TokenLogprobs] = []
        for token in tokens if scored else ():
            logprob, tops = _SCORE.unpack_from(data, at)
            at += _SCORE.size
            top = tuple(struct.unpack_from("<If", data, at + 8 * place) for place in range(tops))
            at += 8 * tops
            logprobs.append(TokenLogprobs(token, logprob, top))
        reason = _REASONS[finish]
    except (struct.error, IndexError) as error:
        raise ValueError(f"no journal entry: {error}") from None
    if at != len(data):
        raise ValueError(f"a journal entry of {at} bytes has {len(data)}")
    return Entry(choice, epoch, start, tokens, tuple(logprobs), reason)


class Outcome(enum.Enum):
    """What became of a write."""

    REFUSED = 0
    """Somebody else holds the generation: its writer must end."""
    WRITTEN = 1
    LOST = 2
    """Redis lost some or all of it: write all of it anew."""


class Write(NamedTuple):
    """One generation's part of a batch."""

    generation: str
    holder: bytes
    """Nonce of the run that writes, 16 bytes."""
    request: bytes
    """The canonical request if the lease may not be there yet; empty: it must be."""
    entries: Sequence[Entry]
    """In order. What is in the journal already is skipped."""
    anew: bool = False
    """Replace what is there: the entries are all that there are."""


@dataclass(frozen=True, slots=True)
class Journaled:
    """A generation as Redis has it."""

    generation: str
    request: bytes
    epochs: Mapping[int, int]
    """Of the choices of which anything is journaled."""
    entries: tuple[Entry, ...]


class LeaseStore(Protocol):
    """What keeps journals; see `outrider.registry.Leases`."""

    async def append(self, writes: Sequence[Write], timeout_s: float) -> list[Outcome]: ...
    async def read(self, generation: str) -> Journaled | None: ...
    async def take_over(self, known: Journaled, holder: bytes) -> Journaled: ...


@dataclass(frozen=True, slots=True)
class Continuation:
    """All that was journaled of one choice."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None


def continuation_of(entries: Iterable[Entry], choice: int) -> Continuation:
    """Put a choice together. Raises `ValueError` if entries do not follow each other."""
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish: FinishReason | None = None
    for entry in entries:
        if entry.choice != choice:
            continue
        if entry.start != len(tokens) or finish is not None:
            raise ValueError(f"choice {choice} has a gap at {len(tokens)}")
        tokens += entry.tokens
        logprobs += entry.logprobs
        finish = entry.finish
    return Continuation(tuple(tokens), tuple(logprobs), finish)
