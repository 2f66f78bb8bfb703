"""Gathers what rebalancing weighs: what verifiers' steps and prefills took, and who could move.

One move at a time and orchestrator, and none of a session that has just moved: what a move does is
seen before the next one is weighed, and several orchestrators do not all flee to the same place.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable

from orchestrator.fleet import Fleet
from orchestrator.generation import Running
from orchestrator.placement import Draw
from orchestrator.rebalancing import (
    Move,
    Mover,
    Site,
    StepCurve,
    best_move,
    extremes,
    steps_left,
)
from orchestrator.workers import VerifierLink
from outrider.domain import StepReport

INTERVAL_S = 0.5
"""Between two moves, at least."""
REST_S = 5.0
"""A session that has been moved stays for so long."""
MOVERS_MAX = 64
"""Sessions of a verifier that are looked at."""
PREFILL_TOKENS_MIN = 32
"""Shorter prompts say more about round trips than about prefill."""
_PREFILL_SHARE = 0.25

_log = logging.getLogger(__name__)

HeldTokens = Callable[[Running], dict[str, int]]
"""Says how much of a session's beginning verifiers hold, by incarnation."""


class Balancer:
    """Finds the sessions of one orchestrator that had better move. For the event loop."""

    def __init__(
        self, fleet: Fleet, held_tokens: HeldTokens, draw: Draw = random.randrange
    ) -> None:
        self._fleet = fleet
        self._draw = draw
        self._held_tokens = held_tokens
        self._curves: dict[str, StepCurve] = {}
        """By the incarnation of a verifier, and by the fingerprint of a model: of all of them."""
        self._prefill_s: dict[str, float] = {}
        """For a token, likewise."""
        self._moved_s = 0.0

    def took_step(self, link: VerifierLink, step: StepReport) -> None:
        """Take note of a verify step; those with prompts in them say nothing of rows."""
        if step.prefill_tokens:
            return
        # Without guesses: they are there as long as there is room for them, and give way.
        duration_s = step.plain_s or step.duration_s
        for key in self._keys(link):
            self._curves.setdefault(key, StepCurve()).observe(step.rows, duration_s)

    def committed(self, running: Running, link: VerifierLink, now_s: float) -> None:
        """Take note of the first commit after a prefill."""
        began_s, running.prefill_began_s = running.prefill_began_s, None
        tokens = running.missing_tokens
        if began_s is None or tokens < PREFILL_TOKENS_MIN:
            return
        for key in self._keys(link):
            known_s = self._prefill_s.get(key)
            took_s = (now_s - began_s) / tokens
            share = 1.0 if known_s is None else _PREFILL_SHARE
            self._prefill_s[key] = (known_s or 0.0) + share * (took_s - (known_s or 0.0))

    def find(
        self, sessions: Callable[[str], Iterable[Running]], now_s: float
    ) -> tuple[Running, Move] | None:
        """Return a session that should move, and where to; `sessions` are those of an address."""
        if now_s - self._moved_s < INTERVAL_S:
            return None
        self._forget_the_dead()
        for fingerprint in self._fingerprints():
            pair = extremes(self._sites(fingerprint))
            if pair is None:
                continue
            here, there = pair
            candidates = {
                running.number: running
                for running, _ in zip(sessions(here.address), range(MOVERS_MAX), strict=False)
                if running.session.safe_to_move and now_s - running.moved_s > REST_S
            }
            movers = [self._mover(running, there.address) for running in candidates.values()]
            move = best_move(here, there, movers)
            if move is not None:
                self._moved_s = now_s
                _log.info(
                    "session %016x moves from %s to %s: wins %.1f s for all, costs %.1f s",
                    move.number,
                    here.address,
                    there.address,
                    move.gain_s,
                    move.cost_s,
                )
                return candidates[move.number], move
        return None

    def _fingerprints(self) -> set[str]:
        infos = [link.info for link in self._fleet.verifiers.values() if link.info is not None]
        return {info.model_fingerprint for info in infos}

    def _sites(self, fingerprint: str) -> list[Site]:
        common = self._curves.get(fingerprint, StepCurve())
        sites = []
        # Of a large fleet some, other ones each time.
        for view in self._fleet.verifier_views(draw=self._draw):
            if view.info.model_fingerprint != fingerprint:
                continue
            link = self._fleet.verifiers[view.address]
            own = self._curves.get(link.incarnation, StepCurve())
            known_s = self._prefill_s.get(fingerprint, 0.0)
            sites.append(
                Site(
                    view.address,
                    view.sessions,
                    view.sessions_max,
                    own.extended(common),
                    waiting=link.step.waiting if view.waiting else 0,
                    prefill_s=self._prefill_s.get(link.incarnation, known_s),
                )
            )
        return sites

    def _mover(self, running: Running, address: str) -> Mover:
        session = running.session
        counters = session.spell_counters
        said = len(session.output) - len(session.spec.committed)
        per_step = said / max(1, counters.verify_steps)
        held = self._held_tokens(running).get(self._fleet.verifiers[address].incarnation, 0)
        left = steps_left(len(session.output), session.spec.tokens_max, per_step)
        return Mover(running.number, left, session.length, {address: held})

    def _keys(self, link: VerifierLink) -> tuple[str, ...]:
        if link.info is None:
            return (link.incarnation,)
        return link.incarnation, link.info.model_fingerprint

    def _forget_the_dead(self) -> None:
        alive = {key for link in self._fleet.verifiers.values() for key in self._keys(link)}
        for known in (self._curves, self._prefill_s):
            for key in known.keys() - alive:
                del known[key]
