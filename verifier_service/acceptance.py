"""Which guesses a verify step accepts, and where a commit is cut. Pure.

The rule (DESIGN: one rule): the target's own sample decides at each node. A child is accepted iff
its token equals the sample at its parent; the walk ends at the first node without a matching
child, and that node's sample is committed as well. Estimates are never read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from outrider.domain import FinishReason
from outrider.draft_tree import Node


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verify step decided for one session."""

    tokens: tuple[int, ...]
    """The accepted path plus one more, cut at the first stop id or limit."""
    accepted: tuple[int, ...]
    """Indices, within the verified nodes, of the accepted ones; as long as they were not cut."""
    finish_reason: FinishReason | None


def accept_path(
    tip: Node, nodes: Sequence[Node], samples: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Walk the samples from the tip; returns (accepted node indices, committed tokens).

    `samples[0]` is the target's sample at the tip, `samples[1 + i]` the one at `nodes[i]`.
    """
    index_of = {node: index for index, node in enumerate(nodes)}
    accepted: list[int] = []
    tokens = [samples[0]]
    child = tip.children.get(samples[0])
    while child is not None:
        index = index_of.get(child)
        if index is None:
            break
        accepted.append(index)
        sample = samples[1 + index]
        tokens.append(sample)
        child = child.children.get(sample)
    return accepted, tokens


AcceptRule = Callable[[Node, Sequence[Node], Sequence[int]], tuple[list[int], list[int]]]


def judge(
    tip: Node,
    nodes: Sequence[Node],
    samples: Sequence[int],
    *,
    stop_ids: AbstractSet[int],
    tokens_left: int,
    rule: AcceptRule = accept_path,
) -> Verdict:
    """Apply the rule, then cut at the first stop id or at `tokens_left` (at least 1)."""
    accepted, tokens = rule(tip, nodes, samples)
    for count, token in enumerate(tokens[:tokens_left], start=1):
        if token in stop_ids:
            return Verdict(tuple(tokens[:count]), tuple(accepted[:count]), FinishReason.STOP)
    if len(tokens) >= tokens_left:
        cut = tuple(tokens[:tokens_left])
        return Verdict(cut, tuple(accepted[:tokens_left]), FinishReason.LENGTH)
    return Verdict(tuple(tokens), tuple(accepted), None)
