"""gRPC clients of the workers: one long-lived stream for each, kept up for ever.

A link collects what is to be sent and writes it in as few messages as flow control allows: rows
of many sessions that pile up while a write is under way leave together. Payloads of drafts and
commits pass through unread.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc.aio

from orchestrator.breaker import Breaker
from orchestrator.budgets import DrafterPace, VerifierPace
from outrider import wire
from outrider.config import Tls
from outrider.domain import (
    PROTOCOL_VERSION,
    BindSpec,
    Commit,
    DraftBudget,
    GrowReport,
    ModelInfo,
    PromptLogprobs,
    PullReport,
    Rejection,
    Resync,
    SessionSpec,
    StepReport,
)
from outrider.errors import Mismatch, OutriderError, Unavailable
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.serving.tls import channel_credentials, channel_options
from outrider.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

HANDSHAKE_TIMEOUT_S = 10.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
_PING_FIRST_S = 0.05
_PING_S = 5.0
_PINGS_KEPT = 8
_PINGS_MISSED_MAX = 2
_GAIN_SHARE = 1.0 / 4.0
DRAFT_ROWS_MAX = 4_096
"""Drafts waiting for a verifier that reads slowly; more are dropped, they are hints."""
NO_STEP = StepReport(duration_s=0.0, rows=0, tokens=0)
"""What is reported of a verifier that has not taken a step yet."""

_log = logging.getLogger(__name__)


class LinkState(enum.Enum):
    """How a worker stands with this orchestrator."""

    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class VerifierBatch:
    """One message of a verifier."""

    opened: list[tuple[int, int]]
    """(session, epoch)"""
    rejections: list[Rejection]
    commits: list[tuple[int, bytes, Commit, wire.RelayedReport]]
    """(session, the commit as it came, the same decoded, report)"""
    prompt_logprobs: list[PromptLogprobs]
    step: StepReport | None = None
    candidates: dict[int, bytes] = field(default_factory=dict)
    """What came with the commits of sessions that were opened with candidates, as it came."""
    kv_pulls: list[PullReport] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DrafterBatch:
    """One message of a drafter."""

    rejections: list[Rejection]
    drafts: list[tuple[int, int, bytes]]
    """(session, binding, the draft as it came)"""
    resyncs: list[Resync]
    step: GrowReport | None = None


RequestT = TypeVar("RequestT", verifier_pb2.VerifyRequest, drafter_pb2.ProposeRequest)
ResponseT = TypeVar("ResponseT", verifier_pb2.VerifyResponse, drafter_pb2.ProposeResponse)


class Link(abc.ABC, Generic[RequestT, ResponseT]):
    """A stream to one worker that is re-established whenever it breaks."""

    role: str

    def __init__(
        self, address: str, orchestrator: str, timeout_s: float = 5.0, tls: Tls | None = None
    ) -> None:
        """`timeout_s`: one that says nothing and answers nothing for so long counts as lost."""
        self.address = address
        self._tls = tls
        self._timeout_s = timeout_s
        self._heard = 0
        """Messages of this stream."""
        self.breaker = Breaker()
        """Kept by the driver."""
        self.state = LinkState.CONNECTING
        self.reason = "not reached yet"
        self.info: ModelInfo | None = None
        self.incarnation = ""
        self.sessions_max = 0
        self.sessions: set[int] = set()
        """Sessions of this orchestrator on the worker; kept by the driver."""
        self.rtt_s = 0.0
        """Least round trip of late; 0 until it was measured."""
        self.clock_offset_s = 0.0
        """What to add to the worker's clock to get `time.monotonic`."""
        self._rtts_s: deque[float] = deque(maxlen=_PINGS_KEPT)
        self._orchestrator = orchestrator
        self._pending: RequestT = self._new_request()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @abc.abstractmethod
    def _new_request(self) -> RequestT: ...

    @abc.abstractmethod
    def _stream(self, channel: grpc.aio.Channel) -> Any: ...

    @abc.abstractmethod
    async def _prepare(self, channel: grpc.aio.Channel, info: ModelInfo) -> None:
        """Fetch what else is needed before the stream opens."""

    @abc.abstractmethod
    def _receive(self, response: ResponseT) -> None: ...

    @abc.abstractmethod
    def _changed(self) -> None:
        """Tell the driver that `state` has changed."""

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._run(), name=f"link-{self.address}")

    async def close(self) -> None:
        """End the stream for good; the worker aborts what is left on it."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._set(LinkState.LOST, "closed")

    def _set(self, state: LinkState, reason: str) -> None:
        if state is not self.state or reason != self.reason:
            self.state, self.reason = state, reason
            self._changed()

    async def _run(self) -> None:
        backoff_s = BACKOFF_MIN_S
        while True:
            was_ready = False
            try:
                await self._serve()
                reason = "the worker closed the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except OutriderError as error:
                reason = str(error)
            except Exception as error:
                # A link that dies silently would leave a healthy worker unused for ever.
                _log.exception("link to %s %s", self.role, self.address)
                reason = f"internal error: {type(error).__name__}"
            was_ready = self.state in (LinkState.READY, LinkState.DRAINING)
            if reason != self.reason:
                _log.warning("%s %s: %s", self.role, self.address, reason)
            self._pending = self._new_request()
            self._wake.clear()
            self._set(LinkState.LOST, reason)
            backoff_s = BACKOFF_MIN_S if was_ready else min(backoff_s * 2, BACKOFF_MAX_S)
            await asyncio.sleep(backoff_s)

    def _channel(self) -> grpc.aio.Channel:
        # Anew for each attempt, so that certificates are, too. Raises `ConfigError`.
        if self._tls is None:
            return grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        options = (*CHANNEL_OPTIONS, *channel_options(self._tls))
        return grpc.aio.secure_channel(self.address, channel_credentials(self._tls), options)

    async def _serve(self) -> None:
        async with self._channel() as channel:
            worker = worker_pb2_grpc.WorkerServiceStub(channel)

            async def ask(timeout_s: float) -> worker_pb2.GetModelInfoResponse:
                return await worker.GetModelInfo(
                    worker_pb2.GetModelInfoRequest(), timeout=timeout_s
                )

            answer = await ask(HANDSHAKE_TIMEOUT_S)
            info = wire.model_info_from_pb(answer.info)
            if info.protocol_version != PROTOCOL_VERSION:
                raise Mismatch(
                    f"the worker speaks protocol {info.protocol_version}, this orchestrator "
                    f"{PROTOCOL_VERSION}; run the same release of both"
                )
            await self._prepare(channel, info)
            self.info, self.incarnation = info, answer.incarnation
            self.sessions_max = answer.sessions_max
            stream = self._stream(channel)
            hello = types_pb2.Hello(
                orchestrator=self._orchestrator, protocol_version=PROTOCOL_VERSION
            )
            await stream.write(self._hello(hello))
            reader = asyncio.create_task(self._read(stream, info))
            pinger = asyncio.create_task(self._ping(ask))
            try:
                await asyncio.wait((reader, pinger), return_when=asyncio.FIRST_COMPLETED)
                if not reader.done():
                    pinger.result()
                    raise Unavailable(f"the worker has not answered for {self._timeout_s:g} s")
                reader.result()
            finally:
                pinger.cancel()
                reader.cancel()
                stream.cancel()

    async def _read(self, stream: Any, info: ModelInfo) -> None:
        writer: asyncio.Task[None] | None = None
        try:
            async for response in stream:
                self._heard += 1
                if writer is None:
                    writer = asyncio.create_task(self._write(stream))
                    _log.info("%s %s is ready: %s", self.role, self.address, info.model)
                draining = bool(response.draining)
                self._set(LinkState.DRAINING if draining else LinkState.READY, "")
                self._receive(response)
        finally:
            if writer is not None:
                writer.cancel()

    async def _ping(
        self, ask: Callable[[float], Awaitable[worker_pb2.GetModelInfoResponse]]
    ) -> None:
        """Keep measuring the round trip, off the stream that sessions use.

        Returns when the worker hangs: it misses two pings and says nothing on the stream either.
        Two, since one may have come to its end while this process itself stood still.
        """
        self._rtts_s.clear()
        missed, patience_s = 0, self._timeout_s / 2.0
        while missed < _PINGS_MISSED_MAX:
            heard = self._heard
            started_s = time.perf_counter()
            try:
                answer = await ask(patience_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    missed = missed + 1 if self._heard == heard else 0
                    continue
                # The stream shows what that means.
                await asyncio.sleep(_PING_S)
                continue
            missed = 0
            rtt_s = time.perf_counter() - started_s
            self._rtts_s.append(rtt_s)
            self.rtt_s = min(self._rtts_s)
            if rtt_s == self.rtt_s:
                # The quickest answer says most about the worker's clock.
                self.clock_offset_s = time.monotonic() - rtt_s / 2 - answer.clock_s
            if len(self._rtts_s) < _PINGS_KEPT:
                await asyncio.sleep(_PING_FIRST_S)
            else:
                # Those who owe something are asked more often.
                await asyncio.sleep(min(_PING_S, 1.0 if self.sessions else _PING_S))

    @abc.abstractmethod
    def _hello(self, hello: types_pb2.Hello) -> RequestT: ...

    async def _write(self, stream: Any) -> None:
        # A failed write ends the stream; the reader learns of it and reports why.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._wake.wait()
                self._wake.clear()
                request, self._pending = self._pending, self._new_request()
                await stream.write(request)


class VerifierLink(Link[verifier_pb2.VerifyRequest, verifier_pb2.VerifyResponse]):
    """Stream to a verifier."""

    role = "verifier"

    def __init__(
        self,
        address: str,
        orchestrator: str,
        *,
        timeout_s: float = 5.0,
        on_change: Callable[[VerifierLink], None],
        on_batch: Callable[[VerifierLink, VerifierBatch], None],
        on_tokenizer: Callable[[ModelInfo, dict[str, bytes]], Awaitable[None]],
        has_tokenizer: Callable[[ModelInfo], bool],
        tls: Tls | None = None,
    ) -> None:
        super().__init__(address, orchestrator, timeout_s, tls)
        self.step = NO_STEP
        """Of the last verify step; kept by the driver."""
        self.pace = VerifierPace()
        """Likewise, of the last steps."""
        self.stepped_s = 0.0
        """When it was heard of, on the driver's clock."""
        self._on_change, self._on_batch = on_change, on_batch
        self._on_tokenizer, self._has_tokenizer = on_tokenizer, has_tokenizer

    def took_step(self, step: StepReport, now_s: float) -> None:
        """Take note of a verify step."""
        self.step, self.stepped_s = step, now_s
        self.pace.observe(step)

    def open(self, spec: SessionSpec) -> None:
        """Queue a session to open."""
        self._pending.opens.append(wire.session_to_pb(spec))
        self._wake.set()

    def offer(self, session: int, source: int, draft: bytes) -> bool:
        """Queue a draft; False if it was dropped."""
        if len(self._pending.drafts) >= DRAFT_ROWS_MAX:
            return False
        row = self._pending.drafts.add()
        row.session, row.source, row.draft = session, source, draft
        self._wake.set()
        return True

    def ask_repeat(self, resync: Resync) -> None:
        """Queue a request for lost commits."""
        self._pending.resyncs.append(wire.resync_to_pb(resync))
        self._wake.set()

    def abort(self, session: int, epoch: int) -> None:
        """Queue the end of a session."""
        self._pending.aborts.add(session=session, epoch=epoch)
        self._wake.set()

    def _new_request(self) -> verifier_pb2.VerifyRequest:
        return verifier_pb2.VerifyRequest()

    def _hello(self, hello: types_pb2.Hello) -> verifier_pb2.VerifyRequest:
        return verifier_pb2.VerifyRequest(hello=hello)

    def _stream(self, channel: grpc.aio.Channel) -> Any:
        return verifier_pb2_grpc.VerifierServiceStub(channel).Verify()

    async def _prepare(self, channel: grpc.aio.Channel, info: ModelInfo) -> None:
        if self._has_tokenizer(info):
            return
        files: dict[str, bytearray] = {}
        pieces = verifier_pb2_grpc.VerifierServiceStub(channel).GetTokenizer(
            verifier_pb2.GetTokenizerRequest(), timeout=HANDSHAKE_TIMEOUT_S
        )
        async for piece in pieces:
            files.setdefault(piece.name, bytearray()).extend(piece.chunk)
        await self._on_tokenizer(info, {name: bytes(data) for name, data in files.items()})

    def _receive(self, response: verifier_pb2.VerifyResponse) -> None:
        commits: list[tuple[int, bytes, Commit, wire.RelayedReport]] = []
        candidates: dict[int, bytes] = {}
        for row in response.commits:
            data = row.commit
            commit = wire.commit_from_bytes(data)
            if commit is not None:
                report = wire.relayed_report_from_pb(row.report)
                commits.append((row.session, data, commit, report))
                if row.candidates:
                    candidates[row.session] = row.candidates
        self._on_batch(
            self,
            VerifierBatch(
                [(opened.session, opened.epoch) for opened in response.opened],
                [wire.rejection_from_pb(rejection) for rejection in response.rejections],
                commits,
                [wire.prompt_logprobs_from_pb(piece) for piece in response.prompt_logprobs],
                wire.step_report_from_pb(response.step) if response.HasField("step") else None,
                candidates,
                [wire.pull_report_from_pb(pull) for pull in response.kv_pulls],
            ),
        )

    def _changed(self) -> None:
        self._on_change(self)


