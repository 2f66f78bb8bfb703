"""Which worker holds which blocks of KV, in Redis: the orchestrators' side, and the keys.

Keys. All expire; the part in braces is the cluster's slot, so that the blocks of one text, which a
lookup asks for together, lie together, and different texts spread over a cluster:

    outrider:1:kv:{first}:{block}   hash   "worker#incarnation" -> unix time it last said so

`first` and `block` are the beginnings of the hashes of the text's first block and of the block
itself, in URL-safe base64 (24 and 128 bits). Hashes chain model fingerprint, tenant salt and all
tokens before (see `outrider.kv_blocks`), so another model's or tenant's block is another key. The
braces are literal.

A field says what an incarnation of a worker held. Who reads it must know by itself, from the
worker, which incarnation lives: a restart makes all of a worker's fields worthless at once.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

from outrider.registry.connection import KEY_PREFIX, Connection

LOOKUP_KEYS_MAX: Final = 128
"""Blocks of a text asked for at most; of a longer one evenly spread ones."""
HOLDERS_MAX: Final = 64
"""Holders listed for a block, and answered to a lookup, at most."""

_PREFIX: Final = KEY_PREFIX + "kv:"
_FIRST_BYTES: Final = 3
_BLOCK_BYTES: Final = 16

# Finds, for each holder, the deepest of a text's blocks that it holds. Who holds a block holds, but
# for a moment, all blocks before it, so the deepest is found by bisection, again and again among
# the holders that are not known yet.
# KEYS hashes of blocks, in the text's order. ARGV[1] holders wanted at most.
# Returns field, index of the block from 1, field, index, ...; the deepest come first.
_LOOKUP: Final = """
local known, answer, read = {}, {}, {}
local most = tonumber(ARGV[1])
local function fresh(index)
    if not read[index] then
        local fields = redis.pcall('HKEYS', KEYS[index])
        read[index] = fields.err and {} or fields
    end
    local found = {}
    for _, field in ipairs(read[index]) do
        if not known[field] then
            found[#found + 1] = field
        end
    end
    return found
end
local last, count = #KEYS, 0
while last >= 1 and count < most do
    local low, high, found = 0, last, {}
    while low < high do
        local middle = math.ceil((low + high) / 2)
        local there = fresh(middle)
        if #there > 0 then
            low, found = middle, there
        else
            high = middle - 1
        end
    end
    if low == 0 then
        break
    end
    for _, field in ipairs(found) do
        known[field] = true
        answer[#answer + 1] = field
        answer[#answer + 1] = low
        count = count + 1
    end
    last = low - 1
end
return answer
"""


class KvIndex:
    """Who holds the beginning of a text."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lookup = connection.redis.register_script(_LOOKUP)

    async def holders(self, hashes: Sequence[bytes]) -> Mapping[str, int]:
        """Return by incarnation how many of a text's first blocks it says it holds.

        `hashes` are those of the text's blocks in their order, see `kv_blocks.chain_hashes`. One
        round trip. Counts are rounded down where a text has more than `LOOKUP_KEYS_MAX` blocks.
        Raises `RegistryUnavailable`.
        """
        if not hashes:
            return {}
        asked = _spread(len(hashes), LOOKUP_KEYS_MAX)
        keys = [block_key(hashes[0], hashes[index]) for index in asked]
        async with self._connection.call():
            answer: list[Any] = await self._lookup(keys=keys, args=[HOLDERS_MAX])
        # In reverse: if fields of several names state one incarnation, the deepest one counts.
        pairs = list(zip(answer[::2], answer[1::2], strict=True))
        return {_incarnation(field): asked[index - 1] + 1 for field, index in reversed(pairs)}


def block_key(first: bytes, digest: bytes) -> str:
    """Return the key of a block whose text begins with the block of hash `first`."""
    return f"{_PREFIX}{{{_text(first[:_FIRST_BYTES])}}}:{_text(digest[:_BLOCK_BYTES])}"


def holder_field(worker: str, incarnation: str) -> str:
    """Return the field under which an incarnation of a worker is listed."""
    return f"{worker}#{incarnation}"


def _incarnation(field: bytes) -> str:
    return field.rpartition(b"#")[2].decode(errors="replace")


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` of the indices below `count`, evenly spread, the last one included."""
    chosen = min(count, most)
    return [(index + 1) * count // chosen - 1 for index in range(chosen)]
