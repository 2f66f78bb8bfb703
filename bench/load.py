"""A fleet under load: `outrider bench load`.

Requests arrive at random moments at a stated rate, whether or not earlier ones are done. At each
rate target-only and speculated decoding serve the very same arrivals in turn, so that a noisy
machine treats both alike.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from bench.load_results import (
    SIDES,
    SPECULATED,
    Goal,
    LoadResults,
    Run,
    Served,
    markdown,
    result_line,
    write_load,
)
from bench.machine import command_line, origin
from bench.spec.fleet import OURS
from bench.spec.options import check_where, fleet_of, fleet_options
from bench.spec.questions import Question, choose, read_questions
from outrider.client import AsyncClient, Delta, Finished, Request
from outrider.config import Tls
from outrider.serving.options import apply

_TIMEOUT_S = 600.0


def arrivals(rate: float, window_s: float, seed: int) -> list[float]:
    """Seconds at which requests arrive within a window: a Poisson process; at least one."""
    chance = random.Random(seed)
    at_s, found = chance.expovariate(rate), []
    while at_s < window_s:
        found.append(at_s)
        at_s += chance.expovariate(rate)
    return found or [0.0]


async def serve(
    client: AsyncClient,
    side: str,
    rate: float,
    times_s: Sequence[float],
    requests: Sequence[Request],
    concurrency: int,
    advance: Callable[[], None],
) -> Run:
    """Send the requests when they are due, and wait for all. Raises `OutriderError`."""
    slots = asyncio.Semaphore(concurrency)
    begun_s = time.perf_counter()

    async def one(due_s: float, request: Request) -> Served:
        await asyncio.sleep(max(0.0, begun_s + due_s - time.perf_counter()))
        first_s, tokens = None, 0
        async with slots:
            async for event in client.generate(request, timeout_s=_TIMEOUT_S):
                now_s = time.perf_counter() - begun_s - due_s
                if isinstance(event, Delta) and event.token_ids:
                    first_s = now_s if first_s is None else first_s
                    tokens += len(event.token_ids)
                elif isinstance(event, Finished):
                    break
        advance()
        total_s = time.perf_counter() - begun_s - due_s
        return Served(total_s if first_s is None else first_s, total_s, tokens)

    served = await asyncio.gather(*map(one, times_s, requests))
    return Run(side, rate, time.perf_counter() - begun_s - times_s[0], tuple(served))


def requests_for(
    questions: Sequence[Question], count: int, tokens_max: int, *, speculation: bool, salt: str
) -> list[Request]:
    """First turns of questions in turn, each under a salt of its own: prompts are not shared."""
    return [
        Request(
            chat=[("user", questions[number % len(questions)].turns[0])],
            temperature=0.0,
            tokens_max=tokens_max,
            speculation=speculation,
            cache_salt=f"{salt}-{number}",
        )
        for number in range(count)
    ]


def _rates(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        rates = tuple(sorted({float(part) for part in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list such as 0.5,1,2") from None
    if not rates or rates[0] <= 0:
        raise click.BadParameter("rates must be positive")
    return rates


_SECONDS = click.FloatRange(min=0, min_open=True)


def _options(command: Any) -> Any:
    options = (
        fleet_options,
        click.option(
            "--rates",
            default="0.25,0.5,1,2",
            callback=_rates,
            show_default=True,
            help="Requests a second, with commas between.",
        ),
        click.option(
            "--concurrency",
            type=click.IntRange(1, 4096),
            default=16,
            show_default=True,
            help="Requests at once; more wait at the client, and their waiting counts.",
        ),
        click.option(
            "--window",
            "window_s",
            type=_SECONDS,
            default=20.0,
            show_default=True,
            help="Seconds in which requests arrive, at each rate.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(1, 20),
            default=1,
            show_default=True,
            help="Windows at each rate, each with other arrivals.",
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(2, 4096),
            default=48,
            show_default=True,
            help="Output tokens of each answer, at most.",
        ),
        click.option(
            "--first-token-goal",
            "first_token_s",
            type=_SECONDS,
            default=2.0,
            show_default=True,
            help="Seconds to the first token of a good request.",
        ),
        click.option(
            "--token-goal",
            "per_token_s",
            type=_SECONDS,
            default=0.1,
            show_default=True,
            help="Seconds of each further token of a good request, in the mean.",
        ),
    )
    return apply(command, *options)


@click.command("load")
@_options
def command(local: bool, tls: Tls | None, **options: Any) -> None:
    """Let requests arrive at random, faster and faster, and find out where a fleet is full.

    \b
    A fleet of its own:   outrider bench load --local --rates 0.5,1,2,4
    A fleet that runs:    outrider bench load --endpoint HOST:PORT --rates 10,20 --concurrency 256
    """
    check_where(options["endpoint"], local)
    console = Console(stderr=True)
    path: Path = options["results_dir"] / "load.json"
    questions = choose(read_questions(options["questions_path"]), None)
    names = (
        "endpoint",
        "model",
        "dtype",
        "compiled",
        "drafters",
        "concurrency",
        "window_s",
        "repeats",
        "max_tokens",
    )
    results = LoadResults(
        origin(command_line()),
        {name: options[name] for name in names},
        Goal(options["first_token_s"], options["per_token_s"]),
    )
    seconds = 2 * options["repeats"] * len(options["rates"]) * options["window_s"]
    console.print(f"at least {seconds / 60:.1f} minutes, longer where the fleet is full")
    with (
        fleet_of(options, console, dtype=options["dtype"], each=False) as endpoints,
        Progress(console=console) as progress,
    ):
        for run in _measure(endpoints[OURS], tls, questions, options, progress):
            results = replace(results, runs=(*results.runs, run))
            write_load(results, path)
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    _draw(console, results, path.with_suffix(".png"))
    if options["as_json"]:
        click.echo(path.read_text(), nl=False)
        return
    plain = Console(width=1_000, highlight=False)
    plain.print(text, markup=False)
    plain.print(result_line(results), markup=False)


def _measure(
    address: str,
    tls: Tls | None,
    questions: Sequence[Question],
    options: dict[str, Any],
    progress: Progress,
) -> Iterator[Run]:
    async def run(side: str, rate: float, times_s: Sequence[float], salt: str) -> Run:
        task = progress.add_task(f"{rate:g}/s {side}", total=len(times_s))
        requests = requests_for(
            questions,
            len(times_s),
            options["max_tokens"],
            speculation=side == SPECULATED,
            salt=salt,
        )
        async with AsyncClient(address, tls=tls) as client:
            return await serve(
                client,
                side,
                rate,
                times_s,
                requests,
                options["concurrency"],
                lambda: progress.advance(task),
            )

    fresh = random.SystemRandom().getrandbits(32)
    # One event loop for all: grpc.aio complains of those that are gone.
    with asyncio.Runner() as runner:
        for number, rate in enumerate(options["rates"]):
            for repeat in range(options["repeats"]):
                times_s = arrivals(rate, options["window_s"], seed=number * 1_000 + repeat)
                # Whose turn it is to begin goes round.
                sides = SIDES if (number + repeat) % 2 == 0 else SIDES[::-1]
                for side in sides:
                    salt = f"{fresh}-{rate}-{repeat}-{side}"
                    yield runner.run(run(side, rate, times_s, salt))


def _draw(console: Console, results: LoadResults, path: Path) -> None:
    try:
        # Late: it is for developers, and takes a second.
        from bench.load_plots import draw
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is not installed; it is in outrider\\[dev]")
        return
    console.print(f"plot: {draw(results, path)}", soft_wrap=True)


if __name__ == "__main__":
    command()
