"""The index of KV blocks against a real server."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from outrider.errors import RegistryUnavailable
from outrider.kv_blocks import BLOCK_TOKENS, BlockPool, chain_hashes, chain_root
from outrider.registry import Connection, HeldBlocks, KvIndex, KvPublisher, block_key
from outrider.registry.kv_index import HOLDERS_MAX, LOOKUP_KEYS_MAX
from tests.support.redis_process import RedisProcess

DEADLINE_S = 10.0
ROOT = chain_root("fp", "")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path)
    yield server
    server.stop()


@pytest.fixture
async def connection(server: RedisProcess) -> AsyncIterator[Connection]:
    connection = Connection(server.url)
    yield connection
    await connection.close()


@pytest.fixture
async def raw(server: RedisProcess) -> AsyncIterator[Redis]:
    """A client that says anything to the server."""
    async with Redis.from_url(server.url) as client:
        yield client


def text(blocks: int, seed: int = 0) -> list[bytes]:
    """Hashes of a text that has so many blocks to share."""
    return chain_hashes(ROOT, [seed] * (blocks * BLOCK_TOKENS + 1), blocks)


def hold(blocks: HeldBlocks, hashes: list[bytes]) -> None:
    for digest in hashes:
        blocks.held(digest, hashes[0])


def publisher(
    connection: Connection,
    blocks: HeldBlocks,
    worker: str = "v-1",
    incarnation: str = "a1",
    **options: float,
) -> KvPublisher:
    quick = {"interval_s": 0.01, "marker_interval_s": 0.02, "retry_interval_s": 0.02}
    return KvPublisher(
        connection, blocks, worker=worker, incarnation=incarnation, **{**quick, **options}
    )


async def until_found(index: KvIndex, hashes: list[bytes], expected: dict[str, int]) -> None:
    """Wait until a lookup gives just this."""
    found: object = None
    try:
        async with asyncio.timeout(DEADLINE_S):
            while found != expected:
                try:
                    found = await index.holders(hashes)
                except RegistryUnavailable as error:
                    found = error
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"found {found!r}, not {expected!r}") from None


async def test_what_is_held_is_found_and_what_is_dropped_is_not(connection: Connection) -> None:
    index, blocks, hashes = KvIndex(connection), HeldBlocks(), text(5)
    async with publisher(connection, blocks):
        hold(blocks, hashes)
        await until_found(index, hashes, {"a1": 5})
        # Of another text nothing, of a longer one the beginning.
        assert await index.holders(text(5, seed=1)) == {}
        assert await index.holders([*hashes[:3], *text(2, seed=2)]) == {"a1": 3}
        for digest in hashes[2:]:
            blocks.dropped(digest)
        await until_found(index, hashes, {"a1": 2})
        for digest in hashes[:2]:
            blocks.dropped(digest)
        await until_found(index, hashes, {})


async def test_each_holder_counts_as_deep_as_it_goes(connection: Connection) -> None:
    index, hashes = KvIndex(connection), text(40)
    depths = {"a": 40, "b": 17, "c": 17, "d": 1, "e": 39}
    for incarnation, depth in depths.items():
        blocks = HeldBlocks()
        hold(blocks, hashes[:depth])
        async with publisher(connection, blocks, f"v-{incarnation}", incarnation):
            await until_found(index, hashes, {i: d for i, d in depths.items() if i <= incarnation})
    assert await index.holders(hashes) == depths


async def test_long_texts_are_asked_for_in_part(connection: Connection) -> None:
    index, blocks, hashes = KvIndex(connection), HeldBlocks(), text(10 * LOOKUP_KEYS_MAX)
    hold(blocks, hashes[:1_000])
    async with publisher(connection, blocks):
        await until_found(index, hashes, {"a1": 1_000})
        hold(blocks, hashes[:1_009])
        await until_found(index, hashes[:1_009], {"a1": 1_009})
        assert await index.holders(hashes) == {"a1": 1_000}


async def test_a_restarted_worker_takes_out_what_it_was(connection: Connection, raw: Redis) -> None:
    index, hashes = KvIndex(connection), text(3)
    # Names that begin alike must not be taken for each other.
    for worker, incarnation in (("v", "a1"), ("v#1", "b1"), ("v-2", "c1"), ("v", "a2")):
        blocks = HeldBlocks()
        hold(blocks, hashes if incarnation != "a2" else hashes[:2])
        async with publisher(connection, blocks, worker, incarnation):
            await until_listed(raw, hashes[0], f"{worker}#{incarnation}")
    assert await index.holders(hashes) == {"a1": 3, "b1": 3, "c1": 3, "a2": 2}
    fields = await raw.hkeys(block_key(hashes[0], hashes[0]))
    assert set(fields) == {b"v#1#b1", b"v-2#c1", b"v#a2"}


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 - what is waited for offers no event.
            await asyncio.sleep(0.01)


async def until_listed(raw: Redis, digest: bytes, field: str) -> None:
    await eventually(lambda: raw.hexists(block_key(digest, digest), field))


async def test_what_nobody_confirms_is_taken_out_and_expires(
    connection: Connection, raw: Redis
) -> None:
    hashes = text(1)
    key = block_key(hashes[0], hashes[0])
    long_ago = int(time.time()) - 1_000
    await raw.hset(key, mapping={"v-9#old": long_ago, "v-8#odd": "nonsense"})
    blocks = HeldBlocks()
    hold(blocks, hashes)
    async with publisher(connection, blocks, ttl_s=900):
        await until_listed(raw, hashes[0], "v-1#a1")
    assert await raw.hkeys(key) == [b"v-1#a1"]
    assert 0.85 * 900 < await raw.ttl(key) < 1.15 * 900
    for other in await raw.keys("*"):
        assert await raw.ttl(other) > 0, other


async def test_a_block_of_many_lists_some(connection: Connection, raw: Redis) -> None:
    index, hashes = KvIndex(connection), text(1)
    now_s = int(time.time())
    await raw.hset(
        block_key(hashes[0], hashes[0]),
        mapping={f"w-{i}#i{i}": now_s for i in range(HOLDERS_MAX)},
    )
    blocks = HeldBlocks()
    hold(blocks, hashes)
    other = HeldBlocks()
    hold(other, text(1, seed=1))
    async with publisher(connection, blocks), publisher(connection, other, "v-2", "b1"):
        await until_found(index, text(1, seed=1), {"b1": 1})
        await until_marked(raw, "v-1#a1")
    assert len(await index.holders(hashes)) == HOLDERS_MAX
    assert "a1" not in await index.holders(hashes)


async def until_marked(raw: Redis, field: str) -> None:
    await eventually(lambda: raw.exists(f"outrider:1:{{w}}:kv:{field}"))


async def test_a_flushed_redis_is_told_all_again(connection: Connection, raw: Redis) -> None:
    index, blocks, hashes = KvIndex(connection), HeldBlocks(), text(300)
    hold(blocks, hashes)
    async with publisher(connection, blocks):
        await until_found(index, hashes, {"a1": 300})
        await raw.flushall()

        async def complete() -> bool:
            return await raw.exists(*(block_key(hashes[0], digest) for digest in hashes)) == 300

        await eventually(complete)
        assert await index.holders(hashes) == {"a1": 300}


async def test_a_snapshot_of_earlier_is_noticed(connection: Connection, raw: Redis) -> None:
    blocks, hashes = HeldBlocks(), text(2)
    hold(blocks, hashes)
    index = KvIndex(connection)
    async with publisher(connection, blocks):
        await until_found(index, hashes, {"a1": 2})
        # All is lost but the marker, which is as it was a while ago.
        await raw.set("outrider:1:{w}:kv:v-1#a1", 1)
        await raw.delete(block_key(hashes[0], hashes[0]), block_key(hashes[0], hashes[1]))
        await until_found(index, hashes, {"a1": 2})


async def test_lost_blocks_are_told_again_without_a_sign(
    connection: Connection, raw: Redis
) -> None:
    blocks, hashes = HeldBlocks(), text(20)
    hold(blocks, hashes)
    index = KvIndex(connection)
    async with publisher(connection, blocks, reannounce_s=0.2):
        await until_found(index, hashes, {"a1": 20})
        await raw.delete(block_key(hashes[0], hashes[19]))
        await until_found(index, hashes, {"a1": 20})


async def test_a_restarted_redis_is_told_all_again(
    connection: Connection, server: RedisProcess
) -> None:
    index, blocks, hashes = KvIndex(connection), HeldBlocks(), text(3)
    hold(blocks, hashes)
    async with publisher(connection, blocks):
        await until_found(index, hashes, {"a1": 3})
        server.stop()
        with pytest.raises(RegistryUnavailable):
            await index.holders(hashes)
        # News of meanwhile is not lost.
        blocks.dropped(hashes[2])
        hold(blocks, text(2, seed=1))
        server.start()
        await until_found(index, hashes, {"a1": 2})
        await until_found(index, text(2, seed=1), {"a1": 2})


async def test_a_full_redis_is_told_when_it_has_room(connection: Connection, raw: Redis) -> None:
    index, blocks, hashes = KvIndex(connection), HeldBlocks(), text(3)
    hold(blocks, hashes[:2])
    async with publisher(connection, blocks) as telling:
        await until_found(index, hashes, {"a1": 2})
        await raw.config_set("maxmemory-policy", "noeviction")
        await raw.config_set("maxmemory", "1")
        hold(blocks, hashes)
        await until_connected(telling, connected=False)
        # What is not held any more is taken out even so.
        blocks.dropped(hashes[1])
        blocks.dropped(hashes[2])
        await until_found(index, hashes, {"a1": 1})
        await raw.config_set("maxmemory", "0")
        hold(blocks, hashes)
        await until_found(index, hashes, {"a1": 3})


async def until_connected(telling: KvPublisher, *, connected: bool) -> None:
    async def reached() -> bool:
        return telling.connected is connected

    await eventually(reached)


async def test_too_much_news_at_once_ends_in_telling_all(connection: Connection) -> None:
    index, blocks, hashes = KvIndex(connection), HeldBlocks(news_max=10), text(100)
    hold(blocks, hashes)
    assert blocks.overflowed
    async with publisher(connection, blocks) as telling:
        await until_found(index, hashes, {"a1": 100})
        assert telling.counters.republished == 1


async def test_a_key_of_another_type_costs_itself_only(connection: Connection, raw: Redis) -> None:
    index, blocks, hashes = KvIndex(connection), HeldBlocks(), text(4)
    await raw.set(block_key(hashes[0], hashes[3]), "text", ex=60)
    others = text(3, seed=1)
    hold(blocks, hashes[3:])
    hold(blocks, others)
    async with publisher(connection, blocks):
        await until_found(index, others, {"a1": 3})
        assert await index.holders(hashes) == {}


async def test_a_pool_tells_by_itself(connection: Connection) -> None:
    index, blocks, hashes = KvIndex(connection), HeldBlocks(), text(3)
    pool = BlockPool(3)
    pool.listener = blocks
    async with publisher(connection, blocks):
        taken = pool.allocate(3)
        for block, digest in zip(taken, hashes, strict=True):
            pool.publish(block, digest, hashes[0])
        pool.release(taken)
        await until_found(index, hashes, {"a1": 3})
        pool.allocate(1)
        await until_found(index, hashes, {"a1": 2})
        pool.forget()
        await until_found(index, hashes, {})
    assert len(blocks) == 0


async def test_only_commands_that_redis_7_has(connection: Connection, raw: Redis) -> None:
    await raw.config_resetstat()
    index, blocks, hashes = KvIndex(connection), HeldBlocks(), text(2)
    hold(blocks, hashes)
    async with publisher(connection, blocks):
        await until_found(index, hashes, {"a1": 2})
        blocks.dropped(hashes[1])
        await until_found(index, hashes, {"a1": 1})
    used = {name.removeprefix("cmdstat_") for name in await raw.info("commandstats")}
    known = {
        "evalsha", "eval", "script|load", "hlen", "hexists", "hset", "hdel", "hkeys", "hgetall",
        "pexpire", "set", "time", "client|setinfo", "hello", "config|resetstat",
    }  # fmt: skip
    assert used <= known


def test_keys_of_a_text_share_a_slot() -> None:
    hashes = text(50)
    keys = [block_key(hashes[0], digest) for digest in hashes]
    slots = {re.fullmatch(r"outrider:1:kv:\{([^{}]+)\}:[^{}]+", key).group(1) for key in keys}  # type: ignore[union-attr]
    assert len(slots) == 1
    assert len(set(keys)) == 50
