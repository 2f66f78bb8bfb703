"""Which guesses a simulated verify step verifies. Pure.

The choice of N is the verifier's (goodput, as in SmartSpec, arXiv 2406.14066, over token trees),
written anew, since services never import each other, and without its margins: here T is known.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence

from orchestrator.planner.simulated_tree import Node, SessionTree


def choose_nodes(
    sessions: Sequence[SessionTree], step_s: Sequence[float], nodes_max: int
) -> tuple[list[Node], float]:
    """Choose nodes, parents first, and say how many tokens the step will commit by expectation.

    `step_s[n]` is the duration of a step of n tokens, for n up to sessions + nodes_max. Nodes are
    taken by path probability over all sessions, as many as maximise (rows + sum of their
    probabilities) / T(tokens); all numbers are tried, since T may be a staircase.
    """
    rows = len(sessions)
    ticket = itertools.count()
    heap = [
        (cost, next(ticket), session, node)
        for session in sessions
        for cost, node in session.candidates(session.root)
    ]
    heapq.heapify(heap)
    best_goodput, best_count, best_expected = rows / step_s[rows], 0, float(rows)
    expected = float(rows)
    chosen: list[Node] = []
    while heap and len(chosen) < nodes_max:
        cost, _, session, node = heapq.heappop(heap)
        probability = math.exp(-cost)
        left = nodes_max - len(chosen)
        # Not even if all that may follow were as probable, and free.
        if expected + probability * left <= best_goodput * step_s[rows + len(chosen) + 1]:
            break
        chosen.append(node)
        expected += probability
        goodput = expected / step_s[rows + len(chosen)]
        if goodput > best_goodput:
            best_goodput, best_count, best_expected = goodput, len(chosen), expected
        for child_cost, child in session.candidates(node):
            heapq.heappush(heap, (child_cost, next(ticket), session, child))
    return chosen[:best_count], best_expected
