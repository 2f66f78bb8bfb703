"""One ragged batch as plain arrays: all that a forward pass needs, and nothing else.

Everything here is data, so that the other processes of a tensor-parallel verifier can run the same
pass without knowing sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.kv_blocks import BLOCK_TOKENS
from outrider.model.kv_cache import Extension, SessionCache

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """N tokens of R rows, end to end. Keys of a row are numbered by token index, from 0."""

    tokens: Ints
    """[N] ids."""
    positions: Ints
    """[N] positions in their texts."""
    begins: Ints
    """[R + 1] where each row's tokens begin; the last entry is N."""
    lengths: Ints
    """[R] keys of each row, those of its new tokens included."""
    tables: Ints
    """[R, blocks] pool block of each block of a row, padded with 0."""
    limits: Ints
    """[N] keys below this are visible, but for a sliding window."""
    tails: tuple[npt.NDArray[np.bool_] | None, ...]
    """Per row [n, keys from its limit on] what each token sees there, or None for nothing."""
    tail_positions: tuple[Ints | None, ...]
    """Per row the positions of those keys."""
    wanted: Ints
    """[M] indices of tokens whose logits are wanted."""

    @property
    def token_rows(self) -> Ints:
        """[N] row of each token."""
        return np.repeat(np.arange(len(self.lengths)), np.diff(self.begins))

    @property
    def write_slots(self) -> Ints:
        """[N] slot in the pool of each token."""
        sizes = np.diff(self.begins)
        index = np.arange(len(self.tokens)) - self.begins[:-1].repeat(sizes)
        index += (self.lengths - sizes).repeat(sizes)
        return self._slots(self.token_rows, index)

    def _slots(self, rows: Ints, index: Ints) -> Ints:
        blocks, within = np.divmod(index, BLOCK_TOKENS)
        slots: Ints = self.tables[rows, blocks] * BLOCK_TOKENS + within
        return slots

    def lows(self, window: int | None) -> Ints:
        """[N] first visible key below each token's limit."""
        if window is None:
            return np.zeros_like(self.limits)
        # Below the limit a key's index is its position.
        return np.clip(self.positions - window + 1, 0, self.limits)

    def tail(self, row: int, window: int | None) -> npt.NDArray[np.bool_] | None:
        """[n, keys from the row's limit on] what each token sees there."""
        visible, positions = self.tails[row], self.tail_positions[row]
        if visible is None or positions is None or window is None:
            return visible
        own = self.positions[self.begins[row] : self.begins[row + 1]]
        return visible & (own[:, None] - positions[None, :] < window)

    def visibility(self, window: int | None) -> tuple[Ints, Ints, npt.NDArray[np.uint8]]:
        """Return (lows [N], where each token's tail begins [N] or -1, all tails end to end)."""
        starts = np.full(len(self.tokens), -1, dtype=np.int64)
        flat: list[npt.NDArray[np.bool_]] = []
        size = 0
        for row in range(len(self.lengths)):
            tail = self.tail(row, window)
            if tail is None:
                continue
            begin, end = self.begins[row], self.begins[row + 1]
            starts[begin:end] = size + np.arange(end - begin) * tail.shape[1]
            flat.append(tail.ravel())
            size += tail.size
        visible = np.concatenate(flat) if flat else np.zeros(1, dtype=np.bool_)
        return self.lows(window), starts, visible.view(np.uint8)

    # --- rows padded to one rectangle ---

    def padded_tokens(self, rows: Sequence[int]) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return ([rows, n] token indices, which are real); padding repeats a row's first."""
        begins, ends = self.begins[:-1][list(rows)], self.begins[1:][list(rows)]
        index = begins[:, None] + np.arange((ends - begins).max())
        real = index < ends[:, None]
        return np.where(real, index, begins[:, None]), real

    def padded_slots(self, rows: Sequence[int]) -> Ints:
        """[rows, longest length] slots of the keys; padding repeats a row's first."""
        lengths = self.lengths[list(rows)]
        index = np.arange(lengths.max())[None, :] + np.zeros((len(rows), 1), dtype=np.int64)
        index = np.where(index < lengths[:, None], index, 0)
        return self._slots(np.array(rows)[:, None], index)

    def padded_mask(self, rows: Sequence[int], window: int | None) -> npt.NDArray[np.bool_]:
        """[rows, n, longest length] what each token sees; padding sees what a row's first does."""
        tokens, _ = self.padded_tokens(rows)
        keys = np.arange(self.lengths[list(rows)].max())
        mask = (keys < self.limits[tokens][:, :, None]) & (
            keys >= self.lows(window)[tokens][:, :, None]
        )
        for place, row in enumerate(rows):
            tail = self.tail(row, window)
            if tail is not None:
                limit = int(self.limits[self.begins[row]])
                own = tokens[place] - self.begins[row]
                mask[place, :, limit : limit + tail.shape[1]] = tail[own]
        return mask


def step_inputs(
    tokens: Sequence[Sequence[int]],
    caches: Sequence[SessionCache],
    extensions: Sequence[Extension],
    wanted: Sequence[Sequence[int]],
) -> StepInputs:
    """Lay rows end to end. Room for the extensions must have been reserved in the caches."""
    begins = np.cumsum([0, *(extension.size for extension in extensions)], dtype=np.int64)
    lengths = np.array([plan.start + plan.size for plan in extensions], dtype=np.int64)
    tables = np.zeros((len(caches), -(-int(lengths.max()) // BLOCK_TOKENS)), dtype=np.int64)
    limits: list[Ints] = []
    tails: list[npt.NDArray[np.bool_] | None] = []
    tail_positions: list[Ints | None] = []
    for row, (cache, plan) in enumerate(zip(caches, extensions, strict=True)):
        blocks = cache.blocks[: tables.shape[1]]
        tables[row, : len(blocks)] = blocks
        if plan.visible is None:
            limits.append(plan.start + 1 + np.arange(plan.size))
            tails.append(None)
            tail_positions.append(None)
        else:
            limits.append(np.full(plan.size, cache.prefix_length))
            tails.append(plan.visible)
            tail_positions.append(np.concatenate([cache.tree_positions, plan.positions]))
    return StepInputs(
        tokens=np.fromiter((token for row in tokens for token in row), dtype=np.int64),
        positions=np.concatenate([plan.positions for plan in extensions]),
        begins=begins,
        lengths=lengths,
        tables=tables,
        limits=np.concatenate(limits),
        tails=tuple(tails),
        tail_positions=tuple(tail_positions),
        wanted=np.array(
            [begin + at for begin, row in zip(begins[:-1], wanted, strict=True) for at in row],
            dtype=np.int64,
        ),
    )
