"""A drafter process with a distilled model: what it guesses, and which target it insists on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafter_service.mirror import Mirror
from drafter_service.proposers.language_model import (
    LanguageModelProposer,
    load_language_model_proposer,
)
from outrider.domain import BindSpec, DraftBudget, SamplingParams
from outrider.errors import ModelLoadError
from outrider.model.language_model import Row
from outrider.model.loading import load_language_model
from tests.support.distilled import write_untrained

TARGET = "random:tiny?seed=1&layers=3"
KEPT = tuple(range(32, 128))
PROMPT = tuple(b"The quick brown fox")


def load(folder: Path, target: str | None = None) -> LanguageModelProposer:
    return load_language_model_proposer(
        str(folder),
        dtype="float32",
        quantize="none",
        device="cpu",
        compiled=False,
        cache_dir=Path("/nonexistent"),
        target=target,
        threads=torch.get_num_threads(),
        leaves_max=4,
        kv_tokens_max=1_024,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_guesses_ids_of_the_target(tmp_path: Path, temperature: float) -> None:
    folder = tmp_path / "drafter"
    write_untrained(folder, TARGET, (0, 1), KEPT)
    proposer = load(folder)
    assert proposer.info.vocabulary_size == 260
    assert proposer.info.proposer == "language-model"
    spec = BindSpec(
        session=1,
        epoch=1,
        binding=1,
        prompt=PROMPT,
        committed=(),
        sampling=SamplingParams(temperature=temperature),
        seed=5,
        tokenizer_fingerprint=proposer.info.tokenizer_fingerprint or "",
        budget=DraftBudget(nodes_max=32, depth_max=6, width_max=2, probability_min=0.0),
        vocabulary_size=260,
    )
    mirror = Mirror(1, spec)
    proposer.open(mirror)
    while mirror.tree.size < 20:
        assert proposer.grow([mirror])
    assert {node.token for node in mirror.tree if node.parent is not None} <= set(KEPT)
    if temperature == 0.0:
        model = load_language_model(str(folder), device="cpu", cache_dir=tmp_path)
        row = Row(model.new_cache(), PROMPT, None, [len(PROMPT) - 1])
        best = max(mirror.tree.root.children.values(), key=lambda node: node.path_logprob)
        assert best.token == int(model.forward([row]).argmax())


def test_another_target_is_refused(tmp_path: Path) -> None:
    write_untrained(tmp_path / "drafter", TARGET, (0,), KEPT)
    with pytest.raises(ModelLoadError, match=r"drafter'.*made for another target"):
        load(tmp_path / "drafter", "random:tiny?seed=2&layers=3")
