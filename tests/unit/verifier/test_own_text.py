"""A verifier's own guesses: on examples by hand, and against a plain search."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from verifier_service import own_text
from verifier_service.own_text import OwnText, claim_logprob


def found(index: OwnText, count: int = 4) -> list[tuple[int, list[int]]]:
    return [(size, list(itertools.islice(rest, count))) for size, rest in index.continuations()]


def test_what_followed_the_last_tokens_is_guessed_again() -> None:
    text = [1, 2, 3, 4, 5, 6, 9, 3, 4]
    assert found(OwnText(text)) == [(2, [5, 6, 9, 3])]


def test_a_longer_match_comes_before_a_later_one() -> None:
    text = [1, 2, 3, 4, 50, 7, 3, 4, 60, 8, 1, 2, 3, 4]
    assert found(OwnText(text), 2) == [(4, [50, 7]), (2, [60, 8])]


def test_text_that_repeats_itself_goes_on_doing_so() -> None:
    assert found(OwnText([7, 8, 9, 8, 9]), 5) == [(2, [8, 9, 8, 9, 8])]


def test_nothing_is_guessed_of_new_text() -> None:
    assert found(OwnText([1, 2, 3, 4])) == []
    assert found(OwnText([1])) == []


def test_text_that_grew_is_taken_in() -> None:
    text = [1, 2, 3]
    index = OwnText(text)
    assert found(index) == []
    text += [4, 1, 2]
    assert found(index) == [(2, [3, 4, 1, 2])]
    text += [3, 4]
    assert found(index, 2) == [(4, [1, 2])]


def test_a_long_text_is_taken_in_piece_by_piece() -> None:
    text = [*range(own_text.INDEXED_MAX + 100), 5, 6]
    index = OwnText(text)
    assert found(index) == []
    assert found(index, 2) == [(2, [7, 8])]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_as_a_plain_search_says(text: list[int], data: st.DataObject) -> None:
    index = OwnText(text)
    for _ in range(3):
        guesses = found(index, 1)
        expected = []
        for size in (4, 2):
            gram = text[-size:]
            ends = [end for end in range(size, len(text)) if text[end - size : end] == gram]
            if ends and len(text) > size and ends[-1] not in [end for end, _ in expected]:
                end = ends[-1]
                match = size
                while end > match and text[end - match - 1] == text[-match - 1]:
                    match += 1
                expected.append((end, (match, [text[end]])))
        assert guesses == [guess for _, guess in expected]
        text += data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))


def test_longer_matches_promise_more() -> None:
    claims = [math.exp(claim_logprob(length)) for length in (1, 2, 4, 8, 128, 1_000)]
    assert claims == sorted(claims)
    assert 0.3 < claims[0] < claims[-1] < 1.0
