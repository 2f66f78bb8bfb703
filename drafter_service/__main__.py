"""`python -m drafter_service`, and `outrider drafter`."""

from __future__ import annotations

import asyncio
import secrets
import sys
from typing import Any

import click

from drafter_service.config import DrafterConfig, GrowingConfig
from outrider.errors import OutriderError
from outrider.serving.logs import configure_logging
from outrider.serving.options import (
    check_advertised,
    engine_options,
    logging_options,
    worker_options,
)


@click.command("drafter", context_settings={"auto_envvar_prefix": "OUTRIDER_DRAFTER"})
@click.option(
    "--proposer",
    type=click.Choice(["lookup", "language-model"]),
    default="lookup",
    show_default=True,
    help="What guesses: the text's own repetitions, or a draft model.",
)
@click.option("--model", help="Draft model with the target's tokenizer (language-model only).")
@click.option(
    "--leaves-max",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Leaves that the draft model expands in one step, over all sessions.",
)
@click.option(
    "--kv-tokens-max",
    type=click.IntRange(min=1),
    default=None,
    help="KV budget of the draft model in tokens; idle sessions lose theirs first."
    "  [default: what the machine has room for]",
)
@engine_options
@worker_options
@click.option(
    "--sessions-max",
    type=click.IntRange(min=1),
    default=GrowingConfig.sessions_max,
    show_default=True,
    help="Sessions mirrored at once; more are refused.",
)
@click.option(
    "--step-delay",
    "step_delay_s",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds added to each step, for tests.",
)
@logging_options
def command(
    log_level: str,
    log_format: Any,
    sessions_max: int,
    step_delay_s: float,
    worker_id: str | None,
    **options: Any,
) -> None:
    """Run a drafter: guesses ahead of the target."""
    configure_logging("drafter", level=log_level, fmt=log_format)
    config = DrafterConfig(
        worker_id=worker_id or f"drafter-{secrets.token_hex(4)}",
        growing=GrowingConfig(sessions_max=sessions_max, step_delay_s=step_delay_s),
        **options,
    )
    if config.proposer == "language-model" and config.model is None:
        raise click.UsageError("--model is needed for --proposer language-model")
    check_advertised(config.host, config.redis_url, config.advertise)
    # Imported late: torch takes seconds, and `--help` should not.
    from drafter_service.app import serve

    try:
        asyncio.run(serve(config))
    except OutriderError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    command()
