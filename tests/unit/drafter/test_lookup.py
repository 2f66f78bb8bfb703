"""The suffix automaton against brute force, and what the lookup proposer makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drafter_service.mirror import Mirror
from drafter_service.proposers.lookup import LookupProposer, SuffixAutomaton
from drafter_service.proposers.match_estimates import MatchEstimates
from outrider.domain import Commit
from tests.support.proposing import mirror_of

thorough = settings(max_examples=300, deadline=None, derandomize=True)


def brute_force(tokens: Sequence[int]) -> tuple[int, list[int]]:
    """Length of the longest suffix that also ends earlier, and all places where it does."""
    last = len(tokens) - 1
    for length in range(last, 0, -1):
        suffix = tokens[-length:]
        ends = [e for e in range(length - 1, last) if tokens[e - length + 1 : e + 1] == suffix]
        if ends:
            return length, ends
    return 0, []


@thorough
@given(
    st.integers(1, 4).flatmap(
        lambda alphabet: st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=60)
    )
)
@example([0] * 30)
@example([0, 1] * 15)
@example([0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0])  # a Fibonacci word: many splits
def test_the_match_is_the_longest_that_also_ends_earlier(tokens: list[int]) -> None:
    automaton = SuffixAutomaton()
    for count, token in enumerate(tokens, start=1):
        automaton.extend(token)
        length, ends = brute_force(tokens[:count])
        assert automaton.match_length == length
        assert set(automaton.match_ends) <= set(ends)
        assert len(set(automaton.match_ends)) == len(automaton.match_ends)
        if ends:
            assert automaton.match_ends[-1] == ends[0], "the first occurrence is among them"
        else:
            assert automaton.match_ends == ()
    assert automaton.tokens == tokens


def test_the_latest_occurrence_comes_first() -> None:
    automaton = SuffixAutomaton()
    for token in (1, 2, 7, 1, 2, 8, 1, 2):
        automaton.extend(token)
    assert (automaton.match_length, automaton.match_ends) == (2, (4, 1))


# --- the proposer -----------------------------------------------------------------------------


def opened(proposer: LookupProposer, mirror: Mirror) -> Mirror:
    proposer.open(mirror)
    assert proposer.grow([mirror]) is False, "one step says all there is to say"
    return mirror


def commit(proposer: LookupProposer, mirror: Mirror, *tokens: int) -> None:
    news = mirror.apply(Commit(1, len(mirror.log), tokens))
    assert news is not None
    proposer.advanced(mirror, *news)
    proposer.grow([mirror])


def paths(mirror: Mirror) -> set[tuple[int, ...]]:
    """The branches of the tree, from the tip to each leaf."""
    found: set[tuple[int, ...]] = set()
    stack = [((), mirror.tree.root)]
    while stack:
        path, node = stack.pop()
        stack += [((*path, token), child) for token, child in node.children.items()]
        if path and not node.children:
            found.add(path)
    return found


def logprobs(mirror: Mirror) -> list[float]:
    """The estimates along the only branch."""
    found = []
    node = mirror.tree.root
    while node.children:
        (node,) = node.children.values()
        found.append(node.accept_logprob)
    return found


def test_what_followed_then_is_the_guess_now() -> None:
    mirror = opened(LookupProposer(), mirror_of(1, 2, 3, 4, 5, 9, 2, 3, depth_max=4))
    assert paths(mirror) == {(4, 5, 9, 2)}


def test_text_that_repeats_itself_goes_on_doing_so() -> None:
    mirror = opened(LookupProposer(), mirror_of(1, 2, 3, 4, 2, 3, depth_max=8))
    assert paths(mirror) == {(4, 2, 3, 4, 2, 3, 4, 2)}
    loop = opened(LookupProposer(), mirror_of(1, 7, 7, 7, depth_max=5))
    assert paths(loop) == {(7, 7, 7, 7, 7)}


def test_first_and_latest_occurrence_are_two_branches() -> None:
    mirror = opened(LookupProposer(), mirror_of(1, 2, 7, 1, 2, 8, 1, 2, depth_max=4))
    assert paths(mirror) == {(8, 1, 2, 8), (7, 1, 2, 8)}


def test_a_match_must_be_long_enough() -> None:
    assert paths(opened(LookupProposer(), mirror_of(1, 2, 3, 9, 3))) == set()
    short = opened(LookupProposer(match_min=1), mirror_of(1, 2, 3, 9, 3, depth_max=2))
    assert paths(short) == {(9, 3)}
    assert paths(opened(LookupProposer(), mirror_of(1, 2, 3, 4))) == set()


def test_the_budget_and_the_vocabulary_bound_the_guess() -> None:
    prompt = (1, 2, 3, 4, 5, 9, 1, 2)
    assert paths(opened(LookupProposer(), mirror_of(*prompt, depth_max=3))) == {(3, 4, 5)}
    assert paths(opened(LookupProposer(), mirror_of(*prompt, nodes_max=2))) == {(3, 4)}
    assert paths(opened(LookupProposer(), mirror_of(*prompt, vocabulary=5))) == {(3, 4)}


def test_a_hit_goes_on_and_a_miss_looks_again() -> None:
    proposer = LookupProposer()
    mirror = opened(proposer, mirror_of(1, 2, 3, 4, 5, 6, 8, 1, 2, depth_max=6))
    commit(proposer, mirror, 3, 4)
    assert paths(mirror) == {(5, 6, 8, 1, 2, 3)}
    commit(proposer, mirror, 99)
    assert paths(mirror) == set()
    # The match is found again from committed tokens alone.
    commit(proposer, mirror, 8, 1)
    assert paths(mirror) == {(2, 3, 4, 99, 8, 1)}


def test_sessions_do_not_see_each_other() -> None:
    proposer = LookupProposer()
    rich = opened(proposer, mirror_of(1, 2, 3, 1, 2, session=1, depth_max=3))
    poor = opened(proposer, mirror_of(1, 2, session=2))
    assert (paths(rich), paths(poor)) == ({(3, 1, 2)}, set())
    proposer.close(rich)
    proposer.close(rich)
    commit(proposer, poor, 3)


def test_longer_matches_are_trusted_more() -> None:
    mirror = opened(LookupProposer(), mirror_of(*range(20), 50, 0, 1))
    found = logprobs(mirror)
    assert found == sorted(found)
    assert found[0] < found[-1] <= math.log(0.98)
    longer = opened(LookupProposer(), mirror_of(*range(20), 50, 0, 1, 2, 3))
    assert logprobs(longer)[0] > found[0]


def test_it_fits_any_tokenizer() -> None:
    assert LookupProposer().info.tokenizer_fingerprint is None


# --- learning ---------------------------------------------------------------------------------


def test_estimates_follow_what_happened() -> None:
    estimates = MatchEstimates()
    prior = [estimates.logprob(bucket) for bucket in range(8)]
    assert prior == sorted(prior)
    for _ in range(300):
        estimates.observe(3, True)
        estimates.observe(5, False)
    assert estimates.logprob(3) == math.log(0.98)
    assert estimates.logprob(5) < math.log(0.05)
    unseen = [bucket for bucket in range(8) if bucket not in (3, 5)]
    assert [estimates.logprob(b) for b in unseen] == [prior[b] for b in unseen]
    # About a hundred observations are remembered.
    for _ in range(300):
        estimates.observe(5, True)
    assert estimates.logprob(5) > math.log(0.9)


def test_matches_are_told_apart_by_doublings() -> None:
    buckets = [MatchEstimates.bucket(length) for length in (1, 2, 3, 4, 7, 8, 127, 128, 9999)]
    assert buckets == [0, 1, 1, 2, 2, 3, 6, 7, 7]


PROMPT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2)
"""The guesses 3, 4, 5, ... rest on matches of 2, 3, 4, ... tokens."""


def estimates_of(proposer: LookupProposer) -> list[float]:
    mirror = opened(proposer, mirror_of(*PROMPT, session=99))
    proposer.close(mirror)
    return logprobs(mirror)


def test_right_guesses_raise_the_estimates_of_their_kind() -> None:
    proposer = LookupProposer()
    before = estimates_of(proposer)
    for _ in range(40):
        mirror = opened(proposer, mirror_of(*PROMPT))
        commit(proposer, mirror, 3)
        proposer.close(mirror)
    after = estimates_of(proposer)
    # The guess rested on a match of 2: the bucket of 2 and 3 has learnt, no other has.
    assert after[0] == after[1] > before[0] + 0.2
    assert after[2:] == before[2:]


def test_guesses_on_another_branch_do_not_count() -> None:
    proposer = LookupProposer()
    for _ in range(200):
        mirror = opened(proposer, mirror_of(1, 2, 7, 4, 1, 2, 8, 5, 1, 2, depth_max=2))
        assert paths(mirror) == {(8, 5), (7, 4)}
        commit(proposer, mirror, 8, 5)
        proposer.close(mirror)
    # Of three that had their turn, 8 and 5 were right and 7 was wrong; 4 had none.
    assert math.exp(estimates_of(proposer)[0]) == pytest.approx(2 / 3, abs=0.02)


def test_only_guesses_whose_parent_was_committed_count() -> None:
    proposer = LookupProposer()
    before = estimates_of(proposer)
    for _ in range(40):
        mirror = opened(proposer, mirror_of(*PROMPT))
        commit(proposer, mirror, 3, 4, 99, 5)
        proposer.close(mirror)
    after = estimates_of(proposer)
    # 3 and 4 were right, 5 was wrong, 6 and the rest never had their turn.
    assert after[0] > before[0]
    assert after[2] == after[3] < before[2] - 0.5
    assert after[6:] == before[6:]
