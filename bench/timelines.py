"""What can be read from the times of tokens and steps. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Delivery = tuple[float, int]
"""(when, tokens)"""


def rate_between(deliveries: Sequence[Delivery], begin_s: float, end_s: float) -> float:
    """Tokens a second within a window."""
    return sum(n for at_s, n in deliveries if begin_s < at_s <= end_s) / (end_s - begin_s)


def busy_share(steps: Sequence[tuple[float, float, int]], begin_s: float, end_s: float) -> float:
    """Share of a window within the steps (begin, end, tokens) of one worker."""
    busy_s = sum(max(0.0, min(end, end_s) - max(begin, begin_s)) for begin, end, _ in steps)
    return busy_s / (end_s - begin_s)


@dataclass(frozen=True, slots=True)
class Spread:
    """How some times are distributed, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    count: int


def spread(times_s: Sequence[float]) -> Spread:
    """Describe a distribution. Raises ValueError if it is empty."""
    if not times_s:
        raise ValueError("there is nothing to describe")
    ordered = sorted(times_s)

    def at_ms(share: float) -> float:
        return 1_000 * ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    return Spread(at_ms(0.5), at_ms(0.9), at_ms(0.99), 1_000 * ordered[-1], len(ordered))


def step_gaps_s(
    steps: Sequence[tuple[float, float, int]], begin_s: float, end_s: float
) -> list[float]:
    """Seconds from the end of each step within a window to the begin of the next."""
    inside = [step for step in steps if begin_s <= step[0] and step[1] <= end_s]
    return [later[0] - earlier[1] for earlier, later in itertools.pairwise(inside)]


def rate_curve(
    runs: Sequence[Sequence[Delivery]],
    since_s: float,
    until_s: float,
    width_s: float,
    stride_s: float,
) -> list[tuple[float, float]]:
    """Mean over runs of the tokens a second in sliding windows (end, rate).

    All times count from what the runs are aligned at. The first window begins at `since_s`, the
    last ends by `until_s`.
    """
    count = int((until_s - since_s - width_s) / stride_s + 1e-9) + 1
    ends = [since_s + width_s + number * stride_s for number in range(count)]
    return [
        (end, sum(rate_between(run, end - width_s, end) for run in runs) / len(runs))
        for end in ends
    ]


def settled_s(curve: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """End of the first window from which on throughput has reached `wanted`; None: never.

    That window has, and so has the mean of it and all that follow: later noise alone does not
    undo it, and an early peak alone does not make it.
    """
    for index, (end_s, rate) in enumerate(curve):
        rest = [later for _, later in curve[index:]]
        if rate >= wanted and sum(rest) / len(rest) >= wanted:
            return end_s
    return None


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a falling line through (x, y) points, x ascending, first comes down to `level`.

    None if it never does; the first x if it begins below.
    """
    previous: tuple[float, float] | None = None
    for x, y in points:
        if y <= level:
            if previous is None:
                return x
            left, above = previous
            return left + (x - left) * (above - level) / (above - y)
        previous = x, y
    return None
