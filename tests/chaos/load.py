"""Clients under whose eyes the faults happen: every generation is checked, id by id."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.client import AsyncClient, Delta, Started
from outrider.errors import OutriderError
from tests.chaos.history import Heard
from tests.support.cases import PROMPTS, SAMPLED, request
from tests.support.fleet import TARGET, until
from tests.support.reference import Case, Expected, Tally, expect


def cases(count: int, tokens_max: int) -> list[Case]:
    """Greedy and sampled in turn."""
    prompts = itertools.cycle([prompt for prompt in PROMPTS if len(prompt) < 120])
    return [
        Case(tuple(prompt), tokens_max, ignore_eos=True)
        if number % 2
        else Case(tuple(prompt), tokens_max, seed=number, ignore_eos=True, **SAMPLED)
        for number, prompt in zip(range(count), prompts, strict=False)
    ]


@dataclass(slots=True)
class Outcomes:
    """What became of all generations."""

    generations: int = 0
    mismatches: int = 0
    lost: int = 0
    doubled: int = 0
    gaps_s: list[float] = field(default_factory=list)
    """Longest time between two deliveries, of each generation."""
    errors: list[str] = field(default_factory=list)
    history: list[Heard] = field(default_factory=list)
    deliveries_s: list[float] = field(default_factory=list)
    """When anything was delivered to anybody."""
    tally: Tally = field(default_factory=Tally)


class Load:
    """So many generations at any time, from start to stop."""

    def __init__(
        self,
        endpoints: Sequence[str],
        pairs: Sequence[tuple[Case, Expected]],
        concurrency: int,
        seed: int,
    ) -> None:
        self._endpoints = list(endpoints)
        self._pairs = list(pairs)
        self._concurrency = concurrency
        self._seed = seed
        self._stopping = False
        self.under_way = 0
        self.outcomes = Outcomes()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin."""
        self._tasks = [
            asyncio.create_task(self._client(number)) for number in range(self._concurrency)
        ]

    async def stop(self) -> Outcomes:
        """Begin no more; wait for those under way."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        return self.outcomes

    async def until(self, generations: int, timeout_s: float) -> None:
        """Wait until so many have ended. Raises `AssertionError`."""

        async def ended() -> bool:
            return self.outcomes.generations >= generations

        await until(ended, what=f"{generations} generations have ended", timeout_s=timeout_s)

    async def _client(self, number: int) -> None:
        chance = random.Random(self._seed * 1_000 + number)
        turn = number % len(self._endpoints)
        endpoints = self._endpoints[turn:] + self._endpoints[:turn]
        async with AsyncClient(*endpoints, resume_s=60.0, silence_s=1.5) as client:
            while not self._stopping:
                case, expected = chance.choice(self._pairs)
                await self._one(client, case, expected)

    async def _one(self, client: AsyncClient, case: Case, expected: Expected) -> None:
        outcomes, ids, name = self.outcomes, list[int](), "unnamed"
        self.under_way += 1
        heard_s, gap_s = time.monotonic(), 0.0
        try:
            async for event in client.generate(request(case), timeout_s=120.0):
                now_s = time.monotonic()
                if isinstance(event, Started):
                    name = event.generation_id
                if isinstance(event, Delta):
                    heard = Heard(now_s, name, 1, event.choice, len(ids), event.token_ids)
                    outcomes.history.append(heard)
                    outcomes.deliveries_s.append(now_s)
                    ids += event.token_ids
                    gap_s, heard_s = max(gap_s, now_s - heard_s), now_s
        except OutriderError as error:
            outcomes.lost += 1
            outcomes.errors.append(f"{name}: {type(error).__name__}: {error}")
            return
        finally:
            self.under_way -= 1
            outcomes.generations += 1
        outcomes.gaps_s.append(gap_s)
        if len(ids) > len(expected.ids):
            outcomes.doubled += 1
        before = len(outcomes.tally.faults)
        outcomes.tally.check(TARGET, case, expected, ids)
        outcomes.mismatches += len(outcomes.tally.faults) > before


def expectations(wanted: Sequence[Case]) -> list[tuple[Case, Expected]]:
    """Each case with its undisturbed output."""
    return [(case, expect(TARGET, case)) for case in wanted]
