"""Which blocks of a KV budget are in use, and what the others still hold. Pure bookkeeping.

A block is `BLOCK_TOKENS` consecutive tokens of a text. A block full of committed tokens may be
*published* under its hash, a chain over everything before it, so that another session with the same
beginning shares it (automatic prefix caching, as in vLLM, arXiv 2309.06180). Blocks that nobody
uses keep their contents and can be shared again until their room is needed; the least recently used
go first.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from outrider.errors import Exhausted

BLOCK_TOKENS = 32
"""Tokens of a block: the unit of allocation and of sharing, in this protocol version."""


class OutOfBlocks(Exhausted):
    """The KV budget has no room for what was asked."""


def chain_root(model_fingerprint: str, salt: str) -> bytes:
    """Return what a text's first block is chained to: other models and tenants never share."""
    return hashlib.sha256(f"{model_fingerprint}\0{salt}".encode()).digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the SHA-256 of a full block; `parent` is the hash of the block before it."""
    ids = np.asarray(tokens, dtype="<u4").tobytes()
    return hashlib.sha256(parent + ids).digest()


def shareable_blocks(tokens: int) -> int:
    """Return how many full blocks of a text may be shared: its last token is always computed."""
    return max(0, (tokens - 1) // BLOCK_TOKENS)


def chain_hashes(root: bytes, tokens: Sequence[int], blocks_max: int) -> list[bytes]:
    """Return the hashes of a text's blocks that may be shared, `blocks_max` of them at most."""
    count = min(shareable_blocks(len(tokens)), blocks_max)
    shared = tokens[: count * BLOCK_TOKENS]
    ids = struct.pack(f"<{len(shared)}I", *shared)
    block_bytes = 4 * BLOCK_TOKENS
    hashes: list[bytes] = []
    parent = root
    for begin in range(0, len(ids), block_bytes):
        parent = hashlib.sha256(parent + ids[begin : begin + block_bytes]).digest()
        hashes.append(parent)
    return hashes


class BlockListener(Protocol):
    """Hears which blocks can be found, on the thread of the pool's owner; must be quick."""

    def held(self, digest: bytes, first: bytes) -> None:
        """A block can be found under `digest` now; `first` is the hash its text begins with."""
        ...

    def dropped(self, digest: bytes) -> None:
        """It cannot be found any more."""
        ...


class BlockPool:
    """A fixed number of blocks with reference counts. One owner; not thread-safe."""

    def __init__(self, count: int) -> None:
        self.listener: BlockListener | None = None
        """Hears of blocks that are published, or dropped later on."""
        if count < 1:
            raise ValueError(f"a pool needs at least one block, got {count}")
        self.count = count
        self._references = [0] * count
        # Reused last-in first-out: memory that was never touched stays untouched.
        self._free = list(range(count - 1, -1, -1))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Published blocks that nobody uses, least recently used first."""

    @property
    def available(self) -> int:
        """Blocks that can be allocated now, published idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds, shared ones counted once."""
        return self.count - self.available

    @property
    def published(self) -> int:
        """Blocks that can be found by their hash."""
        return len(self._block_of)

    def allocate(self, count: int) -> list[int]:
        """Take blocks with undefined contents. Raises OutOfBlocks, and then takes none."""
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks of KV are needed; {self.available} are available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._drop(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each; published blocks stay findable while there is room."""
        # The last block of a text first: a chain is of use only from its beginning.
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is not in use")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, digest: bytes, first: bytes | None = None) -> None:
        """Make a full block findable. If another one is known by that hash, it stays the one.

        `first` is the hash of the first block of its text; None: it is that one itself.
        """
        if self._references[block] < 1:
            raise ValueError(f"block {block} is not in use")
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest
            if self.listener is not None:
                self.listener.held(digest, first or digest)

    def share(self, digest: bytes) -> int | None:
        """Return the block of that hash with one more reference, or None if there is none."""
        block = self._block_of.get(digest)
        if block is not None:
            self._idle.pop(block, None)
            self._references[block] += 1
        return block

    def shared(self, block: int) -> bool:
        """True if the block must not be written: others use it, or may find it."""
        return self._references[block] > 1 or block in self._hash_of

    def forget(self) -> None:
        """Drop what idle blocks hold."""
        for block in self._idle:
            self._drop(block)
            self._free.append(block)
        self._idle.clear()

    def _drop(self, block: int) -> None:
        """Make an idle block unfindable."""
        digest = self._hash_of.pop(block)
        del self._block_of[digest]
        if self.listener is not None:
            self.listener.dropped(digest)
