"""Durations that depend on a size, stated as knots with straight lines in between. Pure."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

from outrider.errors import ConfigError

Knots = tuple[tuple[int, float], ...]
"""(size, seconds), ascending in size. A single knot is a duration that does not depend on size."""


def check_knots(name: str, knots: Sequence[tuple[int, float]]) -> None:
    """Raise `ConfigError` naming `name` unless `knots` describe durations."""
    if not knots:
        raise ConfigError(f"{name}: at least one duration is needed")
    sizes = [size for size, _ in knots]
    if sizes[0] < 1 or any(low >= high for low, high in itertools.pairwise(sizes)):
        raise ConfigError(f"{name}: sizes must be at least 1 and rise, got {sizes}")
    for size, seconds in knots:
        if not (math.isfinite(seconds) and seconds > 0.0):
            raise ConfigError(f"{name}: the duration at {size} must be positive, got {seconds}")


def duration_s(knots: Knots, size: int) -> float:
    """Read a duration.

    Below the first knot as there. Beyond the last in proportion to the size, as compute grows:
    never optimistic about what was not stated.
    """
    if len(knots) == 1 or size <= knots[0][0]:
        return knots[0][1]
    index = bisect.bisect_left(knots, (size, -1.0))
    if index == len(knots):
        return knots[-1][1] * size / knots[-1][0]
    (low, low_s), (high, high_s) = knots[index - 1], knots[index]
    return low_s + (high_s - low_s) * (size - low) / (high - low)


def read_knots(name: str, text: str, *, unit_s: float = 1e-3) -> Knots:
    """Read `22` or `1:22,32:22,128:28`; values are multiples of `unit_s`.

    Raises `ConfigError` naming `name`.
    """
    knots: list[tuple[int, float]] = []
    for part in text.split(","):
        size, colon, value = part.strip().rpartition(":")
        try:
            knots.append((int(size) if colon else 1, float(value) * unit_s))
        except ValueError:
            raise ConfigError(
                f"{name}: {part.strip()!r} is not a duration; write 22, or sizes with durations"
                " like 1:22,32:22,128:28"
            ) from None
    check_knots(name, knots)
    return tuple(knots)
