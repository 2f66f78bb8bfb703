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
  it win. A CPU carries this thought further and scores but a few tokens of each row (`shortlist`).
  On a GPU everything is computed (`filters`), since counting survivors would mean waiting for it.

Logits that are no numbers must not spoil other rows: NaN counts as -inf, +inf as the largest float,
and a row without any finite logit as flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.domain import SamplingParams
from outrider.model.drawing import can_draw, draw
from outrider.model.filters import (
    LOGIT_MIN,
    TEMPERATURE_MIN,
    filter_floors,
    repaired,
    scale,
)
from outrider.model.heads import HOPELESS, Shortlist
from outrider.model.noise import (
    gumbel_dense_torch,
    gumbel_torch,
    on_cpu,
    seed_bits,
    words_dense_numpy,
)
from outrider.model.shortlist import shortlists

ACCEPT_LOGPROB_FLOOR = -100.0
"""`rank_candidates` gives this estimate to entries that are no candidates: drop what is not above
it."""

MARGIN_CANDIDATES = 8
"""Candidates over which a sampled estimate is normalised, however few are asked for."""

SCORE_FLOOR = torch.finfo(torch.float64).min
"""Score of entries of `rank_candidates` that are no candidates."""

# Rows hashed at a time on a GPU: bounds the memory, 8 bytes per token of the vocabulary, times ten.
_DENSE_ROWS = 32


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
    if not params:
        return []
    if all(param.greedy for param in params):
        best = _finite_best(logits)
        if best is not None:
            return best
    if can_draw(logits):
        drawn = draw(logits, params, seeds, positions, 1)
        drawn_tokens: list[int] = drawn.tokens.squeeze(-1).tolist()
        if drawn.undecided:
            some = _picked(drawn.undecided, params, seeds, positions)
            found = _sample(repaired(logits)[drawn.undecided], *some).tolist()
            for row, token in zip(drawn.undecided, found, strict=True):
                drawn_tokens[row] = token
        return drawn_tokens
    logits = repaired(logits)
    sampled = [row for row, param in enumerate(params) if not param.greedy]
    if len(sampled) == len(params):
        return _sample(logits, params, seeds, positions).tolist()
    if not sampled:
        return _most_probable(logits)
    greedy = [row for row, param in enumerate(params) if param.greedy]
    tokens = dict(zip(greedy, _most_probable(logits[greedy]), strict=True))
    chosen = _sample(logits[sampled], *_picked(sampled, params, seeds, positions))
    tokens |= zip(sampled, chosen.tolist(), strict=True)
    return [tokens[row] for row in range(len(params))]


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
    logits = repaired(logits)
    greedy = [row for row, param in enumerate(params) if param.greedy]
    if len(greedy) == len(params):
        return _rank_greedy(logits, count)
    sampled = [row for row, param in enumerate(params) if not param.greedy]
    width = max(count, MARGIN_CANDIDATES)
    some = logits if len(sampled) == len(params) else logits[sampled]
    best, ids = _rank_sampled(some, *_picked(sampled, params, seeds, positions), width)
    ranked = _guesses(best, ids, best.log_softmax(dim=-1), count)
    if not greedy:
        return ranked
    order = torch.tensor([*greedy, *sampled], device=logits.device).argsort()
    both = zip(_rank_greedy(logits[greedy], count), ranked, strict=True)
    tokens, scores, estimates = (torch.cat(parts)[order] for parts in both)
    return tokens, scores, estimates


