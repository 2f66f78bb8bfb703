"""The rule's operator against the same rule without it: the same tokens, whatever the logits.

`test_sampling` holds both against the definition; here rows are large and their ends close.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.domain import SamplingParams
from outrider.model import native, sampling
from outrider.model.drawing import draw
from outrider.model.noise import GUMBEL_MAX, GUMBEL_MIN, gumbel_numpy, words_numpy
from outrider.model.sampling import rank_candidates, sample_nodes, target_logprobs

pytestmark = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler is found: the CPU operators cannot be built"
)

params_drawn = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-40, 0.1, 0.8, 0.8, 1.0, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([0, 0, 0, 1, 50, 900, 5000, 20_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.95, 0.5, 0.25, 1e-300, 1 - 1e-6, 1 - 1e-13]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.05, 1.0]),
)
SHAPES = ["like a model's", "peaked", "flat", "nearly flat", "few levels", "ties", "masked", "bare"]
widths = st.sampled_from([1, 3, 8, 63, 64, 65, 700, 4099, 12_345])
seeds = st.integers(0, 2**64 - 1)


def drawn_logits(shape: str, rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows [rows, width], float32."""
    draw = np.random.default_rng(seed)
    normal = draw.standard_normal((rows, width))
    masked = np.where(draw.random((rows, width)) < 0.9, -np.inf, normal)
    bare = np.full_like(normal, -np.inf)
    bare[:, width // 2] = 2.0
    logits = {
        "like a model's": 3.0 * normal + 2.0 * draw.standard_exponential((rows, width)),
        "peaked": normal * 30,
        "flat": np.zeros_like(normal),
        "nearly flat": normal * 0.01,
        "few levels": np.round(normal * 2.0),
        # Weights of powers of two, so that shares are met exactly.
        "ties": math.log(2.0) * np.round(-np.abs(normal) * 4),
        "masked": masked,
        "bare": bare,
    }[shape]
    return torch.from_numpy(logits.astype(np.float32))


def without_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "can_draw", lambda _: False)


