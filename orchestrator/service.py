"""gRPC front door: reads requests, streams generations."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc.aio

from orchestrator.client_stream import ClientStream
from orchestrator.config import DriverConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.generation import Delivery, Ending, Generation, Output
from orchestrator.jobs import Job, Request, job_of, model_named
from orchestrator.messages import DeliverPrompt
from orchestrator.resuming import EMPTY_DIGEST, ResumePoint, ResumeRequest
from orchestrator.takeover import Takeover
from outrider import wire
from outrider.domain import Origin
from outrider.errors import InvalidRequest
from outrider.serving.origins import REQUEST_ID_KEY, answering, origin_of
from outrider.serving.server import Server
from outrider.serving.status import status_of_errors
from outrider.serving.telemetry import Tracing
from outrider.v1 import generation_pb2, generation_pb2_grpc

SERVICE_NAMES = ("outrider.v1.GenerationService",)
TENANT_KEY = "outrider-tenant"
"""Metadata in which a trusted front names the tenant; nobody's without."""

_Response = generation_pb2.GenerateResponse


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Servicer of GenerationService."""

    def __init__(
        self,
        driver: Driver,
        fleet: Fleet,
        config: DriverConfig,
        takeover: Takeover | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Without a `takeover` nothing can be resumed."""
        self._tracing = tracing
        self._driver = driver
        self._takeover = takeover or Takeover(driver, fleet, None)
        self._fleet = fleet
        self._config = config

    def register(self, server: Server) -> None:
        """Serve on `server`."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, server.grpc)

    # Writing by hand, not by `yield`, is what lets a writer give up.
    async def Generate(  # type: ignore[override]
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Generate what was asked for and stream it; leaving early frees both fleets."""
        async with self._answering(context, "Generate") as origin:
            # Before it is read: what is refused must cost those who are served next to nothing.
            if request.n <= self._config.sessions_max:  # More is no matter of trying again.
                self._driver.check_room(max(1, request.n))
            info = model_named(request.model, self._fleet.models())
            asked = _request(request, self._config, _tenant(context))
            job = job_of(asked, info, self._fleet.codec(info), self._config)
            prefix = await self._driver.placer.find(job)
            generation = self._driver.generate(job, prefix, origin)
            with self._stream(context) as stream:
                await self._tell(job, generation, stream.write)

    async def Resume(  # type: ignore[override]
        self,
        request: generation_pb2.ResumeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Continue a generation whose stream broke, from where its client stands."""
        async with self._answering(context, "Resume") as origin:
            asked = _resume_request(request, _tenant(context))
            job, generation = await self._takeover.resume(asked, origin)
            with self._stream(context) as stream:

                async def say(response: _Response) -> None:
                    await stream.write(generation_pb2.ResumeResponse(response=response))

                await self._tell(job, generation, say)

    @contextlib.asynccontextmanager
    async def _answering(
        self, context: grpc.aio.ServicerContext[Any, Any], method: str
    ) -> AsyncIterator[Origin]:
        """Name the request, in logs, traces and the answer's trailer; errors become a status."""
        origin = origin_of(_metadata(context))
        context.set_trailing_metadata(((REQUEST_ID_KEY, origin.request_id),))
        async with status_of_errors(context):
            with answering(self._tracing, f"{SERVICE_NAMES[0]}/{method}", origin) as request:
                yield request.origin

    def _stream(
        self, context: grpc.aio.ServicerContext[Any, Any]
    ) -> contextlib.closing[ClientStream]:
        return contextlib.closing(ClientStream(context.write, self._config.write_timeout_s))

    async def _tell(
        self, job: Job, generation: Generation, say: Callable[[_Response], Awaitable[None]]
    ) -> None:
        """Say all that there is to say; raises what the generation failed with."""
        started = False
        try:
            while outputs := await generation.take():
                for response in _responses(outputs, job, generation, started=started):
                    await say(response)
                started = True
        finally:
            self._driver.abandon(generation)

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
        async with status_of_errors(context):
            placements = await self._placements(request)
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
                kv_tokens_used=status.kv_tokens_used,
                waiting=status.waiting,
                placement=placements.get(status.address, ""),
            )
        return response

    async def _placements(self, request: generation_pb2.ListWorkersRequest) -> dict[str, str]:
        """What placing the request that is asked about would cost, by address."""
        if not request.HasField("placement_of"):
            return {}
        info = model_named(request.placement_of.model, self._fleet.models())
        asked = _request(request.placement_of, self._config, "")
        job = job_of(asked, info, self._fleet.codec(info), self._config)
        placer = self._driver.placer
        weighed = placer.weigh(await placer.find(job), info.model, len(job.prompt))
        return {one.view.address: one.reason for one in weighed}


