"""A worker whose model hangs is not alive, although its event loop answers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import pytest

from outrider.serving.probe import check
from outrider.serving.pulse import HANGS_AFTER_S, Pulse
from outrider.serving.server import Server
from outrider.serving.worker_main import serve_until_stopped

DEADLINE_S = 20.0


async def state(address: str) -> str | None:
    return await asyncio.to_thread(check, address, "", None, 5.0)


async def test_a_loop_that_hangs_is_told_by_the_probe(caplog: pytest.LogCaptureFixture) -> None:
    pulse = Pulse()
    pulse.beat()
    server = Server(("outrider.v1.VerifierService",), host="127.0.0.1", port=0)
    address = asyncio.get_running_loop().create_future()

    @contextlib.asynccontextmanager
    async def publish(at: str) -> AsyncIterator[None]:
        address.set_result(at)
        yield

    async def keep_beating() -> None:
        while True:
            pulse.beat()
            await asyncio.sleep(0.005)

    serving = asyncio.create_task(
        serve_until_stopped(
            server,
            publish=publish,
            drain=lambda: None,
            load=lambda: 0,
            hang_up=lambda: None,
            drain_s=0.0,
            pulse=pulse,
            hangs_after_s=0.2,
        )
    )
    async with asyncio.timeout(DEADLINE_S):
        at = await address
        while (said := await state(at)) is None:
            pass
        assert "NOT_SERVING" in said
        beating = asyncio.create_task(keep_beating())
        while await state(at) is not None:
            pass
        beating.cancel()
        signal.raise_signal(signal.SIGTERM)
        await serving
    assert "has not moved for" in caplog.text


def test_a_loop_that_has_not_begun_or_rests_does_not_hang() -> None:
    pulse = Pulse()
    assert pulse.silent_s() == 0.0
    pulse.beat()
    pulse.rest()
    assert pulse.silent_s() == 0.0
    assert HANGS_AFTER_S > 60.0
