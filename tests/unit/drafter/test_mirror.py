"""A session as a drafter sees it: following commits, and what it sends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.mirror import GapError, Mirror
from outrider.committed import digest
from outrider.domain import BindSpec, Commit, Draft, DraftBudget, SamplingParams
from outrider.draft_tree import DraftTree, Node, draft_fault

thorough = settings(deadline=None, derandomize=True)


def new_mirror(nodes_max: int = 16, depth_max: int = 8) -> Mirror:
    spec = BindSpec(
        session=5,
        epoch=3,
        binding=2,
        prompt=(1, 2),
        committed=(3,),
        sampling=SamplingParams(),
        seed=9,
        tokenizer_fingerprint="",
        vocabulary_size=50,
        budget=DraftBudget(nodes_max, depth_max, 0.0),
    )
    return Mirror(7, spec)


def attached(mirror: Mirror, parent: Node, token: int, logprob: float = -0.5) -> Node:
    node = mirror.attach(parent, token, logprob)
    assert node is not None
    return node


def drafted(mirror: Mirror) -> Draft:
    draft = mirror.take_draft()
    assert draft is not None
    assert draft_fault(draft, 50, mirror.budget.nodes_max) is None
    assert draft.epoch == 3
    assert draft.base_length == len(mirror.log)
    assert draft.base_digest == digest(mirror.log.tokens)
    return draft


def test_it_begins_with_prompt_and_committed_tokens() -> None:
    mirror = new_mirror()
    assert mirror.key == (7, 5)
    assert mirror.log.tokens == [1, 2, 3]
    assert (mirror.tree.root.token, mirror.tree.root.position) == (3, 2)
    assert (mirror.room, mirror.take_draft()) == (16, None)


def test_commits_are_followed_however_they_overlap() -> None:
    mirror = new_mirror()
    news = mirror.apply(Commit(3, 3, (4, 5)))
    assert news is not None
    assert news[0] == (4, 5)
    # Repeated, wholly and in part: only what is new counts.
    assert mirror.apply(Commit(3, 3, (4, 5))) is None
    assert mirror.apply(Commit(3, 1, (2, 3))) is None
    assert mirror.apply(Commit(3, 5, ())) is None
    news = mirror.apply(Commit(3, 4, (5, 6, 7)))
    assert news is not None
    assert news[0] == (6, 7)
    assert mirror.log.tokens == [1, 2, 3, 4, 5, 6, 7]
    assert (mirror.tree.root.token, mirror.tree.root.position) == (7, 6)


def test_a_gap_is_noticed_and_changes_nothing() -> None:
    mirror = new_mirror()
    node = attached(mirror, mirror.tree.root, 4)
    with pytest.raises(GapError):
        mirror.apply(Commit(3, 4, (5,)))
    assert mirror.log.tokens == [1, 2, 3]
    assert list(mirror.tree) == [node]


@thorough
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=30))
def test_any_order_of_stretches_of_one_text_leads_to_a_prefix_of_it(
    stretches: list[tuple[int, int]],
) -> None:
    text = (1, 2, 3, *range(4, 30))
    mirror = new_mirror()
    for start, count in stretches:
        before = len(mirror.log)
        if start > before:
            with pytest.raises(GapError):
                mirror.apply(Commit(3, start, text[start : start + count]))
        else:
            mirror.apply(Commit(3, start, text[start : start + count]))
            assert len(mirror.log) == max(before, start + count)
        assert tuple(mirror.log.tokens) == text[: len(mirror.log)]
        assert mirror.tree.root.token == mirror.log.tip


def test_drafts_are_self_contained() -> None:
    mirror = new_mirror()
    four = attached(mirror, mirror.tree.root, 4, -0.1)
    five = attached(mirror, four, 5, -0.2)
    assert drafted(mirror).tokens == (4, 5)
    assert mirror.take_draft() is None, "what was sent is not fresh"
    attached(mirror, five, 6, -0.3)
    attached(mirror, mirror.tree.root, 7, -0.4)
    draft = drafted(mirror)
    # The new node's ancestors come along, so that the message stands on its own.
    assert (draft.tokens, draft.parents) == ((4, 5, 6, 7), (-1, 0, 1, -1))
    assert draft.accept_logprobs == (-0.1, -0.2, -0.3, -0.4)
    alone = DraftTree(3, 3, nodes_max=16, depth_max=8)
    alone.merge(draft, [], 1)
    assert alone.size == mirror.tree.size


def test_drafts_are_rooted_at_the_present_tip() -> None:
    mirror = new_mirror()
    four = attached(mirror, mirror.tree.root, 4)
    attached(mirror, four, 5)
    attached(mirror, mirror.tree.root, 9)
    mirror.apply(Commit(3, 3, (4,)))
    draft = drafted(mirror)
    assert (draft.tokens, draft.parents, draft.base_length) == ((5,), (-1,), 4)
    attached(mirror, mirror.tree.root, 6)
    mirror.apply(Commit(3, 4, (30,)))
    assert mirror.take_draft() is None, "nothing fresh has outlived the commit"


def test_what_is_known_is_not_sent_again() -> None:
    mirror = new_mirror()
    four = attached(mirror, mirror.tree.root, 4)
    drafted(mirror)
    assert attached(mirror, mirror.tree.root, 4) is four
    assert mirror.take_draft() is None


def test_the_improbable_is_sent_once_a_commit_has_made_it_probable() -> None:
    mirror = new_mirror()
    mirror.set_budget(DraftBudget(16, 8, 0.0, probability_min=0.1))
    four = attached(mirror, mirror.tree.root, 4, math.log(0.5))
    five = attached(mirror, four, 5, math.log(0.1))
    attached(mirror, four, 6, math.log(0.01))
    attached(mirror, five, 7, math.log(0.9))
    assert drafted(mirror).tokens == (4,)
    assert mirror.take_draft() is None
    mirror.apply(Commit(3, 3, (4,)))
    assert drafted(mirror).tokens == (5,)
    mirror.apply(Commit(3, 4, (5,)))
    assert drafted(mirror).tokens == (7,)


def test_the_budget_holds() -> None:
    mirror = new_mirror(nodes_max=2, depth_max=1)
    four = attached(mirror, mirror.tree.root, 4)
    assert mirror.attach(four, 5, -0.1) is None, "too deep"
    attached(mirror, mirror.tree.root, 5)
    assert mirror.room == 0
    assert mirror.attach(mirror.tree.root, 6, -0.1) is None, "no room"
    assert mirror.attach(mirror.tree.root, 4, -0.1) is four, "it is there already"
    mirror.set_budget(DraftBudget(3, 2, 0.0))
    attached(mirror, four, 5)
    assert mirror.room == 0
    mirror.set_budget(DraftBudget(1, 1, 0.0))
    assert mirror.attach(mirror.tree.root, 7, -0.1) is None
    # Nodes over the budget die out by themselves.
    mirror.apply(Commit(3, 3, (4,)))
    assert (mirror.tree.size, mirror.room) == (1, 0)


def test_several_guesses_at_once_keep_to_budget_and_vocabulary() -> None:
    mirror = new_mirror(nodes_max=3)
    first = mirror.expand(mirror.tree.root, [(4, -0.5), (50, -0.1), (5, -0.5)])
    assert [node.token for node in first] == [4, 5]
    assert [node.token for node in mirror.expand(first[0], [(6, -0.5), (7, -0.5)])] == [6]
    assert mirror.expand(first[1], [(6, -0.5)]) == []
    assert mirror.room == 0
    assert drafted(mirror).tokens == (4, 5, 6)


@pytest.mark.parametrize("token", [-1, 50])
def test_ids_outside_the_vocabulary_are_not_guessed(token: int) -> None:
    mirror = new_mirror()
    assert mirror.attach(mirror.tree.root, token, -0.1) is None
    assert mirror.tree.size == 0
