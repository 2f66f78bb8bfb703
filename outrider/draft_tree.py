"""The draft tree: a session's merged trie of all live guesses.

Pure: no clock, no randomness, no IO. The root is the tip (the last committed token); each other
node is a guessed token. Chains, trees, several drafters and drafting ahead are all nodes here
(SpecInfer's token tree, arXiv 2305.09781; re-rooting on commit makes the pre-drafted branches of
PEARL, arXiv 2408.11850, and of SSD, arXiv 2603.03251, a special case).

Invariants, checked by property tests:
- every live node descends from the root, and siblings carry distinct tokens;
- no more than `nodes_max` nodes live at once, none deeper than `depth_max` below the root;
- nothing here decides what is committed: a tree can only change speed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from outrider.domain import Draft

LOGPROB_SLACK = 1e-4
"""Estimates up to this far above log 1 are rounding, not nonsense; they count as log 1."""

ESTIMATE_FLOOR = -60.0
"""Least edge estimate that is kept, so that sums along a path stay finite."""


@dataclass(slots=True, eq=False)
class Node:
    """A guessed token; its identity survives re-rooting."""

    token: int
    parent: Node | None
    position: int
    """Index of the token in the sequence; prompt starts at 0."""
    owner: int
    """Source that proposed it first."""
    estimates: dict[int, float] = field(default_factory=dict)
    """Calibrated edge log-probability of acceptance by source."""
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def accept_logprob(self) -> float:
        """Estimate given that the parent is accepted: the most confident source counts."""
        return max(self.estimates.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Merge:
    """What became of a draft's nodes; all but `evicted` add up to their number."""

    grafted: int = 0
    duplicates: int = 0
    decided: int = 0
    """Right, but late: the token has been committed already."""
    off_path: int = 0
    """Ruled out by tokens committed since the draft's base."""
    too_deep: int = 0
    """Beyond `depth_max`, or below a node that is."""
    evicted: int = 0
    """Nodes, of this draft or older, that had to go to keep the tree within its bound."""


@dataclass(frozen=True, slots=True)
class ShadowScore:
    """A guess whose parent turned out to be on the committed path: claimed against true."""

    source: int
    claimed_logprob: float
    accepted: bool


@dataclass(frozen=True, slots=True)
class Advance:
    """What a commit did to the tree."""

    matched: tuple[Node, ...]
    """Nodes along the committed tokens, from the old root down; shorter than them on a miss."""
    survivors: int
    dropped: int
    shadow: tuple[ShadowScore, ...]


def draft_fault(draft: Draft, vocabulary_size: int, nodes_max: int) -> str | None:
    """Name what makes a draft unusable, or None. Hostile input ends here."""
    count = len(draft.tokens)
    if count != len(draft.parents) or count != len(draft.accept_logprobs):
        return "lengths"
    if count == 0:
        return "empty"
    if count > nodes_max:
        return "oversize"
    if not all(0 <= token < vocabulary_size for token in draft.tokens):
        return "token"
    if not all(-1 <= parent < index for index, parent in enumerate(draft.parents)):
        return "parent"
    if not all(
        math.isfinite(logprob) and logprob <= LOGPROB_SLACK for logprob in draft.accept_logprobs
    ):
        return "score"
    return None


