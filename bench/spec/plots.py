"""Pictures of Spec-Bench results."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.spec.contenders import BASELINE
from bench.spec.questions import in_order
from bench.spec.results import Results
from bench.spec.statistics import DEPTHS, OVERALL, Summary

_WIDTH = 0.85


def draw(results: Results, path: Path) -> Path:
    """Draw greedy speed-ups by sub-task and acceptance by depth; PNG, SVG or PDF."""
    rows = [s for s in results.summaries if s.temperature == min(_temperatures(results))]
    shown = [row for row in rows if row.contender != BASELINE]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 4.8), gridspec_kw={"width_ratios": (3, 1)}
    )
    tasks = [*in_order({t for r in shown for t in r.speedups if t != OVERALL}), OVERALL]
    for number, row in enumerate(shown):
        width = _WIDTH / len(shown)
        for at, task in enumerate(tasks):
            speed = row.speedups.get(task)
            if speed is None:
                continue
            x = at + (number - (len(shown) - 1) / 2) * width
            label = row.contender if task == OVERALL else None
            left.bar(x, speed.value, width, color=f"C{number}", label=label)
            if speed.low is not None and speed.high is not None:
                left.plot([x, x], [speed.low, speed.high], color="black", lw=0.8)
    left.axhline(1.0, color="grey", lw=0.8)
    left.set_xticks(range(len(tasks)), tasks)
    left.set(ylabel="tokens/s over target-only", title=_title(results, rows))
    left.legend(fontsize=8)
    for number, row in enumerate(shown):
        if row.by_depth[0] > 0:
            right.plot(range(1, DEPTHS + 1), row.by_depth, "o-", ms=3, color=f"C{number}")
    right.set(xlabel="guesses accepted, at least", ylabel="share of steps", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _temperatures(results: Results) -> set[float]:
    return {summary.temperature for summary in results.summaries}


def _title(results: Results, rows: list[Summary]) -> str:
    setting = results.setting
    kind = "greedy" if rows[0].temperature == 0 else f"temperature {rows[0].temperature:g}"
    return (
        f"{setting.get('model')} {setting.get('dtype')}, {kind}, {rows[0].questions} questions,"
        f" {setting.get('tokens_max')} tokens, batch 1"
    )
