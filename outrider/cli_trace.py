"""`outrider trace`: what a session's timeline says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.table import Table

from outrider.cli_top import table_console
from outrider.timeline import Summary, read_trace, summarize

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def trace() -> None:
    """Look at timelines that `outrider generate --trace FILE` has written.

    \b
    Record one:    outrider generate "1, 2, 3," --trace t.json
    What it says:  outrider trace show t.json
    See it all:    outrider trace plot t.json     (or open it in ui.perfetto.dev)
    """


@trace.command()
@click.argument("file", type=_FILE)
@click.option(
    "--output",
    "-o",
    type=_FILE,
    help="PNG, SVG or PDF.  [default: FILE with .png]",
)
@click.option(
    "--begin",
    "begin_s",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Leave out what was before, in seconds from the session's beginning.",
)
@click.option(
    "--end",
    "end_s",
    type=click.FloatRange(min=0),
    help="Leave out what came later, likewise.  [default: all]",
)
def plot(file: Path, output: Path | None, begin_s: float, end_s: float | None) -> None:
    """Draw the timeline in FILE: draft steps, flights, verify steps, waits, hits and misses.

    A lane for each worker and one for the network. Where drafting runs ahead, draft steps lie
    beneath the verify step that they outrun; where it does not, verify steps have gaps or misses.
    Needs matplotlib.

    \b
    The first half second, as a vector graphic:
        outrider trace plot t.json --end 0.5 -o t.svg
    """
    from outrider.trace_plot import draw_trace  # Late: it takes a second.

    output = output or file.with_suffix(".png")
    bars = draw_trace(read_trace(file), output, begin_s, end_s)
    click.echo(f"{output}: {bars} bars")


@trace.command()
@click.argument("file", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def show(file: Path, as_json: bool) -> None:
    """Say in figures what the timeline in FILE holds.

    \b
    hits     verify steps in which guesses were right; misses: those without
    busy     share of the time, from request to end, in which a worker computed for the session
    median   of the durations of a worker's steps, or of messages on their way

    \b
    How much of the time did the verifier compute?
        outrider trace show t.json --json | jq '.lanes[] | select(.what == "verify step").busy'
    """
    found = summarize(read_trace(file))
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    click.echo(_sentence(found))
    table = Table("lane", "what", "times", "median", "busy", box=None)
    for lane in found.lanes:
        busy = "-" if lane.busy is None else f"{lane.busy:.0%}"
        table.add_row(lane.name, lane.what, str(lane.count), f"{1e3 * lane.median_s:.2f} ms", busy)
    table_console().print(table)


def _sentence(found: Summary) -> str:
    decided = "".join(f", {what} {count}" for what, count in found.decisions.items())
    return (
        f"{found.length_s:.3f} s: hits {found.hits} ({found.guessed} tokens), "
        f"misses {found.misses}{decided}"
    )
