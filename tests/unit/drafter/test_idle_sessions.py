"""Two thousand sessions on one drafter, all but one of them idle at any time."""

from __future__ import annotations

import gc
import queue
import tracemalloc
from pathlib import Path

import pytest

from drafter_service.config import GrowingConfig
from drafter_service.growing import Grower
from drafter_service.messages import Bind, Follow, Outputs
from drafter_service.proposers.base import Proposer
from drafter_service.proposers.language_model import LanguageModelProposer
from drafter_service.proposers.lookup import LookupProposer
from outrider.committed import digest
from outrider.domain import BindSpec, Commit, Draft, DraftBudget, RejectionCode, SamplingParams
from outrider.model.info import model_info
from outrider.model.loading import load_language_model

SESSIONS = 2_000
PATIENCE_S = 60.0
BUDGET = DraftBudget(nodes_max=9, depth_max=9, flush_interval_s=0.0)
MIRRORS_BYTES = 2 << 20
"""Some sixty sessions."""
ASIDE_BYTES = 1_000
"""What is left of one that was put aside; a mirror takes more than thirty times as much."""


def text_of(session: int) -> tuple[int, ...]:
    """A text that repeats itself, each session's own."""
    own = tuple(40 + (session // 60**power) % 60 for power in range(3))
    return (33, 34, *own, 35, 36, 37, 38, 39) * 2


def spec_of(session: int, fingerprint: str) -> BindSpec:
    return BindSpec(
        session=session,
        epoch=1,
        binding=1,
        prompt=text_of(session),
        committed=(),
        sampling=SamplingParams(temperature=0.0),
        seed=session,
        tokenizer_fingerprint=fingerprint,
        vocabulary_size=256,
        budget=BUDGET,
    )


class Drafter:
    """A running grower and the latest that it said of each session."""

    def __init__(self, proposer: Proposer, config: GrowingConfig) -> None:
        self.rejected: list[tuple[int, RejectionCode]] = []
        self.bound = 0
        self._fingerprint = proposer.info.tokenizer_fingerprint or ""
        self._said: queue.Queue[dict[int, Outputs]] = queue.Queue()
        self.grower = Grower(proposer, config, self._said.put)
        self.grower.start()

    def bind(self, *sessions: int) -> None:
        for session in sessions:
            self.grower.submit(Bind(1, spec_of(session, self._fingerprint)))

    def hear(self) -> list[tuple[int, Draft]]:
        drafts = []
        for output in self._said.get(timeout=PATIENCE_S).values():
            self.bound += len(output.bound)
            self.rejected += [(r.session, r.code) for r in output.rejections]
            drafts += [(session, draft) for session, _, draft in output.drafts]
        return drafts

    def after(self, session: int, *tokens: int) -> Draft:
        """Commit tokens to a session and wait for its next draft."""
        self.grower.submit(Follow(1, session, Commit(1, len(text_of(session)), tokens)))
        while True:
            for said, draft in self.hear():
                if said == session and draft.base_length == len(text_of(session)) + len(tokens):
                    return draft


def proposer_of(kind: str) -> Proposer:
    if kind == "lookup":
        return LookupProposer()
    model = load_language_model(
        "synthetic:draft?agree=0.8,0.1,0.05",
        dtype="float32",
        device="cpu",
        cache_dir=Path("/nonexistent"),
    )
    info = model_info(model, proposer="language-model")
    return LanguageModelProposer(model, info, leaves_max=64, kv_tokens_max=4_096)


both = pytest.mark.parametrize("kind", ["lookup", "language-model"])


@both
def test_memory_is_bounded_and_each_session_still_drafts_when_it_goes_on(
    kind: str,
) -> None:
    drafter = Drafter(proposer_of(kind), GrowingConfig(mirrors_bytes_max=MIRRORS_BYTES))
    try:
        # What the first sessions leave behind is there anyway.
        drafter.bind(*range(100))
        while drafter.bound < 100:
            drafter.hear()
        gc.collect()
        tracemalloc.start()
        drafter.bind(*range(100, SESSIONS))
        while drafter.bound < SESSIONS:
            drafter.hear()
        assert drafter.grower.load == SESSIONS
        for session in range(0, SESSIONS, 29):
            text = text_of(session)
            draft = drafter.after(session, *text[:4])
            assert draft.base_digest == digest([*text, *text[:4]])
            if kind == "lookup":
                # It goes on as it did before: with what only this session's text has.
                assert draft.tokens[:6] == text[4:10]
            else:
                assert draft.tokens
                assert all(33 <= token < 127 for token in draft.tokens)
        gc.collect()
        used, peak = tracemalloc.get_traced_memory()
        assert used < MIRRORS_BYTES + SESSIONS * ASIDE_BYTES
        assert peak < 2 * (MIRRORS_BYTES + SESSIONS * ASIDE_BYTES)
        assert drafter.rejected == []
    finally:
        tracemalloc.stop()
        drafter.grower.stop(PATIENCE_S)


@both
def test_a_rebuilt_session_drafts_as_one_that_was_never_put_aside(kind: str) -> None:
    drafters = [
        Drafter(proposer_of(kind), GrowingConfig(mirrors_bytes_max=bound)) for bound in (1, 1 << 30)
    ]
    try:
        for drafter in drafters:
            drafter.bind(1, 2)  # the first drafter has room for one
        first, second = (drafter.after(1, 33) for drafter in drafters)
        # What it did not see it could not learn from: claims may differ.
        assert (first.tokens, first.parents) == (second.tokens, second.parents)
        assert (first.base_length, first.base_digest) == (second.base_length, second.base_digest)
    finally:
        for drafter in drafters:
            drafter.grower.stop(PATIENCE_S)


def test_the_oldest_tokens_are_given_up_beyond_their_bound() -> None:
    length = len(text_of(0))
    config = GrowingConfig(mirrors_bytes_max=1, aside_tokens_max=5 * length)
    drafter = Drafter(LookupProposer(), config)
    try:
        drafter.bind(*range(10))
        while len(drafter.rejected) < 4 or drafter.bound < 10:
            drafter.hear()
        assert drafter.rejected == [(n, RejectionCode.EXHAUSTED) for n in range(4)]
        assert drafter.grower.load == 6
        assert drafter.after(4, 33).tokens[:2] == text_of(4)[1:3]
    finally:
        drafter.grower.stop(PATIENCE_S)
