"""Clients that read slowly, or not at all: many of them cost little, and nobody else waits.

The full size takes minutes:

    pytest tests/service/test_slow_readers.py --slow-readers 10000 --log-cli-level info
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

import httpx
import pytest

from orchestrator.config import DriverConfig
from outrider.client import AsyncClient, Request
from outrider.domain import FinishReason, SessionSpec
from outrider.errors import Exhausted
from outrider.v1 import generation_pb2, types_pb2, verifier_pb2
from tests.support.fleet import orchestrator, until
from tests.support.orchestrator_process import OrchestratorProcess, orchestrator_process
from tests.support.scripted_verifier import INFO, answer, commit, opened, scripted_verifier

ROOMY = dataclasses.replace(INFO, length_max=1 << 20)
COMMITS, COMMIT_TOKENS = 200, 64
TOKENS = COMMITS * COMMIT_TOKENS
READER_BYTES = 700 * 1_024
"""What a slow reader may cost: ids, text and times of 12,800 tokens, and its connection."""
WAVE = 200
"""Readers that ask at once."""
WINDOW_BYTES = 1_024
"""That a gRPC client takes in before it has to say that it wants more."""
SAY = {"model": "scripted", "prompt": "Say"}

_log = logging.getLogger(__name__)


def long_or_short(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
    """As many tokens as are asked for: all at once, or a handful."""
    if spec.tokens_max < TOKENS:
        yield from answer(spec, b"hello")
        return
    yield opened(spec)
    piece = b"a" * COMMIT_TOKENS
    for index in range(COMMITS):
        last = index == COMMITS - 1
        done = index * COMMIT_TOKENS
        yield commit(spec, done, piece, FinishReason.LENGTH if last else None)


def http_request(tokens_max: int) -> bytes:
    asked = {**SAY, "stream": True, "max_tokens": tokens_max, "return_token_ids": True}
    data = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def grpc_request(tokens_max: int) -> generation_pb2.GenerateRequest:
    sampling = types_pb2.SamplingParams(temperature=0)
    return generation_pb2.GenerateRequest(prompt="Say", tokens_max=tokens_max, sampling=sampling)


async def http_reader(address: str) -> socket.socket:
    """A client that asks for a long answer and reads none of it."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    client.setblocking(False)
    host, port = address.split(":")
    await loop.sock_connect(client, (host, int(port)))
    await loop.sock_sendall(client, http_request(TOKENS))
    return client


