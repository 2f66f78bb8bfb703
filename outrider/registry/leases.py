"""Leases and journals of generations, in Redis: what another orchestrator continues from.

Keys, which share a slot of a cluster through the braces, so that one script serves many:

    outrider:1:{j}:s:{generation}  hash   the lease: `holder`, `request`, and for each choice `c`
                                          `e{c}` epoch, `n{c}` tokens journaled
    outrider:1:{j}:j:{generation}  list   the journal: packed entries, see `outrider.journal`

Both expire `retention_s` after the last write. A lease has one holder, named by a nonce. Only the
holder can append, only at the journal's end, and never under an older epoch; taking over is a
compare-and-set on the epochs of all choices and names a new holder. So whoever lost a generation
without noticing, an orchestrator that slept, say, is told so by the first append that it tries.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from outrider.errors import RegistryUnavailable, StaleEpoch
from outrider.journal import (
    Entry,
    Journaled,
    Outcome,
    Write,
    entry_from_bytes,
    entry_to_bytes,
)
from outrider.registry.connection import KEY_PREFIX, Connection

RETENTION_S: Final = 600.0
CALL_TIMEOUT_S: Final = 2.0

_LEASE: Final = f"{KEY_PREFIX}{{j}}:s:".encode()
_JOURNAL: Final = f"{KEY_PREFIX}{{j}}:j:".encode()

# Appends to many journals, each if its lease allows.
# KEYS: lease and journal of each generation, in turn
# ARGV[1] time to live in ms, ARGV[2] for each generation, little-endian: holder (16 bytes), flags
# (1 byte: 1 to replace what is there), length of the request (4 bytes), number of entries
# (4 bytes), the request (empty: the lease must be there), and for each entry its length (4 bytes)
# and the entry: epoch (4 bytes), choice (2 bytes), tokens before (4 bytes), tokens (4 bytes), ...
# One argument, since clients take longer to write many arguments than Redis to read one.
# Returns for each generation 1 (all of it is in the journal), 0 (somebody else holds it) or
# 2 (something is missing: write all of it anew).
_APPEND: Final = """
local call, unpack_bytes = redis.call, struct.unpack
local ttl_ms, data = ARGV[1], ARGV[2]
local outcomes = {}
local at = 1
for pair = 1, #KEYS / 2 do
    local lease, journal = KEYS[2 * pair - 1], KEYS[2 * pair]
    local holder, anew, size, count
    holder, anew, size, count, at = unpack_bytes('<c16BI4I4', data, at)
    local request = string.sub(data, at, at + size - 1)
    at = at + size
    local known = call('HGET', lease, 'holder')
    local outcome = 1
    if known and known ~= holder then
        outcome = 0
    elseif not known and size == 0 then
        outcome = 2
    elseif anew == 1 or not known then
        call('DEL', lease, journal)
        call('HSET', lease, 'holder', holder, 'request', request)
    end
    for _ = 1, count do
        local length, epoch, choice, before, tokens
        length, epoch, choice, before, tokens = unpack_bytes('<I4I4I2I4I4', data, at)
        if outcome == 1 then
            local has = call('HMGET', lease, 'e' .. choice, 'n' .. choice)
            local known_length = tonumber(has[2]) or 0
            if epoch < (tonumber(has[1]) or 0) then
                outcome = 0
            elseif before == known_length then
                call('RPUSH', journal, string.sub(data, at + 4, at + 3 + length))
                call('HSET', lease, 'e' .. choice, epoch, 'n' .. choice, before + tokens)
            elseif before + tokens > known_length then
                outcome = 2
            end
        end
        at = at + 4 + length
    end
    if outcome == 1 then
        call('PEXPIRE', lease, ttl_ms)
        call('PEXPIRE', journal, ttl_ms)
    end
    outcomes[pair] = outcome
