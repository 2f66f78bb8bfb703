"""Masks, bias and penalties against their plain definition; log-probabilities of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import RepetitionPenaltyLogitsProcessor

from outrider.domain import SamplingParams
from outrider.model import processing
from outrider.model.processing import (
    LOGPROB_MIN,
    History,
    NodeContext,
    process_logits,
    processed_reference,
    token_logprobs,
)
from outrider.model.sampling import sample_nodes

INF = math.inf
GREEDY = SamplingParams(temperature=0.0)
thorough = settings(max_examples=200, deadline=None, derandomize=True)

strengths = st.sampled_from([0.0, 0.0, -2.0, 0.3, 1.1, 2.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[NodeContext | None]]:
    """Logits and contexts of a few sessions, each with nodes that share its history."""
    width = draw(st.sampled_from([1, 5, 31, 32, 33, 100]))
    ids = st.integers(0, width - 1)
    contexts: list[NodeContext | None] = []
    for _ in range(draw(st.integers(1, 3))):
        params = SamplingParams(
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7, 10.0, 1e-300])),
            frequency_penalty=draw(strengths),
            presence_penalty=draw(strengths),
            logit_bias=tuple(
                sorted(draw(st.dictionaries(ids, st.floats(-100, 100), max_size=4)).items())
            ),
        )
        output = draw(st.lists(ids, max_size=8))
        cut = draw(st.integers(0, len(output)))
        history = History(draw(st.lists(ids, max_size=8)), output[:cut])
        history.extend(output[cut:])
        for _ in range(draw(st.integers(0, 3))):
            masked = draw(st.none() | st.lists(ids, max_size=6))
            context = NodeContext(
                params,
                draw(st.sampled_from([history, history, None])),
                tuple(draw(st.lists(ids, max_size=5))),
                draw(st.lists(ids, max_size=3)),
                None if masked is None else words_of(masked, width),
            )
            contexts.append(draw(st.sampled_from([context, context, None])))
    shape = (len(contexts), width)
    values = np.random.default_rng(draw(st.integers(0, 1000))).standard_normal(shape) * 4
    odd = draw(st.lists(st.sampled_from([-INF, INF, math.nan, 0.0]), max_size=3))
    for number, value in enumerate(odd):
        values.reshape(-1)[number * 7 % max(1, values.size) : number * 7 + 1] = value
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return torch.from_numpy(values).to(dtype), contexts


def words_of(ids: Sequence[int], width: int) -> NDArray[np.uint32]:
    words = np.zeros((width + 31) // 32, dtype=np.uint32)
    for token in ids:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0.0, atol=0.0, equal_nan=True)


def processed(logits: Sequence[float], context: NodeContext) -> list[float]:
    values: list[float] = process_logits(torch.tensor([list(logits)]), [context])[0].tolist()
    return values


@pytest.mark.parametrize("path", ["cpu", "gpu"])
@thorough
@given(case=cases())
def test_fast_path_equals_definition_and_leaves_its_input_alone(path, case) -> None:
    logits, contexts = case
    before = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        if path == "gpu":
            patch.setattr(processing, "on_cpu", lambda _: False)
        result = process_logits(logits, contexts)
    if not contexts:
        assert result is logits
        return
    same(result.float(), processed_reference(logits, contexts))
    same(logits, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases())
def test_accelerator_equals_definition(case) -> None:
    logits, contexts = case
    if contexts:
        result = process_logits(logits.cuda(), contexts)
        same(result.float().cpu(), processed_reference(logits, contexts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_tensor_without_work(dtype) -> None:
    logits = torch.zeros((3, 8), dtype=dtype)
    history = History([1, 2], [3])
    contexts = [None, NodeContext(GREEDY, history, (1, 2)), NodeContext(GREEDY)]
    assert process_logits(logits, contexts) is logits


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_agrees_with_transformers(penalty) -> None:
    draw = np.random.default_rng(3)
    prompt, output, path = (draw.integers(0, 50, size=n).tolist() for n in (6, 9, 4))
    logits = torch.from_numpy(draw.standard_normal((1, 50)).astype(np.float32))
    sequence = torch.tensor([prompt + output + path])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(sequence, logits.clone())
    context = NodeContext(
        SamplingParams(repetition_penalty=penalty), History(prompt, output), tuple(path)
    )
    same(process_logits(logits, [context]), expected)


def test_order_is_bias_then_repetition_then_frequency_and_presence() -> None:
    params = SamplingParams(
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias=((0, -3.0), (3, 1.0)),
    )
    context = NodeContext(params, History(prompt=[0, 2], output=[1, 1]), path=(1, 0))
    # 0: (1 - 3) * 2 - 0.5 - 0.25; 1: 4 / 2 - 3 * 0.5 - 0.25; 2, of the prompt only: 3 / 2.
    assert processed([1.0, 4.0, 3.0, 1.0], context) == [-4.75, 0.25, 1.5, 2.0]


def test_a_path_counts_at_its_own_node_only() -> None:
    params = SamplingParams(frequency_penalty=1.0)
    history = History([], [0])
    contexts = [NodeContext(params, history, path) for path in ((), (1,), (1, 1, 0))]
    result = process_logits(torch.zeros((3, 3)), contexts)
    assert result.tolist() == [[-1.0, 0.0, 0.0], [-1.0, -1.0, 0.0], [-2.0, -2.0, 0.0]]
    assert history.output_count(1) == 0


def test_history_extended_equals_history_built() -> None:
    draw = np.random.default_rng(5)
    prompt, output = draw.integers(0, 900, size=300).tolist(), draw.integers(0, 900, 2000).tolist()
    grown = History(prompt)
    for start in range(0, len(output), 7):
        grown.extend(output[start : start + 7])
    for history in (grown, History(prompt, output)):
        ids, counts = history.touched(prompt=True)
        assert sorted(ids.tolist()) == sorted({*prompt, *output})
        assert {i: c for i, c in zip(ids.tolist(), counts.tolist(), strict=True) if c} == {
            i: output.count(i) for i in output
        }
        assert sorted(history.touched(prompt=False)[0].tolist()) == sorted(set(output))


def test_banned_ids_cannot_win_whatever_their_bias() -> None:
    context = NodeContext(SamplingParams(logit_bias=((1, 100.0),)), banned=(1,))
    assert processed([0.0, 5.0, 0.0], context) == [0.0, -INF, 0.0]


def test_grammar_wins_over_minimum_length_only_where_nothing_else_is_left() -> None:
    both = NodeContext(GREEDY, banned=(2,), allowed=words_of([1, 2], 40))
    assert np.isfinite(processed(np.zeros(40), both)).nonzero()[0].tolist() == [1]
    complete = NodeContext(GREEDY, banned=(2, 33), allowed=words_of([2, 33], 40))
    assert np.isfinite(processed(np.zeros(40), complete)).nonzero()[0].tolist() == [2, 33]


@pytest.mark.parametrize("words", [1, 2, 9])
def test_a_mask_may_be_shorter_or_longer_than_the_vocabulary(words) -> None:
    allowed = np.full(words, 0xFFFFFFFF, dtype=np.uint32)
    result = processed(np.zeros(40), NodeContext(GREEDY, allowed=allowed))
    assert np.isfinite(result).sum() == min(40, 32 * words)


def test_ids_beyond_the_vocabulary_are_no_choice_left() -> None:
    context = NodeContext(GREEDY, banned=(2,), allowed=words_of([2, 45], 64))
    assert np.isfinite(processed(np.zeros(40), context)).nonzero()[0].tolist() == [2]


@pytest.mark.parametrize("value", [math.nan, -INF, INF])
def test_an_allowed_id_wins_even_among_broken_logits(value) -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=10.0)
    context = NodeContext(params, History([5]), allowed=words_of([5], 8))
    result = process_logits(torch.full((1, 8), value), [context])
    assert sample_nodes(result, [params], [0], [0]) == [5]


def test_a_mask_that_allows_nothing_gives_no_nan() -> None:
    params = SamplingParams(
        repetition_penalty=1e-300, presence_penalty=2.0, logit_bias=((1, 100.0),)
    )
    context = NodeContext(params, History([0], [1]), (2,), allowed=words_of([], 8))
    assert processed(np.ones(8), context) == [-INF] * 8


# --- log-probabilities ------------------------------------------------------------------------


@thorough
@given(
    rows=st.integers(1, 40),
    width=st.sampled_from([1, 3, 50, 333]),
    levels=st.sampled_from([1, 3, 10_000]),
    seed=st.integers(0, 100),
)
def test_token_logprobs_equal_a_float64_softmax(rows, width, levels, seed) -> None:
    draw = np.random.default_rng(seed)
    logits = (draw.integers(0, levels, size=(rows, width)) / levels * 30).astype(np.float32)
    tokens = draw.integers(0, width, size=rows).tolist()
    tops = draw.integers(0, 21, size=rows).tolist()
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    before = logits.copy()
    results = token_logprobs(torch.from_numpy(logits), tokens, tops)
    assert np.array_equal(logits, before)
    assert len(results) == rows
    for row, result in enumerate(results):
        order = np.lexsort((np.arange(width), -logits[row]))[: tops[row]]
        assert [token for token, _ in result.top] == order.tolist()
        assert [logprob for _, logprob in result.top] == pytest.approx(exact[row][order], abs=1e-5)
        assert result.token == tokens[row]
        assert result.logprob == pytest.approx(exact[row][tokens[row]], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_are_accurate_over_a_large_vocabulary(dtype) -> None:
    logits = torch.randn((4, 150_000), generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    exact = logits.double().log_softmax(dim=-1)
    for row, result in enumerate(token_logprobs(logits, [7] * 4, [5] * 4)):
        assert result.logprob == pytest.approx(float(exact[row, 7]), abs=1e-5)


def test_token_logprobs_of_broken_logits_are_finite() -> None:
    logits = torch.tensor([[0.0, -INF, math.nan], [INF, 0.0, 1.0], [-INF, -INF, -INF]])
    results = token_logprobs(logits, [1, 0, 0], [3, 1, 0])
    assert results[0].logprob == pytest.approx(LOGPROB_MIN)
    assert [token for token, _ in results[0].top] == [0, 1, 2]
    for result in results:
        assert all(
            math.isfinite(logprob) for logprob in (result.logprob, *dict(result.top).values())
        )
