"""Sessions move to a verifier that joins, where that pays: whole fleets, synthetic models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orchestrator.config import DriverConfig
from outrider.client import Request
from outrider.model.loading import load_language_model
from tests.support.cases import Listener
from tests.support.fleet import RunningOrchestrator, RunningVerifier, orchestrator, until, verifier
from verifier_service.config import EngineConfig
from verifier_service.step_times import StepTimes

SPEC = "synthetic:target?seed=5&step={}"
RISING, FLAT, QUICK = "1:5,8:40", "1:15", "1:0"
"""Milliseconds of a step by the number of its rows."""
SESSIONS = 6
CONFIG = DriverConfig(sweep_interval_s=0.1)
ENGINE = EngineConfig(warm_up=False, prefill_tokens_max=64)


def asked(number: int, tokens_max: int) -> Request:
    ids = tuple(32 + (number * 31 + index * 7) % 95 for index in range(64))
    return Request(
        token_ids=ids,
        temperature=0.8 * (number % 2),
        seed=number,
        tokens_max=tokens_max,
        ignore_eos=True,
        speculation=False,
    )


@contextlib.asynccontextmanager
async def synthetic(step: str) -> AsyncIterator[RunningVerifier]:
    model = load_language_model(SPEC.format(step), cache_dir=Path("/nonexistent"))
    async with verifier(model, config=ENGINE, times=StepTimes()) as running:
        yield running


async def undisturbed(tokens_max: int) -> list[tuple[int, ...]]:
    """Speed is not part of what a model is: a quick one says the same."""
    async with synthetic(QUICK) as target, orchestrator([target.address]) as fleet:
        calls = [fleet.client.complete(asked(n, tokens_max)) for n in range(SESSIONS)]
        return [found.token_ids for found in await asyncio.gather(*calls)]


def moves(fleet: RunningOrchestrator) -> int:
    return fleet.driver.meters.migrations["verifier", "rebalanced"]


@contextlib.asynccontextmanager
async def scaled_up(
    step: str, tokens_max: int, config: DriverConfig = CONFIG
) -> AsyncIterator[tuple[RunningOrchestrator, RunningVerifier, RunningVerifier, list[Listener]]]:
    """Sessions on one verifier, and a second one that has just joined."""
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(synthetic(step))
        fleet = await stack.enter_async_context(orchestrator([first.address], config=config))
        listeners = [
            Listener(fleet.client.generate(asked(number, tokens_max), timeout_s=60))
            for number in range(SESSIONS)
        ]
        # How long a step takes with one row is known, then.
        await listeners[0].until_ids(8)
        hearing = [asyncio.create_task(listener.until_end()) for listener in listeners]

        async def under_way() -> bool:
            return all(len(listener.ids) >= 24 for listener in listeners)

        await until(under_way, what="all sessions are under way", timeout_s=30)
        second = await stack.enter_async_context(synthetic(step))
        fleet.fleet.update(verifiers=[first.address, second.address], drafters=[])
        yield fleet, first, second, listeners
        await asyncio.gather(*hearing)


async def test_after_a_scale_up_sessions_move_and_say_the_same():
    tokens_max = 360
    expected = await undisturbed(tokens_max)
    async with scaled_up(RISING, tokens_max) as (fleet, first, second, listeners):

        async def spread() -> bool:
            return first.engine.load >= 2 and second.engine.load >= 2

        await until(spread, what="both verifiers have sessions", timeout_s=20)
        assert not any(listener.finished for listener in listeners)
    assert 2 <= moves(fleet) <= SESSIONS
    assert [tuple(listener.ids) for listener in listeners] == expected
    # Each verifier has forgotten what left it.
    assert first.engine.load == second.engine.load == 0


@pytest.mark.parametrize(
    ("step", "config"),
    [(FLAT, CONFIG), (RISING, DriverConfig(sweep_interval_s=0.1, rebalance=False))],
    ids=["it would win nothing", "switched off"],
)
async def test_sessions_stay_where_they_are(step, config):
    tokens_max = 100
    async with scaled_up(step, tokens_max, config) as (fleet, _, second, _):
        pass
    assert moves(fleet) == 0
    assert second.engine.steps == 0


async def test_what_is_nearly_done_stays():
    async with scaled_up(RISING, 32) as (fleet, _, _, _):
        pass
    assert moves(fleet) == 0
