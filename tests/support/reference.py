"""The one rule, written a second time: plain transformers, numpy in float64, no code of ours.

Only the noise words and grammars come from the product; they have tests of their own. Everything
else (the model's attention, penalties, filters, noise values, the choice, the ends) is independent.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outrider.domain import Grammar, SamplingParams
from outrider.model.noise import words_numpy
from outrider.model.random_model import build_random_model, parse_random_spec
from outrider.model.threads import set_threads
from outrider.tokenizer import byte_tokenizer_files
from verifier_service.grammar import GrammarCompiler

TIE_MARGIN = 1e-3
"""DESIGN section 2: in float32 a difference counts unless the two best scores are this close."""

EOS_IDS = (256, 258)
"""Ids that end a text of the tiny models: <|endoftext|> and <|im_end|>."""


@dataclass(frozen=True, slots=True)
class Case:
    """One generation: a prompt in ids and how it is continued."""

    prompt: tuple[int, ...]
    tokens_max: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    tokens_min: int = 0
    grammar: Grammar | None = None

    @property
    def sampling(self) -> SamplingParams:
        """The same, as a session is asked for it."""
        return SamplingParams(
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.logit_bias,
            self.tokens_min,
            self.grammar,
        )

    @property
    def session_seed(self) -> int:
        """Seed of the noise: BLAKE2b over request seed and choice 0."""
        message = self.seed.to_bytes(8, "little") + bytes(8)
        digest = hashlib.blake2b(message, digest_size=8, person=b"outrider-seed").digest()
        return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class Expected:
    """What the rule gives for a case."""

    ids: tuple[int, ...]
    margins: tuple[float, ...]
    """At each position, by how much the best (perturbed) score beats the second."""
    flips: int = 0
    """Ties at which the output under test, which was followed, took the second best."""
    logprobs: tuple[float, ...] = ()
    """Of each id in the target's own distribution, before anything a request asks for."""

    @property
    def ties(self) -> int:
        """Positions where the two best scores are too close to tell."""
        return sum(margin < TIE_MARGIN for margin in self.margins)


@dataclass(slots=True)
class Tally:
    """Outputs compared with the reference by the margin rule."""

    positions: int = 0
    ties: int = 0
    flips: int = 0
    faults: list[str] = field(default_factory=list)

    def check(self, spec: str, case: Case, expected: Expected, found: Sequence[int]) -> None:
        """Compare one output."""
        if tuple(found) != expected.ids:
            expected = expect(spec, case, followed=found)
        self.positions += len(expected.ids)
        self.ties += expected.ties
        self.flips += expected.flips
        if tuple(found) != expected.ids:
            self.faults.append(_difference(case, expected, found))

    def assert_identical(self) -> None:
        """Every difference counts but those at ties, which must be rare."""
        assert not self.faults, f"{len(self.faults)} outputs differ:\n" + "\n".join(self.faults[:5])
        assert self.positions > 0
        # One may always happen: also in the shortest of outputs.
        assert self.ties <= 1 + 0.01 * self.positions, f"{self.ties} ties in {self.positions}"
        assert self.flips <= self.ties


@functools.lru_cache(maxsize=4)
def plain_module(spec: str) -> Any:
    """The weights of a random model in transformers' own eager attention."""
    set_threads(1)
    return build_random_model(parse_random_spec(spec), "eager").eval().requires_grad_(False)


def processed(logits: NDArray[np.float64], case: Case) -> NDArray[np.float64]:
    """Log-probabilities [V] after temperature, top-k, top-p and min-p; -inf where filtered."""
    values = logits / (case.temperature or 1.0)
    if 0 < case.top_k < len(values):
        values = np.where(values < np.sort(values)[-case.top_k], -np.inf, values)
    probabilities = _softmax(values)
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    dropped = order[before >= case.top_p]
    if case.top_p < 1.0:
        values[dropped[dropped != order[0]]] = -np.inf
    probabilities = _softmax(values)
    if case.min_p > 0.0:
        values = np.where(probabilities < case.min_p * probabilities.max(), -np.inf, values)
    with np.errstate(divide="ignore"):
        return np.log(_softmax(values))


