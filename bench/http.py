"""What HTTP costs beside gRPC: synthetic workers, real sockets, the orchestrator on one core.

    python -m bench.http
    python -m bench.http --events 6000 --window 10

Added time to first token: the same request through both doors in turn, over connections that
stand; the workers answer at once, so all of it is the orchestrator's. Both clients are bare
sockets, so that no client library is measured (what `outrider.client` takes is shown beside it),
and the orchestrator logs what it logs by default. Events: commits come at a stated rate, each is
an event of its own stream; what counts is what arrives, and what it costs of the orchestrator's
core. The workers are those of `bench.relay`.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import aclosing
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import psutil

from bench.machine import Origin, origin
from bench.relaying.bare_call import BareCall
from bench.relaying.control import Child
from bench.relaying.fakes import COMMIT_TOKENS, MODEL, client_prompt
from bench.relaying.fleet import Usage, free_port, relay_fleet
from outrider.client import AsyncClient, Delta, Request

RESULTS = Path(__file__).with_name("results")
_SETTLE_S = 1.0
_WARM_UP = 20
_TOKENS_MAX = 1 << 24


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured."""

    grpc_ttft_ms: float
    http_ttft_ms: float
    client_ttft_ms: float
    """Of `outrider.client`, over gRPC."""
    streams: int
    asked_events_per_s: float
    events_per_s: float
    core_share: float
    """Of the orchestrator's core that its process used meanwhile."""

    @property
    def added_ttft_ms(self) -> float:
        """Median over HTTP less median over gRPC."""
        return self.http_ttft_ms - self.grpc_ttft_ms


