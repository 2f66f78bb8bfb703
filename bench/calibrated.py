"""Whether drafters' claims are what they say: claimed against observed acceptance. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decile:
    """Guesses whose claims lie within one tenth of the scale."""

    tenth: int
    """From 0 for claims below 0.1, to 9."""
    count: int
    claimed: float
    """Mean of the claims."""
    observed: float
    """Share that was right."""

    @property
    def off(self) -> float:
        """How far the claims are from the truth."""
        return abs(self.claimed - self.observed)


def deciles(claims: Iterable[tuple[float, bool]]) -> list[Decile]:
    """Sort (claimed log-probability, right) into tenths of the scale; empty ones are left out."""
    counts, sums, rights = [0] * 10, [0.0] * 10, [0] * 10
    for logprob, right in claims:
        probability = math.exp(logprob)
        tenth = min(9, int(10 * probability))
        counts[tenth] += 1
        sums[tenth] += probability
        rights[tenth] += right
    return [
        Decile(tenth, count, sums[tenth] / count, rights[tenth] / count)
        for tenth, count in enumerate(counts)
        if count
    ]


def worst(found: Iterable[Decile], count_min: int) -> float | None:
    """How far the worst decile is off, of those with enough guesses; None if none has."""
    return max((decile.off for decile in found if decile.count >= count_min), default=None)
