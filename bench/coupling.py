"""What noise shared by target and drafter is worth: acceptance of the first choice.

Target and drafter take the same Gumbel noise, so that their samples coincide more often than
independent ones. For two distributions the probability is known exactly (Daliri, Musco and Suresh,
arXiv 2408.07978):

    sum over v of 1 / (sum over w of max(target(w) / target(v), draft(w) / draft(v)))

Rejection sampling (Leviathan et al., arXiv 2211.17192) reaches 1 - TV, the sum of the lesser
probabilities, which nothing can exceed; but its samples depend on the drafter. The difference is
the price of an output that does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from outrider.domain import SamplingParams
from outrider.model.language_model import LanguageModel, Logits, Row
from outrider.model.sampling import rank_candidates, sample_nodes, target_logprobs

Floats: TypeAlias = npt.NDArray[np.float64]

_ROWS = 64
"""Noise drawn at a time."""


@dataclass(frozen=True, slots=True)
class Coupling:
    """Acceptance of first choices, means over the same contexts."""

    contexts: int
    draws: int
    measured: float
    """With shared noise, as drafter and verifier do it."""
    exact: float
    """The same, by the formula."""
    independent: float
    """With noise of their own."""
    rejection: float
    """1 - TV: rejection sampling."""

    @property
    def gap(self) -> float:
        """What rejection sampling would accept more."""
        return self.rejection - self.measured

    @property
    def error(self) -> float:
        """Standard error of what was measured, at most."""
        return 0.5 / math.sqrt(self.draws)


def coupled_acceptance(target: Floats, draft: Floats) -> Floats:
    """Return the formula above for each row; both are log-probabilities [N, V]."""
    return np.array([_coupled(p, q) for p, q in zip(target, draft, strict=True)])


def _coupled(target: Floats, draft: Floats) -> float:
    """Sort by the ratio: of the two quotients the first is larger for whoever has a larger one."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.nan_to_num(target - draft, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        order = np.argsort(-ratio, kind="stable")
        likely, guessed = np.exp(target[order]), np.exp(draft[order])
        above = np.cumsum(likely)
        below = guessed.sum() - np.cumsum(guessed)
        terms = 1.0 / (above / likely + np.maximum(0.0, below) / guessed)
    return float(terms[(likely > 0.0) & (guessed > 0.0)].sum())


def measure_coupling(
    target: Logits,
    draft: Logits,
    positions: Sequence[int],
    params: SamplingParams,
    draws_per_context: int,
) -> Coupling:
    """Draw at each context with so many seeds; logits [N, V], position of the token to come [N]."""
    hits = 0
    for context, position in enumerate(positions):
        for first in range(0, draws_per_context, _ROWS):
            count = min(_ROWS, draws_per_context - first)
            # Seeds of one context have no part in another's noise.
            seeds = [(context << 32) + first + n for n in range(count)]
            places = [params] * count, seeds, [position] * count
            rows = target[context].repeat(count, 1), draft[context].repeat(count, 1)
            guesses = rank_candidates(rows[1], *places, 1)[0][:, 0].tolist()
            samples = sample_nodes(rows[0], *places)
            hits += sum(a == b for a, b in zip(guesses, samples, strict=True))
    likely = target_logprobs(target, [params] * len(positions)).numpy()
    guessed = target_logprobs(draft, [params] * len(positions)).numpy()
    draws = len(positions) * draws_per_context
    return Coupling(
        contexts=len(positions),
        draws=draws,
        measured=hits / draws,
        exact=float(coupled_acceptance(likely, guessed).mean()),
        independent=float((np.exp(likely) * np.exp(guessed)).sum(axis=1).mean()),
        rejection=float(np.minimum(np.exp(likely), np.exp(guessed)).sum(axis=1).mean()),
    )


def logits_along(model: LanguageModel, text: Sequence[int], begin: int, stride: int) -> Logits:
    """Return a model's logits after every `stride`-th token of a text, from index `begin` on."""
    cache = model.new_cache()
    try:
        return model.forward([Row(cache, list(text), None, range(begin, len(text), stride))])
    finally:
        cache.release()
