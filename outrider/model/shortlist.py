"""Which tokens can win: the rule on a CPU, where looking at few tokens is what makes it fast.

For each row, from cheap to dear, and stopping as soon as nothing is left that could matter:

1. The *head*: all tokens from some logit on, about `_HEAD` of them, found by the maxima of columns
   (the vocabulary folded into a matrix), without a look at the rest.
2. The filters' floor. Top-k needs the head alone. Top-p needs the mass of the whole row besides: it
   is summed in float32, whose error is bounded, and summed again in float64 if the floor could
   depend on that error.
3. Where the floor leaves tokens below the head, the *tail*, the head's scores say how much noise a
   token of the tail needs to win. Tokens for which no noise is enough are skipped; of the others
   the words are hashed and compared with that noise as integers, which nearly none passes.

Rows so flat that they have no short head are judged as a whole (`_contenders`). None of this
changes a result: a token is left out only if others beat it, with slack for rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.domain import SamplingParams
from outrider.model.filters import LOGIT_MAX, LOGIT_MIN, TEMPERATURE_MIN
from outrider.model.noise import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    LANES,
    UNIFORM_BITS,
    gumbel_each_numpy,
    gumbel_of_words_numpy,
    least_word,
    words_blocks_numpy,
)

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]
Scores: TypeAlias = NDArray[np.float64]
Place: TypeAlias = tuple[int, int]
"""Seed (as int64) and position: what the noise depends on besides the token."""

HOPELESS = GUMBEL_MIN - GUMBEL_MAX - 1e-3
"""A scaled logit this far below another loses to it. The slack is for comparing in float32."""

_HEAD = 64
# A vocabulary is folded into this many rows, if it is large enough for columns to be many.
_FOLDS = 64
_FOLDED_MIN = 4096
# With so few tokens to hash, finding out which of them to hash does not pay.
_FEW = 64
# A head with more tokens than this and than this share of the vocabulary is none.
_HEAD_MAX = 512
_HEAD_SHARE = 1 / 12
# From this share on, choosing blocks costs more than hashing them all.
_BLOCKS_SHARE = 0.8
# Rows with the same place from which on hashing everything once is cheaper than each row's blocks.
_SIBLINGS_MIN = 3
# Rows whose weights are summed at a time: they should fit the cache.
_MASS_ROWS = 16
# Relative error of a mass in float32, with a wide margin: 12 roundings of 6e-8 in an exponent that
# matters, and a sum in blocks.
_MASS_ERROR = 1e-5
# Relative, and several times what two float32 roundings can hide.
_ROUNDING = 1e-6
_TINY = 1e-36
# Scores are float64, but two libraries' logarithms may differ in the last place.
_SCORE_ERROR = 1e-9
_BUCKETS = np.uint32(1 << UNIFORM_BITS)
# More than what float32 can lose in a quotient.
_SLACK = 1.0 + 1e-5


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The tokens of a row that may be among the best, ascending, and their scaled logits."""

    ids: Ids
    scaled: Floats


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of logits; `maxima` are those of disjoint sets of its tokens, so tokens themselves."""

    logits: Floats
    maxima: Floats
    best: np.float32
    divisor: np.float32

    def from_cut(self, cut: float) -> Shortlist:
        """Return all tokens whose logit reaches the cut."""
        ids = np.flatnonzero(self.logits >= np.float32(max(cut, LOGIT_MIN)))
        return Shortlist(ids, self.scaled(ids))

    def scaled(self, ids: Ids) -> Floats:
        """Return (logit - best) / temperature, rounded as `filters.scale` rounds it."""
        return np.asarray((self.logits[ids] - self.best) / self.divisor)

    def below(self, logit: float) -> float:
        """Return a cut such that all logits under it have a lesser scaled logit than this one."""
        return logit - _ROUNDING * (abs(logit) + abs(float(self.best))) - _TINY

    def cut_of(self, scaled: float) -> float:
        """Return a cut such that all logits under it have a lesser scaled logit than this."""
        return self.below(float(self.best) + scaled * float(self.divisor))


@dataclass(frozen=True, slots=True)
class _Head:
    """All tokens of a row from `cut` on; `closed` if no other reaches the floor (scaled)."""

    row: _Row
    tokens: Shortlist
    cut: float
    floor: float
    closed: bool


def shortlists(
    logits: Tensor,
    params: Sequence[SamplingParams],
    places: Sequence[Place],
    count: int,
    words_dense: Callable[[int, int, int], NDArray[np.uint32]],
) -> list[Shortlist]:
    """Return per row the tokens that may have one of the `count` best perturbed scores.

    `logits` [N, V] float32 on a CPU, repaired; no row is greedy. `words_dense` hashes a whole
    vocabulary, as `noise.words_dense_numpy`.
    """
    maxima = _column_maxima(logits)
    best = maxima.amax(dim=-1)
    masses = _masses(logits, best, params)
    # Differences may overflow to -inf, which is what they should do.
    with np.errstate(over="ignore", divide="ignore"):
        heads = [
            _head(
                _Row(*arrays, np.float32(max(param.temperature, TEMPERATURE_MIN))),
                param,
                count,
                mass,
            )
            for arrays, param, mass in zip(
                zip(logits.numpy(), maxima.numpy(), best.numpy(), strict=True),
                params,
                masses,
                strict=True,
            )
        ]
        return _narrowed(heads, places, count, words_dense)


# --- heads and floors -------------------------------------------------------------------------


def _column_maxima(logits: Tensor) -> Tensor:
    """Return the maxima [N, W] of the folded logits [N, V]; the last fold may be cut short."""
    size = logits.shape[1]
    if size < _FOLDED_MIN:
        return logits
    width = -(-size // _FOLDS)
    folds = size // width
    maxima = logits[:, : folds * width].unflatten(1, (folds, width)).amax(dim=1)
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
        row
        for row, param in enumerate(params)
        if param.top_p < 1.0 and not 0 < param.top_k < width
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


def _head(row: _Row, param: SamplingParams, count: int, mass: float | None) -> _Head:
    top_k = param.top_k if param.top_k < len(row.logits) else 0
    floor = float(np.float32(math.log(param.min_p))) if param.min_p else LOGIT_MIN
    some = row.logits if top_k > len(row.maxima) else row.maxima
    some = _best_of(some, max(_HEAD, top_k, count))
    cut = row.below(float(some.min()))
    if top_k:
        tokens = row.from_cut(cut)
        return _kept(row, tokens, cut, max(floor, _top_k_floor(tokens, top_k, param.top_p)))
    if mass is not None:
        tokens, least = _nucleus(row, row.from_cut(cut), param.top_p, mass)
        return _kept(row, tokens, cut, max(floor, least))
    # No noise lifts a token over `count` others that lead by more than the range of the noise.
    if count <= len(some):
        lead = (_best_of(some, count).min() - row.best) / row.divisor
        floor = max(floor, float(lead) + HOPELESS)
    needed = row.cut_of(floor)
    if needed >= cut:
        return _kept(row, row.from_cut(needed), needed, floor)
    return _kept(row, row.from_cut(cut), cut, floor, closed=False)


def _best_of(values: Floats, count: int) -> Floats:
    """Return the `count` largest values, or all there are, in no order."""
    start = max(0, len(values) - count)
    return np.partition(values, start)[start:]


def _kept(row: _Row, tokens: Shortlist, cut: float, floor: float, closed: bool = True) -> _Head:
    closed = closed or len(tokens.ids) == len(row.logits)
    kept = tokens.scaled >= np.float32(floor)
    return _Head(row, Shortlist(tokens.ids[kept], tokens.scaled[kept]), cut, floor, closed)


def _top_k_floor(tokens: Shortlist, top_k: int, top_p: float) -> float:
    """Return the least of the `top_k` best scaled logits that top-p keeps."""
    scaled = tokens.scaled
    if len(scaled) > top_k:  # otherwise the others are all -inf
        scaled = scaled[scaled >= _best_of(scaled, top_k).min()]
    if top_p < 1.0:
        ordered, before = _descending(scaled)
        return float(ordered[_nucleus_size(before, top_p * _mass(scaled)) - 1])
    return float(scaled.min())


def _nucleus(row: _Row, tokens: Shortlist, top_p: float, mass: float) -> tuple[Shortlist, float]:
    """Return tokens that hold the whole nucleus, and its least scaled logit."""
    ordered, before = _descending(tokens.scaled)
    most = _nucleus_size(before, top_p * mass * (1.0 + _MASS_ERROR))
    if ordered[most - 1] == ordered[-1] and len(ordered) < len(row.logits):  # it may go on below
        # Everything below this weighs, all together, less than the share that top-p drops: so the
        # nucleus ends above, and only what lies above has to be sorted.
        share = (1.0 - top_p) * (1.0 - _MASS_ERROR) * mass / len(row.logits)
        tokens = row.from_cut(row.cut_of(math.log(share) - 1e-3))
        ordered, before = _descending(tokens.scaled)
        most = _nucleus_size(before, top_p * mass * (1.0 + _MASS_ERROR))
    if _nucleus_size(before, top_p * mass * (1.0 - _MASS_ERROR)) != most:
        exact = _mass((row.logits - row.best) / row.divisor)
        most = _nucleus_size(before, top_p * exact)
    return tokens, float(ordered[most - 1])


def _descending(scaled: Floats) -> tuple[Floats, Scores]:
    """Return the logits in descending order, and what weighs before each."""
    ordered = np.sort(scaled)[::-1].copy()  # torch takes no negative strides
    weights = torch.from_numpy(ordered).double().exp_().numpy()
    return ordered, np.cumsum(weights) - weights


def _nucleus_size(before: Scores, share: float) -> int:
    return max(1, int(np.count_nonzero(before < share)))


def _mass(scaled: Floats) -> float:
    return float(torch.from_numpy(scaled).double().exp_().sum())


# --- noise ------------------------------------------------------------------------------------


def _narrowed(
    heads: Sequence[_Head],
    places: Sequence[Place],
    count: int,
    words_dense: Callable[[int, int, int], NDArray[np.uint32]],
) -> list[Shortlist]:
    """Return the tokens that are worth their exact scores."""
    lists = [head.tokens for head in heads]
    some: list[int] = []
    words: dict[Place, NDArray[np.uint32]] = {}  # siblings in a tree share their noise
    for index, (head, place) in enumerate(zip(heads, places, strict=True)):
        held, size = len(head.tokens.ids), len(head.row.logits)
        if held > max(_HEAD_MAX, size * _HEAD_SHARE):
            if place not in words:
                words[place] = words_dense(*place, size)
            lists[index] = _contenders(head, words[place], count)
        elif held > _FEW or not head.closed:
            some.append(index)
    if not some:
        return lists
    siblings = Counter(places[index] for index in some if not heads[index].closed)
    lanes: dict[Place, list[NDArray[np.uint64]]] = {}
    scores = _scores([lists[index] for index in some], [places[index] for index in some])
    for index, head_scores in zip(some, scores, strict=True):
        head, place = heads[index], places[index]
        tokens, bound = _best(lists[index], head_scores, count)
        if not head.closed:
            if siblings[place] >= _SIBLINGS_MIN and place not in lanes:
                lanes[place] = words_blocks_numpy(*place, _all_blocks(len(head.row.logits)))
            tail, tail_scores = _tail(head, bound, place, lanes.get(place))
            if len(tail.ids):
                both = Shortlist(
                    np.concatenate([lists[index].ids, tail.ids]),
                    np.concatenate([lists[index].scaled, tail.scaled]),
                )
                tokens, _ = _best(both, np.concatenate([head_scores, tail_scores]), count)
        lists[index] = tokens
    return lists


def _scores(lists: Sequence[Shortlist], places: Sequence[Place]) -> list[Scores]:
    """Return the perturbed scores of each list's tokens, within `_SCORE_ERROR`."""
    sizes = [len(tokens.ids) for tokens in lists]
    bits, positions = (np.repeat(words, sizes) for words in np.array(places).T)
    ids = np.concatenate([tokens.ids for tokens in lists])
    scores = gumbel_each_numpy(bits, positions, ids)
    scores += np.concatenate([tokens.scaled for tokens in lists])
    return np.split(scores, np.cumsum(sizes)[:-1])


