"""The one rule: token = argmax over v of target_logprob(v) + G(seed, position, v).

Processing follows the warpers of transformers (temperature, top-k, top-p, min-p, in that order).
Each of those filters keeps the tokens whose logit reaches some threshold, so together they are one
*floor* per row. That makes them independent of how a sort breaks ties: tokens equal to the floor
are all kept (transformers does so for top-k and min-p; for top-p it cuts between equal tokens in an
order that differs between devices).

- Logits are scaled in float32: (logit - best logit) / temperature, so at most 0 and 0 for the best.
  They differ from log-probabilities by a constant per row, which moves no argmax and is left out.
- Scores are float64: scaled logit + G. Equal scores: the lowest id wins.
- Masses for top-p are float64; a token is kept while the mass before it is below top_p.
- A token further than GUMBEL_MAX - GUMBEL_MIN (20.2) below the best is skipped: no noise could make
  it win. On a CPU this, with the filters, often leaves few tokens to hash, and where it does not,
  an exact test of the hashed words leaves few logarithms (`_contenders`). On a GPU everything is
  computed, since counting the survivors would mean waiting for the device.

Logits that are no numbers must not spoil other rows: NaN counts as -inf, +inf as the largest float,
and a row without any finite logit as flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.domain import SamplingParams
from outrider.model.noise import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    UNIFORM_BITS,
    gumbel_dense_torch,
    gumbel_torch,
    on_cpu,
    seed_bits,
    words_dense_numpy,
)

ACCEPT_LOGPROB_FLOOR = -100.0
"""`rank_candidates` gives this estimate to entries that are no candidates: drop what is not above
it."""

MARGIN_CANDIDATES = 8
"""Candidates over which a sampled estimate is normalised, however few are asked for."""

SCORE_FLOOR = torch.finfo(torch.float64).min
"""Score of entries of `rank_candidates` that are no candidates."""

# The slack is there because the bound is compared in float32.
_HOPELESS = GUMBEL_MIN - GUMBEL_MAX - 1e-3
_TEMPERATURE_MIN = float(torch.finfo(torch.float32).tiny)
# Up to this many survivors, hashing one by one is cheaper than the whole vocabulary, where one
# counter serves four tokens.
_SPARSE_SHARE = 1 / 12
_SPARSE_MIN = 512
# Rows hashed at a time on a GPU: bounds the memory, 8 bytes per token of the vocabulary, times ten.
_DENSE_ROWS = 32
_BUCKETS = np.uint32(1 << UNIFORM_BITS)
# More than what float32 can lose in a quotient.
_SLACK = 1.0 + 1e-5
_LOGIT_MAX = float(torch.finfo(torch.float32).max)
_LOGIT_MIN = -_LOGIT_MAX


def sample_nodes(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """Return the target's sample at each of N tree nodes.

    `logits` [N, V] of any float type, on any device; `params`, `seeds` (uint64) and `positions`
    (absolute position of the token to be sampled) have one entry per row.
    """
    logits = _repaired(logits)
    sampled = [row for row, param in enumerate(params) if not param.greedy]
    if not sampled:
        return logits.argmax(dim=-1).tolist()
    if len(sampled) == len(params):
        return _sample(logits, params, seeds, positions).tolist()
    tokens = logits.argmax(dim=-1)
    index = torch.tensor(sampled, device=logits.device)
    tokens[index] = _sample(logits[index], *_picked(sampled, params, seeds, positions))
    return tokens.tolist()


def rank_candidates(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a drafter's best guesses at each of N nodes: tokens, scores and estimates.

    Arguments as for `sample_nodes`. All results are [N, count], best first, equal scores by id:

    - tokens, int64;
    - scores, float64: greedy rows the draft's log-probability, sampled rows the perturbed
      log-probability up to a constant of the row;
    - accept_logprobs, float32 in [ACCEPT_LOGPROB_FLOOR, 0]: a first estimate of the probability
      that the target's sample is this token, to be calibrated by the caller. Greedy rows: the
      draft's log-probability. Sampled rows: log-softmax of the scores over the best few
      (`MARGIN_CANDIDATES`), that is the perturbed margin; the draft's probability would say nearly
      nothing, since the noise is known.

    Where filters leave fewer than `count` tokens, the rest has `ACCEPT_LOGPROB_FLOOR` as its
    estimate, `SCORE_FLOOR` as its score and 0 as its token.
    """
    logits = _repaired(logits)
    shape = (len(params), count)
    tokens = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    scores = torch.full(shape, SCORE_FLOOR, dtype=torch.float64, device=logits.device)
    estimates = torch.full(shape, ACCEPT_LOGPROB_FLOOR, device=logits.device)
    for greedy in (True, False):
        rows = [row for row, param in enumerate(params) if param.greedy is greedy]
        if not rows:
            continue
        index = torch.tensor(rows, device=logits.device)
        some = logits if len(rows) == len(params) else logits[index]
        if greedy:
            best, ids = _best(some, count)
            best = (best - some.logsumexp(dim=-1, keepdim=True)).double()
            margins = best
        else:
            width = max(count, MARGIN_CANDIDATES)
            best, ids = _rank_sampled(some, *_picked(rows, params, seeds, positions), width)
            margins = best.log_softmax(dim=-1)
        kept = min(count, best.shape[1])
        best, ids, margins = best[:, :kept], ids[:, :kept], margins[:, :kept]
        real = best > -math.inf
        tokens[index, :kept] = ids.where(real, 0)
        scores[index, :kept] = best.where(real, SCORE_FLOOR)
        estimates[index, :kept] = margins.clamp(ACCEPT_LOGPROB_FLOOR, 0.0).float()
    return tokens, scores, estimates


