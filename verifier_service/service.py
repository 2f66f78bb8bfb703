"""gRPC edge of the verifier: streams in, commands out; outputs in, streams out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc.aio

from outrider import wire
from outrider.config import Tls
from outrider.domain import Grammar, ModelInfo, Rejection, RejectionCode, SessionSpec
from outrider.errors import InvalidRequest
from outrider.serving.queues import Mailbox
from outrider.serving.server import Server
from outrider.serving.telemetry import Tracing
from outrider.serving.worker_edge import WorkerEdge
from outrider.v1 import types_pb2, verifier_pb2, verifier_pb2_grpc, worker_pb2_grpc
from verifier_service.accounts import Accounts
from verifier_service.admission import reject
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.grammar_gate import GrammarGate, GrammarModel, Verdict
from verifier_service.kv_fetching import KvFetching
from verifier_service.kv_serving import KvServing
from verifier_service.messages import Abort, Disconnect, Drain, Offer, Open, Outputs, Repeat

SERVICE_NAMES = (
    "outrider.v1.VerifierService",
    "outrider.v1.WorkerService",
    "outrider.v1.KvService",
)
_CHUNK_BYTES = 1 << 20

_log = logging.getLogger(__name__)

_Response = verifier_pb2.VerifyResponse


@dataclass(eq=False, slots=True)
class _Held:
    """A session that the engine has not seen, as its grammar is still being tried."""

    command: Open
    mailbox: Mailbox[Any]
    task: asyncio.Task[None] | None = None

    @property
    def spec(self) -> SessionSpec:
        return self.command.spec


class VerifierService(
    WorkerEdge[verifier_pb2.VerifyRequest, Outputs], verifier_pb2_grpc.VerifierServiceServicer
):
    """Servicer of VerifierService and WorkerService, and what serves KvService."""

    def __init__(
        self,
        info: ModelInfo,
        tokenizer_files: Mapping[str, bytes],
        *,
        incarnation: str,
        sessions_max: int,
        grammar_timeout_s: float,
        kv_serves_max: int = EngineConfig.kv_serves_max,
        tls: Tls | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`tls` is shown to other verifiers, too."""
        super().__init__(info, incarnation=incarnation, sessions_max=sessions_max)
        self._kv_serves_max, self._tls = kv_serves_max, tls
        self.kv_fetching: KvFetching | None = None
        self.kv_serving: KvServing | None = None
        """Both None where KV is not exchanged."""
        self._accounts = Accounts(tracing)
        self._tokenizer_files = tokenizer_files
        self._gate = GrammarGate(
            GrammarModel(tokenizer_files.get("tokenizer.json"), info.vocabulary_size, info.eos_ids),
            timeout_s=grammar_timeout_s,
            # More could not be admitted afterwards.
            callers_max=sessions_max,
        )
        self._held: dict[int, _Held] = {}
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Name the engine that serves; it was built with `emit` as its callback."""
        self._engine = engine
        memory = engine.pulls.bytes
        if memory is not None:
            incarnation = self._incarnation
            self.kv_fetching = KvFetching(engine, memory, incarnation=incarnation, tls=self._tls)
            self.kv_serving = KvServing(
                engine, memory, incarnation=incarnation, serves_max=self._kv_serves_max
            )

    async def close(self) -> None:
        """End what goes on beside the streams: trials of grammars, KV from and for peers."""
        for held in list(self._held.values()):
            self._let_go(held)
        await self._gate.close()
        if self.kv_fetching is not None:
            await self.kv_fetching.close()
        if self.kv_serving is not None:
            self.kv_serving.close()

    @property
    def grammar_gate(self) -> GrammarGate:
        """Where grammars are tried."""
        return self._gate

    @property
    def _attached(self) -> Engine:
        assert self._engine is not None, "attach() comes before serving"
        return self._engine

    def register(self, server: Server) -> None:
        """Serve all of it on `server`."""
        if self.kv_serving is not None:
            self.kv_serving.register(server)
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self, server.grpc)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server.grpc)

    def _submit_disconnect(self, connection: int) -> None:
        for held in list(self._held.values()):
            if held.command.connection == connection:
                self._let_go(held)
        self._accounts.disconnected(connection)
        self._attached.submit(Disconnect(connection))

    def _submit_drain(self) -> None:
        self._attached.submit(Drain())
        for held in list(self._held.values()):
            # Refused there, like whatever comes from now on.
            self._let_go(held)
            self._attached.submit(held.command)

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
        async for connection, batch in self._converse(request_iterator, context):
            self._accounts.said(connection, batch)
            yield _response(batch, self._draining)

    def _submit(
        self, request: verifier_pb2.VerifyRequest, connection: int, mailbox: Mailbox[Any]
    ) -> None:
        engine = self._attached
        for message in request.opens:
            try:
                spec = wire.session_from_pb(message)
                self._accounts.asked(connection, spec)
                self._open(Open(connection, spec), mailbox)
            except InvalidRequest as error:
                mailbox.put(Outputs(rejections=[_invalid(message, error)]))
        for row in request.drafts:
            if engine.passes_over(connection, row.session, row.source):
                continue
            draft = wire.draft_from_bytes(row.draft)
            engine.submit(Offer(connection, row.session, row.source, draft))
        for resync in request.resyncs:
            held = self._held.get(resync.session)
            # The engine would not know it; it has missed nothing, since nothing was committed.
            if held is None or held.spec.epoch != resync.epoch:
                engine.submit(Repeat(connection, wire.resync_from_pb(resync)))
        for abort in request.aborts:
            held = self._held.get(abort.session)
            if (
                held is not None
                and held.command.connection == connection
                and held.spec.epoch <= abort.epoch
            ):
                self._let_go(held)
            self._accounts.aborted(connection, abort.session, abort.epoch)
            engine.submit(Abort(connection, abort.session, abort.epoch))

    def _open(self, command: Open, mailbox: Mailbox[Any]) -> None:
        """Hand a session to the engine, at once or when its grammar is known to be fine."""
        spec = command.spec
        held = self._held.get(spec.session)
        if held is not None and spec.epoch <= held.spec.epoch:
            text = f"epoch {spec.epoch} is not newer than {held.spec.epoch}"
            _refuse(mailbox, spec, RejectionCode.STALE_EPOCH, text, current_epoch=held.spec.epoch)
            return
        if held is not None:
            self._let_go(held)
            text = "another orchestrator or a newer placement took the session over"
            _refuse(
                held.mailbox,
                held.spec,
                RejectionCode.STALE_EPOCH,
                text,
                current_epoch=spec.epoch,
            )
        grammar = spec.sampling.grammar
        # While draining, the engine refuses what it gets: nothing is worth a trial.
        if grammar is None or self._draining:
            self._attached.submit(command)
            return
        held = _Held(command, mailbox)
        known = self._gate.known(grammar)
        if known is not None:
            self._decide(held, known)
            return
        self._held[spec.session] = held
        held.task = self._loop.create_task(self._hold(held, grammar))

    async def _hold(self, held: _Held, grammar: Grammar) -> None:
        verdict = await self._gate.verdict(grammar)
        # Whoever lets go of it has cancelled this task.
        del self._held[held.spec.session]
        self._decide(held, verdict)

    def _decide(self, held: _Held, verdict: Verdict) -> None:
        if verdict.code is None:
            self._attached.submit(held.command)
        else:
            _refuse(held.mailbox, held.spec, verdict.code, verdict.message, field=verdict.field)

    def _let_go(self, held: _Held) -> None:
        """Forget a session whose grammar is being tried: the engine will not hear of it."""
        del self._held[held.spec.session]
        if held.task is not None:
            held.task.cancel()


def _refuse(
    mailbox: Mailbox[Any],
    spec: SessionSpec,
    code: RejectionCode,
    message: str,
    *,
    field: str = "",
    current_epoch: int = 0,
) -> None:
    rejection = reject(spec, code, message, field, current_epoch)
    mailbox.put(Outputs(rejections=[rejection]))


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
        response.kv_pulls.extend(wire.pull_report_to_pb(report) for report in output.kv_pulls)
        response.prompt_logprobs.extend(
            wire.prompt_logprobs_to_pb(piece) for piece in output.prompt_logprobs
        )
        for session, commit, report in output.commits:
            row = types_pb2.CommitRow(
                session=session,
                commit=wire.commit_to_bytes(commit),
                report=wire.report_to_pb(report),
            )
            candidates = output.candidates.get(session)
            if candidates is not None:
                row.candidates = wire.candidates_to_bytes(candidates)
            response.commits.append(row)
        if output.step is not None:
            response.step.CopyFrom(wire.step_report_to_pb(output.step))
    return response