class DrafterLink(Link[drafter_pb2.ProposeRequest, drafter_pb2.ProposeResponse]):
    """Stream to a drafter."""

    role = "drafter"

    def __init__(
        self,
        address: str,
        orchestrator: str,
        *,
        source: int,
        timeout_s: float = 5.0,
        on_change: Callable[[DrafterLink], None],
        on_batch: Callable[[DrafterLink, DrafterBatch], None],
        tls: Tls | None = None,
    ) -> None:
        super().__init__(address, orchestrator, timeout_s, tls)
        self.source = source
        """Number under which its guesses go; no other drafter of this orchestrator has it. Another
        one is given by the fleet when something else guesses there."""
        self.grow: GrowReport | None = None
        """Of its last growing step; kept by the driver."""
        self.gain: float | None = None
        """Tokens a verify step that it wins for a session, as seen of late; likewise."""
        self.spares: set[int] = set()
        """Of its sessions those that rely on another drafter of its kind; likewise."""
        self._on_change, self._on_batch = on_change, on_batch

    def bind(self, spec: BindSpec) -> None:
        """Queue a session to mirror."""
        self._pending.binds.append(wire.bind_to_pb(spec))
        self._wake.set()

    def commit(self, session: int, commit: bytes, candidates: bytes = b"") -> None:
        """Queue a commit, and the step's candidates if the drafter asks for any."""
        row = self._pending.commits.add()
        row.session, row.commit = session, commit
        if candidates and self.info is not None and self.info.candidates:
            row.candidates = candidates
        self._wake.set()

    def learn_gain(self, gain: float) -> None:
        """Take in what a session won by the drafter, in tokens a verify step."""
        self.gain = gain if self.gain is None else self.gain + _GAIN_SHARE * (gain - self.gain)

    def pace_for(self, verifier: VerifierLink, gain: float | None = None) -> DrafterPace:
        """What is known of the drafter, for a session on that verifier.

        `gain` is what it is taken to win until it has shown it.
        """
        if self.gain is not None:
            gain = self.gain
        return DrafterPace(
            step_s=self.grow.duration_s if self.grow is not None else 0.0,
            leaves_max=self.grow.leaves_max if self.grow is not None else 0,
            rtt_s=self.rtt_s + verifier.rtt_s,
            sessions=len(self.sessions),
            # What a chain of such guesses wins.
            agreement=None if gain is None else gain / (1.0 + gain),
        )

    def set_budget(self, session: int, binding: int, budget: DraftBudget) -> None:
        """Queue a new budget for a session."""
        self._pending.budgets.add(
            session=session, binding=binding, budget=wire.budget_to_pb(budget)
        )
        self._wake.set()

    def unbind(self, session: int, binding: int) -> None:
        """Queue the end of an attachment."""
        self._pending.unbinds.add(session=session, binding=binding)
        self._wake.set()

    def _new_request(self) -> drafter_pb2.ProposeRequest:
        return drafter_pb2.ProposeRequest()

    def _hello(self, hello: types_pb2.Hello) -> drafter_pb2.ProposeRequest:
        return drafter_pb2.ProposeRequest(hello=hello)

    def _stream(self, channel: grpc.aio.Channel) -> Any:
        return drafter_pb2_grpc.DrafterServiceStub(channel).Propose()

    async def _prepare(self, channel: grpc.aio.Channel, info: ModelInfo) -> None:
        return None

    def _receive(self, response: drafter_pb2.ProposeResponse) -> None:
        if response.HasField("swapped"):
            self.info = wire.model_info_from_pb(response.swapped)
            _log.info("drafter %s has another version: %s", self.address, self.info.model)
            self._changed()
        self._on_batch(
            self,
            DrafterBatch(
                [wire.rejection_from_pb(rejection) for rejection in response.rejections],
                [(row.session, row.binding, row.draft) for row in response.drafts],
                [wire.resync_from_pb(resync) for resync in response.resyncs],
                wire.grow_report_from_pb(response.step) if response.HasField("step") else None,
            ),
        )

    def _changed(self) -> None:
        self._on_change(self)
