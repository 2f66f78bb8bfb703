"""Verifiers and drafters that compute nothing: commits at a stated pace, over the real protocol.

A session's client says in the first ids of its prompt who it is, so that what was sent can be
joined with what arrived. A commit holds one to three tokens of a text; its report is as large as
a real one. A drafter answers every commit with a draft. Not to be confused with real workers:
the model is called `synthetic-relay`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from outrider import wire
from outrider.domain import Draft, ModelInfo
from outrider.tokenizer import (
    BYTE_VOCABULARY_SIZE,
    byte_tokenizer,
    byte_tokenizer_files,
    tokenizer_fingerprint,
)
from outrider.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

MODEL = "synthetic-relay"
CLIENT_IDS = 3
"""Ids of a prompt that name its client, in base 256."""
COMMIT_TOKENS = (1, 2, 3)
DRAFT_NODES = 8
PROBE_S = 0.005
"""Between two messages of a probe, on average."""
SESSIONS_MAX = 20_000
_LENGTH_MAX = 1 << 30

_Context = grpc.aio.ServicerContext[Any, Any]


def client_prompt(client: int) -> list[int]:
    """Prompt by which the workers know a client again."""
    return [*client.to_bytes(CLIENT_IDS, "big"), 32]


@dataclass(slots=True)
class _Session:
    client: int
    number: int
    epoch: int
    length: int
    """Committed tokens, prompt included."""
    prompt_tokens: int
    report: types_pb2.CommitReport
    """Kept, since only its counters change."""


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    """Says what it is."""

    def __init__(self, proposer: str) -> None:
        self._info = ModelInfo(
            model=MODEL,
            model_fingerprint="synthetic",
            tokenizer_fingerprint=tokenizer_fingerprint(byte_tokenizer()),
            vocabulary_size=BYTE_VOCABULARY_SIZE,
            length_max=_LENGTH_MAX,
            dtype="none",
            proposer=proposer,
        )

    async def GetModelInfo(
        self, request: worker_pb2.GetModelInfoRequest, context: _Context
    ) -> worker_pb2.GetModelInfoResponse:
        return worker_pb2.GetModelInfoResponse(
            info=wire.model_info_to_pb(self._info),
            incarnation="synthetic",
            sessions_max=SESSIONS_MAX,
        )


class Verifier(Worker, verifier_pb2_grpc.VerifierServiceServicer):
    """Commits for every session in turn, a message for every step that is due."""

    def __init__(self, rows: int, text: Sequence[int], seed: int) -> None:
        super().__init__("")
        self.sent: array[int] = array("q")
        """Client, output tokens with this commit, nanosecond: one after the other."""
        self.recording = False
        self.flooding = False
        """As fast as flow control allows instead of on demand."""
        self.drafts = 0
        self._rows = rows
        self._text = tuple(text)
        draw = random.Random(seed)
        self._sizes = itertools.cycle([draw.choice(COMMIT_TOKENS) for _ in range(4_096)])
        self._sessions: dict[int, _Session] = {}
        self._turn: deque[_Session] = deque()
        self._pending = verifier_pb2.VerifyResponse()
        self._due = 0
        self._wake = asyncio.Event()

    def step(self) -> None:
        """Have one message leave."""
        self._due += 1
        self._wake.set()

    def flood(self, on: bool) -> None:
        """Send without waiting to be told, or stop that."""
        self.flooding = on
        self._due = 0
        self._wake.set()

    @property
    def tokens(self) -> int:
        """Output tokens committed so far, of the sessions that are open."""
        return sum(s.length - s.prompt_tokens for s in self._sessions.values())

    async def GetTokenizer(
        self, request: verifier_pb2.GetTokenizerRequest, context: _Context
    ) -> AsyncIterator[verifier_pb2.GetTokenizerResponse]:
        for name, data in byte_tokenizer_files().items():
            yield verifier_pb2.GetTokenizerResponse(name=name, chunk=data)

    async def Verify(
        self, requests: AsyncIterator[verifier_pb2.VerifyRequest], context: _Context
    ) -> AsyncIterator[verifier_pb2.VerifyResponse]:
        reader = asyncio.create_task(self._read(requests))
        yield verifier_pb2.VerifyResponse()
        while not reader.done():
            if not (self.flooding or self._due):
                await self._wake.wait()
            self._wake.clear()
            message, self._pending = self._pending, verifier_pb2.VerifyResponse()
            if self.flooding or self._due:
                self._due = max(0, self._due - 1)
                self._commit(message)
            yield message

    async def _read(self, requests: AsyncIterator[verifier_pb2.VerifyRequest]) -> None:
        async for request in requests:
            self.drafts += len(request.drafts)
            for opened in request.opens:
                self._open(opened)
            for ended in request.aborts:
                session = self._sessions.pop(ended.session, None)
                if session is not None:
                    self._turn.remove(session)
        self._wake.set()

    def _open(self, message: verifier_pb2.OpenSession) -> None:
        session = _Session(
            client=int.from_bytes(bytes(message.prompt[:CLIENT_IDS]), "big"),
            number=message.session,
            epoch=message.epoch,
            length=len(message.prompt),
            prompt_tokens=len(message.prompt),
            report=types_pb2.CommitReport(
                counters=types_pb2.SpeculationCounters(
                    dropped_nodes={"late": 1}, accepted_by_source={1: 1, 2: 1}
                )
            ),
        )
        self._sessions[session.number] = session
        self._turn.append(session)
        self._pending.opened.add(session=session.number, epoch=session.epoch)
        # The client hears of its session with the first output.
        self._add_commit(self._pending, session, 1)
        self._wake.set()

    def _commit(self, message: verifier_pb2.VerifyResponse) -> None:
        rows = min(self._rows, len(self._turn))
        for _ in range(rows):
            session = self._turn[0]
            self._turn.rotate(-1)
            self._add_commit(message, session, next(self._sizes))
        message.step.duration_s = 0.02
        message.step.rows = rows
        if self.recording:
            now_ns = time.monotonic_ns()
            for row in itertools.islice(reversed(self._turn), rows):
                self.sent.extend((row.client, row.length - row.prompt_tokens, now_ns))

    def _add_commit(
        self, message: verifier_pb2.VerifyResponse, session: _Session, count: int
    ) -> None:
        # The client's number sets where in the text it begins.
        start = (session.client * 37 + session.length) % (len(self._text) - count)
        commit = types_pb2.Commit(
            epoch=session.epoch,
            base_length=session.length,
            tokens=self._text[start : start + count],
        )
        session.length += count
        report = session.report
        counters = report.counters
        counters.verify_steps += 1
        counters.verified_draft_tokens += DRAFT_NODES
        counters.accepted_draft_tokens += count - 1
        counters.accepted_by_source[1] += count - 1
        report.sources[:] = [1] * (count - 1) + [0]
        message.commits.add(
            session=session.number, commit=commit.SerializeToString(), report=report
        )


class Probe(verifier_pb2_grpc.VerifierServiceServicer):
    """Sends the time, for ever: the way from this process to the clients' without a relay."""

    async def GetTokenizer(
        self, request: verifier_pb2.GetTokenizerRequest, context: _Context
    ) -> AsyncIterator[verifier_pb2.GetTokenizerResponse]:
        draw = random.Random(2)
        while True:
            # Not in step with anything that is measured.
            await asyncio.sleep(PROBE_S * 2 * draw.random())
            now_ns = time.monotonic_ns()
            yield verifier_pb2.GetTokenizerResponse(chunk=now_ns.to_bytes(8, "big"))

    async def Verify(
        self, requests: AsyncIterator[verifier_pb2.VerifyRequest], context: _Context
    ) -> AsyncIterator[verifier_pb2.VerifyResponse]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a probe decodes nothing")
        yield verifier_pb2.VerifyResponse()


class Drafter(Worker, drafter_pb2_grpc.DrafterServiceServicer):
    """Answers each commit with a draft."""

    def __init__(self) -> None:
        super().__init__("synthetic")
        self._bindings: dict[int, int] = {}
        nodes = tuple(range(DRAFT_NODES))
        parents = tuple(node - 1 for node in nodes)
        self._draft = wire.draft_to_bytes(Draft(1, 1_000, 1, nodes, parents, (-0.5,) * DRAFT_NODES))

    async def Propose(
        self, requests: AsyncIterator[drafter_pb2.ProposeRequest], context: _Context
    ) -> AsyncIterator[drafter_pb2.ProposeResponse]:
        yield drafter_pb2.ProposeResponse()
        async for request in requests:
            answer = drafter_pb2.ProposeResponse()
            for bound in request.binds:
                self._bindings[bound.session] = bound.binding
            for unbound in request.unbinds:
                self._bindings.pop(unbound.session, None)
            for row in request.commits:
                answer.drafts.add(
                    session=row.session,
                    binding=self._bindings.get(row.session, 0),
                    draft=self._draft,
                )
            if answer.drafts:
                yield answer
