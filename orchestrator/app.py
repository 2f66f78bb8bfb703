"""Puts an orchestrator process together: fleet, driver, front door, discovery."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from orchestrator.config import OrchestratorConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.http.app import Door
from orchestrator.http.server import HttpServer
from orchestrator.journaling import JournalWriter
from orchestrator.placing import Placer
from orchestrator.prefix_lookup import PrefixLookup
from orchestrator.service import SERVICE_NAMES, GenerationService
from orchestrator.takeover import Takeover
from outrider.errors import ConfigError
from outrider.registry import Connection, KvIndex, Leases, Registry, WorkerRecord, WorkerWatch
from outrider.serving.garbage import keep_what_is_loaded
from outrider.serving.server import Server, stop_requested
from outrider.serving.telemetry import Tracing, tracing

_STREAMS_GRACE_S = 0.5

_log = logging.getLogger(__name__)


async def serve(config: OrchestratorConfig) -> None:
    """Run until asked to stop. Raises `ConfigError` at start."""
    async with tracing("orchestrator", config.otlp_endpoint, config.name) as spans:
        await _serve(config, spans)


async def _serve(config: OrchestratorConfig, spans: Tracing | None) -> None:
    fleet = Fleet(
        config.name,
        verifiers=config.verifiers,
        drafters=config.drafters,
        worker_timeout_s=config.driver.worker_timeout_s,
        tls=config.tls,
    )
    connection = Connection(config.redis_url) if config.redis_url is not None else None
    lookup = store = journal = None
    if connection is not None:
        lookup = PrefixLookup(KvIndex(connection), config.driver.prefix_lookup_s)
    if connection is not None and config.journal is not None:
        store = Leases(connection, config.journal.retention_s)
        journal = JournalWriter(store, config.journal)
        journal.start()
    driver = Driver(fleet, config.driver, Placer(fleet, lookup), journal, spans)
    server = Server(
        SERVICE_NAMES,
        host=config.host,
        port=config.port,
        tls=config.tls,
        plaintext=config.plaintext,
    )
    takeover = Takeover(driver, fleet, store)
    GenerationService(driver, fleet, config.driver, takeover, spans).register(server)
    http = None
    if config.http is not None:
        door = Door(driver, fleet, takeover, config.driver, config.http, spans)
        http = HttpServer(door, config.http)
    driver.start()
    try:
        async with _registry(connection, fleet, config.discover), _cluster(config.discover, fleet):
            address = await server.start()
            keep_what_is_loaded()
            await server.set_ready(True)
            _log.info("listening on %s", address)
            if http is not None:
                _log.info("listening on %s", await http.start())
            await stop_requested()
            await server.set_ready(False)
            await driver.drain(config.drain_s)
            driver.hand_over()
    finally:
        await server.stop(_STREAMS_GRACE_S)
        await driver.close()
        if http is not None:
            await http.stop()
        if journal is not None:
            await journal.close()
        if lookup is not None:
            await lookup.close()
        if connection is not None:
            await connection.close()
    _log.info("stopped")


@contextlib.asynccontextmanager
async def _registry(
    connection: Connection | None, fleet: Fleet, discover: str | None
) -> AsyncIterator[None]:
    """Follow the registry while the context lasts: load, and without `discover` addresses, too."""
    if connection is None:
        yield
        return

    def report(records: list[WorkerRecord]) -> None:
        if discover is None:
            fleet.update(
                verifiers=[r.address for r in records if r.role == "verifier"],
                drafters=[r.address for r in records if r.role == "drafter"],
            )
        fleet.note(records)

    async with WorkerWatch(Registry(connection), report):
        yield


@contextlib.asynccontextmanager
async def _cluster(discover: str | None, fleet: Fleet) -> AsyncIterator[None]:
    """Follow the Kubernetes API while the context lasts. Raises `ConfigError`."""
    if discover is None:
        yield
        return
    try:
        # Only here: it takes seconds, and not every installation has the client.
        from orchestrator.cluster.api import Cluster, Endpoints
        from orchestrator.cluster.discovery import EndpointWatch, Place, workers
    except ImportError as error:
        raise ConfigError(
            f"--discover: {error.name} is not installed; pip install 'outrider[kubernetes]'"
        ) from None
    place = Place.read(discover)
    cluster = await Cluster.connect(place.namespace)

    def report(found: list[Endpoints]) -> None:
        verifiers, drafters = workers(found)
        fleet.update(verifiers=verifiers, drafters=drafters)

    try:
        async with EndpointWatch(cluster, place.selector, report):
            yield
    finally:
        await cluster.close()
