"""The life of a worker process: listen, publish, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from outrider.serving.garbage import keep_what_is_loaded
from outrider.serving.pulse import HANGS_AFTER_S, Pulse
from outrider.serving.server import Server, stop_requested

_log = logging.getLogger(__name__)
_POLL_S = 0.05
_LOOK_S = 5.0
_STREAMS_GRACE_S = 0.5


async def serve_until_stopped(
    server: Server,
    *,
    publish: Callable[[str], AbstractAsyncContextManager[object]],
    drain: Callable[[], None],
    load: Callable[[], int],
    hang_up: Callable[[], None],
    drain_s: float,
    pulse: Pulse,
    hangs_after_s: float = HANGS_AFTER_S,
) -> None:
    """Serve until SIGTERM or SIGINT, then let what is under way finish for up to `drain_s`.

    `publish` makes the worker known by the address that the server really listens on, while the
    context lasts. `load` counts what would be cut off, `hang_up` ends the streams. A worker whose
    `pulse` is silent for `hangs_after_s` is no longer alive to whoever asks.
    """
    address = await server.start()
    keep_what_is_loaded()
    watching = asyncio.create_task(_watch(server, pulse, hangs_after_s))
    async with publish(address):
        await server.set_ready(True)
        _log.info("listening on %s", address)
        await stop_requested()
        await server.set_ready(False)
        drain()
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + drain_s
    # The model's thread has no event loop to signal; the wait is short and ends the process.
    while load() and loop.time() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)
    hang_up()
    watching.cancel()
    await server.stop(_STREAMS_GRACE_S)
    _log.info("stopped")


async def _watch(server: Server, pulse: Pulse, hangs_after_s: float) -> None:
    """Say that the process is dead while its loop hangs."""
    alive = True
    while True:
        await asyncio.sleep(min(_LOOK_S, hangs_after_s / 4.0))
        silent_s = pulse.silent_s()
        if (silent_s <= hangs_after_s) is alive:
            continue
        alive = not alive
        if alive:
            _log.warning("the model's thread goes on")
        else:
            _log.error("the model's thread has not moved for %.0f s", silent_s)
        await server.set_alive(alive)
