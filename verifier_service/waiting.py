"""Watches sessions between steps and tells the engine how long to wait for their drafts.

The clock and the bookkeeping around `readiness`, which decides. Owned by the engine's thread.

A session without guesses may be waited for. What would come for it is learnt whether it was
waited for or not: a *ghost* of its empty tree is kept, to which the drafts for that very tip are
merged when they arrive, in time or late.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from outrider.domain import Draft
from outrider.draft_tree import DraftTree
from verifier_service.planning import Seat
from verifier_service.readiness import Hold, Readiness
from verifier_service.session import Session

_WATCHED_MAX = 4
"""Sessions that are watched before a step, in turn: looking at a tree takes time."""
_GHOSTS_MAX = 2
_GHOST_DRAFTS_MAX = 6
_LOOK_SHARE = 0.005
_LOOK_FREE_S = 0.05
"""Ghosts may take that share of the engine's time, after a beginning that is free."""
_PATIENCE_S = 0.5
"""For the first draft of a ghost."""
_PROMISE_NODES_MAX = 32
"""Guesses a session that are looked at, at most, to tell what a step promises."""
_NODES_SHARE = 1.0 / 16.0
_NODES_MORE = 1.5
"""What steps verified of late, and so much more, is what the next one may take up."""


@dataclass(slots=True)
class _Ghost:
    """An empty tree as it would have grown."""

    length: int
    tree: DraftTree
    value: float
    since_s: float
    """When the tree got this value; at first when a step could have begun."""
    drafts: int = 0


@dataclass(slots=True)
class _After:
    """A session of which it is observed what it commits after a step without guesses."""

    held: bool
    """That step was delayed for it."""
    bare_step: bool = True
    """It has yet to end."""


class Waiting:
    """One engine's."""

    def __init__(self) -> None:
        self.last_hold: Hold | None = None
        """Why the step that began last was delayed, if it was."""
        self.waited_s = 0.0
        """How long that took."""
        self._readiness = Readiness()
        self._ghosts: OrderedDict[int, _Ghost] = OrderedDict()
        """By session, the oldest first."""
        self._ready_s: float | None = None
        """When the next step could have begun; None while one is under way."""
        self._nodes_per_row = float(_PROMISE_NODES_MAX)
        """Guesses verified a session, of late."""
        self._bare: list[int] = []
        """Watched sessions that have no guesses for the next step."""
        self._after: dict[int, _After] = {}
        self._turn = 0
        self._began_s = time.perf_counter()
        self._looked_s = 0.0
        """What ghosts have taken so far."""

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
        held = () if self.last_hold is None else self.last_hold.sessions
        for number in self._bare:
            self._after[number] = _After(number in held)
        return 0.0

    def _look(self, seats: Collection[Seat], now_s: float) -> None:
        self._readiness.ready()
        self._bare.clear()
        # A prompt under way makes a step worth beginning.
        if any(seat.waiting or len(seat.session.pending) != 1 for seat in seats):
            return
        drafted = [seat.session for seat in seats if seat.session.sources]
        if not drafted:
            return
        self._turn = (self._turn + _WATCHED_MAX) % len(drafted)
        watched = (drafted[self._turn :] + drafted[: self._turn])[:_WATCHED_MAX]
        self._readiness.stand_for(len(drafted) / len(watched))
        for session in watched:
            if session.promise(session.tree, 1) == 1.0 and session.tokens_left > 1:
                number = session.spec.session
                self._readiness.watch(number, session.sources, now_s)
                self._bare.append(number)
                self._keep_ghost(session, now_s)

    def _keep_ghost(self, session: Session, now_s: float) -> None:
        if self._looked_s > _LOOK_FREE_S + _LOOK_SHARE * (now_s - self._began_s):
            return
        number = session.spec.session
        replaced = self._ghosts.get(number)
        if replaced is None and len(self._ghosts) >= _GHOSTS_MAX:
            replaced = next(iter(self._ghosts.values()))
        if replaced is not None and not replaced.drafts and now_s - replaced.since_s < _PATIENCE_S:
            return  # its drafts may be on a long way
        if number not in self._ghosts and len(self._ghosts) >= _GHOSTS_MAX:
            self._ghosts.popitem(last=False)
        self._ghosts[number] = _Ghost(len(session.log), session.empty_tree(), 1.0, now_s)
        self._ghosts.move_to_end(number)

    def merged(self, session: Session, draft: Draft | None, source: int, at_s: float) -> None:
        """A draft was merged that came at `at_s` on `time.perf_counter`'s clock."""
        number = session.spec.session
        ghost = self._ghosts.get(number)
        if draft is not None and ghost is not None and draft.base_length == ghost.length:
            started_s = time.perf_counter()
            self._haunt(session, ghost, draft, source, at_s)
            self._looked_s += time.perf_counter() - started_s
        if self._ready_s is not None and self._readiness.watched(number):
            self._readiness.arrived(number, session.promise(session.tree, self._nodes), at_s)

    def _haunt(
        self, session: Session, ghost: _Ghost, draft: Draft, source: int, at_s: float
    ) -> None:
        if not session.sound(draft):
            return
        ghost.tree.merge(draft, (), source)
        value = session.promise(ghost.tree, self._nodes)
        delay_s = max(0.0, at_s - ghost.since_s)
        self._readiness.learn(
            session.spec.session, session.sources, ghost.value, delay_s, value - ghost.value
        )
        ghost.value, ghost.since_s = value, max(at_s, ghost.since_s)
        ghost.drafts += 1
        if ghost.drafts >= _GHOST_DRAFTS_MAX:
            del self._ghosts[session.spec.session]

    @property
    def _nodes(self) -> int:
        return max(1, min(_PROMISE_NODES_MAX, round(_NODES_MORE * self._nodes_per_row)))

    def committed(self, session: Session, tokens: int) -> None:
        """A session committed so many tokens in the step that ends."""
        after = self._after.get(session.spec.session)
        if after is None:
            return
        if after.bare_step:
            after.bare_step = False
            return
        self._readiness.followed(tokens, held=after.held)
        del self._after[session.spec.session]

    def ended(self, tokens: int, rows: int, nodes: int) -> None:
        """A step of so many sessions ended; it verified so many guesses."""
        if rows:
            self._nodes_per_row += _NODES_SHARE * (nodes / rows - self._nodes_per_row)
        if self._ready_s is not None:
            self._readiness.committed(tokens, rows, time.perf_counter() - self._ready_s)
        self._ready_s = None

    def forget(self, session: Session) -> None:
        """A session ended."""
        self._readiness.forget(session.spec.session)
        self._ghosts.pop(session.spec.session, None)
        self._after.pop(session.spec.session, None)
