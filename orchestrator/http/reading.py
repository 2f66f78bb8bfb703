"""Bodies read into requests of `orchestrator.jobs`, which checks them for all doors alike."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.http.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    Generating,
    JsonObjectFormat,
    JsonSchemaFormat,
    TextPart,
)
from orchestrator.jobs import Request
from outrider.domain import Grammar, GrammarKind, SamplingParams
from outrider.errors import InvalidRequest

COMPLETION_TOKENS = 16
"""What /v1/completions generates if nothing is said, as OpenAI's does."""

# The doors' names for what `jobs` and `domain` call otherwise.
_NAMES = {
    "sampling.grammar.json_schema": "response_format",
    "sampling.tokens_min": "min_tokens",
    "stop_ids": "stop_token_ids",
    "token_ids": "prompt",
    "prompt_logprobs": "logprobs",
    "generation_id": "last-event-id",
    "choices.choice": "last-event-id",
    "choices.digest": "last-event-id",
}


@dataclass(frozen=True, slots=True)
class Form:
    """How the client wants the answer."""

    chat: bool
    stream: bool
    usage_last: bool
    usage_always: bool
    echo: bool
    logprobs: int | None
    """Alternatives to name beside each token; None: no log-probabilities."""
    token_ids: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A body that made sense so far."""

    model: str
    requests: tuple[Request, ...]
    """One for each prompt."""
    form: Form


def read_completion(body: CompletionRequest, tenant: str) -> Asked:
    """Read a body of /v1/completions. Raises `InvalidRequest`."""
    logprobs = body.logprobs
    requests = tuple(
        _request(
            body,
            tenant,
            tokens_max=body.max_tokens or COMPLETION_TOKENS,
            logprobs=logprobs,
            prompt=one if isinstance(one, str) else None,
            token_ids=None if isinstance(one, str) else tuple(one),
            prompt_logprobs=logprobs if body.echo else None,
        )
        for one in _prompts(body)
    )
    return Asked(body.model, requests, _form(body, chat=False, logprobs=logprobs, echo=body.echo))


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    if isinstance(body.prompt, str):
        return [body.prompt]
    parts: Sequence[int | str | list[int]] = body.prompt
    ids = [part for part in parts if isinstance(part, int)]
    return [ids] if ids else [part for part in parts if not isinstance(part, int)]


def read_chat(body: ChatCompletionRequest, tenant: str) -> Asked:
    """Read a body of /v1/chat/completions. Raises `InvalidRequest`."""
    tokens_max = body.max_completion_tokens or body.max_tokens
    if body.max_tokens not in (None, tokens_max):
        raise InvalidRequest("max_tokens", "must equal max_completion_tokens if both are given")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs to be true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    chat = tuple(
        # Templates know the developer by his older name.
        ("system" if turn.role == "developer" else turn.role, _text(turn.content))
        for turn in body.messages
    )
    request = _request(body, tenant, tokens_max=tokens_max, logprobs=logprobs, chat=chat)
    return Asked(body.model, (request,), _form(body, chat=True, logprobs=logprobs, echo=None))


def field_name(field: str, *, chat: bool) -> str:
    """Translate the name of a field at fault into the one that the client used."""
    if field in _NAMES:
        return _NAMES[field]
    if field in ("chat", "chat.messages"):
        return "messages"
    if field == "tokens_max":
        return "max_completion_tokens" if chat else "max_tokens"
    return field.removeprefix("sampling.")


def _form(body: Generating, *, chat: bool, logprobs: int | None, echo: bool | None) -> Form:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("stream_options", "is only allowed if stream is true")
    return Form(
        chat=chat,
        stream=bool(body.stream),
        usage_last=options is not None and options.include_usage,
        usage_always=options is not None and options.continuous_usage_stats,
        echo=bool(echo),
        logprobs=logprobs,
        token_ids=bool(body.return_token_ids),
    )


def _request(
    body: Generating,
    tenant: str,
    *,
    tokens_max: int | None,
    logprobs: int | None,
    prompt: str | None = None,
    chat: tuple[tuple[str, str], ...] | None = None,
    token_ids: tuple[int, ...] | None = None,
    prompt_logprobs: int | None = None,
) -> Request:
    speculation = body.speculative is None or body.speculative.enabled
    if body.prediction is not None and not speculation:
        raise InvalidRequest("prediction", "needs speculation, which speculative.enabled turns off")
    timeline = body.speculative is not None and body.speculative.timeline
    if timeline:
        _check_timeline(body)
    stop = body.stop or ()
    return Request(
        tenant=tenant,
        # Signed as in JSON, unsigned as in ours: the same 64 bits.
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        prompt=prompt,
        chat=chat,
        token_ids=token_ids,
        sampling=_sampling(body),
        n=body.n or 1,
        tokens_max=tokens_max,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        speculation=speculation,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        cache_salt=body.cache_salt or "",
        prediction=_text(body.prediction.content) if body.prediction is not None else "",
        trace=timeline,
    )


def _check_timeline(body: Generating) -> None:
    """Refuse what has no place for a timeline: it comes with the metrics of a single choice."""
    several = isinstance(body, CompletionRequest) and len(_prompts(body)) > 1
    if several or (body.n or 1) > 1:
        raise InvalidRequest("speculative.timeline", "is kept of one choice of one prompt only")
    options = body.stream_options
    if body.stream and not (options is not None and options.include_usage):
        text = "needs stream_options.include_usage in a stream: it comes with the usage"
        raise InvalidRequest("speculative.timeline", text)


def _sampling(body: Generating) -> SamplingParams:
    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        if (value := getattr(body, name)) is not None
    }
    return SamplingParams(
        **given,
        top_k=max(0, body.top_k or 0),
        logit_bias=_biases(body.logit_bias or {}),
        tokens_min=body.min_tokens or 0,
        grammar=_grammar(body),
    )


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    by_id = {int(token): bias for token, bias in biases.items()}
    if len(by_id) < len(biases):
        raise InvalidRequest("logit_bias", "names an id twice")
    return tuple(sorted(by_id.items()))


def _grammar(body: Generating) -> Grammar | None:
    match body.response_format:
        case JsonObjectFormat():
            return Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
        case JsonSchemaFormat(json_schema=wanted):
            return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(wanted.schema_))
        case _:
            return None


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
