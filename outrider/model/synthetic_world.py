"""Texts made of hashes: what follows a context, and how well a draft model knows.

A context is a 64-bit hash, a polynomial over its tokens' words modulo 2**64:

    hash(context + token) = hash(context) * MULTIPLIER + word(token)

so a token needs its parent's hash alone, as attention needs its ancestors' keys and values. What
follows is a finalized (splitmix64) mix of that hash with the seed of the world, so it depends on
every token of the context, and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]
Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]

EMPTY_CONTEXT = 0x0B5E_55ED_0DD5_EED5
"""Hash of the context without tokens."""

_MULTIPLIER = 0x9E37_79B9_7F4A_7C15
_MASK = (1 << 64) - 1

_FIRST_ID, _USABLE = ord(" ") + 1, 94
"""Texts consist of the ids of the printable ASCII characters but the space: no id ends one, and
each is a whole character to the byte tokenizer."""

_TABLE_ROWS = 16
_LOW_BITS = np.uint64(0x7FF)
_TARGET_LEAD = 16.0
"""How far the target's next token lies above the rest: together they keep less than 1e-4 of the
probability in a vocabulary of bytes, so that sampled texts hardly differ from the greedy one."""
_PROBABILITY_MIN = 1e-12


_GAMMA = np.uint64(_MULTIPLIER)
_FIRST, _SECOND = np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def mixed(words: Words) -> Words:
    """Finalize 64-bit words (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    words = words + _GAMMA
    words = (words ^ (words >> _SHIFTS[0])) * _FIRST
    words = (words ^ (words >> _SHIFTS[1])) * _SECOND
    return words ^ (words >> _SHIFTS[2])


def word_of(purpose: str, *numbers: int) -> int:
    """Return a word that depends on what it is for and on some numbers of any size."""
    digest = hashlib.blake2b(json.dumps([purpose, *numbers]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) made of the upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class ContextHash:
    """Extends contexts by tokens of a vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        self._words: list[int] = mixed(np.arange(vocabulary, dtype=np.uint64)).tolist()

    def chain(self, context: int, tokens: Sequence[int]) -> list[int]:
        """Return the contexts up to and including each token of a continuation."""
        words = self._words
        contexts: list[int] = []
        for token in tokens:
            context = (context * _MULTIPLIER + words[token]) & _MASK
            contexts.append(context)
        return contexts

    def tree(
        self, contexts: dict[int, int], tokens: Sequence[int], parents: Sequence[int], first: int
    ) -> list[int]:
        """Return the contexts up to and including each token; `parents` are slots.

        The tokens have the slots first, first + 1, ...; `contexts` has those of older slots.
        """
        words = self._words
        found: list[int] = []
        for token, parent in zip(tokens, parents, strict=True):
            before = found[parent - first] if parent >= first else contexts[parent]
            found.append((before * _MULTIPLIER + words[token]) & _MASK)
        return found


class TargetLogits:
    """What a target says: one token far above the rest."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        self._seed = np.uint64(word_of("world", seed))
        # Small values that differ from row to row, and cost no more than a copy.
        self._table = (_table("target", vocabulary) - 1.0).astype(np.float32)

    def __call__(self, contexts: Words) -> Floats:
        """Return the logits [M, vocabulary] after contexts [M]."""
        words = mixed(contexts ^ self._seed)
        logits: Floats = self._table[_table_rows(words)]
        logits[np.arange(len(words)), _successors(words)] = _TARGET_LEAD
        return logits


class DraftLogits:
    """What a draft model says: its ranked choices, as probable as it claims, and a thin rest.

    Which of its choices is the target's token is drawn anew, by hash, at every context.
    """

    def __init__(
        self,
        seed: int,
        vocabulary: int,
        *,
        draft_seed: int,
        claims: Sequence[float],
        decay: float,
    ) -> None:
        """`claims` has the probabilities of the choices; `decay` multiplies them per depth."""
        self._seed = np.uint64(word_of("world", seed))
        self._draft_seed = np.uint64(word_of("draft", draft_seed))
        self._claims = np.array(claims)
        self._ranks = np.arange(len(claims))
        self._decay = decay
        self._weights = 0.8 + 0.4 * _table("draft", vocabulary)
        self._totals = self._weights.sum(axis=1)
        self._logs = np.log(self._weights).astype(np.float32)

    def __call__(self, contexts: Words, depths: Ints, agreement: Sequence[float]) -> Floats:
        """Return the logits [M, vocabulary] after contexts [M] at depths [M].

        `agreement` has the true probabilities, as many as there are claims.
        """
        claims, bounds = self._claims, np.cumsum(agreement)
        if self._decay != 1.0:
            shrink = self._decay ** depths.astype(np.float64)[:, None]
            claims, bounds = np.maximum(shrink * claims, _PROBABILITY_MIN), shrink * bounds
        words = mixed(contexts ^ self._seed)
        ids = self._choices(contexts, _successors(words), bounds)
        rows = _table_rows(words)
        rest = np.maximum(1.0 - claims.sum(axis=-1), _PROBABILITY_MIN)
        weights = self._totals[rows] - self._weights[rows[:, None], ids].sum(axis=1)
        logits: Floats = self._logs[rows]
        logits += np.log(rest / weights).astype(np.float32)[:, None]
        logits[np.arange(len(ids))[:, None], ids] = np.log(claims)
        return logits

    def _choices(self, contexts: Words, truth: Ints, bounds: npt.NDArray[np.float64]) -> Ints:
        """Return the ranked ids [M, ranks].

        `truth` [M] is the target's; `bounds` [M or 1, ranks] are sums of probabilities.
        """
        draws = mixed(contexts ^ self._draft_seed)
        right = (uniform(draws)[:, None] >= bounds).sum(axis=1)
        # Distinct from each other and from the truth. The low bits have no part in `uniform`.
        first = (draws & _LOW_BITS).astype(np.int64)
        steps = 1 + (first[:, None] + self._ranks) % (_USABLE - 1)
        found = _FIRST_ID + (truth[:, None] - _FIRST_ID + steps) % _USABLE
        hits = np.flatnonzero(right < len(self._ranks))
        found[hits, right[hits]] = truth[hits]
        return found


def _successors(words: Words) -> Ints:
    return _FIRST_ID + (words % np.uint64(_USABLE)).astype(np.int64)


def _table_rows(words: Words) -> Ints:
    return (words >> np.uint64(60)).astype(np.int64)


def _table(purpose: str, vocabulary: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1): [rows, vocabulary]."""
    count = np.arange(_TABLE_ROWS * vocabulary, dtype=np.uint64)
    words = mixed(count ^ np.uint64(word_of(purpose)))
    return uniform(words).reshape(_TABLE_ROWS, vocabulary)
