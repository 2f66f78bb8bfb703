"""gRPC edge of the drafter: streams in, commands out; outputs in, streams out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from drafter_service.accounts import Accounts
from drafter_service.growing import Grower
from drafter_service.messages import (
    Bind,
    Disconnect,
    Drain,
    Follow,
    Outputs,
    SetBudget,
    Unbind,
)
from outrider import wire
from outrider.domain import ModelInfo, Rejection, RejectionCode
from outrider.errors import InvalidRequest
from outrider.serving.queues import Mailbox
from outrider.serving.server import Server
from outrider.serving.telemetry import Tracing
from outrider.serving.worker_edge import WorkerEdge
from outrider.v1 import drafter_pb2, drafter_pb2_grpc, types_pb2, worker_pb2_grpc

SERVICE_NAMES = ("outrider.v1.DrafterService", "outrider.v1.WorkerService")

_log = logging.getLogger(__name__)

_Response = drafter_pb2.ProposeResponse


class DrafterService(
    WorkerEdge[drafter_pb2.ProposeRequest, Outputs], drafter_pb2_grpc.DrafterServiceServicer
):
    """Servicer of DrafterService and WorkerService."""

    def __init__(
        self,
        info: ModelInfo,
        *,
        incarnation: str,
        sessions_max: int,
        tracing: Tracing | None = None,
    ) -> None:
        super().__init__(info, incarnation=incarnation, sessions_max=sessions_max)
        self._accounts = Accounts(tracing)
        self._grower: Grower | None = None

    def attach(self, grower: Grower) -> None:
        """Name the grower that serves; it was built with `emit` as its callback."""
        self._grower = grower

    def swapped(self, info: ModelInfo) -> None:
        """Say on every stream that another version guesses; called by the growing thread."""
        # The loop is gone when the process ends before its thread does.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._announce, info)

    def _announce(self, info: ModelInfo) -> None:
        self._info = info
        for mailbox in self._mailboxes.values():
            mailbox.put(Outputs(swapped=info))

    @property
    def _attached(self) -> Grower:
        assert self._grower is not None, "attach() comes before serving"
        return self._grower

    def register(self, server: Server) -> None:
        """Serve both services on `server`."""
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(self, server.grpc)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server.grpc)

    def _submit_disconnect(self, connection: int) -> None:
        self._accounts.disconnected(connection)
        self._attached.submit(Disconnect(connection))

    def _submit_drain(self) -> None:
        self._attached.submit(Drain())

    async def Propose(
        self,
        request_iterator: AsyncIterator[drafter_pb2.ProposeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[drafter_pb2.ProposeResponse]:
        """One orchestrator's stream; its end forgets its sessions."""
        async for _, batch in self._converse(request_iterator, context):
            self._accounts.said(batch)
            yield _response(batch, self._draining)

    def _submit(
        self, request: drafter_pb2.ProposeRequest, connection: int, mailbox: Mailbox[Any]
    ) -> None:
        grower = self._attached
        for bind in request.binds:
            try:
                spec = wire.bind_from_pb(bind)
                self._accounts.bound(connection, spec)
                grower.submit(Bind(connection, spec))
            except InvalidRequest as error:
                rejection = Rejection(
                    bind.session,
                    bind.epoch,
                    RejectionCode.INVALID,
                    error.message,
                    field=error.field,
                    binding=bind.binding,
                )
                mailbox.put(Outputs(rejections=[rejection]))
        for row in request.commits:
            commit = wire.commit_from_bytes(row.commit)
            candidates = wire.candidates_from_bytes(row.candidates)
            grower.submit(Follow(connection, row.session, commit, candidates))
            if commit is not None and commit.last:
                self._accounts.ended(connection, row.session)
        for update in request.budgets:
            try:
                budget = wire.budget_from_pb(update.budget)
            except InvalidRequest as error:
                _log.warning("session %d: %s", update.session, error)
                continue
            grower.submit(SetBudget(connection, update.session, update.binding, budget))
        for unbind in request.unbinds:
            self._accounts.unbound(connection, unbind.session, unbind.binding)
            grower.submit(Unbind(connection, unbind.session, unbind.binding))


def _response(batch: list[Outputs | None], draining: bool) -> _Response:
    """Join what has piled up into one message."""
    response = _Response(draining=draining)
    for output in batch:
        if output is None:
            continue
        for session, binding in output.bound:
            response.bound.add(session=session, binding=binding)
        response.rejections.extend(wire.rejection_to_pb(r) for r in output.rejections)
        for session, binding, draft in output.drafts:
            response.drafts.append(
                types_pb2.DraftRow(
                    session=session, binding=binding, draft=wire.draft_to_bytes(draft)
                )
            )
        response.resyncs.extend(wire.resync_to_pb(resync) for resync in output.resyncs)
        if output.swapped is not None:
            response.swapped.CopyFrom(wire.model_info_to_pb(output.swapped))
        if output.step is not None:
            response.step.CopyFrom(wire.grow_report_to_pb(output.step))
    return response
