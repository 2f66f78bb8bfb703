"""A verifier without a model: it answers each opening with what a script says, over real sockets.

It has the byte tokenizer of the tiny models, so ids below 256 are bytes of text.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc.aio

from outrider import wire
from outrider.domain import (
    Commit,
    CommitReport,
    FinishReason,
    ModelInfo,
    PromptLogprobs,
    Rejection,
    RejectionCode,
    SessionSpec,
    SpeculationCounters,
    TokenLogprobs,
)
from outrider.tokenizer import (
    BYTE_VOCABULARY_SIZE,
    byte_tokenizer,
    byte_tokenizer_files,
    tokenizer_fingerprint,
)
from outrider.v1 import (
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

INFO = ModelInfo(
    model="scripted",
    model_fingerprint="scripted",
    tokenizer_fingerprint=tokenizer_fingerprint(byte_tokenizer()),
    vocabulary_size=BYTE_VOCABULARY_SIZE,
    length_max=2_048,
    dtype="float32",
    eos_ids=(256, 258),
)

Script: TypeAlias = Callable[[SessionSpec], Iterable[verifier_pb2.VerifyResponse]]


# --- what a verifier may say ------------------------------------------------------------------


def scored(token: int, top: int | None) -> TokenLogprobs:
    """A log-probability that tells which token it belongs to, exact in float32."""
    best = tuple((rank, -rank / 4) for rank in range(top or 0))
    return TokenLogprobs(token, -token / 8, best)


def opened(spec: SessionSpec) -> verifier_pb2.VerifyResponse:
    """The session is admitted."""
    admitted = verifier_pb2.SessionOpened(session=spec.session, epoch=spec.epoch)
    return verifier_pb2.VerifyResponse(opened=[admitted])


def prompt_scores(spec: SessionSpec, start: int, end: int) -> verifier_pb2.VerifyResponse:
    """Log-probabilities of the prompt's tokens from `start` to before `end`."""
    entries = tuple(scored(token, spec.prompt_logprobs) for token in spec.prompt[start:end])
    piece = PromptLogprobs(spec.session, spec.epoch, start, entries)
    return verifier_pb2.VerifyResponse(prompt_logprobs=[wire.prompt_logprobs_to_pb(piece)])


def commit(
    spec: SessionSpec,
    done: int,
    tokens: Sequence[int],
    reason: FinishReason | None = None,
    *,
    with_logprobs: bool = True,
    **others: Any,
) -> verifier_pb2.VerifyResponse:
    """Tokens after `done` output tokens, with log-probabilities if the session wants them."""
    wanted = spec.logprobs is not None and with_logprobs
    report = CommitReport(
        SpeculationCounters(verify_steps=1),
        (0,) * len(tokens),
        reason,
        tuple(scored(token, spec.logprobs) for token in tokens) if wanted else (),
    )
    decided = Commit(spec.epoch, len(spec.prompt) + done, tuple(tokens), last=reason is not None)
    row = types_pb2.CommitRow(
        session=spec.session,
        commit=wire.commit_to_bytes(decided),
        report=wire.report_to_pb(report),
    )
    return verifier_pb2.VerifyResponse(commits=[row], **others)


def rejection(
    spec: SessionSpec, code: RejectionCode, message: str, field: str = ""
) -> verifier_pb2.VerifyResponse:
    """The session is refused or ended."""
    refusal = Rejection(spec.session, spec.epoch, code, message, field)
    return verifier_pb2.VerifyResponse(rejections=[wire.rejection_to_pb(refusal)])


def answer(spec: SessionSpec, text: bytes) -> Iterable[verifier_pb2.VerifyResponse]:
    """All that an honest verifier says to a session whose output is `text`, in small pieces."""
    yield opened(spec)
    if spec.prompt_logprobs is not None:
        for start in range(1, len(spec.prompt), 3):
            yield prompt_scores(spec, start, start + 3)
    for done in range(0, len(text), 2):
        tokens = text[done : done + 2]
        last = done + len(tokens) == len(text)
        yield commit(spec, done, tokens, FinishReason.LENGTH if last else None)


# --- the verifier -----------------------------------------------------------------------------


class ScriptedVerifier(
    verifier_pb2_grpc.VerifierServiceServicer, worker_pb2_grpc.WorkerServiceServicer
):
    """Records what it is asked, and says what the script says."""

    def __init__(self, script: Script, info: ModelInfo = INFO) -> None:
        self.opens: list[SessionSpec] = []
        self.aborts: list[tuple[int, int]] = []
        """(session, epoch)"""
        self._script = script
        self._info = info

    async def GetModelInfo(
        self, request: worker_pb2.GetModelInfoRequest, context: Any
    ) -> worker_pb2.GetModelInfoResponse:
        """Say who this is."""
        return worker_pb2.GetModelInfoResponse(
            info=wire.model_info_to_pb(self._info),
            incarnation=secrets.token_hex(8),
            sessions_max=100_000,
        )

    async def GetTokenizer(
        self, request: verifier_pb2.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[verifier_pb2.GetTokenizerResponse]:
        """Hand out the byte tokenizer."""
        for name, data in byte_tokenizer_files().items():
            yield verifier_pb2.GetTokenizerResponse(name=name, chunk=data)

    async def Verify(
        self, request_iterator: AsyncIterator[verifier_pb2.VerifyRequest], context: Any
    ) -> AsyncIterator[verifier_pb2.VerifyResponse]:
        """Serve one orchestrator."""
        yield verifier_pb2.VerifyResponse()
        async for request in request_iterator:
            self.aborts += [(abort.session, abort.epoch) for abort in request.aborts]
            for message in request.opens:
                spec = wire.session_from_pb(message)
                self.opens.append(spec)
                for response in self._script(spec):
                    yield response


@dataclass(slots=True)
class RunningScript:
    """A scripted verifier that is being served."""

    address: str
    verifier: ScriptedVerifier


@contextlib.asynccontextmanager
async def scripted_verifier(script: Script, info: ModelInfo = INFO) -> AsyncIterator[RunningScript]:
    """Serve a scripted verifier."""
    verifier = ScriptedVerifier(script, info)
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    verifier_pb2_grpc.add_VerifierServiceServicer_to_server(verifier, server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(verifier, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield RunningScript(f"127.0.0.1:{port}", verifier)
    finally:
        await server.stop(0)
