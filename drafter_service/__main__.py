"""`python -m drafter_service`, and `outrider drafter`."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import click

from drafter_service.config import LANGUAGE_MODEL, DrafterConfig, GrowingConfig, stages_of
from outrider.errors import ConfigError
from outrider.serving.options import (
    check_advertised,
    engine_options,
    service_options,
    worker_options,
)


@click.command("drafter", context_settings={"auto_envvar_prefix": "OUTRIDER_DRAFTER"})
@click.option(
    "--proposer",
    default="lookup",
    show_default=True,
    metavar="NAME | cascade:NAME,NAME,...",
    help="What guesses: lookup (the text's own repetitions), datastore (a corpus), recycling (what"
    " the target thought probable before), language-model (a draft model); or a cascade, whose"
    " later ones guess only where the earlier ones have little to say.",
)
@click.option(
    "--datastore",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Corpus to guess from (datastore only); see `outrider datastore`.",
)
@click.option(
    "--cascade-tokens",
    type=click.FloatRange(min=0.0),
    default=3.0,
    show_default=True,
    help="Tokens that guesses must promise to win before a cascade spares its later proposers.",
)
@click.option("--model", help="Draft model with the target's tokenizer (language-model only).")
@click.option(
    "--target",
    help="Where the target of a distilled draft model is.  [default: where it was]",
)
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
    help="Sessions mirrored at once, most of them idle; more are refused.",
)
@click.option(
    "--mirrors-mib",
    type=click.IntRange(min=1),
    default=GrowingConfig.mirrors_bytes_max >> 20,
    show_default=True,
    help="Memory of mirrors in MiB, estimated; idle ones beyond it are rebuilt when they go on.",
)
@click.option(
    "--step-delay",
    "step_delay_s",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds added to each step, for tests.",
)
@service_options("drafter")
def command(
    sessions_max: int,
    mirrors_mib: int,
    step_delay_s: float,
    worker_id: str | None,
    **options: Any,
) -> None:
    """Run a drafter: guesses ahead of the target.

    \b
    No model:      outrider drafter --proposer lookup
    A model:       outrider drafter --proposer language-model --model ./my-draft-model
    A corpus:      outrider drafter --proposer datastore --datastore docs.store
    All at once:   outrider drafter --proposer cascade:lookup,recycling,language-model \\
                     --model ./my-draft-model

    On SIGHUP it loads model and datastore anew and goes on guessing with them for the sessions that
    it has; what cannot be used is logged and the old version goes on. Put a new version in place
    whole (rename a folder, or turn a link) before.
    """
    config = DrafterConfig(
        worker_id=worker_id or f"drafter-{secrets.token_hex(4)}",
        growing=GrowingConfig(
            sessions_max=sessions_max,
            mirrors_bytes_max=mirrors_mib << 20,
            step_delay_s=step_delay_s,
        ),
        **options,
    )
    try:
        stages = stages_of(config.proposer)
    except ConfigError as error:
        raise click.UsageError(f"--proposer: {error}") from None
    if LANGUAGE_MODEL in stages and config.model is None:
        raise click.UsageError("--model is needed for --proposer language-model")
    if "datastore" in stages and config.datastore is None:
        raise click.UsageError("--datastore is needed for --proposer datastore")
    check_advertised(config.host, config.redis_url, config.advertise)
    # Imported late: torch takes seconds, and `--help` should not.
    from drafter_service.app import serve

    asyncio.run(serve(config))


if __name__ == "__main__":
    command()
