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
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from outrider.domain import Draft

LOGPROB_SLACK = 1e-4
"""Claims up to this far above log 1 are rounding, not nonsense; they count as log 1."""

ESTIMATE_FLOOR = -60.0
"""Least edge log-probability that is kept, so that sums along a path stay finite."""

_SCORED_POSITIONS_MAX = 64
"""Committed tokens for which it is remembered whose guesses have been scored already."""

Calibrate = Callable[[int, float], float]
"""(source, claimed log-probability) to what such a claim of this source has turned out to mean."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Node:
    """A guessed token; its identity survives re-rooting."""

    token: int
    parent: Node | None
    """None for a root, and for what no longer belongs to a tree."""
    position: int
    """Index of the token in the sequence; prompt starts at 0."""
    owner: int
    """Source that proposed it first."""
    claims: dict[int, float] = field(default_factory=dict)
    """Log-probability of acceptance, given that the parent is accepted, as each source said."""
    children: dict[int, Node] = field(default_factory=dict)
    path_logprob: float = 0.0
    """In a drafter's own tree: the most confident claims from some ancestor of the tree down to
    here, added up. Only differences along a path mean anything. Trees that `merge` lack it."""

    @property
    def accept_logprob(self) -> float:
        """The most confident claim."""
        return max(self.claims.values(), default=0.0)


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
    shadow: tuple[ShadowScore, ...] = ()
    """What a late draft said of tokens that are committed by now, unless scored before."""


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


def draft_fault(
    draft: Draft, vocabulary_size: int, nodes_max: int, *, first: int | None = None
) -> str | None:
    """Name what makes a draft unusable, or None. Hostile input ends here.

    With `first`, only so many nodes are looked at: those that will be used. They are a draft of
    their own, since parents come first.
    """
    count = len(draft.tokens)
    if count != len(draft.parents) or count != len(draft.accept_logprobs):
        return "lengths"
    if count == 0:
        return "empty"
    if count > nodes_max:
        return "oversize"
    tokens, parents, logprobs = draft.tokens, draft.parents, draft.accept_logprobs
    if first is not None:
        tokens, parents, logprobs = tokens[:first], parents[:first], logprobs[:first]
    # Built-ins over whole tuples: this runs for every node that anybody sends.
    if min(tokens) < 0 or max(tokens) >= vocabulary_size:
        return "token"
    if min(parents) < -1 or not all(map(operator.lt, parents, range(count))):
        return "parent"
    if not all(map(math.isfinite, logprobs)) or max(logprobs) > LOGPROB_SLACK:
        return "score"
    return None


class DraftTree:
    """The trie of one session. One owner; not thread-safe.

    Nodes keep what sources claimed. What the claims are worth is asked of `calibrate` whenever
    nodes are ranked, so that an estimate is never older than the calibration.
    """

    def __init__(
        self,
        tip: int,
        length: int,
        *,
        nodes_max: int,
        depth_max: int,
        calibrate: Calibrate | None = None,
    ) -> None:
        self.root = Node(tip, None, length - 1, 0)
        self.nodes_max = nodes_max
        self.depth_max = depth_max
        self.size = 0
        self._calibrate = calibrate
        # For each of the last committed tokens the (source, token) of guesses that were scored.
        self._scored: deque[set[tuple[int, int]]] = deque(maxlen=_SCORED_POSITIONS_MAX)

    def __iter__(self) -> Iterator[Node]:
        """All live nodes but the root, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def estimate(self, node: Node) -> float:
        """Log-probability of acceptance given that the parent is accepted; at most 0.

        The source that is most confident after calibration counts.
        """
        calibrate = self._calibrate
        if calibrate is None:
            return node.accept_logprob
        best = ESTIMATE_FLOOR
        for source, claim in node.claims.items():
            estimate = calibrate(source, claim)
            if estimate > best:
                best = estimate
        return best

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
                heapq.heappush(heap, (-(path_logprob + self.estimate(child)), arrival, child))
            if not heap:
                return
            negated, _, node = heapq.heappop(heap)
            path_logprob = -negated
            yield path_logprob, node

    def best(self, count: int) -> list[Node]:
        """The `count` most probable nodes, parents before children."""
        return [node for _, (_, node) in zip(range(count), self.ranked(), strict=False)]

    def add(self, parent: Node, token: int, accept_logprob: float, source: int) -> Node | None:
        """Attach a child, or raise the claim of the one that is there.

        Returns the child, or None if it would lie deeper than `depth_max`. May leave the tree
        over its bound until `shrink` is called.
        """
        child = parent.children.get(token)
        if child is None:
            added = self.sprout(parent, ((token, accept_logprob),), source)
            return added[0] if added else None
        before = child.accept_logprob
        claim = _bounded(accept_logprob)
        child.claims[source] = max(claim, child.claims.get(source, claim))
        if child.accept_logprob > before:
            _raise_paths(child, child.accept_logprob - before)
        return child

    def sprout(self, parent: Node, guesses: Iterable[tuple[int, float]], source: int) -> list[Node]:
        """Attach children (token, claim) that are not there yet; see `add`, which is slower."""
        position = parent.position + 1
        if position - self.root.position > self.depth_max:
            return []
        path_logprob, children = parent.path_logprob, parent.children
        added: list[Node] = []
        for token, logprob in guesses:
            claim = logprob if ESTIMATE_FLOOR <= logprob <= 0.0 else _bounded(logprob)
            claims = {source: claim}
            child = Node(token, parent, position, source, claims, {}, path_logprob + claim)
            children[token] = child
            added.append(child)
        self.size += len(added)
        return added

    def merge(self, draft: Draft, since: Sequence[int], source: int) -> Merge:
        """Graft a draft that passed `draft_fault`; late ones are salvaged.

        `since` are the tokens committed after the draft's base: nodes are walked along them, and
        what lies below their end is grafted. Idempotent for repeated drafts. Nodes on or beside
        the walk are evidence of the source's worth, unless they were in the tree in time.
        """
        decided = off_path = grafted = duplicates = 0
        deepest = self.root.position + self.depth_max
        shadow: list[ShadowScore] = []
        too_deep: set[int] = set()
        # Where each node of the message lies: an int counts matched tokens of `since`.
        places: list[Node | int | None] = []
        base: Node | int = 0 if since else self.root
        for token, parent, logprob in zip(
            draft.tokens, draft.parents, draft.accept_logprobs, strict=True
        ):
            at = base if parent < 0 else places[parent]
            place: Node | int | None = None
            # `add` once more, since a call for each node would take longer than what it does.
            if isinstance(at, Node):
                claim = logprob if ESTIMATE_FLOOR <= logprob <= 0.0 else _bounded(logprob)
                place = at.children.get(token)
                if place is not None:
                    duplicates += 1
                    if place.claims.get(source, -math.inf) < claim:
                        place.claims[source] = claim
                elif at.position < deepest:
                    grafted += 1
                    place = Node(token, at, at.position + 1, source, {source: claim}, {})
                    at.children[token] = place
                else:
                    too_deep.add(len(places))
            elif at is not None:
                accepted = since[at] == token
                if self._unscored(len(since) - at, source, token):
                    shadow.append(ShadowScore(source, _bounded(logprob), accepted))
                if accepted:
                    place = at + 1 if at + 1 < len(since) else self.root
                    decided += 1
                else:
                    off_path += 1
            elif parent in too_deep:
                too_deep.add(len(places))
            else:
                off_path += 1
            places.append(place)
        self.size += grafted
        return Merge(
            grafted, duplicates, decided, off_path, len(too_deep), self.shrink(), tuple(shadow)
        )

    def _unscored(self, behind: int, source: int, token: int) -> bool:
        """Whether a guess of the token `behind` the end counts as evidence; once it does."""
        if behind > len(self._scored):
            return False
        scored = self._scored[-behind]
        if (source, token) in scored:
            return False
        scored.add((source, token))
        return True

    def advance(self, tokens: Sequence[int]) -> Advance:
        """Re-root along committed tokens; the subtree below them lives on.

        Matched nodes keep their children; whatever else was dropped loses its parent.
        """
        dropped = 0
        matched: list[Node] = []
        shadow: list[ShadowScore] = []
        for token in tokens:
            scored: set[tuple[int, int]] = set()
            self._scored.append(scored)
            successor = self.root.children.get(token)
            for child in self.root.children.values():
                for source, claim in child.claims.items():
                    scored.add((source, child.token))
                    shadow.append(ShadowScore(source, claim, child is successor))
                if child is not successor:
                    dropped += _sever(child)
            if successor is None:
                successor = Node(token, None, self.root.position + 1, 0)
            else:
                matched.append(successor)
            successor.parent = None
            self.root = successor
        self.size -= len(matched) + dropped
        return Advance(tuple(matched), self.size, dropped, tuple(shadow))

    def shrink(self) -> int:
        """Evict leaves until the bound holds; returns how many.

        The source that owns most nodes loses its least probable leaf first, so that a drafter
        that floods the tree evicts its own nodes, not the others'.
        """
        excess = self.size - self.nodes_max
        if excess <= 0:
            return 0
        paths = {self.root: 0.0}
        levels = [self.root]
        owned: dict[int, int] = {}
        leaves: dict[int, list[tuple[float, int, Node]]] = {}
        for order, node in enumerate(levels):
            for child in node.children.values():
                paths[child] = paths[node] + self.estimate(child)
                owned[child.owner] = owned.get(child.owner, 0) + 1
                levels.append(child)
            if not node.children:
                leaves.setdefault(node.owner, []).append((paths[node], -order, node))
        for heap in leaves.values():
            heapq.heapify(heap)
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


