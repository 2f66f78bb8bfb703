"""What the live page and `outrider top` show of a fleet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.driver import Driver
from orchestrator.fleet import Fleet, WorkerStatus
from outrider.domain import SpeculationCounters


def overview(driver: Driver, fleet: Fleet) -> dict[str, Any]:
    """Return workers and load, as of now; counters are since the orchestrator's start."""
    counters = driver.counters()
    sources = {link.address: link.source for link in fleet.drafters.values()}
    kv_shares = fleet.kv_shares()
    return {
        "workers": [_worker(status, sources, kv_shares, counters) for status in fleet.statuses()],
        "sessions": driver.load,
        "sessions_max": driver.sessions_max,
        "rounds": counters.verify_steps,
        "draft_tokens": counters.verified_draft_tokens,
        "accepted_tokens": counters.accepted_draft_tokens,
        "completion_tokens": driver.meters.completion_tokens,
        "prediction_source": fleet.known_prediction_source,
    }


def _worker(
    status: WorkerStatus,
    sources: Mapping[str, int],
    kv_shares: Mapping[str, float],
    counters: SpeculationCounters,
) -> dict[str, Any]:
    source = sources.get(status.address) if status.role == "drafter" else None
    return {
        "role": status.role,
        "address": status.address,
        "state": status.state,
        "reason": status.reason,
        "model": status.info.model if status.info else None,
        "sessions": status.sessions,
        "sessions_max": status.sessions_max,
        "step_s": status.step_s,
        "kv_tokens_used": status.kv_tokens_used,
        # As the worker told Redis: nothing without.
        "kv_used_ratio": kv_shares.get(status.address),
        "waiting": status.waiting,
        "source": source,
        "draft_tokens": None if source is None else counters.verified_by_source.get(source, 0),
        "accepted_tokens": None if source is None else counters.accepted_by_source.get(source, 0),
    }
