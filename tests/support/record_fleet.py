"""`python -m tests.support.record_fleet FILE`: record what a fleet exports under a load.

Makes `recorded_fleet.json.gz`, which the scaling policy's tests replay: services in processes of
their own, with synthetic models, so that the machine's speed hardly shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from orchestrator.cluster.scraping import Scraper
from outrider.client import AsyncClient, Request
from outrider.errors import OutriderError
from outrider.processes import spawn, stop
from outrider.redis_server import start_redis
from tests.support.orchestrator_process import free_address

STAGES = ((30.0, 2), (45.0, 14), (60.0, 1), (15.0, 0))
"""Seconds, and clients that ask for so long."""
LOOK_S = 3.0
START_S = 120.0
TARGET = "synthetic:recorded?seed=1&step=1:22,32:22,128:28,512:90"
DRAFT = "synthetic:recorded?seed=1&step=1:2.5,16:2.5,64:8&agree=0.8,0.1,0.05"


async def ask(client: AsyncClient, number: int, end_s: float) -> None:
    """One client: a request after the other, a pause after a refusal."""
    count = 0
    while time.monotonic() < end_s:
        count += 1
        prompt = f"client {number} asks for the {count}th time " * 4
        request = Request(prompt=prompt, tokens_max=160, temperature=0.0, ignore_eos=True)
        try:
            async for _ in client.generate(request):
                pass
        except OutriderError:
            await asyncio.sleep(1.0)


async def record(grpc_address: str, http_address: str) -> list[dict[str, object]]:
    """Let clients come and go; returns what was exported meanwhile."""
    scraper, looks = Scraper(), []
    ready_by_s = time.monotonic() + START_S
    while True:
        found = await scraper.scrape([http_address])
        if found and all(
            found[0].total("worker_sessions_max", role=role) for role in ("verifier", "drafter")
        ):
            break
        if time.monotonic() > ready_by_s:
            raise SystemExit("the fleet did not become ready")
        await asyncio.sleep(0.5)
    start_s = time.monotonic()

    async def look() -> None:
        while True:
            (scrape,) = await scraper.scrape([http_address])
            looks.append({"at_s": round(scrape.at_s - start_s, 3), "samples": scrape.samples})
            await asyncio.sleep(LOOK_S)

    looking = asyncio.create_task(look())
    async with AsyncClient(grpc_address) as client:
        for seconds, clients in STAGES:
            end_s = time.monotonic() + seconds
            asking = (ask(client, number, end_s) for number in range(clients))
            await asyncio.gather(asyncio.sleep(seconds), *asking)
    looking.cancel()
    await scraper.close()
    return looks


def main() -> None:
    """Start the fleet, record, write."""
    grpc_address, http_address = free_address(), free_address()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        redis = stack.enter_context(start_redis(None, Path(folder, "redis.log")))
        environment = {**os.environ, "REDIS_URL": redis.url, "OMP_NUM_THREADS": "1"}
        worker = ["--model", TARGET, "--sessions-max", "8"]
        guessing = ["--proposer", "language-model", "--model", DRAFT]
        door = ["--host", "127.0.0.1", "--port", grpc_address.split(":")[1]]
        for module, arguments in (
            ("verifier_service", [*worker, "--port", free_address().split(":")[1]]),
            ("drafter_service", [*guessing, "--port", free_address().split(":")[1]]),
            ("orchestrator", [*door, "--http-address", http_address]),
        ):
            command = [sys.executable, "-m", module, *arguments]
            child = spawn(command, Path(folder, f"{module}.log"), environment)
            stack.callback(stop, child)
        looks = asyncio.run(record(grpc_address, http_address))
    with gzip.GzipFile(sys.argv[1], "wb", mtime=0) as file:
        file.write(json.dumps(looks).encode())


if __name__ == "__main__":
    main()
