"""Pictures of what the pipelining benchmark measured."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.pipeline_results import Recovery, Results, Row

_LABEL = "synthetic models"


def draw(results: Results, folder: Path) -> list[Path]:
    """Write what there are figures for as PNG and return the paths."""
    paths = []
    if results.of("rtt"):
        paths.append(_round_trips(results.of("rtt"), folder / "pipeline_rtt.png"))
    if results.of("fleet"):
        paths.append(_goodput(results.of("fleet"), folder / "pipeline_fleet.png"))
    if results.recovery is not None:
        paths.append(_recovery(results.recovery, folder / "pipeline_recovery.png"))
    return paths


def _round_trips(rows: list[Row], path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = sorted(rows, key=lambda row: row.rtt_ms)
    x = [row.rtt_ms for row in rows]
    axes.plot(x, [row.speedup for row in rows], "o-", color="C3", lw=2, label="Outrider, measured")
    modes = {
        "simulation": "simulation of this protocol",
        "colocated_tree": "co-located tree",
        "colocated_chain": "co-located chain",
        "lockstep": "lockstep",
        "pull": "pull",
        "push": "push",
    }
    for number, (name, label) in enumerate(modes.items()):
        y = [getattr(row.expected, name) / row.expected.target_only for row in rows]
        # C3 is ours.
        color = f"C{number + (number > 2)}"
        axes.plot(x, y, "--" if number else ":", color=color, label=label)
    axes.axhline(1.0, color="grey", lw=0.8)
    axes.set(xscale="log", xlabel="round trip, measured (ms)", ylabel="tokens/s over target-only")
    return _finish(figure, axes, path, f"One session over round trips ({_LABEL})")


def _goodput(rows: list[Row], path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = sorted(rows, key=lambda row: row.setting.sessions)
    x = [row.setting.sessions for row in rows]
    axes.plot(x, [row.tokens_per_s for row in rows], "o-", color="C3", label="Outrider, measured")
    axes.plot(x, [row.expected.simulation for row in rows], ":", label="simulation")
    axes.plot(x, [statistics.median(row.target_only) for row in rows], "s--", label="target only")
    axes.set(xscale="log", yscale="log", xlabel="sessions", ylabel="committed tokens/s")
    axes.set_xticks(x, [str(sessions) for sessions in x])
    first = rows[0].setting
    fleet = f"{first.verifiers} verifiers, {first.drafters} drafters"
    return _finish(figure, axes, path, f"Goodput of {fleet} ({_LABEL})")


def _recovery(recovery: Recovery, path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.plot(*zip(*recovery.curve, strict=True), color="C3", label="Outrider, measured")
    axes.axhline(recovery.full, ls=":", color="C0", label="before")
    axes.axhline(recovery.target_only, ls="--", color="C1", label="target only")
    for number, at_s in enumerate(recovery.changes_s):
        label = None if number else "acceptance dropped, raised, ..."
        axes.axvline(at_s, color="grey", lw=0.8, label=label)
    axes.set(xlabel="seconds", ylabel="tokens/s, sliding windows", ylim=(0, None))
    return _finish(figure, axes, path, f"Acceptance changes while a session runs ({_LABEL})")


def _finish(figure: Figure, axes: Axes, path: Path, title: str) -> Path:
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