def _bounded(logprob: float) -> float:
    return max(ESTIMATE_FLOOR, min(0.0, logprob))


def _raise_paths(top: Node, more: float) -> None:
    """Make a node and all below it more probable."""
    raised = [top]
    for node in raised:
        node.path_logprob += more
        raised.extend(node.children.values())


def _sever(top: Node) -> int:
    """Cut a dropped subtree's links to parents; returns its size.

    Without the cycles its memory is freed at once, and the collector has nothing to search: with
    tens of thousands of nodes that took longer than everything else here.
    """
    dropped = [top]
    for node in dropped:
        node.parent = None
        if node.children:
            dropped.extend(node.children.values())
    return len(dropped)


def subtree_draft(
    tree: DraftTree, fresh: Sequence[Node], *, epoch: int, base_length: int, base_digest: int
) -> Draft | None:
    """Build a self-contained draft of `fresh` nodes and their ancestors, or None if none lives.

    Nodes that no longer descend from the root are left out.
    """
    # The root is where paths end; what has no parent beside it belongs to no tree any more.
    index_of: dict[Node | None, int] = {tree.root: -1}
    tokens: list[int] = []
    parents: list[int] = []
    logprobs: list[float] = []
    for node in fresh:
        if node in index_of:
            continue
        path = [node]
        walker = node.parent
        while walker is not None and walker not in index_of:
            path.append(walker)
            walker = walker.parent
        if walker is None:
            continue
        at = index_of[walker]
        for step in reversed(path):
            parents.append(at)
            at = index_of[step] = len(tokens)
            tokens.append(step.token)
            claims = step.claims
            logprobs.append(max(claims.values()) if claims else 0.0)
    if not tokens:
        return None
    return Draft(epoch, base_length, base_digest, tuple(tokens), tuple(parents), tuple(logprobs))
