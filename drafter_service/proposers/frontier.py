"""Where a tree can grow next: its unexpanded nodes, most probable first, kept between steps.

Ranking a whole tree anew for each step costs more than everything else in a step with a fast
model. What changes is little: the leaves that were expanded leave, their children come.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable
from typing import TypeAlias

from outrider.draft_tree import DraftTree, Node

Entry: TypeAlias = tuple[float, int, Node]
"""(minus the path log-probability, arrival, node)"""


class Frontier:
    """Unexpanded nodes of one tree as long as its root stays; then another one is needed."""

    def __init__(
        self, tree: DraftTree, expanded: Container[Node], *, logprob_min: float, deepest: int
    ) -> None:
        """Nodes less probable than `logprob_min`, or at positions from `deepest` on, are left."""
        self._root = tree.root
        self._deepest = deepest
        self._logprob_min = logprob_min
        self._heap: list[Entry] = []
        self._arrivals = 0
        above = -tree.root.path_logprob
        level = [tree.root]
        for node in level:
            for child in node.children.values():
                if above + child.path_logprob < logprob_min:
                    continue
                level.append(child)
                if child not in expanded:
                    self.add_children((child,), above)

    def serves(self, root: Node, logprob_min: float, deepest: int) -> bool:
        """True if this is the frontier of the tree with that root, within those bounds."""
        return root is self._root and logprob_min == self._logprob_min and deepest == self._deepest

    def add_children(self, nodes: Iterable[Node], above: float) -> None:
        """Enter nodes, parents first; their path log-probabilities are `above` and their own."""
        heap, least, deepest = self._heap, self._logprob_min, self._deepest
        for node in nodes:
            path_logprob = above + node.path_logprob
            if path_logprob >= least and node.position < deepest:
                self._arrivals += 1
                heapq.heappush(heap, (-path_logprob, self._arrivals, node))

    @property
    def best(self) -> float | None:
        """Minus the path log-probability of the node whose turn is next; None if all are taken."""
        return self._heap[0][0] if self._heap else None

    def take(self, count: int) -> list[Entry]:
        """Remove and return the best; parents come before their children, equals by arrival."""
        heap = self._heap
        return [heapq.heappop(heap) for _ in range(min(count, len(heap)))]

    def give_back(self, entry: Entry) -> None:
        """Return what was taken and not expanded."""
        heapq.heappush(self._heap, entry)
