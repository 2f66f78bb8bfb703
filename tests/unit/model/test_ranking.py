"""The quick ranking of greedy rows against the general one."""

from __future__ import annotations

import math

import pytest
import torch

from outrider.domain import SamplingParams
from outrider.model import ranking
from outrider.model.ranking import ranked_guesses
from outrider.model.sampling import ACCEPT_LOGPROB_FLOOR, rank_candidates

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0)
INF = math.inf


def general(
    logits: torch.Tensor, params: list[SamplingParams], count: int
) -> list[list[tuple[int, float]]]:
    numbers = list(range(len(params)))
    tokens, _, logprobs = rank_candidates(logits, params, numbers, numbers, count)
    rows = zip(tokens.tolist(), logprobs.tolist(), strict=True)
    return [[(t, p) for t, p in zip(*row, strict=True) if p > ACCEPT_LOGPROB_FLOOR] for row in rows]


def compare(logits: torch.Tensor, params: list[SamplingParams], count: int) -> None:
    numbers = list(range(len(params)))
    found = ranked_guesses(logits, params, numbers, numbers, count)
    expected = general(logits, params, count)
    assert [[t for t, _ in row] for row in found] == [[t for t, _ in row] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert [p for _, p in row] == pytest.approx([p for _, p in other], abs=1e-5)
        assert all(p <= 0.0 for _, p in row)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("width", [5, 300])
def test_greedy_rows_are_ranked_alike(count: int, width: int) -> None:
    logits = 9.0 * torch.randn((6, width), generator=torch.Generator().manual_seed(count))
    compare(logits, [GREEDY] * 6, count)
    compare(logits.bfloat16(), [GREEDY] * 6, count)


@pytest.mark.parametrize(
    "row",
    [
        [1.0, 3.0, 3.0, 3.0, 0.0],
        [2.0, math.nan, 5.0, 1.0, 0.0],
        [2.0, INF, INF, 1.0, 0.0],
        [-INF] * 5,
        [-INF, 4.0, -INF, -INF, -INF],
        [0.0, 500.0, 1.0, 2.0, 3.0],
    ],
)
def test_what_is_out_of_the_ordinary_is_ranked_alike(row: list[float]) -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], row])
    compare(logits, [GREEDY] * 2, 3)


def test_sampled_rows_and_mixtures_are_ranked_alike() -> None:
    logits = torch.randn((4, 100), generator=torch.Generator().manual_seed(3))
    compare(logits, [SAMPLED] * 4, 3)
    compare(logits, [GREEDY, SAMPLED, SAMPLED, GREEDY], 3)


def test_the_quick_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ranking, "rank_candidates")
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    (row,) = ranked_guesses(logits, [GREEDY], [1], [1], 2)
    assert [token for token, _ in row] == [1, 2]
