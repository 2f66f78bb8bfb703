"""Drafters claim what turns out to be true, and one of them serves two hundred sessions well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench.calibrated import deciles, worst
from bench.lockstep import Known, Lockstep, decided
from bench.sharing import measure_sharing
from drafter_service.proposers.language_model import LanguageModelProposer
from drafter_service.proposers.leaf_queue import LeafQueue
from outrider.domain import BindSpec, DraftBudget, ModelInfo, SamplingParams
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0)
COUNT_MIN = 300
"""Guesses of a decile that are needed to tell: three points of standard error at most."""


def load(options: str = "") -> LanguageModel:
    torch.set_num_threads(1)
    return load_language_model(
        f"random:tiny?seed=1{options}", dtype="float32", device="cpu", cache_dir=Path("/none")
    )


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    return load()


@pytest.fixture(scope="module")
def draft() -> LanguageModel:
    return load("&noise=0.15")


def sessions(
    target: LanguageModel, count: int, tokens: int, params: Sequence[SamplingParams]
) -> list[Known]:
    specs = [
        BindSpec(
            session=number + 1,
            epoch=1,
            binding=1,
            prompt=tuple(b"Session %d: " % number),
            committed=(),
            sampling=params[number % len(params)],
            seed=number,
            tokenizer_fingerprint="t",
            vocabulary_size=target.vocabulary_size,
            budget=DraftBudget(nodes_max=256, depth_max=24, probability_min=1 / 256),
        )
        for number in range(count)
    ]
    return decided(target, specs, tokens)


def proposer_of(
    model: LanguageModel, *, leaves_max: int, learning: bool = True, queue: LeafQueue | None = None
) -> LanguageModelProposer:
    info = ModelInfo("draft", "f", "t", model.vocabulary_size, model.length_max, "float32")
    return LanguageModelProposer(
        model, info, leaves_max=leaves_max, learning=learning, queue=queue, kv_tokens_max=1 << 17
    )


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_claims_are_calibrated(
    target: LanguageModel, draft: LanguageModel, params: SamplingParams
) -> None:
    known = sessions(target, 20, 200, [params])
    found = {}
    for learning in (True, False):
        proposer = proposer_of(draft, leaves_max=48, learning=learning)
        rounds = Lockstep(proposer, known, grows=2, verified_max=256)
        rounds.warm_up()
        rounds.run(200)
        assert not rounds.running
        off = worst(deciles(rounds.claims), COUNT_MIN)
        assert off is not None
        found[learning] = off
        assert len([one for one in deciles(rounds.claims) if one.count >= COUNT_MIN]) >= 5
    assert found[True] < 0.05
    # Without learning the same check fails: what a model says is no probability of acceptance.
    assert found[False] > 0.05


def test_two_hundred_sessions_share_a_drafter(target: LanguageModel, draft: LanguageModel) -> None:
    known = sessions(target, 200, 72, [GREEDY, SAMPLED])
    found = measure_sharing(
        lambda queue: proposer_of(draft, leaves_max=64, queue=queue),
        known,
        {"one": 1.0, "two": 2.0, "five": 5.0},
        grows=4,
        verified_max=600,
        steps=16,
    )
    assert found.gain > 1.05
    # Nobody starves.
    assert found.least > 0.0
    for wanted, had in found.shares.values():
        assert had == pytest.approx(wanted, abs=0.02)
