"""Fleets under load, in virtual time: what the scaling policy steers in its tests.

Pods take time to load and to drain, sessions queue where room is short, and drafters win what the
planner's simulation says. A session is cut if it has to leave a verifier and no other has room.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from orchestrator.planner.drafter_choice import DrafterChoice, Prices, best_drafters
from orchestrator.planner.knots import Knots, duration_s
from orchestrator.planner.modes import simulate_fleet
from orchestrator.planner.tree_simulation import TreeResult, TreeScenario
from orchestrator.scaling.policy import Decision, Memory, PolicyConfig, decide
from orchestrator.scaling.signals import (
    DrafterSignals,
    FleetName,
    OrchestratorSignals,
    Signals,
    SpeculationFigures,
    VerifierSignals,
)
from orchestrator.scaling.worth import Planner, Service, expected_gain

TICK_S = 15.0
SESSION_STEPS = 150
"""Of each simulation: tests want them quick."""
STEP: Knots = ((1, 0.022), (32, 0.022), (128, 0.028), (512, 0.09))
DRAFT_STEP_S, LEAVES = 0.0025, 16
EACH_VERIFIER, EACH_DRAFTER, EACH_ORCHESTRATOR = 64, 256, 1_024


@functools.cache
def quick_planner(scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
    """Ask the planner, less precisely than the product does."""
    return best_drafters(scenario, prices, session_steps=SESSION_STEPS)


def formula_planner(scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
    """Plan by a formula, where the planner itself would take too long."""
    agreement = scenario.agreement[0]
    busy = scenario.sessions / scenario.verifiers
    duration = duration_s(scenario.step, round(busy + scenario.nodes_max))
    plain_s = duration_s(scenario.step, max(1, round(busy)))
    pay = max(0.0, (duration / plain_s - 1.0) * busy / scenario.nodes_max)
    figures = SpeculationFigures(busy, plain_s, pay, DRAFT_STEP_S, scenario.leaves, scenario.rtt_s)
    plain = scenario.target_only_tokens_per_s
    rates = {}
    for count in sorted({max(1, math.ceil(r * scenario.verifiers)) for r in (0.25, 0.5, 1, 2, 4)}):
        service = Service(
            scenario.verifiers, scenario.sessions, count, scenario.sessions, scenario.nodes_max
        )
        rates[count] = plain * (1.0 + (1.0 - pay) * expected_gain(agreement, figures, service))
    chosen = min(n for n, rate in rates.items() if rate >= 0.97 * max(rates.values()))
    return DrafterChoice(chosen, rates[chosen] / plain, rates)


@functools.cache
def simulated(scenario: TreeScenario, session_steps: int = SESSION_STEPS) -> TreeResult:
    """Simulate a fleet once."""
    return simulate_fleet(scenario, session_steps=session_steps)


@dataclass
class Pods:
    """One fleet's pods."""

    load_s: float
    drain_s: float
    ready: int
    loading: list[float] = field(default_factory=list)
    """When each will be ready."""
    leaving: list[float] = field(default_factory=list)
    """When each will be gone."""

    @property
    def replicas(self) -> int:
        """As the scale subresource says."""
        return self.ready + len(self.loading)

    def scale(self, replicas: int, now_s: float) -> int:
        """Set the replicas; returns how many that were ready have to leave."""
        gone = 0
        while self.replicas < replicas:
            self.loading.append(now_s + self.load_s)
        while self.replicas > replicas:
            if self.loading:
                self.loading.pop()
            else:
                self.ready -= 1
                gone += 1
                self.leaving.append(now_s + self.drain_s)
        return gone

    def tick(self, now_s: float) -> None:
        """Let time pass."""
        self.ready += sum(ready_s <= now_s for ready_s in self.loading)
        self.loading = [ready_s for ready_s in self.loading if ready_s > now_s]
        self.leaving = [gone_s for gone_s in self.leaving if gone_s > now_s]


@dataclass(frozen=True, slots=True)
class Seen:
    """The fleets at one moment."""

    at_s: float
    replicas: dict[FleetName, int]
    ready: dict[FleetName, int]
    sessions: int
    queue_wait_s: float
    refused: int
    decisions: tuple[Decision, ...]


