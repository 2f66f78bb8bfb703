"""A client's predicted output as a drafter: follows what is committed, guesses what comes. Pure.

Predicted text is followed as long as it agrees. Where the output departs from it, several places
where it may join again are guessed at once, as branches of one draft: behind the longest suffix of
the output that the prediction contains (as prompt lookup does), as if the tokens in between had
been replaced, and as if they had been inserted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.committed import CommittedLog
from outrider.domain import Draft

CHAIN_MAX = 32
"""Tokens guessed ahead along the likeliest branch."""
BRANCH_MAX = 8
"""The same along the others, and of any branch that has yet to prove itself."""
_RENEW = 16
"""A chain is extended when so few of its guesses are left."""
_SUFFIX_MAX = 4
_FIRM = 4
"""After so many agreeing tokens a branch counts as found."""
_CLAIM = math.log(0.95)
_CLAIM_NEW = math.log(0.6)


class Follower:
    """One session's way through the predicted tokens."""

    def __init__(self, prompt: Sequence[int], predicted: Sequence[int]) -> None:
        self._log = CommittedLog(prompt)
        self._prompt_length = len(prompt)
        self._predicted = tuple(predicted)
        self._ends: dict[tuple[int, ...], list[int]] = {}
        for end in range(1, len(self._predicted) + 1):
            for size in range(1, min(_SUFFIX_MAX, end) + 1):
                self._ends.setdefault(self._predicted[end - size : end], []).append(end)
        self._places = [0]
        """Where in the prediction the output may be, likeliest first."""
        self._agreed = _FIRM
        """Tokens in a row that were as predicted."""
        self._left_at = 0
        """Place in the prediction where the output departed from it."""
        self._astray = 0
        """Output tokens since."""
        self._sent_length = 0
        """Total length up to which the likeliest branch has been sent; 0: nothing."""

    @property
    def predicted_tokens(self) -> int:
        """Length of the prediction in tokens."""
        return len(self._predicted)

    def reopened(self) -> None:
        """Take note that the verifier is a new one, which knows no guesses."""
        self._sent_length = 0

    def draft(self, epoch: int, output: Sequence[int]) -> Draft | None:
        """Follow the output (all of it) and return new guesses, or None if none are needed."""
        for token in output[len(self._log) - self._prompt_length :]:
            self._follow(token)
            self._log.append((token,))
        left = self._sent_length - len(self._log)
        rest = len(self._predicted) - self._places[0] if self._places else 0
        if not rest or left >= min(_RENEW, rest):
            return None
        return self._guesses(epoch)

    def _follow(self, token: int) -> None:
        going_on = [place + 1 for place in self._places if self._at(place) == token]
        if going_on:
            if going_on[0] != self._places[0] + 1:
                self._sent_length = 0  # Another branch than the one that was sent far ahead.
            self._places = going_on
            self._agreed += 1
            return
        if self._places and self._agreed >= _FIRM:
            self._left_at, self._astray = self._places[0], 0
        self._astray += 1
        self._agreed = 0
        self._sent_length = 0
        suffix = (*self._log.tokens[-(_SUFFIX_MAX - 1) :], token)
        places = [*self._joins(suffix), self._left_at + self._astray, self._left_at]
        known = len(self._predicted)
        self._places = [place for place in dict.fromkeys(places) if place < known]

    def _at(self, place: int) -> int | None:
        return self._predicted[place] if place < len(self._predicted) else None

    def _joins(self, suffix: tuple[int, ...]) -> list[int]:
        """The place after the longest suffix that the prediction has, nearest onwards first."""
        for size in range(len(suffix), 0, -1):
            ends = self._ends.get(suffix[-size:])
            if ends:
                onwards = [end for end in ends if end > self._left_at]
                return (onwards or ends)[:1]
        return []

    def _guesses(self, epoch: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        claims: list[float] = []
        firm = self._agreed >= _FIRM
        firsts: set[int] = set()
        for rank, place in enumerate(self._places):
            guess = self._at(place)
            # A branch besides the first may have come to the prediction's end.
            if guess is None or guess in firsts:
                continue
            firsts.add(guess)
            length = CHAIN_MAX if firm and not rank else BRANCH_MAX
            chain = self._predicted[place : place + length]
            first = len(tokens)
            tokens += chain
            parents += [-1, *range(first, first + len(chain) - 1)]
            claims += [_CLAIM if firm and not rank else _CLAIM_NEW - 0.5 * rank]
            claims += [_CLAIM] * (len(chain) - 1)
            if not rank:
                self._sent_length = len(self._log) + len(chain)
        length = len(self._log)
        digest = self._log.digest_at(length)
        assert digest is not None, "the present length is always known"
        return Draft(epoch, length, digest, tuple(tokens), tuple(parents), tuple(claims))
