"""The part of the rule that depends on the path: masks, bias and penalties, node by node.

Applied to a node's logits before temperature and filters, in vLLM's order:

1. the grammar's mask, 2. ids that may not be chosen yet (minimum length), 3. logit bias,
4. repetition penalty (CTRL, arXiv 1909.05858: positive logits divided, others multiplied), over
prompt and output, 5. frequency and 6. presence penalty, over the output.

A node's output is what is committed plus the tree's tokens from below the tip down to the node.
Everything is float32, each operation rounded once, so that CPU and GPU agree.

- Where grammar and minimum length together leave nothing, the grammar wins: its text is complete
  and only an id that ends the output can follow.
- Under a grammar, if the best allowed logit is NaN or infinite, the row's allowed ones are all made
  finite: as long as the mask allows anything, what is sampled is allowed.
- A row of which a mask leaves nothing is all -inf (never NaN); `sample_nodes` takes it as flat.
- Other rows keep what their logits have of NaN and infinities, which the sampler repairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.domain import SamplingParams, TokenLogprobs
from outrider.model.noise import on_cpu

LOGPROB_MIN = -1e30
"""Stands for log-probabilities of -inf, which not every reader of numbers understands."""

# Finite in float32 also after the strongest penalty.
_LOGIT_BOUND = 1e30
_PENALTY_MIN = float(torch.finfo(torch.float32).tiny)
# Rows whose log-probabilities are computed at a time: 16 x 150,000 float32 are 10 MB.
_LOGPROB_ROWS = 16


class History:
    """How often each id occurs in a session's output, and which ids occur in its prompt.

    Grows with the number of different ids; owned by whoever owns the session.
    """

    def __init__(self, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        unique = np.unique(np.asarray(prompt, dtype=np.int64))
        self._ids = unique
        self._counts = np.zeros(len(unique), dtype=np.float32)
        self._slot_of = {token: slot for slot, token in enumerate(unique.tolist())}
        self._size = len(unique)
        self.extend(output)

    def extend(self, output: Sequence[int]) -> None:
        """Count newly committed output."""
        for token in output:
            slot = self._slot_of.get(token)
            if slot is None:
                slot = self._add(token)
            self._counts[slot] += 1.0

    def _add(self, token: int) -> int:
        if self._size == len(self._ids):
            room = max(64, self._size)
            self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        slot = self._size
        self._ids[slot] = token
        self._slot_of[token] = slot
        self._size += 1
        return slot

    def output_count(self, token: int) -> int:
        """How often `token` is in the output."""
        slot = self._slot_of.get(token)
        return 0 if slot is None else int(self._counts[slot])

    def touched(self, *, prompt: bool) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return different ids [M] and their counts in the output [M].

        With `prompt`, ids that only the prompt has are there too, with a count of 0.
        """
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        if prompt:
            return ids, counts
        kept = np.flatnonzero(counts)
        return ids[kept], counts[kept]


@dataclass(frozen=True, slots=True)
class NodeContext:
    """What the processing of one node's logits depends on.

    All ids must lie in the vocabulary, those of `params.logit_bias` too.
    """

    params: SamplingParams
    history: History | None = None
    """Counts of the session; may be None where `params` penalize nothing."""
    path: tuple[int, ...] = ()
    """Tokens from below the tip down to and including the node; empty at the tip."""
    banned: Sequence[int] = ()
    """Ids that may not be chosen here: those that end the output, before its minimum length."""
    allowed: NDArray[np.uint32] | None = None
    """Ids that the grammar allows: id i is bit i % 32 of word i // 32; what is beyond is not."""


