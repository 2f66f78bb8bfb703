"""Draws a session's timeline."""

from __future__ import annotations

from pathlib import Path

from outrider.errors import InvalidRequest
from outrider.timeline import Timeline

_COLOURS = {
    "verify step": "C0",
    "draft step": "C2",
    "draft": "C8",
    "commit": "C9",
}


def draw_trace(timeline: Timeline, path: Path, begin_s: float, end_s: float | None) -> int:
    """Draw what lies within a window as PNG, SVG or PDF, by the path's suffix.

    Returns how many bars were drawn. Raises `InvalidRequest` if there is nothing to draw, or
    matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InvalidRequest(
            "plot", "needs matplotlib, which is not installed; try: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    last_s = max((span.start_s + span.duration_s for span in timeline.spans), default=0.0)
    end_s = last_s if end_s is None else end_s
    shown = [s for s in timeline.spans if s.start_s < end_s and s.start_s + s.duration_s > begin_s]
    if not shown:
        raise InvalidRequest("trace", f"has nothing between {begin_s:g} and {end_s:g} seconds")
    lanes = sorted({span.lane for span in shown}, key=lambda lane: (lane == "network", lane))
    figure, axes = pyplot.subplots(figsize=(12, 1.2 + 0.7 * len(lanes)))
    for row, lane in enumerate(lanes):
        for span in (span for span in shown if span.lane == lane):
            axes.broken_barh(
                [(1e3 * span.start_s, 1e3 * span.duration_s)],
                (row - 0.35, 0.7),
                facecolors=_COLOURS.get(span.name, "C7"),
                alpha=0.5 if lane == "network" else 0.9,
            )
    for mark in timeline.marks:
        if begin_s <= mark.at_s <= end_s and not mark.name.startswith("hit"):
            axes.axvline(1e3 * mark.at_s, color="C3" if mark.name == "miss" else "k", lw=0.6)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlim(1e3 * begin_s, 1e3 * end_s)
    axes.set_xlabel("milliseconds since the request; red lines are misses")
    names = [name for name in _COLOURS if any(span.name == name for span in shown)]
    handles = [Patch(color=_COLOURS[name]) for name in names]
    axes.legend(handles, names, loc="upper right", ncols=len(names), fontsize="small")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InvalidRequest("output", f"cannot write {path}: {error}") from error
    finally:
        pyplot.close(figure)
    return len(shown)
