"""Which leaves are expanded next, over all sessions: the most probable, within tenants' shares.

All sessions' leaves form one queue, best first by path probability times tenant weight: a leaf is
worth the tokens it is expected to win (the dynamic tree of EAGLE-2, arXiv 2406.16858, taken over
sessions as AdaServe, arXiv 2501.12162, and SmartSpec, arXiv 2406.14066, share a budget out). That
alone would leave a tenant with difficult texts behind whoever has easy ones. So each tenant
that has leaves is owed its share of those expanded, by weight, and one that is behind by more
than some slack goes first (deficit counters, as in deficit round robin: Shreedhar and Varghese,
SIGCOMM 1995). Nobody saves up: a tenant is owed nothing while it has no leaves.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from drafter_service.mirror import Mirror
from drafter_service.proposers.frontier import Entry, Frontier

SLACK_LEAVES = 32.0
"""How far a tenant may fall behind its share for the sake of surer leaves."""

_FADING = 0.9
"""Of what a tenant without leaves was owed, at each step."""


class Offer(NamedTuple):
    """A session that has room for more guesses."""

    mirror: Mirror
    frontier: Frontier
    leaves_max: int
    """That it may have expanded in this step."""


Leaf: TypeAlias = tuple[Mirror, Entry]

_Head: TypeAlias = tuple[float, int, Offer, int]
"""(minus the weighted path log-probability, arrival, offer, leaves that it may still have)"""


class LeafQueue:
    """One drafter's order of work; remembers what tenants are owed."""

    def __init__(self, slack_leaves: float = SLACK_LEAVES) -> None:
        self._slack = slack_leaves
        self._owed: dict[str, float] = {}
        """Leaves that tenants are behind their shares, those ahead of theirs below zero."""

    def take(self, offers: Iterable[Offer], count: int) -> list[Leaf]:
        """Remove up to `count` leaves from their frontiers and return them, in order.

        A session's leaves come parents before children; equals by arrival.
        """
        heads: dict[str, list[_Head]] = {}
        weights: dict[str, float] = {}
        for arrival, offer in enumerate(offers):
            best = offer.frontier.best
            if best is None or offer.leaves_max < 1:
                continue
            spec = offer.mirror.spec
            weights[spec.tenant] = weight = spec.tenant_weight
            head = (best - math.log(weight), arrival, offer, offer.leaves_max)
            heads.setdefault(spec.tenant, []).append(head)
        for heap in heads.values():
            heapq.heapify(heap)
        self._fade(weights)
        if len(heads) == 1:
            return self._take_of_one(*heads.popitem(), count)
        taken: list[Leaf] = []
        while heads and len(taken) < count:
            self._owe(weights)
            tenant = self._next(heads)
            self._owed[tenant] -= 1.0
            taken.append(_pop(heads[tenant], weights[tenant]))
            if not heads[tenant]:
                del heads[tenant], weights[tenant]
        return taken

    def _take_of_one(self, tenant: str, heap: list[_Head], count: int) -> list[Leaf]:
        """Take the leaves of the only tenant that has any: each is its turn."""
        self._owed[tenant] = max(-self._slack, self._owed.get(tenant, 0.0))
        if len(heap) == 1:
            _, _, (mirror, frontier, leaves_max), _ = heap[0]
            return [(mirror, entry) for entry in frontier.take(min(count, leaves_max))]
        weight = heap[0][2].mirror.spec.tenant_weight
        taken: list[Leaf] = []
        while heap and len(taken) < count:
            taken.append(_pop(heap, weight))
        return taken

    def _owe(self, weights: dict[str, float]) -> None:
        """Share the next leaf out among those who have any left."""
        total = sum(weights.values())
        for tenant, weight in weights.items():
            # Being far ahead now must not cost a share for long afterwards.
            before = max(-self._slack, self._owed.get(tenant, 0.0))
            self._owed[tenant] = before + weight / total

    def _fade(self, weights: dict[str, float]) -> None:
        """Forget, within some steps, who had no leaves to expand."""
        for tenant in self._owed.keys() - weights.keys():
            self._owed[tenant] *= _FADING
            if abs(self._owed[tenant]) < 1.0:
                del self._owed[tenant]

    def _next(self, heads: dict[str, list[_Head]]) -> str:
        behind = max(heads, key=lambda tenant: self._owed[tenant])
        if self._owed[behind] >= self._slack:
            return behind
        return min(heads, key=lambda tenant: heads[tenant][0][:2])


def turns(
    behind: Iterable[tuple[Mirror, int, int]], short_max: int
) -> tuple[list[Mirror], list[Mirror]]:
    """Order sessions with committed tokens to compute: those that miss a commit, and a prompt.

    `behind` has mirrors, how many tokens they miss, and the step that they were last served in.
    Up to `short_max` tokens are a commit: there the longest waiting come first. Prompts come as
    they arrived, tenants taking turns by weight.
    """
    commits: list[tuple[int, Mirror]] = []
    prompts: list[tuple[float, Mirror]] = []
    counts: dict[str, int] = {}
    for mirror, missing, served in behind:
        if missing <= short_max:
            commits.append((served, mirror))
        else:
            tenant = mirror.spec.tenant
            counts[tenant] = counts.get(tenant, 0) + 1
            prompts.append((counts[tenant] / mirror.spec.tenant_weight, mirror))
    commits.sort(key=lambda entry: entry[0])
    prompts.sort(key=lambda entry: entry[0])
    return [mirror for _, mirror in commits], [mirror for _, mirror in prompts]


def _pop(heap: list[_Head], weight: float) -> Leaf:
    """Take a tenant's best leaf and put its session's next one in its place."""
    _, arrival, offer, left = heap[0]
    (entry,) = offer.frontier.take(1)
    best = offer.frontier.best
    if best is None or left == 1:
        heapq.heappop(heap)
    else:
        heapq.heapreplace(heap, (best - math.log(weight), arrival, offer, left - 1))
    return offer.mirror, entry
