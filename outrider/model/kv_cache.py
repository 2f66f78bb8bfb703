"""Keys and values of one session: a committed prefix and, behind it, a tree of guesses.

One tensor holds all layers of a session, so that growing and compacting are single operations:

    [layers, 2, kv_heads, capacity, head_dim]        index 1: 0 is keys, 1 is values
                          |<- prefix ->|<- tree ->|  unused

A tree slot s lies at token index `prefix_length + s`, wherever it hangs in the tree: where a node
*stands* (its position, for rotary embeddings) is prefix_length + depth, which stays the same
when the prefix grows along its path. So compaction moves keys and values but never recomputes.

A cache belongs to whoever created it and is not safe for use by two threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

KV_LAYOUT = "session-layer-kv-head-token-1"
"""Name of the layout above: part of the model fingerprint, since KV of another cannot be used."""

_CAPACITY_MIN = 64
"""Tokens a buffer has room for at least: small enough for many short sessions."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Sizes of a model's keys and values. With no layers a cache keeps positions only."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Extension:
    """New tokens of a cache, planned but not yet part of it."""

    start: int
    """Token index in the buffer of the first new token."""
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

    Slots are numbered from 0 in the order in which they were computed; each has a parent slot, or
    -1 if its parent is the last token of the prefix. Wrong arguments raise ValueError and leave
    the cache as it was; after `release` everything but `release` raises RuntimeError.
    """

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self._prefix_length = 0
        self._parents: list[int] = []
        self._depths: list[int] = []
        # Row s: which slots are ancestors of slot s or s itself.
        self._ancestors = np.zeros((0, 0), dtype=np.bool_)
        self._buffer: torch.Tensor | None = self._allocate(0)

    def __repr__(self) -> str:
        return f"SessionCache(prefix_length={self.prefix_length}, tree_size={self.tree_size})"

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
    def bytes(self) -> int:
        """Bytes allocated for keys and values, unused capacity included; 0 once released."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self.buffer.shape[3]

    @property
    def buffer(self) -> torch.Tensor:
        """[layers, 2, kv_heads, capacity, head_dim]; replaced whenever the cache grows."""
        if self._buffer is None:
            raise RuntimeError("the cache has been released")
        return self._buffer

    def advance(self, path: Sequence[int], keep: Sequence[int] = ()) -> dict[int, int]:
        """Make `path` part of the prefix and drop every other slot that is not in `keep`.

        `path` lists slots downwards from the end of the prefix. `keep` lists descendants of the
        end of `path`, each parent before its children. Returns the new slot of each kept one,
        which follows the order of `keep`. What already lies in its place is not moved.
        Raises ValueError if `path` is no such path or a parent of `keep` is missing.
        """
        self._check_advance(path, keep)
        sources = self._prefix_length + np.array([*path, *keep], dtype=np.int64)
        targets = self._prefix_length + np.arange(len(sources), dtype=np.int64)
        self._move(sources, targets)

        remap = {old: new for new, old in enumerate(keep)}
        self._parents = [remap.get(self._parents[slot], -1) for slot in keep]
        self._depths = [self._depths[slot] - len(path) for slot in keep]
        kept = np.array(keep, dtype=np.int64)
        self._ancestors = self._ancestors[np.ix_(kept, kept)]
        self._prefix_length += len(path)
        return remap

    def truncate(self, length: int) -> None:
        """Drop the tree and all of the prefix after its first `length` tokens."""
        _ = self.buffer
        if not 0 <= length <= self._prefix_length:
            raise ValueError(f"cannot truncate a prefix of {self._prefix_length} to {length}")
        self._drop_tree()
        self._prefix_length = length

    def release(self) -> None:
        """Free the memory; the cache cannot be used afterwards. May be called again."""
        self._buffer = None
        self._drop_tree()
        self._prefix_length = 0

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
        """Make room for `tokens` tokens altogether, prefix and tree; keeps what is held."""
        buffer = self.buffer
        if tokens <= buffer.shape[3]:
            return
        grown = self._allocate(max(tokens, 2 * buffer.shape[3], _CAPACITY_MIN))
        held = self._prefix_length + self.tree_size
        grown[:, :, :, :held] = buffer[:, :, :, :held]
        self._buffer = grown

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

    def _allocate(self, capacity: int) -> torch.Tensor:
        layout = self.layout
        shape = (layout.layers, 2, layout.kv_heads, capacity, layout.head_dim)
        return torch.empty(shape, dtype=layout.dtype, device=layout.device)

    def _drop_tree(self) -> None:
        self._parents, self._depths = [], []
        self._ancestors = np.zeros((0, 0), dtype=np.bool_)

    def _move(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        """Copy tokens within the buffer; sources and targets may overlap."""
        buffer = self.buffer
        moved = sources != targets
        if not moved.any():
            return
        device = self.layout.device
        source = torch.from_numpy(sources[moved]).to(device)
        target = torch.from_numpy(targets[moved]).to(device)
        # A buffer that a forward pass has grown may only be written in inference mode.
        with torch.inference_mode():
            # Gathered before anything is written, so an overlap cannot corrupt a source.
            buffer.index_copy_(3, target, buffer.index_select(3, source))

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
