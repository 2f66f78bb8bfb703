"""A loaded model's identity, as workers report it."""

from __future__ import annotations

from outrider.domain import ModelInfo
from outrider.model.language_model import LanguageModel


def model_info(model: LanguageModel, *, proposer: str = "") -> ModelInfo:
    """Identity of a model; `proposer` says what a drafter guesses with."""
    return ModelInfo(
        model=model.name,
        model_fingerprint=model.model_fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        vocabulary_size=model.vocabulary_size,
        length_max=model.length_max,
        dtype=model.dtype,
        eos_ids=tuple(model.eos_ids),
        proposer=proposer,
    )