def _rank_greedy(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank repaired logits as they are; see `rank_candidates`."""
    best, ids = _best(logits, count)
    logprobs = best - logits.logsumexp(dim=-1, keepdim=True)
    return _guesses(logprobs.double(), ids, logprobs, count)


def _guesses(
    best: Tensor, ids: Tensor, margins: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring ranked scores float64 [N, any], ids and estimates into the form of a result."""
    kept = min(count, best.shape[1])
    best, ids, margins = best[:, :kept], ids[:, :kept], margins[:, :kept]
    real = best > -math.inf
    if not bool(real.all()):
        ids, best = ids.where(real, 0), best.where(real, SCORE_FLOOR)
    estimates = margins.clamp(ACCEPT_LOGPROB_FLOOR, 0.0).float()
    missing = (0, count - kept)
    if kept < count:
        ids, best = pad(ids, missing), pad(best, missing, value=SCORE_FLOOR)
        estimates = pad(estimates, missing, value=ACCEPT_LOGPROB_FLOOR)
    return ids, best, estimates


def target_logprobs(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return the processed log-probabilities [N, V], float64; -inf where filtered.

    The plain definition, one row after the other, with a full sort: what the fast path is tested
    against. Greedy rows are processed as at temperature 1, which leaves their argmax alone.
    """
    logits = repaired(logits)
    rows = []
    for row, param in zip(logits, params, strict=True):
        temperature = 1.0 if param.greedy else max(param.temperature, TEMPERATURE_MIN)
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


# --- choosing ---------------------------------------------------------------------------------


def _finite_best(logits: Tensor) -> list[int] | None:
    """Return the best token of each row, or None if it takes more: a GPU, or no finite best.

    The lowest id of equals. numpy takes a third of an operator's time, and a tenth of it where
    what has to be compared is little. It finds a NaN before anything else.
    """
    if not on_cpu(logits) or logits.dtype != torch.float32:
        return None
    values = logits.detach().numpy()
    best: list[int] = values.argmax(axis=1).tolist()
    finite = all(math.isfinite(values.item(row, token)) for row, token in enumerate(best))
    return best if finite else None


def _most_probable(logits: Tensor) -> list[int]:
    """Return the best token of each row; the lowest id of equals."""
    if on_cpu(logits):  # numpy finds it in a quarter of the time
        return [int(row.argmax()) for row in logits.numpy()]
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def _sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Return the tokens [N] with the best perturbed scores; no row is greedy."""
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for rows, scores, ids in _perturbed(logits, params, seeds, positions, 1):
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
    count = min(count, logits.shape[1])
    if can_draw(logits):
        drawn = draw(logits, params, seeds, positions, count)
        if drawn.undecided:
            some = _picked(drawn.undecided, params, seeds, positions)
            found = _rank_perturbed(logits[drawn.undecided], *some, count)
            drawn.scores[drawn.undecided], drawn.tokens[drawn.undecided] = found
        return drawn.scores, drawn.tokens
    return _rank_perturbed(logits, params, seeds, positions, count)


def _rank_perturbed(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    count: int,
) -> tuple[Tensor, Tensor]:
    """The same for `count` of at most V, without the operator."""
    best = logits.new_full((len(params), count), -math.inf, dtype=torch.float64)
    tokens = torch.zeros((len(params), count), dtype=torch.int64, device=logits.device)
    for rows, scores, ids in _perturbed(logits, params, seeds, positions, count):
        values, columns = _best(scores, count)
        best[rows, : values.shape[1]] = values
        tokens[rows, : values.shape[1]] = ids.gather(-1, columns)
    return best, tokens


def _perturbed(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    count: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows [n], scores float64 [n, M] and ascending ids [n, M], until all rows are covered.

    Scores are scaled logit + noise where the scaled logit passes the filters, and -inf elsewhere.
    The `count` best scores of each row are among those yielded; others may be missing.
    """
    device = logits.device
    places = [(seed_bits(seed), position) for seed, position in zip(seeds, positions, strict=True)]
    sessions, steps = torch.tensor(places, device=device).unbind(1)
    if on_cpu(logits):
        lists = shortlists(logits, params, places, count, words_dense_numpy)
        yield torch.arange(len(lists)), *_scored(lists, sessions, steps)
        return
    scaled = scale(logits, params)
    leads = scaled.topk(count, dim=-1).values[:, -1]
    floors = torch.maximum(filter_floors(scaled, params), leads.clamp(min=LOGIT_MIN) + HOPELESS)
    kept = scaled >= floors.clamp(min=LOGIT_MIN)[:, None]
    ids = torch.arange(logits.shape[1], device=device)
    for start in range(0, len(seeds), _DENSE_ROWS):
        rows = torch.arange(start, min(start + _DENSE_ROWS, len(seeds)), device=device)
        noise = gumbel_dense_torch(sessions[rows], steps[rows], logits.shape[1])
        scores = noise.add_(scaled[rows]).masked_fill_(~kept[rows], -math.inf)
        yield rows, scores, ids.expand(len(rows), -1)


def _scored(lists: Sequence[Shortlist], sessions: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores [N, M] of shortlists, -inf where they are shorter than M, and their ids."""
    width = max(len(tokens.ids) for tokens in lists)
    ids = np.zeros((len(lists), width), dtype=np.int64)
    scores = np.full((len(lists), width), -np.inf)
    for row, tokens in enumerate(lists):
        ids[row, : len(tokens.ids)] = tokens.ids
        scores[row, : len(tokens.ids)] = tokens.scaled
    columns = torch.from_numpy(ids)
    noise = gumbel_torch(sessions[:, None], steps[:, None], columns)
    return noise.add_(torch.from_numpy(scores)), columns


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
