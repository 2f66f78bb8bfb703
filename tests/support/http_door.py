"""An HTTP front door beside the gRPC one, over real sockets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from orchestrator.config import DriverConfig, HttpConfig
from orchestrator.http.app import Door
from orchestrator.http.server import HttpServer
from orchestrator.takeover import Takeover
from outrider.journal import LeaseStore
from outrider.serving.telemetry import Tracing
from tests.support.fleet import RunningOrchestrator, orchestrator


@dataclass(slots=True)
class RunningDoor:
    """An orchestrator with an HTTP door, and a client of it."""

    url: str
    door: Door
    orchestrator: RunningOrchestrator
    client: httpx.AsyncClient


@contextlib.asynccontextmanager
async def http_door(
    verifiers: Sequence[str],
    drafters: Sequence[str] = (),
    *,
    driver: DriverConfig | None = None,
    wait: bool = True,
    store: LeaseStore | None = None,
    verify: Any = True,
    tracing: Tracing | None = None,
    **settings: Any,
) -> AsyncIterator[RunningDoor]:
    """Run an orchestrator with an HTTP door; `settings` are those of `HttpConfig`.

    With a store it keeps journals.
    """
    driver = driver or DriverConfig()
    config = HttpConfig(**{"host": "127.0.0.1", "port": 0, **settings})
    options: dict[str, Any] = {"config": driver, "wait": wait, "store": store, "tracing": tracing}
    async with orchestrator(verifiers, drafters, **options) as running:
        takeover = Takeover(running.driver, running.fleet, store)
        door = Door(running.driver, running.fleet, takeover, driver, config, tracing)
        server = HttpServer(door, config)
        url = await server.start()
        try:
            async with httpx.AsyncClient(base_url=url, timeout=20, verify=verify) as client:
                yield RunningDoor(url, door, running, client)
        finally:
            # As when the process stops: generations end first, so that streams do.
            await running.driver.drain(0)
            await server.stop()


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event of a stream."""

    id: str | None
    data: Any
    """Parsed, or "[DONE]"."""


async def events(response: httpx.Response) -> AsyncIterator[SseEvent]:
    """Read a stream of events."""
    number: str | None = None
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            number = value
        elif name == "data":
            yield SseEvent(number, value if value == "[DONE]" else json.loads(value))
            number = None


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[SseEvent]:
    """Post a body that asks for a stream and read all of it."""
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [event async for event in events(response)]
