"""Keys and values: one pool for all sessions of a model, and each session's table into it.

The pool is one tensor, allocated once, in which a *slot* is the place of one token:

    [layers, 2, slots, kv_heads, head_dim]           index 1: 0 is keys, 1 is values

A session's tokens, numbered

    |<- prefix ->|<- tree ->|

lie in the slots of its table's blocks. A tree slot s is token `prefix_length + s`, wherever it
hangs in the tree: where a node *stands* (its position, for rotary embeddings) is prefix_length +
depth, which stays the same when the prefix grows along its path. So compaction moves keys and
values but never recomputes, and it moves the accepted path only.

A pool and its caches belong to one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from outrider.kv_blocks import BLOCK_TOKENS, BlockPool, block_hash, chain_hashes, chain_root

KV_LAYOUT = "layer-kv-slot-head-2"
"""Name of the layout above: part of the model fingerprint, since KV of another cannot be used."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Sizes of a model's keys and values. With no layers a pool keeps positions only."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class KvPool:
    """The KV budget of a model: memory and the books about it."""

    shared_out = False
    """Other processes hold parts of each block."""

    def __init__(self, layout: KvLayout, tokens_max: int, model_fingerprint: str = "") -> None:
        self.layout = layout
        self.model_fingerprint = model_fingerprint
        self.blocks = BlockPool(-(-tokens_max // BLOCK_TOKENS))
        self.tokens_adopted = 0
        """Tokens that sessions shared so far instead of computing them."""
        slots = self.blocks.count * BLOCK_TOKENS
        shape = (layout.layers, 2, slots, layout.kv_heads, layout.head_dim)
        # On a CPU, memory that is never written is never taken.
        self.buffer = torch.empty(shape, dtype=layout.dtype, device=layout.device)

    @property
    def tokens_max(self) -> int:
        """Tokens that fit altogether."""
        return self.blocks.count * BLOCK_TOKENS

    @property
    def tokens_used(self) -> int:
        """Tokens in blocks that somebody holds, shared ones counted once."""
        return self.blocks.used * BLOCK_TOKENS

    @property
    def tokens_available(self) -> int:
        """Tokens in blocks that can be taken now."""
        return self.blocks.available * BLOCK_TOKENS

    def new_cache(self, salt: str | None = None) -> SessionCache:
        """Create an empty cache; it belongs to the caller, who also releases it.

        Caches with the same salt share equal prefixes; None: this one shares nothing.
        """
        root = None if salt is None else chain_root(self.model_fingerprint, salt)
        return SessionCache(self, root)

    def move(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        """Copy slots of all layers; sources and targets may overlap."""
        source = torch.from_numpy(sources).to(self.layout.device)
        target = torch.from_numpy(targets).to(self.layout.device)
        # Gathered before anything is written, so an overlap cannot corrupt a source.
        self.buffer.index_copy_(2, target, self.buffer.index_select(2, source))


@dataclass(frozen=True, slots=True)
class Extension:
    """New tokens of a cache, planned but not yet part of it."""

    start: int
    """Token index in the session of the first new token."""
    positions: npt.NDArray[np.int64]
    """[n] position of each new token in its text."""
    visible: npt.NDArray[np.bool_] | None
    """[n, start + n - prefix_length] whether a new token sees each slot; None for a chain."""
    parents: tuple[int, ...] | None
    """Parent slots, or None for a chain that extends the prefix."""

    @property
    def size(self) -> int:
        """Number of new tokens."""
        return len(self.positions)


class SessionCache:
    """KV of one session: `prefix_length` committed tokens, then `tree_size` tree slots.

    Slots of the tree are numbered from 0 in the order in which they were computed; each has a
    parent slot, or -1 if its parent is the last token of the prefix. Wrong arguments raise
    ValueError, too little room OutOfBlocks, and both leave the cache as it was; after `release`
    everything but `release` raises RuntimeError.
    """

    def __init__(self, pool: KvPool, chain_root: bytes | None = None) -> None:
        """`chain_root`: share full blocks of the prefix under it; None: share nothing."""
        self.pool = pool
        self._chain_root = chain_root
        self._hashes: list[bytes] = []
        """Of the full blocks of the prefix that were published or adopted."""
        self._table: list[int] | None = []
        self._slots = np.empty(0, dtype=np.int64)
        self._prefix_length = 0
        self._parents: list[int] = []
        self._depths: list[int] = []
        # Row s: which slots are ancestors of slot s or s itself.
        self._ancestors = np.zeros((0, 0), dtype=np.bool_)

    def __repr__(self) -> str:
        return f"SessionCache(prefix_length={self.prefix_length}, tree_size={self.tree_size})"

    @property
    def layout(self) -> KvLayout:
        """Sizes of the keys and values."""
        return self.pool.layout

    @property
    def prefix_length(self) -> int:
        """Number of committed tokens whose keys and values are held, from position 0 on."""
        return self._prefix_length

    @property
    def tree_size(self) -> int:
        """Number of tree slots held after the prefix."""
        return len(self._parents)

    @property
    def parents(self) -> tuple[int, ...]:
        """Parent slot of each tree slot; -1 is the end of the prefix."""
        return tuple(self._parents)

    @property
    def tree_positions(self) -> npt.NDArray[np.int64]:
        """[tree_size] position in the text of each tree slot."""
        return self._prefix_length + np.array(self._depths, dtype=np.int64)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of the pool that hold the tokens, in their order."""
        return tuple(self._held())

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """[capacity] slot in the pool of each token index."""
        self._held()
        return self._slots

    def blocks_needed(self, tokens: int) -> int:
        """How many more blocks `tokens` more tokens would take."""
        total = self._prefix_length + self.tree_size + tokens
        return max(0, -(-total // BLOCK_TOKENS) - len(self._held()))

    def adopt(self, tokens: Sequence[int]) -> int:
        """Share, while nothing is held yet, the blocks that others hold of a text's beginning.

        At least the last token is left to compute, since its logits are wanted. Returns how many
        tokens of the prefix are held now. Going on where an earlier call ended is possible as long
        as nothing else was computed.
        """
        held = self._held()
        if self._chain_root is None or len(held) * BLOCK_TOKENS != self._prefix_length:
            return self._prefix_length
        while (begin := self._prefix_length) + BLOCK_TOKENS < len(tokens):  # shareable_blocks()
            if len(self._hashes) * BLOCK_TOKENS != begin or self.tree_size:
                break
            digest = self.next_hash(tokens)
            block = None if digest is None else self.pool.blocks.share(digest)
            if digest is None or block is None:
                break
            self._hashes.append(digest)
            held.append(block)
            self._prefix_length += BLOCK_TOKENS
            self.pool.tokens_adopted += BLOCK_TOKENS
            self._map()
        return self._prefix_length

    def next_hash(self, tokens: Sequence[int]) -> bytes | None:
        """Return the hash of the first full block that is not published or adopted yet."""
        begin = len(self._hashes) * BLOCK_TOKENS
        if self._chain_root is None or begin + BLOCK_TOKENS > len(tokens):
            return None
        parent = self._hashes[-1] if self._hashes else self._chain_root
        return block_hash(parent, tokens[begin : begin + BLOCK_TOKENS])

    def shareable_hashes(self, tokens: Sequence[int], blocks_max: int) -> list[bytes]:
        """Return the hashes of a text's first blocks that may be shared; none if it shares none."""
        if self._chain_root is None:
            return []
        return chain_hashes(self._chain_root, tokens, blocks_max)

    def publish(self, tokens: Sequence[int]) -> None:
        """Let others share the prefix's full blocks; `tokens` are the session's from the first."""
        held = self._held()
        while (len(self._hashes) + 1) * BLOCK_TOKENS <= self._prefix_length:
            digest = self.next_hash(tokens)
            if digest is None:
                return
            first = self._hashes[0] if self._hashes else None
            self.pool.blocks.publish(held[len(self._hashes)], digest, first)
            self._hashes.append(digest)

    def advance(self, path: Sequence[int], keep: Sequence[int] = ()) -> dict[int, int]:
        """Make `path` part of the prefix and drop every other slot that is not in `keep`.

        `path` lists slots downwards from the end of the prefix. `keep` lists descendants of the
        end of `path`, each parent before its children. Returns the new slot of each kept one,
        which follows the order of `keep`. What already lies in its place is not moved.
        Raises ValueError if `path` is no such path or a parent of `keep` is missing.
        """
        self._held()
        self._check_advance(path, keep)
        sources = self._prefix_length + np.array([*path, *keep], dtype=np.int64)
        targets = self._prefix_length + np.arange(len(sources), dtype=np.int64)
        moved = sources != targets
        if moved.any():
            self.pool.move(self._slots[sources[moved]], self._slots[targets[moved]])

        remap = {old: new for new, old in enumerate(keep)}
        self._parents = [remap.get(self._parents[slot], -1) for slot in keep]
        self._depths = [self._depths[slot] - len(path) for slot in keep]
        kept = np.array(keep, dtype=np.int64)
        self._ancestors = self._ancestors[np.ix_(kept, kept)]
        self._prefix_length += len(path)
        self._trim()
        return remap

    def truncate(self, length: int) -> None:
        """Drop the tree and all of the prefix after its first `length` tokens."""
        held = self._held()
        if not 0 <= length <= self._prefix_length:
            raise ValueError(f"cannot truncate a prefix of {self._prefix_length} to {length}")
        cut = length // BLOCK_TOKENS
        if length % BLOCK_TOKENS and self.pool.blocks.shared(held[cut]):
            # What others may read is not written again: go on in a copy.
            (copy,) = self.pool.blocks.allocate(1)
            within = np.arange(length % BLOCK_TOKENS, dtype=np.int64)
            self.pool.move(held[cut] * BLOCK_TOKENS + within, copy * BLOCK_TOKENS + within)
            self.pool.blocks.release([held[cut]])
            held[cut] = copy
        self._drop_tree()
        self._prefix_length = length
        del self._hashes[cut:]
        self._trim()
        self._map()

    def release(self) -> None:
        """Give the blocks back; the cache cannot be used afterwards. May be called again."""
        if self._table is not None:
            self.pool.blocks.release(self._table)
        self._table = None
        self._drop_tree()
        self._prefix_length = 0

    def clear(self) -> None:
        """Give the blocks back and begin anew, empty."""
        self.pool.blocks.release(self._held())
        self._table, self._hashes = [], []
        self._drop_tree()
        self._prefix_length = 0
        self._map()

    def plan(self, count: int, parents: Sequence[int] | None) -> Extension:
        """Say where `count` >= 1 new tokens would go; see `Row.parents`. Changes nothing.

        Raises ValueError for a parent that is not an earlier slot.
        """
        start = self._prefix_length + self.tree_size
        if parents is None:
            if self.tree_size:
                raise ValueError(
                    f"cannot extend the prefix while {self.tree_size} tree slots follow it"
                )
            return Extension(start, np.arange(start, start + count), None, None)
        if len(parents) != count:
            raise ValueError(f"{count} tokens have {len(parents)} parents")
        first = self.tree_size
        visible = np.zeros((count, first + count), dtype=np.bool_)
        depths = list(self._depths)
        for index, parent in enumerate(parents):
            if not -1 <= parent < first + index:
                raise ValueError(f"slot {first + index} has parent {parent}, not an earlier slot")
            if parent >= first:
                visible[index] = visible[parent - first]
            elif parent >= 0:
                visible[index, :first] = self._ancestors[parent]
            visible[index, first + index] = True
            depths.append(0 if parent < 0 else 1 + depths[parent])
        positions = self._prefix_length + np.array(depths[first:], dtype=np.int64)
        return Extension(start, positions, visible, tuple(parents))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens altogether, prefix and tree. Raises OutOfBlocks."""
        held = self._held()
        missing = -(-tokens // BLOCK_TOKENS) - len(held)
        if missing > 0:
            held.extend(self.pool.blocks.allocate(missing))
            self._map()

    def apply(self, extension: Extension) -> None:
        """Take in planned tokens whose keys and values have been written to the buffer."""
        if extension.start != self._prefix_length + self.tree_size:
            raise ValueError("the cache has changed since the extension was planned")
        if extension.parents is None or extension.visible is None:
            self._prefix_length += extension.size
            return
        held, size = self.tree_size, self.tree_size + extension.size
        ancestors = np.zeros((size, size), dtype=np.bool_)
        ancestors[:held, :held] = self._ancestors
        ancestors[held:] = extension.visible
        self._ancestors = ancestors
        self._parents.extend(extension.parents)
        self._depths.extend((extension.positions - self._prefix_length).tolist())

    def _held(self) -> list[int]:
        if self._table is None:
            raise RuntimeError("the cache has been released")
        return self._table

    def _trim(self) -> None:
        """Give back blocks behind the last token."""
        held = self._held()
        needed = -(-(self._prefix_length + self.tree_size) // BLOCK_TOKENS)
        if len(held) > needed:
            self.pool.blocks.release(held[needed:])
            del held[needed:]
            self._map()

    def _map(self) -> None:
        first = np.array(self._held(), dtype=np.int64) * BLOCK_TOKENS
        self._slots = (first[:, None] + np.arange(BLOCK_TOKENS)).reshape(-1)

    def _drop_tree(self) -> None:
        self._parents, self._depths = [], []
        self._ancestors = np.zeros((0, 0), dtype=np.bool_)

    def _check_advance(self, path: Sequence[int], keep: Sequence[int]) -> None:
        end = -1
        for slot in path:
            if not 0 <= slot < self.tree_size or self._parents[slot] != end:
                raise ValueError(f"{list(path)} is not a path from the end of the prefix")
            end = slot
        kept: set[int] = set()
        for slot in keep:
            if not 0 <= slot < self.tree_size or slot in kept:
                raise ValueError(f"slot {slot} to keep does not exist, or is named twice")
            if self._parents[slot] != end and self._parents[slot] not in kept:
                raise ValueError(f"slot {slot} cannot be kept without its parent")
            kept.add(slot)
