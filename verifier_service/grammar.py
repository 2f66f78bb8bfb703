"""Grammars over a session's output: which ids may follow, at the tip and at every tree node.

A thin layer over llguidance (https://github.com/guidance-ai/llguidance), which walks an Earley
parser and a lazily built lexer over the trie of all tokens. What it decides:

- The whole output must belong to the language: a regex need not be anchored.
- Where the grammar forces a text, only its canonical first token is allowed.
- An end id is allowed where the text may end; once it must end, nothing else is.
- JSON may have white space between its tokens, unless a schema says
  `"x-guidance": {"whitespace_flexible": false}`.

Masks are uint32 words: id i is bit i % 32 of word i // 32. They are functions of grammar and path:
a walk leaves no trace. Only the limits below are counted over everything that was asked of a
session's grammar; they bound the time of a mask and the memory of a session.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from outrider.domain import Grammar, GrammarKind
from outrider.errors import InvalidRequest

Mask = NDArray[np.uint32]

REASON_CHARS_MAX = 200

_LIMITS = LLParserLimits(
    # About 2 kB each, kept as long as the session.
    max_lexer_states=25_000,
    # Else a message holds the grammar and the text so far.
    verbose_errors=False,
)


class GrammarCompiler:
    """Compiles requests' grammars for one model. Any thread may call it."""

    def __init__(
        self,
        tokenizer_files: Mapping[str, bytes],
        vocabulary_size: int,
        eos_ids: Collection[int],
    ) -> None:
        self._files = tokenizer_files
        self._vocabulary_size = vocabulary_size
        self._eos_ids = frozenset(eos_ids)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """The trie of all tokens: built when the first grammar needs it.

        Ids of the model that the tokenizer does not know are never allowed. Raises `ValueError`.
        """
        text = self._files.get("tokenizer.json")
        if text is None:
            raise ValueError("the model has no tokenizer.json")
        # Text that does not begin like JSON would be taken for a path.
        if not text.lstrip().startswith(b"{"):
            raise ValueError("the model's tokenizer.json is no JSON object")
        return LLTokenizer(
            text.decode().lstrip(), n_vocab=self._vocabulary_size, eos_token=sorted(self._eos_ids)
        )

    def compile(self, grammar: Grammar) -> GrammarState:
        """Return the state before the first output token. Raises `InvalidRequest`.

        Takes about a millisecond for an ordinary schema, after the first one has built the trie.
        llguidance bounds most of what a hostile one costs, but not all: a schema with a dozen
        patterns that must hold at once, or a large `multipleOf` beside bounds, can take it
        exponential time. It holds no GIL meanwhile, and cannot be interrupted.
        """
        field = f"sampling.grammar.{grammar.kind.value}"
        try:
            tokenizer = self._tokenizer
        except ValueError as error:
            reason = f"this model cannot follow a grammar: {_short(str(error))}"
            raise InvalidRequest(field, reason) from error
        try:
            source = _translated(grammar)
        except ValueError as error:
            raise InvalidRequest(field, _short(str(error))) from error
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise InvalidRequest(field, _short(matcher.get_error()))
        # A language without any text shows only when one asks how it may begin.
        if _mask(matcher) is None:
            raise InvalidRequest(field, f"nothing matches it: {_short(matcher.get_error())}")
        return GrammarState(matcher, self._eos_ids, field)


class GrammarState:
    """Where a session's committed output stands in its grammar. One thread owns it.

    After a failover: compile, then `advance` by the committed output.
    """

    def __init__(self, matcher: LLMatcher, eos_ids: frozenset[int], field: str) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._field = field

    def advance(self, tokens: Sequence[int]) -> None:
        """Move the tip along newly committed tokens.

        Raises `InvalidRequest` if the grammar does not allow them, or breaks a limit there; the
        state is of no use then.
        An id that ends the output leaves the state where it is.
        """
        for token in tokens:
            if token in self._eos_ids:
                if not _allows(self._tip_mask(), token):
                    raise InvalidRequest(self._field, f"id {token} ends an unfinished text")
            elif not self._matcher.consume_token(token):
                raise self._failure()

    def walk(self, nodes: Sequence[tuple[int, int]]) -> tuple[list[bool], list[Mask | None]]:
        """Return which of a tree's nodes are allowed, and what may follow: tip first, then nodes.

        `nodes` are (index of the parent, token), parents first; parent -1 is the tip. The mask
        of node i is entry 1 + i, and None if the node is not allowed. A node is not allowed if its
        parent is not, or if asking what follows it would break a limit. The state stays at the tip.
        Raises `InvalidRequest` if the grammar breaks a limit at the tip itself.
        """
        allowed = [False] * len(nodes)
        masks: list[Mask | None] = [self._tip_mask(), *(None for _ in nodes)]
        if not nodes:
            return allowed, masks
        children: list[list[int]] = [[] for _ in masks]
        for index, (parent, _) in enumerate(nodes):
            children[1 + parent].append(index)
        # Copies cost microseconds, as they share the lexer. The state itself is never moved, so
        # that a walk cannot leave it elsewhere.
        walker = self._matcher.deep_copy()
        paths: list[tuple[int, ...]] = [(), *(() for _ in nodes)]
        held = 0  # tokens that the walker is below the tip
        waiting = children[0][::-1]
        while waiting:  # depth first, so that the walker is at or below the parent
            index = waiting.pop()
            parent, token = nodes[index]
            mask, path = masks[1 + parent], paths[1 + parent]
            if mask is None or not _allows(mask, token):
                continue
            if token in self._eos_ids:
                mask = self._end_mask(len(mask))
            else:
                walker.rollback(held - len(path))
                held = len(path)
                mask = _mask(walker) if walker.consume_token(token) else None
                if mask is None:  # a failed matcher stays failed
                    walker = self._matcher.deep_copy()
                    walker.consume_tokens(list(path))
                    continue
                held += 1
                path = (*path, token)
            allowed[index], masks[1 + index], paths[1 + index] = True, mask, path
            waiting += children[1 + index][::-1]
        return allowed, masks

    def _tip_mask(self) -> Mask:
        mask = _mask(self._matcher)
        if mask is None:
            raise self._failure()
        return mask

    def _failure(self) -> InvalidRequest:
        reason = _short(self._matcher.get_error())
        return InvalidRequest(self._field, f"committed output cannot follow it: {reason}")

    def _end_mask(self, words: int) -> Mask:
        mask = np.zeros(words, dtype=np.uint32)
        for token in self._eos_ids:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask


def _mask(matcher: LLMatcher) -> Mask | None:
    """Return what may follow, or None if the matcher has failed, here or before."""
    words = np.frombuffer(matcher.compute_bitmask(), dtype="<u4")
    return None if matcher.is_error() else words


def _allows(mask: Mask, token: int) -> bool:
    return token // 32 < len(mask) and bool(int(mask[token // 32]) >> token % 32 & 1)


def _translated(grammar: Grammar) -> str:
    """Return the grammar in llguidance's own form. Raises `ValueError`."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(grammar.source)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.source)


def _short(reason: str) -> str:
    """Return the library's reason as one line of bounded length."""
    # Reasons about a regex show it, the place, and then say what is wrong.
    _, _, said = reason.rpartition("error: ")
    line = " ".join((said or reason).replace("<non-verbose/>", "").split("\n   1 | ")[0].split())
    return line if len(line) <= REASON_CHARS_MAX else line[: REASON_CHARS_MAX - 3] + "..."
