"""Trees of several proposers over a text that is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.lockstep import Known
from bench.united import accepted_in_steps
from drafter_service.mirror import Mirror
from drafter_service.proposers.base import Proposer
from drafter_service.proposers.lookup import LookupProposer
from outrider.domain import ModelInfo
from outrider.draft_tree import Advance
from tests.support.proposing import mirror_of


class Says:
    """Guesses the same tokens again and again, each with the same claim, at once or in steps."""

    def __init__(self, *tokens: int, claim: float = -0.1, leaves_max: int = 0) -> None:
        self.leaves_max = leaves_max
        self.closed = 0
        self._tokens = tokens
        self._claim = claim

    @property
    def info(self) -> ModelInfo:
        raise NotImplementedError

    def open(self, mirror: Mirror) -> None:
        pass

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        pass

    def close(self, mirror: Mirror) -> None:
        self.closed += 1

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """Attach all tokens as a chain, or the next one of them."""
        (mirror,) = mirrors
        node = mirror.tree.root
        for token in self._tokens:
            child = node.children.get(token)
            if child is None:
                child = mirror.attach(node, token, self._claim)
                assert child is not None
                if self.leaves_max:
                    return True
            node = child
        return False


def accepted(
    *proposers: Proposer,
    text: Sequence[int] = (1, 2, 3, 1, 2, 3, 4),
    verified: int = 16,
    grows: int = 1,
) -> tuple[int, ...]:
    known = Known(mirror_of(9).spec, tuple(text))
    return accepted_in_steps(proposers, known, grows=grows, verified_max=verified)


def test_guesses_that_fit_are_accepted_and_the_last_step_is_left_out() -> None:
    right = Says(1, 2, 3)
    # 1, 2, 3 and the next 1 for nothing; then nothing fits until the text ends.
    assert accepted(right) == (3, 0, 0)
    assert right.closed == 1


def test_one_that_computes_has_so_many_steps() -> None:
    text = (1, 2, 3, 4, 5, 6)
    assert accepted(Says(1, 2, 3, leaves_max=8), text=text, grows=1) == (1, 0, 0, 0)
    assert accepted(Says(1, 2, 3, leaves_max=8), text=text, grows=2) == (2, 0, 0)
    assert accepted(Says(1, 2, 3), text=text, grows=1) == (3, 0)


def test_trees_unite() -> None:
    text = (1, 2, 3, 7, 5, 1, 2, 3, 7, 4)
    assert accepted(Says(1, 2), text=text) == (2, 0, 0, 2, 0)
    assert accepted(Says(7), text=text) == (0, 0, 0, 1, 0, 0, 0)
    # The other one's guess is taken where the first one's does not fit.
    assert accepted(Says(1, 2), Says(7), text=text) == (2, 1, 2)


@pytest.mark.parametrize(("claim", "expected"), [(-0.3, (2, 2)), (-0.01, (0,) * 6)])
def test_the_most_probable_nodes_are_verified(claim: float, expected: tuple[int, ...]) -> None:
    wrong = Says(8, 8, claim=claim)
    assert accepted(Says(1, 2, claim=-0.1), wrong, verified=2) == expected


def test_real_proposers_learn_of_commits() -> None:
    text = tuple(range(20, 30)) * 3
    assert sum(accepted(LookupProposer(), text=text)) >= 15
