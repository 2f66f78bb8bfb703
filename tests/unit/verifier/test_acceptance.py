"""Which guesses are accepted, and where a commit is cut."""

from __future__ import annotations

import itertools

import pytest

from outrider.domain import FinishReason
from outrider.draft_tree import DraftTree, Node
from verifier_service.acceptance import Verdict, accept_path, judge

NEVER: frozenset[int] = frozenset()


def tree_of(*paths: tuple[int, ...]) -> DraftTree:
    tree = DraftTree(100, 1, nodes_max=64, depth_max=32)
    for path in paths:
        node = tree.root
        for token in path:
            child = tree.add(node, token, -0.5, 1)
            assert child is not None
            node = child
    return tree


def forked() -> tuple[Node, list[Node]]:
    """1 -> (2 -> 3, 4) and 5; the nodes in the order 1, 5, 2, 4, 3."""
    root = tree_of((1, 2, 3), (1, 4), (5,)).root
    one, five = root.children[1], root.children[5]
    return root, [one, five, one.children[2], one.children[4], one.children[2].children[3]]


# Samples are the target's at the tip, then at 1, 5, 2, 4 and 3.
@pytest.mark.parametrize(
    ("samples", "accepted", "tokens"),
    [
        ([9, 0, 0, 0, 0, 0], [], [9]),
        ([5, 0, 7, 0, 0, 0], [1], [5, 7]),
        ([1, 9, 0, 0, 0, 0], [0], [1, 9]),
        ([1, 4, 0, 0, 8, 0], [0, 3], [1, 4, 8]),
        ([1, 2, 0, 3, 0, 6], [0, 2, 4], [1, 2, 3, 6]),
        # 4 is no child of 2, although it is a node.
        ([1, 2, 0, 4, 0, 0], [0, 2], [1, 2, 4]),
    ],
)
def test_the_walk_follows_the_targets_samples(
    samples: list[int], accepted: list[int], tokens: list[int]
) -> None:
    root, nodes = forked()
    assert accept_path(root, nodes, samples) == (accepted, tokens)


def test_a_child_that_was_not_verified_is_not_accepted() -> None:
    root, nodes = forked()
    without_two = [nodes[0], nodes[1], nodes[3]]
    assert accept_path(root, without_two, [1, 2, 0, 0]) == ([0], [1, 2])
    assert accept_path(root, [], [1]) == ([], [1])


def test_estimates_are_never_read() -> None:
    root, nodes = forked()
    for node, logprob in zip(nodes, itertools.cycle((-60.0, 0.0)), strict=False):
        node.claims = {1: logprob}
    assert accept_path(root, nodes, [1, 2, 0, 3, 0, 6]) == ([0, 2, 4], [1, 2, 3, 6])


SAMPLES = [1, 2, 0, 3, 0, 6]
"""At `forked`: 1, 2 and 3 are right, 6 comes on top."""


@pytest.mark.parametrize(
    ("stop_ids", "tokens_left", "verdict"),
    [
        (NEVER, 9, Verdict((1, 2, 3, 6), (0, 2, 4), None)),
        (NEVER, 5, Verdict((1, 2, 3, 6), (0, 2, 4), None)),
        # At the limit exactly, and within the accepted path.
        (NEVER, 4, Verdict((1, 2, 3, 6), (0, 2, 4), FinishReason.LENGTH)),
        (NEVER, 3, Verdict((1, 2, 3), (0, 2, 4), FinishReason.LENGTH)),
        (NEVER, 1, Verdict((1,), (0,), FinishReason.LENGTH)),
        # A stop id is the last token, wherever it comes.
        ({6}, 9, Verdict((1, 2, 3, 6), (0, 2, 4), FinishReason.STOP)),
        ({2}, 9, Verdict((1, 2), (0, 2), FinishReason.STOP)),
        ({2, 3}, 9, Verdict((1, 2), (0, 2), FinishReason.STOP)),
        ({1}, 9, Verdict((1,), (0,), FinishReason.STOP)),
        # What comes first decides; together, the text has stopped by itself.
        ({3}, 2, Verdict((1, 2), (0, 2), FinishReason.LENGTH)),
        ({3}, 3, Verdict((1, 2, 3), (0, 2, 4), FinishReason.STOP)),
        ({6}, 4, Verdict((1, 2, 3, 6), (0, 2, 4), FinishReason.STOP)),
    ],
)
def test_a_commit_is_cut_at_the_first_stop_id_or_limit(
    stop_ids: set[int], tokens_left: int, verdict: Verdict
) -> None:
    root, nodes = forked()
    assert judge(root, nodes, SAMPLES, stop_ids=stop_ids, tokens_left=tokens_left) == verdict


def test_without_nodes_it_is_ordinary_decoding() -> None:
    root = tree_of().root
    verdict = judge(root, [], [7], stop_ids=NEVER, tokens_left=2)
    assert verdict == Verdict((7,), (), None)
    verdict = judge(root, [], [7], stop_ids={7}, tokens_left=2)
    assert verdict == Verdict((7,), (), FinishReason.STOP)
