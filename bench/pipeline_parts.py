"""The scenarios of the pipelining benchmark, measured over real services and real sockets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.pipeline_results import ROUND_TRIPS_MS, Disturbance, Recovery, Results, Row
from bench.pipeline_setting import HOPELESS, POOR, Setting, expected
from bench.streams import Load, Observed, observe
from bench.synthetic_fleet import SyntheticFleet
from bench.timelines import (
    busy_share,
    rate_between,
    rate_curve,
    settled_s,
    spread,
    step_gaps_s,
)

PARTS = ("rtt", "draft", "floor", "fleet", "recover", "drafters", "real")
DRAFT_RTT_MS = 2.0
FAR_RTT_MS = 50.0
DIRECT_MS = 0.5
"""Round trips up to this are those of services connected directly: a proxy costs as much."""
SESSIONS = (1, 2, 4, 8, 16, 32, 64)

_TARGET_SHARE = 0.98
_FULL_SHARE = 0.95
_WINDOW_S = 0.5
_STRIDE_S = 0.05


@dataclass(frozen=True)
class Effort:
    """How long everything is measured."""

    repeats: int = 3
    window_s: float = 8.0
    skipped_s: float = 1.5
    simulated_steps: int = 4_000
    round_trips_ms: tuple[float, ...] = ROUND_TRIPS_MS
    sessions: tuple[int, ...] = SESSIONS
    phase_s: float = 5.0
    """Of constant acceptance, in the part that changes it."""
    fleet_slowed: float = 5.0
    """The fleet of the part with many sessions has all its times so much longer: one machine has
    to run what would be thirteen."""


QUICK = Effort(1, 2.0, 1.0, 500, (0.5, 20.0), (1, 16), 3.0, 5.0)


class Bench:
    """Measures parts into `results`; says what it is at and what came out."""

    def __init__(
        self, effort: Effort, advance: Callable[[str], None], report: Callable[[str], None]
    ) -> None:
        """`advance` hears what is measured now, `report` what has been."""
        self.results = Results()
        self._effort = effort
        self._advance = advance
        self._report = report

    def rtt(self) -> None:
        """One session at several round trips."""
        setting = Setting()
        near = [ms for ms in self._effort.round_trips_ms if ms <= DIRECT_MS]
        far = [ms for ms in self._effort.round_trips_ms if ms > DIRECT_MS]
        for links, round_trips_ms in ((False, near), (True, far)):
            if round_trips_ms:
                with SyntheticFleet(setting, links=links) as fleet:
                    self._round_trips(fleet, "rtt", setting, round_trips_ms, "rtt {ms:g} ms")

    def draft(self) -> None:
        """Slower drafters, and one that expands one leaf a step."""
        for draft_ms in (4.0, 6.7, 8.2):
            self._near("draft", Setting(draft_ms=draft_ms), f"draft step {draft_ms:g} ms")
        self._near("draft", Setting(leaves=1), "one leaf")

    def floor(self) -> None:
        """Drafters that are of no use."""
        self._near("floor", Setting(silent=True), "silent drafter")
        setting = Setting(agreement=POOR)
        with SyntheticFleet(setting) as fleet:
            self._round_trips(fleet, "floor", setting, (FAR_RTT_MS,), "poor at {ms:g} ms")

    def fleet(self) -> None:
        """Many sessions on four verifiers and eight drafters."""
        base = Setting(verifiers=4, drafters=8).slowed(self._effort.fleet_slowed)
        with SyntheticFleet(base) as fleet:
            rtt_s = fleet.set_round_trip(DRAFT_RTT_MS / 1_000 * self._effort.fleet_slowed)
            for sessions in self._effort.sessions:
                setting = replace(base, sessions=sessions)
                name = f"{sessions} sessions"
                # Slower steps take longer to say as much.
                stretch = self._effort.fleet_slowed / max(1.0, sessions**0.5)
                self._measure(fleet, "fleet", setting, name, None, rtt_s, stretch)

    def recover(self) -> None:
        """Acceptance dropped, raised, dropped for twice as long, raised."""
        effort, setting = self._effort, Setting()
        phase_s = effort.phase_s
        changes = ((1, HOPELESS), (2, setting.agreement), (3, HOPELESS), (5, setting.agreement))
        window_s = 6 * phase_s
        runs: list[Observed] = []
        target_only = []
        with SyntheticFleet(setting) as fleet:
            fleet.set_round_trip(DRAFT_RTT_MS / 1_000)
            for seed in range(effort.repeats):
                self._advance(f"recovery, repeat {seed + 1}: target only")
                plain = observe(fleet.address, self._load(setting, seed, False))
                target_only.append(_rate(plain))
                self._advance(f"recovery, repeat {seed + 1}")
                load = replace(self._load(setting, seed, True), window_s=window_s)
                script = [
                    (at * phase_s, lambda shares=shares: fleet.change(agreement=shares))
                    for at, shares in changes
                ]
                runs.append(observe(fleet.address, load, script))
        self.results.recovery = _recovery(runs, statistics.median(target_only), window_s)

    def drafters(self) -> None:
        """Drafters that are slow or late among others that are not."""
        setting = Setting(sessions=4, drafters=4)
        kinds: dict[str, Sequence[dict[str, object]]] = {
            "all well": (),
            "one ten times slower": ({"slower": 10.0, "drafters": [0]},),
            "one 300 ms late": ({"late_s": 0.3, "drafters": [1]},),
        }
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        gaps: dict[str, list[float]] = {kind: [] for kind in kinds}
        with SyntheticFleet(setting) as fleet:
            fleet.set_round_trip(DRAFT_RTT_MS / 1_000)
            for seed in range(self._effort.repeats):
                for kind, commands in kinds.items():
                    self._advance(f"drafters, {kind}, repeat {seed + 1}")
                    fleet.change(slower=1.0, late_s=0.0)
                    for command in commands:
                        fleet.change(**command)
                    fleet.reset_steps()
                    seen = observe(fleet.address, self._load(setting, seed, True))
                    rates[kind].append(_rate(seen))
                    for steps in fleet.verify_steps():
                        gaps[kind] += step_gaps_s(steps, seen.begin_s, seen.end_s)
        self.results.disturbances = [
            Disturbance(kind, tuple(rates[kind]), spread(gaps[kind])) for kind in kinds
        ]

    def _near(self, part: str, setting: Setting, name: str) -> None:
        with SyntheticFleet(setting) as fleet:
            if setting.silent:
                fleet.change(silent=True)
            self._round_trips(fleet, part, setting, (DRAFT_RTT_MS,), name)

    def _round_trips(
        self,
        fleet: SyntheticFleet,
        part: str,
        setting: Setting,
        round_trips_ms: Sequence[float],
        name: str,
    ) -> None:
        for ms in round_trips_ms:
            rtt_s = fleet.set_round_trip(ms / 1_000)
            self._measure(fleet, part, setting, name.format(ms=ms), ms, rtt_s)

    def _measure(
        self,
        fleet: SyntheticFleet,
        part: str,
        setting: Setting,
        name: str,
        rtt_nominal_ms: float | None,
        rtt_s: float,
        stretch: float = 1.0,
    ) -> None:
        """All contenders in turn, on the same prompts within a repeat."""
        found: dict[str, list[float]] = {
            key: [] for key in ("target_only", "speculated", "again", "occupancy", "tau")
        }
        for seed in range(self._effort.repeats):
            for contender in ("target_only", "speculated", "again"):
                self._advance(f"{name}, {contender.replace('_', ' ')}, repeat {seed + 1}")
                speculation = contender == "speculated"
                fleet.reset_steps()
                seen = observe(fleet.address, self._load(setting, seed, speculation, stretch))
                found[contender].append(_rate(seen))
                if speculation:
                    busy, tau = _steps_of(fleet, seen, setting)
                    found["occupancy"].append(busy)
                    found["tau"].append(tau)
        row = Row(
            name=name,
            part=part,
            setting=setting,
            rtt_nominal_ms=rtt_nominal_ms,
            rtt_ms=1_000 * rtt_s,
            expected=expected(setting, rtt_s, self._effort.simulated_steps),
            **{key: tuple(values) for key, values in found.items()},
        )
        self.results.rows.append(row)
        self._report(
            f"{name}: {row.rtt_ms:.2f} ms, {row.speedup:.2f} of target-only,"
            f" {row.vs_simulation:.2f} of simulated"
        )

    def _load(self, setting: Setting, seed: int, speculation: bool, stretch: float = 1.0) -> Load:
        effort = self._effort
        # Without guesses every step is like the others, so a part of the time says as much.
        window_s = effort.window_s * stretch * (1.0 if speculation else 0.5)
        skipped_s = effort.skipped_s * max(1.0, min(2.0, stretch))
        return Load(setting.sessions, speculation, seed, skipped_s, window_s)


def _rate(seen: Observed) -> float:
    """Tokens a second, from the first of the deliveries within the window to the last."""
    inside = [(at, n) for at, n in seen.merged if seen.begin_s <= at <= seen.end_s]
    begin_s, end_s = inside[0][0], inside[-1][0]
    return rate_between(inside, begin_s, end_s)


def _steps_of(fleet: SyntheticFleet, seen: Observed, setting: Setting) -> tuple[float, float]:
    """Share of the time that verifiers with sessions were in steps; tokens a step and session."""
    steps = fleet.verify_steps()
    busy = [busy_share(of_one, seen.begin_s, seen.end_s) for of_one in steps]
    counts = [sum(seen.begin_s < end <= seen.end_s for _, end, _ in of_one) for of_one in steps]
    tokens = rate_between(seen.merged, seen.begin_s, seen.end_s) * (seen.end_s - seen.begin_s)
    used = min(setting.verifiers, setting.sessions)
    rows = sum(counts) * setting.sessions / used
    return sum(busy) / used, tokens / rows


def _recovery(runs: Sequence[Observed], target_only: float, window_s: float) -> Recovery:
    """Put the runs on top of each other, aligned at each change, and read the times back."""
    begins = [run.begin_s for run in runs]
    changes = [
        statistics.fmean(run.marks[at] - begin for run, begin in zip(runs, begins, strict=True))
        for at in range(4)
    ]

    def curve_after(change: int | None) -> list[tuple[float, float]]:
        marks = [run.begin_s if change is None else run.marks[change] for run in runs]
        aligned = [
            [(at_s - mark_s, n) for at_s, n in run.merged]
            for run, mark_s in zip(runs, marks, strict=True)
        ]
        here = 0.0 if change is None else changes[change]
        after = 0 if change is None else change + 1
        until_s = (changes[after] if after < len(changes) else window_s) - here
        return rate_curve(aligned, 0.0, until_s - 0.02, _WINDOW_S, _STRIDE_S)

    curves = [curve_after(change) for change in (None, 0, 1, 2, 3)]
    full = statistics.fmean(rate for _, rate in curves[0])
    starts = [0.0, *changes]
    return Recovery(
        target_only,
        full,
        tuple(changes),
        tuple(
            (start + end_s, rate)
            for start, c in zip(starts, curves, strict=True)
            for end_s, rate in c
        ),
        tuple(settled_s(curves[at], _TARGET_SHARE * target_only) for at in (1, 3)),
        tuple(settled_s(curves[at], _FULL_SHARE * full) for at in (2, 4)),
    )
