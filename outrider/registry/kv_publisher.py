"""Which worker holds which blocks of KV, in Redis: the workers' side.

The model's thread notes what it holds and drops (`held_blocks`), which costs it a dictionary entry;
the event loop tells Redis in batches. Beside the news, everything that is held is told again, a
slice at a time, within `REANNOUNCE_S`: what got lost, for whatever reason, is back by then. If
much got lost, slices follow each other quickly: after Redis lost its memory, after an error, or
when there was more news than is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import RedisError

from outrider.errors import RegistryUnavailable
from outrider.registry.connection import KEY_PREFIX, Connection
from outrider.registry.held_blocks import HeldBlocks
from outrider.registry.kv_index import HOLDERS_MAX, block_key, holder_field
from outrider.registry.renewal import Renewal

BLOCK_TTL_S: Final = 1_200.0
"""A block that nobody has told of for so long is forgotten."""
REANNOUNCE_S: Final = 480.0
"""Within this time, all that is held is told again: twice before it would be forgotten."""
PUBLISH_INTERVAL_S: Final = 0.1
MARKER_INTERVAL_S: Final = 2.0
"""How often an idle worker looks whether Redis still knows what it was told."""
RETRY_INTERVAL_S: Final = 1.0
BATCH_MAX: Final = 2_048
"""Blocks told of at once."""

_KEYS_PER_CALL: Final = 64
_JITTER: Final = 0.1

# Lists a worker as a holder of blocks, and takes out what is certainly dead: other incarnations of
# the same worker, and what was not confirmed for long.
# KEYS hashes of blocks
# ARGV[1] "worker#", ARGV[2] incarnation, ARGV[3] time to live in ms, ARGV[4] holders at most
# Returns how many fields of others were taken out.
_ANNOUNCE: Final = """
local worker, field = ARGV[1], ARGV[1] .. ARGV[2]
local ttl_ms, most = tonumber(ARGV[3]), tonumber(ARGV[4])
local now_s = tonumber(redis.call('TIME')[1])
local pruned = 0
for _, key in ipairs(KEYS) do
    local count = redis.call('HLEN', key)
    local mine = count > 0 and redis.call('HEXISTS', key, field) == 1
    if count > (mine and 1 or 0) then
        local all = redis.call('HGETALL', key)
        for index = 1, #all, 2 do
            local other, said_s = all[index], tonumber(all[index + 1])
            local reborn = string.sub(other, 1, #worker) == worker
                and not string.find(other, '#', #worker + 1, true)
            local stale = not said_s or said_s * 1000 < now_s * 1000 - ttl_ms
            if other ~= field and (reborn or stale) then
                redis.call('HDEL', key, other)
                count, pruned = count - 1, pruned + 1
            end
        end
    end
    if mine or count < most then
        redis.call('HSET', key, field, now_s)
        redis.call('PEXPIRE', key, ttl_ms)
    end
end
return pruned
"""


@dataclass(slots=True)
class PublisherCounters:
    """What was sent, for measuring."""

    announced: int = 0
    dropped: int = 0
    round_trips: int = 0
    commands: int = 0
    """As Redis counts them at its door: a script is one, whatever it does inside."""
    republished: int = 0
    """How often all was told anew."""
    pruned: int = 0
    """Fields of dead incarnations that were taken out."""


@dataclass(slots=True)
class _Round:
    """One turn of telling everything."""

    left: list[bytes] = field(default_factory=list)
    """In reverse."""
    per_attempt: int = 0


class KvPublisher(Renewal):
    """Keeps Redis informed of what a worker holds, while the context lasts."""

    def __init__(
        self,
        connection: Connection,
        blocks: HeldBlocks,
        *,
        worker: str,
        incarnation: str,
        interval_s: float = PUBLISH_INTERVAL_S,
        ttl_s: float = BLOCK_TTL_S,
        reannounce_s: float = REANNOUNCE_S,
        marker_interval_s: float = MARKER_INTERVAL_S,
        retry_interval_s: float = RETRY_INTERVAL_S,
    ) -> None:
        super().__init__("KV publisher", connection.place, interval_s)
        self._connection = connection
        self._blocks = blocks
        self._worker, self._incarnation = worker, incarnation
        self._field = holder_field(worker, incarnation)
        # In the slot of the worker's record.
        self._marker = f"{KEY_PREFIX}{{w}}:kv:{self._field}"
        self._marks = 0
        self._marked_s = -marker_interval_s
        self._ttl_s, self._reannounce_s = ttl_s, reannounce_s
        self._marker_interval_s, self._retry_interval_s = marker_interval_s, retry_interval_s
        self._script = ""
        """Digest of the script, once Redis has it."""
        self._round = _Round()
        self._round_ends_s = 0.0
        self._retry_s = 0.0
        self.counters = PublisherCounters()

    async def tell_all(self) -> None:
        """Tell all news at once, without a context. Raises `RegistryUnavailable`."""
        while (news := self._blocks.take(BATCH_MAX)).held or news.dropped:
            await self._tell(news.held, news.dropped)

    async def _act(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._retry_s:
            return
        news = self._blocks.take(BATCH_MAX)
        if self._blocks.overflowed:
            self._blocks.overflowed = False
            self._begin_round(urgent=True)
        elif now_s >= self._round_ends_s:
            self._begin_round(urgent=False)
        again = self._blocks.still_held(self._slice())
        if not (news.held or news.dropped or again or self._marker_due(now_s)):
            return
        try:
            await self._tell(news.held | again, news.dropped)
        except RegistryUnavailable:
            self._blocks.give_back(news)
            # It may have been carried out in part, or Redis may be another by now.
            self._script, self._marks = "", 0
            self._begin_round(urgent=True)
            self._retry_s = now_s + self._retry_interval_s
            raise
        self._marked_s = now_s

    def _marker_due(self, now_s: float) -> bool:
        return now_s - self._marked_s >= self._marker_interval_s

    def _begin_round(self, *, urgent: bool) -> None:
        everything = self._blocks.everything()[::-1]
        attempts = max(1.0, self._reannounce_s / self._interval_s)
        per_attempt = BATCH_MAX if urgent else int(len(everything) / attempts) + 1
        self._round = _Round(everything, per_attempt)
        self._round_ends_s = asyncio.get_running_loop().time() + self._reannounce_s
        self.counters.republished += urgent

    def _slice(self) -> list[bytes]:
        left, count = self._round.left, self._round.per_attempt
        taken = left[-count:] if count else []
        del left[len(left) - len(taken) :]
        return taken

    async def _tell(self, held: dict[bytes, bytes], dropped: dict[bytes, bytes]) -> None:
        """One round trip. Raises `RegistryUnavailable` if anything of it failed."""
        redis = self._connection.redis
        async with self._connection.call():
            if not self._script:
                self._script = await redis.script_load(_ANNOUNCE)
            pipeline = redis.pipeline(transaction=False)
            for digest, first in dropped.items():
                # No script: it works even where Redis is full.
                pipeline.hdel(block_key(first, digest), self._field)
            calls = [
                keys[i : i + _KEYS_PER_CALL]
                for keys in _by_slot(held)
                for i in range(0, len(keys), _KEYS_PER_CALL)
            ]
            for keys in calls:
                ttl_ms = int(1e3 * self._ttl_s * random.uniform(1 - _JITTER, 1 + _JITTER))
                pipeline.evalsha(
                    self._script,
                    len(keys),
                    *keys,
                    f"{self._worker}#",
                    self._incarnation,
                    str(ttl_ms),
                    str(HOLDERS_MAX),
                )
            pipeline.set(self._marker, self._marks + 1, ex=int(self._ttl_s) + 1, get=True)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            faults = [answer for answer in answers if isinstance(answer, RedisError)]
            if faults:
                raise faults[0]
        self._count(len(held), len(dropped), answers[len(dropped) : -1])
        mark, self._marks = answers[-1], self._marks + 1
        if self._marks > 1 and mark != str(self._marks - 1).encode():
            # Redis forgot what it was told, or remembers what was true a while ago.
            self._begin_round(urgent=True)

    def _count(self, held: int, dropped: int, pruned: list[int]) -> None:
        counters = self.counters
        counters.announced += held
        counters.dropped += dropped
        counters.round_trips += 1
        counters.commands += dropped + len(pruned) + 1
        counters.pruned += sum(pruned)


def _by_slot(held: dict[bytes, bytes]) -> Iterator[list[str]]:
    """Yield the keys of blocks, those of a cluster's slot together."""
    groups: defaultdict[bytes, list[str]] = defaultdict(list)
    for digest, first in held.items():
        groups[first].append(block_key(first, digest))
    yield from groups.values()


@contextlib.asynccontextmanager
async def published_blocks(
    url: str | None, blocks: HeldBlocks, *, worker: str, incarnation: str
) -> AsyncIterator[None]:
    """Tell the Redis at `url` what a worker holds while the context lasts; None: do nothing."""
    if url is None:
        yield
        return
    connection = Connection(url)
    try:
        async with KvPublisher(connection, blocks, worker=worker, incarnation=incarnation):
            yield
    finally:
        await connection.close()
