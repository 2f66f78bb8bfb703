"""The cascade: who is asked when, in what order, with what room."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.config import stages_of
from drafter_service.mirror import Mirror
from drafter_service.proposers.base import CandidateTaker, Proposer
from drafter_service.proposers.cascade import CascadeProposer, promised_tokens
from drafter_service.proposers.language_model import LanguageModelProposer
from drafter_service.proposers.lookup import LookupProposer
from drafter_service.proposers.recycling import RecyclingProposer
from outrider.domain import Candidates, ModelInfo
from outrider.draft_tree import Advance, draft_fault
from outrider.errors import ConfigError
from outrider.model.info import model_info
from tests.support.fleet import TARGET, load
from tests.support.proposing import commit, mirror_of, opened, paths


class Chain:
    """Guesses one chain with one claim, and notes for which texts it was asked."""

    def __init__(self, *tokens: int, claim: float = 0.9, name: str = "chain") -> None:
        self.tokens, self.claim = tokens, claim
        self.asked: list[tuple[int, int]] = []
        self.followed: list[tuple[int, ...]] = []
        self.open_sessions: set[int] = set()
        self.name = name

    @property
    def info(self) -> ModelInfo:
        return replace(LookupProposer().info, proposer=self.name)

    @property
    def leaves_max(self) -> int:
        return 0

    def open(self, mirror: Mirror) -> None:
        self.open_sessions.add(mirror.spec.session)

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        self.followed.append(tuple(tokens))

    def close(self, mirror: Mirror) -> None:
        self.open_sessions.discard(mirror.spec.session)

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        for mirror in mirrors:
            self.asked.append((mirror.spec.session, len(mirror.log)))
            node = mirror.tree.root
            for token in self.tokens:
                child = mirror.attach(node, token, math.log(self.claim))
                if child is None:
                    break
                node = child
        return False


def cascade(*stages: Proposer, enough_tokens: float = 2.0) -> CascadeProposer:
    return CascadeProposer(stages, enough_tokens=enough_tokens)


def test_the_later_stage_is_spared_where_the_first_is_sure() -> None:
    sure, dear = Chain(1, 2, 3, claim=0.9), Chain(7)
    mirror = opened(cascade(sure, dear), mirror_of(5))
    assert paths(mirror) == {(1, 2, 3)}
    assert dear.asked == []
    # 0.9 + 0.81 + 0.729
    assert promised_tokens(mirror, 1) == pytest.approx(2.439)


@pytest.mark.parametrize("first", [Chain(), Chain(1, 2, 3, claim=0.5)])
def test_the_later_stage_is_asked_where_the_first_is_silent_or_unsure(first: Chain) -> None:
    dear = Chain(7)
    mirror = opened(cascade(first, dear), mirror_of(5))
    assert (7,) in paths(mirror)
    assert dear.asked == [(1, 1)]


def test_sessions_are_decided_one_by_one_and_anew_for_each_text() -> None:
    lookup, dear = LookupProposer(), Chain(7)
    proposer = cascade(lookup, dear)
    poor = mirror_of(1, 2, 3, session=2)
    rich = mirror_of(*[1, 2, 3, 4] * 8, session=1)
    for mirror in (poor, rich):
        proposer.open(mirror)
    for _ in range(3):
        proposer.grow([poor, rich])
    assert {session for session, _ in dear.asked} == {2}
    commit(proposer, rich, 9)
    assert dear.asked[-1] == (1, 33), "what lookup knew was wrong"
    assert promised_tokens(rich, 1) == 0.0


def test_other_work_goes_to_the_stages_that_compute() -> None:
    class Computing(Chain):
        def overlap(self, work: Callable[[], None]) -> bool:
            self.work = work
            return True

    done: list[int] = []
    assert cascade(Chain(), Chain()).overlap(lambda: done.append(0)) is False
    dear = Computing()
    assert cascade(Chain(), dear, Chain()).overlap(lambda: done.append(1)) is True
    dear.work()
    assert done == [1]


def test_what_later_stages_guess_does_not_silence_them() -> None:
    """Their guesses live on below a hit, and must not pass for the first stage's."""
    silent, dear = Chain(), Chain(7, 8, 9, claim=0.95)
    proposer = cascade(silent, dear)
    mirror = opened(proposer, mirror_of(5))
    commit(proposer, mirror, 7)
    assert dear.asked == [(1, 1), (1, 2)]


def test_all_stages_follow_and_are_closed() -> None:
    sure, dear = Chain(1, 2, 3), Chain(7)
    proposer = cascade(sure, dear)
    mirror = opened(proposer, mirror_of(5))
    commit(proposer, mirror, 1, 9)
    assert sure.followed == dear.followed == [(1, 9)]
    proposer.close(mirror)
    assert sure.open_sessions == dear.open_sessions == set()
    proposer.close(mirror)


