"""How much of the network and of drafting the target can feel, over real services and sockets.

    python -m bench.pipeline                            # or: make bench-pipeline
    python -m bench.pipeline --parts rtt,floor          # measure these anew, keep the others
    python -m bench.pipeline --resume                   # go on where a run was broken off

Models are synthetic, except in the part `real`: they sleep as long as stated and agree as often as
stated, so that the fleet is real in everything but its arithmetic. Round trips are made by a proxy
on every link and reported as measured. Contenders run in turn, each repeat with prompts of its
own. Beside them stand an event simulation of the protocol without overheads, the planner's
prediction and the formulas of other ways to speculate, fed with the measured round trip.

Results are written as they come, each part with its time and machine. A part that fails says why,
and the others go on.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from bench.pipeline_effort import PARTS, QUICK, Countdown, Effort, seconds_of
from bench.pipeline_parts import Bench, Models
from bench.pipeline_report import markdown, result_lines
from bench.pipeline_results import Results
from bench.pipeline_store import Store, begun, measured_alike
from outrider.config import DEFAULT_CACHE
from outrider.errors import ConfigError

RESULTS = Path(__file__).with_name("results")


def _parts_help() -> str:
    lines = [
        f"{name:13} {seconds_of(name, Effort()) / 60:4.1f} min  {text}"
        for name, text in PARTS.items()
    ]
    total_s = sum(seconds_of(name, Effort()) for name in PARTS)
    return "\b\nParts:\n" + "\n".join(lines) + f"\n{'together':13} {total_s / 60:4.0f} min"


@click.command(epilog=_parts_help())
@click.option("--parts", default=",".join(PARTS), help="Some of them; the others' results stay.")
@click.option("--resume", is_flag=True, help="Leave out parts that are there, measured alike.")
@click.option("--repeats", type=click.IntRange(1, 20), default=Effort.repeats, show_default=True)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(1, 120),
    default=Effort.window_s,
    show_default=True,
    help="Seconds of each speculated run.",
)
@click.option("--quick", is_flag=True, help="Little of everything, to see that it runs.")
@click.option("--results-dir", type=click.Path(path_type=Path, file_okay=False), default=RESULTS)
@click.option("--model", default="smollm2", show_default=True, help="Target of the part `real`.")
@click.option("--draft-model", help="Draft model of the part `real`.  [default: lookup only]")
@click.option("--cache-dir", type=click.Path(path_type=Path), default=DEFAULT_CACHE)
def main(
    parts: str,
    resume: bool,
    repeats: int,
    window_s: float,
    quick: bool,
    results_dir: Path,
    model: str,
    draft_model: str | None,
    cache_dir: Path,
) -> None:
    """Measure pipelining against target-only, simulation, planner and formulas."""
    chosen = [part.strip() for part in parts.split(",")]
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise click.BadParameter(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    effort = QUICK if quick else Effort(repeats=repeats, window_s=window_s)
    store = Store(results_dir)
    everything = set(chosen) == set(PARTS)
    try:
        # A whole run begins with nothing, so that what it says is of one run.
        results = Results() if everything and not resume else store.read()
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    if resume:
        chosen = [part for part in chosen if not measured_alike(results.origins.get(part), effort)]
    console = Console()
    todo = [part for part in PARTS if part in chosen]
    try:
        _run(todo, effort, results, store, Models(model, draft_model, cache_dir), console)
    except KeyboardInterrupt:
        console.print("interrupted; go on with --resume")
    _report(console, results, results_dir)
    if any(not origin.whole or origin.errors for origin in results.origins.values()):
        sys.exit(1)


def _run(
    parts: list[str],
    effort: Effort,
    results: Results,
    store: Store,
    models: Models,
    console: Console,
) -> None:
    countdown = Countdown(parts, effort, time.monotonic())

    def report(text: str) -> None:
        says = countdown.says(time.monotonic())
        console.print(f"[{says}] {text}", soft_wrap=True, markup=False, highlight=False)
        store.write(results)

    for part in parts:
        begin_s = time.monotonic()
        countdown.begins(part, begin_s)
        results.forget(part)
        results.origins[part] = begun(effort)
        report(f"{part}: {PARTS[part]}")
        bench = Bench(part, effort, models, results, report, console)
        bench.run()
        results.origins[part] = replace(
            results.origins[part],
            seconds=time.monotonic() - begin_s,
            errors=tuple(bench.errors),
            whole=True,
        )
        store.write(results)


def _report(console: Console, results: Results, folder: Path) -> None:
    text = markdown(results)
    (folder / "pipeline.md").write_text(text)
    # Sixteen columns: drawn for eighty characters, nobody could read them.
    lines = Console(width=1_000, highlight=False)
    lines.print(text, markup=False)
    _draw(console, results, folder)
    for line in result_lines(results):
        lines.print(line, markup=False)


def _draw(console: Console, results: Results, folder: Path) -> None:
    try:
        # Imported late: it is for developers, and takes a second.
        from bench.pipeline_plots import draw
    except ModuleNotFoundError as error:
        console.print(f"no plots: {error.name} is not installed; it is in outrider\\[dev]")
        return
    try:
        for path in draw(results, folder):
            console.print(f"plot: {path}", soft_wrap=True)
    except Exception as error:
        # The figures are worth more than their pictures, and are still to be printed.
        console.print(f"no plots: {type(error).__name__}: {error}", markup=False)


if __name__ == "__main__":
    main()
