"""Mirrors for tests of proposers, and what has been proposed for them."""

from __future__ import annotations

from drafter_service.mirror import Mirror
from drafter_service.proposers.base import Proposer
from outrider.domain import BindSpec, Commit, DraftBudget, SamplingParams
from outrider.draft_tree import Node


def mirror_of(
    *prompt: int,
    session: int = 1,
    nodes_max: int = 64,
    depth_max: int = 32,
    width_max: int = 3,
    probability_min: float = 1e-6,
    vocabulary: int = 100,
    cache_salt: str = "",
) -> Mirror:
    """A session that has just been bound."""
    return Mirror(
        1,
        BindSpec(
            session=session,
            epoch=1,
            binding=1,
            prompt=prompt,
            committed=(),
            sampling=SamplingParams(),
            seed=1,
            tokenizer_fingerprint="",
            vocabulary_size=vocabulary,
            budget=DraftBudget(nodes_max, depth_max, 0.0, width_max, probability_min),
            cache_salt=cache_salt,
        ),
    )


def opened(proposer: Proposer, mirror: Mirror) -> Mirror:
    """Open a session and let the proposer say all that it has to say."""
    proposer.open(mirror)
    while proposer.grow([mirror]):
        pass
    return mirror


def commit(proposer: Proposer, mirror: Mirror, *tokens: int) -> None:
    """Commit tokens and let the proposer go on."""
    news = mirror.apply(Commit(1, len(mirror.log), tokens))
    assert news is not None
    proposer.advanced(mirror, *news)
    while proposer.grow([mirror]):
        pass


def paths(mirror: Mirror) -> set[tuple[int, ...]]:
    """The branches of the tree, from the tip to each leaf."""
    found: set[tuple[int, ...]] = set()
    stack: list[tuple[tuple[int, ...], Node]] = [((), mirror.tree.root)]
    while stack:
        path, node = stack.pop()
        stack += [((*path, token), child) for token, child in node.children.items()]
        if path and not node.children:
            found.add(path)
    return found
