"""The head of each row, and the floor that the filters draw: first half of `shortlist`.

A head is all tokens from some logit on: enough for the filters, and about `_HEAD` of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.domain import SamplingParams
from outrider.model.filters import LOGIT_MIN, TEMPERATURE_MIN
from outrider.model.noise import GUMBEL_MAX, GUMBEL_MIN

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]
Scores: TypeAlias = NDArray[np.float64]

HOPELESS = GUMBEL_MIN - GUMBEL_MAX - 1e-3
"""A scaled logit this far below another loses to it. The slack is for comparing in float32."""

_HEAD = 64
# A vocabulary is folded into this many rows, if it is large enough for columns to be many.
_FOLDS = 64
_FOLDED_MIN = 4096
# A row with more tokens than this and than this share of the vocabulary in its head is flat.
_HEAD_MAX = 512
_HEAD_SHARE = 1 / 12
# Bins for the mass of a wide nucleus.
_BINS = 4096
# Rows whose weights are summed at a time: they should fit the cache.
_MASS_ROWS = 16
# Relative error of a mass in float32, with a margin: an exponent's error is at most a few times
# 6e-8 of it, and weights whose exponent is below -20 do not matter; the sum goes by blocks.
_MASS_ERROR = 1e-5
# Relative, and several times what two float32 roundings can hide.
_ROUNDING = 1e-6
_TINY = 1e-36


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The tokens of a row that may be among the best, ascending, and their scaled logits."""

    ids: Ids
    scaled: Floats


@dataclass(frozen=True, slots=True)
class Row:
    """A row of logits; `maxima` are those of disjoint sets of its tokens, so tokens themselves."""

    logits: Floats
    maxima: Floats
    best: np.float32
    divisor: np.float32

    def from_cut(self, cut: float) -> Shortlist:
        """Return all tokens whose logit reaches the cut."""
        ids = np.flatnonzero(self.logits >= self.least(cut))
        return Shortlist(ids, self.scale(self.logits[ids]))

    def least(self, cut: float) -> np.float32:
        """Return the cut as it is compared: -inf reaches none."""
        return np.float32(max(cut, LOGIT_MIN))

    def scale(self, logits: Floats) -> Floats:
        """Return (logit - best) / temperature, rounded as `filters.scale` rounds it."""
        return np.asarray((logits - self.best) / self.divisor)

    def most_below(self, cut: float) -> float:
        """Return a scaled logit that nothing under the cut exceeds."""
        return float((self.least(cut) - self.best) / self.divisor)

    def is_flat(self, tokens: Shortlist) -> bool:
        """Return whether these are too many to be treated one by one."""
        return len(tokens.ids) > max(_HEAD_MAX, len(self.logits) * _HEAD_SHARE)

    def below(self, logit: float) -> float:
        """Return a cut such that all logits under it have a lesser scaled logit than this one."""
        return logit - _ROUNDING * (abs(logit) + abs(float(self.best))) - _TINY

    def cut_of(self, scaled: float) -> float:
        """Return a cut such that all logits under it have a lesser scaled logit than this."""
        return self.below(float(self.best) + scaled * float(self.divisor))


@dataclass(frozen=True, slots=True)
class Head:
    """All tokens of a row from `cut` on; `closed` if no other reaches the floor (scaled)."""

    row: Row
    tokens: Shortlist
    cut: float
    floor: float
    closed: bool


def heads_of(logits: Tensor, params: Sequence[SamplingParams], count: int) -> list[Head]:
    """Return the head of each row of `logits` [N, V]; arguments as for `shortlist.shortlists`."""
    maxima = _column_maxima(logits)
    masses = _masses(logits, maxima.amax(dim=-1), params)
    found = []
    # Differences may overflow to -inf, which is what they should do.
    with np.errstate(over="ignore"):
        for index, (param, mass) in enumerate(zip(params, masses, strict=True)):
            divisor = np.float32(max(param.temperature, TEMPERATURE_MIN))
            arrays = logits[index].numpy(), maxima[index].numpy()
            row = Row(*arrays, arrays[1].max(), divisor)
            found.append(_head(row, param, count, mass))
    return found


