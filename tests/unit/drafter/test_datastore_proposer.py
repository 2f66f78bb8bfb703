"""What the datastore proposer makes of a corpus, by hand-worked examples and properties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.datastore import open_datastore
from drafter_service.datastore_building import build_datastore
from drafter_service.proposers.datastore import DatastoreProposer
from outrider.draft_tree import draft_fault
from outrider.tokenizer import byte_tokenizer, tokenizer_fingerprint
from tests.support.proposing import commit, mirror_of, opened, paths


def over(folder: Path, *documents: Sequence[int], match_min: int = 2) -> DatastoreProposer:
    build_datastore(folder / "c.store", documents, byte_tokenizer())
    return DatastoreProposer(open_datastore(folder / "c.store"), match_min=match_min)


def test_what_followed_in_the_corpus_is_the_guess(tmp_path: Path) -> None:
    proposer = over(tmp_path, [9, 1, 2, 3, 4, 5], [7, 1, 2, 6])
    mirror = opened(proposer, mirror_of(1, 2, depth_max=3))
    assert paths(mirror) == {(3, 4, 5), (6,)}
    # A longer match leaves no doubt which.
    mirror = opened(proposer, mirror_of(8, 7, 1, 2, session=2))
    assert paths(mirror) == {(6,)}


def test_frequent_continuations_are_more_probable(tmp_path: Path) -> None:
    proposer = over(tmp_path, *[[1, 2, 3]] * 3, [1, 2, 4], [1, 2])
    mirror = opened(proposer, mirror_of(1, 2))
    three, four = (mirror.tree.root.children[token] for token in (3, 4))
    trust = 1 - 0.6 * 0.6  # the prior of matches of two or three
    # One occurrence of five goes on with nothing at all.
    assert math.exp(three.accept_logprob) == pytest.approx(trust * 3 / 5)
    assert math.exp(four.accept_logprob) == pytest.approx(trust * 1 / 5)


def test_a_match_must_be_long_enough(tmp_path: Path) -> None:
    assert paths(opened(over(tmp_path, [1, 2, 3]), mirror_of(5, 2))) == set()
    assert paths(opened(over(tmp_path, [1, 2, 3], match_min=1), mirror_of(5, 2))) == {(3,)}


def test_budget_and_vocabulary_bound_the_guess(tmp_path: Path) -> None:
    proposer = over(tmp_path, [1, 2, 3, 4, 5], [1, 2, 6, 7, 8], [1, 2, 9])
    assert paths(opened(proposer, mirror_of(1, 2, depth_max=1))) == {(3,), (6,), (9,)}
    assert paths(opened(proposer, mirror_of(1, 2, nodes_max=2, session=2))) == {(3,), (6,)}
    assert paths(opened(proposer, mirror_of(1, 2, vocabulary=4, session=3))) == {(3,)}
    wide = mirror_of(1, 2, depth_max=1, width_max=2, session=4)
    assert paths(opened(proposer, wide)) == {(3,), (6,)}
    sure = mirror_of(1, 2, probability_min=0.3, session=5)
    assert paths(opened(proposer, sure)) == set(), "each has at most a third of the matches"


def test_it_goes_on_after_hits_and_misses(tmp_path: Path) -> None:
    proposer = over(tmp_path, [1, 2, 3, 4, 5, 6])
    mirror = opened(proposer, mirror_of(1, 2, depth_max=2))
    assert paths(mirror) == {(3, 4)}
    commit(proposer, mirror, 3)
    assert paths(mirror) == {(4, 5)}
    commit(proposer, mirror, 99)
    assert paths(mirror) == set()
    commit(proposer, mirror, 4, 5)
    assert paths(mirror) == {(6,)}
    proposer.close(mirror)
    proposer.close(mirror)


def test_trust_follows_what_happened(tmp_path: Path) -> None:
    proposer = over(tmp_path, [1, 2, 3])

    def claim() -> float:
        mirror = opened(proposer, mirror_of(1, 2, session=9))
        proposer.close(mirror)
        return math.exp(mirror.tree.root.children[3].accept_logprob)

    before = claim()
    for _ in range(60):
        mirror = opened(proposer, mirror_of(1, 2))
        commit(proposer, mirror, 3)
        proposer.close(mirror)
    assert claim() > before + 0.2
    for _ in range(200):
        mirror = opened(proposer, mirror_of(1, 2))
        commit(proposer, mirror, 5)
        proposer.close(mirror)
    assert claim() < 0.2


def test_each_guess_makes_the_match_longer(tmp_path: Path) -> None:
    proposer = over(tmp_path, [1, 2, 3, 4, 5])
    mirror = opened(proposer, mirror_of(1, 2, depth_max=3))
    node, claims = mirror.tree.root, []
    for token in (3, 4, 5):
        node = node.children[token]
        claims.append(math.exp(node.accept_logprob))
    # Priors of matches of two, three and four ids: twice as long, two fifths less doubt.
    assert claims == pytest.approx([1 - 0.6**2, 1 - 0.6**2, 1 - 0.6**3])


def test_it_fits_its_own_tokenizer_only(tmp_path: Path) -> None:
    info = over(tmp_path, [1]).info
    assert info.tokenizer_fingerprint == tokenizer_fingerprint(byte_tokenizer())
    assert (info.proposer, info.model) == ("datastore", "c")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=4),
    st.integers(1, 20),
)
def test_a_proposal_is_a_valid_tree_over_known_ids(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    prompt: list[int],
    commits: list[list[int]],
    nodes_max: int,
) -> None:
    proposer = over(tmp_path_factory.getbasetemp(), *documents)
    mirror = opened(proposer, mirror_of(*prompt, vocabulary=3, nodes_max=nodes_max))
    for tokens in ([], *commits):
        if tokens:
            commit(proposer, mirror, *tokens)
        assert mirror.tree.size <= nodes_max
        draft = mirror.take_draft()
        if draft is not None:
            assert draft_fault(draft, 3, nodes_max) is None
