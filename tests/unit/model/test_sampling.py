"""The rule's fast path against its plain definition, and its behaviour at the edges."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.domain import SamplingParams
from outrider.model import noise, sampling
from outrider.model.noise import GUMBEL_MAX, GUMBEL_MIN, gumbel_numpy, words_dense_numpy
from outrider.model.sampling import (
    ACCEPT_LOGPROB_FLOOR,
    MARGIN_CANDIDATES,
    SCORE_FLOOR,
    rank_candidates,
    sample_nodes,
    target_logprobs,
)

INF = math.inf
GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams()

params_drawn = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-40, 1e-6, 0.3, 0.8, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 50, 900, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.5, 1e-3, 1e-300]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
)
shapes = st.sampled_from(
    ["flat", "nearly flat", "normal", "wide", "few levels", "many masked", "one left", "bfloat16"]
)
widths = st.sampled_from([1, 2, 5, 64, 513, 1000, 4001])
thorough = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(params=["operator", "cpu", "gpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways through the code: a CPU's with our operator and without it, and a GPU's."""
    if request.param != "operator":
        take_path(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture(params=["cpu", "gpu"])
def plain_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways that leave the noise to Python, where a test can change it."""
    take_path(monkeypatch, request.param)
    return str(request.param)


def take_path(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(sampling, "can_draw", lambda _: False)
    if path == "cpu":
        return
    monkeypatch.setattr(sampling, "on_cpu", lambda _: False)
    monkeypatch.setattr(noise, "on_cpu", lambda _: False)


def drawn_logits(shape: str, rows: int, width: int, seed: int) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    normal = draw.standard_normal((rows, width)).astype(np.float32)
    masked = np.where(draw.random((rows, width)) < 0.9, -np.inf, normal).astype(np.float32)
    masked[:, width // 2] = 0.5
    one_left = np.full_like(normal, -np.inf)
    one_left[:, -1] = 3.0
    logits = {
        "flat": np.zeros_like(normal),
        "nearly flat": normal * 0.1,
        "normal": normal * 3,
        "wide": normal * 30,
        "few levels": np.round(normal),
        "many masked": masked,
        "one left": one_left,
        "bfloat16": normal,
    }[shape]
    tensor = torch.from_numpy(logits)
    return tensor.bfloat16() if shape == "bfloat16" else tensor


def plain_scores(logits, params, seeds, positions) -> np.ndarray:
    """Scores [N, V] by the definition: every token, numpy's noise."""
    logprobs = target_logprobs(logits, params).numpy()
    tokens = np.arange(logits.shape[1])
    rows = zip(logprobs, params, seeds, positions, strict=True)
    return np.stack(
        [
            row if param.greedy else row + gumbel_numpy(seed, position, tokens)
            for row, param, seed, position in rows
        ]
    )


def plain_sample(logits, params, seeds, positions) -> list[int]:
    """Samples by the definition; greedy rows straight from the logits, which do not round."""
    scores = plain_scores(logits, params, seeds, positions)
    raw = logits.float().numpy()
    return [
        int(np.argmax(raw[row] if param.greedy else scores[row]))
        for row, param in enumerate(params)
    ]


def check_rows(shape, width, params, seed) -> None:
    rows = len(params)
    logits = drawn_logits(shape, rows, width, seed % 1000)
    seeds = [(seed + row // 2) % 2**64 for row in range(rows)]  # neighbours may share a place
    positions = [7] * rows
    expected = plain_sample(logits, params, seeds, positions)
    assert sample_nodes(logits, params, seeds, positions) == expected


def check_ranks(shape, width, params, seed, count) -> None:
    rows = len(params)
    logits = drawn_logits(shape, rows, width, seed % 1000)
    seeds, positions = [seed] * rows, list(range(rows))
    tokens, scores, estimates = rank_candidates(logits, params, seeds, positions, count)
    assert tokens.shape == scores.shape == estimates.shape == (rows, count)
    assert tokens.dtype == torch.int64
    assert bool(scores.isfinite().all())
    assert bool(estimates.isfinite().all())
    assert bool((estimates <= 0).all())
    assert bool((estimates >= ACCEPT_LOGPROB_FLOOR).all())
    assert bool((estimates[:, 1:] <= estimates[:, :-1]).all())
    assert tokens[:, 0].tolist() == plain_sample(logits, params, seeds, positions)
    plain = plain_scores(logits, params, seeds, positions)
    for row, param in enumerate(params):
        by = logits[row].double().numpy() if param.greedy else plain[row]
        order = np.lexsort((np.arange(width), -by))[:count]
        order = order[by[order] > -INF]
        real = len(order)
        assert tokens[row, :real].tolist() == order.tolist()
        assert bool((estimates[row, real:] == ACCEPT_LOGPROB_FLOOR).all())
        assert bool((scores[row, real:] == SCORE_FLOOR).all())
        margins = by[order] - by[order[0]]
        found = (scores[row, :real] - scores[row, 0]).numpy()
        np.testing.assert_allclose(found, margins, rtol=1e-6, atol=1e-5)


@thorough
@given(shapes, widths, st.lists(params_drawn, min_size=1, max_size=5), st.integers(0, 2**64 - 1))
@example("flat", 4001, [PLAIN, PLAIN], 3)
@example("nearly flat", 4001, [SamplingParams(top_p=0.95)], 4)
@example("few levels", 4001, [SamplingParams(top_k=900, top_p=0.5)], 5)
def test_samples_are_those_of_the_definition(shape, width, params, seed):
    check_rows(shape, width, params, seed)
    for path in ("cpu", "gpu"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            take_path(monkeypatch, path)
            check_rows(shape, width, params, seed)


@thorough
@given(
    shapes,
    widths,
    st.lists(params_drawn, min_size=1, max_size=4),
    st.integers(0, 2**64 - 1),
    st.sampled_from([1, 2, 5, 12]),
)
@example("flat", 4001, [PLAIN, GREEDY], 3, 5)
@example("wide", 4001, [SamplingParams(temperature=100.0)], 3, 12)
def test_candidates_are_the_best_scores_of_the_definition(shape, width, params, seed, count):
    check_ranks(shape, width, params, seed, count)
    for path in ("cpu", "gpu"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            take_path(monkeypatch, path)
            check_ranks(shape, width, params, seed, count)


@pytest.mark.parametrize(
    "param",
    [
        PLAIN,
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=1),
        SamplingParams(top_k=20),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.01),
        SamplingParams(min_p=0.1),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1.3, top_k=40, top_p=0.8, min_p=0.02),
    ],
)
def test_processing_is_that_of_transformers(param):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.generation import logits_process as warpers
    logits = torch.from_numpy(np.random.default_rng(1).standard_normal((20, 300)) * 2.5).float()
    scores = warpers.TemperatureLogitsWarper(param.temperature)(None, logits)
    if param.top_k:
        scores = warpers.TopKLogitsWarper(param.top_k)(None, scores)
    if param.top_p < 1.0:
        scores = warpers.TopPLogitsWarper(param.top_p)(None, scores)
    if param.min_p:
        scores = warpers.MinPLogitsWarper(param.min_p)(None, scores)
    found = target_logprobs(logits, [param] * len(logits))
    torch.testing.assert_close(found, scores.double().log_softmax(-1), rtol=0, atol=1e-5)


def test_filters_keep_all_tokens_that_tie_with_the_last_kept():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    for param in (SamplingParams(top_k=2), SamplingParams(top_p=0.75)):
        kept = target_logprobs(logits, [param])[0] > -INF
        assert kept.tolist() == [True, True, True, True, False]
        drawn = {sample_nodes(logits, [param], [1], [place])[0] for place in range(200)}
        assert drawn == {0, 1, 2, 3}


def test_top_p_counts_only_what_top_k_left():
    # Of the two tokens that top-k leaves, the first alone has 0.6; of all four it has 0.33.
    logits = torch.tensor([[0.33, 0.22, 0.225, 0.22]]).log()
    param = SamplingParams(top_k=2, top_p=0.55)
    assert (target_logprobs(logits, [param])[0] > -INF).tolist() == [True, False, False, False]
    places = range(50)
    drawn = sample_nodes(logits.expand(50, -1), [param] * 50, [1] * 50, places)
    assert set(drawn) == {0}


def test_greedy_takes_the_lowest_of_equals(path):
    logits = torch.zeros(2, 5000)
    logits[1, [4000, 17, 400]] = 1.0
    assert sample_nodes(logits, [GREEDY] * 2, [1, 2], [3, 4]) == [0, 17]
    tokens, _, _ = rank_candidates(logits, [GREEDY] * 2, [1, 2], [3, 4], 4)
    assert tokens.tolist() == [[0, 1, 2, 3], [17, 400, 4000, 0]]


@pytest.mark.parametrize("width", [64, 4000])
def test_sampling_takes_the_lowest_of_equal_scores(plain_path, monkeypatch, width):
    monkeypatch.setattr(sampling, "gumbel_torch", lambda s, p, ids: torch.ones(ids.shape).double())
    monkeypatch.setattr(
        sampling, "gumbel_dense_torch", lambda s, p, width: torch.ones(len(s), width).double()
    )
    monkeypatch.setattr(
        sampling, "words_dense_numpy", lambda bits, place, width: np.full(width, 1 << 31, np.uint32)
    )
    logits = torch.zeros(1, width)
    logits[0, :3] = -1.0
    assert sample_nodes(logits, [PLAIN], [1], [1]) == [3]
    tokens, _, _ = rank_candidates(logits, [PLAIN], [1], [1], 4)
    assert tokens.tolist() == [[3, 4, 5, 6]]


@pytest.mark.parametrize(("behind", "winner"), [(20.18, 1), (20.19, 0)])
def test_only_what_no_noise_could_save_is_skipped(plain_path, monkeypatch, behind, winner):
    extremes = torch.tensor([GUMBEL_MIN, GUMBEL_MAX]).double()
    monkeypatch.setattr(sampling, "gumbel_torch", lambda s, p, ids: extremes[ids])
    monkeypatch.setattr(
        sampling, "gumbel_dense_torch", lambda s, p, width: extremes.expand(1, 2).clone()
    )
    assert sample_nodes(torch.tensor([[0.0, -behind]]), [PLAIN], [1], [1]) == [winner]


@pytest.mark.parametrize(
    "param",
    [
        SamplingParams(temperature=1e-40),
        SamplingParams(temperature=1e-9),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=1.0),
    ],
)
def test_what_leaves_one_token_is_greedy(path, param):
    logits = torch.from_numpy(np.random.default_rng(3).standard_normal((6, 3000))).float()
    args = ([5] * 6, range(6))
    assert sample_nodes(logits, [param] * 6, *args) == logits.argmax(-1).tolist()
    tokens, scores, estimates = rank_candidates(logits, [param] * 6, *args, 3)
    assert tokens[:, 0].tolist() == logits.argmax(-1).tolist()
    assert bool((estimates[:, 0] > -1e-6).all())
    if param.temperature == 1.0:
        assert bool((estimates[:, 1:] == ACCEPT_LOGPROB_FLOOR).all())
        assert bool((scores[:, 1:] == SCORE_FLOOR).all())
        assert tokens[:, 1:].tolist() == [[0, 0]] * 6


def test_a_row_does_not_depend_on_its_company(path):
    logits = drawn_logits("normal", 8, 4001, 9)
    params = [PLAIN, GREEDY, SamplingParams(top_p=0.9), SamplingParams(top_k=5)] * 2
    seeds, positions = [3, 3, 3, 4] * 2, [5, 6, 5, 5] * 2
    together = sample_nodes(logits, params, seeds, positions)
    alone = [
        sample_nodes(logits[row : row + 1], [params[row]], [seeds[row]], [positions[row]])[0]
        for row in range(8)
    ]
    assert together == alone


def test_rows_without_usable_logits_spoil_no_others(path):
    logits = drawn_logits("normal", 6, 3000, 9)
    expected = plain_sample(logits, [PLAIN, GREEDY] * 3, [1] * 6, range(6))
    logits[0], logits[1] = math.nan, -INF
    logits[2, 5] = INF
    logits[3] = -5.0
    logits[3, 7], logits[3, 8] = -1.0, math.nan
    found = sample_nodes(logits, [PLAIN, GREEDY] * 3, [1] * 6, range(6))
    assert found[0] == int(gumbel_numpy(1, 0, np.arange(3000)).argmax())  # flat
    assert found[1:4] == [0, 5, 7]
    assert found[4:] == expected[4:]
    tokens, scores, estimates = rank_candidates(logits, [PLAIN, GREEDY] * 3, [1] * 6, range(6), 3)
    assert tokens[:, 0].tolist() == found
    assert bool(scores.isfinite().all() and estimates.isfinite().all())


def test_greedy_rows_without_usable_logits_spoil_no_others(path):
    logits = drawn_logits("normal", 6, 300, 9)
    best = logits.argmax(dim=-1).tolist()
    for row, values in enumerate(([math.nan] * 300, [-INF] * 300)):
        logits[row] = torch.tensor(values)
    logits[2, 5] = INF
    logits[3] = -5.0
    logits[3, 7], logits[3, 8] = -1.0, math.nan
    found = sample_nodes(logits, [GREEDY] * 6, [1] * 6, range(6))
    assert found == [0, 0, 5, 7, *best[4:]]
    assert sample_nodes(logits[4:], [GREEDY] * 2, [1] * 2, range(2)) == best[4:]


def test_logits_are_left_alone(path):
    logits = drawn_logits("normal", 2, 3000, 9)
    before = logits.clone()
    sample_nodes(logits, [PLAIN, SamplingParams(top_p=0.9)], [1, 1], [1, 2])
    rank_candidates(logits, [PLAIN, GREEDY], [1, 1], [1, 2], 3)
    assert torch.equal(logits, before)


def test_greedy_estimates_are_log_probabilities(path):
    logits = drawn_logits("normal", 3, 1000, 2)
    tokens, scores, estimates = rank_candidates(logits, [GREEDY] * 3, [1] * 3, range(3), 5)
    expected = logits.log_softmax(-1).gather(-1, tokens)
    torch.testing.assert_close(estimates, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, expected.double(), rtol=0, atol=1e-5)


def test_sampled_estimates_are_perturbed_margins(path):
    logits = drawn_logits("normal", 3, 1000, 2)
    args = ([PLAIN] * 3, [1] * 3, range(3))
    best = -np.sort(-plain_scores(logits, *args), axis=-1)[:, :MARGIN_CANDIDATES]
    expected = torch.from_numpy(best).log_softmax(-1).float()
    for count in (1, 4):  # not a matter of how many are asked for
        _, _, estimates = rank_candidates(logits, *args, count)
        torch.testing.assert_close(estimates, expected[:, :count], rtol=0, atol=1e-5)


def test_siblings_share_their_hashing(monkeypatch):
    take_path(monkeypatch, "cpu")
    hashed = []

    def counted(bits, position, width):
        hashed.append((bits, position))
        return words_dense_numpy(bits, position, width)

    monkeypatch.setattr(sampling, "words_dense_numpy", counted)
    sample_nodes(torch.zeros(4, 4000), [PLAIN] * 4, [1, 1, 1, 2], [5, 5, 6, 5])
    assert sorted(hashed) == [(1, 5), (1, 6), (2, 5)]


def test_few_tokens_are_hashed_where_few_can_win(monkeypatch):
    take_path(monkeypatch, "cpu")
    sizes = []
    monkeypatch.setattr(
        sampling,
        "gumbel_torch",
        lambda s, p, ids: sizes.append(ids.shape[1]) or noise.gumbel_torch(s, p, ids),
    )
    logits = torch.full((2, 20_000), -25.0)
    logits[:, 100:110] = 0.0
    sample_nodes(logits, [PLAIN] * 2, [1, 1], [5, 6])
    sample_nodes(torch.zeros(1, 20_000), [PLAIN], [1], [5])
    assert sizes[0] == 10
    assert sizes[1] < 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("shape", ["normal", "flat", "few levels", "many masked"])
def test_cuda_samples_what_the_cpu_samples(shape):
    logits = drawn_logits(shape, 40, 4001, 5)
    params = [PLAIN, GREEDY, SamplingParams(temperature=0.8, top_p=0.95), SamplingParams(top_k=7)]
    args = (params * 10, [2**63 + row // 3 for row in range(40)], [row // 2 for row in range(40)])
    assert sample_nodes(logits.cuda(), *args) == sample_nodes(logits, *args)
    by_cpu = rank_candidates(logits, *args, 5)
    by_cuda = rank_candidates(logits.cuda(), *args, 5)
    assert torch.equal(by_cuda[0].cpu(), by_cpu[0])
    torch.testing.assert_close(by_cuda[2].cpu(), by_cpu[2], rtol=0, atol=1e-5)
