"""Fetches KV blocks from other verifiers: the asking half of `kv.proto`.

Runs the engine's errands on the event loop. Whatever happens, the engine hears exactly once that an
errand is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from outrider import wire
from outrider.config import Tls
from outrider.domain import PullOutcome
from outrider.errors import ConfigError, Mismatch
from outrider.kv_transfer import Assembly, CorruptKv, geometry_fault
from outrider.model.block_bytes import BlockBytes
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.serving.status import answered
from outrider.serving.tls import channel_credentials, channel_options
from outrider.v1 import kv_pb2, kv_pb2_grpc
from verifier_service.engine import Engine
from verifier_service.messages import CallOff, Errand, PulledBlock, PullOrder, PullOver

WINDOW_BYTES = 32 << 20
"""That may wait for the engine's thread, of each errand; two blocks in any case."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Trip:
    began_s: float
    first_s: float = 0.0
    size_bytes: int = 0


class KvFetching:
    """Runs errands for one engine; made on the event loop."""

    def __init__(
        self, engine: Engine, memory: BlockBytes, *, incarnation: str, tls: Tls | None
    ) -> None:
        self._engine, self._memory, self._tls = engine, memory, tls
        self._loop = asyncio.get_running_loop()
        self._window = max(2, WINDOW_BYTES // memory.block_bytes)
        self._tasks: dict[int, asyncio.Task[PullOutcome]] = {}
        engine.pulls.connect(self.send, incarnation)

    @property
    def under_way(self) -> int:
        """Errands that are not over."""
        return len(self._tasks)

    def send(self, errand: Errand) -> None:
        """Take an errand, on the engine's thread."""
        with contextlib.suppress(RuntimeError):
            # The loop is gone when the process ends.
            self._loop.call_soon_threadsafe(self._run, errand)

    async def close(self) -> None:
        """Break off what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self, errand: Errand) -> None:
        match errand:
            case PullOrder(pull):
                trip = _Trip(self._loop.time())
                task = self._loop.create_task(self._fetch(errand, trip), name=f"kv-pull-{pull}")
                self._tasks[pull] = task
                # A callback, since a task that is cancelled early runs none of its code.
                task.add_done_callback(lambda task: self._back(pull, trip, task))
            case CallOff(pull):
                known = self._tasks.get(pull)
                if known is not None:
                    known.cancel()

    def _back(self, pull: int, trip: _Trip, task: asyncio.Task[PullOutcome]) -> None:
        del self._tasks[pull]
        outcome = PullOutcome.SLOW if task.cancelled() else task.result()
        took_s = self._loop.time() - trip.began_s
        self._engine.submit(PullOver(pull, outcome, trip.first_s, took_s, trip.size_bytes))

    async def _fetch(self, order: PullOrder, trip: _Trip) -> PullOutcome:
        """Run an errand; raises nothing."""
        address = order.peer.address
        try:
            async with asyncio.timeout(order.wait_s):
                return await self._bring(order, trip)
        except TimeoutError:
            return PullOutcome.SLOW
        except CorruptKv as error:
            _log.error("KV of %s is thrown away: %s", address, error)
            return PullOutcome.CORRUPT
        except (Mismatch, ConfigError) as error:
            _log.warning("KV of %s does not fit: %s", address, error)
            return PullOutcome.REFUSED
        except grpc.aio.AioRpcError as error:
            _log.info("KV of %s: %s", address, error.details())
            return _outcome_of(error)
        except Exception:
            _log.exception("KV of %s could not be fetched", address)
            return PullOutcome.FAILED

    async def _bring(self, order: PullOrder, trip: _Trip) -> PullOutcome:
        """Hand the blocks to the engine one by one."""
        async with self._channel(order.peer.address) as channel:
            request = kv_pb2.FetchBlocksRequest(
                incarnation=order.peer.incarnation,
                geometry=wire.kv_geometry_to_pb(self._memory.geometry),
                hashes=order.digests,
            )
            # The server gives up no later than the caller.
            call = kv_pb2_grpc.KvServiceStub(channel).FetchBlocks(request, timeout=order.wait_s)
            answers = call.__aiter__()
            self._check(order, await anext(answers, None))
            trip.first_s = self._loop.time() - trip.began_s
            assembly = Assembly(order.digests, self._memory.block_bytes)
            room = asyncio.Semaphore(self._window)
            async for answer in answers:
                if answer.WhichOneof("part") != "chunk":
                    raise CorruptKv("what came is no chunk")
                data = assembly.add(wire.kv_chunk_from_pb(answer.chunk))
                if data is not None:
                    await room.acquire()
                    trip.size_bytes += len(data)
                    self._engine.submit(PulledBlock(order.pull, data, _Releaser(self._loop, room)))
            return PullOutcome.COMPLETE if assembly.complete else PullOutcome.SHORT

    def _check(self, order: PullOrder, first: kv_pb2.FetchBlocksResponse | None) -> None:
        """Refuse an answer by another verifier than was meant, or of another kind of KV."""
        if first is None or first.WhichOneof("part") != "header":
            raise CorruptKv("the first message is no header")
        if first.header.incarnation != order.peer.incarnation:
            raise Mismatch("incarnation: another verifier has answered than was asked")
        theirs = wire.kv_geometry_from_pb(first.header.geometry)
        fault = geometry_fault(self._memory.geometry, theirs)
        if fault is not None:
            raise Mismatch(fault)

    def _channel(self, address: str) -> grpc.aio.Channel:
        # Anew for each errand, so that certificates are, too. Raises `ConfigError`.
        options: Sequence[tuple[str, int | str]] = CHANNEL_OPTIONS
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=options)
        options = (*options, *channel_options(self._tls))
        return grpc.aio.secure_channel(address, channel_credentials(self._tls), options)


@dataclass(frozen=True, slots=True)
class _Releaser:
    """Lets the errand go on, from the engine's thread."""

    loop: asyncio.AbstractEventLoop
    room: asyncio.Semaphore

    def __call__(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.room.release)


def _outcome_of(error: grpc.aio.AioRpcError) -> PullOutcome:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PullOutcome.SLOW
    if answered(error) or error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return PullOutcome.REFUSED
    return PullOutcome.FAILED