def target_logprobs(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return the processed log-probabilities [N, V], float64; -inf where filtered.

    The plain definition, one row after the other, with a full sort: what the fast path is tested
    against. Greedy rows are processed as at temperature 1, which leaves their argmax alone.
    """
    logits = _repaired(logits)
    rows = []
    for row, param in zip(logits, params, strict=True):
        temperature = 1.0 if param.greedy else max(param.temperature, _TEMPERATURE_MIN)
        values = (row - row.max()) / torch.tensor(temperature, dtype=torch.float32)
        if 0 < param.top_k < len(values):
            kth = values.sort(descending=True).values[param.top_k - 1]
            values = values.masked_fill(values < kth, -math.inf)
        if param.top_p < 1.0:
            ordered = values.sort(descending=True).values
            probabilities = ordered.double().softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            least = ordered[int((before < param.top_p).sum().clamp(min=1)) - 1]
            values = values.masked_fill(values < least, -math.inf)
        if param.min_p > 0.0:
            values = values.masked_fill(values < math.log(param.min_p), -math.inf)
        rows.append(values.double().log_softmax(dim=-1))
    return torch.stack(rows)


# --- processing -------------------------------------------------------------------------------


def _repaired(logits: Tensor) -> Tensor:
    """Return logits as float32 [N, V], each row with at least one finite value and no NaN."""
    logits = logits.detach().float()
    best = logits.amax(dim=-1)  # NaN if any logit is
    if bool(best.isfinite().all()):
        return logits
    logits = logits.nan_to_num(nan=-math.inf, neginf=-math.inf)
    empty = logits.amax(dim=-1, keepdim=True) == -math.inf
    return logits.masked_fill(empty, 0.0)


def _scaled(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return (logit - best) / temperature, float32 [N, V]: at most 0, and 0 for the best."""
    # Subtracting first lets a tiny temperature give -inf, never inf - inf.
    temperatures = [max(param.temperature, _TEMPERATURE_MIN) for param in params]
    divisors = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(divisors[:, None])


def _floors(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
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
            least = _nucleus_floors(some, least, top_p)
        floors[index] = torch.maximum(floors[index], least)
    return floors


def _nucleus_floors(scaled: Tensor, least: Tensor, top_p: float) -> Tensor:
    """Return per row the least logit [N] of the top-p nucleus of the logits from `least` [N] on."""
    if not on_cpu(scaled):
        ordered = scaled.masked_fill(scaled < least[:, None], -math.inf)
        ordered = ordered.sort(dim=-1, descending=True).values
        return _nucleus_floor(ordered, ordered.double().exp().sum(dim=-1, keepdim=True), top_p)
    floors = []
    # Row by row, since the float64 weights of one row just fit the cache.
    for row, bound in zip(scaled, least.tolist(), strict=True):
        values = row.numpy()
        if bound > -math.inf:
            values = values[values >= bound]
        mass = torch.from_numpy(values).double().exp_().sum(dim=-1, keepdim=True)
        # Everything below this weighs, all together, less than the share that top-p drops: so the
        # nucleus ends above, and only what lies above has to be sorted.
        tail = math.log((1.0 - top_p) * float(mass) / len(values)) - 1e-3
        # numpy sorts with vector instructions, ten times as fast as torch does on a CPU.
        ordered = torch.from_numpy(np.sort(values[values >= tail])).flip(-1)
        floors.append(_nucleus_floor(ordered, mass, top_p))
    return torch.stack(floors)


def _nucleus_floor(ordered: Tensor, mass: Tensor, top_p: float) -> Tensor:
    """Return the last of the descending logits [..., M] before which less than top_p weighs."""
    weights = ordered.double().exp()
    before = weights.cumsum(dim=-1) - weights
    kept = (before < top_p * mass).sum(dim=-1, keepdim=True).clamp(min=1)
    return ordered.gather(-1, kept - 1).squeeze(-1)


# --- choosing ---------------------------------------------------------------------------------


def _sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Return the tokens [N] with the best perturbed scores; no row is greedy."""
    scaled = _scaled(logits, params)
    floors, leads = _floors(scaled, params), scaled.new_zeros(len(params))
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for rows, scores, ids in _perturbed(scaled, floors, leads, seeds, positions, 1):
        # Ids ascend, and argmax returns the first of equals: the lowest id wins.
        best = scores.argmax(dim=-1, keepdim=True)
        tokens[rows] = ids.gather(-1, best).squeeze(-1)
    return tokens


def _rank_sampled(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return the best perturbed scores [N, count], -inf where there are fewer, and their ids."""
    scaled = _scaled(logits, params)
    count = min(count, scaled.shape[1])
    floors, leads = _floors(scaled, params), scaled.topk(count, dim=-1).values[:, -1]
    best = scaled.new_full((len(params), count), -math.inf, dtype=torch.float64)
    tokens = torch.zeros((len(params), count), dtype=torch.int64, device=logits.device)
    for rows, scores, ids in _perturbed(scaled, floors, leads, seeds, positions, count):
        values, columns = _best(scores, count)
        best[rows, : values.shape[1]] = values
        tokens[rows, : values.shape[1]] = ids.gather(-1, columns)
    return best, tokens


def _perturbed(
    scaled: Tensor,
    floors: Tensor,
    leads: Tensor,
    seeds: Sequence[int],
    positions: Sequence[int],
    count: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows [n], scores float64 [n, M] and ascending ids [n, M], until all rows are covered.

    Scores are scaled logit + noise where the scaled logit [N, V] reaches its row's floor [N], and
    -inf elsewhere. `leads` [N] are the `count`-th best scaled logits. The `count` best scores of
    each row are among those yielded; others may be missing.
    """
    device, width = scaled.device, scaled.shape[1]
    sessions = torch.tensor([seed_bits(seed) for seed in seeds], device=device)
    places = torch.tensor(positions, device=device)
    # No noise lifts a token over `count` others that lead by more than the range of the noise.
    leads = leads.clamp(min=_LOGIT_MIN)
    floors = torch.maximum(floors, leads + _HOPELESS).clamp(min=_LOGIT_MIN)
    kept = scaled >= floors[:, None]
    if on_cpu(scaled):
        kept = _narrowed(scaled, kept, leads, sessions, places, count)
        ids, real = _padded(kept)
        noise = gumbel_torch(sessions[:, None], places[:, None], ids)
        scores = noise.add_(scaled.gather(-1, ids)).masked_fill_(~real, -math.inf)
        yield torch.arange(len(seeds)), scores, ids
        return
    ids = torch.arange(width, device=device)
    for start in range(0, len(seeds), _DENSE_ROWS):
        rows = torch.arange(start, min(start + _DENSE_ROWS, len(seeds)), device=device)
        noise = gumbel_dense_torch(sessions[rows], places[rows], width)
        scores = noise.add_(scaled[rows]).masked_fill_(~kept[rows], -math.inf)
        yield rows, scores, ids.expand(len(rows), -1)


def _narrowed(
    scaled: Tensor, kept: Tensor, leads: Tensor, sessions: Tensor, places: Tensor, count: int
) -> Tensor:
    """Return `kept` [N, V] without tokens that cannot be among the `count` best; CPU only."""
    width = scaled.shape[1]
    many = kept.sum(dim=-1) > max(_SPARSE_MIN, width * _SPARSE_SHARE)
    words: dict[tuple[int, int], NDArray[np.uint32]] = {}
    for row in many.nonzero().squeeze(-1).tolist():
        place = (int(sessions[row]), int(places[row]))
        if place not in words:  # siblings in a tree share their noise
            words[place] = words_dense_numpy(*place, width)
        weights = (scaled[row] - leads[row]).exp_().mul_(kept[row]).numpy()
        kept[row] = torch.from_numpy(_contenders(weights, words[place], count))
    return kept


def _contenders(
    weights: NDArray[np.float32], words: NDArray[np.uint32], count: int
) -> NDArray[np.bool_]:
    """Return which tokens [V] may be among the `count` best; filtered ones have weight 0.

    logit + G = -log(-log(u) / weight) with weight = exp(logit): the best have the smallest ratio
    -log(u) / weight. Since -log(u) >= 1 - u, the ratio (1 - u) / weight, which takes no logarithm,
    is never larger: who exceeds with it the true ratios of any `count` tokens is beaten by them.
    Weights are relative to the `count`-th best logit, so that those of contenders cannot underflow;
    if they overflow, their ratio is 0 and they pass.
    """
    buckets = words >> np.uint32(32 - UNIFORM_BITS)
    misses = (_BUCKETS - buckets).astype(np.float32) - np.float32(0.5)  # (1 - u) * _BUCKETS
    with np.errstate(divide="ignore", over="ignore"):
        ratios = misses / weights
        if count == 1:
            best = np.array([ratios.argmin()])
        else:
            best = np.argpartition(ratios, count - 1)[:count]
        uniforms = (buckets[best].astype(np.float64) + 0.5) / float(_BUCKETS)
        limit = float((-np.log(uniforms) / weights[best]).max()) * float(_BUCKETS) * _SLACK
    # A filtered token's ratio is infinite; it must not pass an infinite limit.
    return np.asarray(ratios <= min(limit, _LOGIT_MAX))


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best scores and their columns, [N, at most count]: descending, ties by column.

    Where a row has fewer scores above -inf, the rest is -inf. `topk` alone would not do: it
    promises nothing about which of equal scores it takes.
    """
    count = min(count, scores.shape[1])
    values, columns = scores.topk(min(count + 1, scores.shape[1]), dim=-1)
    equal = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -math.inf)
    if not bool(equal.any()):
        return values[:, :count], columns[:, :count]
    least = values[:, count - 1 : count]
    columns, real = _padded((scores >= least) & (scores > -math.inf))
    values = scores.gather(-1, columns).masked_fill_(~real, -math.inf)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], columns.gather(-1, order)[:, :count]


def _padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns [N, M] that `mask` [N, V] sets, ascending, and which of them are real.

    M is the largest count of a row, at least 1; rows with fewer are filled up with column 0.
    """
    if on_cpu(mask):  # numpy finds them three times as fast
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    else:
        flat = mask.flatten().nonzero().squeeze(-1)
    rows = flat // mask.shape[1]
    counts = rows.bincount(minlength=len(mask))
    width = max(1, int(counts.max()))
    starts = counts.cumsum(dim=-1) - counts
    slots = torch.arange(len(rows), device=mask.device) - starts[rows]
    padded = flat.new_zeros((len(mask), width))
    padded[rows, slots] = flat - rows * mask.shape[1]
    return padded, torch.arange(width, device=mask.device) < counts[:, None]


def _picked(
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> tuple[list[SamplingParams], list[int], list[int]]:
    """Return the entries of `rows`."""
    return [params[r] for r in rows], [seeds[r] for r in rows], [positions[r] for r in rows]
