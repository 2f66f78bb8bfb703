"""A predicted output as a drafter: how far it is followed, and where it is joined again."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.prediction import BRANCH_MAX, CHAIN_MAX, Follower
from outrider.committed import digest
from outrider.domain import Draft
from outrider.draft_tree import draft_fault

PROMPT = (900, 901)
TOKENS = 1_000
tokens = st.lists(st.integers(0, 5), max_size=60).map(tuple)


def branches(draft: Draft) -> list[list[int]]:
    """Chains of a draft, from the tip."""
    chains: list[list[int]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        if parent < 0:
            chains.append([])
        chains[-1].append(token)
    return chains


def verify_steps(predicted: Sequence[int], target: Sequence[int], most: int = 32) -> int:
    """Decode `target`, with nothing to help but the prediction; each draft is there in time."""
    follower = Follower(PROMPT, predicted)
    output: list[int] = []
    live: list[list[int]] = []
    steps = 0
    while len(output) < len(target):
        draft = follower.draft(1, output)
        if draft is not None:
            live += branches(draft)
        ahead = target[len(output) :]
        right = max((agreeing(chain[:most], ahead) for chain in live), default=0)
        decided = list(ahead[: right + 1])
        live = [chain[len(decided) :] for chain in live if chain[: len(decided)] == decided]
        output += decided
        steps += 1
    return steps


def agreeing(chain: Sequence[int], ahead: Sequence[int]) -> int:
    count = 0
    while count < min(len(chain), len(ahead)) and chain[count] == ahead[count]:
        count += 1
    return count


TEXT = tuple(range(200))


def test_what_is_predicted_is_guessed_from_the_start() -> None:
    follower = Follower(PROMPT, TEXT)
    draft = follower.draft(3, [])
    assert draft is not None
    assert branches(draft) == [list(TEXT[:CHAIN_MAX])]
    assert (draft.epoch, draft.base_length, draft.base_digest) == (3, 2, digest(PROMPT))


def test_nothing_is_sent_that_is_there_already() -> None:
    follower = Follower(PROMPT, TEXT)
    assert follower.draft(1, []) is not None
    assert follower.draft(1, []) is None
    assert follower.draft(1, TEXT[:8]) is None
    again = follower.draft(1, TEXT[:20])
    assert again is not None
    assert branches(again) == [list(TEXT[20 : 20 + CHAIN_MAX])]
    assert again.base_digest == digest(PROMPT + TEXT[:20])


def test_a_new_verifier_is_told_anew() -> None:
    follower = Follower(PROMPT, TEXT)
    follower.draft(1, TEXT[:4])
    follower.reopened()
    draft = follower.draft(2, TEXT[:4])
    assert draft is not None
    assert (draft.epoch, draft.tokens[0]) == (2, 4)


def test_the_end_of_the_prediction_is_the_end_of_the_guesses() -> None:
    follower = Follower(PROMPT, TEXT[:5])
    draft = follower.draft(1, TEXT[:3])
    assert draft is not None
    assert draft.tokens == TEXT[3:5]
    assert follower.draft(1, TEXT[:5]) is None
    assert follower.draft(1, (*TEXT[:5], 777)) is None


def test_a_replaced_and_an_inserted_token_are_both_provided_for() -> None:
    follower = Follower(PROMPT, TEXT)
    draft = follower.draft(1, (*TEXT[:10], 777))
    assert draft is not None
    replaced, inserted = branches(draft)
    assert replaced == list(TEXT[11 : 11 + BRANCH_MAX])
    assert inserted == list(TEXT[10 : 10 + BRANCH_MAX])


def test_text_is_found_again_after_a_passage_was_left_out() -> None:
    follower = Follower(PROMPT, TEXT)
    draft = follower.draft(1, (*TEXT[:10], *TEXT[50:52]))
    assert draft is not None
    assert branches(draft)[0] == list(TEXT[52 : 52 + BRANCH_MAX])


def test_an_edit_takes_a_fraction_of_the_steps() -> None:
    edited = (*TEXT[:40], 777, *TEXT[41:90], 778, 779, *TEXT[90:130], *TEXT[140:])
    assert verify_steps((), edited) == len(edited)
    assert verify_steps(TEXT, TEXT) <= 10
    assert verify_steps(TEXT, edited) * 6 <= len(edited)


@given(predicted=tokens, target=tokens)
@example(  # one of two branches comes to the prediction's end
    predicted=(0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1),
    target=(0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1),
)
def test_every_draft_is_sound(predicted: tuple[int, ...], target: tuple[int, ...]) -> None:
    follower = Follower(PROMPT, predicted)
    for length in range(len(target) + 1):
        draft = follower.draft(1, target[:length])
        if draft is None:
            continue
        assert draft_fault(draft, TOKENS, 512) is None
        assert draft.base_length == len(PROMPT) + length
        assert draft.base_digest == digest(PROMPT + target[:length])
        firsts = [chain[0] for chain in branches(draft)]
        assert len(firsts) == len(set(firsts))
    assert verify_steps(predicted, target) <= len(target)
