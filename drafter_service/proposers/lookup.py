"""Lookup: the text so far predicts its own continuation. No model.

The longest suffix of the committed tokens that occurred before is found with a suffix automaton,
in amortised O(1) per token (SAM Decoding, arXiv 2411.10666); what followed it then is the guess
(Prompt Lookup Decoding, A. Saxena, 2023; LLMA, arXiv 2304.04487). The first and the latest
earlier occurrence both count, as two branches of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from drafter_service.mirror import Mirror
from drafter_service.proposers.base import with_new_text
from drafter_service.proposers.match_estimates import MatchEstimates
from outrider.domain import ModelInfo
from outrider.draft_tree import Advance, Node


class SuffixAutomaton:
    """Suffix automaton of a growing token sequence (Blumer et al., 1985), with a match cursor.

    After `extend`, `match_length` is the length of the longest suffix that also ends earlier in
    the sequence, and `match_ends` are positions where that suffix ended.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._length: list[int] = [0]
        self._first_end: list[int] = [-1]
        self._latest_end: dict[int, int] = {}
        self._last = 0
        self._cursor = 0
        self.match_length = 0
        self.match_ends: tuple[int, ...] = ()

    def extend(self, token: int) -> None:
        """Append a token."""
        self._follow(token)
        self._append(token)
        # A state that was just split covers the match only down to its new link's length.
        while self._cursor and self._length[self._link[self._cursor]] >= self.match_length:
            self._cursor = self._link[self._cursor]
        if not self.match_length:
            self.match_ends = ()
            return
        first = self._first_end[self._cursor]
        latest = self._latest_end.get(self._cursor, first)
        self.match_ends = (latest,) if latest == first else (latest, first)
        self._latest_end[self._cursor] = len(self.tokens) - 1

    def _follow(self, token: int) -> None:
        """Move the cursor before the token is added, so that it only sees earlier text."""
        state, length = self._cursor, self.match_length
        while state and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state]
        if token in self._next[state]:
            state, length = self._next[state][token], length + 1
        else:
            length = 0
        self._cursor, self.match_length = state, length

    def _append(self, token: int) -> None:
        end = len(self.tokens)
        self.tokens.append(token)
        new = self._state(self._length[self._last] + 1, end)
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state < 0:
            self._link[new] = 0
        else:
            target = self._next[state][token]
            if self._length[target] == self._length[state] + 1:
                self._link[new] = target
            else:
                self._link[new] = self._link[target] = self._split(state, token, target)
        self._last = new

    def _split(self, state: int, token: int, target: int) -> int:
        clone = self._state(self._length[state] + 1, self._first_end[target])
        self._next[clone] = dict(self._next[target])
        self._link[clone] = self._link[target]
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _state(self, length: int, first_end: int) -> int:
        self._next.append({})
        self._link.append(-1)
        self._length.append(length)
        self._first_end.append(first_end)
        return len(self._next) - 1


@dataclass(slots=True)
class _State:
    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    bucket_of: dict[Node, int] = field(default_factory=dict)
    proposed_length: int = 0
    """Length of the committed tokens for which guesses were made."""


class LookupProposer:
    """Guesses from the session's own text."""

    def __init__(self, *, match_min: int = 2) -> None:
        self._match_min = match_min
        self._estimates = MatchEstimates()
        self._states: dict[tuple[int, int], _State] = {}

    @property
    def info(self) -> ModelInfo:
        """Handles ids only, so it fits any tokenizer."""
        return ModelInfo(
            model="lookup",
            model_fingerprint="lookup",
            tokenizer_fingerprint=None,
            vocabulary_size=0,
            length_max=0,
            dtype="",
            proposer="lookup",
        )

    @property
    def leaves_max(self) -> int:
        """No bound: all sessions are served at once."""
        return 0

    def open(self, mirror: Mirror) -> None:
        """Index prompt and committed tokens."""
        state = self._states[mirror.key] = _State()
        for token in mirror.log.tokens:
            state.automaton.extend(token)

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        """Learn from what became of the guesses and index the new tokens."""
        state = self._states[mirror.key]
        self._learn(state, tokens, advance)
        for token in tokens:
            state.automaton.extend(token)
        alive = set(mirror.tree)
        state.bucket_of = {node: b for node, b in state.bucket_of.items() if node in alive}

    def _learn(self, state: _State, tokens: Sequence[int], advance: Advance) -> None:
        by_position: dict[int, list[Node]] = {}
        for node in state.bucket_of:
            by_position.setdefault(node.position, []).append(node)
        start = len(state.automaton.tokens)
        parents: set[Node | None] = set()
        for offset, token in enumerate(tokens):
            candidates = by_position.get(start + offset, [])
            if offset:
                candidates = [node for node in candidates if node in parents]
            for node in candidates:
                self._estimates.observe(state.bucket_of[node], node.token == token)
            if offset >= len(advance.matched):
                return
            parents = set(advance.matched[offset].children.values())

    def close(self, mirror: Mirror) -> None:
        """Drop the index."""
        self._states.pop(mirror.key, None)

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """Guess once for each session whose text has changed."""
        for mirror, state in with_new_text(mirrors, self._states):
            self._propose(mirror, state)
        return False

    def _propose(self, mirror: Mirror, state: _State) -> None:
        automaton = state.automaton
        if automaton.match_length < self._match_min:
            return
        for end in automaton.match_ends:
            node: Node | None = mirror.tree.root
            start = end + 1
            # What followed may reach the end of the text; then text that repeats itself goes on
            # doing so (LZ77's overlapping copy). Without this, a loop of one token would give one
            # guess at a time, which always comes too late.
            period = len(automaton.tokens) - start
            for depth in range(mirror.budget.depth_max):
                assert node is not None
                token = automaton.tokens[start + depth % period]
                bucket = MatchEstimates.bucket(automaton.match_length + depth)
                node = mirror.attach(node, token, self._estimates.logprob(bucket))
                if node is None:
                    break
                state.bucket_of.setdefault(node, bucket)
