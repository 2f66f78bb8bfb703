"""Watches sessions between steps and tells the engine how long to wait for their drafts.

The clock and the bookkeeping around `readiness`, which decides. Owned by the engine's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice

from outrider.domain import Draft
from verifier_service.planning import Seat
from verifier_service.readiness import Hold, Readiness
from verifier_service.session import Session

_WATCHED_MAX = 4
"""Sessions that are watched between two steps, in turn: looking at a tree takes time."""
_PROMISE_NODES_MAX = 32
"""Guesses a session that are looked at, at most, to tell what a step promises."""
_NODES_SHARE = 1.0 / 16.0
_NODES_MORE = 1.5
"""What steps verified of late, and so much more, is what the next one may take up."""
_PAST_MAX = 8
"""Steps that began with nothing but a session's tip, for which late drafts are still heard."""


@dataclass(slots=True)
class _Past:
    """Lengths at which a session had no guesses, and when a step could have begun there."""

    lengths: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_PAST_MAX))


class Waiting:
    """One engine's."""

    def __init__(self) -> None:
        self.last_hold: Hold | None = None
        """Why the step that began last was delayed, if it was."""
        self.waited_s = 0.0
        """How long that took."""
        self._readiness = Readiness()
        self._past: dict[int, _Past] = {}
        self._ready_s: float | None = None
        """When the next step could have begun; None while one is under way."""
        self._nodes_per_row = float(_PROMISE_NODES_MAX)
        """Guesses verified a session, of late."""
        self._turn = 0

    def hold_s(self, seats: Collection[Seat]) -> float:
        """Return how long to wait for commands before asking again; 0: begin the step now."""
        now_s = time.perf_counter()
        if self._ready_s is None:
            self._ready_s, self.last_hold = now_s, None
            self._look(seats, now_s)
        # Asked again where what was waited for is overdue already: it counts as missed then.
        while (hold := self._readiness.hold(now_s)) is not None:
            self.last_hold = hold
            if hold.until_s > now_s:
                return hold.until_s - now_s
        self.waited_s = now_s - self._ready_s
        return 0.0

    def _look(self, seats: Collection[Seat], now_s: float) -> None:
        # A prompt under way makes a step worth beginning.
        decoding = not any(seat.waiting or len(seat.session.pending) != 1 for seat in seats)
        self._readiness.ready(len(seats))
        if not decoding:
            return
        for session in self._in_turn([seat.session for seat in seats if seat.session.sources]):
            value = session.promise(min(self._looked_at, session.tokens_left))
            number = session.spec.session
            self._readiness.watch(number, session.sources, value, now_s)
            if value == 1.0:
                past = self._past.setdefault(number, _Past())
                past.lengths.append((len(session.log), now_s))

    def _in_turn(self, sessions: list[Session]) -> Iterable[Session]:
        if len(sessions) <= _WATCHED_MAX:
            return sessions
        self._turn = (self._turn + _WATCHED_MAX) % len(sessions)
        return islice(sessions + sessions, self._turn, self._turn + _WATCHED_MAX)

    def merged(self, session: Session, draft: Draft | None, source: int, at_s: float) -> None:
        """A draft came for a session, at `at_s` on `time.perf_counter`'s clock."""
        if draft is None:
            return
        number = session.spec.session
        past = self._past.get(number)
        if past is not None and draft.base_length < len(session.log):
            self._late(session, past, draft, source, at_s)
        if self._readiness.watched(number):
            self._readiness.arrived(number, session.promise(self._looked_at), at_s)

    def _late(self, session: Session, past: _Past, draft: Draft, source: int, at_s: float) -> None:
        for length, ready_s in list(past.lengths):
            if length == draft.base_length:
                # The first one only: what the second adds depends on it.
                past.lengths.remove((length, ready_s))
                gain = session.promise_of(draft, source, self._looked_at)
                self._readiness.late(session.spec.session, session.sources, at_s - ready_s, gain)

    @property
    def _looked_at(self) -> int:
        return max(1, min(_PROMISE_NODES_MAX, round(_NODES_MORE * self._nodes_per_row)))

    def ended(self, tokens: int, nodes_per_row: float) -> None:
        """The step ended, committed so many tokens and had so many guesses verified a session."""
        self._nodes_per_row += _NODES_SHARE * (nodes_per_row - self._nodes_per_row)
        if self._ready_s is not None:
            self._readiness.committed(tokens, time.perf_counter() - self._ready_s)
        self._ready_s = None

    def forget(self, session: Session) -> None:
        """A session ended."""
        self._readiness.forget(session.spec.session)
        self._past.pop(session.spec.session, None)
