"""How many guesses a verify step verifies, and whose. Pure: times come in as arguments.

The choice of N (goodput, as in SmartSpec, arXiv 2406.14066, over a token tree): take nodes of all
sessions in the order of their path probability and stop where

    (rows + sum of the chosen nodes' probabilities) / T(rows + N)

is greatest. All prefixes are tried, since T is a staircase on some machines. Draft length is not
a parameter but a result: it falls to zero by itself where verifying more tokens costs more time
than it wins.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from outrider.draft_tree import DraftTree, Node

KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Step sizes, in tokens, at which T is learnt."""

_LOGPROB_MAX = math.log(0.99)

_DURATION_MIN_S = 1e-6
"""A clock may stand still for a tiny step; T is divided by."""

_OUTLIER = 2.0
"""A sample counts at most as this multiple of what was expected: one hiccup is forgotten."""


class StepTimes:
    """T(N): seconds of a step that computes N tokens, learnt while running.

    Decayed means at the knots under a monotone envelope, linear in between, so that one slow
    sample neither lasts nor makes a larger step look cheaper than a smaller one.
    """

    def __init__(self, *, decay: float = 0.1) -> None:
        self._decay = decay
        self._means: dict[int, float] = {}
        self._curve: list[tuple[int, float]] = []

    def observe(self, tokens: int, duration_s: float) -> None:
        """Learn from one step of at least one token."""
        duration_s = max(duration_s, _DURATION_MIN_S)
        knot = min(KNOTS, key=lambda size: abs(math.log(size / tokens)))
        # Moved to the knot along the present curve, so that the knot's neighbours do not blur it.
        if self._curve:
            duration_s *= self.predict(knot) / self.predict(tokens)
        mean = self._means.get(knot)
        if mean is None:
            self._means[knot] = duration_s
        else:
            sample = min(duration_s, mean * _OUTLIER)
            self._means[knot] = mean + self._decay * (sample - mean)
        highest = 0.0
        self._curve = []
        for size in sorted(self._means):
            highest = max(highest, self._means[size])
            self._curve.append((size, highest))

    def predict(self, tokens: int) -> float:
        """Expected seconds; 1.0 for every size while nothing was observed."""
        if not self._curve:
            return 1.0
        index = bisect.bisect_left(self._curve, (tokens, -1.0))
        if index == 0:
            return self._curve[0][1]
        if index == len(self._curve):
            size, duration_s = self._curve[-1]
            # Beyond what was seen, compute grows in proportion: never optimistic about it.
            return duration_s * max(1.0, tokens / size)
        (low, low_s), (high, high_s) = self._curve[index - 1], self._curve[index]
        return low_s + (high_s - low_s) * (tokens - low) / (high - low)


@dataclass(slots=True)
class Calibration:
    """Shifts one source's estimates to what its guesses turn out to be worth.

    Stochastic approximation (Robbins and Monro, 1951) on shadow scores, chosen or not: the shift
    settles where calibrated claims and true acceptance agree on average. A source that claims 0.9
    and is always wrong is soon not worth a token of any step.
    """

    shift: float = 0.0
    """Added to each log-probability."""
    rate: float = 0.15
    shift_min: float = -6.0
    """Kept within reach, so that a source that turns honest is believed again."""

    def observe(self, calibrated_logprob: float, accepted: bool) -> None:
        """Learn from one guess whose parent was committed."""
        error = float(accepted) - math.exp(calibrated_logprob)
        self.shift = min(1.0, max(self.shift_min, self.shift + self.rate * error))

    def apply(self, accept_logprob: float) -> float:
        """Shifted log-probability, at most that of 0.99."""
        return min(accept_logprob + self.shift, _LOGPROB_MAX)


@dataclass(frozen=True, slots=True)
class Choice:
    """The nodes that a step verifies, by session in the order given, parents first."""

    nodes: tuple[tuple[Node, ...], ...]
    expected_tokens: float = field(compare=False)


def choose_nodes(
    trees: Sequence[DraftTree],
    depths_max: Sequence[int],
    times: StepTimes,
    *,
    other_tokens: int,
    nodes_max: int,
) -> Choice:
    """Choose the nodes of one step.

    `depths_max[i]` is how many nodes deep session i can use guesses (tokens left, less one);
    `other_tokens` is what the step computes besides (prefill).
    """
    rows = len(trees)
    ranked = heapq.merge(
        *(_candidates(i, tree, depths_max[i]) for i, tree in enumerate(trees)),
        key=lambda candidate: -candidate[0],
    )
    chosen: list[tuple[int, Node]] = []
    expected = float(rows)
    best_count, best_expected = 0, expected
    best_goodput = expected / times.predict(rows + other_tokens)
    for logprob, index, node in ranked:
        if len(chosen) == nodes_max:
            break
        chosen.append((index, node))
        expected += math.exp(logprob)
        goodput = expected / times.predict(rows + other_tokens + len(chosen))
        if goodput > best_goodput:
            best_goodput, best_count, best_expected = goodput, len(chosen), expected
    by_session: list[list[Node]] = [[] for _ in trees]
    for index, node in chosen[:best_count]:
        by_session[index].append(node)
    return Choice(tuple(tuple(nodes) for nodes in by_session), best_expected)


def _candidates(index: int, tree: DraftTree, depth_max: int) -> Iterator[tuple[float, int, Node]]:
    deepest = tree.root.position + depth_max
    for logprob, node in tree.ranked():
        if node.position <= deepest:
            yield logprob, index, node
