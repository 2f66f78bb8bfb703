"""Does the rule sample from the target's distribution?

Draws of `sample_nodes` against exact probabilities, which are computed here from the definition of
the filters. Seeds are fixed, so these tests either always pass or always fail.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from outrider.domain import SamplingParams, session_seed
from outrider.model.sampling import sample_nodes

DRAWS = 20_480
BATCH = 512
SIGNIFICANCE = 1e-4
"""Both ways: counts closer to the expected ones than chance allows are as wrong."""

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.5, top_k=12),
    SamplingParams(temperature=0.8, top_p=0.95),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=1.2, top_k=40, top_p=0.9, min_p=0.02),
]


def target_logits(width: int, spread: float) -> NDArray[np.float32]:
    return (np.random.default_rng(7).standard_normal(width) * spread).astype(np.float32)


def exact_probabilities(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """The processed distribution [V], by sorting; these logits have no ties."""
    weights = np.exp(logits.astype(np.float64) / params.temperature)
    order = np.argsort(-weights)
    if params.top_k:
        weights[order[params.top_k :]] = 0.0
    weights /= weights.sum()
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= params.top_p]] = 0.0
    weights[weights < params.min_p * weights.max()] = 0.0
    return np.asarray(weights / weights.sum())


def drawn_counts(
    logits: NDArray[np.float32], params: SamplingParams, draws: int, vary: str
) -> NDArray[np.int64]:
    """How often each token [V] is drawn, over positions of one seed or seeds at one position."""
    rows = torch.from_numpy(logits).expand(BATCH, -1)
    counts = np.zeros(len(logits), dtype=np.int64)
    for start in range(0, draws, BATCH):
        each = range(start, start + BATCH)
        seeds = [session_seed(number, 0) if vary == "seeds" else 42 for number in each]
        positions = [number if vary == "positions" else 1000 for number in each]
        tokens = sample_nodes(rows, [params] * BATCH, seeds, positions)
        counts += np.bincount(tokens, minlength=len(logits))
    return counts


def p_value(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Chi-square; tokens that are expected less than ten times are counted together."""
    assert counts[probabilities == 0.0].sum() == 0, "a filtered token was drawn"
    expected = probabilities * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    possible = expected > 0
    return float(stats.chisquare(observed[possible], expected[possible]).pvalue)


@pytest.mark.parametrize(
    ("params", "vary"),
    [(params, "positions") for params in PARAMS] + [(PARAMS[0], "seeds"), (PARAMS[2], "seeds")],
    ids=str,
)
def test_draws_follow_the_target(params, vary):
    logits = target_logits(64, spread=1.5)
    found = p_value(drawn_counts(logits, params, DRAWS, vary), exact_probabilities(logits, params))
    assert SIGNIFICANCE < found < 1 - SIGNIFICANCE


def test_draws_from_a_large_flat_vocabulary_follow_the_target():
    logits = target_logits(1000, spread=0.7)  # too many survivors for hashing one by one
    counts = drawn_counts(logits, PARAMS[0], DRAWS // 2, "positions")
    found = p_value(counts, exact_probabilities(logits, PARAMS[0]))
    assert SIGNIFICANCE < found < 1 - SIGNIFICANCE


def test_a_slightly_wrong_temperature_is_found_out():
    logits = target_logits(64, spread=1.5)
    counts = drawn_counts(logits, SamplingParams(temperature=0.93), DRAWS, "positions")
    assert p_value(counts, exact_probabilities(logits, SamplingParams())) < SIGNIFICANCE


def test_a_slightly_wrong_nucleus_is_found_out():
    logits = target_logits(64, spread=1.5)
    narrow = replace(PARAMS[3], top_p=0.9)
    counts = drawn_counts(logits, narrow, DRAWS // 4, "positions")
    assert p_value(counts, exact_probabilities(logits, PARAMS[3])) < SIGNIFICANCE


def test_draws_of_different_positions_and_seeds_are_independent():
    logits = torch.zeros(BATCH, 4)
    for seeds, positions in (([9] * BATCH, range(BATCH)), (range(BATCH), [9] * BATCH)):
        tokens: list[int] = []
        for block in range(16):
            shifted = [position + BATCH * block for position in positions]
            tokens += sample_nodes(logits, [SamplingParams()] * BATCH, list(seeds), shifted)
        pairs = np.array(tokens[:-1]) * 4 + np.array(tokens[1:])
        found = float(stats.chisquare(np.bincount(pairs, minlength=16)).pvalue)
        assert SIGNIFICANCE < found < 1 - SIGNIFICANCE
        assert math.isclose(len(tokens), 16 * BATCH)
