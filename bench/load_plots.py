"""Picture of a fleet under load."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.load_results import SIDES, LoadResults


def draw(results: LoadResults, path: Path) -> Path:
    """Draw throughput, goodput and time to the first token over the rate; PNG, SVG or PDF."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.2))
    rates = results.rates
    for number, side in enumerate(SIDES):
        style, color = ("o-", "s--")[number == 0], f"C{3 if number else 0}"
        speeds = [results.tokens_per_s(side, rate) for rate in rates]
        left.plot(rates, speeds, style, color=color, label=side)
        good = [results.goodput(side, rate) for rate in rates]
        middle.plot(rates, good, style, color=color, label=side)
        for share in (0.5, 0.95):
            waits = [results.percentile(side, rate, "first_token_s", share) for rate in rates]
            line = style if share == 0.5 else ":"
            right.plot(rates, waits, line, color=color, label=f"{side}, p{100 * share:.0f}")
    left.set(xlabel="requests/s", ylabel="output tokens/s", title="throughput")
    middle.set(xlabel="requests/s", ylabel="good requests/s", title="goodput")
    right.set(xlabel="requests/s", ylabel="seconds", title="first token", yscale="log")
    for axes in (left, middle, right):
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{results.setting.get('model')} {results.setting.get('dtype')}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
