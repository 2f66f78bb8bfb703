"""What the pipelining benchmark measured, and what it says of it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.pipeline_setting import Expected, Setting
from bench.speculation import Case
from bench.speculation import markdown as prompts_markdown
from bench.timelines import Spread, crossing

ROUND_TRIPS_MS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
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
    speculated: tuple[float, ...]
    expected: Expected
    again: tuple[float, ...] = ()
    """Target-only once more: how far its ratio is from 1 is noise."""
    occupancy: tuple[float, ...] = ()
    """Share of the time that verifiers were in steps while speculated."""
    tau: tuple[float, ...] = ()

    @property
    def speedup(self) -> float:
        """Speculated over target-only, median of the repeats."""
        return _ratio(self.speculated, self.target_only)

    @property
    def noise(self) -> float | None:
        """Target-only over itself."""
        return _ratio(self.again, self.target_only) if self.again else None

    @property
    def tokens_per_s(self) -> float:
        """Speculated, median."""
        return statistics.median(self.speculated)

    @property
    def vs_simulation(self) -> float:
        """Measured tokens a second over simulated ones."""
        return self.tokens_per_s / self.expected.simulation

    def record(self) -> dict[str, Any]:
        """For JSON, with the planner's keys."""
        return {
            "name": self.name,
            "part": self.part,
            **self.setting.row(),
            "silent": self.setting.silent,
            "rtt_nominal_ms": self.rtt_nominal_ms,
            "rtt_ms": self.rtt_ms,
            "tokens_per_s": self.tokens_per_s,
            "target_only_tokens_per_s": statistics.median(self.target_only),
            "speedup": self.speedup,
            "noise": self.noise,
            "occupancy": statistics.median(self.occupancy) if self.occupancy else None,
            "vs_simulation": self.vs_simulation,
            "expected": asdict(self.expected),
            "repeats": {
                name: getattr(self, name)
                for name in ("target_only", "again", "speculated", "occupancy", "tau")
            },
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


@dataclass(frozen=True, slots=True)
class Disturbance:
    """How a fleet fares with drafters that are slow or late."""

    name: str
    tokens_per_s: tuple[float, ...]
    gaps: Spread
    """From the end of one verify step to the begin of the next."""


@dataclass(slots=True)
class Results:
    """What was measured; a part that was not asked for stays empty."""

    rows: list[Row] = field(default_factory=list)
    recovery: Recovery | None = None
    disturbances: list[Disturbance] = field(default_factory=list)
    real: list[Case] = field(default_factory=list)
    """Prompts answered by real models."""

    def of(self, part: str) -> list[Row]:
        """Rows of one part."""
        return [row for row in self.rows if row.part == part]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": [row.record() for row in self.rows],
            "recovery": asdict(self.recovery) if self.recovery else None,
            "disturbances": [asdict(one) for one in self.disturbances],
            "real": [asdict(case) for case in self.real],
            "colocated_tree_wins_from_ms": colocated_tree_wins_ms(self.of("rtt")),
        }


def colocated_tree_wins_ms(rows: Sequence[Row]) -> float | None:
    """Measured round trip from which on the co-located tree is faster; None: at none of them."""
    return crossing(
        sorted((row.rtt_ms, row.tokens_per_s / row.expected.colocated_tree) for row in rows), 1.0
    )