def test_a_cheap_stage_leaves_room_for_the_last() -> None:
    unsure, dear = Chain(*range(20), claim=0.3), Chain(70, 71, 72, 73, 74)
    mirror = opened(cascade(unsure, dear), mirror_of(50, nodes_max=8))
    assert paths(mirror) == {(0, 1, 2, 3), (70, 71, 72, 73)}
    assert mirror.reserved == 0


def test_guesses_are_told_apart_by_who_made_them() -> None:
    one, two = Chain(1, 2, claim=0.5), Chain(1, 3, claim=0.4)
    mirror = opened(cascade(one, two), mirror_of(5))
    shared = mirror.tree.root.children[1]
    assert shared.claims == {1: math.log(0.5), 2: math.log(0.4)}
    assert {child.token: list(child.claims) for child in shared.children.values()} == {
        2: [1],
        3: [2],
    }


def test_candidates_reach_whoever_takes_them() -> None:
    proposer = cascade(LookupProposer(), RecyclingProposer(width=4))
    assert isinstance(proposer, CandidateTaker)
    assert proposer.info.candidates == 4
    mirror = opened(proposer, mirror_of(5))
    proposer.take(mirror, Candidates((6,), ((7, 8),)))
    commit(proposer, mirror, 6)
    assert paths(mirror) == {(7,), (8,)}


def test_its_identity_is_the_models() -> None:
    model = load(TARGET)
    dear = LanguageModelProposer(model, model_info(model, proposer="language-model"))
    info = cascade(LookupProposer(), RecyclingProposer(), dear).info
    assert info.proposer == "cascade:lookup,recycling,language-model"
    assert info.model_fingerprint == model.model_fingerprint
    assert info.tokenizer_fingerprint == model.tokenizer_fingerprint
    assert info.candidates == 8
    without = cascade(LookupProposer(), RecyclingProposer()).info
    assert (without.tokenizer_fingerprint, without.vocabulary_size) == (None, 0)
    assert without.model == "lookup+recycling"


def test_stages_of_other_tokenizers_are_refused() -> None:
    class Foreign(Chain):
        @property
        def info(self) -> ModelInfo:
            return replace(super().info, tokenizer_fingerprint="f" * 64, proposer="datastore")

    model = load(TARGET)
    dear = LanguageModelProposer(model, model_info(model, proposer="language-model"))
    with pytest.raises(ConfigError, match=r"different tokenizers: datastore .* has ffffffffffff;"):
        cascade(Foreign(), dear)
    assert cascade(Foreign(), LookupProposer()).info.tokenizer_fingerprint == "f" * 64


def test_a_model_goes_on_below_what_lookup_guessed() -> None:
    model = load(TARGET)
    dear = LanguageModelProposer(model, model_info(model, proposer="language-model"))
    proposer = cascade(LookupProposer(), dear, enough_tokens=100.0)
    mirror = opened(proposer, mirror_of(1, 2, 3, 4, 1, 2, vocabulary=260, nodes_max=40))
    cheap = [node for node in mirror.tree if 1 in node.claims]
    assert [node.token for node in cheap][:2] == [3, 4]
    assert any(2 in child.claims for node in cheap for child in node.children.values()), (
        "no guess of the model's stands below one of lookup's"
    )
    for _ in range(3):
        best = mirror.tree.best(3)
        commit(proposer, mirror, *(node.token for node in best if node.parent is mirror.tree.root))
    proposer.close(mirror)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=6),
    st.integers(1, 20),
    st.sampled_from([0.0, 1.0, 100.0]),
)
def test_a_proposal_is_a_valid_tree_over_known_ids(
    commits: list[list[int]], nodes_max: int, enough: float
) -> None:
    stages = (LookupProposer(), RecyclingProposer(width=2), Chain(0, 9, 1))
    proposer = cascade(*stages, enough_tokens=enough)
    mirror = opened(proposer, mirror_of(1, 2, 1, vocabulary=4, nodes_max=nodes_max))
    for tokens in commits:
        proposer.take(mirror, Candidates((tokens[0],), ((tokens[-1], 3),)))
        commit(proposer, mirror, *tokens)
        assert mirror.tree.size <= nodes_max
        draft = mirror.take_draft()
        if draft is not None:
            assert draft_fault(draft, 4, nodes_max) is None


# --- settings ---------------------------------------------------------------------------------


def test_settings_name_the_stages() -> None:
    assert stages_of("lookup") == ("lookup",)
    assert stages_of("cascade:lookup,recycling, language-model") == (
        "lookup",
        "recycling",
        "language-model",
    )


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("guessing", "unknown proposer 'guessing'; there are lookup, datastore, recycling,"),
        ("cascade:", "unknown proposer ''"),
        ("cascade:lookup", "two or more different"),
        ("cascade:lookup,lookup", "two or more different"),
        ("cascade:language-model,lookup", "comes last"),
        ("lookup,recycling", "are a cascade: cascade:lookup,recycling"),
    ],
)
def test_wrong_settings_are_explained(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stages_of(setting)
