"""What orchestrators say of themselves, how it is asked for, and what is made of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from orchestrator.cluster.scraping import Scraper, read_samples
from orchestrator.scaling.reading import Scrape, read_signals


@contextlib.asynccontextmanager
async def door(serve: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """An orchestrator's HTTP door, as far as a handler has it; gives host:port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def scraper(tmp_path: Path) -> AsyncIterator[Scraper]:
    key = tmp_path / "key"
    key.write_text("secret")
    made = Scraper(key_file=key, timeout_s=5.0)
    yield made
    await made.close()


async def test_a_key_goes_nowhere_else(scraper: Scraper) -> None:
    """Whoever answers in an orchestrator's place could send us on to collect it."""
    asked: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request.headers.get("authorization", ""))
        return web.Response(text="outrider_sessions_max 7\n")

    async with door(elsewhere) as other:

        async def redirect(request: web.Request) -> web.Response:
            raise web.HTTPTemporaryRedirect(f"http://{other}/metrics")

        async with door(redirect) as first:
            assert await scraper.scrape([first]) == []
            assert asked == []


async def test_a_look_is_as_old_as_the_answer_not_as_its_end() -> None:
    """Megabytes over a slow line, or a long queue for this process's attention."""
    now_s = 100.0
    looked, go_on = asyncio.Event(), asyncio.Event()

    def clock() -> float:
        looked.set()
        return now_s

    async def slowly(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"outrider_sessions_max 7\n")
        await go_on.wait()
        return response

    asked = Scraper(timeout_s=5.0, clock=clock)
    try:
        async with door(slowly) as address, asyncio.timeout(5.0):
            scraping = asyncio.create_task(asked.scrape([address]))
            await looked.wait()
            now_s = 130.0
            go_on.set()
            (found,) = await scraping
    finally:
        await asked.close()
    assert found.at_s == 100.0
    assert found.total("sessions_max") == 7


def scrape(instance: str, at_s: float, text: str) -> Scrape:
    return Scrape(instance, at_s, read_samples(text))


def test_a_look_is_as_old_as_its_oldest_part() -> None:
    parts = [scrape("a", 10.0, ""), scrape("b", 4.0, ""), scrape("c", 8.0, "")]
    assert read_signals(parts, {}, missing=0, now_s=30.0).measured_s == 4.0


def test_orchestrators_that_leave_have_no_room_but_still_sessions() -> None:
    def text(draining: int) -> str:
        return (
            f"outrider_draining {draining}\n"
            'outrider_sessions{role="orchestrator"} 10\n'
            "outrider_sessions_max 100\n"
            "outrider_connections 20\n"
            "outrider_connections_max 200\n"
        )

    parts = [scrape("a", 0.0, text(0)), scrape("b", 0.0, text(1))]
    found = read_signals(parts, {}, missing=0, now_s=0.0).orchestrators
    assert (found.ready, found.sessions, found.sessions_max) == (1, 20, 100)
    assert (found.connections, found.connections_max) == (40, 200)


def test_verifiers_that_leave_and_sessions_that_wait_are_seen_by_all_and_counted_once() -> None:
    text = (
        'outrider_workers{role="verifier",state="draining"} 2\n'
        'outrider_workers{role="drafter",state="draining"} 5\n'
        'outrider_queue_depth{role="verifier"} 3\n'
    )
    parts = [scrape("a", 0.0, text), scrape("b", 0.0, text)]
    found = read_signals(parts, {}, missing=0, now_s=0.0).verifiers
    assert (found.draining, found.waiting) == (2, 3)


def test_what_is_not_a_number_says_nothing() -> None:
    parts = [
        scrape("a", 0.0, 'outrider_kv_used_ratio{verifier="v"} NaN\n'),
        scrape("b", 0.0, 'outrider_kv_used_ratio{verifier="v"} 0.25\n'),
    ]
    assert read_signals(parts, {}, missing=0, now_s=0.0).verifiers.kv_share == 0.25


def test_waits_that_are_longer_than_any_bound_count_as_longer() -> None:
    def text(within: int, observed: int) -> str:
        return (
            "# TYPE outrider_queue_wait_seconds histogram\n"
            f'outrider_queue_wait_seconds_bucket{{le="0.5"}} {within}\n'
            f'outrider_queue_wait_seconds_bucket{{le="2.0"}} {within}\n'
            f'outrider_queue_wait_seconds_bucket{{le="+Inf"}} {observed}\n'
        )

    before = {"a": scrape("a", 0.0, text(5, 5))}
    late = [scrape("a", 15.0, text(5, 20))]
    assert read_signals(late, before, missing=0, now_s=15.0).verifiers.queue_wait_s == 4.0
    quiet = [scrape("a", 15.0, text(5, 5))]
    assert read_signals(quiet, before, missing=0, now_s=15.0).verifiers.queue_wait_s is None
