"""Lookups that never make anybody wait."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

from orchestrator import prefix_lookup
from orchestrator.prefix_lookup import IN_FLIGHT_MAX, PrefixLookup
from outrider.errors import RegistryUnavailable
from outrider.registry import KvIndex

HASHES = [b"a"]


class Index:
    """Answers when told to."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[Mapping[str, int]]] = []
        self.at_once: Mapping[str, int] | None = None

    async def holders(self, hashes: Sequence[bytes]) -> Mapping[str, int]:
        if self.at_once is not None:
            return self.at_once
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]


def lookup(index: Index, deadline_s: float) -> PrefixLookup:
    return PrefixLookup(cast(KvIndex, cast(Any, index)), deadline_s)


async def test_an_answer_in_time_counts() -> None:
    index = Index()
    index.at_once = {"a": 1}
    lookups = lookup(index, 10.0)
    assert await lookups.holders(HASHES) == {"a": 1}
    assert (lookups.asked, lookups.late, lookups.slow) == (1, 0, False)


async def test_nobody_waits_for_a_slow_redis_until_it_is_quick_again(monkeypatch: Any) -> None:
    monkeypatch.setattr(prefix_lookup, "TRIAL_INTERVAL_S", 0.0)
    index = Index()
    lookups = lookup(index, 0.01)
    assert await lookups.holders(HASHES) is None
    assert lookups.slow
    # While one is under way, no other is sent.
    assert await lookups.holders(HASHES) is None
    assert len(index.asked) == 1
    assert lookups.skipped == 1
    index.asked[0].set_result({"a": 1})
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    # It came late. The next one is tried, unheeded.
    assert lookups.slow
    assert lookups.late == 1
    lookups._deadline_s = 10.0
    assert await lookups.holders(HASHES) is None
    await asyncio.sleep(0)
    index.asked[1].set_result({"a": 1})
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not lookups.slow
    index.at_once = {"b": 2}
    assert await lookups.holders(HASHES) == {"b": 2}


async def test_a_failure_is_no_error(caplog: Any) -> None:
    index = Index()
    lookups = lookup(index, 10.0)
    asked = asyncio.create_task(lookups.holders(HASHES))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    index.asked[0].set_exception(RegistryUnavailable("gone"))
    assert await asked is None
    assert lookups.slow
    assert "gone" in caplog.text
    assert await lookups.holders(HASHES) is None


async def test_few_are_under_way_at_once() -> None:
    index = Index()
    lookups = lookup(index, 10.0)
    tasks = [asyncio.create_task(lookups.holders(HASHES)) for _ in range(IN_FLIGHT_MAX)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert await lookups.holders(HASHES) is None
    assert len(index.asked) == IN_FLIGHT_MAX
    await lookups.close()
    assert await asyncio.gather(*tasks) == [None] * IN_FLIGHT_MAX
