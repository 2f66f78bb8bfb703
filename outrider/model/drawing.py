"""The one rule by our operator: what `sampling` defines, of a whole batch on a CPU in one call.

The operator makes the decisions of the definition; it hands back the rare rows where the end of a
nucleus is too close to call for its sums, for others to decide (`native/rule.h`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.domain import SamplingParams
from outrider.model import native
from outrider.model.filters import TEMPERATURE_MIN
from outrider.model.noise import on_cpu, seed_bits


@dataclass(frozen=True, slots=True)
class Drawn:
    """The best tokens of N rows, int64 [N, count], and their perturbed scores, float64.

    Where filters leave fewer tokens, the others are 0 and their scores -inf. Greedy rows have one
    token, of score 0. Nothing holds of the rows that are `undecided`.
    """

    tokens: Tensor
    scores: Tensor
    undecided: list[int]


def can_draw(logits: Tensor) -> bool:
    """Return whether there is an operator for these logits."""
    return on_cpu(logits) and native.available()


def draw(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    count: int,
) -> Drawn:
    """Return the `count` best tokens of each row; arguments as for `sampling.sample_nodes`."""
    filters = [
        (
            0.0 if param.greedy else max(param.temperature, TEMPERATURE_MIN),
            math.log(param.min_p) if param.min_p else -math.inf,
            param.top_p,
        )
        for param in params
    ]
    places = [
        (seed_bits(seed), position, param.top_k)
        for param, seed, position in zip(params, seeds, positions, strict=True)
    ]
    tokens, scores, decided = torch.ops.outrider.draw(
        logits.detach().float(),
        torch.tensor(filters, dtype=torch.float64),
        torch.tensor(places, dtype=torch.int64),
        count,
    )
    undecided = [row for row, done in enumerate(decided.tolist()) if not done]
    return Drawn(tokens, scores, undecided)
