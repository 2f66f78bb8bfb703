"""What a CPU leaves out must not matter: large rows, where shortlists are short, and close calls.

The rule's other tests (`test_sampling`) have rows that are mostly looked at as a whole.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from outrider.domain import SamplingParams
from outrider.model import heads, sampling, shortlist
from outrider.model.noise import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    gumbel_numpy,
    gumbel_of_words_numpy,
    least_word,
    words_dense_numpy,
)
from outrider.model.sampling import rank_candidates, sample_nodes, target_logprobs
from outrider.model.shortlist import shortlists

# With and without a remainder when folded, with and without a whole last block of the noise.
WIDTHS = [8192, 5003, 6001]
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=4.0),
    SamplingParams(temperature=0.8, top_p=0.95),
    SamplingParams(temperature=3.0, top_p=0.9),
    SamplingParams(top_p=0.9999),
    SamplingParams(temperature=0.2, top_p=1 - 1e-6),
    SamplingParams(temperature=0.1, top_p=1 - 1e-9),
    SamplingParams(top_k=50),
    SamplingParams(top_k=3000),
    SamplingParams(top_k=700, top_p=0.5, min_p=0.001),
    SamplingParams(min_p=0.01),
]
SHAPES = ["like a model's", "normal", "flat", "few levels", "one far ahead", "mostly masked"]


@pytest.fixture(autouse=True)
def no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to our operator otherwise (`test_drawing`)."""
    monkeypatch.setattr(sampling, "can_draw", lambda _: False)


def drawn_logits(shape: str, rows: int, width: int) -> torch.Tensor:
    draw = np.random.default_rng(width)
    normal = draw.standard_normal((rows, width))
    masked = np.where(draw.random((rows, width)) < 0.99, -np.inf, normal)
    masked[:, 17] = 0.0
    ahead = normal.copy()
    ahead[:, -1] += 30.0
    logits = {
        # Most tokens far below, thinning out towards a few good ones.
        "like a model's": 3.0 * normal + 2.0 * draw.standard_exponential((rows, width)),
        "normal": normal,
        "flat": np.zeros_like(normal),
        "few levels": np.round(normal * 2.0),
        "one far ahead": ahead,
        "mostly masked": masked,
    }[shape]
    return torch.from_numpy(logits.astype(np.float32))


def plain_order(logits, params, seeds, positions) -> list[list[int]]:
    """Ids by the definition, the best score first, equal scores by id; none that is filtered."""
    tokens = np.arange(logits.shape[1])
    orders = []
    for row, (seed, place) in enumerate(zip(seeds, positions, strict=True)):
        logprobs = target_logprobs(logits[row : row + 1], [params[row]])[0].numpy()
        scores = logprobs + gumbel_numpy(seed, place, tokens)
        order = np.lexsort((tokens, -scores))
        orders.append([int(token) for token in order[:20] if scores[token] > -math.inf])
    return orders


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_and_ranks_are_those_of_the_definition(shape, width):
    repeats = 3
    params = PARAMS * repeats
    logits = drawn_logits(shape, len(params), width)
    # The last repeat's rows are siblings: they share a place, and so their noise.
    seeds = [2**63 + row for row in range(2 * len(PARAMS))] + [5] * len(PARAMS)
    positions = [*range(2 * len(PARAMS)), *[9] * len(PARAMS)]
    orders = plain_order(logits, params, seeds, positions)
    assert sample_nodes(logits, params, seeds, positions) == [order[0] for order in orders]
    tokens, scores, _ = rank_candidates(logits, params, seeds, positions, 12)
    for row, order in enumerate(orders):
        real = scores[row] > torch.finfo(torch.float64).min
        assert tokens[row, real].tolist() == order[:12]


@pytest.mark.parametrize("seed", range(40))
def test_a_token_from_far_below_wins_when_its_noise_is_enough(seed):
    width = 8192
    noise = gumbel_numpy(seed, 3, np.arange(width))
    lucky = int(noise.argmax())
    logits = np.full(width, -60.0, dtype=np.float32)
    logits[:100] = -np.arange(100) / 50.0
    leader = float((logits[:100] + noise[:100]).max())
    for margin, wins in ((1e-3, True), (-1e-3, False)):
        logits[lucky] = leader - noise[lucky] + margin
        won = sample_nodes(torch.from_numpy(logits)[None], [SamplingParams()], [seed], [3]) == [
            lucky
        ]
        assert won is wins


