"""Signals from what orchestrators export: their metrics, scraped. Pure.

Orchestrators report for the workers, too. What each counts for itself is added up; what several
say of one worker is taken once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.scaling.signals import (
    DrafterSignals,
    OrchestratorSignals,
    Signals,
    SpeculationFigures,
    VerifierSignals,
)

PREFIX = "outrider_"
QUEUE_QUANTILE = 0.95

NAMES = frozenset(
    {
        "connections",
        "connections_max",
        "cpu_seconds_total",
        "draft_gain_tokens",
        "draft_leaves_max",
        "draft_rtt_seconds",
        "draft_step_seconds",
        "draining",
        "kv_used_ratio",
        "pay_probability_min",
        "plain_step_seconds",
        "queue_depth",
        "queue_wait_seconds_bucket",
        "requests_total",
        "sessions",
        "sessions_max",
        "verifier_rtt_seconds",
        "verify_rows",
        "worker_sessions",
        "worker_sessions_max",
        "workers",
    }
)
"""What is read, without the prefix; a scrape may leave out the rest."""

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one orchestrator exported."""

    instance: str
    """Which one; another process must have another name."""
    at_s: float
    samples: Mapping[str, Sequence[Sample]]
    """By name, without the prefix."""

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        return math.fsum(value for _, value in self.chosen(name, **labels))

    def chosen(self, name: str, **labels: str) -> list[Sample]:
        """A metric's samples with these labels."""
        return [
            (found, value)
            for found, value in self.samples.get(name, ())
            if all(found.get(label) == wanted for label, wanted in labels.items())
        ]


def read_signals(
    scrapes: Sequence[Scrape], before: Mapping[str, Scrape], *, missing: int, now_s: float
) -> Signals:
    """Put together what orchestrators say.

    `before` holds the previous scrapes by instance, for what only grows; `missing` orchestrators
    could not be asked.
    """
    taking = [scrape for scrape in scrapes if not scrape.total("draining")]
    return Signals(
        measured_s=min((scrape.at_s for scrape in scrapes), default=-math.inf),
        orchestrators=OrchestratorSignals(
            ready=len(taking),
            sessions=round(_sum(scrapes, "sessions", role="orchestrator")),
            sessions_max=round(_sum(taking, "sessions_max")),
            connections=round(_sum(scrapes, "connections")),
            connections_max=round(_sum(taking, "connections_max")),
            cpu_cores=_cores(taking, before),
        ),
        verifiers=_verifiers(scrapes, before),
        drafters=_drafters(scrapes),
        missing=missing,
    )


def _verifiers(scrapes: Sequence[Scrape], before: Mapping[str, Scrape]) -> VerifierSignals:
    room = _by_worker(scrapes, "worker_sessions_max", "worker", role="verifier")
    shares = _by_worker(scrapes, "kv_used_ratio", "verifier")
    return VerifierSignals(
        ready=len(room),
        sessions=round(_sum(scrapes, "worker_sessions", role="verifier")),
        sessions_max=round(sum(room.values())),
        waiting=round(_most(scrapes, "queue_depth", role="verifier")),
        refused=round(
            sum(_grown(s, before, "requests_total", outcome="exhausted") for s in scrapes)
        ),
        queue_wait_s=_queue_wait_s(scrapes, before),
        kv_share=_mean(shares.values()),
        draining=round(_most(scrapes, "workers", role="verifier", state="draining")),
    )


def _drafters(scrapes: Sequence[Scrape]) -> DrafterSignals:
    room = _by_worker(scrapes, "worker_sessions_max", "worker", role="drafter")
    return DrafterSignals(
        ready=len(room),
        sessions=round(_sum(scrapes, "worker_sessions", role="drafter")),
        sessions_max=round(sum(room.values())),
        figures=_figures(scrapes),
    )


def _figures(scrapes: Sequence[Scrape]) -> SpeculationFigures | None:
    rows = [r for r in _by_worker(scrapes, "verify_rows", "verifier").values() if r > 0.0]
    plain_s = _mean(_by_worker(scrapes, "plain_step_seconds", "verifier").values())
    if not rows or not plain_s:
        return None
    pays = _by_worker(scrapes, "pay_probability_min", "verifier").values()
    leaves = _by_worker(scrapes, "draft_leaves_max", "drafter").values()
    gains = [value for scrape in scrapes for _, value in scrape.chosen("draft_gain_tokens")]
    return SpeculationFigures(
        rows=sum(rows) / len(rows),
        plain_s=plain_s,
        pay_min=min(1.0, _mean(pays) or 0.0),
        draft_step_s=_mean(_by_worker(scrapes, "draft_step_seconds", "drafter").values()),
        leaves_max=round(_mean(leaves) or 0.0),
        rtt_s=(_mean(_by_worker(scrapes, "verifier_rtt_seconds", "verifier").values()) or 0.0)
        + (_mean(_by_worker(scrapes, "draft_rtt_seconds", "drafter").values()) or 0.0),
        gain=_mean(gains),
    )


def _queue_wait_s(scrapes: Sequence[Scrape], before: Mapping[str, Scrape]) -> float | None:
    """The quantile of what was observed since the last look, upper ends counting; None: nothing."""
    name = "queue_wait_seconds_bucket"
    bounds = {labels.get("le", "") for s in scrapes for labels, _ in s.chosen(name)}
    counts = {
        float(bound): sum(_grown(s, before, name, le=bound) for s in scrapes) for bound in bounds
    }
    observed = counts.get(math.inf, 0.0)
    if observed <= 0.0:
        return None
    finite = [bound for bound in sorted(counts) if math.isfinite(bound)]
    for bound in finite:
        if counts[bound] >= QUEUE_QUANTILE * observed:
            return bound
    # Longer than what is told apart.
    return 2.0 * finite[-1] if finite else None


def _cores(scrapes: Sequence[Scrape], before: Mapping[str, Scrape]) -> float | None:
    """Cores kept busy; those seen for the first time count as the others."""
    known = [
        _grown(scrape, before, "cpu_seconds_total") / (scrape.at_s - earlier.at_s)
        for scrape in scrapes
        if (earlier := before.get(scrape.instance)) is not None and scrape.at_s > earlier.at_s
    ]
    mean = _mean(known)
    return None if mean is None else mean * len(scrapes)


def _grown(scrape: Scrape, before: Mapping[str, Scrape], name: str, **labels: str) -> float:
    """By how much a counter has grown; one that has shrunk began anew."""
    earlier = before.get(scrape.instance)
    if earlier is None:
        return 0.0
    now, then = scrape.total(name, **labels), earlier.total(name, **labels)
    return now - then if now >= then else now


def _by_worker(
    scrapes: Sequence[Scrape], name: str, worker: str, **labels: str
) -> dict[str, float]:
    """What is said of each worker; the most where orchestrators differ."""
    known: dict[str, float] = {}
    for scrape in scrapes:
        for found, value in scrape.chosen(name, **labels):
            if not math.isnan(value):
                address = found.get(worker, "")
                known[address] = max(value, known.get(address, value))
    return known


def _sum(scrapes: Sequence[Scrape], name: str, **labels: str) -> float:
    return math.fsum(scrape.total(name, **labels) for scrape in scrapes)


def _most(scrapes: Sequence[Scrape], name: str, **labels: str) -> float:
    return max((scrape.total(name, **labels) for scrape in scrapes), default=0.0)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return math.fsum(known) / len(known) if known else None
