"""Token recycling: hand-worked tables, whose they are, and what bounds them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.mirror import Mirror
from drafter_service.proposers.base import CandidateTaker
from drafter_service.proposers.lookup import LookupProposer
from drafter_service.proposers.recycling import RankEstimates, RecyclingProposer, Tables
from outrider.domain import Candidates
from outrider.draft_tree import draft_fault
from tests.support.proposing import commit, mirror_of, opened, paths


def said(*rows: tuple[int, tuple[int, ...]]) -> Candidates:
    return Candidates(tuple(token for token, _ in rows), tuple(tops for _, tops in rows))


def taught(
    *rows: tuple[int, tuple[int, ...]], salt: str = "", proposer: RecyclingProposer | None = None
) -> RecyclingProposer:
    proposer = proposer or RecyclingProposer(width=3)
    teacher = opened(proposer, mirror_of(50, session=1_000, cache_salt=salt))
    proposer.take(teacher, said(*rows))
    proposer.close(teacher)
    return proposer


def test_it_is_silent_until_it_has_heard_something() -> None:
    proposer = RecyclingProposer()
    mirror = opened(proposer, mirror_of(1))
    assert paths(mirror) == set()
    proposer.take(mirror, said((1, (2, 3)), (2, (4, 5))))
    commit(proposer, mirror, 2)
    assert paths(mirror) == {(4,), (5,)}


def test_a_worked_example() -> None:
    proposer = taught((1, (2, 3)), (2, (4, 1)), (3, (9, 8)))
    mirror = opened(proposer, mirror_of(7, 1, depth_max=2))
    assert paths(mirror) == {(2, 4), (2, 1), (3, 9), (3, 8)}
    first, second = (mirror.tree.root.children[token] for token in (2, 3))
    assert math.exp(first.accept_logprob) == pytest.approx(0.4)
    assert math.exp(second.accept_logprob) == pytest.approx(0.2)


def test_what_was_said_last_counts() -> None:
    proposer = taught((1, (2, 3)), (1, (4, 5)))
    assert paths(opened(proposer, mirror_of(1))) == {(4,), (5,)}


def test_probable_branches_grow_first() -> None:
    proposer = taught((1, (2, 3, 4)), (2, (5,)), (5, (6,)), (4, (7,)))
    mirror = opened(proposer, mirror_of(1, nodes_max=5))
    # 2, 5 has 0.16, and 4 has 0.1: what may follow 4 must wait although it lies less deep.
    assert paths(mirror) == {(2, 5, 6), (3,), (4,)}


def test_the_budget_and_the_vocabulary_bound_the_walk() -> None:
    proposer = taught((1, (2, 3)), (2, (1, 3)))
    assert paths(opened(proposer, mirror_of(1, depth_max=1, session=2))) == {(2,), (3,)}
    assert paths(opened(proposer, mirror_of(1, depth_max=1, width_max=1, session=3))) == {(2,)}
    assert paths(opened(proposer, mirror_of(1, probability_min=0.3, session=4))) == {(2,)}
    assert paths(opened(proposer, mirror_of(1, vocabulary=3, depth_max=1, session=5))) == {(2,)}


def test_tenants_do_not_hear_each_other() -> None:
    proposer = taught((1, (2, 3)), salt="mine")
    assert paths(opened(proposer, mirror_of(1, cache_salt="mine"))) == {(2,), (3,)}
    assert paths(opened(proposer, mirror_of(1, cache_salt="yours", session=2))) == set()
    assert paths(opened(proposer, mirror_of(1, session=3))) == set()
    taught((1, (7,)), salt="yours", proposer=proposer)
    assert paths(opened(proposer, mirror_of(1, cache_salt="mine", session=4))) == {(2,), (3,)}


def test_ranks_learn_what_they_are_worth() -> None:
    estimates = RankEstimates(3)
    prior = [estimates.logprob(rank) for rank in range(3)]
    assert prior == sorted(prior, reverse=True)
    for _ in range(1_000):
        estimates.observe((5, 6), 6)
    assert estimates.logprob(0) < math.log(0.02)
    assert estimates.logprob(1) == math.log(0.98)
    assert estimates.logprob(2) == prior[2], "nothing was guessed of that rank"


def first_claim(proposer: RecyclingProposer) -> float:
    mirror = opened(proposer, mirror_of(1, session=99))
    proposer.close(mirror)
    return math.exp(mirror.tree.root.children[2].accept_logprob)


def test_claims_follow_what_was_committed() -> None:
    proposer = taught((1, (2, 3)), (2, (4,)))
    before = first_claim(proposer)
    for _ in range(60):
        mirror = opened(proposer, mirror_of(1))
        commit(proposer, mirror, 2, 4, 9)
        proposer.close(mirror)
    assert first_claim(proposer) > before + 0.3
    for _ in range(400):
        mirror = opened(proposer, mirror_of(1))
        commit(proposer, mirror, 8)
        proposer.close(mirror)
    assert first_claim(proposer) < 0.1


def test_guesses_whose_parent_was_not_committed_teach_nothing() -> None:
    proposer = taught((1, (2,)), (2, (4,)))
    estimates = RankEstimates(3)
    for _ in range(50):
        mirror = opened(proposer, mirror_of(1))
        commit(proposer, mirror, 8, 4)  # 4 came, but not after 2
        proposer.close(mirror)
        estimates.observe((2,), 8)
    assert first_claim(proposer) == pytest.approx(math.exp(estimates.logprob(0)))


def test_tables_are_bounded_and_the_least_used_goes_first() -> None:
    tables = Tables(rows_max=4)
    for token in (1, 2):
        tables.write(("t", "old"), token, (9,))
        tables.write(("t", "used"), token, (9,))
    tables.of(("t", "used"))
    tables.write(("t", "new"), 1, (9,))
    assert len(tables) == 4
    assert tables.of(("t", "old")) == {2: (9,)}, "its oldest row had to go"
    assert list(tables.of(("t", "used"))) == [1, 2]
    tables.write(("t", "used"), 1, (8,))
    assert len(tables) == 4
    assert tables.of(("t", "used"))[1] == (8,)
    for token in range(3, 50):
        tables.write(("t", "new"), token, (9,))
    assert len(tables) == 4
    assert list(tables.of(("t", "new"))) == [46, 47, 48, 49]
    assert tables.of(("t", "old")) == tables.of(("t", "used")) == {}


def test_only_it_takes_candidates() -> None:
    assert isinstance(RecyclingProposer(), CandidateTaker)
    assert not isinstance(LookupProposer(), CandidateTaker)
    assert RecyclingProposer(width=5).info.candidates == 5
    assert LookupProposer().info.candidates == 0


ids = st.integers(0, 6)
rows = st.lists(st.tuples(ids, st.lists(ids, min_size=2, max_size=2).map(tuple)), min_size=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(rows, st.lists(ids, min_size=1, max_size=3)), max_size=6),
    st.integers(1, 20),
    st.integers(1, 6),
)
def test_a_proposal_is_a_valid_tree_over_known_ids(
    steps: list[tuple[list[tuple[int, tuple[int, ...]]], list[int]]], nodes_max: int, depth: int
) -> None:
    proposer = RecyclingProposer(width=2, rows_max=3)
    mirror = opened(proposer, mirror_of(1, vocabulary=5, nodes_max=nodes_max, depth_max=depth))
    for candidates, tokens in steps:
        proposer.take(mirror, said(*candidates))
        commit(proposer, mirror, *tokens)
        check(mirror, nodes_max)


def check(mirror: Mirror, nodes_max: int) -> None:
    assert mirror.tree.size <= nodes_max
    draft = mirror.take_draft()
    if draft is not None:
        assert draft_fault(draft, 5, nodes_max) is None