@pytest.mark.parametrize("size", [10, 300, 3000])
@pytest.mark.parametrize("off", [-1e-9, 1e-9])
def test_the_nucleus_ends_where_float64_says(size, off):
    """A share that float32 cannot tell from the mass before a token."""
    logits = torch.from_numpy(np.random.default_rng(size).standard_normal((1, 8192))).float() * 2
    ordered = logits[0].double().sort(descending=True)
    masses = ordered.values.softmax(0).cumsum(0)
    param = SamplingParams(top_p=float(masses[size - 1]) + off)
    # Tokens 0 to size - 1 weigh that much: a little more asked for takes one token more.
    last = int(ordered.indices[size if off > 0 else size - 1])
    kept = target_logprobs(logits, [param])[0] > -math.inf
    assert int(kept.sum()) == size + (off > 0)
    assert bool(kept[last])
    lists = shortlists(logits, [param], [(1, 1)], int(kept.sum()), words_dense_numpy)
    assert set(lists[0].ids.tolist()) == set(kept.nonzero().squeeze(-1).tolist())


@pytest.mark.parametrize("dropped", [1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("spread", [2.0, 8.0, 30.0])
def test_a_nucleus_may_be_nearly_everything(dropped, spread):
    logits = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 8192))).float() * spread
    param = SamplingParams(top_p=1.0 - dropped)
    kept = target_logprobs(logits, [param])[0] > -math.inf
    lists = shortlists(logits, [param], [(1, 1)], int(kept.sum()), words_dense_numpy)
    assert set(lists[0].ids.tolist()) == set(kept.nonzero().squeeze(-1).tolist())


def test_close_calls_alone_are_summed_in_float64(monkeypatch):
    summed = []

    def counted(scaled):
        summed.append(len(scaled))
        return float(np.exp(scaled.astype(np.float64)).sum())

    monkeypatch.setattr(heads, "_mass", counted)
    logits = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 8192))).float() * 4
    sample_nodes(logits, [SamplingParams(top_p=0.7)], [1], [1])
    assert summed == []
    share = float(logits[0].double().sort(descending=True).values.softmax(0).cumsum(0)[4])
    sample_nodes(logits, [SamplingParams(top_p=share)], [1], [1])
    assert summed == [8192]


def test_few_tokens_of_a_row_like_a_models_are_left(monkeypatch):
    hashed = []
    words_blocks = shortlist.words_blocks_numpy

    def counted(bits, position, blocks):
        hashed.append(len(blocks))
        return words_blocks(bits, position, blocks)

    monkeypatch.setattr(shortlist, "words_blocks_numpy", counted)
    logits = drawn_logits("like a model's", 8, 8192)
    places = [(1, place) for place in range(8)]
    lists = shortlists(logits, [SamplingParams()] * 8, places, 1, words_dense_numpy)
    assert [len(tokens.ids) for tokens in lists] == [1] * 8
    assert len(hashed) == 8
    assert sum(hashed) < 8 * 2048 * 0.75
    shortlists(logits, [SamplingParams(top_k=20)] * 8, places, 1, words_dense_numpy)
    assert len(hashed) == 8


@pytest.mark.parametrize("gumbel", [-math.inf, -1e3, GUMBEL_MIN, -1.0, 0.0, 5.0, 12.0, GUMBEL_MAX])
def test_words_below_the_least_have_less_noise(gumbel):
    word = least_word(gumbel)
    assert 0 <= word < 2**32
    below = np.array([word - 256], np.uint64) if word else np.array([], np.uint64)
    assert bool((gumbel_of_words_numpy(below) < gumbel).all())
    if gumbel > GUMBEL_MIN:  # and it is not far too low
        assert gumbel_of_words_numpy(
            np.array([word + 3 * 256], np.uint64) & np.uint64(2**32 - 1)
        ) >= (gumbel if word + 3 * 256 < 2**32 else GUMBEL_MIN)
