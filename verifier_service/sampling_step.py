"""From a pass's logits to samples at every node, and to log-probabilities where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from outrider.domain import Candidates, TokenLogprobs
from outrider.model.language_model import Logits
from outrider.model.processing import (
    NodeContext,
    process_logits,
    token_logprobs,
    top_candidates,
)
from outrider.model.sampling import sample_nodes
from verifier_service.acceptance import Verdict
from verifier_service.planning import RowPlan


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step found out for one session."""

    plan: RowPlan
    samples: tuple[int, ...]
    """The target's sample at the tip and at each node."""
    prompt_logprobs: tuple[TokenLogprobs, ...]
    step_logits: Logits
    """Of the whole step."""
    place: slice
    """Where the row's are."""

    @property
    def logits(self) -> Logits:
        """[1 + nodes, vocabulary] of the target, unprocessed; empty if the row does not decode."""
        return self.step_logits[self.place]


def sample_rows(logits: Logits, plans: Sequence[RowPlan]) -> list[Sampled]:
    """Apply the rule at every node; `logits` are those of the rows' wanted tokens, in order."""
    places: list[slice] = []
    deciding: list[int] = []
    params, seeds, positions = [], [], []
    contexts: list[NodeContext | None] = []
    at = 0
    for plan in plans:
        at += len(plan.scored)
        count = 1 + len(plan.nodes) if plan.decodes else 0
        places.append(slice(at, at + count))
        deciding += range(at, at + count)
        at += count
        if not count:
            continue
        session = plan.seat.session
        params += [session.spec.sampling] * count
        seeds += [session.spec.seed] * count
        # A node at index i of the sequence decides the token at index i + 1.
        positions.append(len(session.log))
        positions += [node.position + 1 for node in plan.nodes]
        contexts += plan.seat.decider.contexts(session.tree.root, plan.nodes, plan.masks)
    wanted = logits if len(deciding) == at else logits[deciding]
    processed = process_logits(wanted, contexts)
    samples = iter(sample_nodes(processed, params, seeds, positions))
    return [
        Sampled(
            plan,
            tuple(islice(samples, place.stop - place.start)),
            _prompt_logprobs(logits, place.start, plan),
            logits,
            place,
        )
        for plan, place in zip(plans, places, strict=True)
    ]


def committed_logprobs(
    sampled: Sequence[Sampled], verdicts: Sequence[Verdict | None]
) -> list[tuple[TokenLogprobs, ...]]:
    """Return for each row those of its committed tokens, or nothing if nobody asked for them."""
    found: list[tuple[TokenLogprobs, ...]] = []
    for row, verdict in zip(sampled, verdicts, strict=True):
        tops = row.plan.seat.session.spec.logprobs
        if verdict is None or tops is None:
            found.append(())
            continue
        # The first token was decided at the tip, each other one at the accepted node before it.
        nodes = [0, *(1 + index for index in verdict.accepted)][: len(verdict.tokens)]
        scores = token_logprobs(row.logits[nodes], verdict.tokens, [tops] * len(nodes))
        found.append(tuple(scores))
    return found


def candidates_of(sampled: Sampled) -> Candidates | None:
    """Return the target's candidates at every node of a row, or None if nobody asked for them.

    They are the raw logits' (Token Recycling, arXiv 2408.08696): what a node's path and the
    request make of them changes from one node to the next.
    """
    session = sampled.plan.seat.session
    count = session.spec.candidates
    if not count or not len(sampled.samples):
        return None
    tokens = (session.tree.root.token, *(node.token for node in sampled.plan.nodes))
    return Candidates(tokens, tuple(top_candidates(sampled.logits, count)))


def _prompt_logprobs(logits: Logits, end: int, plan: RowPlan) -> tuple[TokenLogprobs, ...]:
    """Score a chunk of a prompt, whose logits lie before `end`."""
    if not plan.scored:
        return ()
    logits = logits[end - len(plan.scored) : end]
    session = plan.seat.session
    # Indices of a chunk, which the pass has made part of the prefix by now.
    start = session.cache.prefix_length - len(plan.tokens)
    tokens = [session.spec.prompt[start + index + 1] for index in plan.scored]
    tops = session.spec.prompt_logprobs or 0
    return tuple(token_logprobs(logits, tokens, [tops] * len(tokens)))
