"""What the pipelining benchmark says of its measurements: tables, and lines for scripts. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bench.pipeline_effort import PARTS
from bench.pipeline_prompts import markdown as prompts_markdown
from bench.pipeline_results import Disturbance, Recovery, Results, Row, colocated_tree_wins_ms
from bench.relaying import samples

_GOALS: tuple[tuple[str, str, float], ...] = (
    ("vs_simulation", "at least", 0.9),
    ("vs_simulation_slowed", "at least", 0.9),
    ("planner_error", "at most", 0.1),
    ("floor", "at least", 0.98),
    ("worst_vs_target", "at least", 0.98),
    ("occupancy", "at least", 0.95),
    ("recover_s", "at most", 2.0),
    ("recover_up_s", "at most", 2.0),
)


def result_lines(results: Results) -> list[str]:
    """Lines for scripts; the last two have the figures with goals."""
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
    figures = results.figures().items()
    words = (f"{key}={'na' if value is None else f'{value:.2f}'}" for key, value in figures)
    lines.append("result: pipeline " + " ".join(words))
    lines.append(samples.result_line(results.relay))
    return lines


def markdown(results: Results) -> str:
    """Tables of everything; speed-ups over target-only."""
    parts = [_goals(results)]
    if results.rows:
        parts.append(_table(_HEADER, map(_cells, results.rows)))
        parts.append(_LEGEND)
    if results.of("rtt"):
        wins = colocated_tree_wins_ms(results.of("rtt"))
        where = "at none of these" if wins is None else f"from {wins:.1f} ms on"
        parts.append(f"The co-located tree is faster {where}.\n")
    if results.recovery is not None:
        parts.append(_recovery(results.recovery))
    if results.disturbances:
        gaps = ("gap p50", "p90", "p99", "max ms", "steps")
        columns = ("drafters (synthetic)", "tokens/s", *gaps)
        parts.append(_table(columns, map(_disturbance_cells, results.disturbances)))
    if results.real:
        parts.append("Real models, each process on cores of its own; tokens/s.\n")
        parts.append(prompts_markdown(results.real))
    if results.relay:
        parts.append("The orchestrator alone (synthetic workers).\n")
        parts.append(_table(samples.COLUMNS, map(samples.cells, results.relay)))
    if results.origins:
        parts.append(_origins(results))
    return "\n".join(parts)


def _goals(results: Results) -> str:
    figures = results.figures()
    rows = []
    for key, sense, bound in _GOALS:
        value = figures[key]
        met = "not measured"
        if value is not None:
            met = "yes" if (value >= bound if sense == "at least" else value <= bound) else "no"
        rows.append((key, f"{sense} {bound:g}", "-" if value is None else f"{value:.3f}", met))
    return _table(("figure (the worst of each)", "goal", "measured", "met"), rows)


_HEADER = (
    "scenario (synthetic)",
    "RTT ms",
    "target",
    "A/A",
    "Outrider",
    "speed-up",
    "±",
    "simulated",
    "of it",
    "of planned",
    "chain",
    "tree",
    "lockstep",
    "pull",
    "push",
    "busy",
)

_LEGEND = (
    "Target and Outrider in tokens/s, all else but RTT as ratios. A/A: target-only over itself;"
    " ±: half the range of the repeats; simulated: this protocol without overheads;"
    " of it: the measured speed-up over that, with several sessions the measured tokens/s over the"
    " simulated ones; planned: by the planner from the measured times of steps; chain and tree:"
    " co-located; these and the modes that follow by their formulas, without overheads.\n"
)


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
        f"{row.noise:.3f}",
        f"{row.tokens_per_s:.1f}",
        f"{row.speedup:.2f}",
        f"{row.spread:.1%}",
        f"{expected.simulation / target:.2f}",
        f"{row.vs_simulation:.2f}",
        "-" if row.vs_planned is None else f"{row.vs_planned:.2f}",
        *(f"{mode / target:.2f}" for mode in modes),
        f"{statistics.median(row.occupancy):.2f}" if row.occupancy else "-",
    )


def _recovery(recovery: Recovery) -> str:
    header = ("acceptance (synthetic)", "back after s", "drafter unbound by then")
    cells = []
    for number, value in enumerate(recovery.recover_s):
        cells.append((f"dropped, {_TIMES[number]}", _seconds(value), "-"))
    for number, value in enumerate(recovery.recover_up_s):
        unbound = "-"
        if number < len(recovery.unbound):
            unbound = f"{recovery.unbound[number]} of {recovery.repeats}"
        cells.append((f"raised, {_TIMES[number]}", _seconds(value), unbound))
    return _table(header, cells)


_TIMES = ("once", "again")


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}"


def _disturbance_cells(one: Disturbance) -> tuple[str, ...]:
    gaps = one.gaps
    times = (f"{ms:.2f}" for ms in (gaps.p50_ms, gaps.p90_ms, gaps.p99_ms, gaps.max_ms))
    return (one.name, f"{statistics.median(one.tokens_per_s):.1f}", *times, str(gaps.count))


def _origins(results: Results) -> str:
    rows = []
    for part in PARTS:
        origin = results.origins.get(part)
        if origin is not None:
            wrong = "; ".join(origin.errors) or ("-" if origin.whole else "broken off")
            machine = f"{origin.machine.get('processor', '')}, {origin.machine.get('cores')} cores"
            rows.append((part, origin.time, f"{origin.seconds:.0f}", machine, wrong))
    return _table(("part", "measured", "seconds", "machine", "what went wrong"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [header, ("---",) * len(header), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
