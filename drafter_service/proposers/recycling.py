"""Recycling: what the target thought probable after a token once, it may think again. No model.

Token Recycling (Luo et al., 2024, arXiv 2408.08696): an adjacency table maps each token to the
target's best candidates after it, as of the last time that the target computed it, be it accepted
or not: candidates are a by-product of verification, which others throw away. A walk through the
table from the tip makes a tree. Unlike there, the tree has no fixed shape: branches grow in the
order of their probability, which is learnt for each rank.

A table tells what the target said in the sessions that fed it, so that guesses, and with them
speed, depend on these. Tables are therefore shared as KV is: within one cache salt, and one
tokenizer.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from drafter_service.mirror import Mirror
from drafter_service.proposers.base import with_new_text
from outrider.domain import Candidates, ModelInfo
from outrider.draft_tree import Advance, Node

_PROBABILITY_MIN = 1e-6
"""Of a path, whatever a budget says."""
_PRIOR_WEIGHT = 10.0
_KEPT = 0.995
"""Of what was learnt of ranks, after one more observation: two hundred are remembered."""

Tenant: TypeAlias = tuple[str, str]
"""(tokenizer fingerprint, cache salt): whoever has the same shares a table."""


class Tables:
    """Adjacency tables of all tenants: for each token ids that may follow, best first.

    Bounded in rows over all of them. Rows that were not written for longest go first, from the
    table that was used least recently.
    """

    def __init__(self, rows_max: int) -> None:
        self._rows_max = rows_max
        self._tables: OrderedDict[Tenant, dict[int, tuple[int, ...]]] = OrderedDict()
        self._rows = 0

    def __len__(self) -> int:
        """Rows of all tables."""
        return self._rows

    def of(self, tenant: Tenant) -> dict[int, tuple[int, ...]]:
        """A tenant's table, to be read; it counts as used."""
        table = self._tables.get(tenant)
        if table is None:
            return {}
        self._tables.move_to_end(tenant)
        return table

    def write(self, tenant: Tenant, token: int, followers: tuple[int, ...]) -> None:
        """Replace a row; the others' make room if there is none."""
        table = self._tables.setdefault(tenant, {})
        self._tables.move_to_end(tenant)
        # Taken out first, so that a dictionary's order is that of writing.
        self._rows += table.pop(token, None) is None
        table[token] = followers
        while self._rows > self._rows_max:
            oldest, victim = next(iter(self._tables.items()))
            del victim[next(iter(victim))]
            self._rows -= 1
            if not victim:
                del self._tables[oldest]


class RankEstimates:
    """Probability that the candidate of a rank is the target's next token; learnt online.

    Prior: the first is right in four of ten cases, each other one half as often as the one before.
    """

    def __init__(self, width: int) -> None:
        self._right = [_PRIOR_WEIGHT * 0.4 * 0.5**rank for rank in range(width)]
        self._seen = [_PRIOR_WEIGHT] * width

    def observe(self, offered: Sequence[int], token: int) -> None:
        """Learn from guesses (by rank) after a committed node, which `token` followed."""
        for rank, guess in enumerate(offered):
            self._right[rank] = self._right[rank] * _KEPT + (guess == token)
            self._seen[rank] = self._seen[rank] * _KEPT + 1.0

    def logprob(self, rank: int) -> float:
        """Natural logarithm of the estimate."""
        return math.log(max(1e-3, min(0.98, self._right[rank] / self._seen[rank])))


@dataclass(slots=True)
class _State:
    tenant: Tenant
    root: Node
    offered: dict[Node, tuple[int, ...]] = field(default_factory=dict)
    """For each node that was expanded the guesses after it, by rank."""
    proposed_length: int = 0
    """Length of the committed tokens for which guesses were made."""


class RecyclingProposer:
    """Guesses what the target found probable earlier; silent until it has heard of something."""

    def __init__(self, *, width: int = 8, rows_max: int = 1 << 18) -> None:
        """`width`: candidates a token that are asked for. A row takes about 200 bytes."""
        self._width = width
        self._tables = Tables(rows_max)
        # Sampled sessions follow the first candidate less often.
        self._estimates = {greedy: RankEstimates(width) for greedy in (True, False)}
        self._states: dict[tuple[int, int], _State] = {}

    @property
    def info(self) -> ModelInfo:
        """Handles ids only, so it fits any tokenizer."""
        return ModelInfo(
            model="recycling",
            model_fingerprint="recycling",
            tokenizer_fingerprint=None,
            vocabulary_size=0,
            length_max=0,
            dtype="",
            proposer="recycling",
            candidates=self._width,
        )

    @property
    def leaves_max(self) -> int:
        """No bound: all sessions are served at once."""
        return 0

    def open(self, mirror: Mirror) -> None:
        """Find out whose table the session shares."""
        tenant = (mirror.spec.tokenizer_fingerprint, mirror.spec.cache_salt)
        self._states[mirror.key] = _State(tenant, mirror.tree.root)

    def take(self, mirror: Mirror, candidates: Candidates) -> None:
        """Write what a step said into the tenant's table; of equal tokens the last one counts."""
        tenant = self._states[mirror.key].tenant
        for token, followers in zip(candidates.tokens, candidates.tops, strict=True):
            self._tables.write(tenant, token, followers[: self._width])

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        """Learn from what became of the guesses."""
        state = self._states[mirror.key]
        estimates = self._estimates[mirror.spec.sampling.greedy]
        for node, token in zip((state.root, *advance.matched), tokens, strict=False):
            offered = state.offered.get(node)
            if offered is not None:
                estimates.observe(offered, token)
        state.root = mirror.tree.root
        alive = {state.root, *mirror.tree}
        state.offered = {node: row for node, row in state.offered.items() if node in alive}

    def close(self, mirror: Mirror) -> None:
        """Forget the session; what it taught stays with its tenant."""
        self._states.pop(mirror.key, None)

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """Guess once for each session whose text has changed."""
        for mirror, state in with_new_text(mirrors, self._states):
            self._propose(mirror, state)
        return False

    def _propose(self, mirror: Mirror, state: _State) -> None:
        """Walk through the table from the tip, most probable branch first."""
        table = self._tables.of(state.tenant)
        budget, estimates = mirror.budget, self._estimates[mirror.spec.sampling.greedy]
        claims = [estimates.logprob(rank) for rank in range(self._width)]
        least = math.log(max(_PROBABILITY_MIN, budget.probability_min))
        root = mirror.tree.root
        deepest = root.position + budget.depth_max
        heap: list[tuple[float, int, Node]] = [(0.0, 0, root)]
        arrivals = 0
        while heap:
            negated, _, node = heapq.heappop(heap)
            followers = table.get(node.token, ())[: budget.width_max]
            if not followers or node.position >= deepest:
                continue
            state.offered[node] = followers
            for rank, token in enumerate(followers):
                claim = claims[rank]
                if claim - negated < least:
                    continue
                child = mirror.attach(node, token, claim)
                if child is not None:
                    arrivals += 1
                    heapq.heappush(heap, (negated - claim, arrivals, child))
