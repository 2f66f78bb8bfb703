"""Closed forms for every way to speculate. Pure.

Rates are committed tokens per second of all `Figures.rows` sessions of one verifier. Chains
accept each guess with probability a (the first choice's), so a round of K guesses commits
E(K) = (1 - a^(K+1)) / (1 - a) tokens. Sources: Leviathan et al., arXiv 2211.17192 (chains);
PEARL, arXiv 2408.11850, as the Markov chain of its two modes; SSD/Saguaro, arXiv 2603.03251 (pull);
"Speculation at a Distance", arXiv 2606.25091 (capacity and limits over a network).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.planner.knots import Knots, check_knots, duration_s
from orchestrator.planner.scenario import check_agreement
from outrider.errors import ConfigError

LENGTH_MAX = 64
"""Longest chain, and most draft steps of a tree, that are tried."""

_LEVELS_WITHOUT_GAIN = 8
"""Draft steps of a tree after which no better number of them is looked for."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one verifier, its drafter and its sessions are like. Raises `ConfigError`."""

    step: Knots
    """(tokens, seconds) of a verify step."""
    draft: Knots
    """(leaves, seconds) of a draft step."""
    agreement: tuple[float, ...]
    """Probability that a drafter's first, second, ... choice is the target's token."""
    leaves: int = 16
    """Most leaves that a draft step expands."""
    rows: int = 1
    """Sessions that decode on the verifier at once."""
    nodes_max: int = 31
    """Most guesses of one verify step, over all its sessions."""
    hit_rate: float = 0.85
    """Probability that a drafter which enumerates outcomes foresaw the one that came."""

    def __post_init__(self) -> None:
        check_knots("step", self.step)
        check_knots("draft", self.draft)
        check_agreement("agreement", self.agreement)
        for name in ("leaves", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.nodes_max < 0:
            raise ConfigError(f"nodes_max: must not be negative, got {self.nodes_max}")
        if not 0.0 <= self.hit_rate <= 1.0:
            raise ConfigError(f"hit_rate: must lie between 0 and 1, got {self.hit_rate}")

    @property
    def acceptance(self) -> float:
        """Of the first choice."""
        return self.agreement[0] if self.agreement else 0.0

    def verify_s(self, nodes_per_row: int) -> float:
        """Duration of a step with as many guesses for each row."""
        return duration_s(self.step, self.rows * (1 + nodes_per_row))

    def chain_draft_s(self) -> float:
        """Duration of drafting one more token for each row."""
        batches, rest = divmod(self.rows, self.leaves)
        batch_s = batches * duration_s(self.draft, self.leaves)
        return batch_s + (duration_s(self.draft, rest) if rest else 0.0)


@dataclass(frozen=True, slots=True)
class Best:
    """A mode at its best setting."""

    tokens_per_s: float
    length: int
    """Guesses of a chain, or draft steps of a tree; 0 is plain decoding."""


def chain_tokens(acceptance: float, length: int) -> float:
    """Tokens that a round with a chain of so many guesses commits, by expectation."""
    if acceptance >= 1.0:
        return length + 1.0
    return (1.0 - acceptance ** (length + 1)) / (1.0 - acceptance)


def target_only(figures: Figures) -> Best:
    """Decode without guesses: rows / T."""
    return Best(figures.rows / figures.verify_s(0), 0)


def colocated_chain(figures: Figures) -> Best:
    """Draft on the verifier's own device, then verify: E / (K t_d + T)."""
    return lockstep(figures, rtt_s=0.0)


def lockstep(figures: Figures, rtt_s: float) -> Best:
    """Draft elsewhere, send, verify, answer: E / (K t_d + T + r)."""

    def rate(length: int) -> float:
        cycle_s = length * figures.chain_draft_s() + figures.verify_s(length) + rtt_s
        return chain_tokens(figures.acceptance, length) / cycle_s

    return _best_length(figures, rate)


def pearl(figures: Figures, rtt_s: float) -> Best:
    """Draft the next block while one is verified, as PEARL: one bubble for each rejection.

    (1 - q) / ((1 - a)(1 - q + a)) tokens per max(T, K t_d) + r, where q = a^K and K t_d <= T.
    """
    acceptance = figures.acceptance

    def rate(length: int) -> float:
        draft_s, verify_s = length * figures.chain_draft_s(), figures.verify_s(length)
        if length > 1 and draft_s > verify_s:
            return 0.0
        full = acceptance**length
        tokens = float(length)
        if acceptance < 1.0:
            tokens = (1.0 - full) / ((1.0 - acceptance) * (1.0 - full + acceptance))
        return tokens / (max(verify_s, draft_s) + rtt_s)

    return _best_length(figures, rate)


def pull(figures: Figures, rtt_s: float) -> Best:
    """Enumerate outcomes at the drafter, which is asked each round, as SSD.

    E / (h max(T + r, K t_d) + (1 - h)(T + r + K t_d)).
    """

    def rate(length: int) -> float:
        draft_s, verify_s = length * figures.chain_draft_s(), figures.verify_s(length)
        hit_s = max(verify_s + rtt_s, draft_s)
        cycle_s = _mix(figures.hit_rate, hit_s, verify_s + rtt_s + draft_s)
        return chain_tokens(figures.acceptance, length) / cycle_s

    return _best_length(figures, rate)


def push(figures: Figures, rtt_s: float) -> Best:
    """Enumerate outcomes at the drafter and send them all; a miss decodes plainly.

    (h E + 1 - h) / (h max(T, r + K t_d) + (1 - h) T).
    """

    def rate(length: int) -> float:
        draft_s, verify_s = length * figures.chain_draft_s(), figures.verify_s(length)
        tokens = _mix(figures.hit_rate, chain_tokens(figures.acceptance, length), 1.0)
        return tokens / _mix(figures.hit_rate, max(verify_s, rtt_s + draft_s), figures.verify_s(0))

    return _best_length(figures, rate)


def colocated_tree(figures: Figures) -> Best:
    """Grow a tree on the verifier's own device for k draft steps, then verify its best nodes.

    Each draft step expands the best leaves; few leaves for many rows are shared out evenly, one to
    a row at least. As many nodes are verified as pay. `Best.length` is k.
    """
    best, worse = target_only(figures), 0
    width = max(1, figures.leaves // figures.rows)
    leaves = [-1.0]
    nodes: list[float] = []
    drafting_s = 0.0
    for level in range(1, LENGTH_MAX + 1):
        batch = [-heapq.heappop(leaves) for _ in range(min(width, len(leaves)))]
        if width > 1:
            drafting_s += duration_s(figures.draft, len(batch) * figures.rows)
        else:
            drafting_s += figures.chain_draft_s()
        children = [parent * agreed for parent in batch for agreed in figures.agreement]
        for child in children:
            heapq.heappush(leaves, -child)
        nodes = sorted(nodes + children, reverse=True)
        rate = _verified_rate(figures, nodes, drafting_s)
        if rate > best.tokens_per_s:
            best, worse = Best(rate, level), 0
        elif not leaves or (worse := worse + 1) >= _LEVELS_WITHOUT_GAIN:
            break
    return best


def _verified_rate(figures: Figures, nodes: list[float], drafting_s: float) -> float:
    """Tokens per second with as many of the best nodes of each row as pay."""
    expected = best = 0.0
    for count, probability in enumerate(nodes[: figures.nodes_max // figures.rows], start=1):
        expected += probability
        rate = figures.rows * (1.0 + expected) / (drafting_s + figures.verify_s(count))
        best = max(best, rate)
    return best


# --- capacity and cost ------------------------------------------------------------------------


def drafters_per_verifier(
    rows: int, leaves_per_row: float, draft_steps: int, draft: Knots, leaves: int, cycle_s: float
) -> int:
    """Drafters that serve the rows of one verifier: ceil(B w K t_d(b) / (b C)).

    `leaves_per_row` is w: 1 for chains, outcomes times (K + 1) where they are enumerated; `leaves`
    is b, the leaves of one draft step; `cycle_s` is what a round may take.
    """
    work_s = rows * leaves_per_row * draft_steps * duration_s(draft, leaves) / leaves
    return max(1, math.ceil(work_s / cycle_s - 1e-9))


def cost_per_million_tokens(price_per_hour: float, tokens_per_s: float) -> float:
    """What a million tokens cost on machines of that price together."""
    return price_per_hour / 3_600.0 / tokens_per_s * 1e6


# --- break-even round trips -------------------------------------------------------------------


def lockstep_break_even_s(figures: Figures) -> float:
    """Round trip beyond which no lockstep chain beats target-only: (E - 1) T - K t_d at best K.

    Not positive where none does at any distance.
    """
    return max(
        chain_tokens(figures.acceptance, length) * figures.verify_s(0)
        - figures.verify_s(length)
        - length * figures.chain_draft_s()
        for length in range(1, LENGTH_MAX + 1)
    )


def _best_length(figures: Figures, rate: Callable[[int], float]) -> Best:
    """The best chain of one guess or more, even where none pays: its rate tells."""
    longest = min(LENGTH_MAX, figures.nodes_max // figures.rows)
    if not longest:
        return target_only(figures)
    length = max(range(1, longest + 1), key=rate)
    return Best(figures.rows * rate(length), length)


def _mix(share: float, one: float, other: float) -> float:
    return share * one + (1.0 - share) * other
