"""Which tokens can win: the rule on a CPU, where looking at few tokens is what makes it fast.

For each row, from cheap to dear, and stopping as soon as nothing is left that could matter:

1. The *head*: the tokens from some logit on, a few dozen. The vocabulary is folded into a matrix,
   and the maxima of its columns say from which logit on (`heads`).
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

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from outrider.domain import SamplingParams
from outrider.model.filters import LOGIT_MAX
from outrider.model.heads import Head, Ids, Scores, Shortlist, best_of, heads_of, kept_head
from outrider.model.noise import (
    GUMBEL_MAX,
    LANES,
    UNIFORM_BITS,
    gumbel_each_numpy,
    gumbel_of_words_numpy,
    least_word,
    words_blocks_numpy,
)

Place = tuple[int, int]
"""Seed (as int64) and position: what the noise depends on besides the token."""

# With so few tokens to hash, finding out which of them to hash does not pay.
_FEW = 64
# From this share on, choosing blocks costs more than hashing them all.
_BLOCKS_SHARE = 0.8
# Rows with the same place from which on hashing everything once is cheaper than each row's blocks.
_SIBLINGS_MIN = 3
# Scores are float64, but two libraries' logarithms may differ in the last place. Noise that is
# needed is known less well, since it is compared with a rounded logit.
_SCORE_ERROR = 1e-9
_NEED_ERROR = 1e-6
_BUCKETS = np.uint32(1 << UNIFORM_BITS)
# More than what float32 can lose in a quotient.
_SLACK = 1.0 + 1e-5


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
    heads = heads_of(logits, params, count)
    # A ratio of weights may be infinite, and is compared as such.
    with np.errstate(over="ignore", divide="ignore"):
        return _narrowed(heads, places, count, words_dense)


def _narrowed(
    heads: Sequence[Head],
    places: Sequence[Place],
    count: int,
    words_dense: Callable[[int, int, int], NDArray[np.uint32]],
) -> list[Shortlist]:
    """Return the tokens that are worth their exact scores."""
    lists = [head.tokens for head in heads]
    some: list[int] = []
    words: dict[Place, NDArray[np.uint32]] = {}  # siblings in a tree share their noise
    for index, (head, place) in enumerate(zip(heads, places, strict=True)):
        if head.row.is_flat(head.tokens):
            if place not in words:
                words[place] = words_dense(*place, len(head.row.logits))
            lists[index] = _contenders(head, words[place], count)
        elif len(head.tokens.ids) > _FEW or not head.closed:
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
    head: Head, bound: float, place: Place, lanes: list[NDArray[np.uint64]] | None
) -> tuple[Shortlist, Scores]:
    """Return the tokens below an open head whose scores may reach the bound, and the scores.

    `lanes` are the words of the whole vocabulary, if they are known.
    """
    row, size = head.row, len(head.row.logits)
    top = row.least(head.cut)
    least = row.least(row.cut_of(max(head.floor, bound - GUMBEL_MAX - _NEED_ERROR)))
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
    needed = bound - row.most_below(head.cut)
    word = np.uint64(least_word(needed - _NEED_ERROR))
    hits = [np.flatnonzero(lane >= word) for lane in lanes]
    words = np.concatenate([lane[hit] for lane, hit in zip(lanes, hits, strict=True)])
    ids = np.concatenate([blocks[hit] * LANES + lane for lane, hit in enumerate(hits)])
    values = row.logits[np.minimum(ids, size - 1)]
    kept = (ids < size) & (values >= least) & (values < top)
    ids, words = ids[kept], words[kept]
    tokens = Shortlist(ids, row.scale(row.logits[ids]))
    kept = tokens.scaled >= np.float32(head.floor)
    tokens = Shortlist(ids[kept], tokens.scaled[kept])
    return tokens, tokens.scaled + gumbel_of_words_numpy(words[kept])


def _contenders(head: Head, words: NDArray[np.uint32], count: int) -> Shortlist:
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
        tokens = kept_head(head.row, everything, head.cut, head.floor).tokens
    lead = best_of(tokens.scaled, count).min()
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
