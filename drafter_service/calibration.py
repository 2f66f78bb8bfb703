"""What a model's guesses are worth, learnt from what became of them. Pure.

A guess's *feature* is what the model says of it: in greedy sessions its probability, in sampled
ones the softmax of the perturbed scores over the best few, that is the perturbed margin. Neither
is a probability of acceptance: a small model is too sure of itself, and how far noise shared with
the target makes up for a wrong distribution depends on how wrong it is. So for each rank among
its siblings the share of right guesses is counted in bins of the feature, pooled until it
ascends (isotonic regression by pool adjacent violators; Ayer et al., 1955), and read off between
the bins' means. Until something is known, guesses are taken at their word.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

_PROBABILITY_MIN, _PROBABILITY_MAX = 1e-6, 0.999
LOGPROB_MAX = math.log(_PROBABILITY_MAX)
"""Nothing is ever certain."""

_LOGPROB_MIN = math.log(_PROBABILITY_MIN)
_EDGES = (0.01, 0.03, 0.06, 0.1, 0.17, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92, 0.97, 0.99)
_CENTRES = tuple((low + high) / 2 for low, high in zip((0.0, *_EDGES), (*_EDGES, 1.0), strict=True))
_PRIOR = 6.0
"""Guesses that each bin is assumed to have seen to begin with, as right as they said."""
_KEPT = 1.0 - 1.0 / 2_000.0
"""Of a bin's counts, at each guess that falls into it: texts change little by little."""
_WATCHED = 1.0 - 1.0 / 50.0
"""Of what the last guesses were off, at each guess: what has changed at once shows here first."""
_ALARM = 25.0
"""Squared standard errors that they may be off before the counts are forgotten."""
_SPREAD_MIN = 1.0
"""Where nearly all guesses are wrong, or right, a few exceptions in a row are no change."""
_REMEMBERED = 2.0
"""Guesses of each bin that still count when the rest is forgotten."""
_LEARN_EVERY = 16
_RANKS = 4
"""Ranks told apart; the rest is like the last."""


class _Curve:
    """The map from features to shares of right guesses, at one rank."""

    __slots__ = ("_means", "_off", "_right", "_said", "_seen", "_spread", "_unlearnt", "_values")

    def __init__(self) -> None:
        self._seen = [_PRIOR] * len(_CENTRES)
        self._said = [_PRIOR * centre for centre in _CENTRES]
        self._right = list(self._said)
        self._means = [0.0, *_CENTRES, 1.0]
        self._values = [0.0, *_CENTRES, 1.0]
        self._unlearnt = 0
        self._off = 0.0
        """By how much claims were too modest of late, summed up."""
        self._spread = 0.0
        """Its variance, were the claims true; twice that."""

    def observe(self, feature: float, right: bool) -> None:
        index = bisect.bisect_right(_EDGES, feature)
        self._watch(self.read(feature), right)
        self._seen[index] = _KEPT * self._seen[index] + 1.0
        self._said[index] = _KEPT * self._said[index] + feature
        self._right[index] = _KEPT * self._right[index] + right
        self._unlearnt += 1
        if self._unlearnt == _LEARN_EVERY:
            self._unlearnt = 0
            self._learn()

    def _watch(self, claim: float, right: bool) -> None:
        """Forget most of what was learnt if the last guesses contradict it."""
        self._off = _WATCHED * self._off + right - claim
        self._spread = _WATCHED * self._spread + claim * (1.0 - claim)
        if self._off * self._off > _ALARM * max(_SPREAD_MIN, 0.5 * self._spread):
            self._off = self._spread = 0.0
            shares = [min(1.0, _REMEMBERED / seen) for seen in self._seen]
            for counts in (self._seen, self._said, self._right):
                counts[:] = (count * share for count, share in zip(counts, shares, strict=True))

    def _learn(self) -> None:
        seen = self._seen
        means = [said / count for said, count in zip(self._said, seen, strict=True)]
        shares = [right / count for right, count in zip(self._right, seen, strict=True)]
        values = ascending(shares, seen)
        # Below the first mean in proportion; above the last one, whatever the last bin says.
        self._means = [0.0, *means, 1.0]
        self._values = [0.0, *values, values[-1]]

    def read(self, feature: float) -> float:
        means, values = self._means, self._values
        # The first mean is 0 and the last is 1.
        above = bisect.bisect_right(means, feature) or 1
        if above == len(means):
            above -= 1
        low, high = means[above - 1], means[above]
        share = (feature - low) / (high - low) if high > low else 1.0
        return values[above - 1] + share * (values[above] - values[above - 1])

    def claim(self, logprob: float) -> float:
        value = self.read(math.exp(logprob) if logprob < 0.0 else 1.0)
        if value <= _PROBABILITY_MIN:
            return _LOGPROB_MIN
        return math.log(value) if value < _PROBABILITY_MAX else LOGPROB_MAX


class ClaimCalibration:
    """Turns what a model says of its guesses into claims; one owner."""

    def __init__(self) -> None:
        self._curves = {
            sampled: tuple(_Curve() for _ in range(_RANKS)) for sampled in (False, True)
        }

    def claim(self, sampled: bool, rank: int, logprob: float) -> float:
        """Log-probability that the target's sample is the guess, given that its parent is.

        `rank` counts from 0 among siblings, most probable first; `logprob` is what the model says.
        """
        return self._curves[sampled][min(rank, _RANKS - 1)].claim(logprob)

    def claims(self, sampled: bool, said: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        """Make claims of what the model says of siblings (token, logprob), best first."""
        curves = self._curves[sampled]
        if len(said) > _RANKS:
            curves += (curves[-1],) * (len(said) - _RANKS)
        return [
            (token, curve.claim(logprob))
            for (token, logprob), curve in zip(said, curves, strict=False)
        ]

    def observe(self, sampled: bool, rank: int, logprob: float, right: bool) -> None:
        """Learn whether the target's sample was a guess whose parent it had accepted."""
        curve = self._curves[sampled][min(rank, _RANKS - 1)]
        curve.observe(math.exp(min(0.0, logprob)), right)


def ascending(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the sequence that never descends next to `values`, in weighted least squares."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        mean, mass, count = value, weight, 1
        while pools and pools[-1][0] > mean:
            before, more, others = pools.pop()
            mean = (mean * mass + before * more) / (mass + more)
            mass, count = mass + more, count + others
        pools.append((mean, mass, count))
    return [mean for mean, _, count in pools for _ in range(count)]
