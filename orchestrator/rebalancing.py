"""When a session had better go on at another verifier. Pure.

A move costs a prefill of what the other verifier does not hold, beside which those who decode there
are slowed down. It wins the difference between the two verifiers' times for a step, for the steps
that the session has left; and those who stay behind win as well, at the cost of those it joins.
Both are counted in seconds of generations, and from what was measured: while steps take as long
with many rows as with few, nothing moves.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

GAIN_PER_COST_MIN = 2.0
"""What a move promises is less certain than what it costs."""
GAIN_MIN_S = 0.5
"""Less is not worth a disturbance."""
_SHARE_DOWN, _SHARE_UP = 0.5, 1.0 / 16.0
_KNOTS_MAX = 64


@dataclass(slots=True)
class StepCurve:
    """How long a verifier's steps take with so many rows: straight lines between what was seen.

    What disturbs a step makes it longer; so a time is lowered at once and raised slowly.
    """

    knots: dict[int, float] = field(default_factory=dict)
    """Rows to seconds."""

    def observe(self, rows: int, duration_s: float) -> None:
        """Take in a step."""
        if rows <= 0 or duration_s <= 0.0:
            return
        known_s = self.knots.get(rows)
        if known_s is None:
            if len(self.knots) >= _KNOTS_MAX:
                self.knots.pop(next(iter(self.knots)))
            self.knots[rows] = duration_s
            return
        share = _SHARE_DOWN if duration_s < known_s else _SHARE_UP
        self.knots[rows] = known_s + share * (duration_s - known_s)

    @property
    def rows_max(self) -> int:
        """The most rows that were seen."""
        return max(self.knots, default=0)

    def extended(self, other: StepCurve) -> StepCurve:
        """Return a curve that goes on as another one where this one has seen nothing."""
        end = self.rows_max
        return StepCurve(self.knots | {r: s for r, s in other.knots.items() if r > end})

    def step_s(self, rows: float) -> float:
        """Return the time of a step, no less than with fewer rows; 0 if nothing was seen.

        Beyond what was seen it is as at the end of it.
        """
        sizes = sorted(self.knots)
        if not sizes:
            return 0.0
        # More rows are never quicker: what was seen with fewer was disturbed, then.
        falling = itertools.accumulate((self.knots[size] for size in reversed(sizes)), min)
        times = list(falling)[::-1]
        at = bisect.bisect_left(sizes, rows)
        if at == len(sizes):
            return times[-1]
        if at == 0 or sizes[at] == rows:
            return times[at]
        share = (rows - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return times[at - 1] + share * (times[at] - times[at - 1])


@dataclass(frozen=True, slots=True)
class Site:
    """A verifier, as a place to be."""

    address: str
    sessions: int
    """On it, those of other orchestrators included as far as known."""
    sessions_max: int
    curve: StepCurve
    waiting: int = 0
    """Of them: those that wait for KV."""
    prefill_s: float = 0.0
    """For a token of a prompt; 0 if not known."""

    def token_s(self, sessions: int) -> float:
        """Time for a step of one session, if there were so many: those for whom there is no KV
        take turns with the others."""
        if sessions <= 0:
            return 0.0
        seats = max(1, self.sessions - self.waiting) if self.waiting else sessions
        return self.curve.step_s(min(sessions, seats)) * max(1.0, sessions / seats)


@dataclass(frozen=True, slots=True)
class Mover:
    """A session that could go elsewhere."""

    number: int
    steps_left: float
    """That it will probably take."""
    tokens: int
    """Committed, prompt included: what another verifier has to compute."""
    held: Mapping[str, int] = field(default_factory=dict)
    """By address: of them, what it holds already."""


@dataclass(frozen=True, slots=True)
class Move:
    """What pays."""

    number: int
    address: str
    missing_tokens: int
    """That have to be computed over there."""
    gain_s: float
    cost_s: float


def steps_left(said: int, tokens_max: int, tokens_per_step: float) -> float:
    """Estimate how many steps a generation has left.

    Of something that ends at an unknown time, as much is to come as has been, if nothing else is
    known (Lindy's law); its limit bounds it.
    """
    return min(tokens_max - said, said) / max(1.0, tokens_per_step)


def gain_s(here: Site, there: Site, steps: float) -> float:
    """Seconds that all sessions on both verifiers win in so many steps if one moves."""
    before, after = here.sessions, there.sessions
    own_s = here.token_s(before) - there.token_s(after + 1)
    left_s = (before - 1) * (here.token_s(before) - here.token_s(before - 1))
    joined_s = after * (there.token_s(after + 1) - there.token_s(after))
    return steps * (own_s + left_s - joined_s)


def missing_tokens(there: Site, mover: Mover) -> int:
    """What a verifier has to compute before a session goes on there."""
    return max(0, mover.tokens - mover.held.get(there.address, 0))


def cost_s(here: Site, there: Site, mover: Mover) -> float:
    """Seconds that all sessions lose by a move."""
    prefill_s = missing_tokens(there, mover) * there.prefill_s
    # The step under way is lost, and whoever decodes over there waits for the prefill as well.
    return here.token_s(here.sessions) + prefill_s * (1 + there.sessions)


def extremes(sites: Sequence[Site]) -> tuple[Site, Site] | None:
    """The verifier that is best left and the one that is best joined, or None."""
    open_ = [site for site in sites if site.sessions < site.sessions_max]
    crowded = [site for site in sites if site.sessions > 1]
    if not open_ or not crowded:
        return None
    there = min(open_, key=lambda site: (site.token_s(site.sessions + 1), site.sessions))
    here = max(crowded, key=lambda site: (site.token_s(site.sessions), site.sessions))
    return None if here.address == there.address else (here, there)


def best_move(here: Site, there: Site, movers: Iterable[Mover]) -> Move | None:
    """The move that wins most over its cost, or None if none pays."""
    if not there.prefill_s or there.sessions >= there.curve.rows_max:
        return None  # Never measured: it might cost anything.
    best: Move | None = None
    for mover in movers:
        gained_s, lost_s = gain_s(here, there, mover.steps_left), cost_s(here, there, mover)
        if gained_s < max(GAIN_MIN_S, GAIN_PER_COST_MIN * lost_s):
            continue
        if best is None or gained_s - lost_s > best.gain_s - best.cost_s:
            missing = missing_tokens(there, mover)
            best = Move(mover.number, there.address, missing, gained_s, lost_s)
    return best
