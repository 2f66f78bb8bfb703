"""A client's data to protobuf and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from outrider import wire
from outrider.client.types import (
    Delta,
    Event,
    Finished,
    PromptTokens,
    Request,
    Started,
    Worker,
)
from outrider.domain import FinishReason, TokenLogprobs, Usage
from outrider.errors import InternalError, InvalidRequest
from outrider.v1 import generation_pb2, types_pb2


def request_to_pb(request: Request) -> generation_pb2.GenerateRequest:
    """Convert a request. Raises `InvalidRequest` for what protobuf cannot carry."""
    given = [name for name in ("prompt", "chat", "token_ids") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest("prompt", "give exactly one of prompt, chat and token_ids")
    message = generation_pb2.GenerateRequest(
        model=request.model,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        speculation=request.speculation,
        cache_salt=request.cache_salt,
        trace=request.trace,
        resumable=request.resumable,
    )
    if request.prompt is not None:
        message.prompt = request.prompt
    for role, content in request.chat or ():
        message.chat.messages.add(role=role, content=content)
    if request.chat is not None:
        message.chat.SetInParent()
    _add_sampling(message, request)
    for name in ("seed", "tokens_max", "n", "logprobs", "prompt_logprobs"):
        value = getattr(request, name)
        if value is not None:
            _assign(name, message, name, value)
    _extend("stop_ids", message.stop_ids, request.stop_ids)
    if request.token_ids is not None:
        message.token_ids.SetInParent()
        _extend("token_ids", message.token_ids.ids, request.token_ids)
    return message


_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "tokens_min",
)


def _add_sampling(message: generation_pb2.GenerateRequest, request: Request) -> None:
    for name in _SAMPLING:
        value = getattr(request, name)
        if value is not None:
            _assign(f"sampling.{name}", message.sampling, name, value)
    for token, bias in request.logit_bias.items():
        try:
            message.sampling.logit_bias[token] = bias
        except (ValueError, TypeError):
            raise InvalidRequest(
                "sampling.logit_bias", f"wants ids and numbers, got {token!r}: {bias!r}"
            ) from None
    if request.json_schema is not None and request.regex is not None:
        raise InvalidRequest("sampling.grammar", "give at most one of json_schema and regex")
    if request.json_schema is not None:
        message.sampling.grammar.json_schema = _json_text(request.json_schema)
    if request.regex is not None:
        message.sampling.grammar.regex = request.regex


def _json_text(schema: str | Mapping[str, Any]) -> str:
    if isinstance(schema, str):
        return schema
    try:
        return json.dumps(schema)
    except (ValueError, TypeError) as error:
        raise InvalidRequest("sampling.grammar.json_schema", f"is no JSON: {error}") from None


def _assign(
    field_name: str,
    message: object,
    name: str,
    value: float,
) -> None:
    try:
        setattr(message, name, value)
    except (ValueError, TypeError):
        raise InvalidRequest(field_name, f"{value!r} is out of range") from None


def _extend(field_name: str, target: object, ids: Sequence[int]) -> None:
    try:
        target.extend(ids)  # type: ignore[attr-defined]  # repeated field of protobuf
    except (ValueError, TypeError):
        raise InvalidRequest(field_name, "ids must lie between 0 and 2**32 - 1") from None


def event_from_pb(response: generation_pb2.GenerateResponse) -> Event:
    """Convert what the server says. Raises `InternalError` for what a newer one may say."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                started.generation_id,
                started.model,
                started.prompt_tokens,
                started.seed,
                started.model_fingerprint,
                started.resumable,
            )
        case "prompt_logprobs":
            return PromptTokens(_logprobs(response.prompt_logprobs.tokens))
        case "delta":
            delta = response.delta
            return Delta(
                delta.text,
                tuple(delta.token_ids),
                tuple(delta.sources),
                delta.choice,
                _logprobs(delta.logprobs),
            )
        case "finished":
            finished = response.finished
            return Finished(
                wire.finish_reason_from_pb(finished.reason) or FinishReason.ABORTED,
                Usage(finished.usage.prompt_tokens, finished.usage.completion_tokens),
                wire.counters_from_pb(finished.speculation),
                finished.timings.first_token_s,
                finished.timings.total_s,
                finished.choice,
                finished.trace,
                dict(finished.proposers),
            )
        case _:
            raise InternalError("the server sent an event that this client does not know")


def _logprobs(tokens: Iterable[types_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(wire.token_logprobs_from_pb(token) for token in tokens)


def list_workers_to_pb(placement_of: Request | None) -> generation_pb2.ListWorkersRequest:
    """Ask for the workers, and perhaps for what placing a request would cost."""
    asked = None if placement_of is None else request_to_pb(placement_of)
    return generation_pb2.ListWorkersRequest(placement_of=asked)


def worker_from_pb(status: generation_pb2.WorkerStatus) -> Worker:
    """Convert a worker's state."""
    return Worker(
        status.role,
        status.address,
        status.state,
        status.reason,
        wire.model_info_from_pb(status.info) if status.HasField("info") else None,
        status.sessions,
        status.incarnation,
        status.step_s,
        status.kv_tokens_used,
        status.waiting,
        status.placement,
    )
