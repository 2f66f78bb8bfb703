"""What an orchestrator counts. Plain numbers, so that the token path pays next to nothing. Pure."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.domain import PullOutcome, PullReport, SpeculationCounters
from outrider.kv_blocks import BLOCK_TOKENS

POSITIONS_MAX = 64
"""Acceptance is counted by position up to here; what lies deeper counts as the last one."""
_LATENCY_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
LOOKUP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Histogram:
    """Observations in seconds, counted in buckets."""

    __slots__ = ("bounds_s", "counts", "sum_s")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        """`bounds_s` are the upper ends of the buckets, ascending."""
        self.bounds_s = tuple(bounds_s)
        self.counts = [0] * (len(self.bounds_s) + 1)
        """Observations in each bucket; the last one has no upper end."""
        self.sum_s = 0.0

    def observe(self, value_s: float, count: int = 1) -> None:
        """Take in `count` equal observations."""
        self.counts[bisect.bisect_left(self.bounds_s, value_s)] += count
        self.sum_s += value_s * count


@dataclass(slots=True)
class Meters:
    """Counters since the start; all grow, none is read on the token path."""

    requests: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ended: SpeculationCounters = field(default_factory=SpeculationCounters)
    """Of sessions that are over."""
    accepted_at: list[int] = field(default_factory=lambda: [0] * POSITIONS_MAX)
    """Accepted draft tokens by their place in the draft."""
    fallback_rounds: Counter[str] = field(default_factory=Counter)
    """Verify steps of sessions that nobody guessed for, by why."""
    migrations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Moves of sessions by (role of the worker left, cause)."""
    kv_pulls: Counter[str] = field(default_factory=Counter)
    """Attempts to fetch KV from a peer by how they ended."""
    kv_pulled_tokens: int = 0
    kv_pulled_bytes: int = 0
    kv_pull_s: Histogram = field(default_factory=lambda: Histogram(_LATENCY_S))
    """How long sessions waited for them; those that were declined did not."""
    first_token_s: Histogram = field(default_factory=lambda: Histogram(_LATENCY_S))
    between_tokens_s: Histogram = field(default_factory=lambda: Histogram(_TOKEN_S))
    queued_s: Histogram = field(default_factory=lambda: Histogram(_LATENCY_S))
    total_s: Histogram = field(default_factory=lambda: Histogram(_LATENCY_S))
    step_s: Histogram = field(default_factory=lambda: Histogram(_TOKEN_S))

    def committed(self, tokens: int, since_s: float) -> None:
        """A session got tokens, so long after its previous ones."""
        self.between_tokens_s.observe(since_s / tokens, tokens)
        self.accepted(tokens - 1)

    def pulled(self, report: PullReport) -> None:
        """An attempt to fetch KV from a peer has ended."""
        if report.outcome is None:
            return
        self.kv_pulls[report.outcome.value] += 1
        self.kv_pulled_tokens += report.blocks * BLOCK_TOKENS
        self.kv_pulled_bytes += report.size_bytes
        if report.outcome is not PullOutcome.DECLINED:
            self.kv_pull_s.observe(report.duration_s)

    def accepted(self, count: int) -> None:
        """A verify step accepted so many guesses for a session."""
        for position in range(min(count, POSITIONS_MAX)):
            self.accepted_at[position] += 1
        if count > POSITIONS_MAX:
            self.accepted_at[-1] += count - POSITIONS_MAX
