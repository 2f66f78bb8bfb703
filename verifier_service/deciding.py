"""What the rule needs to know of a session beside the logits: one `Decider` each.

Penalties, minimum length and grammar are functions of the path, so they are evaluated at every node
of a step's tree. Log-probabilities are of the target's own distribution, before any of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outrider.domain import SessionSpec, TokenLogprobs
from outrider.draft_tree import Node
from outrider.model.processing import History, NodeContext
from verifier_service.grammar import GrammarState

Mask = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a grammar leaves of a tree: nodes that may be accepted, and which ids may follow."""

    nodes: tuple[Node, ...]
    masks: tuple[Mask | None, ...]
    """At the tip, then at each node."""


class Decider:
    """Path-dependent state of one session, at its tip."""

    def __init__(
        self, spec: SessionSpec, stop_ids: frozenset[int], grammar: GrammarState | None
    ) -> None:
        """`grammar` stands at the beginning of the output."""
        self.spec = spec
        self.logprobs: list[TokenLogprobs] = []
        """Of the output tokens decided here, if they were asked for."""
        self.prompt_scored = 1
        """Index of the first prompt token whose log-probability was not reported yet."""
        self._stop_ids = tuple(sorted(stop_ids))
        self._output_length = len(spec.committed)
        self._history = History(spec.prompt, spec.committed) if spec.sampling.penalized else None
        self._grammar = grammar
        if grammar is not None:
            grammar.advance(spec.committed)

    @property
    def plain(self) -> bool:
        """True if nothing but noise and filters decides the next token."""
        params = self.spec.sampling
        return (
            self._history is None
            and self._grammar is None
            and not params.logit_bias
            and self._output_length >= params.tokens_min
        )

    def allow(self, tip: Node, nodes: Sequence[Node]) -> Allowed:
        """Leave out nodes that the grammar forbids, which nothing could accept."""
        if self._grammar is None:
            return Allowed(tuple(nodes), (None,) * (1 + len(nodes)))
        index = {node: at for at, node in enumerate(nodes)}
        edges = [
            (-1 if node.parent is None or node.parent is tip else index[node.parent], node.token)
            for node in nodes
        ]
        allowed, masks = self._grammar.walk(edges)
        kept = [at for at, good in enumerate(allowed) if good]
        return Allowed(tuple(nodes[at] for at in kept), (masks[0], *(masks[1 + at] for at in kept)))

    def contexts(
        self, tip: Node, nodes: Sequence[Node], masks: Sequence[Mask | None]
    ) -> list[NodeContext | None]:
        """Say how the logits at the tip and at each node are processed; None: not at all."""
        if self.plain:
            return [None] * (1 + len(nodes))
        paths: dict[Node, tuple[int, ...]] = {tip: ()}
        for node in nodes:
            assert node.parent is not None, "chosen nodes descend from the tip"
            paths[node] = (*paths[node.parent], node.token)
        return [
            NodeContext(
                params=self.spec.sampling,
                history=self._history,
                path=path,
                banned=(
                    self._stop_ids
                    if self._output_length + len(path) < self.spec.sampling.tokens_min
                    else ()
                ),
                allowed=mask,
            )
            for path, mask in zip(paths.values(), masks, strict=True)
        ]

    def advance(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Follow a commit. Raises `InvalidRequest` if a limit of the grammar is hit."""
        self._output_length += len(tokens)
        self.logprobs.extend(logprobs)
        if self._history is not None:
            self._history.extend(tokens)
        if self._grammar is not None:
            self._grammar.advance(tokens)

    def logprobs_since(self, have_length: int) -> tuple[TokenLogprobs, ...]:
        """Return those of the tokens after the first `have_length`, prompt included."""
        first = len(self.spec.prompt) + len(self.spec.committed)
        return tuple(self.logprobs[max(0, have_length - first) :])
