"""Synthetic models: they compute nothing, but behave like models of stated speed and agreement.

    synthetic:NAME?seed=1&step=1:22,32:22,128:28,512:100&jitter=0.02
    synthetic:NAME?seed=1&step=1:2.5&agree=0.8,0.1,0.05&agree_decay=1.0

With them a small machine runs a fleet with the timing of a large one, through the real batch, KV
cache and rule. A pass over N tokens takes T(N) (`step`, milliseconds at token counts, `StepTime`),
plus `kv_ms` for each 1000 tokens that its rows hold already, times a seeded `jitter`; it sleeps for
as long. `seed` is the world: it decides how every text goes on. A model that states `agree` is
a draft model: its first choice is the target's token with the first of those probabilities, its
second with the next, and so on, at a context with d guessed tokens all times `agree_decay`**d; and
as probable as that is what it claims. So much is true of greedy requests. In sampled ones the
target nearly always decides the same, but drafts rank their choices under the request's noise.

Contexts are hashes, kept where other models keep keys and values: a token's is made of its
parent's, so that a mistake in the books about slots changes what is said. They are printable text
to the byte tokenizer, and never end by themselves.

Name, dtype and fingerprint say "synthetic", and so must whatever is measured with such models.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import torch

from outrider.model.fingerprint import model_fingerprint
from outrider.model.kv_cache import Extension, KvLayout, KvPool, SessionCache
from outrider.model.language_model import ModelIdentity, Row, plan_rows
from outrider.model.synthetic_spec import (
    PREFIX,
    StepTime,
    SyntheticSpec,
    parse_synthetic_spec,
)
from outrider.model.synthetic_world import (
    EMPTY_CONTEXT,
    ContextHash,
    DraftLogits,
    Ints,
    TargetLogits,
    Words,
    mixed,
    uniform,
    word_of,
)
from outrider.tokenizer import byte_tokenizer, byte_tokenizer_files, tokenizer_fingerprint

__all__ = ["PREFIX", "StepTime", "SyntheticModel", "SyntheticSpec", "parse_synthetic_spec"]

_KV_TOKENS_DEFAULT = 1 << 20
_JITTER_CUT = 3.0
_HASHING_AFTER_MAX_S = 0.001
"""From a pass's begin, or a quarter of the pass: long before its end, so that it is never late."""

_log = logging.getLogger(__name__)


