"""The draft tree: worked by hand, and as a machine that is fed whatever a network may do."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import random
import weakref
from collections.abc import Sequence

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from outrider.committed import CommittedLog, digest
from outrider.domain import Draft
from outrider.draft_tree import (
    ESTIMATE_FLOOR,
    Advance,
    DraftTree,
    Merge,
    Node,
    ShadowScore,
    draft_fault,
    subtree_draft,
)
from verifier_service.acceptance import AcceptRule, accept_path, judge

LOG_HALF = math.log(0.5)


def draft(*nodes: tuple[int, int, float], base_length: int = 1) -> Draft:
    """Build a draft of (token, parent, accept_logprob)."""
    tokens, parents, logprobs = zip(*nodes, strict=True) if nodes else ((), (), ())
    return Draft(1, base_length, 0, tuple(tokens), tuple(parents), tuple(logprobs))


def chain(*tokens: int, logprob: float = LOG_HALF) -> Draft:
    return draft(*((token, index - 1, logprob) for index, token in enumerate(tokens)))


def new_tree(nodes_max: int = 64, depth_max: int = 32) -> DraftTree:
    return DraftTree(100, 1, nodes_max=nodes_max, depth_max=depth_max)


def path_of(tree: DraftTree, node: Node) -> tuple[int, ...]:
    tokens: list[int] = []
    walker: Node | None = node
    while walker is not tree.root:
        assert walker is not None, "a live node does not descend from the root"
        tokens.append(walker.token)
        walker = walker.parent
    return tuple(reversed(tokens))


def snapshot(tree: DraftTree) -> dict[tuple[int, ...], tuple[int, dict[int, float]]]:
    return {path_of(tree, node): (node.owner, dict(node.claims)) for node in tree}


def at(tree: DraftTree, *path: int) -> Node:
    node = tree.root
    for token in path:
        node = node.children[token]
    return node


# --- merging ----------------------------------------------------------------------------------


def test_a_draft_becomes_nodes_below_the_tip() -> None:
    tree = new_tree()
    merge = tree.merge(draft((5, -1, -0.1), (6, 0, -0.2), (7, 0, -0.3), (8, -1, -0.4)), [], 3)
    assert merge == Merge(grafted=4)
    assert snapshot(tree) == {
        (5,): (3, {3: -0.1}),
        (5, 6): (3, {3: -0.2}),
        (5, 7): (3, {3: -0.3}),
        (8,): (3, {3: -0.4}),
    }
    assert tree.size == 4
    assert [at(tree, 5, 6).position, tree.root.position] == [2, 0]


def test_a_late_draft_is_salvaged_along_what_was_committed() -> None:
    tree = new_tree()
    # Since the base, 1 2 were committed: of the chain 1 2 3 the 3 lives; 9 and what follows do not.
    late = draft((1, -1, -0.1), (2, 0, -0.1), (3, 1, -0.5), (9, 0, -1.0), (3, 3, -1.0), (8, -1, 0))
    assert tree.merge(late, [1, 2], 1) == Merge(grafted=1, decided=2, off_path=3)
    assert snapshot(tree) == {(3,): (1, {1: -0.5})}
    # Parents index nodes of the message: siblings below a node that was decided are grafted too.
    late = draft((1, -1, -0.1), (2, 0, -0.1), (3, 1, -0.5), (4, 1, -1.0), (5, 3, -1.0))
    assert tree.merge(late, [1, 2], 1) == Merge(grafted=2, decided=2, duplicates=1)
    assert set(snapshot(tree)) == {(3,), (4,), (4, 5)}


def test_a_draft_may_be_wholly_late_or_wholly_wrong() -> None:
    tree = new_tree()
    assert tree.merge(chain(1, 2), [1, 2, 3], 1) == Merge(decided=2)
    assert tree.merge(chain(2, 2), [1, 2, 3], 1) == Merge(off_path=2)
    assert tree.size == 0


def test_a_repeated_draft_merges_into_itself() -> None:
    tree = new_tree()
    message = draft((5, -1, -0.1), (6, 0, -0.2))
    tree.merge(message, [], 1)
    before = snapshot(tree)
    assert tree.merge(message, [], 1) == Merge(duplicates=2)
    assert snapshot(tree) == before
    assert tree.size == 2
    # Twice within one message, siblings with one token are one node.
    twins = draft((7, -1, -0.1), (7, -1, -0.3), (8, 1, -0.2))
    assert tree.merge(twins, [], 1) == Merge(grafted=2, duplicates=1)
    assert at(tree, 7, 8).parent is at(tree, 7)


def test_two_sources_unite_and_the_more_confident_counts() -> None:
    tree = new_tree()
    tree.merge(draft((5, -1, -2.0), (6, 0, -0.5)), [], 1)
    assert tree.merge(draft((5, -1, -1.0), (7, 0, -0.25)), [], 2) == Merge(1, 1)
    assert snapshot(tree) == {
        (5,): (1, {1: -2.0, 2: -1.0}),
        (5, 6): (1, {1: -0.5}),
        (5, 7): (2, {2: -0.25}),
    }
    assert at(tree, 5).accept_logprob == -1.0
    # A source may raise what it said, never lower it: a late duplicate changes nothing.
    tree.merge(draft((5, -1, -3.0)), [], 2)
    assert at(tree, 5).accept_logprob == -1.0
    tree.merge(draft((5, -1, -0.75)), [], 1)
    assert at(tree, 5).accept_logprob == -0.75


def test_paths_of_a_drafters_tree_follow_its_claims() -> None:
    tree = new_tree()
    five = tree.add(tree.root, 5, -1.0, 1)
    assert five is not None
    six, seven = tree.sprout(five, ((6, -0.5), (7, -2.0)), 1)
    (eight,) = tree.sprout(six, ((8, -0.25),), 1)
    assert (tree.size, eight.path_logprob, seven.path_logprob) == (4, -1.75, -3.0)
    # A claim that rises lifts all that lies below it; one that would fall changes nothing.
    assert tree.add(five, 6, -0.125, 1) is six
    assert tree.add(five, 7, -9.0, 1) is seven
    assert (eight.path_logprob, seven.path_logprob) == (-1.375, -3.0)
    # They stay comparable after a commit.
    tree.advance([5])
    assert eight.path_logprob - tree.root.path_logprob == -0.375


def test_nothing_sprouts_below_the_greatest_depth() -> None:
    tree = new_tree(depth_max=1)
    (five,) = tree.sprout(tree.root, ((5, -1.0),), 1)
    assert tree.sprout(five, ((6, -1.0),), 1) == []
    assert tree.size == 1


def test_estimates_are_kept_within_bounds() -> None:
    tree = new_tree()
    tree.merge(draft((5, -1, 5e-5), (6, -1, -1e300)), [], 1)
    assert at(tree, 5).accept_logprob == 0.0
    assert at(tree, 6).accept_logprob == ESTIMATE_FLOOR


def test_nodes_below_the_greatest_depth_are_refused_and_counted() -> None:
    tree = new_tree(depth_max=2)
    assert tree.merge(chain(1, 2, 3, 4), [], 1) == Merge(grafted=2, too_deep=2)
    assert set(snapshot(tree)) == {(1,), (1, 2)}
    # After a commit there is room below again.
    tree.advance([1])
    assert tree.merge(chain(1, 2, 3, 4), [1], 1) == Merge(1, 1, 1, 0, 1)
    assert set(snapshot(tree)) == {(2,), (2, 3)}


# --- committing -------------------------------------------------------------------------------


def family() -> DraftTree:
    """1 -> (2 -> 3, 4) and 5 -> 6."""
    tree = new_tree()
    tree.merge(
        draft((1, -1, -0.1), (2, 0, -0.2), (3, 1, -0.3), (4, 0, -0.4), (5, -1, -0.5), (6, 4, -0.6)),
        [],
        1,
    )
    return tree


def test_a_hit_keeps_the_subtree_below_it() -> None:
    tree = family()
    one, two = at(tree, 1), at(tree, 1, 2)
    advance = tree.advance([1])
    assert advance == Advance(
        (one,), 3, 2, (ShadowScore(1, -0.1, True), ShadowScore(1, -0.5, False))
    )
    assert tree.root is one
    assert (tree.root.parent, tree.root.position) == (None, 1)
    assert set(snapshot(tree)) == {(2,), (2, 3), (4,)}
    assert at(tree, 2) is two, "identity survives re-rooting"


def test_a_miss_leaves_an_empty_tree_at_the_right_place() -> None:
    tree = family()
    advance = tree.advance([9])
    assert (advance.matched, advance.survivors, advance.dropped) == ((), 0, 6)
    assert [score.accepted for score in advance.shadow] == [False, False]
    assert (tree.root.token, tree.root.position, tree.size) == (9, 1, 0)


def test_a_partial_hit_scores_only_children_of_the_path() -> None:
    tree = family()
    one, two = at(tree, 1), at(tree, 1, 2)
    advance = tree.advance([1, 2, 9, 8])
    assert advance.matched == (one, two)
    assert (advance.survivors, advance.dropped, tree.size) == (0, 4, 0)
    # Roots 1 and 5; below 1: 2 and 4; below 2: 3. Never 6, whose parent was not committed.
    claims = [(score.claimed_logprob, score.accepted) for score in advance.shadow]
    assert claims == [(-0.1, True), (-0.5, False), (-0.2, True), (-0.4, False), (-0.3, False)]
    assert (tree.root.token, tree.root.position) == (8, 4)


def test_each_source_is_scored_for_what_it_said() -> None:
    tree = new_tree()
    tree.merge(draft((1, -1, -0.1)), [], 1)
    tree.merge(draft((1, -1, -0.9)), [], 2)
    assert tree.advance([1]).shadow == (ShadowScore(1, -0.1, True), ShadowScore(2, -0.9, True))


def test_late_drafts_are_scored_once_for_what_was_committed_since() -> None:
    tree = new_tree()
    tree.merge(draft((1, -1, -0.1)), [], 1)
    tree.advance([1, 2])
    # 1 was in the tree and has been scored; of 2 and 7 beside it the source said nothing in time.
    late = draft((1, -1, -0.3), (2, 0, -0.2), (7, 0, -0.9), (3, 1, -0.4), (8, 2, -0.5))
    merge = tree.merge(late, [1, 2], 1)
    assert merge.shadow == (ShadowScore(1, -0.2, True), ShadowScore(1, -0.9, False))
    assert tree.merge(late, [1, 2], 1).shadow == (), "a repeated draft is no new evidence"
    # Another source is judged by itself, and what lives on is scored when it is decided.
    assert [score.source for score in tree.merge(late, [1, 2], 2).shadow] == [2, 2, 2]
    shadow = tree.advance([3]).shadow
    assert shadow == (ShadowScore(1, -0.4, True), ShadowScore(2, -0.4, True))
    assert tree.merge(draft((2, -1, -0.2), (3, 0, -0.4)), [2, 3], 1).shadow == ()


def test_what_was_committed_long_ago_is_not_evidence() -> None:
    tree = new_tree()
    tree.advance([5] * 70)
    message = draft((5, -1, -0.1), (5, 0, -0.1))
    assert tree.merge(message, [5] * 65, 1).shadow == (ShadowScore(1, -0.1, True),)
    # Before the tree began nothing is known either.
    assert new_tree().merge(message, [5, 5], 1).shadow == ()


def test_what_is_dropped_is_freed_without_the_collector() -> None:
    tree = family()
    dropped = [weakref.ref(at(tree, *path)) for path in ((5,), (5, 6), (1, 4), (1, 2, 3))]
    gc.disable()
    try:
        tree.advance([1, 2])
        assert [ref() is None for ref in dropped] == [True, True, True, False]
    finally:
        gc.enable()


# --- choosing ---------------------------------------------------------------------------------


def test_nodes_come_most_probable_path_first() -> None:
    tree = family()
    ranked = [(path_of(tree, node), logprob) for logprob, node in tree.ranked()]
    assert [path for path, _ in ranked] == [(1,), (1, 2), (5,), (1, 4), (1, 2, 3), (5, 6)]
    # Of equals the one that was reached first.
    expected = [-0.1, -0.3, -0.5, -0.5, -0.6, -1.1]
    assert [logprob for _, logprob in ranked] == pytest.approx(expected)
    assert [path_of(tree, node) for node in tree.best(3)] == [(1,), (1, 2), (5,)]
    assert len(tree.best(99)) == 6
    assert tree.best(0) == []


def test_a_better_deep_path_beats_a_worse_shallow_one() -> None:
    tree = new_tree()
    tree.merge(draft((1, -1, -2.0), (2, -1, -0.1), (3, 1, -0.1), (4, 2, -0.1)), [], 1)
    assert [path_of(tree, node) for node in tree.best(3)] == [(2,), (2, 3), (2, 3, 4)]


def test_who_floods_the_tree_evicts_its_own_nodes() -> None:
    tree = new_tree(nodes_max=10)
    tree.merge(chain(1, 2, 3, logprob=-3.0), [], 1)
    flood = draft(*((10 + index, -1, 0.0) for index in range(10)))
    assert tree.merge(flood, [], 2).evicted == 3
    owners = [node.owner for node in tree]
    assert (owners.count(1), owners.count(2), tree.size) == (3, 7, 10)
    assert set(snapshot(tree)) >= {(1,), (1, 2), (1, 2, 3)}
    # The latest of equals goes first.
    assert set(tree.root.children) == {1, *range(10, 17)}


def test_the_least_probable_leaf_goes_first_and_parents_after_children() -> None:
    tree = new_tree(nodes_max=2)
    message = draft((1, -1, -0.1), (2, 0, -5.0), (3, 1, -0.1), (4, -1, -1.0))
    assert tree.merge(message, [], 1).evicted == 2
    assert set(snapshot(tree)) == {(1,), (4,)}
    evicted = [node for node in (at(tree, 1), at(tree, 4)) if node.children]
    assert evicted == []


def test_two_sources_share_a_full_tree() -> None:
    tree = new_tree(nodes_max=8)
    for source in (1, 2):
        tree.merge(draft(*((10 * source + i, -1, -0.1) for i in range(8))), [], source)
    owners = [node.owner for node in tree]
    assert (owners.count(1), owners.count(2)) == (4, 4)


# --- what a drafter sends ---------------------------------------------------------------------


def pack(tree: DraftTree, fresh: Sequence[Node]) -> Draft | None:
    return subtree_draft(tree, fresh, epoch=7, base_length=1, base_digest=42)


def test_a_draft_repeats_the_ancestors_of_what_is_fresh() -> None:
    tree = family()
    three, four, six = at(tree, 1, 2, 3), at(tree, 1, 4), at(tree, 5, 6)
    message = pack(tree, [three, four, six])
    assert message == Draft(
        7, 1, 42, (1, 2, 3, 4, 5, 6), (-1, 0, 1, 0, -1, 4), (-0.1, -0.2, -0.3, -0.4, -0.5, -0.6)
    )
    again = new_tree()
    again.merge(message, [], 1)
    assert snapshot(again) == snapshot(tree)


def test_each_node_goes_once_and_only_what_is_needed() -> None:
    tree = family()
    message = pack(tree, [at(tree, 1, 4), at(tree, 1), at(tree, 1, 4)])
    assert message is not None
    assert (message.tokens, message.parents) == ((1, 4), (-1, 0))


def test_what_does_not_live_any_more_is_left_out() -> None:
    tree = family()
    one, two, three, four = at(tree, 1), at(tree, 1, 2), at(tree, 1, 2, 3), at(tree, 1, 4)
    five, six = at(tree, 5), at(tree, 5, 6)
    tree.advance([1])
    # The new root itself, its former siblings and their children are gone; the rest is re-rooted.
    message = pack(tree, [one, five, six, three])
    assert message is not None
    assert (message.tokens, message.parents) == ((2, 3), (-1, 0))
    assert pack(tree, [one, five, six]) is None
    assert pack(tree, []) is None
    tree.nodes_max = 1
    tree.shrink()
    gone = {two, three, four} - set(tree)
    assert len(gone) == 2
    assert pack(tree, list(gone)) is None


# --- hostile drafts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "parents", "logprobs", "fault"),
    [
        ((1, 2), (-1, 0), (0.0, 5e-5), None),
        ((9,), (-1,), (-1e30,), None),
        ((1, 2), (-1,), (0.0, 0.0), "lengths"),
        ((1,), (-1, 0), (0.0,), "lengths"),
        ((1, 2), (-1, 0), (0.0,), "lengths"),
        ((), (), (), "empty"),
        ((1,) * 9, (-1,) * 9, (0.0,) * 9, "oversize"),
        ((10,), (-1,), (0.0,), "token"),
        ((1, -1), (-1, 0), (0.0, 0.0), "token"),
        ((1 << 32,), (-1,), (0.0,), "token"),
        ((1,), (0,), (0.0,), "parent"),  # itself
        ((1, 2), (-1, 1), (0.0, 0.0), "parent"),  # itself
        ((1, 2), (1, 0), (0.0, 0.0), "parent"),  # in a circle
        ((1, 2, 3), (-1, 2, 0), (0.0, 0.0, 0.0), "parent"),  # a later one
        ((1,), (-2,), (0.0,), "parent"),
        ((1, 2), (-1, 99), (0.0, 0.0), "parent"),
        ((1,), (-1,), (math.nan,), "score"),
        ((1,), (-1,), (math.inf,), "score"),
        ((1,), (-1,), (-math.inf,), "score"),
        ((1,), (-1,), (0.001,), "score"),
        ((1, 2), (-1, 0), (0.0, math.nan), "score"),
    ],
)
def test_hostile_drafts_are_named(
    tokens: tuple[int, ...],
    parents: tuple[int, ...],
    logprobs: tuple[float, ...],
    fault: str | None,
) -> None:
    message = Draft(1, 1, 0, tokens, parents, logprobs)
    assert draft_fault(message, vocabulary_size=10, nodes_max=8) == fault


def test_only_the_nodes_that_will_be_used_are_looked_at() -> None:
    message = Draft(1, 1, 0, (1, 2, 99), (-1, 0, 7), (0.0, 0.0, math.nan))
    assert draft_fault(message, vocabulary_size=10, nodes_max=8) == "token"
    assert draft_fault(message, vocabulary_size=10, nodes_max=8, first=2) is None
    assert draft_fault(message, vocabulary_size=10, nodes_max=8, first=3) == "token"
    assert draft_fault(message, vocabulary_size=10, nodes_max=2, first=1) == "oversize"
    short = Draft(1, 1, 0, (1, 2), (-1,), (0.0,))
    assert draft_fault(short, vocabulary_size=10, nodes_max=8, first=1) == "lengths"


# --- the whole, as a machine ------------------------------------------------------------------

VOCABULARY = 4
PROMPT = (3, 1, 2)
SOURCES = 3
NODES_MAX = 14
DEPTH_MAX = 5
STEP_NODES_MAX = 8


def target(prefix: Sequence[int]) -> int:
    """What the target samples after a prefix: any pure function will do."""
    return digest(prefix) % VOCABULARY


def target_text(length: int) -> list[int]:
    tokens = list(PROMPT)
    while len(tokens) < length:
        tokens.append(target(tokens))
    return tokens


def rebased(message: Draft, since: Sequence[int]) -> Draft | None:
    """The part of a draft that a drafter would send who already knew `since`."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(message.tokens, message.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    kept = [i for i, path in enumerate(paths) if path[: len(since)] == tuple(since)]
    kept = [i for i in kept if len(paths[i]) > len(since)]
    if not kept:
        return None
    return Draft(
        message.epoch,
        message.base_length + len(since),
        0,
        tuple(message.tokens[i] for i in kept),
        tuple(kept.index(p) if (p := message.parents[i]) in kept else -1 for i in kept),
        tuple(message.accept_logprobs[i] for i in kept),
    )


