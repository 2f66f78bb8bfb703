"""`python -m verifier_service`, and `outrider verifier`."""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any

import click

from outrider.serving.options import (
    check_advertised,
    engine_options,
    service_options,
    worker_options,
)
from verifier_service.config import EngineConfig, VerifierConfig


@click.command("verifier", context_settings={"auto_envvar_prefix": "OUTRIDER_VERIFIER"})
@click.option("--model", required=True, help="Target: folder, Hugging Face id, or smollm2.")
@engine_options
@worker_options
@click.option(
    "--sessions-max",
    type=click.IntRange(min=1),
    default=EngineConfig.sessions_max,
    show_default=True,
    help="Sessions at once; more are refused.",
)
@click.option(
    "--kv-tokens-max",
    type=click.IntRange(min=1),
    default=None,
    help="KV budget in tokens, over all sessions.  [default: what the machine has room for]",
)
@click.option(
    "--kv-overcommit",
    type=click.FloatRange(min=1),
    default=EngineConfig.kv_overcommit,
    show_default=True,
    help="Admit sessions that together might need this many times the KV budget; those without"
    " room wait.",
)
@click.option(
    "--step-nodes-max",
    type=click.IntRange(min=0),
    default=EngineConfig.step_nodes_max,
    show_default=True,
    help="Draft nodes verified in one step; 0 switches speculation off.",
)
@click.option(
    "--prefill-tokens-max",
    type=click.IntRange(min=1),
    default=EngineConfig.prefill_tokens_max,
    show_default=True,
    help="Prompt tokens computed in one step.",
)
@click.option(
    "--grammar-timeout",
    "grammar_timeout_s",
    type=click.FloatRange(min=0, max=60, min_open=True),
    default=EngineConfig.grammar_timeout_s,
    show_default=True,
    help="Seconds that a grammar may take to compile; others are refused.",
)
@click.option(
    "--own-guesses/--no-own-guesses",
    default=True,
    show_default=True,
    help="Guess from sessions' own text, beside the drafters: what follows where the last tokens"
    " occurred before. It takes no network, so it helps in the step right after a commit.",
)
@click.option(
    "--kv-pull/--no-kv-pull",
    default=EngineConfig.kv_pull,
    show_default=True,
    help="Fetch KV from other verifiers where that is quicker than computing it, and let them"
    " fetch.",
)
@click.option(
    "--kv-pull-wait",
    "kv_pull_wait_s",
    type=click.FloatRange(min=0, max=60, min_open=True),
    default=EngineConfig.kv_pull_wait_s,
    show_default=True,
    help="Seconds that a session waits at most for KV of another verifier.",
)
@click.option(
    "--step-delay",
    "step_delay_s",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds added to each step, for tests.",
)
@click.option(
    "--warm-up/--no-warm-up", default=True, show_default=True, help="Measure step times first."
)
@service_options("verifier")
def command(
    sessions_max: int,
    kv_tokens_max: int | None,
    kv_overcommit: float,
    step_nodes_max: int,
    prefill_tokens_max: int,
    grammar_timeout_s: float,
    own_guesses: bool,
    kv_pull: bool,
    kv_pull_wait_s: float,
    step_delay_s: float,
    warm_up: bool,
    worker_id: str | None,
    cache_dir: Path,
    **options: Any,
) -> None:
    """Run a verifier: hosts the target model and judges guesses.

    \b
    One that Redis knows:        outrider verifier --model ./my-model --redis redis://redis:6379
    At a stated address:         outrider verifier --model smollm2 --port 50051
    On a GPU, half the memory:   outrider verifier --model ./my-model --dtype bfloat16
    Split over two GPUs:         torchrun --standalone --nproc-per-node 2 -m verifier_service \
                                   --model ./my-model

    Every option is an environment variable as well: OUTRIDER_VERIFIER_SESSIONS_MAX=32.
    """
    config = VerifierConfig(
        worker_id=worker_id or f"verifier-{secrets.token_hex(4)}",
        cache_dir=cache_dir,
        engine=EngineConfig(
            sessions_max=sessions_max,
            kv_tokens_max=kv_tokens_max,
            kv_overcommit=kv_overcommit,
            step_nodes_max=step_nodes_max,
            prefill_tokens_max=prefill_tokens_max,
            grammar_timeout_s=grammar_timeout_s,
            own_guesses=own_guesses,
            kv_pull=kv_pull,
            kv_pull_wait_s=kv_pull_wait_s,
            step_delay_s=step_delay_s,
            warm_up=warm_up,
        ),
        **options,
    )
    check_advertised(config.host, config.redis_url, config.advertise)
    # Imported late: torch takes seconds, and `--help` should not.
    from verifier_service.app import follow, serve

    if int(os.environ.get("RANK", "0")):
        follow(config)
    else:
        asyncio.run(serve(config))


if __name__ == "__main__":
    command()
