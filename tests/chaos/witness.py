"""Clients that never let go of a stream: they resume elsewhere, and go on listening to the old one.

So an orchestrator that was stopped, and woken when its generations had been taken over, has
somebody to speak to. Whatever it says then is in the history.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc.aio

from outrider.client import Delta, Finished, Request, Started
from outrider.client.calls import inner
from outrider.client.messages import event_from_pb, request_to_pb
from outrider.client.resuming import Progress
from outrider.v1 import generation_pb2_grpc
from tests.chaos.history import Heard
from tests.support.cases import request
from tests.support.reference import Case, Expected

SILENCE_S = 1.5
"""Who says nothing for so long is left for another orchestrator, and still listened to."""
_READING_S = 0.25
"""What was said while this process itself stood still is read within this time."""
_PATIENCE_S = 90.0
_PAUSE_S = 0.1
_GOODBYE_S = 30.0
"""So long an old stream is listened to when its generation has ended."""


@dataclass(slots=True)
class Seen:
    """What witnesses saw."""

    generations: int = 0
    takeovers: int = 0
    """Generations resumed while the old stream was still open."""
    ends: Counter[str] = field(default_factory=Counter)
    """How streams that were taken over ended."""
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    history: list[Heard] = field(default_factory=list)


class _Stream:
    """One stream of a generation."""

    def __init__(self, generation: Generation, number: int, start: int) -> None:
        self.generation, self.number, self.at = generation, number, start
        self.error: str | None = None
        self.task: asyncio.Task[None] | None = None

    async def listen(self, call: grpc.aio.UnaryStreamCall) -> None:  # type: ignore[type-arg]
        try:
            async for response in call:
                self.generation.hear(self, event_from_pb(inner(response)))
        except grpc.aio.AioRpcError as error:
            self.error = error.code().name
        finally:
            self.generation.news.set()


class Generation:
    """What is known of one generation, over all its streams."""

    def __init__(self, asked: Request, seen: Seen) -> None:
        self.progress = Progress(asked)
        self.seen = seen
        self.ids: list[int] = []
        self.streams: list[_Stream] = []
        self.finished = False
        self.news = asyncio.Event()

    @property
    def newest(self) -> _Stream:
        return self.streams[-1]

    def hear(self, stream: _Stream, event: object) -> None:
        """Take note; only what the newest stream says counts."""
        if isinstance(event, Delta):
            name = "" if self.progress.started is None else self.progress.started.generation_id
            now_s = time.monotonic()
            heard = Heard(now_s, name, stream.number, event.choice, stream.at, event.token_ids)
            self.seen.history.append(heard)
            stream.at += len(event.token_ids)
        if stream is not self.newest:
            return
        self.news.set()
        if isinstance(event, Started | Delta | Finished):
            self.progress.takes(event)
        if isinstance(event, Delta):
            self.ids += event.token_ids
        self.finished |= isinstance(event, Finished)


class Witnesses:
    """So many generations at any time, from start to stop."""

    def __init__(
        self,
        endpoints: Sequence[str],
        pairs: Sequence[tuple[Case, Expected]],
        count: int,
        seed: int,
    ) -> None:
        self._channels = [grpc.aio.insecure_channel(endpoint) for endpoint in endpoints]
        self._stubs = [generation_pb2_grpc.GenerationServiceStub(c) for c in self._channels]
        self._pairs = list(pairs)
        self._count = count
        self._chance = random.Random(seed + 3)
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.seen = Seen()

    def start(self) -> None:
        """Begin."""
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self._count)]

    async def stop(self) -> Seen:
        """Begin no more; wait for those under way, and for the last words of old streams."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        for channel in self._channels:
            await channel.close()
        return self.seen

    async def _run(self) -> None:
        ending: set[asyncio.Task[None]] = set()
        while not self._stopping:
            case, expected = self._chance.choice(self._pairs)
            generation = Generation(request(case), self.seen)
            await self._follow(generation, case)
            self.seen.generations += 1
            if not generation.finished:
                self.seen.lost.append(f"{generation.progress.started}: {len(generation.ids)} ids")
            elif tuple(generation.ids) != expected.ids:
                self.seen.wrong.append(f"{generation.progress.started}: other ids")
            ending.add(asyncio.create_task(self._part(generation)))
        await asyncio.gather(*ending)

    async def _follow(self, generation: Generation, case: Case) -> None:
        at = self._chance.randrange(len(self._stubs))
        until_s = time.monotonic() + _PATIENCE_S
        while not generation.finished and time.monotonic() < until_s:
            before = len(generation.ids)
            started = generation.progress.started
            stream = _Stream(generation, len(generation.streams) + 1, before)
            if generation.streams and generation.newest.error is None and started is not None:
                self.seen.takeovers += 1
            generation.streams.append(stream)
            stub = self._stubs[at]
            call = (
                stub.Generate(request_to_pb(request(case)))
                if started is None
                else stub.Resume(generation.progress.to_pb())
            )
            stream.task = asyncio.create_task(stream.listen(call))
            await self._hear_out(generation, stream)
            if len(generation.ids) > before:
                until_s = time.monotonic() + _PATIENCE_S
            if stream.error is not None:
                await asyncio.sleep(_PAUSE_S)
            if started is None and generation.progress.started is None:
                stream.task.cancel()  # Nothing was said: a new generation, then.
            at = (at + 1) % len(self._stubs)

    async def _hear_out(self, generation: Generation, stream: _Stream) -> None:
        """Listen until the end, an error, or a silence."""
        while not generation.finished and stream.error is None:
            generation.news.clear()
            try:
                await asyncio.wait_for(generation.news.wait(), SILENCE_S)
            except TimeoutError:
                await asyncio.sleep(_READING_S)
                if not generation.news.is_set():
                    return

    async def _part(self, generation: Generation) -> None:
        """Listen to the old streams until they end."""
        for stream in generation.streams:
            assert stream.task is not None
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(stream.task, _GOODBYE_S)
            if stream is not generation.newest:
                self.seen.ends[stream.error or "silence"] += 1
