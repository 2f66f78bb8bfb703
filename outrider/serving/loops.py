"""Which event loop a service runs on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

SWITCH_INTERVAL_S = 0.0005


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a service's main coroutine: on uvloop if it is installed, else on asyncio's own loop."""
    # A worker's loop and its model's thread hand each other messages: neither should have to wait
    # for the other's computing to come to an end by itself (Python's default is 5 ms).
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=_uvloop()) as runner:
        runner.run(main)


def _uvloop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
