"""`outrider generate` and `outrider chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from outrider.client import (
    Client,
    Collector,
    Completion,
    Delta,
    Finished,
    PromptTokens,
    Request,
)
from outrider.config import DEFAULT_ENDPOINT, Tls
from outrider.domain import TokenLogprobs
from outrider.errors import InvalidRequest
from outrider.serving.options import apply, client_tls_options

F = TypeVar("F", bound=Callable[..., Any])


def _biases(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[int, float]:
    """Read ID=VALUE, as often as it is given."""
    biases: dict[int, float] = {}
    for text in value:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not ID=VALUE, such as 42=-100") from None
    return biases


def _schema(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Read a schema that is given as a file; text that begins with a brace is one itself."""
    if value is None or value.lstrip().startswith("{"):
        return value
    try:
        return Path(value).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise click.BadParameter(f"no JSON object, and as a file {value!r}: {reason}") from None


def connection_options(command: F) -> F:
    """Add --endpoint and the options of TLS; the command gets `endpoint` and `tls`."""
    return apply(
        command,
        click.option(
            "--endpoint",
            default=DEFAULT_ENDPOINT,
            envvar="OUTRIDER_ENDPOINT",
            show_default=True,
            help="Orchestrator, host:port; several, with commas between, stand in for each other.",
        ),
        client_tls_options,
    )


