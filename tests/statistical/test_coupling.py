"""Noise shared by target and drafter: acceptance as the formula says, and no less."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.coupling import Coupling, coupled_acceptance, logits_along, measure_coupling
from bench.lockstep import decided
from outrider.domain import BindSpec, DraftBudget, SamplingParams
from outrider.model.language_model import LanguageModel, Logits
from outrider.model.loading import load_language_model
from outrider.model.sampling import rank_candidates

SAMPLED = SamplingParams(temperature=1.0)


def plainly(target: np.ndarray, draft: np.ndarray) -> float:
    """The formula as it stands."""
    total = 0.0
    for likely, guessed in zip(target.tolist(), draft.tolist(), strict=True):
        if likely > 0 and guessed > 0:
            pairs = zip(target.tolist(), draft.tolist(), strict=True)
            total += 1.0 / sum(max(p / likely, q / guessed) for p, q in pairs)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_the_quick_way_is_the_formula(seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows = []
    for _ in range(2):
        weights = chance.gamma(0.3, size=40)
        weights[chance.random(40) < 0.2] = 0.0
        rows.append(weights / weights.sum())
    with np.errstate(divide="ignore"):
        logs = [np.log(row)[None] for row in rows]
    assert coupled_acceptance(*logs)[0] == pytest.approx(plainly(*rows), rel=1e-9)


def test_equal_distributions_always_agree_and_disjoint_ones_never() -> None:
    row = np.log([[0.5, 0.3, 0.2]])
    assert coupled_acceptance(row, row)[0] == pytest.approx(1.0)
    with np.errstate(divide="ignore"):
        assert coupled_acceptance(np.log([[0.5, 0.5, 0.0]]), np.log([[0.0, 0.0, 1.0]]))[0] == 0.0


def tiny(options: str = "") -> LanguageModel:
    return load_language_model(
        f"random:tiny?seed=1{options}", dtype="float32", device="cpu", cache_dir=Path("/none")
    )


@pytest.fixture(scope="module")
def pair() -> tuple[Logits, Logits, list[int]]:
    """What a target and its drafter say at 40 places of the target's own text."""
    torch.set_num_threads(1)
    target, draft = tiny(), tiny("&noise=0.2")
    spec = BindSpec(
        1, 1, 1, tuple(b"Once"), (), SAMPLED, 5, "t", target.vocabulary_size, DraftBudget()
    )
    (known,) = decided(target, [spec], 160)
    text = (*spec.prompt, *known.text)
    places = list(range(4, len(text), 4))
    return logits_along(target, text, 4, 4), logits_along(draft, text, 4, 4), places


def measured(pair: tuple[Logits, Logits, list[int]], draws: int = 1_000) -> Coupling:
    return measure_coupling(*pair, SAMPLED, draws)


def test_shared_noise_accepts_what_the_formula_says(
    pair: tuple[Logits, Logits, list[int]],
) -> None:
    found = measured(pair)
    assert found.draws >= 40_000
    assert abs(found.measured - found.exact) < 0.01
    assert found.independent + 0.05 < found.measured
    assert found.exact <= found.rejection
    # Of a coupling: at least (1 - TV) / (1 + TV).
    assert found.exact >= found.rejection / (2.0 - found.rejection)
    assert found.gap == pytest.approx(found.rejection - found.measured)
    assert 0.1 < found.exact < 0.9, "neither too easy nor too hard to tell anything"


def test_noise_of_ones_own_accepts_what_independent_samples_would(
    pair: tuple[Logits, Logits, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_other_noise(
        logits: Logits,
        params: list[SamplingParams],
        seeds: list[int],
        positions: list[int],
        count: int,
    ) -> tuple[Logits, Logits, Logits]:
        return rank_candidates(logits, params, [seed ^ 1 << 62 for seed in seeds], positions, count)

    monkeypatch.setattr("bench.coupling.rank_candidates", with_other_noise)
    found = measured(pair)
    assert abs(found.measured - found.independent) < 0.01
    assert abs(found.measured - found.exact) > 0.05


def test_the_error_is_that_of_a_share() -> None:
    assert Coupling(1, 10_000, 0.5, 0.5, 0.2, 0.6).error == pytest.approx(math.sqrt(0.25 / 10_000))
