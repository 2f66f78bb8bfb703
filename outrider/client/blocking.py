"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc

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
from outrider.errors import OutriderError
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.serving.status import answered
from outrider.serving.tls import channel_credentials, channel_options
from outrider.v1 import generation_pb2, generation_pb2_grpc

_LATE = grpc.StatusCode.DEADLINE_EXCEEDED


class Client:
    """Blocking client; may be shared by threads.

    A stream that breaks is resumed as by `AsyncClient`; that an orchestrator hangs is noticed by
    the connection's keepalive only, after half a minute.
    """

    def __init__(
        self, address: str, *others: str, resume_s: float = RESUME_S, tls: Tls | None = None
    ) -> None:
        """`others` and `resume_s` as for `AsyncClient`; raises `ConfigError` likewise."""
        self._addresses = (*address.split(","), *others)
        self._resume_s = resume_s
        options = (*CHANNEL_OPTIONS, *channel_options(tls))
        credentials = None if tls is None else channel_credentials(tls)
        self._channels = [
            grpc.insecure_channel(name, options=options)
            if credentials is None
            else grpc.secure_channel(name, credentials, options)
            for name in self._addresses
        ]
        self._stubs = [generation_pb2_grpc.GenerationServiceStub(c) for c in self._channels]
        self._at = 0

    @property
    def _stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        return self._stubs[self._at]

    @property
    def _address(self) -> str:
        return self._addresses[self._at]

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
        """Close the channels; generations under way are cancelled."""
        for channel in self._channels:
            channel.close()

    def generate(self, request: Request, *, timeout_s: float | None = None) -> Iterator[Event]:
        """Stream one generation. Leaving the iteration early cancels it."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        message = request_to_pb(request)
        progress = Progress(request)
        attempts = Attempts(progress, len(self._addresses), self._resume_s)
        while True:
            at = self._at
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            call = self._call(self._stubs[at], message, progress, left_s)
            try:
                for response in call:
                    event = event_from_pb(inner(response))
                    if progress.takes(event):
                        yield event
                return
            except grpc.RpcError as error:
                broken = error_at(self._addresses[at], error)
                if progress.complete:  # All was said; only the goodbye was lost.
                    return
                if isinstance(error, grpc.Call) and error.code() is _LATE:
                    raise broken from None
                pause_s = self._pause_s(attempts, broken, answered(error))
            finally:
                call.cancel()
            if self._at == at:  # Another generation may have moved on already.
                self._at = (at + 1) % len(self._addresses)
            time.sleep(pause_s)

    @staticmethod
    def _pause_s(attempts: Attempts, broken: OutriderError, said: bool) -> float:
        return attempts.pause_s(broken, time.monotonic(), answered=said)

    def _call(
        self,
        stub: generation_pb2_grpc.GenerationServiceStub,
        message: generation_pb2.GenerateRequest,
        progress: Progress,
        timeout_s: float | None,
    ) -> Any:
        if progress.started is None:
            return stub.Generate(message, timeout=timeout_s)
        return stub.Resume(progress.to_pb(), timeout=timeout_s)

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
            raise error_at(self._address, error) from None
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
            raise error_at(self._address, error) from None
        return tuple(worker_from_pb(status) for status in answer.workers)