def result_lines(results: Results) -> list[str]:
    """Lines for scripts; the last one has the figures with goals."""
    lines = []
    if results.real:
        ratios = [case.speedup for case in results.real]
        identical = sum(case.identical for case in results.real)
        lines.append(
            f"result: pipeline_real overall={statistics.geometric_mean(ratios):.2f}"
            f" min={min(ratios):.2f} max={max(ratios):.2f} identical={identical}/{len(ratios)}"
        )
    for one in results.disturbances:
        lines.append(
            f"result: pipeline_drafters {one.name.replace(' ', '_')}"
            f" tokens_per_s={statistics.median(one.tokens_per_s):.1f}"
            f" gap_p50_ms={one.gaps.p50_ms:.2f} gap_p99_ms={one.gaps.p99_ms:.2f}"
            f" gap_max_ms={one.gaps.max_ms:.2f}"
        )
    by_rtt = {row.rtt_nominal_ms: row.speedup for row in results.of("rtt")}
    figures: dict[str, float | None] = {f"rtt{ms:g}": by_rtt.get(ms) for ms in REPORTED_MS}
    figures["worst_vs_target"] = _least(row.speedup for row in results.rows)
    figures["occupancy"] = _least(
        statistics.median(row.occupancy)
        for row in results.of("fleet")
        if row.setting.sessions >= SATURATED_SESSIONS
    )
    figures["vs_simulation"] = _least(
        row.vs_simulation for row in results.rows if row.part in ("rtt", "draft", "fleet")
    )
    figures["floor"] = _least(row.speedup for row in results.of("floor"))
    recovery = results.recovery
    figures["recover_s"] = _worst(recovery.recover_s) if recovery else None
    figures["recover_up_s"] = _worst(recovery.recover_up_s) if recovery else None
    words = (f"{key}={'na' if value is None else f'{value:.2f}'}" for key, value in figures.items())
    return [*lines, "result: pipeline " + " ".join(words)]


_HEADER = (
    "scenario (synthetic)",
    "RTT ms",
    "target",
    "Outrider",
    "speed-up",
    "simulated",
    "of it",
    "chain",
    "tree",
    "lockstep",
    "pull",
    "push",
    "busy",
    "A/A",
)


def markdown(results: Results) -> str:
    """Tables of everything; speed-ups over target-only."""
    parts = [_table(_HEADER, map(_cells, results.rows))] if results.rows else []
    if results.of("rtt"):
        wins = colocated_tree_wins_ms(results.of("rtt"))
        where = "at none of these" if wins is None else f"from {wins:.1f} ms on"
        parts.append(f"The co-located tree is faster {where}.\n")
    if results.recovery is not None:
        recovery = results.recovery
        header = ("acceptance (synthetic)", "back after s")
        names = [f"dropped, {n}" for n in ("once", "again")] + [
            f"raised, {n}" for n in ("once", "again")
        ]
        values = [*recovery.recover_s, *recovery.recover_up_s]
        cells = [
            (name, "never" if value is None else f"{value:.2f}")
            for name, value in zip(names, values, strict=False)
        ]
        parts.append(_table(header, cells))
    if results.disturbances:
        gaps = ("gap p50", "p90", "p99", "max ms", "steps")
        columns = ("drafters (synthetic)", "tokens/s", *gaps)
        parts.append(_table(columns, map(_disturbance_cells, results.disturbances)))
    if results.real:
        parts.append(prompts_markdown(results.real))
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    target = row.expected.target_only
    expected = row.expected
    modes = (
        expected.colocated_chain,
        expected.colocated_tree,
        expected.lockstep,
        expected.pull,
        expected.push,
    )
    return (
        row.name,
        f"{row.rtt_ms:.2f}",
        f"{statistics.median(row.target_only):.1f}",
        f"{row.tokens_per_s:.1f}",
        f"{row.speedup:.2f}",
        f"{expected.simulation / target:.2f}",
        f"{row.vs_simulation:.2f}",
        *(f"{mode / target:.2f}" for mode in modes),
        f"{statistics.median(row.occupancy):.2f}" if row.occupancy else "-",
        "-" if row.noise is None else f"{row.noise:.3f}",
    )


def _disturbance_cells(one: Disturbance) -> tuple[str, ...]:
    gaps = one.gaps
    times = (f"{ms:.2f}" for ms in (gaps.p50_ms, gaps.p90_ms, gaps.p99_ms, gaps.max_ms))
    return (one.name, f"{statistics.median(one.tokens_per_s):.1f}", *times, str(gaps.count))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def _worst(values: Sequence[float | None]) -> float | None:
    """The longest; None if one of them never came, or there is none."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None
