"""A session as a drafter sees it: a disposable copy of the committed tokens and its own guesses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from outrider.committed import CommittedLog
from outrider.domain import BindSpec, Commit, Draft, DraftBudget
from outrider.draft_tree import Advance, DraftTree, Node, subtree_draft

_PROBABILITY_MIN = 1e-30
"""Of a path, whatever a budget says."""


class GapError(Exception):
    """A commit starts beyond what the mirror has."""


class Mirror:
    """Committed tokens, guesses, and which of them are still to be sent. Owned by one thread."""

    def __init__(self, connection: int, spec: BindSpec) -> None:
        self.connection = connection
        self.spec = spec
        self.budget: DraftBudget = spec.budget
        self.log = CommittedLog((*spec.prompt, *spec.committed))
        self.tree = self._new_tree()
        self.source = 1
        """Number, within this tree, of the proposer that is guessing; the orchestrator numbers
        whole drafters."""
        self.reserved = 0
        """Nodes that are kept free of its guesses, for another proposer."""
        self.fresh: list[Node] = []
        """Nodes that were attached since the last flush, or have become more probable."""
        self._later: list[Node] = []
        """Nodes that were too improbable to be sent so far."""
        self.flushed_s = -math.inf
        """When the last draft left, on the growing thread's clock."""
        self.resync_asked: tuple[int, float] | None = None
        """Length for which a resync is outstanding, and when it was asked for."""

    @property
    def key(self) -> tuple[int, int]:
        """(connection, session)"""
        return self.connection, self.spec.session

    def _new_tree(self) -> DraftTree:
        budget = self.budget
        return DraftTree(
            self.log.tip, len(self.log), nodes_max=budget.nodes_max, depth_max=budget.depth_max
        )

    def set_budget(self, budget: DraftBudget) -> None:
        """Take a new budget; nodes over it die out by themselves."""
        self.budget = budget
        self.tree.nodes_max, self.tree.depth_max = budget.nodes_max, budget.depth_max

    def restart(self, vocabulary_size: int) -> None:
        """Forget all guesses: another proposer goes on, which knows so many ids."""
        self.spec = replace(self.spec, vocabulary_size=vocabulary_size)
        self.tree = self._new_tree()
        self.fresh = []
        self._later = []
        self.source, self.reserved = 1, 0

    @property
    def room(self) -> int:
        """Nodes that may still be attached."""
        return self.budget.nodes_max - self.tree.size - self.reserved

    def attach(self, parent: Node, token: int, accept_logprob: float) -> Node | None:
        """Guess `token` after `parent`; None if the budget or the vocabulary forbids it."""
        if not 0 <= token < self.spec.vocabulary_size:
            return None
        known = parent.children.get(token)
        if known is None and self.room <= 0:
            return None
        node = self.tree.add(parent, token, accept_logprob, self.source)
        if node is not None and known is None:
            self.fresh.append(node)
        return node

    def expand(self, parent: Node, guesses: Iterable[tuple[int, float]]) -> list[Node]:
        """Guess different tokens (id, claim) after a node without guesses, as far as allowed."""
        size, room = self.spec.vocabulary_size, max(0, self.room)
        allowed = [guess for guess in guesses if 0 <= guess[0] < size]
        nodes = self.tree.sprout(parent, allowed[:room], self.source)
        self.fresh += nodes
        return nodes

    def apply(self, commit: Commit) -> tuple[tuple[int, ...], Advance] | None:
        """Follow a commit; returns (new tokens, what it did to the tree), None if nothing is new.

        Raises `GapError` if commits are missing in between.
        """
        known = len(self.log) - commit.base_length
        if known < 0:
            raise GapError
        tokens = commit.tokens[known:]
        self.resync_asked = None
        if not tokens:
            return None
        self.log.append(tokens)
        advance = self.tree.advance(tokens)
        # Below the new root everything is more probable than it was.
        self.fresh += self._later
        self._later.clear()
        return tokens, advance

    def _worth_sending(self) -> list[Node]:
        """Take what is fresh and as probable as the budget asks for; the rest may come later."""
        least = math.log(max(_PROBABILITY_MIN, self.budget.probability_min))
        least += self.tree.root.path_logprob
        worth: list[Node] = []
        for node in self.fresh:
            if node.parent is None:
                continue  # gone, or committed
            if node.path_logprob >= least:
                worth.append(node)
            else:
                self._later.append(node)
        self.fresh = []
        return worth

    def take_draft(self) -> Draft | None:
        """Build a draft of what is fresh, or None if none of it lives any more."""
        fresh = self._worth_sending()
        if not fresh:
            return None
        length = len(self.log)
        digest = self.log.digest_at(length)
        assert digest is not None, "the present length is always known"
        return subtree_draft(
            self.tree, fresh, epoch=self.spec.epoch, base_length=length, base_digest=digest
        )
