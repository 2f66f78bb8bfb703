"""gRPC front door: checks and tokenizes requests, streams generations."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from orchestrator.config import DriverConfig
from orchestrator.driver import Driver, Ending, Job
from orchestrator.fleet import Fleet
from orchestrator.messages import Deliver
from orchestrator.text import TextCodec
from outrider import wire
from outrider.domain import ModelInfo
from outrider.errors import InvalidRequest, Unavailable, UnknownModel
from outrider.serving.server import Server
from outrider.serving.status import status_of_errors
from outrider.v1 import generation_pb2, generation_pb2_grpc

SERVICE_NAMES = ("outrider.v1.GenerationService",)

_Response = generation_pb2.GenerateResponse


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Servicer of GenerationService."""

    def __init__(self, driver: Driver, fleet: Fleet, config: DriverConfig) -> None:
        self._driver = driver
        self._fleet = fleet
        self._config = config

    def register(self, server: Server) -> None:
        """Serve on `server`."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, server.grpc)

    async def Generate(
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Generate one continuation and stream it; leaving early frees both fleets."""
        async with status_of_errors(context):
            info = self._model(request.model)
            job = job_of(request, info, self._fleet.codec(info), self._config)
            generation = self._driver.generate(job)
            try:
                started = False
                async for output in generation.outputs():
                    if isinstance(output, Exception):
                        raise output
                    # Only now: an error before the first output is a status, not a stream.
                    if not started:
                        yield _started(job, info)
                        started = True
                    yield _response(output, len(job.prompt))
            finally:
                self._driver.abandon(generation)

    def _model(self, name: str) -> ModelInfo:
        models = self._fleet.models()
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

    async def ListModels(
        self,
        request: generation_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> generation_pb2.ListModelsResponse:
        """The models that can be asked for."""
        return generation_pb2.ListModelsResponse(
            models=[wire.model_info_to_pb(info) for info in self._fleet.models().values()]
        )

    async def ListWorkers(
        self,
        request: generation_pb2.ListWorkersRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> generation_pb2.ListWorkersResponse:
        """The workers, and why some are not used."""
        response = generation_pb2.ListWorkersResponse()
        for status in self._fleet.statuses():
            response.workers.add(
                role=status.role,
                address=status.address,
                state=status.state,
                reason=status.reason,
                info=wire.model_info_to_pb(status.info) if status.info else None,
                sessions=status.sessions,
                incarnation=status.incarnation,
                step_s=status.step_s,
            )
        return response


def job_of(
    request: generation_pb2.GenerateRequest,
    info: ModelInfo,
    codec: TextCodec,
    config: DriverConfig,
) -> Job:
    """Check a request and tokenize it. Raises `InvalidRequest` naming the field."""
    size = request.ByteSize()
    if size > config.prompt_bytes_max:
        raise InvalidRequest(
            request.WhichOneof("input") or "request",
            f"the message has {size} bytes; at most {config.prompt_bytes_max} are taken",
        )
    _check_stops(request, info, config)
    prompt = _prompt(request, info, codec)
    room = info.length_max - len(prompt)
    if room < 1:
        raise InvalidRequest(
            request.WhichOneof("input") or "request",
            f"the prompt has {len(prompt)} tokens; the context of {info.model} holds "
            f"{info.length_max}, output included",
        )
    tokens_max = request.tokens_max if request.HasField("tokens_max") else room
    if tokens_max < 1:
        raise InvalidRequest("tokens_max", "must be at least 1")
    if tokens_max > room:
        raise InvalidRequest(
            "tokens_max",
            f"{tokens_max} output tokens do not fit: the prompt has {len(prompt)} tokens and the "
            f"context of {info.model} holds {info.length_max}, so at most {room}",
        )
    return Job(
        info=info,
        prompt=prompt,
        sampling=wire.sampling_from_pb(request.sampling),
        seed=request.seed if request.HasField("seed") else secrets.randbits(63),
        tokens_max=tokens_max,
        stop=tuple(request.stop),
        stop_ids=frozenset(request.stop_ids),
        ignore_eos=request.ignore_eos,
        speculation=request.speculation if request.HasField("speculation") else True,
    )


def _check_stops(
    request: generation_pb2.GenerateRequest, info: ModelInfo, config: DriverConfig
) -> None:
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


def _prompt(
    request: generation_pb2.GenerateRequest, info: ModelInfo, codec: TextCodec
) -> tuple[int, ...]:
    match request.WhichOneof("input"):
        case "prompt":
            field, prompt = "prompt", codec.encode(request.prompt) if request.prompt else ()
        case "chat":
            messages = [(message.role, message.content) for message in request.chat.messages]
            if not messages:
                raise InvalidRequest("chat.messages", "must hold at least one message")
            field, prompt = "chat", codec.encode_chat(messages)
        case "token_ids":
            field, prompt = "token_ids", tuple(request.token_ids.ids)
        case _:
            raise InvalidRequest("prompt", "one of prompt, chat or token_ids must be given")
    if not prompt:
        raise InvalidRequest(field, "is empty; give at least one token to continue")
    _check_ids(field, prompt, info)
    return prompt


def _check_ids(field: str, ids: Any, info: ModelInfo) -> None:
    wrong = next((token for token in ids if token >= info.vocabulary_size), None)
    if wrong is not None:
        raise InvalidRequest(
            field, f"id {wrong} is outside the vocabulary of {info.vocabulary_size} ids"
        )


def _started(job: Job, info: ModelInfo) -> _Response:
    return _Response(
        started=generation_pb2.GenerationStarted(
            generation_id=f"gen-{uuid.uuid4().hex}",
            model=info.model,
            prompt_tokens=len(job.prompt),
            seed=job.seed,
            model_fingerprint=info.model_fingerprint,
        )
    )


def _response(output: Deliver | Ending, prompt_tokens: int) -> _Response:
    if isinstance(output, Deliver):
        return _Response(
            delta=generation_pb2.GenerationDelta(
                text=output.text, token_ids=output.token_ids, sources=output.sources
            )
        )
    return _Response(
        finished=generation_pb2.GenerationFinished(
            reason=wire.finish_reason_to_pb(output.finish.reason),
            usage=generation_pb2.Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=output.finish.completion_tokens,
            ),
            speculation=wire.counters_to_pb(output.finish.counters),
            timings=generation_pb2.GenerationTimings(
                first_token_s=output.first_token_s, total_s=output.total_s
            ),
        )
    )
