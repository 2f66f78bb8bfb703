"""The token tree of a simulated session: what is guessed, sent, chosen and true.

One trie stands for the verifier's tree and all drafters' mirrors; who knows a node is marked on
it. So a draft that comes late finds its place by itself, as salvage makes it in the product.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from random import Random

PATH_PROBABILITY_MIN = 1e-4
"""Leaves less probable than this are not expanded: they would only fill the memory."""

_COST_MAX = -math.log(PATH_PROBABILITY_MIN)


class Node:
    """A token of a session: committed, guessed, or both.

    Nodes do not know their parents, so that what a commit cuts off is freed at once.
    """

    __slots__ = ("arrived", "children", "chosen", "cost", "drafted", "rooting", "taken")

    def __init__(self, cost: float) -> None:
        self.cost = cost
        """Negated log-probability of the path from the first token; differences matter."""
        self.children: list[Node] = []
        """By the drafters' rank; made when somebody looks."""
        self.taken = 0
        """Bit k: the session's drafter k has begun to expand it."""
        self.drafted = 0
        """Bit k: that drafter knows its children."""
        self.arrived = False
        """The verifier has its children."""
        self.chosen = 0
        """Number of the verify step that last verified it."""
        self.rooting = 0
        """While it is being expanded: the last re-rooting of the mirrors that it survived."""


class SessionTree:
    """A session: its tree, the two sides' roots, and what the target will say."""

    def __init__(self, agreement: tuple[float, ...], drafters: int, random: Random) -> None:
        self._costs = [-math.log(probability) for probability in agreement]
        self._thresholds = list(itertools.accumulate(agreement))
        self._random = random
        self._ticket = itertools.count()
        self.root = Node(0.0)
        """The tip as the verifier knows it."""
        self.draft_root = self.root
        """The tip as the drafters know it: behind by what travels."""
        self.tokens = 0
        self._rooting = 0
        self._frontiers: list[list[tuple[float, int, Node]]] = [[] for _ in range(drafters)]
        for slot in range(drafters):
            self._rebuild(slot)

    # --- drafters --------------------------------------------------------------------------

    def best_cost(self, slot: int) -> float | None:
        """Cost, from the tip, of the leaf that drafter `slot` would expand next; None if none."""
        frontier = self._frontiers[slot]
        if not frontier:
            return None
        cost = frontier[0][0] - self.draft_root.cost
        return cost if cost <= _COST_MAX else None

    def take(self, slot: int) -> Node:
        """Begin to expand the best leaf of drafter `slot`."""
        node = heapq.heappop(self._frontiers[slot])[2]
        node.taken |= 1 << slot
        node.rooting = self._rooting
        return node

    def drafted(self, slot: int, node: Node) -> None:
        """Drafter `slot` has expanded a leaf; its children are leaves now, if it still counts."""
        node.drafted |= 1 << slot
        children = self._children(node)
        if node.rooting == self._rooting:
            frontier = self._frontiers[slot]
            for child in children:
                heapq.heappush(frontier, (child.cost, next(self._ticket), child))

    def reroot_drafters(self, root: Node) -> None:
        """A commit has reached the drafters; what lies under it survives."""
        self.draft_root = root
        self._rooting += 1
        for slot in range(len(self._frontiers)):
            self._rebuild(slot)

    def _rebuild(self, slot: int) -> None:
        bit = 1 << slot
        frontier: list[tuple[float, int, Node]] = []
        stack = [self.draft_root]
        while stack:
            node = stack.pop()
            if not node.taken & bit:
                frontier.append((node.cost, next(self._ticket), node))
            elif node.drafted & bit:
                stack += node.children
            else:
                # Being expanded at this moment: it must not be taken again.
                node.rooting = self._rooting
        heapq.heapify(frontier)
        self._frontiers[slot] = frontier

    # --- the verifier ----------------------------------------------------------------------

    def candidates(self, node: Node) -> Iterator[tuple[float, Node]]:
        """Children that the verifier has, each with its path's cost from the tip."""
        if node.arrived:
            base = self.root.cost
            for child in node.children:
                yield child.cost - base, child

    def commit(self, step: int) -> int:
        """Walk what step number `step` verified, move the tip, and count the tokens."""
        count, node = 1, self._sample(self.root)
        while node.chosen == step:
            count, node = count + 1, self._sample(node)
        self.root = node
        self.tokens += count
        return count

    def _sample(self, node: Node) -> Node:
        """The target's own next token. The walk asks exactly once for each position."""
        drawn = self._random.random()
        for rank, threshold in enumerate(self._thresholds):
            if drawn < threshold:
                return self._children(node)[rank]
        return Node(node.cost)

    def _children(self, node: Node) -> list[Node]:
        if not node.children:
            base = node.cost
            node.children = [Node(base + cost) for cost in self._costs]
        return node.children
