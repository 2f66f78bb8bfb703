"""Synthetic models through the real engine, KV cache, planner and proposer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from drafter_service.mirror import Mirror
from drafter_service.proposers.language_model import LanguageModelProposer
from outrider.domain import (
    BindSpec,
    Commit,
    Draft,
    DraftBudget,
    FinishReason,
    SamplingParams,
    SessionSpec,
)
from outrider.model.info import model_info
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model
from tests.support.engine_runs import EngineRun
from verifier_service.config import EngineConfig

TARGET = "synthetic:target?seed=5"
DRAFT = "synthetic:draft?seed=5&agree=0.8,0.1,0.05"
# Room for two of the four sessions' texts and trees: some wait, are preempted and prefill again.
CONFIG = EngineConfig(kv_tokens_max=320, kv_overcommit=8.0, prefill_tokens_max=24, warm_up=False)


def load(spec: str) -> LanguageModel:
    return load_language_model(spec, cache_dir=Path("/nonexistent"))


class Drafter:
    """A proposer and its mirrors, asked for a draft after every commit."""

    def __init__(self, model: LanguageModel) -> None:
        self.proposer = LanguageModelProposer(model, model_info(model), leaves_max=16)
        self.mirrors: dict[int, Mirror] = {}

    def __call__(self, spec: SessionSpec, outputs: Sequence[int]) -> Draft | None:
        mirror = self.mirrors.get(spec.session)
        if mirror is None:
            mirror = self.mirrors[spec.session] = Mirror(1, bind_spec(spec))
            self.proposer.open(mirror)
        done = len(mirror.log) - len(spec.prompt)
        news = mirror.apply(Commit(spec.epoch, len(mirror.log), tuple(outputs[done:])))
        if news is not None:
            self.proposer.advanced(mirror, *news)
        for _ in range(4):
            self.proposer.grow([mirror])
        return mirror.take_draft()


def bind_spec(spec: SessionSpec) -> BindSpec:
    budget = DraftBudget(64, 16, 0.0)
    return BindSpec(
        spec.session, spec.epoch, 1, spec.prompt, (), spec.sampling, spec.seed, "", 260, budget
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculated_output_is_the_targets_own(temperature: float) -> None:
    shared = tuple(b"Everybody begins with these words, which fill a block. ")
    specs = [
        SessionSpec(
            number, 1, (*shared, number), (), SamplingParams(temperature), 7 + number, 60 + number
        )
        for number in range(1, 5)
    ]
    plain = EngineRun(load(TARGET), CONFIG).run(specs)
    run = EngineRun(load(TARGET), CONFIG, Drafter(load(DRAFT)))
    speculated = run.run(specs)
    assert run.engine.preemptions > 0
    for spec in specs:
        ours, theirs = speculated[spec.session], plain[spec.session]
        assert ours.rejection is None
        assert ours.finish is FinishReason.LENGTH
        assert ours.ids == theirs.ids
        assert len(ours.ids) == spec.tokens_max
        assert theirs.commits == spec.tokens_max
        if not temperature:
            # A tree of 4 steps holds nearly all that 0.95 a token gives.
            assert ours.commits < spec.tokens_max / 2.5
        assert ours.counters.accepted_draft_tokens == spec.tokens_max - ours.commits
    assert len({tuple(outcome.ids[:20]) for outcome in plain.values()}) == len(specs)
