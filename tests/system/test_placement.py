"""Placement by KV in whole fleets: real services, real streams, a real Redis, tiny models."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from bench.links import LinkProxy
from orchestrator import jobs
from orchestrator.config import DriverConfig
from orchestrator.placement import Weighed
from orchestrator.placing import Placer
from orchestrator.prefix_lookup import PrefixLookup
from orchestrator.prefix_memory import Prefix
from outrider.client import Completion, Request
from outrider.kv_blocks import BLOCK_TOKENS
from outrider.model.language_model import LanguageModel
from outrider.registry import Connection, HeldBlocks, KvIndex, KvPublisher
from tests.support.fleet import (
    TARGET,
    RunningOrchestrator,
    RunningVerifier,
    load,
    orchestrator,
    until,
    verifier,
)
from tests.support.redis_process import RedisProcess

PROMPT = "Wer reitet so spät durch Nacht und Wind? " * 6
PATIENT = DriverConfig(prefix_lookup_s=1.0)
"""The machine may be busy; what is tested is what is found, not how quickly."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(TARGET)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    redis = RedisProcess(tmp_path)
    yield redis
    redis.stop()


@contextlib.asynccontextmanager
async def publishing(running: RunningVerifier, url: str, worker: str) -> AsyncIterator[KvPublisher]:
    """Let a verifier tell Redis what it holds, quickly."""
    blocks = HeldBlocks()
    running.engine.pool.blocks.listener = blocks
    connection = Connection(url)
    publisher = KvPublisher(
        connection,
        blocks,
        worker=worker,
        incarnation=running.service._incarnation,
        interval_s=0.01,
        marker_interval_s=0.05,
        retry_interval_s=0.05,
    )
    async with publisher:
        yield publisher
    await connection.close()


@contextlib.asynccontextmanager
async def knowing(
    addresses: list[str], url: str, config: DriverConfig = PATIENT
) -> AsyncIterator[RunningOrchestrator]:
    """Run an orchestrator that asks Redis."""
    connection = Connection(url)
    lookup = PrefixLookup(KvIndex(connection), config.prefix_lookup_s)
    async with orchestrator(addresses, config=config) as running:
        running.driver.placer = Placer(running.fleet, lookup)
        yield running
        await lookup.close()
    await connection.close()


async def say(running: RunningOrchestrator, prompt: str = PROMPT, salt: str = "") -> Completion:
    request = Request(prompt=prompt, temperature=0, tokens_max=4, ignore_eos=True, cache_salt=salt)
    return await running.client.complete(request)


async def found(running: RunningOrchestrator, salt: str = "") -> tuple[Prefix, list[Weighed]]:
    """What Redis says of the prompt, and what that makes of the verifiers."""
    info = next(iter(running.fleet.models().values()))
    asked = jobs.Request(seed=1, prompt=PROMPT, cache_salt=salt)
    job = jobs.job_of(asked, info, running.fleet.codec(info), PATIENT)
    prefix = await running.driver.placer.find(job)
    return prefix, running.driver.placer.weigh(prefix, info.model, len(job.prompt))


async def until_hit(running: RunningOrchestrator, address: str) -> None:
    """Wait until a lookup says that a verifier holds all of the prompt that can be shared."""

    async def hit() -> bool:
        prefix, weighed = await found(running)
        held = {one.view.address: one.view.held_tokens for one in weighed}
        return held.get(address) == len(prefix.hashes) * BLOCK_TOKENS

    await until(hit, what=f"{address} is known to hold the prompt", timeout_s=20)


def forget(running: RunningOrchestrator) -> None:
    """Make an orchestrator know only what Redis tells it."""
    running.driver.placer = Placer(running.fleet, running.driver.placer.lookup)


def adopted(running: RunningVerifier) -> int:
    return running.engine.pool.tokens_adopted


async def test_another_orchestrator_finds_what_a_verifier_holds(
    model: LanguageModel, redis: RedisProcess
) -> None:
    async with (
        verifier(model) as first,
        verifier(model) as second,
        publishing(first, redis.url, "v-1"),
        publishing(second, redis.url, "v-2"),
        knowing([first.address], redis.url) as one,
        knowing([first.address, second.address], redis.url) as other,
    ):
        await say(one)
        await until_hit(other, first.address)
        for _ in range(4):
            forget(other)
            await say(other)
        assert adopted(second) == 0
        tokens = len((await found(other))[0].hashes) * BLOCK_TOKENS
        assert adopted(first) == 4 * tokens > 0
        # Another tenant's text is another text.
        prefix, weighed = await found(other, salt="tenant")
        assert prefix.looked_up
        assert not prefix.holders
        assert {one.view.held_tokens for one in weighed} == {0}


