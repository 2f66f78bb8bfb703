"""Times lookups in a large KV index; see `bench.placement`."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from outrider.kv_blocks import BLOCK_TOKENS, chain_hashes, chain_root
from outrider.registry import Connection, HeldBlocks, KvIndex, KvPublisher

WORKERS = 4
TEXT_BLOCKS = 50
"""Of each text in the index: 1,600 tokens."""
SHARED_BLOCKS = 10
"""Of them: held by all workers, such as instructions that begin many texts."""
NEW_BLOCKS = 10
"""That a looked-up text has after what is in the index."""


@dataclass(frozen=True, slots=True)
class LookupTimes:
    """What was measured."""

    blocks: int
    """Keys in the index."""
    bytes_per_block: float
    """Of Redis' memory."""
    published_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float


async def measure_lookups(url: str, blocks: int, lookups: int, seed: int) -> LookupTimes:
    """Fill an index with so many blocks, then look texts up one after the other."""
    chance = random.Random(seed)
    connection = Connection(url, timeout_s=10.0)
    try:
        async with connection.call():
            await connection.redis.flushall()
        before = await _memory_bytes(connection)
        texts = [_text(chance) for _ in range(max(1, blocks // TEXT_BLOCKS))]
        seconds = await _publish(connection, texts)
        async with connection.call():
            keys = int(await connection.redis.dbsize())
        memory = await _memory_bytes(connection) - before
        index = KvIndex(connection)
        times_s = []
        for _ in range(lookups):
            text = chance.choice(texts)
            known = text[: chance.randrange(1, len(text) + 1)]
            new = [chance.randrange(1 << 15) for _ in range(NEW_BLOCKS * BLOCK_TOKENS + 1)]
            hashes = [*known, *chain_hashes(known[-1], new, NEW_BLOCKS)]
            began_s = time.perf_counter()
            holders = await index.holders(hashes)
            times_s.append(time.perf_counter() - began_s)
            assert max(holders.values()) == len(known)
        times_s.sort()
        return LookupTimes(
            blocks=keys,
            bytes_per_block=memory / keys,
            published_per_s=keys / seconds,
            p50_ms=1e3 * times_s[len(times_s) // 2],
            p99_ms=1e3 * times_s[int(0.99 * len(times_s))],
            max_ms=1e3 * times_s[-1],
        )
    finally:
        await connection.close()


def _text(chance: random.Random) -> list[bytes]:
    tokens = [chance.randrange(1 << 15) for _ in range(BLOCK_TOKENS + 1)]
    root = chain_root("bench", "")
    hashes = chain_hashes(root, tokens, 1)
    # Hashes of hashes stand for those of texts, which would take longer to make.
    while len(hashes) < TEXT_BLOCKS:
        hashes += chain_hashes(hashes[-1], tokens, 1)
    return hashes


async def _publish(connection: Connection, texts: list[list[bytes]]) -> float:
    """Let workers publish the texts, each some; returns how many seconds that took."""
    began_s = time.perf_counter()
    for worker in range(WORKERS):
        blocks = HeldBlocks(news_max=sum(map(len, texts)) + 1)
        for number, text in enumerate(texts):
            own = number % WORKERS == worker
            for digest in text if own else text[:SHARED_BLOCKS] if number < WORKERS else ():
                blocks.held(digest, text[0])
        publisher = KvPublisher(
            connection, blocks, worker=f"verifier-{worker}", incarnation=f"{worker:032x}"
        )
        await publisher.tell_all()
    return time.perf_counter() - began_s


async def _memory_bytes(connection: Connection) -> int:
    async with connection.call():
        return int((await connection.redis.info("memory"))["used_memory"])
