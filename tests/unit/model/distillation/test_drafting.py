"""A distilled drafter as a language model: its guesses are the target's ids, under its noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outrider.domain import SamplingParams
from outrider.model.distillation import stages
from outrider.model.distillation.drafting import DistilledModel
from outrider.model.distillation.evaluation import Answer, TreeShape, score_answer
from outrider.model.language_model import LanguageModel, Row, TransformersModel
from outrider.model.loading import load_language_model
from outrider.model.noise import gumbel_numpy
from outrider.model.ranking import ranked_guesses
from outrider.model.sampling import sample_nodes
from tests.support.distilled import write_untrained

from .conftest import TARGET

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0)
TEXT = list(b"The quick brown fox jumps over the lazy dog")
KEPT = tuple(range(30, 250, 2))


def logits_of(model: LanguageModel, text: list[int]) -> torch.Tensor:
    cache = model.new_cache()
    logits = model.forward([Row(cache, text, None, range(len(text)))])
    cache.release()
    return logits


def drafter_of(folder: Path, layers: tuple[int, ...], kept: tuple[int, ...]) -> DistilledModel:
    write_untrained(folder, TARGET, layers, kept)
    model = load_language_model(str(folder), device="cpu", cache_dir=Path("/nonexistent"))
    assert isinstance(model, DistilledModel)
    return model


@pytest.fixture(scope="module")
def whole(target: TransformersModel) -> DistilledModel:
    """A drafter that is the target itself, all ids mapped."""
    size = target.vocabulary_size
    return DistilledModel(target, target.identity, range(size), size)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SamplingParams(temperature=0.8, top_p=0.9)])
def test_with_a_full_vocabulary_the_choices_are_the_plain_models(
    target: TransformersModel, whole: DistilledModel, params: SamplingParams
) -> None:
    count = len(TEXT)
    places: Any = ([params] * count, [7] * count, list(range(1, count + 1)))
    ours, theirs = logits_of(whole, TEXT), logits_of(target, TEXT)
    assert sample_nodes(ours, *places) == sample_nodes(theirs, *places)
    assert ranked_guesses(ours, *places, 3) == ranked_guesses(theirs, *places, 3)


def test_noise_goes_by_the_targets_ids(tmp_path: Path) -> None:
    model = drafter_of(tmp_path / "drafter", (0, 1), KEPT)
    logits = logits_of(model, TEXT)
    positions = list(range(1, len(TEXT) + 1))
    chosen = sample_nodes(logits, [SAMPLED] * len(TEXT), [11] * len(TEXT), positions)
    ids = np.array(KEPT)
    for row, position, token in zip(logits, positions, chosen, strict=True):
        scores = row[list(KEPT)].log_softmax(-1).double().numpy()
        assert token == ids[(scores + gumbel_numpy(11, position, ids)).argmax()]


def test_only_kept_ids_are_guessed_and_each_at_its_own_place(tmp_path: Path) -> None:
    model = drafter_of(tmp_path / "drafter", (0, 1, 2, 3), KEPT)
    logits = logits_of(model, TEXT)
    target: Any = stages.whole_target(TARGET, None)
    with torch.no_grad():
        theirs = target(torch.tensor([TEXT])).logits[0]
    assert logits.shape == theirs.shape
    left_out = sorted(set(range(260)) - set(KEPT))
    assert logits[:, left_out].isneginf().all()
    # All layers of the target: equal but for the rounding of stored weights.
    assert torch.allclose(logits[:, KEPT], theirs[:, KEPT], atol=0.5)
    assert ((logits - theirs)[:, KEPT]).square().mean().sqrt() < 0.1 * theirs.std()
    for params in (GREEDY, SAMPLED):
        count = len(TEXT)
        places: Any = ([params] * count, [3] * count, list(range(count)))
        guesses = ranked_guesses(logits, *places, 3)
        short = ranked_guesses(logits, *places, 3, model.kept)
        for one, other in zip(guesses, short, strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
            claims = [claim for _, claim in other]
            assert [claim for _, claim in one] == pytest.approx(claims, abs=1e-4)
        assert all(len(row) == 3 for row in guesses)
        assert all(token in KEPT for row in guesses for token, _ in row)


def test_it_reads_every_id_and_is_known_by_its_own_fingerprint(
    tmp_path: Path, target: TransformersModel
) -> None:
    model = drafter_of(tmp_path / "drafter", (0,), KEPT)
    assert model.vocabulary_size == target.vocabulary_size
    assert model.tokenizer_fingerprint == target.tokenizer_fingerprint
    assert model.eos_ids == target.eos_ids
    assert model.model_fingerprint != target.model_fingerprint
    assert logits_of(model, [0, 259, 256]).shape == (3, 260)
    assert model.forward([]).shape == (0, 260)


def test_the_target_as_its_own_drafter_scores_full_marks(
    target: TransformersModel, whole: DistilledModel
) -> None:
    cache = target.new_cache()
    text, tokens_max = list(TEXT), 26
    for _ in range(tokens_max):
        pending = text[cache.prefix_length :]
        logits = target.forward([Row(cache, pending, None, [len(pending) - 1])])
        text.append(int(logits.argmax()))
    cache.release()
    answer = Answer("x", tuple(TEXT), tuple(text[len(TEXT) :]))
    score = score_answer(whole, answer, TreeShape(passes=4, leaves=1, width=1, nodes=4))
    assert score.agreement == 1.0
    # 25 tokens after the first; five in each step, one of which is the target's own.
    assert (score.committed, score.steps) == (25, 5)
    pairs = score_answer(whole, answer, TreeShape(passes=2, leaves=1, width=1, nodes=1))
    assert pairs.steps == 13
    # Of a tree without bounds, the path to the tokens that follow is a part.
    bushy = score_answer(whole, answer, TreeShape(passes=4, leaves=99, width=2, nodes=999))
    assert bushy.steps == 5
    wrong = Answer("x", tuple(TEXT), tuple((token + 1) % 256 for token in answer.answer))
    assert score_answer(whole, wrong, None).agreement < 0.3
