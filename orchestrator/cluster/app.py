"""Puts a controller process together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.cluster.api import Cluster
from orchestrator.cluster.controller import Controller, ControllerConfig
from orchestrator.cluster.discovery import EndpointWatch, Place
from orchestrator.cluster.election import Election, ElectionTimes
from orchestrator.cluster.scraping import Scraper
from orchestrator.cluster.status import StatusServer
from outrider.serving.server import stop_requested

_CALL_TIMEOUT_S = 4.0
"""So short that a leader can try several times before it must stop."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessConfig:
    """Everything a controller process needs to know."""

    place: Place
    controller: ControllerConfig
    name: str
    """Another replica's never."""
    lease: str
    host: str
    port: int
    metrics_key: Path | None = None
    metrics_ca: Path | None = None
    metrics_server_name: str | None = None
    election: ElectionTimes = field(default_factory=ElectionTimes)


async def serve(config: ProcessConfig) -> None:
    """Run until asked to stop. Raises `ConfigError` at start."""
    cluster = await Cluster.connect(config.place.namespace, _CALL_TIMEOUT_S)
    scraper = Scraper(
        key_file=config.metrics_key,
        authority=config.metrics_ca,
        server_name=config.metrics_server_name,
    )
    election = Election(cluster, config.lease, config.name, config.election, time.monotonic)
    controller = Controller(cluster, election, scraper, config.controller)
    status = StatusServer(controller)
    tasks: list[asyncio.Task[None]] = []
    try:
        async with EndpointWatch(cluster, config.place.selector, controller.found):
            if not config.controller.dry_run:
                # A dry run writes nothing, not even a Lease.
                tasks.append(asyncio.create_task(election.run(), name="election"))
            tasks.append(asyncio.create_task(controller.run(), name="controller"))
            _log.info("listening on %s", await status.start(config.host, config.port))
            await stop_requested()
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await election.release()
        await status.stop()
        await scraper.close()
        await cluster.close()
    _log.info("stopped")
