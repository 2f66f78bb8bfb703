"""An orchestrator as it is run, in a process of its own, for what only shows from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from outrider.processes import spawn
from tests.support.fleet import until


@dataclass(slots=True)
class OrchestratorProcess:
    """Its addresses, and what it uses."""

    grpc_address: str
    http_address: str
    log_path: Path
    process: psutil.Process

    @property
    def url(self) -> str:
        """Of the HTTP door."""
        return f"http://{self.http_address}"

    @property
    def resident_bytes(self) -> int:
        """Memory that the process holds."""
        count: int = self.process.memory_info().rss
        return count


def free_address() -> str:
    """A loopback address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.asynccontextmanager
async def orchestrator_process(
    log_path: Path, verifier: str, *arguments: str
) -> AsyncIterator[OrchestratorProcess]:
    """Run `python -m orchestrator` over one verifier; waits until it is ready."""
    grpc_address, http_address = free_address(), free_address()
    host, port = grpc_address.split(":")
    command = [sys.executable, "-m", "orchestrator", "--verifier", verifier]
    command += ["--host", host, "--port", port, "--http-address", http_address, *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
    child = spawn(command, log_path, environment)
    try:
        running = OrchestratorProcess(
            grpc_address, http_address, log_path, psutil.Process(child.pid)
        )
        async with httpx.AsyncClient(base_url=running.url) as client:

            async def ready() -> bool:
                assert child.poll() is None, f"the orchestrator ended; see {log_path}"
                with contextlib.suppress(httpx.TransportError):
                    return (await client.get("/health/ready")).is_success
                return False

            await until(ready, what="the orchestrator is ready", timeout_s=30)
        yield running
    finally:
        child.terminate()
        await asyncio.to_thread(child.wait)
