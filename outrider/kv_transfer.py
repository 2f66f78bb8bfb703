"""KV blocks on their way from one verifier to another: what they look like, and in what pieces.

A block's bytes are those of `[layers, 2, block_tokens, kv_heads, head_dim]`, little-endian. They
travel in chunks, each with a checksum over the block's hash, its place and its data: so bytes that
were changed, cut, or put where they do not belong are noticed, whether by a network, a proxy, or a
defect on either side. It does not protect from a verifier that lies; for that, verifiers show each
other certificates. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import xxhash

from outrider.errors import Mismatch
from outrider.kv_blocks import BLOCK_TOKENS

CHUNK_BYTES_MAX = 1 << 20
"""A quarter of what gRPC takes by default."""
HASH_BYTES = 32
HASHES_MAX = 8_192
"""Blocks asked for at once: a quarter of a million tokens."""


class CorruptKv(Mismatch):
    """What came is not what was sent, or not what was asked for."""


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What keys and values look like; see `KvGeometry` in kv.proto."""

    model_fingerprint: str
    layout: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int = BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class KvChunk:
    """Some bytes of a block."""

    block: int
    """Index among those asked for."""
    offset: int
    data: bytes
    checksum: int


def geometry_fault(ours: KvGeometry, theirs: KvGeometry) -> str | None:
    """Say what two verifiers' KV differs in, or None."""
    for field in fields(KvGeometry):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other:
            return f"geometry.{field.name}: {other!r} does not fit {mine!r}"
    return None


def chunk_checksum(digest: bytes, offset: int, data: bytes | memoryview) -> int:
    """XXH3-64 over a block's hash, the place of the data in the block, and the data."""
    hasher = xxhash.xxh3_64(digest + struct.pack("<Q", offset))
    hasher.update(data)
    return hasher.intdigest()


def chunks_of(block: int, digest: bytes, data: memoryview) -> Iterator[KvChunk]:
    """Cut a block into chunks."""
    for offset in range(0, len(data), CHUNK_BYTES_MAX):
        piece = bytes(data[offset : offset + CHUNK_BYTES_MAX])
        yield KvChunk(block, offset, piece, chunk_checksum(digest, offset, piece))


class Assembly:
    """Puts blocks together from chunks, which must come in order."""

    def __init__(self, digests: Sequence[bytes], block_bytes: int) -> None:
        self._digests = digests
        self._block_bytes = block_bytes
        self._block = 0
        self._data = bytearray()

    @property
    def blocks(self) -> int:
        """Blocks that are complete."""
        return self._block

    @property
    def complete(self) -> bool:
        """All blocks are there."""
        return self._block == len(self._digests)

    def add(self, chunk: KvChunk) -> bytearray | None:
        """Take a chunk in; returns the block that it completes. Raises `CorruptKv`."""
        if self.complete or (chunk.block, chunk.offset) != (self._block, len(self._data)):
            place = f"block {chunk.block}, offset {chunk.offset}"
            raise CorruptKv(f"{place} came where block {self._block} goes on at {len(self._data)}")
        if not 0 < len(chunk.data) <= self._block_bytes - len(self._data):
            raise CorruptKv(f"block {self._block} has {self._block_bytes} bytes, and more came")
        checksum = chunk_checksum(self._digests[self._block], chunk.offset, chunk.data)
        if checksum != chunk.checksum:
            raise CorruptKv(f"the checksum of block {self._block} is wrong at {chunk.offset}")
        self._data += chunk.data
        if len(self._data) < self._block_bytes:
            return None
        data, self._data = self._data, bytearray()
        self._block += 1
        return data
