"""Options that benchmarks over a fleet share, and the fleet that they describe."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from rich.console import Console

from bench.spec.fleet import OURS, DrafterSpec, FleetConfig, spec_fleet
from outrider.config import Dtype
from outrider.serving.options import apply, cache_option, client_tls_options

QUESTIONS = Path(__file__).parents[1] / "questions.jsonl"
"""A few of our own."""
RESULTS = Path("bench/results")

F = TypeVar("F", bound=Callable[..., Any])


def fleet_options(command: F) -> F:
    """Add what says which fleet is measured, with which questions, and where results go."""
    options: tuple[Callable[[Any], Any], ...] = (
        click.option("--endpoint", help="An orchestrator that runs, host:port."),
        click.option("--local", is_flag=True, help="Start a fleet for it on this machine."),
        client_tls_options,
        click.option(
            "--questions",
            "questions_path",
            type=click.Path(path_type=Path, dir_okay=False),
            default=QUESTIONS,
            help="Questions in Spec-Bench's format.  [default: a few of our own]",
        ),
        click.option("--model", default="smollm2", show_default=True, help="Target (--local)."),
        click.option(
            "--dtype",
            type=click.Choice(get_args(Dtype)),
            default="bfloat16",
            show_default=True,
            help="Precision of models (--local).",
        ),
        click.option(
            "--device", default="cpu", show_default=True, help="Where models run (--local)."
        ),
        click.option(
            "--compile/--no-compile",
            "compiled",
            default=True,
            show_default=True,
            help="Let the verifier compile its steps before anything is measured (--local).",
        ),
        click.option(
            "--drafter",
            "drafters",
            multiple=True,
            default=("lookup",),
            show_default=True,
            help="PROPOSER or PROPOSER=MODEL, such as language-model=DIR; repeatable (--local).",
        ),
        click.option(
            "--results-dir",
            type=click.Path(path_type=Path, file_okay=False),
            default=RESULTS,
            show_default=True,
            help="Where figures, tables and plots are written.",
        ),
        click.option(
            "--json", "as_json", is_flag=True, help="Print the results as JSON instead of tables."
        ),
        cache_option,
    )
    return apply(command, *options)


def check_where(endpoint: str | None, local: bool) -> None:
    """Refuse options that name no fleet, or two."""
    if bool(endpoint) == local:
        raise click.UsageError("give either --endpoint HOST:PORT or --local")


@contextlib.contextmanager
def fleet_of(
    options: dict[str, Any], console: Console, *, dtype: str, each: bool
) -> Iterator[dict[str, str]]:
    """Yield endpoints by contender: the one that was named, or those of a fleet started here."""
    if options["endpoint"] is not None:
        yield {OURS: options["endpoint"]}
        return
    config = FleetConfig(
        options["model"],
        dtype,
        options["device"],
        tuple(map(DrafterSpec.parse, options["drafters"])),
        each,
        options["cache_dir"],
        Path(tempfile.mkdtemp(prefix="outrider-bench-")),
        options["compiled"],
    )
    console.print(f"logs: {config.log_dir}", soft_wrap=True)
    with spec_fleet(config, console) as endpoints:
        yield dict(endpoints)
