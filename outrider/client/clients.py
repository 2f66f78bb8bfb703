"""The two clients: asyncio and blocking."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType

import grpc
import grpc.aio

from outrider import wire
from outrider.client.collecting import Collector, check_single
from outrider.client.messages import (
    event_from_pb,
    list_workers_to_pb,
    request_to_pb,
    worker_from_pb,
)
from outrider.client.types import Completion, Event, Request, Worker
from outrider.config import Tls
from outrider.domain import ModelInfo
from outrider.errors import OutriderError, Unavailable
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.serving.status import error_of_status
from outrider.serving.tls import channel_credentials, channel_options
from outrider.v1 import generation_pb2, generation_pb2_grpc

CALL_TIMEOUT_S = 30.0


class AsyncClient:
    """asyncio client; one channel, any number of generations at once."""

    def __init__(self, address: str, *, tls: Tls | None = None) -> None:
        """Raises `ConfigError` if the certificates cannot be read."""
        self._address = address
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            options = (*CHANNEL_OPTIONS, *channel_options(tls))
            self._channel = grpc.aio.secure_channel(address, channel_credentials(tls), options)
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
        call = self._stub.Generate(request_to_pb(request), timeout=timeout_s)
        try:
            async for response in call:
                yield event_from_pb(response)
        except grpc.aio.AioRpcError as error:
            raise _error_at(self._address, error) from None
        finally:
            call.cancel()

    async def complete(self, request: Request, *, timeout_s: float | None = None) -> Completion:
        """Run one generation to its end. Raises `InvalidRequest` for more than one choice."""
        check_single(request)
        collector = await self._collect(request, timeout_s)
        return collector.completion(0)

    async def complete_all(
        self, request: Request, *, timeout_s: float | None = None
    ) -> tuple[Completion, ...]:
        """Run all choices of a generation to their ends; returns them in order."""
        collector = await self._collect(request, timeout_s)
        return collector.completions(request.n)

    async def _collect(self, request: Request, timeout_s: float | None) -> Collector:
        collector = Collector()
        async for event in self.generate(request, timeout_s=timeout_s):
            collector.add(event)
        return collector

    async def models(self) -> tuple[ModelInfo, ...]:
        """List the models that can be asked for."""
        try:
            answer = await self._stub.ListModels(
                generation_pb2.ListModelsRequest(), timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _error_at(self._address, error) from None
        return tuple(wire.model_info_from_pb(info) for info in answer.models)

    async def workers(self, placement_of: Request | None = None) -> tuple[Worker, ...]:
        """List the workers, and why some are not used.

        With `placement_of`: also what placing that request on each verifier would cost.
        """
        try:
            answer = await self._stub.ListWorkers(
                list_workers_to_pb(placement_of), timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _error_at(self._address, error) from None
        return tuple(worker_from_pb(status) for status in answer.workers)


class Client:
    """Blocking client; may be shared by threads."""

    def __init__(self, address: str, *, tls: Tls | None = None) -> None:
        """Raises `ConfigError` if the certificates cannot be read."""
        self._address = address
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            options = (*CHANNEL_OPTIONS, *channel_options(tls))
            self._channel = grpc.secure_channel(address, channel_credentials(tls), options)
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
        call = self._stub.Generate(request_to_pb(request), timeout=timeout_s)
        try:
            for response in call:
                yield event_from_pb(response)
        except grpc.RpcError as error:
            raise _error_at(self._address, error) from None
        finally:
            call.cancel()

    def complete(self, request: Request, *, timeout_s: float | None = None) -> Completion:
        """Run one generation to its end. Raises `InvalidRequest` for more than one choice."""
        check_single(request)
        collector = self._collect(request, timeout_s)
        return collector.completion(0)

    def complete_all(
        self, request: Request, *, timeout_s: float | None = None
    ) -> tuple[Completion, ...]:
        """Run all choices of a generation to their ends; returns them in order."""
        collector = self._collect(request, timeout_s)
        return collector.completions(request.n)

    def _collect(self, request: Request, timeout_s: float | None) -> Collector:
        collector = Collector()
        for event in self.generate(request, timeout_s=timeout_s):
            collector.add(event)
        return collector

    def models(self) -> tuple[ModelInfo, ...]:
        """List the models that can be asked for."""
        try:
            answer = self._stub.ListModels(
                generation_pb2.ListModelsRequest(), timeout=CALL_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise _error_at(self._address, error) from None
        return tuple(wire.model_info_from_pb(info) for info in answer.models)

    def workers(self, placement_of: Request | None = None) -> tuple[Worker, ...]:
        """List the workers, and why some are not used.

        With `placement_of`: also what placing that request on each verifier would cost.
        """
        try:
            answer = self._stub.ListWorkers(
                list_workers_to_pb(placement_of), timeout=CALL_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise _error_at(self._address, error) from None
        return tuple(worker_from_pb(status) for status in answer.workers)


def _error_at(address: str, error: grpc.RpcError) -> OutriderError:
    ours = error_of_status(error)
    if isinstance(ours, Unavailable) and "connect" in str(ours):
        return Unavailable(f"no orchestrator answers at {address}; is it running? ({ours})")
    return ours