class DraftTree:
    """The trie of one session. One owner; not thread-safe."""

    def __init__(self, tip: int, length: int, *, nodes_max: int, depth_max: int) -> None:
        self.root = Node(tip, None, length - 1, 0)
        self.nodes_max = nodes_max
        self.depth_max = depth_max
        self.size = 0

    def __iter__(self) -> Iterator[Node]:
        """All live nodes but the root, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def ranked(self) -> Iterator[tuple[float, Node]]:
        """Yield (path log-probability, node), most probable first, parents before children.

        Lazy: taking k nodes costs O(k log k). Ties break by arrival, so the order is stable.
        """
        arrival = 0
        heap: list[tuple[float, int, Node]] = []
        node, path_logprob = self.root, 0.0
        while True:
            for child in node.children.values():
                arrival += 1
                heapq.heappush(heap, (-(path_logprob + child.accept_logprob), arrival, child))
            if not heap:
                return
            negated, _, node = heapq.heappop(heap)
            path_logprob = -negated
            yield path_logprob, node

    def best(self, count: int) -> list[Node]:
        """The `count` most probable nodes, parents before children."""
        return [node for _, (_, node) in zip(range(count), self.ranked(), strict=False)]

    def add(self, parent: Node, token: int, accept_logprob: float, source: int) -> Node | None:
        """Attach a child, or raise the estimate of the one that is there.

        Returns the child, or None if it would lie deeper than `depth_max`. May leave the tree
        over its bound until `shrink` is called.
        """
        child = parent.children.get(token)
        if child is None:
            if parent.position + 1 - self.root.position > self.depth_max:
                return None
            child = Node(token, parent, parent.position + 1, source)
            parent.children[token] = child
            self.size += 1
        logprob = max(ESTIMATE_FLOOR, min(0.0, accept_logprob))
        known = child.estimates.get(source)
        child.estimates[source] = logprob if known is None else max(known, logprob)
        return child

    def merge(self, draft: Draft, since: Sequence[int], source: int) -> Merge:
        """Graft a draft that passed `draft_fault`; late ones are salvaged.

        `since` are the tokens committed after the draft's base: nodes are walked along them, and
        what lies below their end is grafted. Idempotent for repeated drafts.
        """
        grafted = duplicates = decided = off_path = 0
        too_deep: set[int] = set()
        # Where each node of the message lies: an int counts matched tokens of `since`.
        places: list[Node | int | None] = []
        base: Node | int = 0 if since else self.root
        for index, (token, parent, logprob) in enumerate(
            zip(draft.tokens, draft.parents, draft.accept_logprobs, strict=True)
        ):
            at = base if parent < 0 else places[parent]
            place: Node | int | None = None
            if isinstance(at, int):
                if since[at] == token:
                    place = at + 1 if at + 1 < len(since) else self.root
                    decided += 1
                else:
                    off_path += 1
            elif at is None and parent in too_deep:
                too_deep.add(index)
            elif at is None:
                off_path += 1
            else:
                known = token in at.children
                place = self.add(at, token, logprob, source)
                if place is None:
                    too_deep.add(index)
                elif known:
                    duplicates += 1
                else:
                    grafted += 1
            places.append(place)
        return Merge(grafted, duplicates, decided, off_path, len(too_deep), self.shrink())

    def advance(self, tokens: Sequence[int]) -> Advance:
        """Re-root along committed tokens; the subtree below them lives on."""
        before = self.size
        matched: list[Node] = []
        shadow: list[ShadowScore] = []
        hit = True
        for token in tokens:
            if hit:
                shadow.extend(
                    ShadowScore(source, logprob, child.token == token)
                    for child in self.root.children.values()
                    for source, logprob in child.estimates.items()
                )
            child = self.root.children.get(token)
            hit = child is not None
            if child is None:
                child = Node(token, None, self.root.position + 1, 0)
            else:
                matched.append(child)
            child.parent = None
            self.root = child
        self.size = sum(1 for _ in self)
        dropped = before - len(matched) - self.size
        return Advance(tuple(matched), self.size, dropped, tuple(shadow))

    def shrink(self) -> int:
        """Evict leaves until the bound holds; returns how many.

        The source that owns most nodes loses its least probable leaf first, so that a drafter
        that floods the tree evicts its own nodes, not the others'.
        """
        excess = self.size - self.nodes_max
        if excess <= 0:
            return 0
        paths = {node: logprob for logprob, node in self.ranked()}
        owned: dict[int, int] = {}
        leaves: dict[int, list[tuple[float, int, Node]]] = {}
        for order, (node, logprob) in enumerate(paths.items()):
            owned[node.owner] = owned.get(node.owner, 0) + 1
            if not node.children:
                heapq.heappush(leaves.setdefault(node.owner, []), (logprob, -order, node))
        for arrival in range(excess):
            owner = max((o for o in leaves if leaves[o]), key=lambda o: owned[o])
            _, _, node = heapq.heappop(leaves[owner])
            owned[owner] -= 1
            self.size -= 1
            parent = node.parent
            assert parent is not None, "the root is never evicted"
            del parent.children[node.token]
            node.parent = None
            if not parent.children and parent is not self.root:
                entry = (paths[parent], -len(paths) - arrival, parent)
                heapq.heappush(leaves.setdefault(parent.owner, []), entry)
        return excess


def subtree_draft(
    tree: DraftTree, fresh: Sequence[Node], *, epoch: int, base_length: int, base_digest: int
) -> Draft | None:
    """Build a self-contained draft of `fresh` nodes and their ancestors, or None if none lives.

    Nodes that no longer descend from the root are left out.
    """
    index_of: dict[Node, int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    logprobs: list[float] = []
    for node in fresh:
        path: list[Node] = []
        walker: Node | None = node
        while walker is not None and walker is not tree.root and walker not in index_of:
            path.append(walker)
            walker = walker.parent
        if walker is None:
            continue
        for step in reversed(path):
            parent = step.parent
            parents.append(-1 if parent is None or parent is tree.root else index_of[parent])
            index_of[step] = len(tokens)
            tokens.append(step.token)
            logprobs.append(step.accept_logprob)
    if not tokens:
        return None
    return Draft(epoch, base_length, base_digest, tuple(tokens), tuple(parents), tuple(logprobs))
