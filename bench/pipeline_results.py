"""What the pipelining benchmark measured. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.pipeline_prompts import Case
from bench.pipeline_setting import NODES_MAX, Expected, Setting
from bench.relaying.samples import Row as RelayRow
from bench.timelines import Spread, crossing

REPORTED_MS = (0.5, 2.0, 5.0, 10.0, 20.0)
"""Round trips with a goal."""
SATURATED_SESSIONS = 16
"""From here on, every verifier of the fleet has work at any time."""


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario, measured: tokens a second repeat by repeat, contenders in turn."""

    name: str
    part: str
    setting: Setting
    rtt_nominal_ms: float | None
    rtt_ms: float
    """As measured."""
    target_only: tuple[float, ...]
    """Two runs at first, then one after each speculated run."""
    speculated: tuple[float, ...]
    expected: Expected
    occupancy: tuple[float, ...] = ()
    """Share of the time that verifiers were in steps while speculated."""
    tau: tuple[float, ...] = ()
    step_stretch: tuple[float, ...] = ()
    """From one verify step's begin to the next one's, over the stated duration."""
    draft_step_ms: tuple[float, ...] = ()
    """Of a draft step, as measured; empty if the drafter took none."""
    planned: float | None = None
    """Tokens a second that the planner predicts from the measured figures."""

    @property
    def speedups(self) -> list[float]:
        """Of each speculated run over the mean of the target-only runs around it."""
        around = zip(self.target_only[1:], self.target_only[2:], strict=False)
        return [
            ours / statistics.fmean(both)
            for ours, both in zip(self.speculated, around, strict=True)
        ]

    @property
    def speedup(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.speedups)

    @property
    def spread(self) -> float:
        """Half the range of the repeats' speed-ups, as a share of their median."""
        return (max(self.speedups) - min(self.speedups)) / 2 / self.speedup

    @property
    def noise(self) -> float:
        """The second target-only run over the first: how exact a comparison is (A/A)."""
        return self.target_only[1] / self.target_only[0]

    @property
    def tokens_per_s(self) -> float:
        """Speculated, median."""
        return statistics.median(self.speculated)

    @property
    def vs_simulation(self) -> float:
        """What was measured over what was simulated.

        One session's speed-ups, for which there is a goal; many sessions' tokens a second.
        """
        if self.setting.sessions == 1:
            return self.speedup / (self.expected.simulation / self.expected.target_only)
        return self.tokens_per_s / self.expected.simulation

    @property
    def vs_planned(self) -> float | None:
        """Measured tokens a second over the planner's."""
        return None if self.planned is None else self.tokens_per_s / self.planned

    def planner_row(self) -> dict[str, Any]:
        """What `outrider plan --measured` reads: figures as they were measured.

        Step times include what passes between two steps, as far as it was measured.
        """
        stretch = statistics.median(self.step_stretch) if self.step_stretch else 1.0
        setting = self.setting
        draft_ms = statistics.median(self.draft_step_ms) if self.draft_step_ms else setting.draft_ms
        return {
            **setting.row(),
            "name": self.name,
            "part": self.part,
            "step_ms": [[size, ms * stretch] for size, ms in setting.step_ms],
            "draft_ms": draft_ms,
            "agreement": list(setting.agreement),
            "rtt_ms": self.rtt_ms,
            "nodes_max": NODES_MAX,
            "silent_drafters": setting.drafters if setting.silent else 0,
            "tokens_per_s": self.tokens_per_s,
        }

    def record(self) -> dict[str, Any]:
        """For JSON: the planner's keys, and beside them what else is worth knowing."""
        return {
            **self.planner_row(),
            "stated": self.setting.row(),
            "rtt_nominal_ms": self.rtt_nominal_ms,
            "target_only_tokens_per_s": statistics.median(self.target_only),
            "speedup": self.speedup,
            "spread": self.spread,
            "noise": self.noise,
            "occupancy": statistics.median(self.occupancy) if self.occupancy else None,
            "tau": statistics.median(self.tau) if self.tau else None,
            "vs_simulation": self.vs_simulation,
            "planned_tokens_per_s": self.planned,
            "expected": asdict(self.expected),
        }


