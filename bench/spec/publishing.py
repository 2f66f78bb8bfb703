"""From answers to files: figures, tables and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from bench.spec.answers import Answer
from bench.spec.contenders import BASELINE
from bench.spec.fleet import OURS
from bench.spec.report import markdown, result_line
from bench.spec.results import Results, write_results
from bench.spec.statistics import OVERALL, Summary, by_round, summarize


def summaries_of(answers: Sequence[Answer]) -> tuple[Summary, ...]:
    """Summarize all contenders at all temperatures: ours first, the baseline last."""
    names = [OURS, *sorted({answer.contender for answer in answers} - {OURS, BASELINE}), BASELINE]
    found = [
        summarize(by_round(answers, temperature), name, BASELINE, temperature)
        for temperature in sorted({answer.temperature for answer in answers})
        for name in names
    ]
    return tuple(summary for summary in found if summary is not None)


def ours_over(answers: Sequence[Answer]) -> dict[str, float]:
    """Compare ours with each other contender, greedy, over the rounds that have both."""
    rounds = by_round(answers, 0.0)
    found = {
        name: summarize(rounds, OURS, name, 0.0)
        for name in {answer.contender for answer in answers} - {OURS}
    }
    return {
        name: summary.speedups[OVERALL].value
        for name, summary in sorted(found.items())
        if summary is not None
    }


def publish(results: Results, path: Path, console: Console, *, as_json: bool = False) -> None:
    """Write JSON at `path`, tables and a plot beside it.

    Tables and result line go to standard output, or with `as_json` the JSON instead.
    """
    write_results(results, path)
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    if results.summaries:
        _draw(results, path.with_suffix(".png"), console)
    if as_json:
        click.echo(path.read_text(), nl=False)
        return
    plain = Console(width=1_000, highlight=False)
    plain.print(text, markup=False)
    plain.print(result_line(results), markup=False)


def _draw(results: Results, path: Path, console: Console) -> None:
    try:
        # Late: it is for developers, and takes a second.
        from bench.spec.plots import draw
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is not installed; it is in outrider\\[dev]")
        return
    console.print(f"plot: {draw(results, path)}", soft_wrap=True)
