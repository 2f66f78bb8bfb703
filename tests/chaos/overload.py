"""What becomes of admitted work when five times as much is asked for as there is room.

Calm and overload take turns, so that whatever else the machine does falls on both alike.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from outrider.client import AsyncClient, Delta
from outrider.errors import Exhausted
from outrider.serving.garbage import keep_what_is_loaded
from tests.chaos.report import quantile
from tests.support.cases import request
from tests.support.reference import Case

CASE = Case(tuple(b"Overload"), 96, ignore_eos=True)
PAUSE_MAX_S = 2.0
"""Clients follow the hint, but not for longer than a test wants to last."""
RAMP_S = 0.5
"""Within this time all clients have come."""
TIMES = 5
"""So many times as much is asked for as there is room."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SAMPLE_S = 0.1


@dataclass(slots=True)
class Seen:
    """What clients saw."""

    firsts_s: list[float] = field(default_factory=list)
    """Of admitted generations, from the call that was admitted to the first output."""
    gaps_s: list[float] = field(default_factory=list)
    """Between deliveries after that."""
    totals_s: list[float] = field(default_factory=list)
    """From the call that was admitted to the end."""
    refused: int = 0
    hinted: int = 0
    """Refusals that say when to try again."""
    refusals_s: list[float] = field(default_factory=list)
    """What it took to be refused."""
    errors: list[str] = field(default_factory=list)
    ids: set[tuple[int, ...]] = field(default_factory=set)


class Pressure:
    """Clients that keep asking; what they see adds up over several spells."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.seen = Seen()

    async def press(self, clients: int, duration_s: float) -> None:
        """Keep so many clients asking for so long.

        They come one after the other: thirty calls at the same moment would measure the process
        that makes them.
        """
        until_s = time.monotonic() + duration_s
        delays_s = [number * RAMP_S / clients for number in range(clients)]
        await asyncio.gather(*(self._one(delay_s, until_s) for delay_s in delays_s))

    async def _one(self, delay_s: float, until_s: float) -> None:
        await asyncio.sleep(delay_s)
        while time.monotonic() < until_s:
            pause_s = await self.ask()
            if pause_s is None:
                return
            await asyncio.sleep(pause_s)

    async def ask(self) -> float | None:
        """Ask once; returns how long to wait before the next time, None: not at all."""
        seen, ids, started_s = self.seen, list[int](), time.monotonic()
        heard_s = started_s
        try:
            async for event in self._client.generate(request(CASE), timeout_s=60):
                if isinstance(event, Delta):
                    now_s = time.monotonic()
                    (seen.gaps_s if ids else seen.firsts_s).append(now_s - heard_s)
                    heard_s = now_s
                    ids += event.token_ids
        except Exhausted as error:
            seen.refused += 1
            seen.hinted += error.retry_after_s is not None
            seen.refusals_s.append(time.monotonic() - started_s)
            return min(PAUSE_MAX_S, error.retry_after_s or PAUSE_MAX_S)
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            return None
        seen.totals_s.append(heard_s - started_s)
        seen.ids.add(tuple(ids))
        return 0.0


class Memory:
    """Resident memory of processes, sampled while a context lasts."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self.before_bytes = self.now_bytes()
        self.most_bytes = self.before_bytes

    def now_bytes(self) -> int:
        """All of them together."""
        return sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
            for pid in self._pids
        )

    @property
    def grown_bytes(self) -> int:
        """At most, since this was made."""
        return self.most_bytes - self.before_bytes

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look now and then."""

        async def look() -> None:
            while True:
                self.most_bytes = max(self.most_bytes, self.now_bytes())
                await asyncio.sleep(_SAMPLE_S)

        task = asyncio.create_task(look())
        try:
            yield
        finally:
            task.cancel()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Overload against as much as there is room for."""

    calm: Seen
    loaded: Seen
    recovered_s: float
    """From the end of the overload to a generation that is as quick as before."""
    grown_bytes: int
    """By so much the memory of the services grew under overload."""

    @property
    def first_ratio(self) -> float:
        """p99 of the time to the first output, under overload over without."""
        return _ratio(self.loaded.firsts_s, self.calm.firsts_s)

    @property
    def gap_ratio(self) -> float:
        """The same between deliveries."""
        return _ratio(self.loaded.gaps_s, self.calm.gaps_s)

    @property
    def total_ratio(self) -> float:
        """The same of whole generations."""
        return _ratio(self.loaded.totals_s, self.calm.totals_s)

    @property
    def worst_ratio(self) -> float:
        """Of the three."""
        return max(self.first_ratio, self.gap_ratio, self.total_ratio)

    def line(self) -> str:
        """For scripts."""
        calm, loaded = self.calm, self.loaded
        return (
            f"result: overload ttft_p99_ratio={self.first_ratio:.2f} "
            f"itl_p99_ratio={self.gap_ratio:.2f} total_p99_ratio={self.total_ratio:.2f} "
            f"ttft_p99_s={quantile(calm.firsts_s, 0.99):.3f} "
            f"itl_p99_s={quantile(calm.gaps_s, 0.99):.3f} "
            f"total_p99_s={quantile(calm.totals_s, 0.99):.3f} "
            f"admitted={len(loaded.totals_s)} refused={loaded.refused} hinted={loaded.hinted} "
            f"refusal_p99_s={quantile(loaded.refusals_s, 0.99):.3f} "
            f"errors={len(loaded.errors)} grown_mib={self.grown_bytes / 2**20:.1f} "
            f"recovered_s={self.recovered_s:.2f}"
        )


def _ratio(loaded_s: Sequence[float], calm_s: Sequence[float]) -> float:
    return quantile(loaded_s, 0.99) / quantile(calm_s, 0.99)


async def overload(
    endpoint: str, capacity: int, spell_s: float, spells: int, pids: Sequence[int]
) -> Verdict:
    """Ask for as much as there is room for, then for five times as much, in turn.

    `pids` are the processes whose memory is looked at. Raises `AssertionError` if a quick answer
    never comes again.
    """
    # Or else a collection in this process, which takes most of a second, would be measured.
    keep_what_is_loaded()
    try:
        return await _overload(endpoint, capacity, spell_s, spells, pids)
    finally:
        gc.unfreeze()


async def _overload(
    endpoint: str, capacity: int, spell_s: float, spells: int, pids: Sequence[int]
) -> Verdict:
    async with AsyncClient(endpoint) as client:
        calm, loaded = Pressure(client), Pressure(client)
        await Pressure(client).press(capacity, 0.5)  # first calls open connections and warm up
        memory: Memory | None = None
        for _ in range(spells):
            await calm.press(capacity, spell_s)
            memory = memory or Memory(pids)
            with memory.watched():
                await loaded.press(TIMES * capacity, spell_s)
        ended_s = time.monotonic()
        wanted_s = 1.5 * quantile(calm.seen.totals_s, 0.99)
        while True:
            after = Pressure(client)
            await after.ask()
            now_s = time.monotonic()
            if after.seen.totals_s and after.seen.totals_s[0] <= wanted_s:
                break
            assert now_s - ended_s < 60.0, "it does not recover"
        assert memory is not None, "there is one spell at least"
        return Verdict(calm.seen, loaded.seen, now_s - ended_s, memory.grown_bytes)
