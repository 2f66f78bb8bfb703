"""An event simulation of a fleet, at the granularity of sessions, with the product's policies.

Sessions arrive, are placed, prefill, decode as fast as their company lets them, and leave; pods
die and come back. How fast a session decodes is looked up in a `SpeedTable`. Speeds hold for one
tick; within it all sessions advance at once as arrays, and decisions are made one by one.

Randomness comes from a generator seeded by the scenario; the clock is an argument, and only times
the policies.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.placement import WorkerView
from orchestrator.planner.fleet_scenario import (
    FleetResult,
    FleetScenario,
    PlacementCost,
    Policies,
)
from orchestrator.planner.pods import Pods
from orchestrator.planner.simulated_sessions import SimulatedSessions
from orchestrator.planner.speed_table import SpeedTable
from outrider.domain import ModelInfo

__all__ = ["FleetResult", "FleetScenario", "Policies", "simulate_fleet"]

_TARGET = ModelInfo("target", "target", "tokens", 32_000, 1 << 20, "bfloat16")
_DRAFTER = ModelInfo(
    "draft", "draft", "tokens", 32_000, 1 << 20, "bfloat16", proposer="language-model"
)

_PROBES_MAX = 50
_PROBE_EVERY = 100
"""So seldom is a decision also made over all pods, to say what that takes."""

R = TypeVar("R")


def simulate_fleet(
    scenario: FleetScenario,
    table: SpeedTable,
    policies: Policies,
    clock_s: Callable[[], float],
    advance: Callable[[float], None] = lambda _: None,
) -> FleetResult:
    """Simulate a fleet; `advance` hears after each tick how many simulated seconds it was."""
    return _FleetSimulation(scenario, table, policies, clock_s).run(advance)


class _FleetSimulation:
    def __init__(
        self,
        scenario: FleetScenario,
        table: SpeedTable,
        policies: Policies,
        clock_s: Callable[[], float],
    ) -> None:
        self._scenario = scenario
        self._policies = policies
        self._clock_s = clock_s
        self._random = np.random.default_rng(scenario.seed)
        self._now_s = 0.0
        self._verifiers = Pods(
            "verifier", scenario.verifiers, _TARGET, scenario.verifier_sessions_max
        )
        self._drafters = Pods("drafter", scenario.drafters, _DRAFTER, scenario.drafter_sessions_max)
        self._sessions = SimulatedSessions(scenario, table)
        self._arrivals_per_s = scenario.arrivals_per_s or arrivals_for_load(scenario, table)
        self._restarts: list[tuple[float, Pods, int]] = []
        self._timings: dict[str, list[float]] = {}
        self._decisions = 0
        self._clear_counters()

    def _clear_counters(self) -> None:
        self._counts = dict.fromkeys(("started", "finished", "refused", "moved", "rebound"), 0)
        self._counts |= dict.fromkeys(("lost", "verifier_deaths", "drafter_deaths"), 0)
        self._tokens = self._plain_tokens = 0.0
        self._shares: list[tuple[float, float, float]] = []
        self._times_per_token: list[NDArray[np.float64]] = []

    def run(self, advance: Callable[[float], None]) -> FleetResult:
        tick_s = self._scenario.tick_s
        ticks = max(1, round(self._scenario.duration_s / tick_s))
        for tick in range(-round(self._scenario.warmup_s / tick_s), ticks):
            if tick == 0:
                self._clear_counters()
            self._deaths()
            for _ in range(self._random.poisson(self._arrivals_per_s * tick_s)):
                self._arrive()
            self._decode(tick_s)
            self._now_s += tick_s
            advance(tick_s)
        return self._result(ticks * tick_s)

    # --- what happens ----------------------------------------------------------------------

    def _arrive(self) -> None:
        scenario = self._scenario
        verifier = self._place_verifier()
        prompt = self._length(scenario.prompt_tokens_mean)
        output = self._length(scenario.output_tokens_mean)
        if verifier is None:
            self._counts["refused"] += 1
            return
        drafters = self._place_drafters(scenario.drafters_per_session)
        self._sessions.add(self._now_s, verifier, drafters, prompt, output)
        self._counts["started"] += 1

    def _length(self, mean: float) -> int:
        """A log-normal length with that mean, at least one token."""
        spread = self._scenario.tokens_spread
        drawn = mean * np.exp(spread * self._random.standard_normal() - spread**2 / 2)
        return max(1, round(float(drawn)))

    def _deaths(self) -> None:
        due = [restart for restart in self._restarts if restart[0] <= self._now_s]
        for restart in due:
            self._restarts.remove(restart)
            restart[1].restart(restart[2])
        expected = self._scenario.deaths_per_hour / 3_600.0 * self._scenario.tick_s
        for pods, died in (
            (self._verifiers, self._verifier_died),
            (self._drafters, self._drafter_died),
        ):
            for _ in range(self._random.poisson(expected * pods.up)):
                index = int(self._random.integers(len(pods)))
                if pods.serves(index):
                    pods.kill(index)
                    self._restarts.append((self._now_s + self._scenario.restart_s, pods, index))
                    died(index)

    def _verifier_died(self, index: int) -> None:
        self._counts["verifier_deaths"] += 1
        for session in self._sessions.on_verifier(index):
            verifier = self._place_verifier()
            self._verifiers.change(index, -1)
            if verifier is None:
                self._release_drafters(session)
                self._sessions.remove(session)
                self._counts["lost"] += 1
            else:
                self._sessions.move(session, verifier, self._now_s)
                self._counts["moved"] += 1

    def _drafter_died(self, index: int) -> None:
        self._counts["drafter_deaths"] += 1
        for session, slot in self._sessions.on_drafter(index):
            self._drafters.change(index, -1)
            others = self._place_drafters(1)
            self._sessions.rebind(session, slot, others[0] if others else None, self._now_s)
            self._counts["rebound"] += bool(others)

    def _decode(self, tick_s: float) -> None:
        progress = self._sessions.decode(self._now_s, tick_s)
        self._tokens += progress.tokens
        self._plain_tokens += progress.plain_tokens
        scenario = self._scenario
        slots = scenario.verifiers * scenario.verifier_sessions_max
        self._shares.append(
            (
                progress.verifiers_busy / scenario.verifiers,
                len(self._sessions) / slots,
                progress.drafters_busy / max(1, scenario.drafters),
            )
        )
        self._times_per_token.append(progress.times_per_token_s)
        self._counts["finished"] += len(progress.finished)
        for session in progress.finished:
            self._verifiers.change(self._sessions.verifier_of(session), -1)
            self._release_drafters(session)
            self._sessions.remove(session)

    def _release_drafters(self, session: int) -> None:
        for drafter in self._sessions.drafters_of(session):
            self._drafters.change(drafter, -1)

    # --- decisions -------------------------------------------------------------------------

    def _place_verifier(self) -> int | None:
        """Ask the policy, take the place; None if the chosen one has no room."""
        self._decisions += 1
        choose = self._policies.choose_verifier
        chosen = self._timed(
            "verifier", self._verifiers, lambda views: choose(views, _TARGET.model, ())
        )
        if chosen is None or chosen.sessions >= chosen.sessions_max:
            return None
        index = self._verifiers.index_of(chosen)
        self._verifiers.change(index, 1)
        return index

    def _place_drafters(self, count: int) -> list[int]:
        choose = self._policies.choose_drafters
        chosen = self._timed(
            "drafters", self._drafters, lambda views: choose(views, _TARGET, count, ())
        )
        fitting = [v for v in chosen if v.sessions < v.sessions_max]
        indices = [self._drafters.index_of(view) for view in fitting]
        for index in indices:
            self._drafters.change(index, 1)
        return indices

    def _timed(self, what: str, pods: Pods, decide: Callable[[Sequence[WorkerView]], R]) -> R:
        probes = self._timings.setdefault(f"{what}_all", [])
        if self._decisions % _PROBE_EVERY == 1 and len(probes) < _PROBES_MAX:
            self._time(probes, pods.shortlist(0), decide)
        views = pods.shortlist(self._scenario.shortlist)
        return self._time(self._timings.setdefault(what, []), views, decide)

    def _time(
        self,
        timings: list[float],
        views: Sequence[WorkerView],
        decide: Callable[[Sequence[WorkerView]], R],
    ) -> R:
        began_s = self._clock_s()
        decided = decide(views)
        timings.append((self._clock_s() - began_s) * 1e6)
        return decided

    # --- results ---------------------------------------------------------------------------

    def _result(self, duration_s: float) -> FleetResult:
        times = np.concatenate(self._times_per_token)
        p50, p95 = np.percentile(times, (50, 95)) if len(times) else (0.0, 0.0)
        busy, used, drafting = np.mean(np.array(self._shares), axis=0)
        scenario = self._scenario
        return FleetResult(
            arrivals_per_s=self._arrivals_per_s,
            tokens_per_s=self._tokens / duration_s,
            speedup=self._tokens / self._plain_tokens if self._plain_tokens else 1.0,
            sessions_mean=float(used) * scenario.verifiers * scenario.verifier_sessions_max,
            verifier_utilisation=float(busy),
            verifier_sessions_share=float(used),
            drafter_utilisation=float(drafting),
            time_per_token_p50_s=float(p50),
            time_per_token_p95_s=float(p95),
            **self._counts,
            placement=PlacementCost(
                verifier_us=self._median_us("verifier"),
                drafters_us=self._median_us("drafters"),
                verifier_all_us=self._median_us("verifier_all"),
                drafters_all_us=self._median_us("drafters_all"),
            ),
        )

    def _median_us(self, what: str) -> float:
        return statistics.median(self._timings.get(what) or [0.0])


def arrivals_for_load(scenario: FleetScenario, table: SpeedTable) -> float:
    """Sessions per second that keep the stated share of the verifiers' sessions in use."""
    sessions = scenario.load * scenario.verifiers * scenario.verifier_sessions_max
    rows = max(1.0, sessions / scenario.verifiers)
    rate = float(np.interp(rows, np.arange(len(table.row_rates)), table.row_rates))
    bindings = sessions * scenario.drafters_per_session
    if scenario.drafters and bindings:
        rate = table.tokens_per_s(rows, max(1.0, bindings / scenario.drafters))
    stay_s = (
        scenario.prompt_tokens_mean / scenario.prefill_tokens_per_s
        + scenario.output_tokens_mean / rate
    )
    return sessions / stay_s
