"""An HTTP door before a whole fleet of tiny models."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.support.fleet import DRAFT, TARGET, drafter, language_model, load, lookup, verifier
from tests.support.http_door import RunningDoor, http_door

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n"
"""A prompt that drafters find something in."""


@contextlib.asynccontextmanager
async def http_fleet(*, drafters: bool = True) -> AsyncIterator[RunningDoor]:
    """Serve a target; with drafters, one with a model and one that looks up."""
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET)))
        addresses = []
        for proposer in (language_model(load(DRAFT)), lookup()) if drafters else ():
            addresses.append((await stack.enter_async_context(drafter(proposer))).address)
        yield await stack.enter_async_context(http_door([target.address], addresses))
