"""A drafter's best guesses at each node of a step, as plain numbers.

Greedy rows, the usual ones of a fast draft model, are ranked here: a few operations over the
vocabulary, and everything that concerns single rows in Python. What is out of the ordinary, equal
logits, logits that are no numbers, and sampled rows, is left to `sampling.rank_candidates`, whose
results these are in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from outrider.domain import SamplingParams
from outrider.model.sampling import ACCEPT_LOGPROB_FLOOR, rank_candidates

Guesses: TypeAlias = list[tuple[int, float]]
"""(token, estimated log-probability of acceptance), best first."""


def ranked_guesses(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    count: int,
    kept: Tensor | None = None,
) -> list[Guesses]:
    """Return up to `count` guesses at each of N nodes; see `sampling.rank_candidates`.

    Fewer where the filters leave no more tokens. `kept`: the ids, ascending, whose logits are not
    minus infinity; None: any may be so.
    """
    if all(param.greedy for param in params):
        ranked = _rank_distinct(logits, count, kept)
        if ranked is not None:
            return ranked
    tokens, _, logprobs = rank_candidates(logits, params, seeds, positions, count)
    return [
        [pair for pair in zip(*row, strict=True) if pair[1] > ACCEPT_LOGPROB_FLOOR]
        for row in zip(tokens.tolist(), logprobs.tolist(), strict=True)
    ]


def _rank_distinct(logits: Tensor, count: int, kept: Tensor | None) -> list[Guesses] | None:
    """Rank greedy rows, or return None if it takes more to do so."""
    logits = logits.detach()
    if logits.dtype != torch.float32:
        logits = logits.float()
    if kept is not None:
        logits = logits.index_select(1, kept)
    # One more than asked for: `topk` does not say which of equals it takes.
    best, ids = logits.log_softmax(dim=-1).topk(min(count + 1, logits.shape[1]), dim=-1)
    if kept is not None:
        ids = kept[ids]
    ranked: list[Guesses] = []
    # Plain loops: for a few numbers, every operator more takes longer than they do.
    for tokens, values in zip(ids.tolist(), best.tolist(), strict=True):
        above = math.inf
        for value in values:
            if not value < above:
                return None  # equals, or something is no number
            above = value
        row = list(zip(tokens, values, strict=True))[:count]
        if row[-1][1] <= ACCEPT_LOGPROB_FLOOR:
            row = [pair for pair in row if pair[1] > ACCEPT_LOGPROB_FLOOR]
        ranked.append(row)
    return ranked
