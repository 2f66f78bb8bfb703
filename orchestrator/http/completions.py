"""The two endpoints that generate: from a body to an answer, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Generic

from orchestrator.config import DriverConfig, HttpConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.generation import Generation, Output
from orchestrator.http.bodies import BodyReader, BodyT, ClientGoneError, Receive, Scope, Send, parse
from orchestrator.http.errors import refusal_of
from orchestrator.http.keys import ApiKey, Limiter
from orchestrator.http.positions import KnownPosition, parse_event_id
from orchestrator.http.reading import Asked, field_name
from orchestrator.http.schemas import ChatCompletionRequest
from orchestrator.http.writing import Answer, encode
from orchestrator.jobs import Job, Request, job_of, model_named
from orchestrator.prefix_memory import Prefix
from orchestrator.resuming import ResumePoint, ResumeRequest
from orchestrator.takeover import Takeover
from orchestrator.text import TextCodec
from outrider.domain import ModelInfo, Origin
from outrider.errors import InvalidRequest, OutriderError

_MERGE_QUEUE = 64
"""Outputs of several prompts' generations that wait to be written."""
_DONE = b"data: [DONE]\n\n"


class Completions(Generic[BodyT]):
    """One endpoint; an ASGI application that raises `OutriderError` until it has begun."""

    def __init__(
        self,
        kind: type[BodyT],
        read: Callable[[BodyT, str], Asked],
        driver: Driver,
        fleet: Fleet,
        takeover: Takeover,
        limits: DriverConfig,
        config: HttpConfig,
        *,
        bodies: BodyReader,
        limiter: Limiter,
    ) -> None:
        """`read` makes sense of a parsed body for a tenant."""
        self._kind, self._read = kind, read
        self._chat = issubclass(kind, ChatCompletionRequest)
        self._driver, self._fleet, self._takeover = driver, fleet, takeover
        self._limits, self._config = limits, config
        self._bodies, self._limiter = bodies, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key: ApiKey = scope["state"]["key"]
        origin: Origin = scope["state"]["origin"]
        with self._limiter.admit(key, time.monotonic()):
            data = await self._bodies.read(scope, receive)
            try:
                last_event = dict(scope["headers"]).get(b"last-event-id", b"").decode("latin-1")
                await self._serve(data, key.name, last_event, receive, send, origin)
            except InvalidRequest as error:
                name = field_name(error.field, chat=self._chat)
                raise type(error)(name, error.message) from error

    async def _serve(
        self,
        data: bytes,
        tenant: str,
        last_event: str,
        receive: Receive,
        send: Send,
        origin: Origin,
    ) -> None:
        # Before it is read: what is refused must cost those who are served next to nothing.
        self._driver.check_room(1)
        asked = self._read(parse(self._kind, data), tenant)
        begun: tuple[KnownPosition, ...] = ()
        if last_event:
            job, generation, begun = await self._resumed(asked, tenant, last_event, origin)
            jobs, codec = [job], self._fleet.codec(job.info)
            generating = self._ending([generation])
        else:
            jobs, codec = await self._jobs(asked, len(data))
            prefixes = [await self._driver.placer.find(job) for job in jobs]
            generating = self._generating(jobs, prefixes, origin)
        with generating as generations:
            leaving = asyncio.create_task(self._watch(receive, generations))
            try:
                await self._answer(send, asked, jobs, codec, generations, begun)
            finally:
                leaving.cancel()

    async def _resumed(
        self, asked: Asked, tenant: str, last_event: str, origin: Origin
    ) -> tuple[Job, Generation, tuple[KnownPosition, ...]]:
        """Go on after an event that the client has; the request must be the one it began with."""
        if not asked.form.stream:
            raise InvalidRequest("last-event-id", "only streams are resumed; set stream to true")
        number, positions = parse_event_id(last_event)
        points = {
            choice: ResumePoint(one.offset, one.digest, one.characters, one.ended)
            for choice, one in enumerate(positions)
        }
        job, generation = await self._takeover.resume(
            # Whoever has an event has the prompt's log-probabilities, which come before.
            ResumeRequest(number, tenant, points, prompt_logprobs_known=True),
            origin,
        )
        return job, generation, positions

    @contextlib.contextmanager
    def _ending(self, generations: list[Generation]) -> Iterator[list[Generation]]:
        try:
            yield generations
        finally:
            for generation in generations:
                self._driver.abandon(generation)

    async def _jobs(self, asked: Asked, size: int) -> tuple[list[Job], TextCodec]:
        info = model_named(asked.model, self._fleet.models())
        codec = self._fleet.codec(info)
        if size <= self._config.tokenize_bytes_max:
            return self._checked(asked.requests, info, codec), codec
        return await asyncio.to_thread(self._checked, asked.requests, info, codec), codec

    def _checked(self, requests: Sequence[Request], info: ModelInfo, codec: TextCodec) -> list[Job]:
        choices = sum(request.n for request in requests)
        if len(requests) > 1 and choices > self._limits.sessions_max:
            raise InvalidRequest("prompt", f"asks for {choices} continuations, which is too many")
        return [job_of(request, info, codec, self._limits) for request in requests]

    @contextlib.contextmanager
    def _generating(
        self, jobs: Sequence[Job], prefixes: Sequence[Prefix], origin: Origin
    ) -> Iterator[list[Generation]]:
        generations: list[Generation] = []
        with self._ending(generations):
            for job, prefix in zip(jobs, prefixes, strict=True):
                generations.append(self._driver.generate(job, prefix, origin))
            yield generations

    async def _watch(self, receive: Receive, generations: Sequence[Generation]) -> None:
        """Abort everything as soon as the client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        for generation in generations:
            self._driver.abandon(generation)
            generation.mailbox.close()

    async def _answer(
        self,
        send: Send,
        asked: Asked,
        jobs: Sequence[Job],
        codec: TextCodec,
        generations: Sequence[Generation],
        begun: Sequence[KnownPosition],
    ) -> None:
        prompts = [
            codec.decode(job.prompt) if request.prompt is None else request.prompt
            for request, job in zip(asked.requests, jobs, strict=False)
            if asked.form.echo
        ]
        number = generations[0].id
        answer = Answer(number, int(time.time()), asked.form, jobs, prompts, codec)
        for known, running in zip(begun, generations[0].choices, strict=False):
            answer.resume(running.choice, known, running.session.output[: known.offset])
        outputs = merged(generations)
        if asked.form.stream:
            await self._stream(send, answer, outputs)
            return
        async for job, output in outputs:
            if isinstance(output, OutriderError):
                raise output
            answer.take(job, output)
        if not answer.complete:
            raise ClientGoneError
        body = await self._body(answer)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _write(send, body, more=False)

    async def _body(self, answer: Answer) -> bytes:
        # Spelling out the log-probabilities of a long prompt takes a while: not on the loop.
        if answer.form.logprobs is not None and answer.form.echo:
            return await asyncio.to_thread(answer.whole)
        return answer.whole()

    async def _stream(
        self,
        send: Send,
        answer: Answer,
        outputs: AsyncIterator[tuple[int, Output]],
    ) -> None:
        started = False
        async for job, output in outputs:
            if isinstance(output, OutriderError):
                # Before the first output an error is a status, afterwards an event.
                if not started:
                    raise output
                event = f"data: {encode(refusal_of(output).body)}\n\n".encode()
                await _write(send, event + _DONE, more=False)
                return
            choice = answer.take(job, output)
            if choice is None:
                continue
            if not started:
                started = True
                await send(_START)
            await _write(send, answer.event(choice), more=True)
        if not answer.complete:
            raise ClientGoneError
        if not started:  # It was resumed after its last output.
            await send(_START)
        tail = answer.last_event() + _DONE if answer.form.usage_last else _DONE
        await _write(send, tail, more=False)


async def _write(send: Send, data: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        # Proxies shall pass events on as they come.
        (b"x-accel-buffering", b"no"),
    ],
}


async def merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Output]]:
    """Yield outputs as they come, each with the index of its generation.

    After an error nothing more comes of that generation; the others go on.
    """
    if len(generations) == 1:
        async for output in generations[0].outputs():
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output] | None] = asyncio.Queue(_MERGE_QUEUE)

    async def pass_on(index: int, generation: Generation) -> None:
        async for output in generation.outputs():
            await queue.put((index, output))
        await queue.put(None)

    tasks = [asyncio.create_task(pass_on(*pair)) for pair in enumerate(generations)]
    try:
        for _ in generations:
            while (item := await queue.get()) is not None:
                yield item
    finally:
        for task in tasks:
            task.cancel()