def adjusted(
    logits: NDArray[np.float64], case: Case, outputs: Sequence[int], stops: set[int]
) -> NDArray[np.float64]:
    """Logits [V] after grammar, minimum length, bias and penalties, one after the other."""
    values = logits.copy()
    if case.grammar is not None:
        values[~_allowed(case.grammar, tuple(outputs), len(values))] = -np.inf
    if len(outputs) < case.tokens_min:
        before = values.copy()
        values[sorted(stops)] = -np.inf
        if not np.isfinite(values).any():  # the grammar must end here: it wins
            values = before
    for token, bias in case.logit_bias:
        values[token] += bias
    for token in {*case.prompt, *outputs}:
        positive = values[token] > 0
        values[token] *= 1 / case.repetition_penalty if positive else case.repetition_penalty
    for token, count in Counter(outputs).items():
        values[token] -= count * case.frequency_penalty + case.presence_penalty
    return values


@functools.lru_cache(maxsize=4096)
def _allowed(grammar: Grammar, outputs: tuple[int, ...], size: int) -> NDArray[np.bool_]:
    """Ids [V] that may follow, from a matcher that knows nothing but this text."""
    state = _compiler(size).compile(grammar)
    state.advance(outputs)
    mask = state.walk([])[1][0]
    assert mask is not None
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(np.bool_)


@functools.lru_cache(maxsize=1)
def _compiler(size: int) -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer_files(), size, EOS_IDS)


def scores(logits: NDArray[np.float64], case: Case, position: int) -> NDArray[np.float64]:
    """What the rule takes the argmax of: [V]."""
    if case.temperature == 0.0:
        return logits
    words = words_numpy(case.session_seed, position, np.arange(len(logits)))
    uniforms = ((words >> 8).astype(np.float64) + 0.5) / 2.0**24
    return processed(logits, case) - np.log(-np.log(uniforms))


def expect(spec: str, case: Case, *, followed: Sequence[int] = ()) -> Expected:
    """Decode token by token. At ties, `followed` (an output under test) decides between the two."""
    module = plain_module(spec)
    stops = {*case.stop_ids, *(() if case.ignore_eos else EOS_IDS)}
    inputs, cache = list(case.prompt), None
    ids: list[int] = []
    margins: list[float] = []
    logprobs: list[float] = []
    flips = 0
    while len(ids) < case.tokens_max and not (ids and ids[-1] in stops):
        with torch.inference_mode():
            output = module(input_ids=torch.tensor([inputs]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[0, -1].double().numpy()
        values = adjusted(logits, case, ids, stops)
        values = scores(values, case, len(case.prompt) + len(ids))
        best, second = (int(token) for token in np.argsort(-values, kind="stable")[:2])
        margins.append(float(values[best] - values[second]))
        if margins[-1] < TIE_MARGIN and tuple(followed[len(ids) : len(ids) + 1]) == (second,):
            best, flips = second, flips + 1
        ids.append(best)
        logprobs.append(float(np.log(_softmax(logits)[best])))
        inputs = [best]
    return Expected(tuple(ids), tuple(margins), flips, tuple(logprobs))


def greedy_by_generate(spec: str, case: Case) -> tuple[int, ...]:
    """The ids that transformers' own `generate()` gives without sampling."""
    prompt = torch.tensor([case.prompt])
    output = plain_module(spec).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=case.tokens_max,
        eos_token_id=None if case.ignore_eos else list(EOS_IDS),
        pad_token_id=259,
    )
    return tuple(output[0, len(case.prompt) :].tolist())


def exact_probabilities(spec: str, case: Case, outputs: Sequence[int]) -> NDArray[np.float64]:
    """The distribution [V] of the token that follows the prompt and `outputs`, in one pass."""
    with torch.inference_mode():
        output = plain_module(spec)(input_ids=torch.tensor([[*case.prompt, *outputs]]))
    return np.exp(processed(output.logits[0, -1].double().numpy(), case))


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum())


def _difference(case: Case, expected: Expected, found: Sequence[int]) -> str:
    pairs = zip(expected.ids, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected.ids), len(found)))
    margin = expected.margins[at] if at < len(expected.margins) else float("nan")
    return (
        f"prompt of {len(case.prompt)}, temperature {case.temperature}, seed {case.seed}: "
        f"{len(expected.ids)} ids expected, {len(found)} found; first difference at {at} "
        f"(margin {margin:.2g}): {expected.ids[at : at + 4]} expected, {tuple(found[at : at + 4])}"
    )
