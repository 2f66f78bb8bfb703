"""Timelines of sessions."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.tracing import SessionTrace
from outrider.domain import Commit, CommitReport, GrowReport, SpeculationCounters, StepReport

OFFSET_S = 1_000.0
"""What the workers' clocks are behind."""


def events(trace: SessionTrace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(trace.to_json({}))["traceEvents"]
    return found


def named(trace: SessionTrace, name: str) -> list[dict[str, Any]]:
    return [event for event in events(trace) if event["name"] == name]


def commit(trace: SessionTrace, now_s: float, step: StepReport | None, *sources: int) -> None:
    tokens = tuple(range(len(sources)))
    report = CommitReport(SpeculationCounters(), sources)
    trace.committed(now_s, "v", OFFSET_S, step, Commit(1, 10, tokens), report)


def test_a_step_lies_where_its_clock_says() -> None:
    trace = SessionTrace(1_000.0)
    step = StepReport(0.02, 1, 5, started_s=0.1)
    commit(trace, 1_000.125, step, 3, 0)
    (span,) = named(trace, "verify step")
    assert (span["ts"], span["dur"]) == (100_000, 20_000)
    assert (span["args"]["committed"], span["args"]["guessed"]) == (2, 1)
    (flight,) = named(trace, "commit")
    assert (flight["ts"], flight["dur"]) == (120_000, 5_000)
    (hit,) = named(trace, "hit 1")
    assert hit["args"]["length"] == 12


def test_a_commit_of_the_target_alone_is_a_miss() -> None:
    trace = SessionTrace(0.0)
    commit(trace, 1.0, StepReport(0.02, 1, 1, started_s=0.5), 0)
    assert len(named(trace, "miss")) == 1
    # A repeat has no step of its own.
    commit(trace, 1.1, None, 0)
    assert len(named(trace, "verify step")) == 1


def test_a_draft_step_is_shown_once_whatever_it_sent() -> None:
    trace = SessionTrace(1_000.0)
    step = GrowReport(0.002, 8, 0.5)
    trace.drafted(1_000.503, "d", OFFSET_S, step, 40)
    trace.drafted(1_000.504, "d", OFFSET_S, step, 20)
    assert len(named(trace, "draft step")) == 1
    assert [round(event["dur"]) for event in named(trace, "draft")] == [1_000, 2_000]
    # A lookup drafter has no steps.
    trace.drafted(1_000.6, "lookup", OFFSET_S, None, 20)
    assert len(named(trace, "draft")) == 3


def test_decisions_come_with_their_reasons() -> None:
    trace = SessionTrace(0.0)
    trace.decided(0.5, "drafter unbound", drafter="d", speedup=1.01)
    (event,) = named(trace, "drafter unbound")
    assert event["args"] == {"drafter": "d", "speedup": 1.01}


def test_lanes_have_names() -> None:
    trace = SessionTrace(0.0)
    commit(trace, 1.0, StepReport(0.02, 1, 1, started_s=0.5), 0)
    lanes = {event["pid"]: event["args"]["name"] for event in events(trace) if event["ph"] == "M"}
    (span,) = named(trace, "verify step")
    assert lanes[span["pid"]] == "v"


def test_a_long_trace_is_cut_and_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr("orchestrator.tracing.EVENTS_MAX", 3)
    trace = SessionTrace(0.0)
    for number in range(5):
        trace.decided(number, "something")
    assert len(named(trace, "something")) == 3
    assert json.loads(trace.to_json({}))["otherData"]["cut"] is True
