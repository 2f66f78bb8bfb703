"""Whole fleets for tests: real services over real sockets, in this process or in their own.

Tiny random models; every service listens on a free loopback port.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from drafter_service.config import GrowingConfig
from drafter_service.growing import Grower
from drafter_service.proposers.base import Proposer
from drafter_service.proposers.language_model import LanguageModelProposer
from drafter_service.proposers.lookup import LookupProposer
from drafter_service.service import SERVICE_NAMES as DRAFTER_NAMES
from drafter_service.service import DrafterService
from orchestrator.config import DriverConfig, JournalConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.journaling import JournalWriter
from orchestrator.service import SERVICE_NAMES as ORCHESTRATOR_NAMES
from orchestrator.service import GenerationService
from orchestrator.takeover import Takeover
from outrider.client import AsyncClient
from outrider.config import Tls
from outrider.domain import ModelInfo
from outrider.errors import Unavailable
from outrider.journal import LeaseStore
from outrider.model.info import model_info
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model
from outrider.model.threads import set_threads
from outrider.serving.server import Server
from outrider.serving.telemetry import Tracing
from outrider.v1 import (
    drafter_pb2_grpc,
    generation_pb2_grpc,
    worker_pb2_grpc,
)
from tests.support.flat_times import FlatTimes
from verifier_service.acceptance import AcceptRule, accept_path
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.service import SERVICE_NAMES as VERIFIER_NAMES
from verifier_service.service import VerifierService
from verifier_service.step_times import StepTimes

TARGET = "random:tiny?seed=1"
DRAFT = "random:tiny?seed=1&noise=0.05&noise_seed=7"
"""A draft model that agrees with TARGET most of the time."""


def load(spec: str) -> LanguageModel:
    """Load a tiny random model."""
    # Several test processes share the machine; more threads only wait for each other.
    set_threads(1)
    return load_language_model(spec, dtype="float32", device="cpu", cache_dir=Path("/nonexistent"))


def info_of(model: LanguageModel, name: str, proposer: str = "") -> ModelInfo:
    """Identity of a model under a name."""
    return replace(model_info(model, proposer=proposer), model=name)


@dataclass(slots=True)
class RunningVerifier:
    """A verifier in this process."""

    address: str
    engine: Engine
    server: Server
    service: VerifierService


@dataclass(slots=True)
class RunningDrafter:
    """A drafter in this process."""

    address: str
    grower: Grower
    server: Server
    service: DrafterService


@contextlib.asynccontextmanager
async def verifier(
    model: LanguageModel,
    *,
    name: str = "tiny",
    config: EngineConfig | None = None,
    rule: AcceptRule = accept_path,
    times: StepTimes | None = None,
    port: int = 0,
    tracing: Tracing | None = None,
    tls: Tls | None = None,
) -> AsyncIterator[RunningVerifier]:
    """Run a verifier; by default one that verifies whatever it is offered."""
    config = config or EngineConfig(warm_up=False)
    service = VerifierService(
        info_of(model, name),
        model.tokenizer_files,
        incarnation=secrets.token_hex(8),
        sessions_max=config.sessions_max,
        grammar_timeout_s=config.grammar_timeout_s,
        kv_serves_max=config.kv_serves_max,
        tls=tls,
        tracing=tracing,
    )
    engine = Engine(model, config, service.emit, rule=rule, times=times or FlatTimes())
    service.attach(engine)
    server = Server(VERIFIER_NAMES, host="127.0.0.1", port=port, tls=tls)
    service.register(server)
    engine.start()
    address = await server.start()
    await server.set_ready(True)
    try:
        yield RunningVerifier(address, engine, server, service)
    finally:
        await server.stop(0)
        await service.close()
        engine.stop()


@contextlib.asynccontextmanager
async def drafter(
    proposer: Proposer,
    *,
    config: GrowingConfig | None = None,
    tracing: Tracing | None = None,
) -> AsyncIterator[RunningDrafter]:
    """Run a drafter."""
    config = config or GrowingConfig()
    service = DrafterService(
        proposer.info,
        incarnation=secrets.token_hex(8),
        sessions_max=config.sessions_max,
        tracing=tracing,
    )
    grower = Grower(proposer, config, service.emit)
    service.attach(grower)
    server = Server(DRAFTER_NAMES, host="127.0.0.1", port=0)
    drafter_pb2_grpc.add_DrafterServiceServicer_to_server(service, server.grpc)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(service, server.grpc)
    grower.start()
    address = await server.start()
    await server.set_ready(True)
    try:
        yield RunningDrafter(address, grower, server, service)
    finally:
        await server.stop(0)
        grower.stop()


def lookup() -> Proposer:
    """A lookup proposer."""
    return LookupProposer()


def language_model(model: LanguageModel) -> Proposer:
    """A language-model proposer."""
    return LanguageModelProposer(model, info_of(model, "tiny-draft", "language-model"))


@dataclass(slots=True)
class RunningOrchestrator:
    """An orchestrator in this process, and a client of it."""

    address: str
    driver: Driver
    fleet: Fleet
    client: AsyncClient
    server: Server
    journal: JournalWriter | None


@contextlib.asynccontextmanager
async def orchestrator(
    verifiers: Sequence[str],
    drafters: Sequence[str] = (),
    *,
    config: DriverConfig | None = None,
    wait: bool = True,
    store: LeaseStore | None = None,
    journal: JournalConfig | None = None,
    tracing: Tracing | None = None,
) -> AsyncIterator[RunningOrchestrator]:
    """Run an orchestrator over static addresses; waits until its workers are ready.

    With a store it keeps journals.
    """
    config = config or DriverConfig()
    fleet = Fleet("test", verifiers=verifiers, drafters=drafters)
    writer = None if store is None else JournalWriter(store, journal or JournalConfig())
    driver = Driver(fleet, config, journal=writer, tracing=tracing)
    server = Server(ORCHESTRATOR_NAMES, host="127.0.0.1", port=0)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(
        GenerationService(driver, fleet, config, Takeover(driver, fleet, store), tracing),
        server.grpc,
    )
    if writer is not None:
        writer.start()
    driver.start()
    address = await server.start()
    await server.set_ready(True)
    client = AsyncClient(address)
    try:
        if wait:
            await settled(client, len(verifiers) + len(drafters))
        yield RunningOrchestrator(address, driver, fleet, client, server, writer)
    finally:
        await client.close()
        await server.stop(0)
        await driver.close()
        if writer is not None:
            await writer.close()


async def settled(client: AsyncClient, workers: int, timeout_s: float = 10.0) -> None:
    """Wait until so many workers are ready or refused."""

    async def enough() -> bool:
        try:
            statuses = await client.workers()
        except Unavailable:
            return False
        return sum(status.state in ("ready", "refused") for status in statuses) >= workers

    await until(enough, what=f"{workers} workers ready", timeout_s=timeout_s)


async def until(
    condition: Callable[[], Awaitable[bool]], *, what: str, timeout_s: float = 10.0
) -> None:
    """Poll a condition of another process or thread; fails with `what` at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        await asyncio.sleep(0.01)
