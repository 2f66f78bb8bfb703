"""A fleet for `bench.placement`: real services and Redis, synthetic models, in one process.

Verifiers compute nothing and take their time. Orchestrators are called as their front doors call
them; between them and the verifiers are real streams, and all know each other's KV from Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import DriverConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.placement import Weighed, weigh_verifiers
from orchestrator.placing import Placer
from orchestrator.prefix_lookup import PrefixLookup
from orchestrator.prefix_memory import Prefix
from outrider.domain import SessionSpec
from outrider.errors import Unavailable
from outrider.model.info import model_info
from outrider.model.loading import load_language_model
from outrider.model.threads import set_threads
from outrider.registry import (
    Connection,
    HeldBlocks,
    KvIndex,
    KvPublisher,
    Registry,
    WorkerPublisher,
    WorkerRecord,
    WorkerWatch,
)
from outrider.serving.server import Server
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.service import SERVICE_NAMES, VerifierService

_POLL_S = 0.02
_READY_MAX_S = 30.0
# Threads of the process take turns, and each has little to do between two sleeps.
_SWITCH_INTERVAL_S = 0.0005


@dataclass(frozen=True, slots=True)
class BenchVerifier:
    """A verifier of this process."""

    engine: Engine
    publisher: KvPublisher | None


@dataclass(frozen=True, slots=True)
class BenchOrchestrator:
    """An orchestrator of this process, without its front door."""

    fleet: Fleet
    driver: Driver
    lookup: PrefixLookup | None


@dataclass(frozen=True, slots=True)
class BenchFleet:
    """All of it."""

    verifiers: list[BenchVerifier]
    orchestrators: list[BenchOrchestrator]


class RoundRobinPlacer(Placer):
    """Takes the verifiers in turn, whatever they hold."""

    turns = itertools.count()
    """Of all orchestrators together, as a balancer before the verifiers would."""

    def verifier(
        self, prefix: Prefix, model: str, spec: SessionSpec, exclude: frozenset[str]
    ) -> Weighed | None:
        """The next one that is not excluded."""
        weighed = weigh_verifiers(self._fleet.verifier_views(), model, exclude, len(spec.prompt))
        weighed.sort(key=lambda one: one.view.address)
        return weighed[next(self.turns) % len(weighed)] if weighed else None


@contextlib.asynccontextmanager
async def bench_fleet(
    spec: str, verifiers: int, orchestrators: int, redis_url: str | None, *, round_robin: bool
) -> AsyncIterator[BenchFleet]:
    """Run a fleet. Without Redis, orchestrators know only what they did themselves."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    async with contextlib.AsyncExitStack() as stack:
        connection = None
        if redis_url is not None:
            connection = Connection(redis_url)
            stack.push_async_callback(connection.close)
        started = [
            await stack.enter_async_context(_verifier(spec, f"verifier-{number}", connection))
            for number in range(verifiers)
        ]
        addresses = tuple(address for address, _ in started)
        fleet = BenchFleet(
            [verifier for _, verifier in started],
            [
                await stack.enter_async_context(
                    _orchestrator(addresses, connection, round_robin=round_robin)
                )
                for _ in range(orchestrators)
            ],
        )
        await _until_ready(fleet)
        yield fleet


@contextlib.asynccontextmanager
async def _verifier(
    spec: str, worker: str, connection: Connection | None
) -> AsyncIterator[tuple[str, BenchVerifier]]:
    set_threads(1)
    model = load_language_model(spec, dtype="float32", device="cpu", cache_dir=Path("/nonexistent"))
    info, incarnation = model_info(model), secrets.token_hex(16)
    config = EngineConfig(warm_up=False, kv_tokens_max=1 << 20)
    service = VerifierService(
        info,
        model.tokenizer_files,
        incarnation=incarnation,
        sessions_max=config.sessions_max,
        grammar_timeout_s=config.grammar_timeout_s,
    )
    engine = Engine(model, config, service.emit)
    service.attach(engine)
    blocks = engine.pool.blocks.listener = HeldBlocks()
    engine.start()
    server = Server(SERVICE_NAMES, host="127.0.0.1", port=0)
    service.register(server)
    address = await server.start()
    await server.set_ready(True)

    def record() -> WorkerRecord:
        return WorkerRecord(
            role="verifier",
            worker=worker,
            incarnation=incarnation,
            address=address,
            model=info.model,
            model_fingerprint=info.model_fingerprint,
            capacity=config.sessions_max,
            load=engine.load,
            state="ready",
            kv_tokens_used=engine.kv_tokens_used,
            kv_tokens_max=engine.pool.tokens_max,
        )

    try:
        async with contextlib.AsyncExitStack() as stack:
            publisher = None
            if connection is not None:
                publisher = KvPublisher(connection, blocks, worker=worker, incarnation=incarnation)
                await stack.enter_async_context(publisher)
                await stack.enter_async_context(WorkerPublisher(Registry(connection), record))
            yield address, BenchVerifier(engine, publisher)
    finally:
        await server.stop(0)
        await service.close()
        engine.stop()


@contextlib.asynccontextmanager
async def _orchestrator(
    addresses: tuple[str, ...], connection: Connection | None, *, round_robin: bool
) -> AsyncIterator[BenchOrchestrator]:
    config = DriverConfig()
    fleet = Fleet("bench", verifiers=addresses)
    lookup = None
    if connection is not None and not round_robin:
        lookup = PrefixLookup(KvIndex(connection), config.prefix_lookup_s)
    placer = (RoundRobinPlacer if round_robin else Placer)(fleet, lookup)
    driver = Driver(fleet, config, placer)
    driver.start()
    try:
        async with contextlib.AsyncExitStack() as stack:
            if connection is not None:
                await stack.enter_async_context(WorkerWatch(Registry(connection), fleet.note))
            yield BenchOrchestrator(fleet, driver, lookup)
    finally:
        await driver.close()
        if lookup is not None:
            await lookup.close()


async def _until_ready(fleet: BenchFleet) -> None:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + _READY_MAX_S
    wanted = len(fleet.verifiers)
    while any(len(one.fleet.verifier_views()) < wanted for one in fleet.orchestrators):
        if loop.time() > deadline_s:
            raise Unavailable("the fleet is not ready")
        await asyncio.sleep(_POLL_S)
