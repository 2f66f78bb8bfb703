"""Is what a whole engine says, with drafts good and bad, distributed as the target is?

Chi-square over continuations of two tokens, against probabilities computed by plain transformers.
Seeds are fixed, so these tests either always pass or always fail. That they can fail is shown in
tests/system/test_broken_rule.py.
"""

from __future__ import annotations

import pytest

from tests.support.draws import (
    Draws,
    Exact,
    Guesser,
    draw,
    helpful,
    most_probable,
    never_the_sample,
    siblings,
)

SESSIONS = 10_240
"""Of two tokens each: more than 20,000 draws."""
SIGNIFICANCE = 1e-4


@pytest.fixture(scope="module")
def exact() -> Exact:
    return Exact.of_case()


def check(exact: Exact, guesser: Guesser) -> Draws:
    draws = draw(exact, guesser, sessions=SESSIONS)
    assert draws.tokens > 20_000
    # Both ways: counts closer to the expected ones than chance allows are as wrong.
    assert SIGNIFICANCE < draws.p_value(exact) < 1 - SIGNIFICANCE
    return draws


def test_there_is_something_to_tell_apart(exact):
    """Enough continuations that are neither certain nor impossible."""
    assert len([p for p in exact.pairs().values() if p * SESSIONS >= 10]) > 40


def test_with_a_helpful_drafter(exact):
    draws = check(exact, helpful)
    assert draws.counters.accepted_draft_tokens == draws.tokens
    assert draws.counters.verify_steps == SESSIONS


def test_with_a_drafter_that_always_says_the_most_probable(exact):
    draws = check(exact, most_probable)
    assert 0 < draws.counters.accepted_draft_tokens < draws.tokens
    assert draws.counters.dropped_nodes["missed"] > SESSIONS // 2


def test_with_a_drafter_that_works_against_the_target(exact):
    draws = check(exact, never_the_sample)
    assert 0 < draws.counters.accepted_draft_tokens < SESSIONS
    assert draws.counters.dropped_nodes["missed"] >= SESSIONS // 2


def test_with_trees(exact):
    draws = check(exact, siblings)
    assert draws.counters.accepted_draft_tokens > SESSIONS // 2
    assert draws.counters.dropped_nodes["missed"] > SESSIONS