def sampling_options(command: F) -> F:
    """Add the options that every generating command shares."""
    options: tuple[Callable[[Any], Any], ...] = (
        connection_options,
        click.option("--model", default="", help="Model name; may be left out if one is served."),
        click.option("--temperature", type=float, help="0 is greedy.  [server default: 1]"),
        click.option("--top-k", type=int, help="Keep the k most probable tokens."),
        click.option("--top-p", type=float, help="Keep the smallest set of this probability."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the best."),
        click.option(
            "--repetition-penalty",
            type=float,
            help="Above 1: tokens of prompt and output become less likely.  [server default: 1]",
        ),
        click.option(
            "--presence-penalty",
            type=float,
            help="Taken off the logits of tokens that the output has, -2 to 2.",
        ),
        click.option(
            "--frequency-penalty",
            type=float,
            help="Taken off a token's logit each time that the output has it, -2 to 2.",
        ),
        click.option(
            "--logit-bias",
            metavar="ID=VALUE",
            callback=_biases,
            multiple=True,
            help="Added to the logit of this id, -100 (never) to 100; repeatable.",
        ),
        click.option("--seed", type=int, help="Same seed, same output.  [default: random]"),
        click.option("--tokens-max", type=int, help="Output tokens at most."),
        click.option(
            "--tokens-min", type=int, help="Output tokens before which no id ends the output."
        ),
        click.option(
            "--json-schema",
            metavar="FILE|TEXT",
            callback=_schema,
            help="The output is JSON that fits this schema: a file, or the schema itself.",
        ),
        click.option("--regex", help="The whole output matches this regular expression."),
        click.option("--stop", multiple=True, help="Text that ends the output; repeatable."),
        click.option(
            "--speculation/--no-speculation",
            default=True,
            help="Off: decode with the target alone. Changes speed, never the output.",
        ),
        click.option(
            "--cache-salt",
            default="",
            help="Share computed prefixes only with requests of the same salt.",
        ),
        click.option(
            "--trace",
            "trace_path",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Write the session's timeline here, for chrome://tracing, ui.perfetto.dev or"
            " `outrider trace plot`.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead."),
    )
    return apply(command, *options)


@click.command()
@click.argument("prompt", required=False)
@sampling_options
@click.option(
    "--n",
    type=int,
    default=1,
    show_default=True,
    help="Continuations; the first is what it would be alone, the others have other noise.",
)
@click.option(
    "--logprobs",
    type=int,
    metavar="ALTERNATIVES",
    help="Show each output token's log-probability and so many of the best ids' (0 to 20).",
)
@click.option(
    "--prompt-logprobs",
    type=int,
    metavar="ALTERNATIVES",
    help="The same for the prompt's tokens.",
)
def generate(
    prompt: str | None,
    endpoint: str,
    tls: Tls | None,
    as_json: bool,
    trace_path: Path | None,
    **options: Any,
) -> None:
    """Continue PROMPT, as it is (no chat template). Reads standard input if PROMPT is left out.

    Text goes to standard output as it comes, and a summary to standard error: tau is how many
    tokens a step of the target gave, 1 without speculation.

    \b
    Three endings to choose from:   outrider generate "Once upon a time" --n 3 --tokens-max 40
    A number and nothing else:      outrider generate "2 + 2 = " --regex "[0-9]+"
    How sure the model is:          outrider generate "Paris is in" --logprobs 3 --tokens-max 1
    The text and nothing else:      outrider generate "Hello" --json | jq -r .text
    """
    text = prompt if prompt is not None else sys.stdin.read()
    request = Request(prompt=text, trace=trace_path is not None, **options)
    _run(Client(endpoint, tls=tls), request, as_json, trace_path)


@click.command()
@click.argument("message", required=False)
@click.option("--system", help="System message.")
@sampling_options
def chat(
    message: str | None,
    system: str | None,
    endpoint: str,
    tls: Tls | None,
    as_json: bool,
    trace_path: Path | None,
    **options: Any,
) -> None:
    """Answer MESSAGE; without it, hold a conversation in the terminal (end it with Ctrl-D).

    \b
    One answer:                     outrider chat "Why is the sky blue?" --tokens-max 100
    In character:                   outrider chat --system "You are a pirate."
    The same answer every time:     outrider chat "Name a river." --seed 7
    An object, for a program:       outrider chat "Describe a cat." --json-schema cat.json
    A fleet with mutual TLS:        outrider chat --tls-cert me.pem --tls-key me.key --tls-ca ca.pem
    """
    turns: list[tuple[str, str]] = [("system", system)] if system else []
    options["trace"] = trace_path is not None
    if message is not None:
        request = Request(chat=[*turns, ("user", message)], **options)
        _run(Client(endpoint, tls=tls), request, as_json, trace_path)
        return
    while True:
        try:
            line = click.prompt("you", prompt_suffix="> ")
        except click.Abort:
            return
        turns.append(("user", line))
        request = Request(chat=list(turns), **options)
        answer = _run(Client(endpoint, tls=tls), request, as_json, trace_path)
        turns.append(("assistant", answer))


def _run(client: Client, request: Request, as_json: bool, trace_path: Path | None) -> str:
    """Show one generation in the terminal; returns the text of its first choice.

    The timeline that is written is the first choice's. Closes the client.
    """
    with client:
        if as_json:
            completions = client.complete_all(request)
            _write_trace(trace_path, completions[0].finished)
            found = [_as_json(completion, request) for completion in completions]
            click.echo(json.dumps(found[0] if request.n == 1 else {"choices": found}))
            return completions[0].text
        collector = Collector()
        for event in client.generate(request):
            collector.add(event)
            match event:
                case PromptTokens(logprobs):
                    click.echo("prompt, from its second token on:")
                    _echo_logprobs(logprobs)
                case Delta() if request.n == 1:
                    click.echo(event.text, nl=False)
                case Finished():
                    _echo_end(collector.completion(event.choice), request)
        first = collector.completion(0)
        _write_trace(trace_path, first.finished)
        return first.text


def _write_trace(path: Path | None, finished: Finished) -> None:
    if path is None:
        return
    try:
        path.write_bytes(finished.trace)
    except OSError as error:
        raise InvalidRequest("trace", f"cannot write {path}: {error.strerror}") from error


def _echo_end(completion: Completion, request: Request) -> None:
    if request.n > 1:
        # Choices grow side by side; each is shown when it is whole.
        click.echo(f"choice {completion.finished.choice}:")
        click.echo(completion.text, nl=False)
    click.echo()
    _echo_logprobs(completion.logprobs)
    click.echo(_summary(completion.finished), err=True)


def _echo_logprobs(logprobs: Sequence[TokenLogprobs]) -> None:
    """One line a token: its id, its log-probability, and the best ids with theirs."""
    for entry in logprobs:
        best = "  ".join(f"{token}:{logprob:.4f}" for token, logprob in entry.top)
        click.echo(f"{entry.token:>8} {entry.logprob:>10.4f}  {best}".rstrip())


def _summary(finished: Finished) -> str:
    counters = finished.speculation
    tokens = finished.usage.completion_tokens
    tau = tokens / max(1, counters.verify_steps)
    won = "".join(
        f", {accepted} of {verified} guesses by {name} right"
        for name, (verified, accepted) in finished.by_proposer.items()
    )
    return (
        f"[{finished.reason.value}; {tokens} tokens in {finished.total_s:.2f} s, "
        f"{counters.verify_steps} verify steps, tau {tau:.2f}{won}]"
    )


def _as_json(completion: Completion, request: Request) -> dict[str, Any]:
    finished = completion.finished
    counters = finished.speculation
    found: dict[str, Any] = {
        "id": completion.started.generation_id,
        "model": completion.started.model,
        "seed": completion.started.seed,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "sources": completion.sources,
        "finish_reason": finished.reason.value,
        "usage": {
            "prompt_tokens": finished.usage.prompt_tokens,
            "completion_tokens": finished.usage.completion_tokens,
        },
        "speculation": {
            "verify_steps": counters.verify_steps,
            "verified_draft_tokens": counters.verified_draft_tokens,
            "accepted_draft_tokens": counters.accepted_draft_tokens,
            "received_draft_tokens": counters.received_draft_tokens,
            "dropped_drafts": dict(counters.dropped_drafts),
            "dropped_nodes": dict(counters.dropped_nodes),
            "proposers": {
                name: {"verified_draft_tokens": verified, "accepted_draft_tokens": accepted}
                for name, (verified, accepted) in finished.by_proposer.items()
            },
        },
        "first_token_s": finished.first_token_s,
        "total_s": finished.total_s,
    }
    if request.n > 1:
        found["choice"] = finished.choice
    if request.logprobs is not None:
        found["logprobs"] = [_entry(entry) for entry in completion.logprobs]
    if request.prompt_logprobs is not None:
        found["prompt_logprobs"] = [_entry(entry) for entry in completion.prompt_logprobs]
    return found


def _entry(entry: TokenLogprobs) -> dict[str, Any]:
    top = [{"token": token, "logprob": logprob} for token, logprob in entry.top]
    return {"token": entry.token, "logprob": entry.logprob, "top": top}