async def grpc_reader(address: str) -> socket.socket:
    """The same over gRPC. By hand: a library would read ahead."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setblocking(False)
    host, port = address.split(":")
    await loop.sock_connect(client, (host, int(port)))
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/outrider.v1.GenerationService/Generate",
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    head = b"".join(
        # HPACK's plainest form: a literal, not indexed, not compressed.
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    message = grpc_request(TOKENS).SerializeToString()
    data = b"\0" + len(message).to_bytes(4, "big") + message
    initial_window = (4).to_bytes(2, "big") + WINDOW_BYTES.to_bytes(4, "big")
    frames = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        frame(4, 0, 0, initial_window),  # SETTINGS
        frame(4, 1, 0, b""),  # their acknowledgement
        frame(1, 4, 1, head),  # HEADERS, complete
        frame(0, 1, 1, data),  # DATA, the last one
    ]
    await loop.sock_sendall(client, b"".join(frames))
    return client


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame of HTTP/2."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


@contextlib.asynccontextmanager
async def readers(
    read: Callable[[str], Awaitable[socket.socket]], address: str, count: int
) -> AsyncIterator[list[socket.socket]]:
    """So many clients that read nothing; they leave at the end."""
    clients: list[socket.socket] = []
    try:
        for _ in range(count):
            clients.append(await read(address))
        yield clients
    finally:
        for client in clients:
            client.close()


async def metric(running: OrchestratorProcess, name: str) -> float:
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    series = re.compile(rf"outrider_{name}[ {{]")
    return sum(float(line.split()[-1]) for line in lines if series.match(line))


async def all_answered(running: OrchestratorProcess, count: int) -> None:
    """Wait until so many answers are complete, with at least all over gRPC unread.

    Of those over HTTP some fit into the kernel's buffers, when tokens came so fast that many shared
    an event.
    """
    ended = unread = 0.0

    async def are_answered() -> bool:
        nonlocal ended, unread
        await asyncio.sleep(0.2)
        ended = await metric(running, "completion_tokens_total") // TOKENS
        unread = await metric(running, "unread_answers")
        return ended == count and unread >= count // 2

    try:
        await until(are_answered, what="all answers are complete", timeout_s=120)
    except AssertionError as error:
        raise AssertionError(f"{ended:g} of {count} are complete, {unread:g} unread") from error


async def fast_clients(running: OrchestratorProcess, count: int) -> float:
    """Ask through both doors in turn; returns the longest wait in seconds."""
    slowest_s = 0.0
    async with (
        httpx.AsyncClient(base_url=running.url, timeout=60) as http,
        AsyncClient(running.grpc_address, resume_s=0) as client,
    ):
        for _ in range(count):
            started_s = time.monotonic()
            response = await http.post("/v1/completions", json={**SAY, "max_tokens": 9})
            assert response.json()["choices"][0]["text"] == "hello"
            completion = await client.complete(Request(prompt="Say", tokens_max=9))
            assert completion.text == "hello"
            slowest_s = max(slowest_s, time.monotonic() - started_s)
    return slowest_s


def allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"at most {hard} files may be open here, and {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


@pytest.mark.timeout(1_200)
async def test_slow_readers_do_not_exhaust_the_process(tmp_path: Path, slow_readers: int) -> None:
    count = slow_readers
    allow_files(count + 1_000)  # The orchestrator inherits it.
    room = str(count + 100)
    arguments = ["--sessions-max", room, "--http-connections-max", room]
    arguments += ["--http-write-timeout", "900", "--grpc-write-timeout", "900"]
    async with (
        scripted_verifier(long_or_short, ROOMY) as target,
        orchestrator_process(tmp_path / "log", target.address, *arguments) as running,
    ):
        await fast_clients(running, 5)
        before_bytes = running.resident_bytes
        async with contextlib.AsyncExitStack() as stack:
            # In waves: the script writes no faster than this, and nobody is to wait a minute.
            for first in range(0, count, WAVE):
                half = min(WAVE, count - first) // 2
                await stack.enter_async_context(readers(grpc_reader, running.grpc_address, half))
                await stack.enter_async_context(readers(http_reader, running.http_address, half))
                await all_answered(running, first + 2 * half)
            each_bytes = (running.resident_bytes - before_bytes) / count
            slowest_s = await fast_clients(running, 20)
            _log.info(
                "%d slow readers: %.0f KiB each; a fast client waits %.2f s at most",
                count,
                each_bytes / 1_024,
                slowest_s,
            )
            assert each_bytes < READER_BYTES
            assert slowest_s < 5.0

        async def all_gone() -> bool:
            held = await metric(running, "unread_answers")
            return held + await metric(running, "sessions") == 0

        await until(all_gone, what="nothing is kept of clients that left", timeout_s=60)
        await fast_clients(running, 5)


async def test_answers_that_nobody_reads_count_as_sessions() -> None:
    async with (
        scripted_verifier(long_or_short, ROOMY) as target,
        orchestrator([target.address], config=DriverConfig(sessions_max=2)) as running,
    ):
        async with readers(grpc_reader, running.address, 2):

            async def refused() -> bool:
                if running.driver.load or running.driver.unread < 2:
                    return False
                try:
                    await running.client.complete(Request(prompt="Say", tokens_max=9))
                except Exhausted:
                    return True
                return False

            await until(refused, what="there is no room beside two unread answers")

        async def served() -> bool:
            return running.driver.unread == 0

        await until(served, what="clients that left leave nothing behind")
        assert (await running.client.complete(Request(prompt="Say", tokens_max=9))).text == "hello"


async def test_a_grpc_client_that_reads_nothing_is_given_up() -> None:
    config = DriverConfig(write_timeout_s=0.2)
    async with (
        scripted_verifier(long_or_short, ROOMY) as target,
        orchestrator([target.address], config=config) as running,
        readers(grpc_reader, running.address, 1),
    ):

        async def given_up() -> bool:
            left = running.driver.load + running.driver.unread
            return bool(target.verifier.opens) and left == 0

        await until(given_up, what="the generation of a client that does not read has ended")
