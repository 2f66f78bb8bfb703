"""What the gRPC edges of verifier and drafter do alike: handshake, streams, mailboxes, drain.

A worker has one thread that owns its model. Requests become commands for that thread; what it
emits, once a step, is sorted by connection into mailboxes on the event loop, and whatever has
piled up in a mailbox leaves as one message.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError

from outrider import wire
from outrider.domain import ModelInfo
from outrider.errors import InvalidRequest
from outrider.serving.queues import Mailbox
from outrider.serving.status import status_of_errors
from outrider.v1 import drafter_pb2, verifier_pb2, worker_pb2, worker_pb2_grpc

RequestT = TypeVar("RequestT", verifier_pb2.VerifyRequest, drafter_pb2.ProposeRequest)
OutputsT = TypeVar("OutputsT")

_log = logging.getLogger(__name__)


class WorkerEdge(worker_pb2_grpc.WorkerServiceServicer, abc.ABC, Generic[RequestT, OutputsT]):
    """Servicer base; made on the event loop that serves."""

    def __init__(self, info: ModelInfo, *, incarnation: str, sessions_max: int) -> None:
        self._info = info
        self._incarnation = incarnation
        self._sessions_max = sessions_max
        self._loop = asyncio.get_running_loop()
        self._connections = itertools.count(1)
        self._mailboxes: dict[int, Mailbox[OutputsT | None]] = {}
        self._draining = False
        self._ending = False

    @abc.abstractmethod
    def _submit(self, request: RequestT, connection: int, mailbox: Mailbox[Any]) -> None:
        """Turn a message into commands."""

    @abc.abstractmethod
    def _submit_disconnect(self, connection: int) -> None: ...

    @abc.abstractmethod
    def _submit_drain(self) -> None: ...

    @property
    def info(self) -> ModelInfo:
        """Which model this worker runs."""
        return self._info

    @property
    def draining(self) -> bool:
        """True once nothing new is taken."""
        return self._draining

    def emit(self, outputs: dict[int, OutputsT]) -> None:
        """Take what the model's thread has to say, on that thread: one hop to the loop a step."""
        # The loop is gone when the process ends before its thread does.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def drain(self) -> None:
        """Take nothing new from now on, and say so on every stream."""
        self._draining = True
        self._submit_drain()
        for mailbox in self._mailboxes.values():
            mailbox.put(None)

    def hang_up(self) -> None:
        """End all streams in order: what is left of their sessions goes on elsewhere."""
        self._ending = True
        for mailbox in self._mailboxes.values():
            mailbox.close()

    def _deliver(self, outputs: dict[int, OutputsT]) -> None:
        for connection, output in outputs.items():
            mailbox = self._mailboxes.get(connection)
            if mailbox is not None:
                mailbox.put(output)

    async def GetModelInfo(
        self,
        request: worker_pb2.GetModelInfoRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.GetModelInfoResponse:
        """Which model this worker runs."""
        return worker_pb2.GetModelInfoResponse(
            info=wire.model_info_to_pb(self._info),
            incarnation=self._incarnation,
            draining=self._draining,
            sessions_max=self._sessions_max,
            clock_s=time.perf_counter(),
        )

    async def _converse(
        self,
        requests: AsyncIterator[RequestT],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[tuple[int, list[OutputsT | None]]]:
        """Serve one stream: yields its number and what piled up for it, first of all nothing."""
        connection = next(self._connections)
        mailbox: Mailbox[OutputsT | None] = Mailbox()
        async with status_of_errors(context):
            first = await anext(requests, None)
            hello = wire.checked_hello(first)
            assert first is not None
            _log.info("connection %d from %s", connection, hello.orchestrator or "unnamed")
            self._mailboxes[connection] = mailbox
            reader = asyncio.create_task(self._read(first, requests, connection, mailbox))
            try:
                # Goes out at once, so that the caller knows that the stream is up.
                yield connection, []
                while batch := await mailbox.take():
                    yield connection, batch
                if not self._ending:
                    await reader
            finally:
                reader.cancel()
                del self._mailboxes[connection]
                self._submit_disconnect(connection)
                _log.info("connection %d ended", connection)

    async def _read(
        self,
        first: RequestT,
        requests: AsyncIterator[RequestT],
        connection: int,
        mailbox: Mailbox[OutputsT | None],
    ) -> None:
        try:
            self._submit(first, connection, mailbox)
            async for request in requests:
                self._submit(request, connection, mailbox)
        except DecodeError as error:
            text = "what came on the stream is no message of this protocol"
            raise InvalidRequest("request", text) from error
        finally:
            mailbox.close()
