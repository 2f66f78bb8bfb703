"""Gumbel noise G(seed, position, token) from a counter: the shared randomness of the one rule.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC'11) hashes a counter under a key. Nothing is carried from draw to draw, so every drafter and
every verifier computes the noise of any tree node by itself, in any order, and agrees:

    key     = (low half, high half) of the session seed
    counter = (token >> 2, position, DOMAIN, 0)
    word    = output lane (token & 3), 32 bits
    u       = ((word >> 8) + 1/2) / 2^24, strictly between 0 and 1
    G       = -log(-log(u)), float64

The words are integers and agree bit for bit between numpy, torch on CPU and torch on CUDA; the
logarithms may differ in the last place of a float64, so G agrees within 1e-6 and far better.

Shapes: arguments broadcast against each other, results have the broadcast shape. Seeds are uint64;
torch has no usable uint64, so there they travel as int64 of the same bits (`seed_bits`). Positions
lie in [0, 2^32) and tokens in [0, 2^34): outside that range counters would be shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DOMAIN = 0x4F555452
"""Third counter word ("OUTR"): other values are free for noise of other purposes."""

UNIFORM_BITS = 24
"""Bits of a word that make the uniform; u = (k + 1/2) * 2^-24 is exact in float64, not in float32,
where the largest k would give u = 1 and infinite noise."""

LANES = 4
"""Words, that is tokens, per counter."""

_ROUNDS = 10
_MASK = 0xFFFFFFFF
_ROUNDS_NARROW = 2
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIER = np.array(_MULTIPLIERS, dtype=np.uint64)
_INCREMENT = np.array(_WEYL, dtype=np.uint64)
_INCREMENTS = np.arange(_ROUNDS - _ROUNDS_NARROW, dtype=np.uint64)[:, None] * _INCREMENT
_SHIFT = 32 - UNIFORM_BITS
_STEP = 2.0**-UNIFORM_BITS
_HALF = np.uint64(32)
_LOW = np.uint64(_MASK)

GUMBEL_MAX = -math.log(-math.log1p(-0.5 * _STEP))
"""Largest value that G takes (k = 2^24 - 1): about 17.33."""

GUMBEL_MIN = -math.log(-math.log(0.5 * _STEP))
"""Smallest value that G takes (k = 0): about -2.85."""


def seed_bits(seed: int) -> int:
    """Return the int64 with the bits of `seed` (uint64). Raises `ValueError` out of range."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"a seed must fit 64 bits, got {seed}")
    return seed - (1 << 64) if seed >> 63 else seed


def on_cpu(tensor: Tensor) -> bool:
    """Return whether numpy can share the memory; there it hashes in a third of torch's time."""
    return tensor.device.type == "cpu"


# --- words: numpy -----------------------------------------------------------------------------


def philox_numpy(
    counter: Sequence[NDArray[np.uint64]], key: Sequence[NDArray[np.uint64]]
) -> list[NDArray[np.uint64]]:
    """Hash four counter words under two key words: uint64 below 2^32, broadcast together."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    # A word that is the same for all stays a single one for as long as it can.
    for _ in range(_ROUNDS_NARROW):
        product0 = c0 * _MULTIPLIER[0]
        product1 = c2 * _MULTIPLIER[1]
        c0 = (product1 >> _HALF) ^ (c1 ^ key0)
        c2 = (product0 >> _HALF) ^ (c3 ^ key1)
        c1 = product1 & _LOW
        c3 = product0 & _LOW
        key0 = (key0 + _INCREMENT[0]) & _LOW
        key1 = (key1 + _INCREMENT[1]) & _LOW
    # Then in place, and both halves at once: allocations and calls take as long as the hashing.
    even, odd, keys = _paired(c0, c2), _paired(c1, c3), _paired(key0, key1)
    keys = keys.reshape(2, *(1,) * (even.ndim - keys.ndim), *keys.shape[1:])
    column = (2, *(1,) * (even.ndim - 1))
    multiplier = _MULTIPLIER.reshape(column)
    increments = _INCREMENTS.reshape(-1, *column)
    products = np.empty_like(even)
    for key in (keys + increments) & _LOW:
        np.multiply(even, multiplier, out=products)
        np.right_shift(products[::-1], _HALF, out=even)
        even ^= odd  # only the lower half of `odd` counts
        even ^= key
        even &= _LOW
        odd, products = products[::-1], odd
    odd &= _LOW
    return [even[0], odd[0], even[1], odd[1]]


def _paired(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a fresh array [2, ...] of both, broadcast against each other."""
    pair = np.empty((2, *np.broadcast_shapes(first.shape, second.shape)), dtype=np.uint64)
    pair[0], pair[1] = first, second
    return pair


def words_numpy(seed: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Noise words of `tokens` (any shape) at one position of one session (seed: uint64)."""
    words = _words_numpy(np.array([seed_bits(seed)]), np.array([position]), tokens)
    return words.astype(np.uint32)


def words_dense_numpy(bits: int, position: int, vocabulary_size: int) -> NDArray[np.uint32]:
    """Noise words [V] of the whole vocabulary; `bits` is the seed as int64 (`seed_bits`).

    A quarter of the work of `words_numpy`: one counter serves four tokens.
    """
    blocks = np.arange((vocabulary_size + LANES - 1) // LANES)
    words = np.empty((len(blocks), LANES), dtype=np.uint32)
    for lane, values in enumerate(_lanes_numpy(np.array([bits]), np.array([position]), blocks)):
        words[:, lane] = values
    return words.reshape(-1)[:vocabulary_size]


def words_blocks_numpy(
    bits: int, position: int, blocks: NDArray[np.int64]
) -> list[NDArray[np.uint64]]:
    """Noise words of the tokens in `blocks` [B]: for each of the `LANES`, [B] words below 2^32.

    Block b holds the tokens 4 b to 4 b + 3; `bits` is the seed as int64 (`seed_bits`).
    """
    return _lanes_numpy(np.array([bits]), np.array([position]), blocks)


def gumbel_numpy(seed: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gumbel noise of `tokens` (any shape) at one position of one session (seed: uint64)."""
    return gumbel_of_words_numpy(words_numpy(seed, position, tokens))


def gumbel_each_numpy(
    bits: NDArray[np.int64], positions: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Gumbel noise [M] of tokens [M], each in a session (seed as int64) and at a position [M]."""
    return gumbel_of_words_numpy(_words_numpy(bits, positions, tokens))


def gumbel_of_words_numpy(words: NDArray[Any]) -> NDArray[np.float64]:
    """Turn words below 2^32, any unsigned type and shape, into Gumbel values."""
    uniforms = ((words >> words.dtype.type(_SHIFT)).astype(np.float64) + 0.5) * _STEP
    return np.asarray(-np.log(-np.log(uniforms)), dtype=np.float64)


def least_word(gumbel: float) -> int:
    """Return a word, in [0, 2^32), below which the noise is less than `gumbel`."""
    misses = -math.expm1(-math.exp(min(-gumbel, -GUMBEL_MIN)))  # 1 - u
    # One bucket of slack is far more than the logarithms can be wrong by.
    bucket = math.floor((1.0 - misses) * 2.0**UNIFORM_BITS - 0.5) - 1
    return max(0, bucket) << _SHIFT


def _words_numpy(
    bits: NDArray[np.int64], positions: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Return the word of each (seed as int64, position, token), of the broadcast shape."""
    lanes = np.stack(_lanes_numpy(bits, positions, tokens >> 2))
    choice = np.broadcast_to(tokens & 3, lanes.shape[1:]).reshape(-1)
    words = lanes.reshape(LANES, -1)[choice, np.arange(len(choice))]
    return np.asarray(words.reshape(lanes.shape[1:]))


def _lanes_numpy(
    seeds: NDArray[np.int64], positions: NDArray[np.int64], blocks: NDArray[np.int64]
) -> list[NDArray[np.uint64]]:
    """Return the four output words of each counter, of the broadcast shape."""
    bits = seeds.view(np.uint64)
    domain, zero = np.array([DOMAIN], np.uint64), np.array([0], np.uint64)
    counter = (blocks.view(np.uint64), positions.view(np.uint64), domain, zero)
    return philox_numpy(counter, (bits & _LOW, bits >> _HALF))


# --- words: torch -----------------------------------------------------------------------------


def philox_torch(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Hash four counter words under two key words: int64 below 2^32, broadcast together.

    Products wrap modulo 2^64, which keeps all the bits of 32 x 32, and `>>` drags the sign along:
    so everything above 32 bits is rubbish until masked. Only what is multiplied next needs the
    mask; the low halves c1 and c3 are merely xored and stay unmasked to the end.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor(c1 ^ key0).bitwise_and_(_MASK)
        c2 = (product0 >> 32).bitwise_xor(c3 ^ key1).bitwise_and_(_MASK)
        c1, c3 = product1, product0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return [c0, c1 & _MASK, c2, c3 & _MASK]


def words_torch(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Noise words in [0, 2^32) as int64, one per (seed, position, token), all int64."""
    if on_cpu(seeds):
        found = _words_numpy(_array(seeds), _array(positions), _array(tokens))
        return torch.from_numpy(found.view(np.int64))
    words = torch.stack(_lanes_torch(seeds, positions, tokens >> 2), dim=-1)
    choice = (tokens & 3).expand(words.shape[:-1])
    return words.gather(-1, choice.unsqueeze(-1)).squeeze(-1)


def words_dense_torch(seeds: Tensor, positions: Tensor, vocabulary_size: int) -> Tensor:
    """Noise words [N, V] int64 of the whole vocabulary for N (seed, position) pairs, both [N].

    Equal to `words_torch` bit for bit at a quarter of its work: one counter serves four tokens.
    """
    if on_cpu(seeds):
        words = torch.empty((len(seeds), vocabulary_size), dtype=torch.int64)
        # Row by row, since the intermediate values of one row just fit the cache.
        for row, (bits, position) in enumerate(
            zip(seeds.tolist(), positions.tolist(), strict=True)
        ):
            words.numpy()[row] = words_dense_numpy(bits, position, vocabulary_size)
        return words
    blocks = torch.arange((vocabulary_size + LANES - 1) // LANES, device=seeds.device)
    lanes = _lanes_torch(seeds[:, None], positions[:, None], blocks)
    return torch.stack(lanes, dim=-1).flatten(1)[:, :vocabulary_size]


def gumbel_torch(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise, float64, one per (seed, position, token), all int64."""
    return _gumbel_of_words(words_torch(seeds, positions, tokens))


def gumbel_dense_torch(seeds: Tensor, positions: Tensor, vocabulary_size: int) -> Tensor:
    """Gumbel noise [N, V] float64 of the whole vocabulary for N (seed, position) pairs."""
    return _gumbel_of_words(words_dense_torch(seeds, positions, vocabulary_size))


def _lanes_torch(seeds: Tensor, positions: Tensor, blocks: Tensor) -> list[Tensor]:
    """Return the four output words of each counter, int64, of the broadcast shape."""
    domain, zero = (torch.full_like(seeds, word) for word in (DOMAIN, 0))
    key = (seeds & _MASK, (seeds >> 32) & _MASK)
    return philox_torch((blocks, positions, domain, zero), key)


def _array(tensor: Tensor) -> NDArray[np.int64]:
    """Return a CPU tensor as an array over the same memory; at least 1-d, so numpy wraps."""
    return np.atleast_1d(tensor.numpy())


def _gumbel_of_words(words: Tensor) -> Tensor:
    """Turn words (int64 in [0, 2^32), any shape) into Gumbel values, float64."""
    uniforms = (words >> _SHIFT).to(torch.float64).add_(0.5).mul_(_STEP)
    return uniforms.log_().neg_().log_().neg_()
