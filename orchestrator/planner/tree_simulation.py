"""An event simulation of the protocol, without overheads.

Drafters keep a tree for each session, expand in each draft step the best leaves over all their
sessions, and push what they have found. A verifier begins a step as soon as the last one ends,
for all its sessions, with the guesses that maximise (rows + their probabilities) / T(tokens).
Commits travel back, and both sides re-root their trees. Nothing else takes time: no relaying, no
planning, no queue. What the product reaches of this is its efficiency.

The simulation draws from a generator seeded by the scenario and is otherwise pure.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from orchestrator.planner.knots import duration_s
from orchestrator.planner.scenario import TreeResult, TreeScenario
from orchestrator.planner.simulated_tree import Node, SessionTree
from orchestrator.planner.step_choice import choose_nodes

__all__ = ["Hold", "Readiness", "TreeResult", "TreeScenario", "simulate"]


@dataclass(frozen=True, slots=True)
class Readiness:
    """A verifier that could start a step now."""

    now_s: float
    ready_since_s: float
    """When its last step ended."""
    rows: int
    expected_tokens: float
    """What the step would commit, by the probabilities of the guesses that are there."""
    step_s: float
    """How long it would take."""


Hold = Callable[[Readiness], float]
"""Seconds that a ready verifier waits for drafts at most, 0 to start. Asked again whenever a draft
arrives or the time is over."""


@dataclass(slots=True)
class _Worker:
    busy_s: float = 0.0
    """Counted so far."""
    began_s: float | None = None
    """When the step in progress began, or counting."""

    @property
    def idle(self) -> bool:
        return self.began_s is None

    def end(self, now_s: float) -> None:
        assert self.began_s is not None
        self.busy_s += now_s - self.began_s
        self.began_s = None

    def count_from(self, now_s: float) -> None:
        self.busy_s = 0.0
        if self.began_s is not None:
            self.began_s = now_s

    def busy_until(self, now_s: float) -> float:
        return self.busy_s + (0.0 if self.began_s is None else now_s - self.began_s)


@dataclass(slots=True)
class _Verifier(_Worker):
    index: int = 0
    sessions: list[SessionTree] = field(default_factory=list)
    ready_since_s: float = 0.0
    hold: int = 0
    """Number of the current wait; recalls of older ones are void."""


@dataclass(slots=True)
class _Drafter(_Worker):
    served: list[tuple[SessionTree, int, _Verifier]] = field(default_factory=list)
    """Sessions, with the slot that this drafter has in each, and who verifies them."""
    fresh: dict[int, list[Node]] = field(default_factory=dict)
    """By index of the session: expanded, and not sent yet."""
    flushed_s: dict[int, float] = field(default_factory=dict)
    """When something of a session was sent last."""


@dataclass(slots=True)
class _Counters:
    since_s: float = 0.0
    tokens: int = 0
    rows: int = 0
    steps: int = 0
    nodes: int = 0
    before: list[int] = field(default_factory=list)
    """Tokens of each session when counting began."""


def simulate(scenario: TreeScenario, hold: Hold | None = None) -> TreeResult:
    """Simulate a scenario; with `hold`, steps may start later than they could."""
    return _Simulation(scenario, hold).run()


class _Simulation:
    def __init__(self, scenario: TreeScenario, hold: Hold | None) -> None:
        self._scenario = scenario
        self._hold = hold
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ticket = itertools.count()
        self._steps = self._steps_begun = 0
        self._active = min(scenario.verifiers, scenario.sessions)
        slots = min(scenario.drafters_per_session, scenario.drafters)
        self._sessions = [
            SessionTree(scenario.agreement, slots, Random(f"{scenario.seed}/{index}"))
            for index in range(scenario.sessions)
        ]
        self._verifiers = [
            _Verifier(index=index, sessions=self._sessions[index :: scenario.verifiers])
            for index in range(self._active)
        ]
        self._drafters = [_Drafter() for _ in range(scenario.drafters)]
        for index, session in enumerate(self._sessions):
            for slot in range(slots):
                number = (index + slot) % scenario.drafters
                if number >= scenario.silent_drafters:
                    verifier = self._verifiers[index % scenario.verifiers]
                    self._drafters[number].served.append((session, slot, verifier))
        self._served_by: dict[int, list[_Drafter]] = {}
        for drafter in self._drafters:
            for verifier in {id(v): v for _, _, v in drafter.served}.values():
                self._served_by.setdefault(verifier.index, []).append(drafter)
        most = max(len(verifier.sessions) for verifier in self._verifiers) + scenario.nodes_max
        self._step_s = [duration_s(scenario.step, max(1, size)) for size in range(most + 1)]
        # By the duration of a full step, since a busy verifier's hardly differ from it.
        often = scenario.flushes_per_step
        self._flush_s = [
            0.0
            if often is None
            else self._step_s[len(verifier.sessions) + scenario.nodes_max] / often
            for verifier in self._verifiers
        ]
        self._counted = _Counters(before=[0] * scenario.sessions)

    def run(self) -> TreeResult:
        for drafter in self._drafters:
            self._draft(drafter)
        for verifier in self._verifiers:
            self._consider(verifier)
        warmup = self._scenario.warmup_steps * self._active
        self._run_until(warmup, None)
        self._begin_counting()
        limit_s = self._scenario.duration_s
        if limit_s is None:
            self._run_until(warmup + self._scenario.steps * self._active, None)
        else:
            self._run_until(None, self._now_s + limit_s)
        return self._result()

    def _run_until(self, steps: int | None, end_s: float | None) -> None:
        while steps is None or self._steps < steps:
            time_s, _, action = self._events[0]
            if end_s is not None and time_s > end_s:
                self._now_s = end_s
                return
            heapq.heappop(self._events)
            self._now_s = time_s
            action()

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now_s + delay_s, next(self._ticket), action))

    # --- drafters --------------------------------------------------------------------------

    def _draft(self, drafter: _Drafter) -> None:
        """Begin a draft step, if there is a leaf."""
        best: list[tuple[float, int]] = []
        for index, (session, slot, _) in enumerate(drafter.served):
            cost = session.best_cost(slot)
            if cost is not None:
                best.append((cost, index))
        heapq.heapify(best)
        batch: list[tuple[int, Node]] = []
        while best and len(batch) < self._scenario.leaves:
            index = best[0][1]
            session, slot, _ = drafter.served[index]
            batch.append((index, session.take(slot)))
            cost = session.best_cost(slot)
            if cost is None:
                heapq.heappop(best)
            else:
                heapq.heapreplace(best, (cost, index))
        if batch:
            drafter.began_s = self._now_s
            step_s = duration_s(self._scenario.draft_knots, len(batch))
            self._after(step_s, partial(self._end_draft, drafter, batch))

    def _end_draft(self, drafter: _Drafter, batch: list[tuple[int, Node]]) -> None:
        drafter.end(self._now_s)
        for index, node in batch:
            session, slot, _ = drafter.served[index]
            session.drafted(slot, node)
            drafter.fresh.setdefault(index, []).append(node)
        self._draft(drafter)
        self._flush(drafter)

    def _flush(self, drafter: _Drafter) -> None:
        """Send what is due: everything when there is nothing left to expand."""
        due: list[tuple[int, Node]] = []
        for index in list(drafter.fresh):
            last_s = drafter.flushed_s.get(index, -math.inf)
            if (
                drafter.idle
                or self._now_s - last_s >= self._flush_s[drafter.served[index][2].index]
            ):
                due += [(index, node) for node in drafter.fresh.pop(index)]
                drafter.flushed_s[index] = self._now_s
        if due:
            self._after(self._scenario.rtt_s / 2, partial(self._arrive, drafter, due))

    def _arrive(self, drafter: _Drafter, batch: list[tuple[int, Node]]) -> None:
        for _, node in batch:
            node.arrived = True
        if self._hold is not None:
            verifiers = {v.index: v for v in (drafter.served[index][2] for index, _ in batch)}
            for verifier in verifiers.values():
                if verifier.idle:
                    self._consider(verifier)

    def _committed(self, verifier: _Verifier, roots: list[Node]) -> None:
        for session, root in zip(verifier.sessions, roots, strict=True):
            session.reroot_drafters(root)
        for drafter in self._served_by.get(verifier.index, ()):
            if drafter.idle:
                self._draft(drafter)

    # --- verifiers -------------------------------------------------------------------------

    def _consider(self, verifier: _Verifier) -> None:
        """Start a step, or wait as long as the policy says."""
        rows = len(verifier.sessions)
        nodes, expected = choose_nodes(verifier.sessions, self._step_s, self._scenario.nodes_max)
        step_s = self._step_s[rows + len(nodes)]
        if self._hold is not None:
            ready = Readiness(self._now_s, verifier.ready_since_s, rows, expected, step_s)
            verifier.hold += 1
            delay_s = self._hold(ready)
            if delay_s > 0.0:
                self._after(delay_s, partial(self._recall, verifier, verifier.hold))
                return
        self._steps_begun += 1
        number = self._steps_begun
        for node in nodes:
            node.chosen = number
        self._counted.nodes += len(nodes)
        verifier.began_s = self._now_s
        self._after(step_s, partial(self._end_step, verifier, number))

    def _recall(self, verifier: _Verifier, hold: int) -> None:
        if verifier.idle and verifier.hold == hold:
            self._consider(verifier)

    def _end_step(self, verifier: _Verifier, number: int) -> None:
        verifier.end(self._now_s)
        verifier.ready_since_s = self._now_s
        counted = self._counted
        counted.tokens += sum(session.commit(number) for session in verifier.sessions)
        counted.rows += len(verifier.sessions)
        counted.steps += 1
        self._steps += 1
        roots = [session.root for session in verifier.sessions]
        self._after(self._scenario.rtt_s / 2, partial(self._committed, verifier, roots))
        self._consider(verifier)

    # --- results ---------------------------------------------------------------------------

    def _begin_counting(self) -> None:
        self._counted = _Counters(self._now_s, before=[s.tokens for s in self._sessions])
        for worker in (*self._verifiers, *self._drafters):
            worker.count_from(self._now_s)

    def _busy_share(self, workers: Sequence[_Worker], count: int) -> float:
        span_s = count * (self._now_s - self._counted.since_s)
        return sum(worker.busy_until(self._now_s) for worker in workers) / span_s if count else 0.0

    def _result(self) -> TreeResult:
        counted, scenario = self._counted, self._scenario
        duration = self._now_s - counted.since_s
        rate = counted.tokens / duration
        steps = max(1, counted.steps)
        return TreeResult(
            tokens_per_s=rate,
            tokens_per_step=counted.tokens / max(1, counted.rows),
            occupancy=self._busy_share(self._verifiers, scenario.verifiers),
            speedup=rate / scenario.target_only_tokens_per_s,
            drafter_occupancy=self._busy_share(self._drafters, scenario.drafters),
            nodes_per_step=counted.nodes / steps,
            acceptance_rate=(counted.tokens - counted.rows) / max(1, counted.nodes),
            duration_s=duration,
            tokens_by_session=tuple(
                session.tokens - before
                for session, before in zip(self._sessions, counted.before, strict=True)
            ),
        )
