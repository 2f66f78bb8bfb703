"""`outrider bench page`: writes docs/benchmarks.md and README's table from what benchmarks left.

Every section says on what machine, when and by which command it was measured. Real and synthetic
figures stand in sections of their own, and synthetic ones say so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bench.load_results import LoadResults, read_load
from bench.load_results import markdown as load_markdown
from bench.machine import Origin
from bench.spec.report import markdown as spec_markdown
from bench.spec.report import speed_table
from bench.spec.results import Results, read_results
from outrider.errors import ConfigError

RESULTS = Path("bench/results")
BEGIN, END = "<!-- spec-bench: written by `make bench-page` -->", "<!-- /spec-bench -->"
_HEAD = """\
# Benchmarks

Written by `make bench-page` from what the programs left in `bench/results`, never by hand;
[bench/README.md](../bench/README.md) says what each program does. Compare ratios: both sides of one
were measured in turn, in one run.
"""


def _origin(origin: Origin, setting: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    lines = [
        f"- measured {origin.time}: `{origin.command}`",
        f"- {origin.processor}, {origin.cores} cores; {origin.platform}; {versions}",
        "- " + ", ".join(f"{name}: {value}" for name, value in setting.items() if _says(name)),
    ]
    return "\n".join(lines) + "\n"


def _says(name: str) -> bool:
    # The others are above, or in the file for programs to compare.
    return name not in ("processor", "outrider", "cores", "questions")


def spec_section(results: Results, plot: Path | None) -> str:
    """Spec-Bench, with all tables."""
    parts = [
        "### Spec-Bench\n",
        "Multi-turn questions of six sub-tasks through the public API, batch 1, prefill included;"
        " definitions are those of Spec-Bench, except that the ids of both sides are counted."
        " `target-only` is the same fleet, asked not to speculate. `outrider` has all drafters,"
        " `outrider-NAME` one of them. Peers run the same weights on the same cores and get the"
        " same prompts as ids.\n",
        _origin(results.origin, results.setting),
    ]
    parts += [f"- {name}: {_settings(says)}" for name, says in results.peers.items()]
    if results.peers:
        parts.append("")
    parts.append(spec_markdown(results))
    if plot is not None:
        parts.append(f"![Speed-up by sub-task, and acceptance by depth]({plot.name})\n")
    return "\n".join(parts)


def load_section(results: LoadResults, plot: Path | None) -> str:
    """The load curve."""
    parts = ["### Load\n", _origin(results.origin, results.setting), load_markdown(results)]
    if plot is not None:
        parts.append(f"![Throughput, goodput and first token over the rate]({plot.name})\n")
    return "\n".join(parts)


def readme_table(results: Results) -> str:
    """README's table: greedy speed-ups, without intervals."""
    rows = [s for s in results.summaries if s.temperature == 0]
    setting = results.setting
    identity = results.identity
    lines = [
        f"`{results.origin.command}`, {setting.get('model')} in {setting.get('dtype')},"
        f" {results.questions} questions, {setting.get('tokens_max')} tokens at most, greedy, batch"
        f" 1, on {results.origin.cores} cores; speed-up over target-only:\n",
        speed_table(rows, intervals=False),
    ]
    if identity is not None:
        lines.append(
            f"In float32 {identity.identical} of {identity.questions} questions were answered with"
            " the very ids of target-only decoding."
        )
    lines.append("[docs/benchmarks.md](docs/benchmarks.md) has intervals, tau and more.\n")
    return "\n".join(lines)


def between_markers(text: str, table: str) -> str:
    """Put a table between the markers. Raises `ConfigError` if they are not there."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"README has no lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{table}{END}{tail}"


@click.command("page")
@click.option(
    "--results-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    show_default=True,
    help="Where `outrider bench` has written its results.",
)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs"),
    show_default=True,
    help="Folder of the page and its plots.",
)
@click.option(
    "--readme",
    type=click.Path(path_type=Path, dir_okay=False),
    default="README.md",
    show_default=True,
    help="File whose table, between two comments, is written anew.",
)
def command(results_dir: Path, docs: Path, readme: Path) -> None:
    """Write docs/benchmarks.md and README's table from the results that lie there."""
    sections = [_HEAD, "## Real models\n"]
    spec = results_dir / "spec_bench.json"
    if spec.exists():
        results = read_results(spec)
        sections.append(spec_section(results, _plot(spec, docs / "spec-bench.png")))
        if any(summary.temperature == 0 for summary in results.summaries):
            readme.write_text(between_markers(readme.read_text(), readme_table(results)))
            click.echo(readme)
    load = results_dir / "load.json"
    if load.exists():
        sections.append(load_section(read_load(load), _plot(load, docs / "load.png")))
    sections += _tables(results_dir, "verifier", "The verifier beside its peers")
    drafting = _tables(results_dir, "drafting", "Proposers, coupling, claims", "drafters")
    if drafting:
        sections += ["## Drafters\n", _DRAFTERS, *drafting]
    synthetic = _tables(results_dir, "pipeline", "Pipelining over links with stated round trips")
    if synthetic:
        sections += ["## Synthetic models\n", _SYNTHETIC, *synthetic]
    path = docs / "benchmarks.md"
    path.write_text("\n".join(sections).rstrip() + "\n")
    click.echo(path)


_DRAFTERS = """\
Without a fleet: trees are waited for, so that tau is the method's own. Models are real but where a
table names others.
"""

_SYNTHETIC = """\
Services, sockets and links are real here, models are not: they sleep as long as stated and agree as
often as stated.
"""


def _tables(folder: Path, name: str, title: str, target: str = "") -> list[str]:
    """A section of tables that another benchmark wrote, if it is there.

    `target`: of make, if it is not named like the file.
    """
    path = folder / f"{name}.md"
    if not path.exists():
        return []
    origin = _when_and_where(folder / f"{name}.json", f"`make bench-{target or name}`")
    return [f"### {title}\n", f"- {origin}\n", path.read_text()]


def _when_and_where(path: Path, command: str) -> str:
    """What a benchmark's own file says of its origin, which may be little."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return command
    machine = record.get("machine") or {}
    says = [f"{name} {value}" for name, value in machine.items()]
    when = record.get("time")
    return ", ".join([command, *([f"measured {when}"] if when else []), *says])


def _plot(results: Path, target: Path) -> Path | None:
    source = results.with_suffix(".png")
    if not source.exists():
        return target if target.exists() else None
    shutil.copyfile(source, target)
    return target


def _settings(says: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in says.items() if value is not None)


if __name__ == "__main__":
    command()
