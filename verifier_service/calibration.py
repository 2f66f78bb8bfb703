"""What a drafter's claims are worth, learnt from shadow scores. Pure.

A claim is the probability, stated by a drafter, that the target's sample equals a guess whose
parent is accepted. Three things are learnt on top of each other:

- a source's *trust*: right guesses over claimed ones, for all sessions that the source serves.
  A new session starts from it;
- the same within each session, since a drafter may be good at one text and bad at another;
- the *shape*, for each source: whether its high claims deserve more trust than its low ones.
  Claims are binned and pooled until the map is monotone (isotonic regression by pool adjacent
  violators; Ayer et al., 1955; as calibration: Zadrozny and Elkan, 2002).

Trust has a long memory, so that it is accurate, and forgets it when a change is detected
(cumulative sums; Page, 1954): a liar is found out within a dozen guesses, and one that turns
honest is believed again as fast.
"""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.draft_tree import ESTIMATE_FLOOR

PROBABILITY_MAX = 0.99
"""Nothing is ever certain."""

WORTH_MIN = 0.03
"""A source whose surest claim means less is not given a token, however cheap tokens are."""

_LOGPROB_MAX = math.log(PROBABILITY_MAX)
_LOG_HALF = math.log(0.5)
_LOG_QUARTER = math.log(0.25)
_BELIEVED_MIN = 0.005
_DECAY = 1.0 - 1.0 / 64.0
"""Trust is averaged over so many guesses while nothing changes."""

_ALARM = 8.0
"""Log-likelihood ratio at which a change is believed in. At 6 honest sources raise an alarm twice
as often; at 10 a liar is verified a few guesses longer."""

_TRUST_MAX = 20.0
_SOURCES_MAX = 1_024


@dataclass(slots=True)
class _Change:
    """A change of trust under test: evidence (log-likelihood ratio) and guesses since it began."""

    evidence: float = 0.0
    right: float = 0.0
    claimed: float = 0.0

    def test(self, ratio: float, hit: float, claim: float) -> bool:
        """Take one guess in; True if the change is to be believed in."""
        self.evidence += ratio
        if self.evidence <= 0.0:
            self.evidence = self.right = self.claimed = 0.0
            return False
        self.right += hit
        self.claimed += claim
        return self.evidence >= _ALARM


class Trust:
    """Decayed ratio of right guesses to claimed ones, which notices when it has changed."""

    __slots__ = ("_fall", "_rise", "claimed", "right")

    def __init__(self, weight: float = 0.0) -> None:
        """Begin as if a source had kept its word for so many guesses."""
        self.right = weight
        self.claimed = weight
        self._fall = _Change()
        self._rise = _Change()

    def observe(self, claim: float, believed: float, accepted: bool) -> None:
        """Learn from one guess: its claimed probability, and the one that was believed.

        Tested against it: that guesses are now a quarter as good, or fail half as often.
        """
        hit = 1.0 if accepted else 0.0
        self.right = self.right * _DECAY + hit
        self.claimed = self.claimed * _DECAY + claim
        # Most guesses of a liar end here: there is nothing left to fall from.
        if believed > WORTH_MIN:
            believed = min(PROBABILITY_MAX, believed)
            worse = _LOG_QUARTER if accepted else math.log((1 - 0.25 * believed) / (1 - believed))
            if self._fall.test(worse, hit, claim):
                self._restart(self._fall)
        if accepted:
            better = math.log(0.5 + 0.5 / max(_BELIEVED_MIN, believed))
            if self._rise.test(better, hit, claim):
                self._restart(self._rise)
        elif self._rise.evidence > 0.0:
            self._rise.test(_LOG_HALF, hit, claim)

    @property
    def rising(self) -> bool:
        """True while the last guesses were better than what is believed."""
        return self._rise.evidence > 0.0

    def _restart(self, change: _Change) -> None:
        """Let only what came since the change count."""
        self.right, self.claimed = change.right, change.claimed
        self._fall, self._rise = _Change(), _Change()

    def ratio(self, prior: float, prior_weight: float) -> float:
        """Right over claimed, with a prior worth so many claimed guesses."""
        ratio = (self.right + prior * prior_weight) / (self.claimed + prior_weight)
        return min(_TRUST_MAX, ratio)


_BINS = (0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92)
"""Upper ends of all bins but the last."""
_CENTRES = (0.015, 0.06, 0.15, 0.27, 0.42, 0.57, 0.72, 0.86, 0.96)
_CENTRES_LOG = tuple(math.log(centre) for centre in _CENTRES)


