"""The two endpoints that generate: from a body to an answer, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Generic

from orchestrator.config import DriverConfig, HttpConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.generation import Generation, Output
from orchestrator.http.bodies import BodyReader, BodyT, ClientGoneError, Receive, Scope, Send, parse
from orchestrator.http.errors import refusal_of
from orchestrator.http.keys import ApiKey, Limiter
from orchestrator.http.reading import Asked, field_name
from orchestrator.http.schemas import ChatCompletionRequest
from orchestrator.http.writing import Answer, encode
from orchestrator.jobs import Job, Request, job_of, model_named
from orchestrator.prefix_memory import Prefix
from orchestrator.text import TextCodec
from outrider.domain import ModelInfo
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
        limits: DriverConfig,
        config: HttpConfig,
        *,
        bodies: BodyReader,
        limiter: Limiter,
    ) -> None:
        """`read` makes sense of a parsed body for a tenant."""
        self._kind, self._read = kind, read
        self._chat = issubclass(kind, ChatCompletionRequest)
        self._driver, self._fleet = driver, fleet
        self._limits, self._config = limits, config
        self._bodies, self._limiter = bodies, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key: ApiKey = scope["state"]["key"]
        with self._limiter.admit(key, time.monotonic()):
            data = await self._bodies.read(scope, receive)
            try:
                await self._serve(data, key.name, receive, send)
            except InvalidRequest as error:
                name = field_name(error.field, chat=self._chat)
                raise type(error)(name, error.message) from error

    async def _serve(self, data: bytes, tenant: str, receive: Receive, send: Send) -> None:
        asked = self._read(parse(self._kind, data), tenant)
        jobs, codec = await self._jobs(asked, len(data))
        prefixes = [await self._driver.placer.find(job) for job in jobs]
        with self._generating(jobs, prefixes) as generations:
            leaving = asyncio.create_task(self._watch(receive, generations))
            try:
                await self._answer(send, asked, jobs, codec, generations)
            finally:
                leaving.cancel()

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
        self, jobs: Sequence[Job], prefixes: Sequence[Prefix]
    ) -> Iterator[list[Generation]]:
        generations: list[Generation] = []
        try:
            for job, prefix in zip(jobs, prefixes, strict=True):
                generations.append(self._driver.generate(job, prefix))
            yield generations
        finally:
            for generation in generations:
                self._driver.abandon(generation)

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
    ) -> None:
        prompts = [
            codec.decode(job.prompt) if request.prompt is None else request.prompt
            for request, job in zip(asked.requests, jobs, strict=True)
            if asked.form.echo
        ]
        number = uuid.uuid4().hex
        answer = Answer(number, int(time.time()), asked.form, jobs, prompts, codec)
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
        if not started or not answer.complete:
            raise ClientGoneError
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