def check_equal(logits, params, some_seeds, positions, count) -> None:
    args = (logits, params, some_seeds, positions)
    found, ranked = sample_nodes(*args), rank_candidates(*args, count)
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_operator(monkeypatch)
        assert sample_nodes(*args) == found
        expected = rank_candidates(*args, count)
    assert torch.equal(ranked[0], expected[0])
    torch.testing.assert_close(ranked[1], expected[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(ranked[2], expected[2], rtol=0, atol=1e-5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(SHAPES),
    widths,
    st.lists(params_drawn, min_size=1, max_size=5),
    seeds,
    st.sampled_from([1, 3, 12]),
    st.booleans(),
)
@example("ties", 12_345, [SamplingParams(top_p=0.5), SamplingParams(top_p=0.25)], 3, 3, False)
@example("few levels", 4099, [SamplingParams(top_k=900, top_p=0.5)], 5, 3, True)
def test_the_operator_changes_nothing(shape, width, params, seed, count, narrow):
    logits = drawn_logits(shape, len(params), width, seed % 1000)
    rows = range(len(params))
    some_seeds = [(seed + row // 2) % 2**64 for row in rows]
    if narrow:
        logits = logits.bfloat16()
    check_equal(logits, params, some_seeds, [2**32 - 1 - row for row in rows], count)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(["like a model's", "nearly flat", "few levels", "ties", "masked"]),
    st.floats(0.01, 0.999),
    st.sampled_from([0.0, 1e-15, -1e-15, 1e-12, -1e-12, 1e-8, -1e-8]),
    seeds,
)
def test_a_nucleus_that_ends_at_a_token_is_the_same(shape, share, off, seed):
    """Shares that a sum of weights meets exactly, or misses by little."""
    logits = drawn_logits(shape, 1, 4099, seed % 1000)
    sums = shares(logits[0])
    top_p = float(sums[int((sums < share).sum())]) + off
    params = [SamplingParams(top_p=min(1.0, max(0.0, top_p)) or 1e-9)] * 4
    check_equal(logits.expand(4, -1), params, [seed] * 4, range(4), 12)


def shares(row: torch.Tensor) -> torch.Tensor:
    """Sums of a row's probabilities from the best on: distances are float32, as in the rule."""
    return (row - row.max()).double().softmax(0).sort(descending=True).values.cumsum(0)


def kept_by(logits, param) -> set[int]:
    drawn = draw(logits, [param], [1], [1], logits.shape[1])
    assert not drawn.undecided
    return set(drawn.tokens[drawn.scores > -math.inf].tolist())


@pytest.mark.parametrize("size", [10, 100, 1000])
@pytest.mark.parametrize("off", [-0.1, 0.1])
def test_the_operator_decides_where_a_float64_can(size, off):
    logits = drawn_logits("like a model's", 1, 8192, size)
    sums = shares(logits[0])
    last = float(sums[size - 1] - sums[size - 2])
    assert last > 1e-7, "its end is far from too close to call"
    param = SamplingParams(top_p=float(sums[size - 1]) + off * last)
    kept = target_logprobs(logits, [param])[0] > -math.inf
    assert int(kept.sum()) == size + (off > 0)
    assert kept_by(logits, param) == set(kept.nonzero().squeeze(-1).tolist())


def test_what_is_too_close_to_call_is_handed_back_and_decided(monkeypatch):
    logits = drawn_logits("like a model's", 3, 8192, 1)
    sums = shares(logits[1])
    params = [SamplingParams(), SamplingParams(top_p=float(sums[40])), SamplingParams(top_k=9)]
    args = (params, [1, 2, 3], [4, 5, 6])
    assert draw(logits, *args, 1).undecided == [1]
    check_equal(logits, *args, 5)


def test_scores_are_those_of_the_noise():
    """Every word of the vocabulary, to the bit: other scores would differ by far more."""
    width = 4099
    seeds_drawn, positions = [0, 2**64 - 1, 2**63 + 12345], [0, 2**32 - 1, 77]
    drawn = draw(torch.zeros(3, width), [SamplingParams()] * 3, seeds_drawn, positions, width)
    for row, (seed, place) in enumerate(zip(seeds_drawn, positions, strict=True)):
        expected = gumbel_numpy(seed, place, drawn.tokens[row].numpy())
        np.testing.assert_allclose(drawn.scores[row].numpy(), expected, rtol=0, atol=1e-12)
        assert sorted(drawn.tokens[row].tolist()) == list(range(width))


def test_the_lowest_of_equal_scores_wins():
    width = 40_000
    buckets = words_numpy(9, 2, np.arange(width)) >> 8
    _, first, counts = np.unique(buckets, return_index=True, return_counts=True)
    low = int(first[counts == 2][0])
    high = int(np.flatnonzero(buckets == buckets[low])[1])
    logits = torch.full((1, width), -math.inf)
    logits[0, [low, high]] = 1.0
    logits[0, (low + 1) % width] = -29.0  # so that there are three
    assert sample_nodes(logits, [SamplingParams()], [9], [2]) == [low]
    tokens, scores, _ = rank_candidates(logits, [SamplingParams()], [9], [2], 2)
    assert tokens.tolist() == [[low, high]]
    assert float(scores[0, 0]) == float(scores[0, 1])


@pytest.mark.parametrize("seed", range(40))
def test_a_token_from_far_below_wins_when_its_noise_is_enough(seed):
    width = 8192
    noise = gumbel_numpy(seed, 3, np.arange(width))
    lucky = int(noise.argmax())
    logits = np.full(width, -60.0, dtype=np.float32)
    logits[:100] = -np.arange(100) / 50.0
    leader = float((logits[:100] + noise[:100]).max())
    for margin, wins in ((1e-4, True), (-1e-4, False)):
        logits[lucky] = leader - noise[lucky] + margin
        drawn = sample_nodes(torch.from_numpy(logits)[None], [SamplingParams()], [seed], [3])
        assert (drawn == [lucky]) is wins


@pytest.mark.parametrize("extreme", [GUMBEL_MIN, GUMBEL_MAX])
def test_the_range_of_the_noise_is_not_cut(extreme):
    """The luckiest and the unluckiest token of many places, alone with one that they nearly tie."""
    width = 1 << 17
    noise = np.stack([gumbel_numpy(1, place, np.arange(width)) for place in range(4)])
    found = noise.argmax() if extreme > 0 else noise.argmin()
    place, token = (int(index) for index in np.unravel_index(found, noise.shape))
    other = (token + 64) % width
    logits = torch.full((1, width), -math.inf)
    for margin in (1e-3, -1e-3):
        logits[0, other] = 0.0
        logits[0, token] = float(noise[place, other] - noise[place, token]) + margin
        winner = token if margin > 0 else other
        assert sample_nodes(logits, [SamplingParams()], [1], [place]) == [winner]


def test_rows_that_are_no_numbers_are_repaired_alike():
    logits = drawn_logits("like a model's", 6, 4099, 2)
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2, 4098] = math.inf
    logits[3, 17] = math.nan
    logits[4, :4000] = -math.inf
    logits[4, 4098] = math.nan
    logits[5] = torch.where(logits[5] > 0, 3e38, -3e38)
    for param in (SamplingParams(), SamplingParams(0.8, top_p=0.95), SamplingParams(0.0)):
        # One: beside the largest float all others are equal, whatever their noise.
        check_equal(logits, [param] * 6, range(6), range(6), 1)


def test_one_call_serves_the_batch(monkeypatch):
    def refused(*_: object) -> None:
        raise AssertionError("this row needs no second look")

    monkeypatch.setattr(sampling, "shortlists", refused)
    params = [SamplingParams(0.8, top_p=0.95), SamplingParams(), SamplingParams(top_k=50)] * 3
    logits = drawn_logits("like a model's", 9, 12_345, 4)
    sample_nodes(logits, params, range(9), range(9))
    rank_candidates(logits, params, range(9), range(9), 4)