class SyntheticModel:
    """A `LanguageModel` that sleeps."""

    def __init__(self, spec: SyntheticSpec, pacer: Pacer | None = None) -> None:
        """`pacer` lets time pass; it is there for tests."""
        self.spec = spec
        self.steps = 0
        """Passes so far."""
        self.vocabulary_size = spec.vocabulary
        self.length_max = spec.length_max
        self.dtype = "synthetic"
        self.device = torch.device("cpu")
        # A context's hash stands for the keys; the place of the values stays empty.
        self.layout = KvLayout(1, 1, 1, torch.int64, self.device)
        self._identity = _identity(spec)
        self._pacer = pacer or Pacer()
        self._pool: KvPool | None = None
        self._contexts = ContextHash(spec.vocabulary)
        self._head = _head(spec)
        self._agreement = spec.agree
        self._jitter_seed = np.uint64(word_of(f"jitter {spec.name}", spec.seed, spec.draft_seed))
        _log.warning(
            "%s is a synthetic model: it computes nothing and sleeps for the time that its spec"
            " states; dtype, device and threads do not matter to it",
            self.name,
        )

    @property
    def name(self) -> str:
        """Name for people and requests; begins with "synthetic:"."""
        return self._identity.name

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, in ascending order."""
        return self._identity.eos_ids

    @property
    def model_fingerprint(self) -> str:
        """Begins with "synthetic-". Workers of other speed or name may share it."""
        return self._identity.model_fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """That of the byte tokenizer."""
        return self._identity.tokenizer_fingerprint

    @property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        """The byte tokenizer's files, by name."""
        return self._identity.tokenizer_files

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of hashes that a token takes in a session's cache."""
        return self.layout.bytes_per_token

    @property
    def agreement(self) -> tuple[float, ...]:
        """Probabilities with which the choices are right; () for a target.

        May be set at any time, from any thread, to as many numbers as the spec has: from the next
        pass on this is what is true, while what is claimed stays as the spec states it.
        """
        return self._agreement

    @agreement.setter
    def agreement(self, shares: Sequence[float]) -> None:
        # Written so that NaN is refused.
        if len(shares) != len(self.spec.agree) or not all(0.0 <= share <= 1.0 for share in shares):
            raise ValueError(f"agreement needs {len(self.spec.agree)} probabilities")
        if sum(shares) > 1.0 + 1e-9:
            raise ValueError("the probabilities of agreement exceed 1 together")
        self._agreement = tuple(shares)

    def new_pool(self, tokens_max: int | None = None) -> KvPool:
        """Allocate a KV budget; see `LanguageModel.new_pool`."""
        if tokens_max is None:
            tokens_max = _KV_TOKENS_DEFAULT
        return KvPool(self.layout, tokens_max, self.model_fingerprint)

    def new_cache(self) -> SessionCache:
        """Create an empty cache; see `LanguageModel.new_cache`."""
        if self._pool is None:
            self._pool = self.new_pool()
        return self._pool.new_cache()

    def forward(
        self, rows: Sequence[Row], meanwhile: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """Say what follows, in the stated time; see `LanguageModel.forward`."""
        started_s = self._pacer.now_s()
        extensions = plan_rows(
            rows, self.layout, vocabulary_size=self.vocabulary_size, length_max=self.length_max
        )
        if meanwhile is not None:
            meanwhile()
        if not rows:
            return torch.empty((0, self.vocabulary_size))
        for row, extension in zip(rows, extensions, strict=True):
            row.cache.reserve(extension.start + extension.size)
        tokens = sum(extension.size for extension in extensions)
        held = sum(extension.start for extension in extensions)
        duration_s = self._duration_s(tokens, held)
        # An accelerator leaves the processor to others: what they want to say comes first.
        self._pacer.wait_until(started_s + min(_HASHING_AFTER_MAX_S, duration_s / 4))
        logits = self._logits(rows, extensions)
        self._pacer.wait_until(started_s + duration_s)
        self.steps += 1
        for row, extension in zip(rows, extensions, strict=True):
            row.cache.apply(extension)
        return logits

    def _logits(self, rows: Sequence[Row], extensions: Sequence[Extension]) -> torch.Tensor:
        """Hash the new tokens into the pool; returns the wanted logits [M, vocabulary]."""
        keys = _keys(rows[0].cache.pool)
        wanted: list[int] = []
        depths: list[int] = []
        for row, extension in zip(rows, extensions, strict=True):
            slots = row.cache.slots
            contexts = self._extended(row, extension, keys, slots)
            start, size = extension.start, extension.size
            keys[slots[start : start + size]] = np.array(contexts, dtype=np.uint64)
            wanted += [contexts[at] for at in row.wanted]
            if extension.parents is None:
                depths += [0] * len(row.wanted)  # nothing of a chain is a guess
            else:
                guessed = (extension.positions - row.cache.prefix_length + 1).tolist()
                depths += [guessed[at] for at in row.wanted]
        if not wanted:
            return torch.empty((0, self.vocabulary_size))
        words = np.array(wanted, dtype=np.uint64)
        if isinstance(self._head, TargetLogits):
            return torch.from_numpy(self._head(words))
        at = np.array(depths, dtype=np.int64)
        return torch.from_numpy(self._head(words, at, self._agreement))

    def _extended(self, row: Row, extension: Extension, keys: Words, slots: Ints) -> list[int]:
        """Return the contexts up to and including each new token of a row."""
        prefix = row.cache.prefix_length
        tip = int(keys[slots[prefix - 1]]) if prefix else EMPTY_CONTEXT
        if extension.parents is None:
            return self._contexts.chain(tip, row.tokens)
        first = row.cache.tree_size
        older = {slot for slot in extension.parents if 0 <= slot < first}
        known = {slot: int(keys[slots[prefix + slot]]) for slot in older}
        known[-1] = tip
        return self._contexts.tree(known, row.tokens, extension.parents, first)

    def _duration_s(self, tokens: int, held: int) -> float:
        """Return how long this pass takes."""
        time_ms = self.spec.step.at_ms(tokens) + self.spec.kv_ms * held / 1000
        if self.spec.jitter:
            words = mixed(np.array([self.steps], dtype=np.uint64) ^ self._jitter_seed)
            # The middle of its bin, since the quantile of 0 is infinite.
            draw = NormalDist().inv_cdf(float(uniform(words)[0]) + 2.0**-54)
            time_ms *= 1.0 + self.spec.jitter * max(-_JITTER_CUT, min(_JITTER_CUT, draw))
        return time_ms / 1000


class Pacer:
    """Waits until a time is reached, and no longer, without using the processor.

    Sleeping ends late, by a tenth of a millisecond on a usual kernel. So it asks for less: by
    the lower quartile of what it has seen, following changes. Where that was too much, it yields
    for the rest.
    """

    def __init__(
        self,
        now_s: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.now_s = now_s
        self._sleep = sleep
        self._late_s = _LATE_START_S

    def wait_until(self, deadline_s: float) -> None:
        """Return at `deadline_s` on the clock `now_s`, never before."""
        left_s = deadline_s - self.now_s()
        if left_s > self._late_s:
            self._sleep(left_s - self._late_s)
            late_s = self.now_s() - (deadline_s - self._late_s)
            # Up a little three times as often as down: rests at the lower quartile.
            move_s = _LATE_MOVE_S if late_s > self._late_s else -3 * _LATE_MOVE_S
            self._late_s = min(_LATE_MAX_S, max(0.0, self._late_s + move_s))
        while self.now_s() < deadline_s:
            self._sleep(0.0)


_LATE_START_S = 60e-6
_LATE_MAX_S = 200e-6
_LATE_MOVE_S = 1e-6


def _keys(pool: KvPool) -> Words:
    """[slots] the context of each slot, in the pool's own memory."""
    keys: Words = pool.buffer.numpy()[0, 0, :, 0, 0].view(np.uint64)
    return keys


def _head(spec: SyntheticSpec) -> TargetLogits | DraftLogits:
    if not spec.agree:
        return TargetLogits(spec.seed, spec.vocabulary)
    return DraftLogits(
        spec.seed,
        spec.vocabulary,
        draft_seed=spec.draft_seed,
        claims=spec.agree,
        decay=spec.agree_decay,
    )


def _identity(spec: SyntheticSpec) -> ModelIdentity:
    files = byte_tokenizer_files()
    fingerprint = model_fingerprint(spec.decisive, "none", torch.int64, "synthetic")
    return ModelIdentity(
        name=PREFIX + spec.name,
        model_fingerprint=f"synthetic-{fingerprint}",
        tokenizer_fingerprint=tokenizer_fingerprint(byte_tokenizer()),
        tokenizer_files=files,
        eos_ids=tuple(sorted(json.loads(files["generation_config.json"])["eos_token_id"])),
    )
