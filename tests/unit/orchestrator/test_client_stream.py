"""One timer for all writes to a client: it ends those that take too long, and no others."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc.aio
import pytest

from orchestrator.client_stream import ClientStream
from outrider.errors import Unavailable

LIMIT_S = 0.02


class Reader:
    """A call whose client takes a message when it is told to."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.reads = asyncio.Event()

    async def write(self, message: Any) -> None:
        await self.reads.wait()
        self.taken.append(message)


async def test_whoever_reads_nothing_is_given_up() -> None:
    reader = Reader()
    stream = ClientStream(reader.write, LIMIT_S)
    with pytest.raises(Unavailable, match=r"read nothing for 0\.02 s"):
        await stream.write("one")
    assert reader.taken == []
    # The task itself goes on, to tell why.
    await asyncio.sleep(0)
    stream.close()


async def test_time_counts_for_each_message() -> None:
    reader = Reader()
    stream = ClientStream(reader.write, LIMIT_S)
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    while loop.time() - begin_s < 3 * LIMIT_S:
        reader.reads.clear()
        loop.call_later(LIMIT_S / 2, reader.reads.set)
        await stream.write("message")
    assert len(reader.taken) >= 3
    reader.reads.clear()
    with pytest.raises(Unavailable):
        await stream.write("last")
    stream.close()


async def test_a_cancelled_task_is_cancelled() -> None:
    begun = asyncio.Event()

    async def serve() -> None:
        with contextlib.closing(ClientStream(Reader().write, 60.0)) as stream:
            begun.set()
            await stream.write("one")

    task = asyncio.create_task(serve())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_client_that_has_left_is_no_error() -> None:

    async def send(message: Any) -> None:
        raise grpc.aio.InternalError("the call is over")

    stream = ClientStream(send, LIMIT_S)
    with pytest.raises(asyncio.CancelledError):
        await stream.write("one")
    stream.close()
