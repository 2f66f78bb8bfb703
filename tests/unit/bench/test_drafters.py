"""The drafters of the verifier benchmark say what they claim to say."""

from __future__ import annotations

import pytest

from bench.drafters import TREE_NODES, Honest, Silent, WrongTrees
from outrider.committed import CommittedLog
from outrider.draft_tree import draft_fault
from outrider.wire import draft_from_bytes

VOCABULARY = 1_000


def test_wrong_trees_are_full_valid_and_rooted_at_the_tip() -> None:
    log = CommittedLog((1, 2, 3))
    policy = WrongTrees(VOCABULARY)
    seen = set()
    for token in (4, 5):
        log.append((token,))
        draft = draft_from_bytes(policy.draft(log))
        assert draft is not None
        assert draft_fault(draft, VOCABULARY, TREE_NODES) is None
        assert (draft.epoch, draft.base_length) == (1, len(log))
        assert draft.base_digest == log.digest_at(len(log))
        assert len(draft.tokens) == TREE_NODES
        assert draft.parents.count(-1) == 16
        # A chain of 16 below each of them.
        assert sum(parent == index - 1 for index, parent in enumerate(draft.parents)) == 241
        assert draft.accept_logprobs == pytest.approx([-0.10536] * TREE_NODES, abs=1e-4)
        seen.add(draft.tokens)
    assert len(seen) == 2


def test_the_silent_one_speaks_once_to_each_session() -> None:
    policy = Silent(VOCABULARY)
    logs = [CommittedLog((1,)), CommittedLog((1,))]
    assert [policy.draft(log) is None for log in (*logs, *logs)] == [False, False, True, True]


def test_the_honest_one_drafts_what_comes_next_until_the_text_takes_another_turn() -> None:
    policy = Honest((1, 2, 3, 4, 5), depth=2)
    log = CommittedLog((1,))
    log.append((2,))
    draft = draft_from_bytes(policy.draft(log) or b"")
    assert draft is not None
    assert (draft.tokens, draft.parents, draft.base_length) == ((3, 4), (-1, 0), 2)
    assert draft_fault(draft, VOCABULARY, TREE_NODES) is None
    log.append((3, 4, 5))
    assert policy.draft(log) is None
    assert not policy.diverged
    log = CommittedLog((1, 9))
    assert policy.draft(log) is None
    assert policy.diverged
