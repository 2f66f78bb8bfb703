"""Guesses from a session's own text, made where they are verified. No model, no network.

Drafters that look text up (`drafter_service.proposers.lookup`) guess as well, but what a commit
has just made guessable reaches the verifier one step late, over two links. Where output copies
its prompt that is each time the copying starts anew. So a verifier looks for itself (Prompt
Lookup Decoding, A. Saxena, 2023): where the last tokens occurred before, and what followed then.

Not with the drafters' suffix automaton, which finds the longest match of all: this runs on the
engine's own thread, and two tables of short runs take a fraction of its time and memory (some
hundred bytes a token).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

_SIZES = (4, 2)
"""Last tokens that are looked for, longest first."""
_MATCH_MAX = 128
"""Beyond that a longer match promises nothing more."""
INDEXED_MAX = 8_192
"""Tokens taken in at a time: some milliseconds' worth, so that nobody waits for a long prompt."""


class OwnText:
    """An index of a growing text: where each few tokens in a row ended last."""

    def __init__(self, text: Sequence[int]) -> None:
        """`text` is looked at whenever something is asked, and may have grown by then."""
        self._text = text
        self._ends: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in _SIZES)
        self._indexed = 0
        """What ends before this index has been taken in."""

    def continuations(self) -> Iterator[tuple[int, Iterator[int]]]:
        """Yield (length of the match, what followed) of the longest match and of a shorter one.

        What followed may reach the end of the text; then text that repeats itself goes on doing so
        (LZ77's overlapping copy), without end.
        """
        if not self._index():
            return
        length = len(self._text)
        seen: set[int] = set()
        for size, ends in zip(_SIZES, self._ends, strict=True):
            if length <= size:
                continue
            end = ends.get(tuple(self._text[length - size :]))
            if end is None or end in seen:
                continue
            seen.add(end)
            yield self._match_length(end, size), self._following(end)

    def _index(self) -> bool:
        """Take in all that ends before the last token, or as much as may be at a time."""
        text, start = self._text, self._indexed
        stop = min(len(text) - 1, start + INDEXED_MAX)
        if stop > start:
            for size, ends in zip(_SIZES, self._ends, strict=True):
                first = max(0, start - size + 1)
                piece = text[first:stop]
                shifted = [piece[offset:] for offset in range(size)]
                ends.update(
                    zip(zip(*shifted, strict=False), range(first + size, stop + 1), strict=False)
                )
            self._indexed = stop
        return self._indexed >= len(text) - 1

    def _match_length(self, end: int, size: int) -> int:
        text, last = self._text, len(self._text)
        most = min(end, _MATCH_MAX)
        while size < most and text[end - size - 1] == text[last - size - 1]:
            size += 1
        return size

    def _following(self, end: int) -> Iterator[int]:
        text, period = self._text, len(self._text) - end
        offset = 0
        while True:
            yield text[end + offset]
            offset = (offset + 1) % period


def claim_logprob(match_length: int) -> float:
    """Log-probability that what followed a match of so many tokens follows again.

    Half as likely to be wrong with each doubling of the match, about; the verifier's calibration
    makes of it what it turns out to be worth.
    """
    return math.log(1.0 - 0.6 * 0.6 ** min(7, match_length.bit_length() - 1))