class Shape:
    """A monotone map from claims to claims, which says nothing about their general level."""

    _PRIOR = 8.0
    """Right guesses that each bin is assumed to have had, as many as expected."""
    _LEARN_EVERY = 16
    _KEPT = 1.0 - _LEARN_EVERY / 512.0
    """Of all bins, visited or not: what was learnt long ago must not linger where nobody claims."""

    def __init__(self) -> None:
        self._right = [self._PRIOR] * len(_CENTRES)
        self._expected = [self._PRIOR] * len(_CENTRES)
        self._values = list(_CENTRES_LOG)
        self._unlearnt = 0

    def observe(self, claim: float, believed: float, accepted: bool) -> None:
        """Learn from a guess; `believed` is its claim times the trust, without the shape."""
        index = bisect.bisect_left(_BINS, claim)
        self._right[index] += accepted
        self._expected[index] += min(1.0, believed)
        self._unlearnt += 1
        if self._unlearnt == self._LEARN_EVERY:
            self._unlearnt = 0
            factors = zip(_CENTRES, self._right, self._expected, strict=True)
            values = [centre * right / expected for centre, right, expected in factors]
            self._values = [math.log(value) for value in _monotone(values, self._expected)]
            # The prior does not decay.
            self._right = [self._decayed(right) for right in self._right]
            self._expected = [self._decayed(expected) for expected in self._expected]

    def _decayed(self, count: float) -> float:
        return self._PRIOR + self._KEPT * (count - self._PRIOR)

    def apply(self, claim_logprob: float) -> float:
        """Log-probability that the claim stands for while trust is 1; may exceed 0."""
        index = bisect.bisect_right(_CENTRES_LOG, claim_logprob)
        if index == 0:
            return self._values[0] + claim_logprob - _CENTRES_LOG[0]
        if index == len(_CENTRES):
            return self._values[-1] + claim_logprob - _CENTRES_LOG[-1]
        low, before = _CENTRES_LOG[index - 1], self._values[index - 1]
        share = (claim_logprob - low) / (_CENTRES_LOG[index] - low)
        return before + share * (self._values[index] - before)


def _monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence next to `values` in weighted least squares."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, mass, count = blocks.pop()
            total = mass + block[1]
            merged = (mean * mass + block[0] * block[1]) / total
            block = (merged, total, count + block[2])
        blocks.append(block)
    return [value for value, _, count in blocks for _ in range(count)]


@dataclass(slots=True)
class SourceCalibration:
    """What is known of a source from all its sessions."""

    trust: Trust = field(default_factory=lambda: Trust(3.0))
    shape: Shape = field(default_factory=Shape)
    observed: int = 0
    """Guesses learnt from; tells sessions when to look again."""

    PRIOR_WEIGHT = 0.5
    """An unknown source is taken at its word, which counts as half a guess."""

    def ratio(self) -> float:
        """Trust in the source in a session of which nothing is known."""
        return self.trust.ratio(1.0, self.PRIOR_WEIGHT)


class SessionCalibration:
    """What is known of a source in one session."""

    _PRIOR_WEIGHT = 2.0
    """Guesses that the other sessions' experience counts for."""

    def __init__(self, shared: SourceCalibration) -> None:
        self._shared = shared
        self._trust = Trust()
        self._seen = -1
        self._offset = 0.0

    def apply(self, claim_logprob: float) -> float:
        """Calibrated log-probability: monotone in the claim, at most that of 0.99.

        `ESTIMATE_FLOOR` for every claim of a source that is not worth a token.
        """
        if self._seen != self._shared.observed:
            self._seen = self._shared.observed
            self._offset = math.log(max(1e-9, self._ratio()))
            if math.exp(self._offset + self._shared.shape.apply(0.0)) < WORTH_MIN:
                self._offset = ESTIMATE_FLOOR
        if self._offset == ESTIMATE_FLOOR:
            return ESTIMATE_FLOOR
        estimate = self._offset + self._shared.shape.apply(claim_logprob)
        return estimate if estimate < _LOGPROB_MAX else _LOGPROB_MAX

    @property
    def hopeless(self) -> bool:
        """True if no claim of the source is worth a token, and nothing speaks for a change."""
        floor = self.apply(0.0) == ESTIMATE_FLOOR
        return floor and not self._trust.rising and not self._shared.trust.rising

    @property
    def hopeful(self) -> bool:
        """True while the source's last guesses, in whichever session, were better than believed."""
        return self._shared.trust.rising

    def _ratio(self) -> float:
        return self._trust.ratio(self._shared.ratio(), self._PRIOR_WEIGHT)

    def observe(self, claim_logprob: float, accepted: bool) -> None:
        """Learn from one guess whose parent was committed."""
        shared, claim = self._shared, math.exp(claim_logprob)
        shared.observed += 1
        ratio, shared_ratio = self._ratio(), shared.ratio()
        shaped = claim
        if ratio >= WORTH_MIN:
            # The guesses of a liar would teach nothing about the shape.
            shaped = min(1.0, math.exp(shared.shape.apply(claim_logprob)))
            shared.shape.observe(claim, claim * ratio, accepted)
        # Trust is in shaped claims, and so makes good whatever the shape got wrong on the whole.
        self._trust.observe(shaped, shaped * ratio, accepted)
        shared.trust.observe(shaped, shaped * shared_ratio, accepted)


class Calibrations:
    """All that one verifier knows of its sources."""

    def __init__(self) -> None:
        self.pay_min = 0.0
        """Least path probability of the best guess at which the last step would have verified any;
        set by whoever plans steps. Drafts that promise less are looked at only to score them."""
        self.rows = 1
        """Sessions that decoded in the last step; set likewise."""
        self._sources: OrderedDict[tuple[int, int], SourceCalibration] = OrderedDict()

    def of_session(self, connection: int, source: int) -> SessionCalibration:
        """Calibration of a source for a session that it begins to serve."""
        key = connection, source
        shared = self._sources.setdefault(key, SourceCalibration())
        self._sources.move_to_end(key)
        if len(self._sources) > _SOURCES_MAX:
            self._sources.popitem(last=False)
        return SessionCalibration(shared)
