"""T(N): how long a verify step takes, learnt while running. Pure: durations come in as arguments.

T is learnt at knots, sizes in tokens, with straight lines in between under a monotone envelope, so
that staircases fit. The knots share a scale: when the machine as a whole becomes slower or faster,
sizes that nobody visits follow. What a step says is divided between the scale and its knot by how
sure each is (a Kalman filter with a diagonal covariance, on logarithms). One step says no more than
is plausible, so that a hiccup is forgotten; the second in a row is believed, and put down to its
size if other sizes behaved as expected meanwhile, else to the machine.

Steps that also compute prompts have knots of their own, and the KV that a step reads adds in
proportion, as far as steps of one size have shown that it does.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from itertools import pairwise

KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Step sizes, in tokens, at which T is learnt."""

_DURATION_MIN_S = 1e-6
"""A clock may stand still for a tiny step; T is divided by."""

_NOISE = 0.05**2
"""Variance, in log seconds, of a step of known size."""
_SCALE_DRIFT = 0.03**2
"""Variance that the scale gains with each step."""
_KNOT_DRIFT = 0.0045**2
"""Variance that a knot gains with each step that does not visit it."""
_PLAUSIBLE = 2.0
"""Standard deviations beyond which a step says no more than at that distance."""
_FIRST_FACTOR_MAX = 2.0
"""How much slower than its neighbours suggest a size may seem at first sight."""

_STALE_AFTER_STEPS = 64
_STALE_HALVING_STEPS = 512
_STALE_SHARE_MIN = 0.05
"""What a knot says counts less and less when it was not visited for long."""


@dataclass(slots=True)
class _Knot:
    log_ratio: float
    """Of seconds to the common scale, at `kv_tokens`."""
    variance: float
    visited: int
    """Number of the step that came here last."""
    kv_tokens: float
    """Mean of the steps that came here."""
    duration_s: float
    """Likewise; only for the slope over KV."""
    surprise: int = 0
    """1 or -1 if the last step here was implausibly slow or fast."""


@dataclass(slots=True)
class _KvSlope:
    """Seconds for each token of KV read, from how steps of the same size differ.

    Regression within knots, shrunk towards nothing unless KV varied by a good part of itself:
    otherwise a drift of the machine would pass for the effect of growing contexts.
    """

    value: float = 0.0
    _products: float = 0.0
    _squares: float = 0.0
    _weight: float = 0.0
    _square_level: float = 0.0

    _DECAY = 0.995
    _VARIATION = 0.2

    def observe(self, knot: _Knot, duration_s: float, kv_tokens: float) -> None:
        bound_s = 0.5 * knot.duration_s
        duration_off_s = max(-bound_s, min(bound_s, duration_s - knot.duration_s))
        kv_off = kv_tokens - knot.kv_tokens
        decay = self._DECAY
        self._weight = self._weight * decay + 1.0
        self._products = self._products * decay + duration_off_s * kv_off
        self._squares = self._squares * decay + kv_off * kv_off
        self._square_level = self._square_level * decay + kv_tokens * kv_tokens
        shrinkage = self._VARIATION**2 * self._square_level
        if self._squares > 0.0:
            self.value = max(0.0, self._products / (self._squares + shrinkage))
        knot.duration_s += 0.1 * duration_off_s


@dataclass(slots=True)
class _Curve:
    knots: dict[int, _Knot] = field(default_factory=dict)
    line: list[tuple[int, float]] = field(default_factory=list)
    """(tokens, seconds), rising, at the KV of the last step."""


