"""Pictures of what the benchmark of drafters measured."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.drafting_results import TARGET_ONLY, Calibrated, Line, Results, lines


def draw(results: Results, folder: Path) -> list[Path]:
    """Write what there are figures for as PNG and return the paths."""
    paths = []
    if results.runs:
        paths.append(_taus(lines(results.runs), folder / "drafting_tau.png"))
    if results.calibrated:
        paths.append(_claims(results.calibrated, folder / "drafting_claims.png"))
    return paths


def _taus(found: list[Line], path: Path) -> Path:
    temperatures = sorted({line.temperature for line in found})
    contenders = list(dict.fromkeys(x.contender for x in found if x.contender != TARGET_ONLY))
    figure, rows = pyplot.subplots(
        len(temperatures), 1, figsize=(9, 3.2 * len(temperatures)), squeeze=False
    )
    for axes, temperature in zip(rows[:, 0], temperatures, strict=True):
        here = [line for line in found if line.temperature == temperature]
        categories = list(dict.fromkeys(line.category for line in here))
        for at, contender in enumerate(contenders):
            taus = {line.category: line.tau for line in here if line.contender == contender}
            places = [n + (at + 0.5) / len(contenders) * 0.8 for n in range(len(categories))]
            heights = [taus.get(category, 0.0) for category in categories]
            axes.bar(places, heights, 0.8 / len(contenders), label=contender)
        axes.axhline(1.0, color="grey", lw=0.8)
        axes.set(ylabel="tau", title=f"tokens a verify step, temperature {temperature:g}")
        axes.set_xticks([n + 0.4 for n in range(len(categories))], categories, rotation=20)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _claims(found: list[Calibrated], path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(5.5, 5))
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
    for one in (one for one in found if one.learnt):
        points = [(d.claimed, d.observed) for d in one.deciles if d.count >= 50]
        label = f"{one.proposer}, temperature {one.temperature:g}"
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=label)
    axes.set(xlabel="claimed", ylabel="observed", title="acceptance of guesses, by tenth")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
