"""Temperature, top-k, top-p and min-p of many rows at once: scaled logits and their floors.

The rule's `sampling` says what they mean. This is the form without branches that suits a GPU; what
a CPU does instead is in `shortlist`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.domain import SamplingParams

TEMPERATURE_MIN = float(torch.finfo(torch.float32).tiny)
LOGIT_MAX = float(torch.finfo(torch.float32).max)
LOGIT_MIN = -LOGIT_MAX


def repaired(logits: Tensor) -> Tensor:
    """Return logits as float32 [N, V], each row with at least one finite value and no NaN."""
    logits = logits.detach().float()
    best = logits.amax(dim=-1)  # NaN if any logit is
    # One number says it of all: no sum of float32 overflows a float.
    if math.isfinite(sum(best.tolist())):
        return logits
    logits = logits.nan_to_num(nan=-math.inf, neginf=-math.inf)
    empty = logits.amax(dim=-1, keepdim=True) == -math.inf
    return logits.masked_fill(empty, 0.0)


def scale(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return (logit - best) / temperature, float32 [N, V]: at most 0, and 0 for the best."""
    # Subtracting first lets a tiny temperature give -inf, never inf - inf.
    temperatures = [max(param.temperature, TEMPERATURE_MIN) for param in params]
    divisors = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(divisors[:, None])


def filter_floors(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return per row the least scaled logit that the filters keep: float32 [N], at most 0."""
    width = scaled.shape[1]
    min_p = [math.log(param.min_p) if param.min_p else -math.inf for param in params]
    floors = torch.tensor(min_p, dtype=torch.float32, device=scaled.device)
    groups: dict[tuple[int, float], list[int]] = {}
    for row, param in enumerate(params):
        top_k = param.top_k if param.top_k < width else 0
        if top_k or param.top_p < 1.0:
            groups.setdefault((top_k, param.top_p), []).append(row)
    for (top_k, top_p), rows in groups.items():
        index = torch.tensor(rows, device=scaled.device)
        some = scaled if len(rows) == len(params) else scaled[index]
        if top_k:
            least = some.topk(top_k, dim=-1).values[:, -1]
        else:
            least = some.new_full((len(rows),), -math.inf)
        if top_p < 1.0:
            ordered = some.masked_fill(some < least[:, None], -math.inf)
            least = _nucleus_floors(ordered.sort(dim=-1, descending=True).values, top_p)
        floors[index] = torch.maximum(floors[index], least)
    return floors


def _nucleus_floors(ordered: Tensor, top_p: float) -> Tensor:
    """Return the last of the descending logits [N, V] before which less than top_p weighs: [N]."""
    weights = ordered.double().exp()
    before = weights.cumsum(dim=-1) - weights
    mass = weights.sum(dim=-1, keepdim=True)
    kept = (before < top_p * mass).sum(dim=-1, keepdim=True).clamp(min=1)
    return ordered.gather(-1, kept - 1).squeeze(-1)
