"""How a fuzz run talks to a verifier: straight to its edge or over a socket, pass by pass."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc.aio

from outrider.serving.queues import Inbox
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.v1 import verifier_pb2
from tests.support.raw import HELLO
from verifier_service.engine import Engine
from verifier_service.messages import Command
from verifier_service.service import VerifierService

OnResponse = Callable[[int, verifier_pb2.VerifyResponse], None]
"""(key of the connection, what came)"""

_METHOD = "/outrider.v1.VerifierService/Verify"
_PASS_TIMEOUT_S = 60.0


class PacedInbox(Inbox[Command]):
    """An inbox that lets the engine's thread go once round its loop for each permit."""

    def __init__(self, droppable_max: int) -> None:
        super().__init__(droppable_max)
        self._permits = threading.Semaphore(0)
        self.entries = 0
        """How often the thread has come to ask; one more than the passes it has done."""
        self.on_entry: Callable[[], None] = lambda: None

    def take_all(self, *, wait_s: float) -> list[Command]:
        """Wait for a permit, then return everything queued."""
        self.entries += 1
        self.on_entry()
        self._permits.acquire()
        return super().take_all(wait_s=0.0)

    def permit(self) -> None:
        """Allow one pass."""
        self._permits.release()

    def close(self) -> None:
        """Refuse further items and let the thread end."""
        super().close()
        self._permits.release()

    def __len__(self) -> int:
        return len(self._items)


class Pacer:
    """Runs an engine pass by pass, so that the same messages meet the same steps again."""

    def __init__(self, engine: Engine) -> None:
        inbox = engine._inbox
        assert isinstance(inbox, PacedInbox), "the engine was built with another inbox"
        self.inbox = inbox
        self.passes = 0
        self._engine = engine
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        # Comes after what the pass emitted, which takes the same way.
        inbox.on_entry = lambda: _call(loop, self._changed.set)
        assert engine._ended_run is not None
        engine._ended_run.add_done_callback(lambda _: _call(loop, self._changed.set))

    @property
    def alive(self) -> bool:
        """True while the engine's thread is in its loop."""
        run = self._engine._ended_run
        return run is not None and not run.done()

    async def one_pass(self) -> None:
        """Let what was sent arrive, run one pass, and let its outputs arrive."""
        await quiet()
        self.passes += 1
        self.inbox.permit()
        async with asyncio.timeout(_PASS_TIMEOUT_S):
            while self.inbox.entries <= self.passes:
                assert self.alive, "the engine's thread has ended"
                self._changed.clear()
                if self.inbox.entries <= self.passes:
                    await self._changed.wait()
        await quiet()


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)


async def quiet() -> None:
    """Let the event loop do what is ready, and what follows from that."""
    for _ in range(8):
        await asyncio.sleep(0)


class Connection(Protocol):
    """One orchestrator's stream."""

    key: int
    strict: bool
    """What a pass says has been heard when the pass is over."""

    @property
    def ended(self) -> bool:
        """True once the stream is gone, whoever ended it."""

    async def send(self, data: bytes) -> None:
        """Send a serialized `VerifyRequest`, or what is meant to be one."""

    async def close(self, how: str) -> None:
        """Leave: "end" the requests, or "cancel" the call."""


class _Context:
    """What the edge needs of a call."""

    def __init__(self) -> None:
        self.status: tuple[grpc.StatusCode, str] | None = None

    def trailing_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: grpc.StatusCode, details: str = "", *_: Any) -> None:
        self.status = code, details
        raise grpc.aio.AbortError


class Direct:
    """A stream without a socket: real bytes, the edge's own handler."""

    strict = True

    def __init__(self, key: int, service: VerifierService, on_response: OnResponse) -> None:
        self.key = key
        self._queue: deque[bytes | None] = deque([_hello()])
        self._arrived = asyncio.Event()
        self._context = _Context()
        self._task = asyncio.create_task(self._serve(service, on_response))

    @property
    def ended(self) -> bool:
        """True once the handler has returned."""
        return self._task.done()

    @property
    def status(self) -> tuple[grpc.StatusCode, str] | None:
        """With what the edge ended the stream; None: it did not."""
        return self._context.status

    async def send(self, data: bytes) -> None:
        """Queue a message; one that does not parse raises in the handler, as in gRPC."""
        self._queue.append(data)
        self._arrived.set()

    async def close(self, how: str) -> None:
        """Leave, and wait until the handler has noticed."""
        if how == "cancel":
            self._task.cancel()
        else:
            self._queue.append(None)
            self._arrived.set()
        await asyncio.wait([self._task], timeout=_PASS_TIMEOUT_S)
        assert self._task.done(), "the handler goes on although its caller has left"

    async def _requests(self) -> AsyncIterator[verifier_pb2.VerifyRequest]:
        while True:
            while self._queue:
                data = self._queue.popleft()
                if data is None:
                    return
                yield verifier_pb2.VerifyRequest.FromString(data)
            self._arrived.clear()
            await self._arrived.wait()

    async def _serve(self, service: VerifierService, on_response: OnResponse) -> None:
        context: Any = self._context
        responses = service.Verify(self._requests(), context)
        try:
            async for response in responses:
                data = response.SerializeToString()
                on_response(self.key, verifier_pb2.VerifyResponse.FromString(data))
        except grpc.aio.AbortError:
            pass
        finally:
            await responses.aclose()  # type: ignore[attr-defined]


class Socket:
    """A stream over a socket of its own; what is sent need not be a message."""

    strict = False

    def __init__(self, key: int, address: str, on_response: OnResponse) -> None:
        self.key = key
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._call: Any = self._channel.stream_stream(
            _METHOD, response_deserializer=verifier_pb2.VerifyResponse.FromString
        )()
        self._task = asyncio.create_task(self._read(on_response))
        self._greeted = False

    @property
    def ended(self) -> bool:
        """True once the call is over."""
        return self._task.done()

    async def send(self, data: bytes) -> None:
        """Write; a call that is over takes nothing."""
        try:
            if not self._greeted:
                self._greeted = True
                await self._call.write(_hello())
            await self._call.write(data)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        except asyncio.CancelledError:
            # What writing to a call that was ended by the other side raises.
            if not self._call.done():
                raise

    async def close(self, how: str) -> None:
        """Leave."""
        if how == "end" and not self._call.done():
            await self._call.done_writing()
            await asyncio.wait([self._task], timeout=_PASS_TIMEOUT_S)
        self._call.cancel()
        await asyncio.wait([self._task], timeout=_PASS_TIMEOUT_S)
        await self._channel.close()

    async def _read(self, on_response: OnResponse) -> None:
        try:
            async for response in self._call:
                on_response(self.key, response)
        except grpc.aio.AioRpcError:
            pass
        except asyncio.CancelledError:
            if not self._call.done():
                raise


def _hello() -> bytes:
    return verifier_pb2.VerifyRequest(hello=HELLO).SerializeToString()