def _request(message: generation_pb2.GenerateRequest, config: DriverConfig, tenant: str) -> Request:
    """Read a message. Raises `InvalidRequest` for one that is too large or that makes no sense."""
    size = message.ByteSize()
    if size > config.prompt_bytes_max:
        raise InvalidRequest(
            message.WhichOneof("input") or "request",
            f"the message has {size} bytes; at most {config.prompt_bytes_max} are taken",
        )
    given = {field.name: value for field, value in message.ListFields()}
    chat = [(turn.role, turn.content) for turn in message.chat.messages]
    return Request(
        prompt=given.get("prompt"),
        chat=tuple(chat) if "chat" in given else None,
        token_ids=tuple(message.token_ids.ids) if "token_ids" in given else None,
        sampling=wire.sampling_from_pb(message.sampling),
        seed=given.get("seed", secrets.randbits(63)),
        n=given.get("n", 1),
        tokens_max=given.get("tokens_max"),
        stop=tuple(message.stop),
        stop_ids=tuple(message.stop_ids),
        ignore_eos=message.ignore_eos,
        speculation=given.get("speculation", True),
        logprobs=given.get("logprobs"),
        prompt_logprobs=given.get("prompt_logprobs"),
        cache_salt=message.cache_salt,
        trace=message.trace,
        tenant=tenant,
        resumable=given.get("resumable", True),
    )


def _resume_request(message: generation_pb2.ResumeRequest, tenant: str) -> ResumeRequest:
    points = {
        point.choice: ResumePoint(
            point.offset,
            point.digest if point.offset else EMPTY_DIGEST,
            point.characters if point.HasField("characters") else None,
            point.finished,
        )
        for point in message.choices
    }
    return ResumeRequest(message.generation_id, tenant, points, message.prompt_logprobs_known)


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    return {
        key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
    }


def _tenant(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    return _metadata(context).get(TENANT_KEY, "")


def _responses(
    outputs: list[Output], job: Job, generation: Generation, *, started: bool
) -> Iterator[_Response]:
    """Yield what to say of outputs; raises the error that is among them."""
    for output in outputs:
        if isinstance(output, Exception):
            raise output
        # Only now: an error before the first output is a status, not a stream.
        if not started:
            yield _started(job, generation)
            started = True
        yield _response(output, len(job.prompt))


def _started(job: Job, generation: Generation) -> _Response:
    return _Response(
        started=generation_pb2.GenerationStarted(
            generation_id=generation.id,
            model=job.info.model,
            prompt_tokens=len(job.prompt),
            seed=job.seed,
            model_fingerprint=job.info.model_fingerprint,
            resumable=generation.record is not None,
        )
    )


def _response(output: DeliverPrompt | Delivery | Ending, prompt_tokens: int) -> _Response:
    match output:
        case Delivery(choice, deliver):
            # The hot path: filled in place, which is twice as fast as by arguments. Setting the
            # text makes it a delta, even if all is default.
            response = _Response()
            delta = response.delta
            delta.text = deliver.text
            delta.token_ids.extend(deliver.token_ids)
            delta.sources.extend(deliver.sources)
            if choice:
                delta.choice = choice
            if deliver.logprobs:
                delta.logprobs.extend(map(wire.token_logprobs_to_pb, deliver.logprobs))
            return response
        case DeliverPrompt(tokens):
            return _Response(
                prompt_logprobs=generation_pb2.PromptLogprobs(
                    tokens=[wire.token_logprobs_to_pb(token) for token in tokens]
                )
            )
        case Ending(choice, finish):
            return _Response(
                finished=generation_pb2.GenerationFinished(
                    reason=wire.finish_reason_to_pb(finish.reason),
                    usage=generation_pb2.Usage(
                        prompt_tokens=prompt_tokens, completion_tokens=finish.completion_tokens
                    ),
                    speculation=wire.counters_to_pb(finish.counters),
                    timings=generation_pb2.GenerationTimings(
                        first_token_s=output.first_token_s, total_s=output.total_s
                    ),
                    choice=choice,
                    trace=output.trace,
                    proposers=output.proposers,
                )
            )
