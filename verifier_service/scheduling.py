"""How many guesses a verify step verifies, and whose. Pure.

The choice of N (goodput, as in SmartSpec, arXiv 2406.14066, over a token tree): take nodes of all
sessions in the order of their path probability and stop where

    (rows + sum of the chosen nodes' probabilities) / T(rows + N)

is greatest. All prefixes are tried, since T is a staircase on some machines. Draft length is not
a parameter but a result: it falls to zero by itself where verifying more tokens costs more time
than it wins. What prompts take in the same step is left out of T: they take it in any case, and
beside it the dearest guess would look cheap, for which the prompts then wait.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.draft_tree import DraftTree, Node
from verifier_service.step_times import KNOTS, StepTimes

__all__ = ["GAIN_MIN", "KNOTS", "Choice", "StepTimes", "choose_nodes"]

GAIN_MIN = 0.01
"""A choice must promise so much more goodput than none: T is not known any better, and planning
guesses costs time outside of the step."""

_PATH_LOGPROB_MIN = math.log(1.0 / 256.0)
"""Nodes less probable than this are not verified even where tokens are free."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The nodes that a step verifies, by session in the order given, parents first."""

    nodes: tuple[tuple[Node, ...], ...]
    expected_tokens: float = field(compare=False)
    pay_min: float = field(default=0.0, compare=False)
    """If no node is more probable than this, none is worth verifying in such a step, whatever
    their number; infinite if the step has no room for nodes."""


def choose_nodes(
    trees: Sequence[DraftTree],
    depths_max: Sequence[int],
    times: StepTimes,
    *,
    other_tokens: int,
    nodes_max: int,
    kv_tokens: int | None = None,
) -> Choice:
    """Choose the nodes of one step.

    `depths_max[i]` is how many nodes deep session i can use guesses (tokens left, less one);
    `other_tokens` is what the step computes besides (prefill); `kv_tokens` what all rows attend
    to, by default as much as in the last step.
    """
    rows = len(trees)
    by_session: list[list[Node]] = [[] for _ in trees]
    if not rows:
        return Choice((), 0.0)
    durations_s = times.predict_all(
        rows + other_tokens, nodes_max, kv_tokens=kv_tokens, prefill_tokens=other_tokens
    )
    if other_tokens:
        prompts_s = max(0.0, durations_s[0] - times.predict(rows, kv_tokens=kv_tokens))
        durations_s = [duration_s - prompts_s for duration_s in durations_s]
    best_goodput = (1.0 + GAIN_MIN) * rows / durations_s[0]
    pay_min = max(0.0, _pay_min(rows, best_goodput, durations_s))
    heap = _first_candidates(trees, depths_max)
    best_count, best_expected, expected = 0, float(rows), float(rows)
    if not heap or math.exp(-heap[0][0]) < pay_min:
        return Choice(tuple(() for _ in trees), expected, pay_min)
    arrival = len(heap)
    chosen: list[tuple[int, Node]] = []
    while heap and len(chosen) < nodes_max:
        negated, _, index, node = heapq.heappop(heap)
        count = len(chosen) + 1
        probability = math.exp(-negated)
        # Not even if all that may follow were as probable, and free.
        if expected + probability * (nodes_max - count + 1) <= best_goodput * durations_s[count]:
            break
        chosen.append((index, node))
        expected += probability
        if expected > best_goodput * durations_s[count]:
            best_goodput = expected / durations_s[count]
            best_count, best_expected = count, expected
        tree = trees[index]
        if node.position < tree.root.position + depths_max[index]:
            for child in node.children.values():
                path_logprob = tree.estimate(child) - negated
                if path_logprob >= _PATH_LOGPROB_MIN:
                    arrival += 1
                    heapq.heappush(heap, (-path_logprob, arrival, index, child))
    for index, node in chosen[:best_count]:
        by_session[index].append(node)
    return Choice(tuple(tuple(nodes) for nodes in by_session), best_expected, pay_min)


def _pay_min(rows: int, goodput: float, durations_s: Sequence[float]) -> float:
    """Least probability with which some number of equally probable nodes reaches a goodput."""
    return min(
        ((goodput * durations_s[count] - rows) / count for count in range(1, len(durations_s))),
        default=math.inf,
    )


def _first_candidates(
    trees: Sequence[DraftTree], depths_max: Sequence[int]
) -> list[tuple[float, int, int, Node]]:
    """A heap of (negated path log-probability, arrival, index of the tree, child of its root)."""
    heap: list[tuple[float, int, int, Node]] = []
    for index, tree in enumerate(trees):
        if depths_max[index] < 1:
            continue
        for child in tree.root.children.values():
            path_logprob = tree.estimate(child)
            if path_logprob >= _PATH_LOGPROB_MIN:
                heap.append((-path_logprob, len(heap), index, child))
    heapq.heapify(heap)
    return heap
