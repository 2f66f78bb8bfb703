"""Speculated against target-only decoding over a small set of prompts, through a whole fleet.

    python -m bench.speculation            # or: make bench

Both sides go through the same services and run in turn, so that a noisy machine treats them
alike; medians of the repeats are compared. Times are the orchestrator's, prefill included.
Categories where speculation loses are printed like the others.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import outrider
from outrider.cli import local_options
from outrider.client import Client, Completion, Request
from outrider.local import LocalConfig, LocalFleet

PROMPTS = Path(__file__).with_name("prompts.json")
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, measured."""

    category: str
    tokens: int
    target_s: float
    speculated_s: float
    tau: float
    acceptance: float | None
    identical: bool

    @property
    def speedup(self) -> float:
        """Target-only over speculated time."""
        return self.target_s / self.speculated_s


@click.command()
@local_options
@click.option("--repeats", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--tokens-max", type=click.IntRange(1, 2048), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True)
def main(repeats: int, tokens_max: int, temperature: float, **options: Any) -> None:
    """Measure speculated against target-only decoding, prompt by prompt."""
    console = Console()
    config = LocalConfig(port=None, **options)
    prompts = load_prompts()
    with (
        LocalFleet(config, console) as fleet,
        Client(fleet.endpoint) as client,
        Progress(console=console) as progress,
    ):
        task = progress.add_task("measuring", total=len(prompts) * (2 * repeats + 1))
        cases = measure_prompts(
            client, prompts, repeats, tokens_max, temperature, lambda: progress.advance(task)
        )
    _report(console, config, cases, temperature, repeats)


def load_prompts() -> list[dict[str, str]]:
    """The benchmark's prompts, each with its category."""
    prompts: list[dict[str, str]] = json.loads(PROMPTS.read_text())["prompts"]
    return prompts


def measure_prompts(
    client: Client,
    prompts: Sequence[dict[str, str]],
    repeats: int,
    tokens_max: int,
    temperature: float,
    advance: Callable[[], object],
) -> list[Case]:
    """Answer each prompt `repeats` times with and without speculation, in turn."""
    return [_measure(client, entry, repeats, tokens_max, temperature, advance) for entry in prompts]


def _measure(
    client: Client,
    entry: dict[str, str],
    repeats: int,
    tokens_max: int,
    temperature: float,
    advance: Callable[[], object],
) -> Case:
    def run(speculation: bool) -> Completion:
        request = Request(
            chat=[("user", entry["prompt"])],
            temperature=temperature,
            seed=1,
            tokens_max=tokens_max,
            speculation=speculation,
        )
        completion = client.complete(request)
        advance()
        return completion

    run(True)  # warms caches; not counted
    plain, speculated = [], []
    for _ in range(repeats):
        plain.append(run(False))
        speculated.append(run(True))
    counters = [c.finished.speculation for c in speculated]
    verified = sum(c.verified_draft_tokens for c in counters)
    accepted = sum(c.accepted_draft_tokens for c in counters)
    tokens = len(plain[0].token_ids)
    return Case(
        category=entry["category"],
        tokens=tokens,
        target_s=statistics.median(c.finished.total_s for c in plain),
        speculated_s=statistics.median(c.finished.total_s for c in speculated),
        tau=tokens / statistics.median(c.verify_steps for c in counters),
        acceptance=accepted / verified if verified else None,
        identical=all(c.token_ids == plain[0].token_ids for c in (*plain, *speculated)),
    )


_HEADER = ("prompt", "tokens", "target", "Outrider", "speed-up", "tau", "accepted", "same ids")


def _cells(case: Case) -> tuple[str, ...]:
    return (
        case.category,
        str(case.tokens),
        f"{case.tokens / case.target_s:.1f}",
        f"{case.tokens / case.speculated_s:.1f}",
        f"{case.speedup:.2f}",
        f"{case.tau:.2f}",
        "-" if case.acceptance is None else f"{case.acceptance:.2f}",
        "yes" if case.identical else "no",
    )


def markdown(cases: Sequence[Case]) -> str:
    """A table of the cases."""
    rows = [_HEADER, ("---",) * len(_HEADER), *map(_cells, cases)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _report(
    console: Console, config: LocalConfig, cases: list[Case], temperature: float, repeats: int
) -> None:
    table = Table(*_HEADER, box=None, title="tokens/s, target only and Outrider; medians")
    for case in cases:
        table.add_row(*_cells(case))
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "speculation.json"
    record = {
        "benchmark": "speculation",
        "outrider": outrider.__version__,
        "model": config.model,
        "dtype": config.dtype,
        "temperature": temperature,
        "drafters": config.drafters,
        "draft_model": config.draft_model,
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "repeats": repeats,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cases": [asdict(case) for case in cases],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(cases))
    overall = math.exp(statistics.fmean(math.log(case.speedup) for case in cases))
    identical = sum(case.identical for case in cases)
    Console(width=1_000, highlight=False).print(
        f"result: speculation overall={overall:.2f} "
        f"min={min(case.speedup for case in cases):.2f} "
        f"max={max(case.speedup for case in cases):.2f} "
        f"tau={statistics.fmean(case.tau for case in cases):.2f} "
        f"identical={identical}/{len(cases)}"
    )


if __name__ == "__main__":
    main()
