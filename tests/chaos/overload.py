"""What becomes of admitted work when five times as much is asked for as there is room."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from outrider.client import AsyncClient, Delta
from outrider.errors import Exhausted
from tests.chaos.report import quantile
from tests.support.cases import request
from tests.support.reference import Case

CASE = Case(tuple(b"Overload"), 96, ignore_eos=True)
PAUSE_MAX_S = 0.5
"""Clients follow the hint, but not for longer than a test wants to last."""


@dataclass(slots=True)
class Seen:
    """What clients saw."""

    totals_s: list[float] = field(default_factory=list)
    """Of admitted generations, from the call that was admitted to the end."""
    gaps_s: list[float] = field(default_factory=list)
    """Between deliveries."""
    refused: int = 0
    hinted: int = 0
    """Refusals that say when to try again."""
    errors: list[str] = field(default_factory=list)
    ids: set[tuple[int, ...]] = field(default_factory=set)


async def press(endpoint: str, clients: int, duration_s: float) -> Seen:
    """Keep so many clients asking for so long."""
    seen = Seen()
    until_s = time.monotonic() + duration_s

    async def one(client: AsyncClient) -> None:
        while time.monotonic() < until_s:
            started_s = heard_s = time.monotonic()
            ids: list[int] = []
            try:
                async for event in client.generate(request(CASE), timeout_s=60):
                    if isinstance(event, Delta):
                        now_s = time.monotonic()
                        seen.gaps_s.append(now_s - heard_s)
                        heard_s = now_s
                        ids += event.token_ids
            except Exhausted as error:
                seen.refused += 1
                seen.hinted += error.retry_after_s is not None
                await asyncio.sleep(min(PAUSE_MAX_S, error.retry_after_s or PAUSE_MAX_S))
            except Exception as error:
                seen.errors.append(f"{type(error).__name__}: {error}")
                return
            else:
                seen.totals_s.append(heard_s - started_s)
                seen.ids.add(tuple(ids))

    async with AsyncClient(endpoint) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return seen


@dataclass(frozen=True, slots=True)
class Verdict:
    """Overload against no overload."""

    unloaded: Seen
    loaded: Seen
    recovered_s: float
    """From the end of the overload to a generation that is as quick as before."""

    @property
    def ratio(self) -> float:
        """p99 of the time that an admitted generation takes, at 5x over at 1x."""
        before = quantile(self.unloaded.totals_s, 0.99)
        return quantile(self.loaded.totals_s, 0.99) / before

    def line(self) -> str:
        """For scripts."""
        loaded = self.loaded
        return (
            f"result: overload p99_ratio={self.ratio:.2f} "
            f"p99_unloaded_s={quantile(self.unloaded.totals_s, 0.99):.3f} "
            f"admitted={len(loaded.totals_s)} refused={loaded.refused} hinted={loaded.hinted} "
            f"errors={len(loaded.errors)} recovered_s={self.recovered_s:.2f}"
        )


async def overload(endpoint: str, capacity: int, duration_s: float) -> Verdict:
    """Ask for as much as there is room for, then for five times as much."""
    unloaded = await press(endpoint, capacity, duration_s)
    loaded = await press(endpoint, 5 * capacity, duration_s)
    ended_s = time.monotonic()
    wanted_s = 1.5 * quantile(unloaded.totals_s, 0.99)
    while True:
        again = await press(endpoint, 1, 1e-3)
        if again.totals_s and max(again.totals_s) <= wanted_s:
            return Verdict(unloaded, loaded, time.monotonic() - ended_s)
        if time.monotonic() - ended_s > 60.0:
            raise AssertionError("it does not recover")
