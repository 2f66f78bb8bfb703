"""gRPC edge of the verifier: streams in, commands out; outputs in, streams out."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc.aio

from outrider import wire
from outrider.domain import ModelInfo, Rejection, RejectionCode
from outrider.errors import InvalidRequest
from outrider.serving.queues import Mailbox
from outrider.serving.server import Server
from outrider.serving.worker_edge import WorkerEdge
from outrider.v1 import types_pb2, verifier_pb2, verifier_pb2_grpc, worker_pb2_grpc
from verifier_service.engine import Engine
from verifier_service.messages import Abort, Disconnect, Drain, Offer, Open, Outputs, Repeat

SERVICE_NAMES = ("outrider.v1.VerifierService", "outrider.v1.WorkerService")
_CHUNK_BYTES = 1 << 20

_log = logging.getLogger(__name__)

_Response = verifier_pb2.VerifyResponse


class VerifierService(
    WorkerEdge[verifier_pb2.VerifyRequest, Outputs], verifier_pb2_grpc.VerifierServiceServicer
):
    """Servicer of VerifierService and WorkerService."""

    def __init__(
        self,
        info: ModelInfo,
        tokenizer_files: Mapping[str, bytes],
        *,
        incarnation: str,
        sessions_max: int,
    ) -> None:
        super().__init__(info, incarnation=incarnation, sessions_max=sessions_max)
        self._tokenizer_files = tokenizer_files
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Name the engine that serves; it was built with `emit` as its callback."""
        self._engine = engine

    @property
    def _attached(self) -> Engine:
        assert self._engine is not None, "attach() comes before serving"
        return self._engine

    def register(self, server: Server) -> None:
        """Serve both services on `server`."""
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self, server.grpc)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server.grpc)

    def _submit_disconnect(self, connection: int) -> None:
        self._attached.submit(Disconnect(connection))

    def _submit_drain(self) -> None:
        self._attached.submit(Drain())

    async def GetTokenizer(
        self,
        request: verifier_pb2.GetTokenizerRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[verifier_pb2.GetTokenizerResponse]:
        """The target's tokenizer files, in pieces."""
        for name, data in self._tokenizer_files.items():
            for start in range(0, len(data), _CHUNK_BYTES):
                yield verifier_pb2.GetTokenizerResponse(
                    name=name, chunk=data[start : start + _CHUNK_BYTES]
                )

    async def Verify(
        self,
        request_iterator: AsyncIterator[verifier_pb2.VerifyRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[verifier_pb2.VerifyResponse]:
        """One orchestrator's stream; its end aborts its sessions."""
        async for batch in self._converse(request_iterator, context):
            yield _response(batch, self._draining)

    def _submit(
        self, request: verifier_pb2.VerifyRequest, connection: int, mailbox: Mailbox[Any]
    ) -> None:
        engine = self._attached
        for message in request.opens:
            try:
                engine.submit(Open(connection, wire.session_from_pb(message)))
            except InvalidRequest as error:
                mailbox.put(Outputs(rejections=[_invalid(message, error)]))
        for row in request.drafts:
            draft = wire.draft_from_bytes(row.draft)
            engine.submit(Offer(connection, row.session, row.source, draft))
        for resync in request.resyncs:
            engine.submit(Repeat(connection, wire.resync_from_pb(resync)))
        for abort in request.aborts:
            engine.submit(Abort(connection, abort.session, abort.epoch))


def _invalid(message: verifier_pb2.OpenSession, error: InvalidRequest) -> Rejection:
    return Rejection(
        message.session,
        message.epoch,
        RejectionCode.INVALID,
        error.message,
        field=error.field,
    )


def _response(batch: list[Outputs | None], draining: bool) -> _Response:
    """Join what has piled up into one message."""
    response = _Response(draining=draining)
    for output in batch:
        if output is None:
            continue
        for session, epoch in output.opened:
            response.opened.add(session=session, epoch=epoch)
        response.rejections.extend(wire.rejection_to_pb(r) for r in output.rejections)
        response.prompt_logprobs.extend(
            wire.prompt_logprobs_to_pb(piece) for piece in output.prompt_logprobs
        )
        for session, commit, report in output.commits:
            response.commits.append(
                types_pb2.CommitRow(
                    session=session,
                    commit=wire.commit_to_bytes(commit),
                    report=wire.report_to_pb(report),
                )
            )
        if output.step is not None:
            response.step.duration_s = output.step.duration_s
            response.step.rows = output.step.rows
            response.step.tokens = output.step.tokens
            response.step.kv_tokens_used = output.step.kv_tokens_used
            response.step.waiting = output.step.waiting
    return response