class StepTimes:
    """Learns and predicts the duration of a step.

    `tokens` are all tokens that a step computes, `prefill_tokens` those among them that belong to
    prompts, `kv_tokens` the cached tokens that its rows attend to, added up.
    """

    def __init__(self) -> None:
        self._log_scale = 0.0
        self._scale_variance = 0.0
        self._steps = 0
        self._calm: dict[int, int] = {}
        """By size, the last step that went as expected."""
        self._kv_tokens = 0.0
        self._kv_slope = _KvSlope()
        self._decoding = _Curve()
        self._mixed = _Curve()

    def observe(
        self, tokens: int, duration_s: float, *, kv_tokens: int = 0, prefill_tokens: int = 0
    ) -> None:
        """Learn from one step of at least one token."""
        duration_s = max(duration_s, _DURATION_MIN_S)
        curve = self._mixed if prefill_tokens else self._decoding
        size = _nearest_knot(tokens)
        self._steps += 1
        if curve.line:
            # Moved to the knot along the present curve, so that neighbours do not blur it.
            duration_s *= self._read(curve, size, kv_tokens) / self._read(curve, tokens, kv_tokens)
        knot = curve.knots.get(size)
        if knot is None:
            self._begin(curve, size, duration_s, kv_tokens)
        else:
            self._kv_slope.observe(knot, duration_s, kv_tokens)
            self._correct(size, knot, duration_s, kv_tokens, move_scale=curve is self._decoding)
        self._kv_tokens = kv_tokens
        self._draw()

    def _begin(self, curve: _Curve, size: int, duration_s: float, kv_tokens: int) -> None:
        believed_s, variance = duration_s, _NOISE
        if curve.line:
            believed_s = min(duration_s, _FIRST_FACTOR_MAX * self._read(curve, size, kv_tokens))
        if believed_s < duration_s:
            variance = 1.0
        log_ratio = math.log(believed_s) - self._log_scale
        curve.knots[size] = _Knot(log_ratio, variance, self._steps, kv_tokens, believed_s)

    def _correct(
        self, size: int, knot: _Knot, duration_s: float, kv_tokens: int, *, move_scale: bool
    ) -> None:
        # The knot's reference moves to where steps are now, along the slope.
        known_s = math.exp(self._log_scale + knot.log_ratio)
        knot_kv = knot.kv_tokens + 0.1 * (kv_tokens - knot.kv_tokens)
        moved_s = known_s + self._kv_slope.value * (knot_kv - knot.kv_tokens)
        knot.kv_tokens = knot_kv
        moved_s = max(0.1 * known_s, moved_s)
        knot.log_ratio += math.log(moved_s / known_s)
        duration_s = max(
            0.1 * duration_s, duration_s - self._kv_slope.value * (kv_tokens - knot_kv)
        )
        variance = knot.variance + _KNOT_DRIFT * (self._steps - knot.visited)
        scale_variance = self._scale_variance + _SCALE_DRIFT if move_scale else 0.0
        error = math.log(duration_s / moved_s)
        bound = _PLAUSIBLE * math.sqrt(variance + scale_variance + _NOISE)
        surprise = 0 if abs(error) <= bound else 1 if error > 0 else -1
        if not surprise:
            if move_scale:
                self._calm[size] = self._steps
        elif surprise != knot.surprise:
            error = surprise * bound
        elif not move_scale or self._calm_elsewhere(size, knot.visited):
            variance += error * error
        else:
            scale_variance += error * error
        total = variance + scale_variance + _NOISE
        knot.log_ratio += variance / total * error
        knot.variance = variance * (1.0 - variance / total)
        knot.visited, knot.surprise = self._steps, surprise
        if move_scale:
            self._log_scale += scale_variance / total * error
            self._scale_variance = scale_variance * (1.0 - scale_variance / total)

    def _calm_elsewhere(self, size: int, since: int) -> bool:
        return any(step > since for other, step in self._calm.items() if other != size)

    def _draw(self) -> None:
        self._decoding.line = self._line(self._decoding.knots)
        # What mixed steps have not shown is taken from the others.
        self._mixed.line = self._line(self._decoding.knots | self._mixed.knots)

    def _line(self, knots: dict[int, _Knot]) -> list[tuple[int, float]]:
        """The monotone envelope of the knots.

        One that was not visited for long gives way to the line between its fresh neighbours. With
        none above it, to the one below: a size that once seemed slow is tried again some day, and
        the one that is nearest to paying first.
        """
        sizes = sorted(knots)
        learnt = [self._seconds(knots[size]) for size in sizes]
        fresh = [
            index
            for index, size in enumerate(sizes)
            if self._steps - knots[size].visited <= _STALE_AFTER_STEPS
        ]
        line: list[tuple[int, float]] = []
        highest_s, passed = _DURATION_MIN_S, 0
        for index, size in enumerate(sizes):
            duration_s = learnt[index]
            if passed < len(fresh) and fresh[passed] == index:
                passed += 1
            elif passed:
                age = self._steps - knots[size].visited - _STALE_AFTER_STEPS
                share = max(_STALE_SHARE_MIN, 0.5 ** (age / _STALE_HALVING_STEPS))
                around_s = highest_s
                if passed < len(fresh):
                    low, high = fresh[passed - 1], fresh[passed]
                    along = (size - sizes[low]) / (sizes[high] - sizes[low])
                    around_s = learnt[low] + along * (learnt[high] - learnt[low])
                duration_s = around_s + share * (duration_s - around_s)
            highest_s = max(highest_s, duration_s)
            line.append((size, highest_s))
        return line

    def _seconds(self, knot: _Knot) -> float:
        duration_s = math.exp(self._log_scale + knot.log_ratio)
        return duration_s + self._kv_slope.value * (self._kv_tokens - knot.kv_tokens)

    @property
    def measured(self) -> bool:
        """True once a step was observed."""
        return bool(self._decoding.knots or self._mixed.knots)

    def predict(
        self, tokens: int, *, kv_tokens: int | None = None, prefill_tokens: int = 0
    ) -> float:
        """Expected seconds; 1.0 for every size while nothing was observed.

        Without `kv_tokens`, as much KV as in the last step.
        """
        curve = self._mixed if prefill_tokens else self._decoding
        return self._read(curve, tokens, self._kv_tokens if kv_tokens is None else kv_tokens)

    def predict_all(
        self, tokens: int, more: int, *, kv_tokens: int | None = None, prefill_tokens: int = 0
    ) -> list[float]:
        """Predictions for `tokens`, `tokens + 1`, ..., `tokens + more`."""
        curve = self._mixed if prefill_tokens else self._decoding
        kv_tokens_now = self._kv_tokens if kv_tokens is None else kv_tokens
        more_s = self._kv_slope.value * (kv_tokens_now - self._kv_tokens)
        predicted: list[float] = []
        # Along the knots, since looking each size up takes longer than the rest of the choice.
        for (low, low_s), (high, high_s) in pairwise(curve.line):
            rise_s = (high_s - low_s) / (high - low)
            for size in range(tokens + len(predicted), min(high, tokens + more) + 1):
                duration_s = low_s if size <= low else low_s + rise_s * (size - low)
                predicted.append(max(0.1 * duration_s, duration_s + more_s))
        rest = range(tokens + len(predicted), tokens + more + 1)
        return predicted + [self._read(curve, size, kv_tokens_now) for size in rest]

    def _read(self, curve: _Curve, tokens: int, kv_tokens: float) -> float:
        line = curve.line
        if not line:
            return 1.0
        index = bisect.bisect_left(line, (tokens, -1.0))
        if index == 0:
            duration_s = line[0][1]
        elif index == len(line):
            size, duration_s = line[-1]
            # Beyond what was seen, compute grows in proportion: never optimistic about it, but
            # where only one size was seen, so that another is tried at all.
            growth = tokens / size
            duration_s *= max(1.0, math.sqrt(growth) if len(line) == 1 else growth)
        else:
            (low, low_s), (high, high_s) = line[index - 1], line[index]
            duration_s = low_s + (high_s - low_s) * (tokens - low) / (high - low)
        more_s = self._kv_slope.value * (kv_tokens - self._kv_tokens)
        return max(0.1 * duration_s, duration_s + more_s)


def _nearest_knot(tokens: int) -> int:
    index = bisect.bisect_left(KNOTS, tokens)
    if index == 0:
        return KNOTS[0]
    if index == len(KNOTS):
        return KNOTS[-1]
    low, high = KNOTS[index - 1], KNOTS[index]
    return low if tokens * tokens < low * high else high