def process_logits(logits: Tensor, contexts: Sequence[NodeContext | None]) -> Tensor:
    """Return the processed logits [N, V], float32, of N nodes.

    `logits` [N, V] are of any float type, on any device, and stay as they are. A row whose context
    is None or asks for nothing is left alone; if all are, `logits` itself is returned.
    """
    masked: list[int] = []
    biased: list[int] = []
    banned: list[int] = []
    penalized: list[int] = []
    for row, context in enumerate(contexts):
        if context is None:
            continue
        if context.allowed is not None:
            masked.append(row)
        elif context.banned:
            banned.append(row)
        if context.params.logit_bias:
            biased.append(row)
        if context.params.penalized:
            penalized.append(row)
    if not (masked or biased or banned or penalized):
        return logits
    logits = logits.detach()
    values = logits.float() if logits.dtype != torch.float32 else logits.clone()
    values = values.contiguous()
    flat = values.view(-1)
    if masked:
        _apply_masks(values, masked, [_mask(contexts[row], values.shape[1]) for row in masked])
    if banned:
        starts = [row * values.shape[1] for row in banned]
        pairs = zip(starts, banned, strict=True)
        index = [start + token for start, row in pairs for token in _at(contexts, row).banned]
        flat[torch.tensor(index, device=flat.device)] = -math.inf
    if biased:
        _apply_biases(flat, values.shape[1], biased, contexts)
    if penalized:
        _apply_penalties(flat, values.shape[1], penalized, contexts)
    return values


def processed_reference(logits: Tensor, contexts: Sequence[NodeContext | None]) -> Tensor:
    """Return what `process_logits` returns, by the plain definition: row by row, id by id.

    What the fast path is tested against.
    """
    rows = []
    for row, context in zip(logits.detach().float().cpu(), contexts, strict=True):
        rows.append(row.clone() if context is None else _reference_row(row.clone(), context))
    return torch.stack(rows).to(logits.device)


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    """Return the log-probabilities of `tokens` [N] and of the `tops[i]` best ids of each row.

    `logits` [N, V] are unprocessed, of any float type, on any device. NaN counts as -inf, and no
    log-probability is below `LOGPROB_MIN`. Equal ones are in the order of their ids.
    """
    results: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _LOGPROB_ROWS):
        part = slice(start, start + _LOGPROB_ROWS)
        results += _token_logprobs(logits[part], tokens[part], tops[part])
    return results


def top_candidates(logits: Tensor, count: int) -> list[tuple[int, ...]]:
    """Return the `count` best ids of each row of `logits` [N, V], best first; NaN counts as -inf.

    Equal ones are in any order: what this is for are guesses.
    """
    count = min(count, logits.shape[-1])
    best = logits.nan_to_num(-math.inf, math.inf, -math.inf).topk(count).indices
    return [tuple(row) for row in best.tolist()]


# --- masks and bias ---------------------------------------------------------------------------


def _at(contexts: Sequence[NodeContext | None], row: int) -> NodeContext:
    context = contexts[row]
    assert context is not None, "rows without a context are left alone"
    return context


