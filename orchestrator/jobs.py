"""Requests checked and turned into jobs, whatever door they came in by. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.config import DriverConfig
from orchestrator.text import TextCodec
from outrider.domain import ModelInfo, SamplingParams, SessionSpec, session_seed
from outrider.errors import InvalidRequest, Unavailable, UnknownModel


@dataclass(frozen=True, slots=True)
class Request:
    """One request as a front door understood it, not yet checked against model and limits.

    Exactly one of prompt, chat and token_ids is given.
    """

    seed: int
    """uint64; doors draw one if the client gave none."""
    prompt: str | None = None
    chat: tuple[tuple[str, str], ...] | None = None
    """(role, content), oldest first."""
    token_ids: tuple[int, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    """Continuations to generate."""
    tokens_max: int | None = None
    """None: up to the end of the context."""
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    speculation: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    trace: bool = False
    tenant: str = ""
    """Who asks, as the door found out; only the same one may resume."""
    resumable: bool = True
    """False: nothing of it is kept outside this process."""
    prediction: str = ""
    """Text that the output may repeat."""

    @property
    def input_field(self) -> str:
        """Name of the field that holds the prompt, for errors."""
        names = ("prompt", "chat", "token_ids")
        return next((name for name in names if getattr(self, name) is not None), "prompt")


@dataclass(frozen=True, slots=True)
class Job:
    """A checked and tokenized request."""

    info: ModelInfo
    seed: int
    """The request's; those of the choices are derived from it."""
    choices: tuple[SessionSpec, ...]
    """A session for each continuation, by choice; the driver numbers them."""
    stop: tuple[str, ...]
    speculation: bool
    trace: bool = False
    """Timelines of the sessions are wanted."""
    tenant: str = ""
    resumable: bool = True
    """It may be journaled."""
    prediction: tuple[int, ...] = ()
    """Ids that the output may repeat."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """Ids of the prompt, which all choices share."""
        return self.choices[0].prompt

    @property
    def prompt_logprobs(self) -> bool:
        """True if log-probabilities of the prompt's tokens are wanted."""
        return self.choices[0].prompt_logprobs is not None


def model_named(name: str, models: Mapping[str, ModelInfo]) -> ModelInfo:
    """Return the model asked for; no name is enough where there is only one.

    Raises `UnknownModel`, `InvalidRequest`, or `Unavailable` if there is no model at all.
    """
    if not models:
        raise Unavailable("no verifier is ready; try again in a moment")
    served = ", ".join(sorted(models))
    if not name:
        if len(models) > 1:
            raise InvalidRequest("model", f"must be given, one of: {served}")
        return next(iter(models.values()))
    if name not in models:
        raise UnknownModel("model", f"no verifier serves {name!r}; served: {served}")
    return models[name]


def job_of(request: Request, info: ModelInfo, codec: TextCodec, config: DriverConfig) -> Job:
    """Check a request and tokenize it. Raises `InvalidRequest` naming the field."""
    _check_choices(request.n, config)
    _check_stops(request, info, config)
    _check_ids("sampling.logit_bias", (token for token, _ in request.sampling.logit_bias), info)
    prompt = _prompt(request, info, codec)
    first = SessionSpec(
        session=0,
        epoch=0,
        prompt=prompt,
        committed=(),
        sampling=request.sampling,
        seed=session_seed(request.seed, 0),
        tokens_max=_tokens_max(request, len(prompt), info),
        stop_ids=frozenset(request.stop_ids),
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        cache_salt=request.cache_salt,
    )
    if request.tenant:  # What was asked for has been checked by now.
        first = replace(first, cache_salt=_salt_within(request.tenant, request.cache_salt))
    others = (
        # The prompt is the same for all: it is scored once.
        replace(first, seed=session_seed(request.seed, choice), prompt_logprobs=None)
        for choice in range(1, request.n)
    )
    return Job(
        info,
        request.seed,
        (first, *others),
        request.stop,
        request.speculation,
        request.trace,
        request.tenant,
        request.resumable,
        prediction=codec.encode_prediction(request.prediction) if request.prediction else (),
    )


def _check_choices(count: int, config: DriverConfig) -> None:
    # More than all sessions at once would be refused for lack of room for ever.
    most = min(config.choices_max, config.sessions_max)
    if not 1 <= count <= most:
        raise InvalidRequest("n", f"must lie between 1 and {most}, got {count}")


def _salt_within(tenant: str, salt: str) -> str:
    """Keep what one tenant has cached from being felt by another, whatever salts they choose."""
    return hashlib.sha256(json.dumps([tenant, salt]).encode()).hexdigest()


def _tokens_max(request: Request, prompt_tokens: int, info: ModelInfo) -> int:
    room = info.length_max - prompt_tokens
    if room < 1:
        raise InvalidRequest(
            request.input_field,
            f"the prompt has {prompt_tokens} tokens; the context of {info.model} holds "
            f"{info.length_max}, output included",
        )
    if request.tokens_max is None:
        return room
    if request.tokens_max < 1:
        raise InvalidRequest("tokens_max", "must be at least 1")
    if request.tokens_max > room:
        raise InvalidRequest(
            "tokens_max",
            f"{request.tokens_max} output tokens do not fit: the prompt has {prompt_tokens} tokens "
            f"and the context of {info.model} holds {info.length_max}, so at most {room}",
        )
    return request.tokens_max


def _check_stops(request: Request, info: ModelInfo, config: DriverConfig) -> None:
    if len(request.stop) > config.stop_strings_max:
        raise InvalidRequest("stop", f"at most {config.stop_strings_max} stop strings are taken")
    for text in request.stop:
        if not text:
            raise InvalidRequest("stop", "a stop string must not be empty")
        if len(text.encode()) > config.stop_bytes_max:
            raise InvalidRequest("stop", f"a stop string has at most {config.stop_bytes_max} bytes")
    if len(request.stop_ids) > config.stop_ids_max:
        raise InvalidRequest("stop_ids", f"at most {config.stop_ids_max} are taken")
    _check_ids("stop_ids", request.stop_ids, info)


def _prompt(request: Request, info: ModelInfo, codec: TextCodec) -> tuple[int, ...]:
    if request.token_ids is not None:
        prompt = request.token_ids
    elif request.chat is not None:
        if not request.chat:
            raise InvalidRequest("chat.messages", "must hold at least one message")
        prompt = codec.encode_chat(request.chat)
    elif request.prompt is not None:
        prompt = codec.encode(request.prompt) if request.prompt else ()
    else:
        raise InvalidRequest("prompt", "one of prompt, chat or token_ids must be given")
    if not prompt:
        raise InvalidRequest(request.input_field, "is empty; give at least one token to continue")
    _check_ids(request.input_field, prompt, info)
    return prompt


def _check_ids(field_name: str, ids: Iterable[int], info: ModelInfo) -> None:
    wrong = next((token for token in ids if token >= info.vocabulary_size), None)
    if wrong is not None:
        raise InvalidRequest(
            field_name, f"id {wrong} is outside the vocabulary of {info.vocabulary_size} ids"
        )
