"""A session's timeline, if its request asks for one: who did what when, as a Chrome trace. Pure.

Times are seconds on the orchestrator's monotonic clock; those of workers have been moved there
by what pings showed of their clocks. The format is the trace event format that chrome://tracing
and ui.perfetto.dev read: microseconds, complete events ("X") and instants ("i").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.messages import Report
from outrider.domain import TARGET_SOURCE, Commit, GrowReport, StepReport

EVENTS_MAX = 100_000
"""A trace that long is cut: it is held in memory until the session ends."""

_NETWORK = "network"
_SESSION = "session"


@dataclass(slots=True)
class SessionTrace:
    """Events of one session, in the order in which the orchestrator heard of them."""

    began_s: float
    _events: list[dict[str, Any]] = field(default_factory=list)
    _lanes: dict[str, int] = field(default_factory=dict)
    _steps: dict[str, float] = field(default_factory=dict)
    """Start of the last draft step that is in the trace, by drafter."""
    cut: bool = False

    def committed(
        self,
        now_s: float,
        verifier: str,
        clock_offset_s: float,
        step: StepReport | None,
        commit: Commit,
        report: Report,
    ) -> None:
        """A commit arrived, with the step that decided it."""
        guessed = sum(source != TARGET_SOURCE for source in report.sources)
        if step is not None:
            start_s = step.started_s + clock_offset_s
            end_s = start_s + step.duration_s
            self._span(
                verifier,
                "verify step",
                start_s,
                step.duration_s,
                {
                    "rows": step.rows,
                    "tokens": step.tokens,
                    "plain_ms": 1e3 * step.plain_s,
                    "pays_from": step.pay_min,
                    "committed": len(commit.tokens),
                    "guessed": guessed,
                },
            )
            self._span(_NETWORK, "commit", end_s, max(0.0, now_s - end_s), {})
        name = f"hit {guessed}" if guessed else "miss"
        if commit.tokens:
            length = commit.base_length + len(commit.tokens)
            self._instant(_SESSION, name, now_s, {"length": length, "sources": report.sources})

    def drafted(
        self,
        now_s: float,
        drafter: str,
        clock_offset_s: float,
        step: GrowReport | None,
        draft_bytes: int,
    ) -> None:
        """A draft arrived, with the drafter's last step; it is passed on at once."""
        sent_s = now_s
        if step is not None:
            start_s = step.started_s + clock_offset_s
            sent_s = min(now_s, start_s + step.duration_s)
            if self._steps.get(drafter) != step.started_s:
                self._steps[drafter] = step.started_s
                self._span(drafter, "draft step", start_s, step.duration_s, {})
        self._span(_NETWORK, "draft", sent_s, now_s - sent_s, {"bytes": draft_bytes})

    def decided(self, now_s: float, what: str, **why: Any) -> None:
        """Something was decided for the session, such as that a drafter is unbound."""
        self._instant(_SESSION, what, now_s, why)

    def _span(
        self, lane: str, name: str, start_s: float, duration_s: float, args: dict[str, Any]
    ) -> None:
        self._add(lane, name, "X", start_s, args, dur=round(1e6 * duration_s, 1))

    def _instant(self, lane: str, name: str, at_s: float, args: dict[str, Any]) -> None:
        self._add(lane, name, "i", at_s, args, s="p")

    def _add(
        self, lane: str, name: str, phase: str, at_s: float, args: dict[str, Any], **more: Any
    ) -> None:
        if len(self._events) >= EVENTS_MAX:
            self.cut = True
            return
        number = self._lanes.setdefault(lane, len(self._lanes) + 1)
        at_us = round(1e6 * (at_s - self.began_s), 1)
        event = {"name": name, "ph": phase, "ts": at_us, "pid": number, "tid": 1, "args": args}
        self._events.append(event | more)

    def to_json(self, proposers: Mapping[int, str]) -> bytes:
        """Return the trace as a JSON object in UTF-8; `proposers` names the sources in it."""
        names = [
            {"name": "process_name", "ph": "M", "pid": number, "tid": 1, "args": {"name": lane}}
            for lane, number in self._lanes.items()
        ]
        trace = {
            "displayTimeUnit": "ms",
            "traceEvents": names + self._events,
            "otherData": {"cut": self.cut, "sources": {**proposers}},
        }
        return json.dumps(trace, separators=(",", ":")).encode()
