"""Datastore: what followed the same words in a corpus. No model.

REST (He et al., 2023, arXiv 2311.08252): the longest end of the committed tokens that occurs in
the datastore is looked for, backing off to shorter ones; what followed its occurrences makes a
tree, whose branches are as probable as they are frequent. Unlike there, a branch's claim also
depends on how far matches of its length could be trusted so far, so that rare and short matches
are not sent when they do not pay.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from drafter_service.datastore import MATCH_MAX, Datastore
from drafter_service.mirror import Mirror
from drafter_service.proposers.base import with_new_text
from drafter_service.proposers.match_estimates import MatchEstimates
from outrider.domain import ModelInfo
from outrider.draft_tree import Advance, Node

_DEPTH_MAX = 32
_PROBABILITY_MIN = 1e-6
"""Of a path, whatever a budget says."""

_Branch: TypeAlias = tuple[float, int, Node, list[tuple[int, ...]], int]
"""(minus the path log-probability, arrival, node, what follows it and all before, its depth)"""


@dataclass(slots=True)
class _State:
    root: Node
    offered: dict[Node, tuple[int, frozenset[int]]] = field(default_factory=dict)
    """For each node with guesses of ours: the bucket of the match behind them, and the guesses."""
    proposed_length: int = 0
    """Length of the committed tokens for which guesses were made."""


class DatastoreProposer:
    """Guesses from a corpus, for all sessions alike: it holds nothing of theirs."""

    def __init__(
        self, datastore: Datastore, *, match_min: int = 2, occurrences_max: int = 128
    ) -> None:
        """`match_min`: shorter matches say nothing; `occurrences_max`: so many are looked at."""
        self._datastore = datastore
        self._match_min = match_min
        self._occurrences_max = occurrences_max
        self._estimates = MatchEstimates()
        self._states: dict[tuple[int, int], _State] = {}

    @property
    def info(self) -> ModelInfo:
        """Fits the tokenizer that the corpus was encoded with.

        There is no vocabulary size: an id that the corpus lacks has no match, and that is all.
        """
        header = self._datastore.header
        return ModelInfo(
            model=self._datastore.path.stem,
            model_fingerprint=self._datastore.digest,
            tokenizer_fingerprint=header.tokenizer_fingerprint,
            vocabulary_size=0,
            length_max=0,
            dtype="",
            proposer="datastore",
        )

    @property
    def leaves_max(self) -> int:
        """No bound: all sessions are served at once."""
        return 0

    def open(self, mirror: Mirror) -> None:
        """Nothing to prepare."""
        self._states[mirror.key] = _State(mirror.tree.root)

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        """Learn from what became of the guesses."""
        state = self._states[mirror.key]
        for node, token in zip((state.root, *advance.matched), tokens, strict=False):
            offer = state.offered.pop(node, None)
            if offer is not None:
                bucket, guesses = offer
                self._estimates.observe(bucket, token in guesses)
        state.root = mirror.tree.root
        alive = {state.root, *mirror.tree}
        state.offered = {node: offer for node, offer in state.offered.items() if node in alive}

    def close(self, mirror: Mirror) -> None:
        """Forget the session."""
        self._states.pop(mirror.key, None)

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """Guess once for each session whose text has changed."""
        for mirror, state in with_new_text(mirrors, self._states):
            self._propose(mirror, state)
        return False

    def _propose(self, mirror: Mirror, state: _State) -> None:
        """Attach what followed the longest match, most frequent first."""
        context = mirror.log.tokens[-MATCH_MAX:]
        match = self._datastore.longest_match(context, shortest=self._match_min)
        if not match.count:
            return
        budget = mirror.budget
        depth_max = min(_DEPTH_MAX, budget.depth_max)
        rows = self._datastore.continuations(match, depth_max, self._occurrences_max)
        least = math.log(max(_PROBABILITY_MIN, budget.probability_min))
        heap: list[_Branch] = [(0.0, 0, mirror.tree.root, rows, 0)]
        arrivals = 0
        while heap:
            negated, _, node, rows, depth = heapq.heappop(heap)
            bucket = MatchEstimates.bucket(match.length + depth)
            trust = self._estimates.logprob(bucket)
            counted = Counter(row[depth] for row in rows if len(row) > depth)
            guesses: set[int] = set()
            for token, count in counted.most_common(budget.width_max):
                claim = trust + math.log(count / len(rows))
                if claim - negated < least:
                    break
                child = mirror.attach(node, token, claim)
                if child is None:
                    continue
                guesses.add(token)
                arrivals += 1
                below = [row for row in rows if len(row) > depth and row[depth] == token]
                heapq.heappush(heap, (negated - claim, arrivals, child, below, depth + 1))
            if guesses:
                state.offered[node] = bucket, frozenset(guesses)