def _mask(context: NodeContext | None, width: int) -> NDArray[np.uint32]:
    """Return the words [ceil(width / 32)] of what grammar and minimum length allow."""
    assert context is not None
    assert context.allowed is not None
    words = np.zeros((width + 31) // 32, dtype=np.uint32)
    given = context.allowed[: len(words)]
    words[: len(given)] = given
    if width % 32:
        words[-1] &= np.uint32((1 << width % 32) - 1)
    if not context.banned:
        return words
    left = words.copy()
    for token in context.banned:
        left[token // 32] &= ~np.uint32(1 << token % 32)
    return left if left.any() else words


def _apply_masks(values: Tensor, rows: list[int], masks: list[NDArray[np.uint32]]) -> None:
    """Set ids that are not allowed to -inf, in place; repair rows whose best is not finite."""
    index = torch.tensor(rows, device=values.device)
    words = np.stack(masks)
    width = values.shape[1]
    if on_cpu(values):
        bits = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
        allowed = torch.from_numpy(bits[:, :width]).view(torch.bool)
    else:
        shifts = torch.arange(32, dtype=torch.int32, device=values.device)
        packed = torch.from_numpy(words.view(np.int32)).to(values.device)
        allowed = (packed[:, :, None] >> shifts & 1).view(len(rows), -1)[:, :width].bool()
    some = values if len(rows) == len(values) else values[index]
    refused = allowed.logical_not_()
    some.masked_fill_(refused, -math.inf)
    # NaN is the largest of all, and no NaN compares.
    broken = ~(some.amax(dim=-1).abs() <= _LOGIT_BOUND)
    for row in broken.nonzero().squeeze(-1).tolist():
        some[row] = _finite(some[row]).masked_fill(refused[row], -math.inf)
    if some is not values:
        values[index] = some


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(-_LOGIT_BOUND).clamp_(-_LOGIT_BOUND, _LOGIT_BOUND)


def _apply_biases(
    flat: Tensor, width: int, rows: list[int], contexts: Sequence[NodeContext | None]
) -> None:
    index: list[int] = []
    biases: list[float] = []
    for row in rows:
        for token, bias in _at(contexts, row).params.logit_bias:
            index.append(row * width + token)
            biases.append(bias)
    where = torch.tensor(index, device=flat.device)
    flat[where] += torch.tensor(biases, dtype=torch.float32, device=flat.device)


# --- penalties --------------------------------------------------------------------------------


def _apply_penalties(
    flat: Tensor, width: int, rows: list[int], contexts: Sequence[NodeContext | None]
) -> None:
    """Penalize in place what the history and the path of each row touch."""
    given = [_at(contexts, row) for row in rows]
    strengths = torch.tensor(
        [
            (
                max(context.params.repetition_penalty, _PENALTY_MIN),
                context.params.frequency_penalty,
                context.params.presence_penalty,
            )
            for context in given
        ],
        dtype=torch.float32,
        device=flat.device,
    )
    base = _history_entries(width, rows, given, flat.device)
    path = _path_entries(width, rows, given, flat.device)
    # Computed before either is stored: an id of the path may be in the history too, with a lower
    # count, and its value under the higher one is what stays.
    updates = [
        (where, _penalized(flat[where], counts, strengths[owners]))
        for where, counts, owners in (base, path)
    ]
    for (where, _, _), (_, penalized) in zip((base, path), updates, strict=True):
        flat[where] = penalized


def _penalized(values: Tensor, counts: Tensor, strengths: Tensor) -> Tensor:
    """Penalize values [M] of ids seen before, `counts` [M] times in the output."""
    repetition, frequency, presence = strengths.unbind(dim=-1)
    values = torch.where(values > 0, values / repetition, values * repetition)
    return values - frequency * counts - presence * (counts > 0)


def _history_entries(
    width: int, rows: list[int], contexts: Sequence[NodeContext], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return flat indices [M], counts [M] and positions in `rows` [M] of all histories' ids.

    Nodes of a session share its history, which is therefore moved to the device once.
    """
    ids: list[NDArray[np.int64]] = []
    counts: list[NDArray[np.float32]] = []
    known: dict[tuple[int, bool], tuple[int, int]] = {}
    moved = 0
    spans: list[tuple[int, int]] = []
    for context in contexts:
        if context.history is None:
            spans.append((0, 0))
            continue
        prompt = context.params.repetition_penalty != 1.0
        key = (id(context.history), prompt)
        if key not in known:
            some_ids, some_counts = context.history.touched(prompt=prompt)
            ids.append(some_ids)
            counts.append(some_counts)
            known[key] = (moved, len(some_ids))
            moved += len(some_ids)
        spans.append(known[key])
    total = sum(length for _, length in spans)
    all_ids = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *ids])).to(device)
    all_counts = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *counts])).to(device)
    starts, lengths = torch.tensor(spans, device=device).unbind(dim=-1)
    owners = torch.repeat_interleave(lengths, output_size=total)
    shifts = starts - (lengths.cumsum(dim=-1) - lengths)
    source = torch.arange(total, device=device) + shifts[owners]
    bases = torch.tensor(rows, device=device) * width
    return all_ids[source] + bases[owners], all_counts[source], owners


def _path_entries(
    width: int, rows: list[int], contexts: Sequence[NodeContext], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for the ids on the nodes' paths, their counts those of the whole output."""
    where: list[int] = []
    counts: list[int] = []
    owners: list[int] = []
    for owner, (row, context) in enumerate(zip(rows, contexts, strict=True)):
        for token, count in Counter(context.path).items():
            committed = context.history.output_count(token) if context.history else 0
            where.append(row * width + token)
            counts.append(committed + count)
            owners.append(owner)
    return (
        torch.tensor(where, dtype=torch.int64, device=device),
        torch.tensor(counts, dtype=torch.float32, device=device),
        torch.tensor(owners, dtype=torch.int64, device=device),
    )


# --- log-probabilities ------------------------------------------------------------------------


def _token_logprobs(
    logits: Tensor, tokens: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    logits = logits.detach().float().nan_to_num(-_LOGIT_BOUND, _LOGIT_BOUND, -_LOGIT_BOUND)
    values = logits.sub_(logits.logsumexp(dim=-1, keepdim=True)).clamp_(LOGPROB_MIN, 0.0)
    index = torch.tensor(tokens, device=values.device)
    own = values.gather(-1, index[:, None])
    best, ids = _best(values, min(max(tops), values.shape[1]))
    rows = zip(tokens, own.squeeze(-1).tolist(), best.tolist(), ids.tolist(), tops, strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(row_ids[:top], row_best[:top], strict=True)))
        for token, logprob, row_best, row_ids, top in rows
    ]


def _best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best values [N, count] and their ids, equal ones by id.

    `topk` promises nothing about equal values, so where the last one has equals beyond it, they are
    found by looking at the whole row.
    """
    if count == 0:
        return values[:, :0], torch.zeros((len(values), 0), dtype=torch.int64)
    best, ids = values.topk(min(count + 1, values.shape[1]), dim=-1)
    if best.shape[1] > count:
        for row in (best[:, count] == best[:, count - 1]).nonzero().squeeze(-1).tolist():
            equal = (values[row] == best[row, count]).nonzero().squeeze(-1)
            above = int((best[row] > best[row, count]).sum())
            ids[row, above:] = equal[: ids.shape[1] - above]
    ids = ids[:, :count].sort(dim=-1).values
    best, order = values.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(-1, order)


# --- the plain definition ---------------------------------------------------------------------


def _reference_row(row: Tensor, context: NodeContext) -> Tensor:
    width, params = len(row), context.params
    banned = set(context.banned)
    if context.allowed is not None:
        words = context.allowed.tolist()
        allowed = {i for i in range(min(width, 32 * len(words))) if words[i // 32] >> i % 32 & 1}
        banned = (set(range(width)) - allowed) | (banned if allowed - banned else set())
        kept = row[sorted(set(range(width)) - banned)]
        if len(kept) and not bool(kept.max().abs() <= _LOGIT_BOUND):
            row = row.nan_to_num(-_LOGIT_BOUND).clamp(-_LOGIT_BOUND, _LOGIT_BOUND)
    for token in banned:
        row[token] = -math.inf
    for token, bias in params.logit_bias:
        row[token] += bias
    if not params.penalized:
        return row
    ids, counts = context.history.touched(prompt=True) if context.history else ((), ())
    output = Counter({int(i): int(c) for i, c in zip(ids, counts, strict=True)})
    output.update(context.path)
    repetition = max(params.repetition_penalty, _PENALTY_MIN)
    for token, count in output.items():
        row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        row[token] -= torch.tensor(params.frequency_penalty) * count
        row[token] -= params.presence_penalty if count else 0.0
    return row
