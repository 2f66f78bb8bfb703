"""How much of the network and of drafting the target can feel, over real services and sockets.

    python -m bench.pipeline            # or: make bench-pipeline

Models are synthetic, except in the part `real`: they sleep as long as stated and agree as often as
stated, so that the fleet is real in everything but its arithmetic. Round trips are made by a proxy
on every link and reported as measured. Contenders run in turn, each repeat with prompts of its
own. Beside them stand an event simulation of the protocol without overheads and the formulas of
other ways to speculate, fed with the measured round trip.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

import outrider
from bench.pipeline_parts import PARTS, QUICK, Bench, Effort
from bench.pipeline_real import measure_real
from bench.pipeline_results import Results, markdown, result_lines
from bench.speculation import load_prompts
from outrider.config import DEFAULT_CACHE

RESULTS = Path(__file__).with_name("results")


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Some of them.")
@click.option("--repeats", type=click.IntRange(1, 20), default=Effort.repeats, show_default=True)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(1, 120),
    default=Effort.window_s,
    show_default=True,
    help="Seconds of each measurement.",
)
@click.option("--quick", is_flag=True, help="Little of everything, to see that it runs.")
@click.option("--results-dir", type=click.Path(path_type=Path, file_okay=False), default=RESULTS)
@click.option("--model", default="smollm2", show_default=True, help="Target of the part `real`.")
@click.option("--draft-model", help="Draft model of the part `real`.  [default: lookup only]")
@click.option("--cache-dir", type=click.Path(path_type=Path), default=DEFAULT_CACHE)
def main(
    parts: str,
    repeats: int,
    window_s: float,
    quick: bool,
    results_dir: Path,
    model: str,
    draft_model: str | None,
    cache_dir: Path,
) -> None:
    """Measure pipelining against target-only, simulation and formulas."""
    chosen = [part.strip() for part in parts.split(",")]
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise click.BadParameter(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    effort = QUICK if quick else Effort(repeats=repeats, window_s=window_s)
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("starting", total=len(chosen))
        bench = Bench(
            effort,
            advance=lambda text: progress.update(task, description=text),
            report=lambda text: progress.console.print(text, soft_wrap=True),
        )
        for part in PARTS:
            if part not in chosen:
                continue
            if part == "real":
                progress.update(task, description="real models")
                prompts = load_prompts()[: 3 if quick else None]
                bench.results.real = measure_real(
                    console, model, draft_model, cache_dir, prompts, effort.repeats
                )
            else:
                getattr(bench, part)()
            progress.advance(task)
    _report(console, bench.results, effort, results_dir)


def _report(console: Console, results: Results, effort: Effort, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pipeline.json"
    record: dict[str, Any] = {
        "benchmark": "pipeline",
        "outrider": outrider.__version__,
        "synthetic": True,
        "effort": dataclasses.asdict(effort),
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **results.record(),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    # Fourteen columns: drawn for eighty characters, nobody could read them.
    lines = Console(width=1_000, highlight=False)
    lines.print(text, markup=False)
    _draw(console, results, folder)
    for line in result_lines(results):
        lines.print(line)


def _draw(console: Console, results: Results, folder: Path) -> None:
    try:
        # Imported late: it is for developers, and takes a second.
        from bench.pipeline_plots import draw
    except ModuleNotFoundError as error:
        console.print(f"no plots: {error.name} is not installed; it is in outrider\\[dev]")
        return
    for path in draw(results, folder):
        console.print(f"plot: {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
