"""A worker's stream, driven by hand: what a test sends, and all that came back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from outrider import wire
from outrider.domain import (
    PROTOCOL_VERSION,
    BindSpec,
    Commit,
    Draft,
    DraftBudget,
    PullReport,
    SamplingParams,
    SessionSpec,
)
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)

HELLO = types_pb2.Hello(orchestrator="by hand", protocol_version=PROTOCOL_VERSION)


def session(number: int, text: bytes, **changes: Any) -> SessionSpec:
    """A greedy session of 16 tokens."""
    settings: dict[str, Any] = {
        "session": number,
        "epoch": 1,
        "prompt": tuple(text),
        "committed": (),
        "sampling": SamplingParams(temperature=0.0),
        "seed": 1,
        "tokens_max": 16,
        "ignore_eos": True,
    }
    return SessionSpec(**{**settings, **changes})


def binding(number: int, prompt: bytes, fingerprint: str, **changes: Any) -> BindSpec:
    """An attachment to a greedy session."""
    settings: dict[str, Any] = {
        "session": number,
        "epoch": 1,
        "binding": 1,
        "prompt": tuple(prompt),
        "committed": (),
        "sampling": SamplingParams(temperature=0.0),
        "seed": 1,
        "tokenizer_fingerprint": fingerprint,
        "vocabulary_size": 260,
        "budget": DraftBudget(),
    }
    return BindSpec(**{**settings, **changes})


class VerifierStream:
    """One orchestrator's stream to a verifier."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.opened: list[tuple[int, int]] = []
        self.rejections: list[Any] = []
        self.commits: dict[int, list[Commit]] = {}
        self.reports: dict[int, types_pb2.CommitReport] = {}
        """Latest by session."""
        self.pulls: list[PullReport] = []
        """What became of fetching KV from peers; signs of life left out."""
        self.draining = False

    async def send(self, **parts: Any) -> None:
        """Write one message."""
        await self.call.write(verifier_pb2.VerifyRequest(**parts))

    async def open(self, *specs: SessionSpec) -> None:
        """Open sessions."""
        await self.send(opens=[wire.session_to_pb(spec) for spec in specs])

    async def offer(self, number: int, draft: Draft, source: int = 1) -> None:
        """Send a draft."""
        row = types_pb2.DraftRow(session=number, source=source, draft=wire.draft_to_bytes(draft))
        await self.send(drafts=[row])

    async def until(self, condition: Callable[[], bool]) -> None:
        """Read until something has come."""
        while not condition():
            response = await self.call.read()
            assert response is not grpc.aio.EOF, "the stream ended"
            self.opened += [(opened.session, opened.epoch) for opened in response.opened]
            self.rejections += [wire.rejection_from_pb(r) for r in response.rejections]
            self.draining |= response.draining
            pulls = [wire.pull_report_from_pb(pull) for pull in response.kv_pulls]
            self.pulls += [pull for pull in pulls if pull.outcome is not None]
            for row in response.commits:
                commit = wire.commit_from_bytes(row.commit)
                assert commit is not None
                self.commits.setdefault(row.session, []).append(commit)
                self.reports[row.session] = row.report

    async def until_finished(self, number: int) -> tuple[int, ...]:
        """Read until a session's last commit; returns all that was committed."""

        def finished() -> bool:
            assert number not in {rejection.session for rejection in self.rejections}
            return any(commit.last for commit in self.commits.get(number, ()))

        await self.until(finished)
        return self.tokens(number)

    def tokens(self, number: int) -> tuple[int, ...]:
        """What was committed for a session."""
        return tuple(token for commit in self.commits[number] for token in commit.tokens)


@contextlib.asynccontextmanager
async def verifier_stream(address: str) -> AsyncIterator[VerifierStream]:
    """Open a stream to a verifier; the handshake is done."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify()
        await call.write(verifier_pb2.VerifyRequest(hello=HELLO))
        assert await call.read() is not grpc.aio.EOF
        yield VerifierStream(call)
        call.cancel()


@contextlib.asynccontextmanager
async def drafter_stream(address: str) -> AsyncIterator[Any]:
    """Open a stream to a drafter; yields the call. The handshake is done."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        call = drafter_pb2_grpc.DrafterServiceStub(channel).Propose()
        await call.write(drafter_pb2.ProposeRequest(hello=HELLO))
        assert await call.read() is not grpc.aio.EOF
        yield call
        call.cancel()