async def test_a_conversation_stays_where_it_is_without_redis(model: LanguageModel) -> None:
    async with (
        verifier(model) as first,
        verifier(model) as second,
        orchestrator([first.address, second.address]) as running,
    ):
        text = PROMPT
        for _ in range(4):
            text += (await say(running, text)).text + " Und weiter ging es, immer weiter. " * 2
        shares = sorted([adopted(first), adopted(second)])
        assert shares[0] == 0
        assert shares[1] > 3 * BLOCK_TOKENS


async def test_a_restarted_verifier_holds_nothing(
    model: LanguageModel, redis: RedisProcess
) -> None:
    async with verifier(model) as other:
        async with (
            verifier(model) as before,
            publishing(before, redis.url, "v-1"),
            knowing([before.address], redis.url) as one,
        ):
            await say(one)
            await until_hit(one, before.address)
        # Under the same name, at the same address.
        port = int(before.address.rpartition(":")[2])
        async with (
            verifier(model, port=port) as after,
            publishing(after, redis.url, "v-1"),
            knowing([after.address, other.address], redis.url) as one,
        ):
            assert after.address == before.address
            prefix, weighed = await found(one)
            # Redis still says what the dead one held.
            assert max(prefix.holders.values()) == len(prefix.hashes)
            assert before.service._incarnation in prefix.holders
            assert {one.view.held_tokens for one in weighed} == {0}
            assert len(weighed) == 2


async def test_an_orchestrator_does_not_believe_its_own_memory_of_a_dead_verifier(
    model: LanguageModel,
) -> None:
    async with contextlib.AsyncExitStack() as life:
        before = await life.enter_async_context(verifier(model))
        async with orchestrator([before.address]) as running:
            await say(running)
            assert (await found(running))[1][0].view.held_tokens > 0
            await life.aclose()
            port = int(before.address.rpartition(":")[2])
            async with verifier(model, port=port):

                async def back() -> bool:
                    links = running.fleet.verifiers.values()
                    return bool(running.fleet.models()) and all(
                        link.incarnation != before.service._incarnation for link in links
                    )

                await until(back, what="the new incarnation is ready")
                (weighed,) = (await found(running))[1]
                assert weighed.view.held_tokens == 0


async def test_redis_may_do_what_it_likes(model: LanguageModel, redis: RedisProcess) -> None:
    """Flushed, full, slow, gone and back: all is answered alike, and hits come back."""
    quick = DriverConfig(prefix_lookup_s=0.05)
    async with contextlib.AsyncExitStack() as stack:
        proxy = stack.enter_context(LinkProxy())
        url = f"redis://{proxy.open('redis', redis.address)}"
        first = await stack.enter_async_context(verifier(model))
        second = await stack.enter_async_context(verifier(model))
        await stack.enter_async_context(publishing(first, url, "v-1"))
        await stack.enter_async_context(publishing(second, url, "v-2"))
        running = await stack.enter_async_context(
            knowing([first.address, second.address], url, quick)
        )
        raw = await stack.enter_async_context(Redis.from_url(redis.url))
        expected = (await say(running)).token_ids
        holder = first if first.engine.pool.blocks.published else second

        async def answered() -> None:
            forget(running)
            assert (await say(running)).token_ids == expected

        async def recovered() -> None:
            forget(running)
            await until_hit(running, holder.address)

        await recovered()
        await raw.flushall()
        await answered()
        await recovered()

        await raw.config_set("maxmemory", "1")
        await raw.flushall()
        await answered()
        await raw.config_set("maxmemory", "0")
        await recovered()

        proxy.delay("redis", 0.1)
        for _ in range(3):
            await answered()
        lookup = running.driver.placer.lookup
        assert lookup is not None
        assert lookup.slow
        proxy.delay("redis", 0.0)
        await recovered()

        redis.stop()
        for _ in range(3):
            await answered()
        redis.start()
        await recovered()


async def test_who_chose_what_is_logged(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "orchestrator.placing")
    async with verifier(model) as first, orchestrator([first.address]) as running:
        await say(running)
    assert f"chosen: {first.address} costs" in caplog.text
