"""The asyncio client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from outrider import wire
from outrider.client.calls import CALL_TIMEOUT_S, error_at, inner
from outrider.client.collecting import Collector, check_single
from outrider.client.messages import (
    event_from_pb,
    list_workers_to_pb,
    request_to_pb,
    worker_from_pb,
)
from outrider.client.resuming import RESUME_S, Attempts, Progress
from outrider.client.types import Completion, Event, Request, Worker
from outrider.config import Tls
from outrider.domain import ModelInfo
from outrider.errors import Unavailable
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.serving.status import answered
from outrider.serving.tls import channel_credentials, channel_options
from outrider.v1 import generation_pb2, generation_pb2_grpc

SILENCE_S = 5.0
"""After so long without an event, an orchestrator is asked whether it is alive."""
PROBE_TIMEOUT_S = 3.0


class AsyncClient:
    """asyncio client; a channel for each orchestrator, any number of generations at once.

    A stream that breaks is resumed, at the same orchestrator or another one: the caller sees one
    stream. An orchestrator that hangs counts as broken.
    """

    def __init__(
        self,
        address: str,
        *others: str,
        resume_s: float = RESUME_S,
        silence_s: float = SILENCE_S,
        tls: Tls | None = None,
    ) -> None:
        """`others` are more orchestrators of the same fleet; `address` may list some, too: "a,b".

        `resume_s` bounds how long a generation without progress is asked for; 0: never again.
        Raises `ConfigError` if certificates cannot be read.
        """
        self._addresses = (*address.split(","), *others)
        self._resume_s, self._silence_s = resume_s, silence_s
        options = (*CHANNEL_OPTIONS, *channel_options(tls))
        credentials = None if tls is None else channel_credentials(tls)
        self._channels = [
            grpc.aio.insecure_channel(name, options=options)
            if credentials is None
            else grpc.aio.secure_channel(name, credentials, options)
            for name in self._addresses
        ]
        self._stubs = [generation_pb2_grpc.GenerationServiceStub(c) for c in self._channels]
        self._at = 0
        """Which orchestrator is asked: the last one that answered."""

    @property
    def _stub(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return self._stubs[self._at]

    @property
    def _address(self) -> str:
        return self._addresses[self._at]

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
        """Close the channels; generations under way are cancelled."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def generate(
        self, request: Request, *, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """Stream one generation. Leaving the iteration early cancels it."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        message = request_to_pb(request)
        progress = Progress(request)
        attempts = Attempts(progress, len(self._addresses), self._resume_s)
        while True:
            at = self._at
            stub = self._stubs[at]
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            call = (
                stub.Generate(message, timeout=left_s)
                if progress.started is None
                else stub.Resume(progress.to_pb(), timeout=left_s)
            )
            watch = _Watch(stub, call, progress, self._silence_s)
            try:
                async for response in call:
                    event = event_from_pb(inner(response))
                    if progress.takes(event):
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                broken, said = error_at(self._addresses[at], error), answered(error)
                if progress.complete:  # All was said; only the goodbye was lost.
                    return
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise broken from None
            except asyncio.CancelledError:
                if not watch.hung:
                    raise
                text = f"the orchestrator at {self._addresses[at]} does not answer"
                broken, said = Unavailable(text), False
            finally:
                watch.close()
                call.cancel()
            pause_s = attempts.pause_s(broken, time.monotonic(), answered=said)
            if self._at == at:  # Another generation may have moved on already.
                self._at = (at + 1) % len(self._addresses)
            await asyncio.sleep(pause_s)

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
            raise error_at(self._address, error) from None
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
            raise error_at(self._address, error) from None
        return tuple(worker_from_pb(status) for status in answer.workers)


class _Watch:
    """Cancels a call whose server hangs: nothing comes, and it does not answer when asked."""

    def __init__(
        self,
        stub: generation_pb2_grpc.GenerationServiceAsyncStub,
        call: grpc.aio.UnaryStreamCall[Any, Any],
        progress: Progress,
        silence_s: float,
    ) -> None:
        self.hung = False
        self._stub, self._call, self._progress = stub, call, progress
        self._silence_s = silence_s
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        """Watch no longer."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            events = self._progress.events
            await asyncio.sleep(self._silence_s)
            if self._progress.events == events:
                try:
                    await self._stub.ListModels(
                        generation_pb2.ListModelsRequest(), timeout=PROBE_TIMEOUT_S
                    )
                except grpc.aio.AioRpcError:
                    self.hung = True
                    self._call.cancel()
                    return