class Plant:
    """Three fleets and their load."""

    def __init__(
        self,
        config: PolicyConfig,
        load: Callable[[float], int],
        *,
        verifiers: int = 1,
        drafters: int = 0,
        orchestrators: int = 1,
        agreement: Callable[[float], float] = lambda _: 0.8,
        blind: Callable[[float], bool] = lambda _: False,
        planner: Planner = formula_planner,
        simulates: bool = False,
    ) -> None:
        """`load` gives sessions, `agreement` how good drafters are, `blind` whether nothing is
        measured; all by time in seconds. With `simulates`, what drafters win is simulated step by
        step, else it follows a formula."""
        self._simulates = simulates
        self._config, self._load = config, load
        self._agreement, self._blind, self._planner = agreement, blind, planner
        self.pods = {
            FleetName.ORCHESTRATORS: Pods(15.0, 70.0, orchestrators),
            FleetName.VERIFIERS: Pods(90.0, 50.0, verifiers),
            FleetName.DRAFTERS: Pods(60.0, 0.0, drafters),
        }
        self.now_s = 0.0
        self.memory = Memory()
        self.cut = 0
        self.history: list[Seen] = []
        self._signals: Signals | None = None
        self._rng = random.Random(7)

    def run(self, duration_s: float) -> list[Seen]:
        """Let the policy steer for so long; returns what was seen meanwhile."""
        before = len(self.history)
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            self._tick()
            self.now_s += TICK_S
        return self.history[before:]

    def _tick(self) -> None:
        for pods in self.pods.values():
            pods.tick(self.now_s)
        verifiers = self.pods[FleetName.VERIFIERS]
        demand = self._load(self.now_s)
        room = verifiers.ready * EACH_VERIFIER
        sessions = min(demand, room)
        refused = demand - sessions
        wait_s = 0.05 / (1.0 - min(0.995, demand / room)) if room else 60.0
        if not self._blind(self.now_s):
            self._signals = self._measure(demand, sessions, refused, wait_s)
        current = {name: pods.replicas for name, pods in self.pods.items()}
        decisions, self.memory = decide(
            self._config, self.memory, current, self._signals, self.now_s, self._planner
        )
        for decision in decisions:
            gone = self.pods[decision.fleet].scale(decision.replicas, self.now_s)
            if decision.fleet is FleetName.VERIFIERS and gone:
                self.cut += max(0, sessions - verifiers.ready * EACH_VERIFIER)
        replicas = {name: pods.replicas for name, pods in self.pods.items()}
        ready = {name: pods.ready for name, pods in self.pods.items()}
        self.history.append(Seen(self.now_s, replicas, ready, sessions, wait_s, refused, decisions))

    def _measure(self, demand: int, sessions: int, refused: int, wait_s: float) -> Signals:
        orchestrators, verifiers, drafters = self.pods.values()
        return Signals(
            measured_s=self.now_s,
            orchestrators=OrchestratorSignals(
                ready=orchestrators.ready,
                sessions=demand,
                sessions_max=orchestrators.ready * EACH_ORCHESTRATOR,
                cpu_cores=demand / 2_000.0,
            ),
            verifiers=VerifierSignals(
                ready=verifiers.ready,
                sessions=sessions,
                sessions_max=verifiers.ready * EACH_VERIFIER,
                refused=refused,
                queue_wait_s=wait_s if demand else None,
                kv_share=0.9 * sessions / max(1, verifiers.ready * EACH_VERIFIER),
                draining=len(verifiers.leaving),
            ),
            drafters=DrafterSignals(
                ready=drafters.ready,
                sessions=min(sessions, drafters.ready * EACH_DRAFTER),
                sessions_max=drafters.ready * EACH_DRAFTER,
                figures=self._figures(sessions) if sessions and verifiers.ready else None,
            ),
        )

    def _figures(self, sessions: int) -> SpeculationFigures:
        verifiers, drafters = self.pods[FleetName.VERIFIERS], self.pods[FleetName.DRAFTERS]
        rows = sessions / verifiers.ready
        busy = max(1, round(rows))
        durations_s = [duration_s(STEP, busy + count) for count in range(33)]
        goodput = 1.01 * busy / durations_s[0]
        # As a verifier reports it: `verifier_service.scheduling`.
        pay_min = min((goodput * durations_s[n] - busy) / n for n in range(1, 33))
        gain = None
        figures = SpeculationFigures(
            rows=rows,
            plain_s=durations_s[0],
            pay_min=max(0.0, pay_min),
            draft_step_s=DRAFT_STEP_S if drafters.ready else None,
            leaves_max=LEAVES if drafters.ready else 0,
            rtt_s=0.002,
        )
        agreement = self._agreement(self.now_s)
        if drafters.ready and self._simulates:
            truth = true_scenario(sessions, verifiers.ready, drafters.ready, agreement)
            gain = simulated(truth).tokens_per_step - 1.0
        elif drafters.ready:
            served = min(sessions, drafters.ready * EACH_DRAFTER)
            service = Service(verifiers.ready, sessions, drafters.ready, served, 32)
            gain = expected_gain(agreement, figures, service) * self._rng.uniform(0.9, 1.1)
        return replace(figures, gain=gain)


def true_scenario(sessions: int, verifiers: int, drafters: int, agreement: float) -> TreeScenario:
    """What the fleet is really like, in proportion if it is large."""
    shown = min(verifiers, 2)
    share = shown / verifiers
    left = 1.0 - agreement
    return TreeScenario(
        step=STEP,
        draft_step_s=DRAFT_STEP_S,
        leaves=LEAVES,
        agreement=(agreement, 0.45 * left, 0.2 * left) if agreement > 0.3 else (agreement,),
        sessions=max(1, 4 * round(sessions * share / 4)),
        verifiers=shown,
        drafters=max(1, round(drafters * share)),
        nodes_max=32,
    )


def optimum(sessions: int, verifiers: int, agreement: float) -> DrafterChoice:
    """What the planner would have, knowing the truth."""
    return quick_planner(replace(true_scenario(sessions, verifiers, 1, agreement)), None)


def turns(values: list[int]) -> int:
    """How often a series changes its direction."""
    steps = [math.copysign(1, b - a) for a, b in itertools.pairwise(values) if a != b]
    return sum(a != b for a, b in itertools.pairwise(steps))
