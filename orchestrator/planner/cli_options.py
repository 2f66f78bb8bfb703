"""Options that describe models, machines and network: shared by the planner's commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from orchestrator.budgets import FLUSHES_PER_STEP
from orchestrator.planner.knots import Knots, read_knots
from orchestrator.planner.scenario import TreeScenario, check_agreement
from outrider.errors import ConfigError
from outrider.serving.options import apply

F = TypeVar("F", bound=Callable[..., Any])


class KnotsType(click.ParamType[Knots]):
    """Milliseconds, or sizes with milliseconds."""

    name = "ms|size:ms,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Knots:
        if isinstance(value, tuple):
            return value
        try:
            return read_knots("durations", value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class ProbabilitiesType(click.ParamType[tuple[float, ...]]):
    """Probabilities by rank, separated by commas."""

    name = "p,p,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            probabilities = tuple(float(part) for part in value.split(","))
            check_agreement("probabilities", probabilities)
        except ValueError:
            self.fail(f"{value!r} is no list of probabilities like 0.8,0.1,0.05", param, ctx)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        return probabilities


def figure_options(command: F) -> F:
    """Add the options that describe models, machines and network."""
    return apply(
        command,
        click.option(
            "--step-ms",
            type=KnotsType(),
            default="1:22,32:22,128:28",
            show_default=True,
            help="Verify step; by tokens in it where that matters.",
        ),
        click.option(
            "--draft-ms",
            type=KnotsType(),
            default="2.5",
            show_default=True,
            help="Draft step; by leaves in it where that matters.",
        ),
        click.option(
            "--leaves",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="Most leaves that a draft step expands.",
        ),
        click.option(
            "--acceptance",
            type=ProbabilitiesType(),
            default="0.8,0.1,0.05",
            show_default=True,
            help="Probability that the drafter's first, second, ... choice is the target's token.",
        ),
        click.option(
            "--rtt-ms",
            type=click.FloatRange(min=0.0),
            default=2.0,
            show_default=True,
            help="Drafter to orchestrator to verifier and back.",
        ),
        click.option(
            "--step-nodes-max",
            type=click.IntRange(min=0),
            default=32,
            show_default=True,
            help="Draft nodes verified in one step.",
        ),
        click.option(
            "--seed",
            type=int,
            default=1,
            show_default=True,
            help="Of the simulation; another one tells how far chance goes.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table."),
    )


def figures(options: dict[str, Any]) -> TreeScenario:
    """Take what `figure_options` added out of the options of a command."""
    return TreeScenario(
        step=options.pop("step_ms"),
        draft_step_s=options.pop("draft_ms"),
        leaves=options.pop("leaves"),
        agreement=options.pop("acceptance"),
        rtt_s=options.pop("rtt_ms") / 1e3,
        flushes_per_step=FLUSHES_PER_STEP,
        nodes_max=options.pop("step_nodes_max"),
        seed=options.pop("seed"),
    )
