"""How far a guess can be trusted, by the length of the match that it rests on; learnt online."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class MatchEstimates:
    """Probability that a guess is right, by length of the match behind it; learnt online.

    Prior: half as likely to be wrong with each doubling of the match, worth ten observations.
    """

    right: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)

    _BUCKETS = 8
    _PRIOR_WEIGHT = 10.0

    def __post_init__(self) -> None:
        for bucket in range(self._BUCKETS):
            self.right.append(self._PRIOR_WEIGHT * (1.0 - 0.6 * 0.6**bucket))
            self.seen.append(self._PRIOR_WEIGHT)

    @classmethod
    def bucket(cls, match_length: int) -> int:
        """Buckets 1, 2-3, 4-7, 8-15, ..."""
        return min(cls._BUCKETS - 1, match_length.bit_length() - 1)

    def observe(self, bucket: int, right: bool) -> None:
        """Learn from a guess whose parent was committed."""
        # Decay, so that a change of topic is noticed: a hundred observations are remembered.
        self.right[bucket] = self.right[bucket] * 0.99 + float(right)
        self.seen[bucket] = self.seen[bucket] * 0.99 + 1.0

    def logprob(self, bucket: int) -> float:
        """Natural logarithm of the estimate."""
        return math.log(max(1e-3, min(0.98, self.right[bucket] / self.seen[bucket])))