class _Stream(asyncio.Protocol):
    """One request over a connection of its own; counts the events of the answer."""

    def __init__(self) -> None:
        self.events = 0
        self.first: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        """Count; an event's name may be cut by a border of pieces."""
        now_s = time.perf_counter()
        text = self._tail + data
        count = text.count(b"\ndata: ")
        self._tail = text[-6:]
        self.events += count
        if count and not self.first.done():
            self.first.set_result(now_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whoever waits."""
        if not self.first.done():
            self.first.set_exception(ConnectionError("the orchestrator closed the connection"))


def _request(client: int) -> bytes:
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": client_prompt(client),
            "max_tokens": _TOKENS_MAX,
            "ignore_eos": True,
            "seed": client,
            "stream": True,
            "speculative": {"enabled": False},
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _connect(port: int) -> tuple[asyncio.Transport, _Stream]:
    loop = asyncio.get_running_loop()
    return await loop.create_connection(_Stream, "127.0.0.1", port)


async def _http_ttft_s(port: int, client: int) -> float:
    transport, stream = await _connect(port)
    data = _request(client)
    started_s = time.perf_counter()
    transport.write(data)
    first_s = await stream.first
    transport.abort()
    return first_s - started_s


async def _grpc_ttft_s(port: int, client: int) -> float:
    call = (await asyncio.get_running_loop().create_connection(BareCall, "127.0.0.1", port))[1]
    await call.ready
    started_s = time.perf_counter()
    call.ask(MODEL, client_prompt(client), _TOKENS_MAX, client)
    first_s = await call.first_text
    call.close()
    return first_s - started_s


async def _client_ttft_s(door: AsyncClient, client: int) -> float:
    request = Request(
        token_ids=tuple(client_prompt(client)),
        tokens_max=_TOKENS_MAX,
        ignore_eos=True,
        speculation=False,
        seed=client,
    )
    started_s = time.perf_counter()
    async with aclosing(door.generate(request)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Delta):
                break
    return time.perf_counter() - started_s


async def _first_tokens(grpc_port: int, http_port: int, count: int) -> tuple[float, float, float]:
    """Medians over gRPC, over HTTP, and of our own client, in milliseconds."""
    times_s: list[tuple[float, float, float]] = []
    async with AsyncClient(f"127.0.0.1:{grpc_port}") as door:
        for number in range(_WARM_UP + count):
            times_s.append(
                (
                    await _grpc_ttft_s(grpc_port, number),
                    await _http_ttft_s(http_port, number),
                    await _client_ttft_s(door, number),
                )
            )
    grpc_ms, http_ms, client_ms = (
        statistics.median(column) * 1e3 for column in zip(*times_s[_WARM_UP:], strict=True)
    )
    return grpc_ms, http_ms, client_ms


async def _events(
    port: int, streams: int, events_per_s: float, window_s: float, workers: Child, door: Any
) -> tuple[float, float]:
    """Events a second that arrived, and the share of a core that they took."""
    open_streams = [await _connect(port) for _ in range(streams)]
    for number, (transport, _) in enumerate(open_streams):
        transport.write(_request(number))
    await asyncio.gather(*(stream.first for _, stream in open_streams))
    mean_tokens = sum(COMMIT_TOKENS) / len(COMMIT_TOKENS)
    await asyncio.to_thread(workers.ask, "pace", tokens_per_s=events_per_s * mean_tokens)
    await asyncio.sleep(_SETTLE_S)
    begin, before = Usage.of(door), sum(stream.events for _, stream in open_streams)
    await asyncio.sleep(window_s)
    end, after = Usage.of(door), sum(stream.events for _, stream in open_streams)
    await asyncio.to_thread(workers.ask, "stop")
    for transport, _ in open_streams:
        transport.abort()
    seconds = (end.at_ns - begin.at_ns) / 1e9
    return (after - before) / seconds, (end.all_s - begin.all_s) / seconds


@click.command()
@click.option("--requests", type=click.IntRange(min=1), default=300, show_default=True)
@click.option("--streams", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--events", type=click.FloatRange(min=1), default=4_000.0, show_default=True)
@click.option(
    "--window", "window_s", type=click.FloatRange(min=0.5), default=8.0, show_default=True
)
def main(requests: int, streams: int, events: float, window_s: float) -> None:
    """Measure what the HTTP door adds to gRPC, and how many events it writes."""
    here = origin(["python", "-m", "bench.http", *sys.argv[1:]])
    _leave_the_first_core()
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        relay_fleet(
            streams + 8,
            rows=8,
            channels=1,
            http_port=port,
            log_path=Path(folder) / "orchestrator.log",
        ) as (workers, _, process),
    ):
        firsts_ms = asyncio.run(_first_tokens(_grpc_port(process), port, requests))
        arrived, share = asyncio.run(_events(port, streams, events, window_s, workers, process))
    result = Result(*firsts_ms, streams, events, arrived, share)
    _report(here, result)


def _grpc_port(process: psutil.Process) -> int:
    arguments = process.cmdline()
    return int(arguments[arguments.index("--port") + 1])


def _leave_the_first_core() -> None:
    # It is the orchestrator's; see `bench.relaying.fleet`.
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])


def _report(here: Origin, result: Result) -> None:
    print(
        f"time to first token, median: gRPC {result.grpc_ttft_ms:.2f} ms,"
        f" HTTP {result.http_ttft_ms:.2f} ms (bare sockets);"
        f" gRPC through outrider.client {result.client_ttft_ms:.2f} ms"
    )
    print(
        f"{result.streams} streams, {result.asked_events_per_s:.0f} events/s asked for:"
        f" {result.events_per_s:.0f} arrived, for {result.core_share:.0%} of a core"
        f" (synthetic workers; uvloop {'used' if find_spec('uvloop') else 'not installed'};"
        f" {platform.machine()}, Python {platform.python_version()})"
    )
    RESULTS.mkdir(exist_ok=True)
    data = {"origin": asdict(here), "synthetic": True, **asdict(result)}
    (RESULTS / "http.json").write_text(json.dumps(data, indent=2) + "\n")
    print(
        f"result: http added_ttft_ms={result.added_ttft_ms:.2f}"
        f" events_per_s={result.events_per_s:.0f} core_share={result.core_share:.2f}"
    )


if __name__ == "__main__":
    main()
