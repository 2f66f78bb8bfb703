"""What drafters are worth: tokens a step, calibration, coupling, drafting ahead, many sessions.

    python -m bench.drafting --drafter models/NAME    # or: make bench-drafters
    python -m bench.drafting --parts coupling,ahead   # measure these anew, keep the others
    python -m bench.drafting --parts tau --categories rag,writing   # likewise

Contenders decode each prompt in turn, beside the target alone, greedy and at temperature 0.8, in
one process: target and draft model have a thread each, and no network is in between. Of claims and
coupling nothing depends on how fast the machine is. Results are written part by part; without a
draft model what needs one is `na`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

import outrider
from bench.drafting_parts import (
    QUICK,
    Effort,
    Models,
    measure_ahead,
    measure_claims,
    measure_couplings,
    measure_proposers,
    measure_sessions,
)
from bench.drafting_results import Results, markdown, result_line
from bench.drafting_taus import measure_taus
from bench.pipeline_prompts import load_prompts
from outrider.config import DEFAULT_CACHE, Dtype
from outrider.serving.loops import SWITCH_INTERVAL_S

RESULTS = Path(__file__).with_name("results")
_SHIPPED = Path(__file__).parents[1] / "models"
PARTS = {
    "proposers": "each proposer over the prompts, beside the target alone",
    "tau": "the same over known texts and with trees that are waited for: no clock",
    "coupling": "noise shared by target and drafter, against the formula",
    "calibration": "claims against what the target decides",
    "ahead": "drafting ahead of a synthetic target of 20 ms a step",
    "sessions": "two hundred sessions on one drafter",
}


@click.command(epilog="\b\nParts:\n" + "\n".join(f"{name:12} {PARTS[name]}" for name in PARTS))
@click.option("--model", default="smollm2", show_default=True, help="The target.")
@click.option("--drafter", help="Draft model, a folder or name.  [default: the one in models/]")
@click.option(
    "--datastore",
    type=click.Path(path_type=Path, exists=True),
    help="Index made with `outrider datastore build`.  [default: none]",
)
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="bfloat16", show_default=True)
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Some of them.")
@click.option("--repeats", type=click.IntRange(1, 20), default=Effort.repeats, show_default=True)
@click.option("--tokens", type=click.IntRange(16, 2048), default=Effort.tokens, show_default=True)
@click.option("--categories", help="Of prompts for proposers and tau; others keep what they had.")
@click.option("--prompts", type=click.IntRange(min=1), help="Of a category.  [default: all]")
@click.option("--quick", is_flag=True, help="Little of everything, to see that it runs.")
@click.option("--results-dir", type=click.Path(path_type=Path, file_okay=False), default=RESULTS)
@click.option("--cache-dir", type=click.Path(path_type=Path), default=DEFAULT_CACHE)
def main(
    model: str,
    drafter: str | None,
    datastore: Path | None,
    dtype: Dtype,
    parts: str,
    repeats: int,
    tokens: int,
    categories: str | None,
    prompts: int | None,
    quick: bool,
    results_dir: Path,
    cache_dir: Path,
) -> None:
    """Measure drafters against the target alone, and what they claim against the truth."""
    chosen = [part.strip() for part in parts.split(",")]
    _refuse_unknown("part", chosen, PARTS)
    some = tuple(name.strip() for name in categories.split(",")) if categories else ()
    _refuse_unknown("category", some, dict.fromkeys(entry["category"] for entry in load_prompts()))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    console = Console(highlight=False)
    path = results_dir / "drafting.json"
    results = _read(path)
    models = Models(model, drafter or _shipped(), dtype, cache_dir, datastore)
    results.unavailable = {}
    if models.drafter is None:
        results.unavailable["model"] = "no --drafter, and none in models/"
        results.unavailable["union"] = results.unavailable["cascade"] = "it needs a draft model"
    if datastore is None:
        results.unavailable["datastore"] = "no --datastore"
    effort = QUICK if quick else Effort(repeats=repeats, tokens=tokens)
    effort = replace(effort, categories=some, prompts_max=prompts or effort.prompts_max)
    for part in (part for part in PARTS if part in chosen):
        for _ in _measure(part, models, effort, results, console):
            results.times[part] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            _write(path, results, models, quick=quick)
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    _draw(console, results, results_dir)
    lines = Console(width=1_000, highlight=False)
    lines.print(text, markup=False)
    lines.print(result_line(results), markup=False)


def _measure(
    part: str, models: Models, effort: Effort, results: Results, console: Console
) -> Iterator[None]:
    """Measure a part into the results; yields whenever they are worth keeping."""
    begin_s = time.monotonic()
    some = effort.categories

    def say(text: str) -> None:
        elapsed_s = time.monotonic() - begin_s
        console.print(f"[{part} {elapsed_s:.0f} s] {text}", markup=False, soft_wrap=True)

    match part:
        case "proposers":
            kept = [run for run in results.runs if some and run.category not in some]
            for runs in measure_proposers(models, effort, say):
                kept += runs
                results.runs = sorted(kept, key=lambda run: run.prompt)
                yield
        case "tau":
            others = [one for one in results.taus if some and one.category not in some]
            for taus in measure_taus(models, effort, say):
                others += taus
                results.taus = list(others)
                yield
        case "coupling":
            results.couplings = measure_couplings(models, effort, say)
        case "calibration":
            results.calibrated = measure_claims(models, effort, say)
        case "ahead":
            results.ahead = measure_ahead(effort, say)
        case "sessions":
            results.sharing = measure_sessions(effort, say)
    yield


def _refuse_unknown(kind: str, chosen: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise click.BadParameter(f"unknown {kind} {unknown[0]!r}; there are {', '.join(known)}")


def _shipped() -> str | None:
    """Find the first draft model that comes with the repository."""
    found = sorted(config.parent for config in _SHIPPED.glob("*/config.json"))
    return str(found[0]) if found else None


def _read(path: Path) -> Results:
    """Return what was measured before, by this version; nothing if there is none."""
    try:
        return TypeAdapter(Results).validate_python(json.loads(path.read_text())["results"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return Results()


def _write(path: Path, results: Results, models: Models, *, quick: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "benchmark": "drafters",
        "outrider": outrider.__version__,
        "model": models.target,
        "drafter": None if models.drafter is None else Path(models.drafter).name,
        "dtype": models.dtype,
        "quick": quick,
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "results": asdict(results),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _draw(console: Console, results: Results, folder: Path) -> None:
    try:
        # Imported late: it is for developers, and takes a second.
        from bench.drafting_plots import draw
    except ModuleNotFoundError as error:
        console.print(f"no plots: {error.name} is not installed; it is in outrider\\[dev]")
        return
    for path in draw(results, folder):
        console.print(f"plot: {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