def partly_right(prefix: Sequence[int], count: int, chance: random.Random) -> Draft:
    """A tree of guesses, three of four of which are what the target would say there."""
    paths: list[tuple[int, ...]] = []
    parents: list[int] = []
    for _ in range(count):
        parent = chance.randrange(-1, len(paths))
        above = paths[parent] if parent >= 0 else ()
        right = chance.random() < 0.75
        token = target([*prefix, *above]) if right else chance.randrange(VOCABULARY)
        paths.append((*above, token))
        parents.append(parent)
    logprobs = tuple(chance.uniform(-6.0, 0.0) for _ in paths)
    tokens = tuple(path[-1] for path in paths)
    return Draft(1, len(prefix), digest(prefix), tokens, tuple(parents), logprobs)


class Speculation(RuleBasedStateMachine):
    """A verifier, its tree, and drafters behind a network that delays, repeats and loses."""

    accept: AcceptRule = staticmethod(accept_path)

    @initialize()
    def open(self) -> None:
        self.log = CommittedLog(PROMPT)
        self.tree = DraftTree(self.log.tip, len(self.log), nodes_max=NODES_MAX, depth_max=DEPTH_MAX)
        self.network: list[tuple[int, Draft]] = []

    @rule(
        source=st.integers(1, SOURCES),
        lag=st.integers(0, 6),
        count=st.integers(1, NODES_MAX),
        seed=st.integers(0, 1 << 16),
    )
    def propose(self, source: int, lag: int, count: int, seed: int) -> None:
        """A drafter that has followed up to `lag` tokens ago says something partly right."""
        base = max(len(PROMPT), len(self.log) - lag)
        message = partly_right(self.log.tokens[:base], count, random.Random(seed))
        assert draft_fault(message, VOCABULARY, NODES_MAX) is None
        assert self.log.digest_at(base) == message.base_digest
        self.network.append((source, message))

    @precondition(lambda self: self.network)
    @rule(index=st.integers(0, 99), fate=st.sampled_from(["arrives", "is repeated", "is lost"]))
    def deliver(self, index: int, fate: str) -> None:
        index %= len(self.network)
        source, message = self.network[index]
        if fate != "is repeated":
            del self.network[index]
        if fate != "is lost":
            self.merge(source, message)

    def merge(self, source: int, message: Draft) -> None:
        since = self.log.since(message.base_length)
        fresh_tree = copy.deepcopy(self.tree)
        merge = self.tree.merge(message, since, source)
        fresh = rebased(message, since)
        evicted = 0
        if fresh is not None:
            evicted = fresh_tree.merge(fresh, [], source).evicted
        assert snapshot(self.tree) == snapshot(fresh_tree)
        assert merge.evicted == evicted
        counts = (merge.grafted, merge.duplicates, merge.decided, merge.off_path, merge.too_deep)
        assert sum(counts) == len(message.tokens)
        right = [score.accepted for score in merge.shadow]
        assert sum(right) <= merge.decided
        assert len(right) - sum(right) <= merge.off_path

    @rule(count=st.integers(0, STEP_NODES_MAX))
    def verify(self, count: int) -> None:
        nodes = self.tree.best(count)
        before = self.tree.size
        prefix = list(self.log.tokens)
        samples = [target(prefix)]
        samples += [target([*prefix, *path_of(self.tree, node)]) for node in nodes]
        verdict = judge(
            self.tree.root,
            nodes,
            samples,
            stop_ids=frozenset(),
            tokens_left=1000,
            rule=self.accept,
        )
        self.log.append(verdict.tokens)
        advance = self.tree.advance(verdict.tokens)
        assert len(advance.matched) + advance.survivors + advance.dropped == before
        assert self.log.tokens == target_text(len(self.log))

    @invariant()
    def the_tree_is_well_formed(self) -> None:
        assert (self.tree.root.token, self.tree.root.parent) == (self.log.tip, None)
        assert self.tree.root.position == len(self.log) - 1
        nodes = list(self.tree)
        for node in nodes:
            path = path_of(self.tree, node)
            assert len(path) <= DEPTH_MAX
            assert node.position == self.tree.root.position + len(path)
            assert all(token == child.token for token, child in node.children.items())
            assert all(child.parent is node for child in node.children.values())
            assert node.owner in node.claims
            assert all(ESTIMATE_FLOOR <= value <= 0.0 for value in node.claims.values())
        assert len({path_of(self.tree, node) for node in nodes}) == len(nodes) == self.tree.size
        assert self.tree.size <= NODES_MAX
        ranked = list(self.tree.ranked())
        assert {node for _, node in ranked} == set(nodes)
        assert all(a >= b - 1e-9 for (a, _), (b, _) in itertools.pairwise(ranked))
        seen: set[Node | None] = {self.tree.root}
        for _, node in ranked:
            assert node.parent in seen, "parents come before children"
            seen.add(node)


