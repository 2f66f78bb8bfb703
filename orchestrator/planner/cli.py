"""`outrider plan` and `outrider simulate`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from orchestrator.planner import fleet_report, plan_report
from orchestrator.planner.cli_options import KnotsType, figure_options, figures
from orchestrator.planner.measured import predict, read_measured
from orchestrator.planner.modes import SESSION_STEPS
from orchestrator.planner.plan import PlanRequest, make_plan
from outrider.errors import ConfigError


@click.command("plan")
@figure_options
@click.option(
    "--sessions",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sessions that decode at once, in the whole fleet.",
)
@click.option(
    "--verifiers",
    type=click.IntRange(min=1),
    help="Verifiers.  [default: the fewest that reach --tokens-per-s-min]",
)
@click.option(
    "--drafters",
    type=click.IntRange(min=0),
    help="Drafters.  [default: what makes tokens cheapest, or without prices the fewest that are"
    " within 3% of the fastest]",
)
@click.option(
    "--drafters-per-session",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Drafters that guess for one session at once.",
)
@click.option(
    "--tokens-per-s-min",
    type=click.FloatRange(min=0.0),
    default=0.0,
    help="What each session needs.  [default: nothing]",
)
@click.option(
    "--colocated-draft-ms",
    type=KnotsType(),
    help="Draft step on a verifier's own device.  [default: --draft-ms]",
)
@click.option("--verifier-price", type=click.FloatRange(min=0.0), help="Per hour, any currency.")
@click.option("--drafter-price", type=click.FloatRange(min=0.0), help="Per hour, same currency.")
@click.option(
    "--session-steps",
    type=click.IntRange(min=50),
    default=SESSION_STEPS,
    show_default=True,
    help="Verify steps times sessions of each simulation: precision for time.",
)
@click.option(
    "--measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Predict the rows of this file instead, and compare with what was measured.",
)
def plan(measured: Path | None, as_json: bool, **options: Any) -> None:
    """Say whether drafters on machines of their own pay, how many, and what tokens cost.

    \b
    Modes compared:
      target only              no guesses
      co-located chain, tree   the drafter runs on the verifier's own device
      remote chain, lockstep   drafter and verifier wait for each other over the network
      remote tree              Outrider, simulated step by step without overheads

    \b
    --measured reads JSON, a list of rows or an object with `rows`; a row has
      step_ms, draft_ms   a number, or [[size, ms], ...]
      agreement           by rank: a list, or one number
      rtt_ms              as measured
      tokens_per_s        of all sessions together, as measured
    and may have mode, name, leaves, sessions, verifiers, drafters, drafters_per_session,
    silent_drafters, nodes_max and colocated_draft_ms.
    """
    if measured is not None:
        _compare(measured, options["session_steps"], as_json)
        return
    scenario = figures(options)
    if (options["verifier_price"] is None) != (options["drafter_price"] is None):
        raise click.UsageError("give both --verifier-price and --drafter-price, or neither")
    scenario = dataclasses.replace(
        scenario,
        sessions=options.pop("sessions"),
        drafters_per_session=options.pop("drafters_per_session"),
    )
    request = PlanRequest(
        scenario=scenario, colocated_draft=options.pop("colocated_draft_ms"), **options
    )
    with Console(stderr=True).status("planning") as status:
        try:
            answer = make_plan(request, lambda what: status.update(what))
        except ConfigError as error:
            raise click.UsageError(_by_option(error)) from None
    if as_json:
        click.echo(json.dumps(plan_report.plan_json(answer)))
    else:
        plan_report.print_plan(answer, Console())


def _compare(measured: Path, session_steps: int, as_json: bool) -> None:
    try:
        rows = read_measured(measured)
    except ConfigError as error:
        raise click.BadParameter(str(error), param_hint="--measured") from None
    with Console(stderr=True).status("predicting"):
        predictions = [predict(row, session_steps=session_steps) for row in rows]
    if as_json:
        click.echo(json.dumps(plan_report.predictions_json(predictions)))
    else:
        plan_report.print_predictions(predictions, Console())


def _by_option(error: ConfigError) -> str:
    """An error of ours names a field; people know the option."""
    field, colon, rest = str(error).partition(":")
    return f"--{field.replace('_', '-')}{colon}{rest}"


@click.command("simulate")
@click.option(
    "--verifiers",
    type=click.IntRange(min=1),
    default=1_000,
    show_default=True,
    help="Verifier pods.",
)
@click.option(
    "--drafters",
    type=click.IntRange(min=0),
    default=5_000,
    show_default=True,
    help="Drafter pods.",
)
@click.option(
    "--verifier-sessions-max",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Sessions that a verifier takes at once.",
)
@click.option(
    "--drafter-sessions-max",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Sessions that a drafter takes at once.",
)
@click.option(
    "--drafters-per-session",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Drafters that guess for one session at once.",
)
@click.option(
    "--load",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    default=0.25,
    show_default=True,
    help="Share of all verifiers' sessions in use; sets the arrivals.",
)
@click.option(
    "--arrivals-per-s",
    type=click.FloatRange(min=0.0, min_open=True),
    help="Sessions that begin each second, instead of --load.",
)
@click.option(
    "--prompt-tokens-mean",
    type=click.FloatRange(min=1.0),
    default=500.0,
    show_default=True,
    help="Length of prompts, in the mean.",
)
@click.option(
    "--output-tokens-mean",
    type=click.FloatRange(min=1.0),
    default=300.0,
    show_default=True,
    help="Length of answers, in the mean.",
)
@click.option(
    "--tokens-spread",
    type=click.FloatRange(min=0.0),
    default=1.0,
    show_default=True,
    help="Of both lengths: standard deviation of the logarithm.",
)
@click.option(
    "--prefill-tokens-per-s",
    type=click.FloatRange(min=0.0, min_open=True),
    default=20_000.0,
    show_default=True,
    help="Speed at which a verifier reads prompts.",
)
@click.option(
    "--deaths-per-hour",
    type=click.FloatRange(min=0.0),
    default=1.0,
    show_default=True,
    help="Of each pod.",
)
@click.option(
    "--restart-s",
    type=click.FloatRange(min=0.0),
    default=60.0,
    show_default=True,
    help="After which a dead pod is back.",
)
@click.option(
    "--duration-s",
    type=click.FloatRange(min=0.0, min_open=True),
    default=30.0,
    show_default=True,
    help="Simulated seconds that are counted.",
)
@click.option(
    "--warmup-s",
    type=click.FloatRange(min=0.0),
    default=15.0,
    show_default=True,
    help="Simulated seconds before, from an empty fleet.",
)
@click.option(
    "--session-steps",
    type=click.IntRange(min=50),
    default=400,
    show_default=True,
    help="Verify steps times sessions of each simulation behind the table of speeds.",
)
@click.option(
    "--shortlist",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Show placement so many of the least loaded pods of each fleet; 0 shows all, which"
    " is slow in large fleets.",
)
@figure_options
def simulate(as_json: bool, **options: Any) -> None:
    """Simulate a fleet under traffic, with the product's own placement; pods die and come back.

    Speeds come from a table of step-by-step simulations of the protocol, so it takes a while.

    \b
    A small fleet, half full:      outrider simulate --verifiers 8 --drafters 32 --load 0.5
    Drafters farther away:         outrider simulate --rtt-ms 10
    Is placement still balanced?   outrider simulate --json | jq .
    """
    from orchestrator.planner.fleet_simulation import FleetScenario, Policies, simulate_fleet
    from orchestrator.planner.speed_table import GRID, build_speed_table

    seed, session_steps = options["seed"], options.pop("session_steps")
    tree = figures(options)
    scenario = FleetScenario(tree=tree, seed=seed, **options)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        cells = progress.add_task("speeds", total=len(GRID) ** 2)
        table = build_speed_table(
            tree,
            scenario.verifier_sessions_max,
            lambda: progress.advance(cells),
            session_steps=session_steps,
        )
        seconds = progress.add_task("fleet", total=scenario.warmup_s + scenario.duration_s)
        result = simulate_fleet(
            scenario,
            table,
            Policies(),
            time.perf_counter,
            lambda tick_s: progress.advance(seconds, tick_s),
        )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        fleet_report.print_fleet(scenario, result, Console())
