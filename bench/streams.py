"""Clients of an orchestrator: one real stream for each session, and when tokens came on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from outrider.client import AsyncClient, Delta, Finished, Request
from outrider.errors import Unavailable

Delivery: TypeAlias = tuple[float, int]
"""When some tokens came, on the monotonic clock, and how many they were."""

_FIRST_TOKEN_MAX_S = 60.0
_SETTLED_S = 0.3
_TOKENS_PER_S_MAX = 400
"""Of one session: what bounds a stream's length, as it ends when the measurement does."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to ask for. Sessions differ in their prompts."""

    sessions: int
    speculation: bool
    seed: int = 0
    """Other seeds are other prompts."""
    skipped_s: float = 1.0
    """From the last session's first token: budgets and calibration find their level."""
    window_s: float = 4.0

    def prompts(self) -> list[str]:
        """One for each session."""
        return [f"Session {number} of trial {self.seed}: " for number in range(self.sessions)]


@dataclass(slots=True)
class Observed:
    """What came, session by session, and the window that counts."""

    deliveries: list[list[Delivery]]
    begin_s: float = 0.0
    end_s: float = 0.0
    marks: list[float] = field(default_factory=list)
    """When each of the steps of a script was taken."""

    @property
    def merged(self) -> list[Delivery]:
        """Deliveries of all sessions in the order of time."""
        return sorted(delivery for session in self.deliveries for delivery in session)


Script: TypeAlias = Sequence[tuple[float, Callable[[], None]]]
"""(seconds within the window, what to do then), in ascending order."""


def observe(address: str, load: Load, script: Script = ()) -> Observed:
    """Run the sessions at the orchestrator, all at once, until the window is over.

    Raises `OutriderError` if one fails, `Unavailable` if it ends early or does not begin.
    """
    return asyncio.run(_observe(address, load, script))


async def _observe(address: str, load: Load, script: Script) -> Observed:
    observed = Observed([[] for _ in range(load.sessions)])
    started = [asyncio.Event() for _ in range(load.sessions)]
    async with AsyncClient(address) as client:
        tasks = [
            asyncio.create_task(_stream(client, _request(load, prompt), deliveries, event))
            for prompt, deliveries, event in zip(
                load.prompts(), observed.deliveries, started, strict=True
            )
        ]
        try:
            await _unless_ended(tasks, _all_set(started), _FIRST_TOKEN_MAX_S)
            await _unless_ended(tasks, asyncio.sleep(load.skipped_s))
            observed.begin_s = time.monotonic()
            for at_s, action in script:
                pause_s = max(0.0, observed.begin_s + at_s - time.monotonic())
                await _unless_ended(tasks, asyncio.sleep(pause_s))
                # Not on the loop: deliveries go on meanwhile.
                await asyncio.to_thread(action)
                observed.marks.append(time.monotonic())
            rest_s = max(0.0, observed.begin_s + load.window_s - time.monotonic())
            await _unless_ended(tasks, asyncio.sleep(rest_s))
            observed.end_s = time.monotonic()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    # The services hear of the cancelled streams and forget their sessions.
    await asyncio.sleep(_SETTLED_S)
    return observed


def _request(load: Load, prompt: str) -> Request:
    lasting_s = load.skipped_s + load.window_s + 2
    return Request(
        prompt=prompt,
        temperature=0.0,
        seed=1,
        tokens_max=int(lasting_s * _TOKENS_PER_S_MAX),
        ignore_eos=True,
        speculation=load.speculation,
        # Nobody's prompt is there already: each contender computes its own.
        cache_salt=f"{load.seed}-{load.speculation}-{time.monotonic_ns()}",
    )


async def _stream(
    client: AsyncClient, request: Request, deliveries: list[Delivery], started: asyncio.Event
) -> None:
    async for event in client.generate(request):
        if isinstance(event, Delta) and event.token_ids:
            deliveries.append((time.monotonic(), len(event.token_ids)))
            started.set()
        elif isinstance(event, Finished):
            raise Unavailable(f"a session ended after {sum(n for _, n in deliveries)} tokens")


async def _all_set(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


async def _unless_ended(
    tasks: Sequence[asyncio.Task[None]], waiting: Awaitable[None], timeout_s: float | None = None
) -> None:
    """Await, but raise a stream's error as soon as there is one."""
    own = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait([own, *tasks], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        if not own.done():
            raise Unavailable(f"a session had no token after {timeout_s} s")
    finally:
        own.cancel()