thorough = settings(max_examples=300, stateful_step_count=30, deadline=None, derandomize=True)


def test_what_is_committed_is_the_targets_own_whatever_the_schedule() -> None:
    run_state_machine_as_test(Speculation, settings=thorough)


def accept_first_child(
    tip: Node, nodes: Sequence[Node], samples: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Accept whatever is there: what the property must catch."""
    children = [index for index, node in enumerate(nodes) if node.parent is tip]
    if not children:
        return [], [samples[0]]
    first = children[0]
    return [first], [nodes[first].token, samples[1 + first]]


def test_the_property_catches_a_rule_that_believes_drafters() -> None:
    class Gullible(Speculation):
        accept: AcceptRule = staticmethod(accept_first_child)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Gullible, settings=settings(thorough, phases=[Phase.generate], print_blob=False)
        )


def test_right_guesses_are_committed_many_at_a_time() -> None:
    tree = DraftTree(PROMPT[-1], len(PROMPT), nodes_max=NODES_MAX, depth_max=DEPTH_MAX)
    text = target_text(len(PROMPT) + DEPTH_MAX + 1)
    guesses = text[len(PROMPT) : -1]
    tree.merge(chain(*guesses), [], 1)
    nodes = tree.best(DEPTH_MAX)
    samples = text[len(PROMPT) :]
    verdict = judge(tree.root, nodes, samples, stop_ids=frozenset(), tokens_left=99)
    assert list(verdict.tokens) == samples
    assert len(verdict.accepted) == DEPTH_MAX