@dataclass(frozen=True, slots=True)
class Recovery:
    """Acceptance dropped and raised while sessions run, twice; mean curves over the repeats."""

    target_only: float
    full: float
    """Tokens a second before the first drop."""
    changes_s: tuple[float, ...]
    """When agreement was changed, from the begin of the window, mean over the repeats."""
    curve: tuple[tuple[float, float], ...]
    """(end of a sliding window, tokens a second)"""
    recover_s: tuple[float | None, ...]
    """For each drop: until throughput was back at 98% of target-only."""
    recover_up_s: tuple[float | None, ...]
    """For each rise: until it was back at 95% of the full speed."""
    unbound: tuple[int, ...] = ()
    """For each rise: in how many of the repeats the drafter was unbound when it came."""
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Disturbance:
    """How a fleet fares with drafters that are slow or late."""

    name: str
    tokens_per_s: tuple[float, ...]
    gaps: Spread
    """From the end of one verify step to the begin of the next."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where and when a part was measured, and what went wrong."""

    time: str
    seconds: float
    outrider: str
    machine: dict[str, str]
    effort: dict[str, Any]
    errors: tuple[str, ...] = ()
    whole: bool = False
    """It came to its end."""


@dataclass(slots=True)
class Results:
    """What was measured; a part that was not asked for stays empty."""

    rows: list[Row] = field(default_factory=list)
    recovery: Recovery | None = None
    disturbances: list[Disturbance] = field(default_factory=list)
    real: list[Case] = field(default_factory=list)
    """Prompts answered by real models."""
    relay: list[RelayRow] = field(default_factory=list)
    """The orchestrator alone."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Of each part that was begun."""

    def of(self, part: str) -> list[Row]:
        """Rows of one part."""
        return [row for row in self.rows if row.part == part]

    def forget(self, part: str) -> None:
        """Drop what is known of a part."""
        self.origins.pop(part, None)
        self.rows = [row for row in self.rows if row.part != part]
        match part:
            case "recover":
                self.recovery = None
            case "drafters":
                self.disturbances = []
            case "real":
                self.real = []
            case "orchestrator":
                self.relay = []

    def figures(self) -> dict[str, float | None]:
        """The figures with goals, the worst of each; None for what was not measured."""
        by_rtt = {row.rtt_nominal_ms: row.speedup for row in self.of("rtt")}
        figures: dict[str, float | None] = {f"rtt{ms:g}": by_rtt.get(ms) for ms in REPORTED_MS}
        figures["worst_vs_target"] = _least(row.speedup for row in self.rows)
        figures["occupancy"] = _least(
            statistics.median(row.occupancy)
            for row in self.of("fleet")
            if row.setting.sessions >= SATURATED_SESSIONS and row.occupancy
        )
        compared = [row for row in self.rows if row.part in ("rtt", "draft", "fleet")]
        figures["vs_simulation"] = _least(row.vs_simulation for row in compared)
        figures["vs_simulation_slowed"] = _least(row.vs_simulation for row in self.of("slowed"))
        planned = (abs(ratio - 1) for row in self.rows if (ratio := row.vs_planned) is not None)
        figures["planner_error"] = max(planned, default=None)
        figures["floor"] = _least(row.speedup for row in self.of("floor"))
        recovery = self.recovery
        figures["recover_s"] = _worst(recovery.recover_s) if recovery else None
        figures["recover_up_s"] = _worst(recovery.recover_up_s) if recovery else None
        return figures


def colocated_tree_wins_ms(rows: Sequence[Row]) -> float | None:
    """Measured round trip from which on the co-located tree is faster; None: at none of them."""
    return crossing(
        sorted((row.rtt_ms, row.tokens_per_s / row.expected.colocated_tree) for row in rows), 1.0
    )


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def _worst(values: Sequence[float | None]) -> float | None:
    """The longest; None if one of them never came, or there is none."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None