def _column_maxima(logits: Tensor) -> Tensor:
    """Return the maxima [N, W] of the folded logits [N, V]; the last fold may be cut short."""
    size = logits.shape[1]
    if size < _FOLDED_MIN:
        return logits
    width = -(-size // _FOLDS)
    folds = size // width
    maxima = logits[:, : folds * width].reshape(len(logits), folds, width).amax(dim=1)
    rest = logits[:, folds * width :]
    if rest.shape[1]:
        start = maxima[:, : rest.shape[1]]
        torch.maximum(start, rest, out=start)
    return maxima


def _masses(
    logits: Tensor, best: Tensor, params: Sequence[SamplingParams]
) -> Sequence[float | None]:
    """Return the sum of exp(scaled) where top-p needs it, within `_MASS_ERROR`."""
    width = logits.shape[1]
    rows = [
        row for row, param in enumerate(params) if param.top_p < 1.0 and not 0 < param.top_k < width
    ]
    masses: list[float | None] = [None] * len(params)
    for start in range(0, len(rows), _MASS_ROWS):
        some = rows[start : start + _MASS_ROWS]
        index = torch.tensor(some)
        rates = torch.tensor([1.0 / max(params[row].temperature, TEMPERATURE_MIN) for row in some])
        if some[-1] - some[0] + 1 == len(some):
            chunk = logits[some[0] : some[-1] + 1] - best[index, None]
        else:
            chunk = logits[index].sub_(best[index, None])
        sums = chunk.mul_(rates[:, None]).exp_().sum(dim=-1)
        for row, mass in zip(some, sums.tolist(), strict=True):
            masses[row] = mass
    return masses


def _head(row: Row, param: SamplingParams, count: int, mass: float | None) -> Head:
    top_k = param.top_k if param.top_k < len(row.logits) else 0
    floor = float(np.float32(math.log(param.min_p))) if param.min_p else LOGIT_MIN
    some = row.logits if top_k > len(row.maxima) else row.maxima
    some = best_of(some, max(_HEAD, top_k, count))
    cut = row.below(float(some.min()))
    if top_k:
        tokens = row.from_cut(cut)
        return kept_head(row, tokens, cut, max(floor, _top_k_floor(tokens, top_k, param.top_p)))
    if mass is not None:
        return _nucleus_head(row, cut, floor, param.top_p, mass)
    # No noise lifts a token over `count` others that lead by more than the range of the noise.
    if count <= len(some):
        lead = (best_of(some, count).min() - row.best) / row.divisor
        floor = max(floor, float(lead) + HOPELESS)
    needed = row.cut_of(floor)
    if needed >= cut:
        return kept_head(row, row.from_cut(needed), needed, floor)
    return kept_head(row, row.from_cut(cut), cut, floor, closed=False)


def best_of(values: Floats, count: int) -> Floats:
    """Return the `count` largest values, or all there are, in no order."""
    start = max(0, len(values) - count)
    return np.partition(values, start)[start:]


def kept_head(row: Row, tokens: Shortlist, cut: float, floor: float, closed: bool = True) -> Head:
    """Return a head of those of the tokens that reach the floor."""
    closed = closed or len(tokens.ids) == len(row.logits)
    kept = np.flatnonzero(tokens.scaled >= np.float32(floor))
    if len(kept) < len(tokens.ids):
        tokens = Shortlist(tokens.ids[kept], tokens.scaled[kept])
    return Head(row, tokens, cut, floor, closed)


def _top_k_floor(tokens: Shortlist, top_k: int, top_p: float) -> float:
    """Return the least of the `top_k` best scaled logits that top-p keeps."""
    scaled = tokens.scaled
    if len(scaled) > top_k:  # otherwise the others are all -inf
        scaled = scaled[scaled >= best_of(scaled, top_k).min()]
    if top_p < 1.0:
        ordered, before = _descending(scaled)
        return float(ordered[_nucleus_size(before, top_p * _mass(scaled)) - 1])
    return float(scaled.min())


def _nucleus_head(row: Row, cut: float, floor: float, top_p: float, mass: float) -> Head:
    """Return the head whose floor is that of top-p or the given one, whichever is higher."""
    tokens = row.from_cut(cut)
    if not row.is_flat(tokens):
        ordered, before = _descending(tokens.scaled)
        most = _nucleus_size(before, top_p * mass * (1.0 + _MASS_ERROR))
        if ordered[most - 1] > ordered[-1]:  # so it does not go on below
            least = _nucleus_floor(row, ordered, before, top_p, mass)
            return kept_head(row, tokens, cut, max(floor, least))
    # Everything below this weighs, all together, less than the share that top-p drops: so the
    # nucleus ends above.
    share = (1.0 - top_p) * (1.0 - _MASS_ERROR) * mass / len(row.logits)
    lowest = math.log(share) - 1e-3
    wide = row.from_cut(row.cut_of(lowest))
    if row.is_flat(wide):
        floor = max(floor, _wide_nucleus_floor(row, top_p, lowest))
        nucleus = row.from_cut(row.cut_of(floor))
        if row.is_flat(nucleus):  # then better by way of its head
            return kept_head(row, tokens, cut, floor, closed=floor > row.most_below(cut))
        return kept_head(row, nucleus, cut, floor)
    least = _nucleus_floor(row, *_descending(wide.scaled), top_p, mass)
    return kept_head(row, wide, cut, max(floor, least))


def _nucleus_floor(row: Row, ordered: Floats, before: Scores, top_p: float, mass: float) -> float:
    """Return the nucleus's least scaled logit; descending ones that hold it, what weighs before."""
    size = _nucleus_size(before, top_p * mass * (1.0 + _MASS_ERROR))
    if _nucleus_size(before, top_p * mass * (1.0 - _MASS_ERROR)) != size:
        size = _nucleus_size(before, top_p * _mass(row.scale(row.logits)))
    return float(ordered[size - 1])


def _wide_nucleus_floor(row: Row, top_p: float, lowest: float) -> float:
    """Return the nucleus's least scaled logit, known to be above `lowest`, without a large sort.

    Weights are summed in bins of logits; only the bin in which the nucleus ends is sorted.
    """
    scaled = row.scale(row.logits)
    bins = np.minimum(scaled * np.float32(_BINS / lowest), np.float32(_BINS)).astype(np.int64)
    weights = _weights(scaled)
    masses = np.bincount(bins, weights, _BINS + 1)
    sums = np.cumsum(masses)
    share = top_p * float(sums[-1])
    last = min(int(np.count_nonzero(sums < share)), _BINS)
    ending = scaled[np.flatnonzero(bins == last)]
    if ending.min() == ending.max():
        return float(ending[0])
    ordered, before = _descending(ending)
    return float(ordered[_nucleus_size(before + (sums[last] - masses[last]), share) - 1])


def _descending(scaled: Floats) -> tuple[Floats, Scores]:
    """Return the logits in descending order, and what weighs before each."""
    ordered = np.sort(scaled)[::-1].copy()  # torch takes no negative strides
    weights = _weights(ordered)
    return ordered, np.cumsum(weights) - weights


def _nucleus_size(before: Scores, share: float) -> int:
    return max(1, int(np.count_nonzero(before < share)))


def _weights(scaled: Floats) -> Scores:
    return np.asarray(torch.from_numpy(scaled).double().exp_())


def _mass(scaled: Floats) -> float:
    return float(_weights(scaled).sum())
