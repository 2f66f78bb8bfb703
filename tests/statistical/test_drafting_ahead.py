"""What a drafter grows during a verify step is there when the next one begins."""

from __future__ import annotations

from pathlib import Path

from bench.lockstep import Followed, Lockstep, decided
from drafter_service.proposers.language_model import LanguageModelProposer
from outrider.domain import BindSpec, DraftBudget, ModelInfo, SamplingParams
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model

VERIFY_MS, DRAFT_MS = 20.0, 2.5


def load(spec: str) -> LanguageModel:
    return load_language_model(
        f"synthetic:{spec}", dtype="float32", device="cpu", cache_dir=Path("/none")
    )


def ahead(
    agree: str, grows: float = VERIFY_MS / DRAFT_MS, leaves_max: int = 16, steps: int = 300
) -> Followed:
    target, draft = load("target"), load(f"draft?agree={agree}")
    spec = BindSpec(
        session=1,
        epoch=1,
        binding=1,
        prompt=tuple(b"Once upon a time"),
        committed=(),
        sampling=SamplingParams(temperature=0.0),
        seed=1,
        tokenizer_fingerprint="t",
        vocabulary_size=target.vocabulary_size,
        budget=DraftBudget(nodes_max=512, depth_max=64),
    )
    info = ModelInfo("draft", "f", "t", draft.vocabulary_size, draft.length_max, "synthetic")
    proposer = LanguageModelProposer(draft, info, leaves_max=leaves_max, kv_tokens_max=16_384)
    rounds = Lockstep(proposer, decided(target, [spec], 6 * steps), grows=grows, verified_max=32)
    rounds.warm_up()
    rounds.run(steps)
    return rounds.followed[0]


def share(ready: list[bool]) -> float:
    return sum(ready) / len(ready)


def test_the_tree_below_an_accepted_path_is_ready_for_the_next_step() -> None:
    one = ahead("0.8,0.1,0.05")
    assert share(one.ready_on_path) >= 0.8
    # One token in twenty is none of three guesses: below that nothing can be ready.
    assert share(one.ready) >= 0.7
    assert share(one.on_path) >= 0.7


def test_one_that_does_not_grow_meanwhile_is_never_ready() -> None:
    one = ahead("0.8,0.1,0.05", grows=0.1, steps=100)
    assert share(one.ready) < 0.3


def test_fewer_leaves_get_less_far() -> None:
    one, many = (ahead("0.8,0.1,0.05", leaves_max=count, steps=100) for count in (1, 16))
    assert one.tau + 0.5 < many.tau