def _best(tokens: Shortlist, scores: Scores, count: int) -> tuple[Shortlist, float]:
    """Return the tokens with the `count` best scores, ascending, and the least such score."""
    bound = -math.inf
    if len(scores) >= count:
        bound = float(np.partition(scores, len(scores) - count)[len(scores) - count])
    kept = np.flatnonzero(scores >= bound - _SCORE_ERROR)
    kept = kept[np.argsort(tokens.ids[kept])]
    return Shortlist(tokens.ids[kept], tokens.scaled[kept]), bound


def _all_blocks(size: int) -> Ids:
    return np.arange(-(-size // LANES))


def _tail(
    head: _Head, bound: float, place: Place, lanes: list[NDArray[np.uint64]] | None
) -> tuple[Shortlist, Scores]:
    """Return the tokens below an open head whose scores may reach the bound, and the scores.

    `lanes` are the words of the whole vocabulary, if they are known.
    """
    row, size = head.row, len(head.row.logits)
    top = np.float32(max(head.cut, LOGIT_MIN))
    cut = row.cut_of(max(head.floor, bound - GUMBEL_MAX - _ROUNDING))
    least = np.float32(max(cut, LOGIT_MIN))
    if lanes is None:
        reaching = np.empty(-(-size // LANES) * LANES, dtype=np.bool_)
        reaching[size:] = False
        np.greater_equal(row.logits, least, out=reaching[:size])
        blocks = np.flatnonzero(reaching.view(np.uint32) != 0)
        if len(blocks) > _BLOCKS_SHARE * size / LANES:
            blocks = _all_blocks(size)
        lanes = words_blocks_numpy(*place, blocks)
    else:
        blocks = _all_blocks(size)
    # The noise that a token needs even if its logit is as high as one below the head can be.
    needed = bound - float((top - row.best) / row.divisor)
    word = np.uint64(least_word(needed - _ROUNDING))
    hits = [np.flatnonzero(lane >= word) for lane in lanes]
    words = np.concatenate([lane[hit] for lane, hit in zip(lanes, hits, strict=True)])
    ids = np.concatenate([blocks[hit] * LANES + lane for lane, hit in enumerate(hits)])
    values = row.logits[np.minimum(ids, size - 1)]
    kept = (ids < size) & (values >= least) & (values < top)
    ids, words = ids[kept], words[kept]
    tokens = Shortlist(ids, row.scaled(ids))
    kept = tokens.scaled >= np.float32(head.floor)
    tokens = Shortlist(ids[kept], tokens.scaled[kept])
    return tokens, tokens.scaled + gumbel_of_words_numpy(words[kept])


def _contenders(head: _Head, words: NDArray[np.uint32], count: int) -> Shortlist:
    """Return the tokens of a row that may be among the `count` best, with few logarithms.

    logit + G = -log(-log(u) / weight) with weight = exp(logit): the best have the smallest ratio
    -log(u) / weight. Since -log(u) >= 1 - u, the ratio (1 - u) / weight, which takes no logarithm,
    is never larger: who exceeds with it the true ratios of any `count` tokens is beaten by them.
    Weights are relative to the `count`-th best logit, so that those of contenders cannot underflow;
    if they overflow, their ratio is 0 and they pass.
    """
    tokens = head.tokens
    if not head.closed:
        everything = head.row.from_cut(head.row.cut_of(head.floor))
        tokens = _kept(head.row, everything, head.cut, head.floor).tokens
    lead = _best_of(tokens.scaled, count).min()
    weights = np.exp(tokens.scaled - lead)
    buckets = words[tokens.ids] >> np.uint32(32 - UNIFORM_BITS)
    misses = (_BUCKETS - buckets).astype(np.float32) - np.float32(0.5)  # (1 - u) * _BUCKETS
    ratios = misses / weights
    best = np.argpartition(ratios, count - 1)[:count]
    uniforms = (buckets[best].astype(np.float64) + 0.5) / float(_BUCKETS)
    limit = float((-np.log(uniforms) / weights[best]).max()) * float(_BUCKETS) * _SLACK
    # The ratio of a hopeless token may be infinite; it must not pass an infinite limit.
    kept = np.flatnonzero(ratios <= min(limit, LOGIT_MAX))
    return Shortlist(tokens.ids[kept], tokens.scaled[kept])
