"""Whether drafters are worth their while to one session, and when to try again. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from orchestrator.budgets import SPEEDUP_MIN, VerifierPace
from outrider.domain import SpeculationCounters

_WINDOW_STEPS = 32
_WINDOW_S = 0.5
"""Drafters are judged by so many verify steps, and no sooner."""
_SILENT_S = 5.0
"""A drafter that has said nothing may still be computing the prompt for so long."""
_REST_S = 0.5
"""A session is left alone for so long after its drafters were found useless."""
_ROTATION_S = 10.0
"""All sessions without drafters are tried anew within about so long."""
_REVIVED_S = 2.0
"""After a trial that paid, everybody is tried for so long."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a window of verify steps has shown."""

    useless: tuple[int, ...]
    """Bindings that should end."""
    speedup: float
    """Of the session, over decoding without drafters."""
    gains: Mapping[int, float]
    """Tokens a step that each binding's guesses won."""


@dataclass(slots=True)
class Engagement:
    """One session's experience with its drafters."""

    off_since_s: float = 0.0
    """Since when the session has no drafters, if it has none."""
    trial: bool = False
    """The present drafters were bound to find out whether they pay again."""
    gains: Mapping[int, float] = field(default_factory=dict)
    """Of the last judgement, by binding."""
    _began_s: float = 0.0
    _bindings: frozenset[int] = frozenset()
    _before: SpeculationCounters = field(default_factory=SpeculationCounters)

    def look(
        self,
        now_s: float,
        counters: SpeculationCounters,
        sources: Mapping[int, int],
        pace: VerifierPace,
    ) -> Judgement | None:
        """Judge the present drafters, or None while too little was seen of them.

        `counters` are those of the session's present verifier, `sources` the source number of each
        live binding.
        """
        if frozenset(sources) != self._bindings or counters.verify_steps < self._steps_before:
            self._bindings = frozenset(sources)
            self._begin(now_s, counters)
        steps = counters.verify_steps - self._steps_before
        if not sources or steps < _WINDOW_STEPS or now_s - self._began_s < _WINDOW_S:
            return None
        heard = counters.received_draft_tokens > self._before.received_draft_tokens
        if not heard and now_s - self._began_s < _SILENT_S:
            return None
        before = self._before.accepted_by_source
        gains = {
            binding: (counters.accepted_by_source.get(source, 0) - before.get(source, 0)) / steps
            for binding, source in sources.items()
        }
        accepted = counters.accepted_draft_tokens - self._before.accepted_draft_tokens
        tokens = 1.0 + accepted / steps
        speedup = pace.speedup(tokens)
        self._begin(now_s, counters)
        self.gains = gains
        return Judgement(_useless(gains, tokens, speedup), speedup, gains)

    @property
    def _steps_before(self) -> int:
        return self._before.verify_steps

    def _begin(self, now_s: float, counters: SpeculationCounters) -> None:
        self._began_s, self._before = now_s, counters

    def ended(self, now_s: float) -> None:
        """The last drafter was unbound."""
        self.off_since_s, self.trial = now_s, False


def _useless(gains: Mapping[int, float], tokens: float, speedup: float) -> tuple[int, ...]:
    # What verifiers guess from the text itself, and what clients predict, needs no drafter.
    without = max(1.0, tokens - sum(gains.values()))
    if speedup < SPEEDUP_MIN or tokens / without < SPEEDUP_MIN:
        return tuple(gains)
    # The one that wins most stays: what it would win alone is not known.
    best = max(gains, key=lambda binding: gains[binding])
    return tuple(
        binding
        for binding, gain in gains.items()
        if binding != best and tokens / max(1.0, tokens - gain) < SPEEDUP_MIN
    )


SessionT = TypeVar("SessionT")


@dataclass(slots=True)
class Rotation:
    """Which sessions without drafters are given one again, in turn."""

    _revived_s: float = -math.inf
    _credit: float = 1.0

    def paid(self, now_s: float) -> None:
        """A trial has paid: what keeps the others from trying may be over as well."""
        self._revived_s = now_s

    def due(
        self, now_s: float, interval_s: float, off: Sequence[tuple[SessionT, Engagement]]
    ) -> list[SessionT]:
        """Choose among the sessions without drafters; called every `interval_s`."""
        rested = [pair for pair in off if now_s - pair[1].off_since_s >= _REST_S]
        if now_s - self._revived_s > _REVIVED_S:
            # At least one at a time, so that a small fleet finds out at once.
            self._credit = min(
                max(1.0, len(off)), self._credit + max(1.0, len(off) * interval_s / _ROTATION_S)
            )
            rested.sort(key=lambda pair: pair[1].off_since_s)
            rested = rested[: int(self._credit)]
            self._credit -= len(rested)
        for _, engagement in rested:
            engagement.trial = True
        return [session for session, _ in rested]