end
return outcomes
"""
_GENERATION: Final = struct.Struct("<16sBII")
_LENGTH: Final = struct.Struct("<I")

# Names a new holder if no epoch has changed since they were read.
# KEYS[1] lease, KEYS[2] journal
# ARGV[1] time to live in ms, ARGV[2] new holder, ARGV[3] entries read before, then choice, epoch
# as read, choice, epoch, ...
# Returns the entries that came meanwhile, or the number of the first choice whose epoch differs.
_TAKE_OVER: Final = """
for at = 4, #ARGV, 2 do
    if redis.call('HGET', KEYS[1], 'e' .. ARGV[at]) ~= ARGV[at + 1] then
        return tonumber(ARGV[at])
    end
end
redis.call('HSET', KEYS[1], 'holder', ARGV[2])
for at = 4, #ARGV, 2 do
    redis.call('HINCRBY', KEYS[1], 'e' .. ARGV[at], 1)
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return redis.call('LRANGE', KEYS[2], ARGV[3], -1)
"""


class Leases:
    """Leases and journals behind a connection."""

    def __init__(self, connection: Connection, retention_s: float = RETENTION_S) -> None:
        self._connection = connection
        self._retention_ms = int(retention_s * 1000)
        self._append = connection.redis.register_script(_APPEND)
        self._take_over = connection.redis.register_script(_TAKE_OVER)

    async def append(
        self, writes: Sequence[Write], timeout_s: float = CALL_TIMEOUT_S
    ) -> list[Outcome]:
        """Journal what many generations have to say, in one round trip.

        Returns an outcome for each. Raises `RegistryUnavailable`; then anything may have happened,
        and writing the same again is right.
        """
        keys: list[bytes] = []
        pieces: list[bytes] = []
        for generation, holder, request, entries, anew in writes:
            keys += _keys(generation)
            pieces.append(_GENERATION.pack(holder, anew, len(request), len(entries)))
            pieces.append(request)
            for entry in entries:
                packed = entry_to_bytes(entry)
                pieces.append(_LENGTH.pack(len(packed)))
                pieces.append(packed)
        async with self._connection.call(timeout_s):
            outcomes = await self._append(keys=keys, args=[self._retention_ms, b"".join(pieces)])
        return [Outcome(outcome) for outcome in outcomes]

    async def read(self, generation: str) -> Journaled | None:
        """Return what is journaled of a generation, None if nothing is.

        Raises `RegistryUnavailable`.
        """
        lease_key, journal_key = _keys(generation)
        async with self._connection.call(CALL_TIMEOUT_S):
            pipeline = self._connection.redis.pipeline(transaction=True)
            pipeline.hgetall(lease_key)
            pipeline.lrange(journal_key, 0, -1)
            lease, packed = await pipeline.execute()
        request = lease.get(b"request")
        if request is None:
            return None
        epochs = {int(name[1:]): int(value) for name, value in lease.items() if _is_epoch(name)}
        return Journaled(generation, request, epochs, _entries(packed))

    async def take_over(self, known: Journaled, holder: bytes) -> Journaled:
        """Become the holder of a generation, one epoch higher in each choice.

        Returns it as it is now, with what was journaled since it was read. Raises `StaleEpoch` if
        somebody else was quicker, `RegistryUnavailable`.
        """
        pairs = [number for item in sorted(known.epochs.items()) for number in item]
        async with self._connection.call(CALL_TIMEOUT_S):
            answer = await self._take_over(
                keys=_keys(known.generation),
                args=[self._retention_ms, holder, len(known.entries), *pairs],
            )
        if isinstance(answer, int):
            raise StaleEpoch(
                f"generation {known.generation} is being resumed by somebody else",
                known.epochs[answer],
            )
        epochs = {choice: epoch + 1 for choice, epoch in known.epochs.items()}
        entries = known.entries + _entries(answer)
        return Journaled(known.generation, known.request, epochs, entries)


def _keys(generation: str) -> list[bytes]:
    name = generation.encode()
    return [_LEASE + name, _JOURNAL + name]


def _is_epoch(name: bytes) -> bool:
    return name[:1] == b"e" and name[1:].isdigit()


def _entries(packed: Sequence[bytes]) -> tuple[Entry, ...]:
    try:
        return tuple(map(entry_from_bytes, packed))
    except ValueError as error:
        raise RegistryUnavailable(f"a journal in Redis cannot be read: {error}") from None
