"""The frontier against the plain ranking of the whole tree."""

from __future__ import annotations

import math
import random

import pytest

from drafter_service.proposers.frontier import Frontier
from outrider.draft_tree import DraftTree, Node

LEAST = math.log(0.02)


def ranking(tree: DraftTree, expanded: set[Node], deepest: int) -> list[tuple[float, Node]]:
    return [
        (path_logprob, node)
        for path_logprob, node in tree.ranked()
        if path_logprob >= LEAST and node not in expanded and node.position < deepest
    ]


def grown(draw: random.Random, size: int) -> DraftTree:
    tree = DraftTree(1, 5, nodes_max=size, depth_max=20)
    nodes = [tree.root]
    while tree.size < size:
        child = tree.add(draw.choice(nodes), draw.randrange(50), -draw.random(), 1)
        if child is not None:
            nodes.append(child)
    return tree


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_ranking_the_whole_tree_gives(seed: int) -> None:
    draw = random.Random(seed)
    tree = grown(draw, 60)
    expanded: set[Node] = set()
    deepest = tree.root.position + 6
    frontier = Frontier(tree, expanded, logprob_min=LEAST, deepest=deepest)
    for _ in range(12):
        expected = ranking(tree, expanded, deepest)
        taken = frontier.take(4)
        assert [node for _, _, node in taken] == [node for _, node in expected[:4]]
        # The last is given back, the others grow.
        for entry in taken[3:]:
            frontier.give_back(entry)
        for negated, _, node in taken[:3]:
            expanded.add(node)
            for token in (100, 101):
                child = tree.add(node, token, -draw.random(), 1)
                assert child is not None
                frontier.add_children([child], -negated - node.path_logprob)


def test_parents_come_before_children_that_are_certain() -> None:
    tree = DraftTree(1, 5, nodes_max=9, depth_max=9)
    node: Node | None = tree.root
    chain = []
    for token in (9, 3, 7, 1):
        assert node is not None
        node = tree.add(node, token, 0.0, 1)
        chain.append(node)
    frontier = Frontier(tree, (), logprob_min=LEAST, deepest=99)
    assert [node for _, _, node in frontier.take(9)] == chain
    assert frontier.take(1) == []
