"""One session whose text is known, and the trees of several proposers, united as a verifier does.

As in `lockstep` real proposers grow real trees beside verify steps that are only imagined, so
nothing depends on how fast the machine is, nor on who else computes there. Here a step waits for
the trees to be grown: how good the guesses are shows, not how many of them come in time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.lockstep import Known
from drafter_service.mirror import Mirror
from drafter_service.proposers.base import Proposer
from outrider.domain import Commit
from outrider.draft_tree import Node

Path = tuple[int, ...]
"""Tokens from the tip to a node."""


def accepted_in_steps(
    proposers: Sequence[Proposer], known: Known, *, grows: int, verified_max: int
) -> tuple[int, ...]:
    """Return how many guesses each verify step accepts; the last one, which is cut, is left out.

    A proposer that computes has `grows` steps before each verify step, another one says all it has
    to say; the target takes the `verified_max` most probable nodes of all trees together.
    """
    mirrors = [Mirror(1, known.spec) for _ in proposers]
    for proposer, mirror in zip(proposers, mirrors, strict=True):
        proposer.open(mirror)
    accepted = []
    done = 0
    while done < len(known.text):
        for proposer, mirror in zip(proposers, mirrors, strict=True):
            for _ in range(grows if proposer.leaves_max else 1):
                proposer.grow([mirror])
        chosen = _most_probable(mirrors, verified_max)
        count = _matching(chosen, known.text[done:])
        tokens = known.text[done : done + count + 1]
        done += len(tokens)
        accepted.append(count)
        for proposer, mirror in zip(proposers, mirrors, strict=True):
            news = mirror.apply(Commit(mirror.spec.epoch, len(mirror.log), tokens))
            assert news is not None, "there is at least one token"
            proposer.advanced(mirror, *news)
            mirror.take_draft()  # nobody reads it, but it would wait for ever
    for proposer, mirror in zip(proposers, mirrors, strict=True):
        proposer.close(mirror)
    return tuple(accepted[:-1])


def _most_probable(mirrors: Sequence[Mirror], count: int) -> set[Path]:
    """Return paths of the most probable nodes; what several guess is as probable as any says."""
    best: dict[Path, float] = {}
    for mirror in mirrors:
        for _, (logprob, node) in zip(range(count), mirror.tree.ranked(), strict=False):
            path = tuple(_tokens_to(node))[::-1]
            best[path] = max(logprob, best.get(path, logprob))
    # A parent is at least as probable as its children, and shorter.
    ranked = sorted(best, key=lambda path: (-best[path], len(path), path))
    return set(ranked[:count])


def _tokens_to(node: Node) -> Iterator[int]:
    while node.parent is not None:
        yield node.token
        node = node.parent


def _matching(chosen: set[Path], text: Path) -> int:
    count = 0
    # The last token of a text is decided without a guess, as in any step.
    while count < len(text) - 1 and text[: count + 1] in chosen:
        count += 1
    return count
