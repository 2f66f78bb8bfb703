"""Peers that hand out KV and do not keep the protocol, in front of one that does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc.aio

from outrider.v1 import kv_pb2, kv_pb2_grpc

Meddle: TypeAlias = Callable[["MeddlingPeer", int, kv_pb2.FetchBlocksResponse], Awaitable[None]]
"""Looks at, changes or holds up the answer's message of that number, before it is passed on."""


class MeddlingPeer(kv_pb2_grpc.KvServiceServicer):
    """Passes requests on to an honest peer, and its answers back, meddled with."""

    def __init__(self, honest: str, meddle: Meddle) -> None:
        self.server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self.reached = asyncio.Event()
        """Set by `meddle` where a test waits for that."""
        self.for_ever = asyncio.Event()
        """Never set."""
        self.requests = 0
        self._honest, self._meddle = honest, meddle

    async def FetchBlocks(self, request: kv_pb2.FetchBlocksRequest, context: Any) -> None:
        """Serve a verifier."""
        self.requests += 1
        async with grpc.aio.insecure_channel(self._honest) as channel:
            answers = kv_pb2_grpc.KvServiceStub(channel).FetchBlocks(request, timeout=30.0)
            number = 0
            async for answer in answers:
                await self._meddle(self, number, answer)
                await context.write(answer)
                number += 1


@contextlib.asynccontextmanager
async def meddling_peer(honest: str, meddle: Meddle) -> AsyncIterator[tuple[str, MeddlingPeer]]:
    """Serve one in front of the verifier at `honest`; yields its address."""
    peer = MeddlingPeer(honest, meddle)
    kv_pb2_grpc.add_KvServiceServicer_to_server(peer, peer.server)
    port = peer.server.add_insecure_port("127.0.0.1:0")
    await peer.server.start()
    try:
        yield f"127.0.0.1:{port}", peer
    finally:
        await peer.server.stop(0)
