"""Hands KV blocks to other verifiers: the serving half of `kv.proto`.

A block is held only while it is copied, in one thread for all peers; what waits for a slow reader
is a copy of one block. Between two copies the thread rests three times as long while this verifier
has sessions of its own.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc.aio

from outrider import wire
from outrider.errors import Exhausted, InvalidRequest, Mismatch
from outrider.kv_transfer import HASH_BYTES, HASHES_MAX, KvChunk, chunks_of, geometry_fault
from outrider.model.block_bytes import BlockBytes
from outrider.serving.server import Server
from outrider.serving.status import status_of_errors
from outrider.v1 import kv_pb2, kv_pb2_grpc
from verifier_service.engine import Engine
from verifier_service.messages import GiveBack, Lend

DEADLINE_MAX_S = 60.0
"""Who asks says until when, and it is soon: nobody is served for ever."""
LEND_WAIT_S = 5.0
BUSY_SHARE = 0.25
"""Of the time, that blocks are copied out while own sessions are served."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """A block that was copied out."""

    chunks: list[KvChunk]
    took_s: float


class KvServing(kv_pb2_grpc.KvServiceServicer):
    """Servicer of KvService."""

    def __init__(
        self, engine: Engine, memory: BlockBytes, *, incarnation: str, serves_max: int
    ) -> None:
        self._engine, self._memory = engine, memory
        self._incarnation, self._serves_max = incarnation, serves_max
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kv-read")
        self._serving = 0
        self.blocks_served = 0

    def register(self, server: Server) -> None:
        """Serve on `server`."""
        kv_pb2_grpc.add_KvServiceServicer_to_server(self, server.grpc)

    def close(self) -> None:
        """Copy nothing more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    @property
    def serving(self) -> int:
        """Peers that are being served."""
        return self._serving

    # The stubs know generators only, which are not told at once that their reader has left.
    async def FetchBlocks(  # type: ignore[override]
        self,
        request: kv_pb2.FetchBlocksRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Stream the blocks of these hashes, up to the first that is not held."""
        async with status_of_errors(context):
            self._check(request, context.time_remaining())
            if self._serving >= self._serves_max:
                raise Exhausted(f"{self._serves_max} peers are being served; try elsewhere")
            self._serving += 1
            try:
                await self._serve(request, context)
            finally:
                self._serving -= 1

    def _check(self, request: kv_pb2.FetchBlocksRequest, left_s: float | None) -> None:
        if left_s is None or left_s > DEADLINE_MAX_S:
            text = f"must be set, and be at most {DEADLINE_MAX_S:g} s away"
            raise InvalidRequest("deadline", text)
        if len(request.hashes) > HASHES_MAX:
            raise InvalidRequest("hashes", f"has at most {HASHES_MAX} entries")
        if any(len(digest) != HASH_BYTES for digest in request.hashes):
            raise InvalidRequest("hashes", f"each has {HASH_BYTES} bytes")
        if request.incarnation != self._incarnation:
            raise Mismatch("incarnation: another verifier was meant; this one has just been born")
        fault = geometry_fault(self._memory.geometry, wire.kv_geometry_from_pb(request.geometry))
        if fault is not None:
            raise Mismatch(fault)

    async def _serve(
        self,
        request: kv_pb2.FetchBlocksRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        geometry = wire.kv_geometry_to_pb(self._memory.geometry)
        header = kv_pb2.KvHeader(incarnation=self._incarnation, geometry=geometry)
        await context.write(kv_pb2.FetchBlocksResponse(header=header))
        loop = asyncio.get_running_loop()
        for index, digest in enumerate(request.hashes):
            copy = await loop.run_in_executor(self._reader, self._copy, index, digest)
            if copy is None:
                return
            for chunk in copy.chunks:
                await context.write(kv_pb2.FetchBlocksResponse(chunk=wire.kv_chunk_to_pb(chunk)))
            self.blocks_served += 1
            if self._engine.load:
                await asyncio.sleep(copy.took_s * (1.0 / BUSY_SHARE - 1.0))

    def _copy(self, index: int, digest: bytes) -> _Copy | None:
        """Copy a block, on the reader's thread; None if it is not held.

        Nothing can come between holding the block and giving it back: a thread is not cancelled.
        """
        block = self._borrow(digest)
        if block is None:
            return None
        began_s = time.perf_counter()
        try:
            data = self._memory.read(block)
        finally:
            self._engine.submit(GiveBack(block))
        chunks = list(chunks_of(index, digest, data))
        return _Copy(chunks, time.perf_counter() - began_s)

    def _borrow(self, digest: bytes) -> int | None:
        granted: Future[int | None] = Future()

        def reply(block: int | None) -> bool:
            if not granted.set_running_or_notify_cancel():
                return False
            granted.set_result(block)
            return True

        self._engine.submit(Lend(digest, reply))
        try:
            return granted.result(LEND_WAIT_S)
        except TimeoutError:
            # Either nobody will be lent anything any more, or it has just come.
            return None if granted.cancel() else granted.result()
