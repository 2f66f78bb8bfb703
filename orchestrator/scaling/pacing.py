"""How fast a fleet goes where it is wanted: bounds, windows, steps. Pure.

As the Horizontal Pod Autoscaler does: of what was wanted within a window, the most counts when
a fleet shrinks and the least when it grows; and what changes within a period is bounded. So a
spike adds pods at once, while a lull takes some only once it has lasted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from outrider.errors import ConfigError

_WISHES_MAX = 1_024


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one fleet. Raises `ConfigError`."""

    floor: int
    ceiling: int
    up_window_s: float = 0.0
    """More is wanted for so long before it is given."""
    down_window_s: float = 300.0
    """Less is wanted for so long before it is taken."""
    up_pods: int = 4
    """Within `up_period_s`, so many are added, or `up_share` of all there were if that is more."""
    up_share: float = 1.0
    up_period_s: float = 60.0
    down_pods: int = 1
    """Likewise, taken away."""
    down_share: float = 0.1
    down_period_s: float = 120.0
    tolerance: float = 0.1
    """A wish that differs by no larger share is not followed."""

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= self.ceiling:
            raise ConfigError(
                f"floor, ceiling: must be 0 <= floor <= ceiling, got {self.floor}, {self.ceiling}"
            )
        for name in ("up_pods", "down_pods"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in (
            "up_window_s",
            "down_window_s",
            "up_share",
            "up_period_s",
            "down_share",
            "down_period_s",
            "tolerance",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"{name}: must not be negative, got {value}")


@dataclass(frozen=True, slots=True)
class Moment:
    """A number and when it was said."""

    at_s: float
    replicas: int


@dataclass(frozen=True, slots=True)
class PaceMemory:
    """What was wanted and done of late."""

    wishes: tuple[Moment, ...] = ()
    changes: tuple[Moment, ...] = ()
    """Replicas added, or with a minus taken away."""


@dataclass(frozen=True, slots=True)
class Paced:
    """Where a fleet goes now."""

    replicas: int
    memory: PaceMemory = field(repr=False)
    reasons: tuple[str, ...] = ()
    """Why that is not what is wanted."""


def pace(
    limits: Limits,
    memory: PaceMemory,
    *,
    current: int,
    wanted: int,
    now_s: float,
    least: int = 0,
) -> Paced:
    """Go from `current` towards `wanted` replicas as far as the limits allow now.

    `least` bounds how far the fleet may shrink in this step, whatever is wanted.
    """
    reasons: list[str] = []
    bounded = min(limits.ceiling, max(limits.floor, wanted))
    if bounded != wanted:
        name = "ceiling" if bounded < wanted else "floor"
        reasons.append(f"{wanted} wanted, the {name} is {bounded}")
    kept_s = max(limits.up_window_s, limits.down_window_s)
    # Whoever has just begun to look takes nothing: it does not know what was wanted before.
    wishes = memory.wishes or (Moment(now_s - limits.up_window_s - 1e-9, current),)
    wishes = (*(w for w in wishes if now_s - w.at_s <= kept_s), Moment(now_s, bounded))
    wishes = wishes[-_WISHES_MAX:]
    target = _stabilised(limits, wishes, current, now_s)
    if target != bounded:
        window_s = limits.down_window_s if bounded < current else limits.up_window_s
        reasons.append(f"{target} were wanted within the last {window_s:g} s")
    if target != current and abs(target - current) <= limits.tolerance * current:
        reasons.append(f"{target} is within {limits.tolerance:.0%} of {current}")
        target = current
    target = _stepped(limits, memory, current, target, now_s, reasons)
    if target < min(current, least):
        target = min(current, least)
        reasons.append(f"what is in use needs {least}")
    # Bounds hold whatever windows and steps say.
    target = min(limits.ceiling, max(limits.floor, target))
    kept_s = max(limits.up_period_s, limits.down_period_s)
    changes = tuple(change for change in memory.changes if now_s - change.at_s < kept_s)
    if target != current:
        changes = (*changes, Moment(now_s, target - current))
    return Paced(target, PaceMemory(wishes, changes), tuple(reasons))


def _stabilised(limits: Limits, wishes: tuple[Moment, ...], current: int, now_s: float) -> int:
    up = min(w.replicas for w in wishes if now_s - w.at_s <= limits.up_window_s)
    down = max(w.replicas for w in wishes if now_s - w.at_s <= limits.down_window_s)
    if current < up:
        return up
    return min(current, down)


def _stepped(
    limits: Limits,
    memory: PaceMemory,
    current: int,
    target: int,
    now_s: float,
    reasons: list[str],
) -> int:
    if target > current:
        added = _changed(memory, limits.up_period_s, now_s, up=True)
        base = current - added
        most = base + max(limits.up_pods, math.floor(base * limits.up_share))
        if target > most:
            reasons.append(f"at most {most - base} more within {limits.up_period_s:g} s")
        return max(current, min(target, most))
    taken = _changed(memory, limits.down_period_s, now_s, up=False)
    base = current + taken
    fewest = base - max(limits.down_pods, math.floor(base * limits.down_share))
    if target < fewest:
        reasons.append(f"at most {base - fewest} fewer within {limits.down_period_s:g} s")
    return min(current, max(target, fewest))


def _changed(memory: PaceMemory, period_s: float, now_s: float, *, up: bool) -> int:
    recent = [change.replicas for change in memory.changes if now_s - change.at_s < period_s]
    return sum(abs(count) for count in recent if (count > 0) is up)
