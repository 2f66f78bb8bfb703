"""Client library: generate text through an orchestrator, asyncio and sync.

    with Client("localhost:50050") as client:
        for event in client.generate(chat=[("user", "Hello!")], temperature=0):
            if isinstance(event, Delta):
                print(event.text, end="")

Errors are those of `outrider.errors`: a wrong field raises `InvalidRequest`, a full service
`Exhausted`, an unreachable one `Unavailable`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeAlias

import grpc
import grpc.aio

from outrider import wire
from outrider.domain import FinishReason, ModelInfo, SpeculationCounters, Usage
from outrider.errors import InternalError, InvalidRequest, OutriderError, Unavailable
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.serving.status import error_of_status
from outrider.v1 import generation_pb2, generation_pb2_grpc

CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """One generation to ask for; exactly one of prompt, chat and token_ids is given.

    None leaves the server's default: temperature 1, no filters, output up to the end of the
    context, a seed drawn by the server and reported.
    """

    prompt: str | None = None
    chat: Sequence[tuple[str, str]] | None = None
    """(role, content), oldest first."""
    token_ids: Sequence[int] | None = None
    model: str = ""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    tokens_max: int | None = None
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    speculation: bool = True


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted."""

    generation_id: str
    model: str
    prompt_tokens: int
    seed: int
    model_fingerprint: str


@dataclass(frozen=True, slots=True)
class Delta:
    """More output."""

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[int, ...]
    """For each id the drafter that guessed it; 0 is the target itself."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of the output."""

    reason: FinishReason
    usage: Usage
    speculation: SpeculationCounters
    first_token_s: float
    """From admission to the first token, as the orchestrator saw it."""
    total_s: float


Event: TypeAlias = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole generation."""

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[int, ...]
    started: Started
    finished: Finished


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as the orchestrator sees it."""

    role: str
    address: str
    state: str
    reason: str
    info: ModelInfo | None
    sessions: int
    incarnation: str
    step_s: float
    """Duration of a verifier's last step in seconds; 0 until known."""


class AsyncClient:
    """asyncio client; one channel, any number of generations at once."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; generations under way are cancelled."""
        await self._channel.close()

    async def generate(
        self, request: Request, *, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """Stream one generation. Leaving the iteration early cancels it."""
        call = self._stub.Generate(_request_to_pb(request), timeout=timeout_s)
        try:
            async for response in call:
                yield _event(response)
        except grpc.aio.AioRpcError as error:
            raise _error_at(self._address, error) from None
        finally:
            call.cancel()

    async def complete(self, request: Request, *, timeout_s: float | None = None) -> Completion:
        """Run one generation to its end."""
        collector = _Collector()
        async for event in self.generate(request, timeout_s=timeout_s):
            collector.add(event)
        return collector.completion()

    async def models(self) -> tuple[ModelInfo, ...]:
        """List the models that can be asked for."""
        try:
            answer = await self._stub.ListModels(
                generation_pb2.ListModelsRequest(), timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _error_at(self._address, error) from None
        return tuple(wire.model_info_from_pb(info) for info in answer.models)

    async def workers(self) -> tuple[Worker, ...]:
        """List the workers, and why some are not used."""
        try:
            answer = await self._stub.ListWorkers(
                generation_pb2.ListWorkersRequest(), timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _error_at(self._address, error) from None
        return tuple(_worker(status) for status in answer.workers)


class Client:
    """Blocking client; may be shared by threads."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; generations under way are cancelled."""
        self._channel.close()

    def generate(self, request: Request, *, timeout_s: float | None = None) -> Iterator[Event]:
        """Stream one generation. Leaving the iteration early cancels it."""
        call = self._stub.Generate(_request_to_pb(request), timeout=timeout_s)
        try:
            for response in call:
                yield _event(response)
        except grpc.RpcError as error:
            raise _error_at(self._address, error) from None
        finally:
            call.cancel()

    def complete(self, request: Request, *, timeout_s: float | None = None) -> Completion:
        """Run one generation to its end."""
        collector = _Collector()
        for event in self.generate(request, timeout_s=timeout_s):
            collector.add(event)
        return collector.completion()

    def models(self) -> tuple[ModelInfo, ...]:
        """List the models that can be asked for."""
        try:
            answer = self._stub.ListModels(
                generation_pb2.ListModelsRequest(), timeout=CALL_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise _error_at(self._address, error) from None
        return tuple(wire.model_info_from_pb(info) for info in answer.models)

    def workers(self) -> tuple[Worker, ...]:
        """List the workers, and why some are not used."""
        try:
            answer = self._stub.ListWorkers(
                generation_pb2.ListWorkersRequest(), timeout=CALL_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise _error_at(self._address, error) from None
        return tuple(_worker(status) for status in answer.workers)


def _error_at(address: str, error: grpc.RpcError) -> OutriderError:
    ours = error_of_status(error)
    if isinstance(ours, Unavailable) and "connect" in str(ours):
        return Unavailable(f"no orchestrator answers at {address}; is it running? ({ours})")
    return ours


@dataclass(slots=True)
class _Collector:
    """Adds up the events of a generation."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None

    def add(self, event: Event) -> None:
        match event:
            case Started():
                self.started = event
            case Delta():
                self.texts.append(event.text)
                self.token_ids.extend(event.token_ids)
                self.sources.extend(event.sources)
            case Finished():
                self.finished = event

    def completion(self) -> Completion:
        if self.started is None or self.finished is None:
            raise InternalError("the stream ended before the generation did")
        return Completion(
            "".join(self.texts),
            tuple(self.token_ids),
            tuple(self.sources),
            self.started,
            self.finished,
        )


def _request_to_pb(request: Request) -> generation_pb2.GenerateRequest:
    given = [name for name in ("prompt", "chat", "token_ids") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest("prompt", "give exactly one of prompt, chat and token_ids")
    message = generation_pb2.GenerateRequest(
        model=request.model,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        speculation=request.speculation,
    )
    if request.prompt is not None:
        message.prompt = request.prompt
    for role, content in request.chat or ():
        message.chat.messages.add(role=role, content=content)
    if request.chat is not None:
        message.chat.SetInParent()
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = getattr(request, name)
        if value is not None:
            _assign(f"sampling.{name}", message.sampling, name, value)
    for name in ("seed", "tokens_max"):
        value = getattr(request, name)
        if value is not None:
            _assign(name, message, name, value)
    _extend("stop_ids", message.stop_ids, request.stop_ids)
    if request.token_ids is not None:
        message.token_ids.SetInParent()
        _extend("token_ids", message.token_ids.ids, request.token_ids)
    return message


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


def _event(response: generation_pb2.GenerateResponse) -> Event:
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                started.generation_id,
                started.model,
                started.prompt_tokens,
                started.seed,
                started.model_fingerprint,
            )
        case "delta":
            delta = response.delta
            return Delta(delta.text, tuple(delta.token_ids), tuple(delta.sources))
        case "finished":
            finished = response.finished
            return Finished(
                wire.finish_reason_from_pb(finished.reason) or FinishReason.ABORTED,
                Usage(finished.usage.prompt_tokens, finished.usage.completion_tokens),
                wire.counters_from_pb(finished.speculation),
                finished.timings.first_token_s,
                finished.timings.total_s,
            )
        case _:
            raise InternalError("the server sent an event that this client does not know")


def _worker(status: generation_pb2.WorkerStatus) -> Worker:
    return Worker(
        status.role,
        status.address,
        status.state,
        status.reason,
        wire.model_info_from_pb(status.info) if status.HasField("info") else None,
        status.sessions,
        status.incarnation,
        status.step_s,
    )
