"""From answers to files: figures, tables and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.spec.answers import Answer
from bench.spec.contenders import BASELINE
from bench.spec.fleet import OURS
from bench.spec.report import markdown, result_line
from bench.spec.results import Results, write_results
from bench.spec.statistics import Summary, by_round, summarize


def summaries_of(answers: Sequence[Answer]) -> tuple[Summary, ...]:
    """Summarize all contenders at all temperatures: ours first, the baseline last."""
    names = [OURS, *sorted({answer.contender for answer in answers} - {OURS, BASELINE}), BASELINE]
    found = [
        summarize(by_round(answers, temperature), name, BASELINE, temperature)
        for temperature in sorted({answer.temperature for answer in answers})
        for name in names
    ]
    return tuple(summary for summary in found if summary is not None)


def publish(results: Results, path: Path, console: Console) -> None:
    """Write JSON at `path`, tables and a plot beside it; tables and result line to the terminal."""
    write_results(results, path)
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    plain = Console(width=1_000, highlight=False)
    plain.print(text, markup=False)
    if results.summaries:
        _draw(results, path.with_suffix(".png"), console)
    plain.print(result_line(results), markup=False)


def _draw(results: Results, path: Path, console: Console) -> None:
    try:
        # Late: it is for developers, and takes a second.
        from bench.spec.plots import draw
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is not installed; it is in outrider\\[dev]")
        return
    console.print(f"plot: {draw(results, path)}", soft_wrap=True)
