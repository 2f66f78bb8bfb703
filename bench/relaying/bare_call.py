"""A gRPC client made of a socket, so that a server is measured and no client library.

It speaks as much of HTTP/2 as one streaming call of `GenerationService` takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from outrider.v1 import generation_pb2, types_pb2

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_FRAME_HEAD, _MESSAGE_HEAD = 9, 5
_HEAD = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/outrider.v1.GenerationService/Generate",
    ":authority": "bench",
    "te": "trailers",
    "content-type": "application/grpc",
}


class BareCall(asyncio.Protocol):
    """One call over a connection of its own."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        """The server has said its settings."""
        self.first_text: asyncio.Future[float] = loop.create_future()
        """When the first text came, on the clock of `time.perf_counter`."""
        self._received = b""
        self._messages = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, b"") + _frame(_SETTINGS, _ACK, 0, b""))

    def ask(self, model: str, prompt: Sequence[int], tokens_max: int, seed: int) -> None:
        """Send a request that does without speculation, in one write."""
        request = generation_pb2.GenerateRequest(
            model=model,
            token_ids=generation_pb2.TokenIds(ids=prompt),
            sampling=types_pb2.SamplingParams(),
            tokens_max=tokens_max,
            ignore_eos=True,
            speculation=False,
            seed=seed,
        )
        assert self._transport is not None, "connect first"
        # HPACK's plainest form: literals that are neither indexed nor compressed.
        head = b"".join(b"\0" + _text(name) + _text(value) for name, value in _HEAD.items())
        message = request.SerializeToString()
        data = b"\0" + len(message).to_bytes(4, "big") + message
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, 1, head) + _frame(_DATA, _END_STREAM, 1, data)
        )

    def close(self) -> None:
        """Leave."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take frames apart."""
        now_s = time.perf_counter()
        self._received += data
        while len(self._received) >= _FRAME_HEAD:
            end = _FRAME_HEAD + int.from_bytes(self._received[:3], "big")
            if len(self._received) < end:
                return
            kind, payload = self._received[3], self._received[_FRAME_HEAD:end]
            self._received = self._received[end:]
            if kind == _SETTINGS and not self.ready.done():
                self.ready.set_result(None)
            if kind == _DATA:
                self._messages += payload
                self._read(now_s)

    def _read(self, now_s: float) -> None:
        while len(self._messages) >= _MESSAGE_HEAD and not self.first_text.done():
            end = _MESSAGE_HEAD + int.from_bytes(self._messages[1:_MESSAGE_HEAD], "big")
            if len(self._messages) < end:
                return
            message = generation_pb2.GenerateResponse.FromString(self._messages[_MESSAGE_HEAD:end])
            self._messages = self._messages[end:]
            if message.HasField("delta"):
                self.first_text.set_result(now_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whoever waits."""
        for future in (self.ready, self.first_text):
            if not future.done():
                future.set_exception(ConnectionError("the orchestrator closed the connection"))


def _text(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload
