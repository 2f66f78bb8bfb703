"""Is the noise uniform, and independent over positions, tokens and seeds?

Philox4x32-10 passes BigCrush (Salmon et al., SC'11); what is checked here is our use of it: the
counter layout, the choice of lane and the conversion. Everything is a function of fixed seeds, so
these tests either always pass or always fail. Generators broken on purpose must fail them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from outrider.model.noise import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    _gumbel_of_words,
    gumbel_torch,
    seed_bits,
    words_torch,
)

Words = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SIGNIFICANCE = 1e-4
"""Both ways: too even is as wrong as too uneven. About 60 p-values are looked at."""

LINES, LENGTH = 256, 1024


def p_values(words: NDArray[np.int64]) -> dict[str, float]:
    """Tests over words [LINES, LENGTH]: within and between lines."""
    uniforms = ((words >> 8) + 0.5) / 2**24
    found = {
        "bytes": stats.chisquare(np.bincount((words >> 24).ravel(), minlength=256)).pvalue,
        "kolmogorov": stats.kstest(uniforms.ravel()[::4], "uniform").pvalue,
        "means of lines": _standardised(uniforms.mean(axis=1), 0.5, 12 * LENGTH),
        "means of columns": _standardised(uniforms.mean(axis=0), 0.5, 12 * LINES),
    }
    for bit in (8, 9, 16, 30, 31):
        ones = int(((words >> bit) & 1).sum())
        found[f"bit {bit}"] = stats.binomtest(ones, words.size).pvalue
    neighbours = {
        "within": (uniforms[:, :-1], uniforms[:, 1:]),
        "within, 4 apart": (uniforms[:, :-4], uniforms[:, 4:]),
        "between": (uniforms[:-1], uniforms[1:]),
        "diagonal": (uniforms[:-1, 1:], uniforms[1:, :-1]),
    }
    for name, (left, right) in neighbours.items():
        found[f"correlation {name}"] = _uncorrelated(left, right)
        cells = (left * 32).astype(int) * 32 + (right * 32).astype(int)
        found[f"pairs {name}"] = stats.chisquare(np.bincount(cells.ravel(), minlength=1024)).pvalue
    return found


def _standardised(means: NDArray[np.float64], centre: float, precision: float) -> float:
    """Chi-square of means that should be normal around `centre` with variance 1 / `precision`."""
    statistic = float(((means - centre) ** 2).sum() * precision)
    return float(stats.chi2.sf(statistic, len(means)))


def _uncorrelated(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Two-sided p-value of the correlation of uniforms, whose mean and variance are known."""
    standardised = 12 * ((left - 0.5) * (right - 0.5)).sum() / math.sqrt(left.size)
    return float(2 * stats.norm.sf(abs(standardised)))


def grid(axis: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds, positions and tokens that broadcast to [LINES, LENGTH], lines along `axis`."""
    lines, along = torch.arange(LINES)[:, None], torch.arange(LENGTH)
    seed = torch.tensor(seed_bits(0x9E3779B97F4A7C15))
    fixed = torch.tensor(17)
    return {
        "positions and tokens": (seed, lines + 1000, along),
        "positions of one token": (seed, lines * LENGTH + along, fixed),
        "tokens of one position": (seed, fixed, lines * LENGTH + along),
        "tokens of one lane": (seed, fixed, 4 * (lines * LENGTH + along)),
        "small seeds and tokens": (lines, fixed, along),
        "high bits of seeds and tokens": (lines << 32, fixed, along),
        "seeds and positions": (lines, along, fixed),
    }[axis]


AXES = [
    "positions and tokens",
    "positions of one token",
    "tokens of one position",
    "tokens of one lane",
    "small seeds and tokens",
    "high bits of seeds and tokens",
    "seeds and positions",
]


def failures(words: Words, axis: str) -> dict[str, float]:
    """The tests that reject `words` on the grid of `axis`, with their p-values."""
    lines = words(*grid(axis)).numpy().astype(np.int64)
    found = p_values(np.broadcast_to(lines, (LINES, LENGTH)))
    # Those from discrete counts cannot be too good: many outcomes have a p-value of nearly 1.
    return {
        name: value
        for name, value in found.items()
        if value < SIGNIFICANCE or (value > 1 - SIGNIFICANCE and not name.startswith("bit"))
    }


@pytest.mark.parametrize("axis", AXES)
def test_words_are_uniform_and_independent(axis):
    assert failures(words_torch, axis) == {}


def without_position(seeds, positions, tokens):
    shape = torch.broadcast_shapes(seeds.shape, positions.shape, tokens.shape)
    return words_torch(seeds, torch.zeros_like(positions), tokens).expand(shape)


def position_added_to_token(seeds, positions, tokens):
    return words_torch(seeds, torch.zeros_like(positions), tokens + positions)


def half_of_seed(seeds, positions, tokens):
    return words_torch(seeds & 0xFFFFFFFF, positions, tokens)


def without_lane(seeds, positions, tokens):
    return words_torch(seeds, positions, tokens & ~3)


def weak_hash(seeds, positions, tokens):
    return ((seeds + 31 * positions + 1009 * tokens) * 0x9E3779B9) & 0xFFFFFFFF


def biased(seeds, positions, tokens):
    return (words_torch(seeds, positions, tokens) * 127) // 128


@pytest.mark.parametrize(
    ("broken", "axis"),
    [
        (without_position, "positions and tokens"),
        (without_position, "positions of one token"),
        (position_added_to_token, "positions and tokens"),
        (half_of_seed, "high bits of seeds and tokens"),
        (without_lane, "tokens of one position"),
        (weak_hash, "positions and tokens"),
        (weak_hash, "small seeds and tokens"),
        (biased, "tokens of one lane"),
    ],
)
def test_broken_generators_are_found_out(broken, axis):
    assert failures(broken, axis)


def gumbel_p_value(values: NDArray[np.float64]) -> float:
    """Kolmogorov-Smirnov against the standard Gumbel law; 0 if a value is not finite."""
    if not np.isfinite(values).all():
        return 0.0
    assert values.min() >= GUMBEL_MIN - 1e-9
    assert values.max() <= GUMBEL_MAX + 1e-9
    return float(stats.kstest(values, "gumbel_r").pvalue)


def hard_words() -> torch.Tensor:
    """Words of 2^18 draws, and the two at the ends, which 2^18 draws need not contain."""
    drawn = words_torch(torch.tensor(5), torch.arange(256)[:, None], torch.arange(1024))
    return torch.cat([drawn.ravel(), torch.tensor([0, 2**32 - 1])])


def test_values_follow_the_gumbel_law():
    values = gumbel_torch(torch.tensor(5), torch.arange(256)[:, None], torch.arange(1024))
    assert gumbel_p_value(values.ravel().numpy()) > SIGNIFICANCE


def test_conversion_is_finite_at_the_ends_and_float32_uniforms_are_not():
    assert gumbel_p_value(_gumbel_of_words(hard_words()).numpy()) > SIGNIFICANCE
    naive = hard_words().float() / 2**32
    assert gumbel_p_value(-torch.log(-torch.log(naive)).double().numpy()) == 0.0


def test_wrong_law_is_found_out():
    values = gumbel_torch(torch.tensor(5), torch.arange(256)[:, None], torch.arange(1024))
    assert gumbel_p_value(values.ravel().numpy() * 0.98) < SIGNIFICANCE


def test_argmax_of_noise_is_every_token_equally_often():
    values = gumbel_torch(torch.tensor(11), torch.arange(40_000)[:, None], torch.arange(16))
    counts = np.bincount(values.argmax(dim=-1).numpy(), minlength=16)
    p_value = stats.chisquare(counts).pvalue
    assert SIGNIFICANCE < p_value < 1 - SIGNIFICANCE
    assert math.isclose(counts.sum(), 40_000)
