"""A session's timeline, read from a trace that `outrider generate --trace` has written."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.errors import InvalidRequest

NETWORK = "network"
"""The lane of what is on its way between workers."""


@dataclass(frozen=True, slots=True)
class Span:
    """One bar: seconds from the session's beginning."""

    lane: str
    name: str
    start_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class Mark:
    """One instant, such as a hit, a miss, or a decision."""

    name: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a trace holds."""

    spans: tuple[Span, ...]
    marks: tuple[Mark, ...]


def read_trace(path: Path) -> Timeline:
    """Read a trace. Raises `InvalidRequest` for a file that is none."""
    try:
        trace: Any = json.loads(path.read_bytes())
        events = trace["traceEvents"]
        lanes = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
        spans = tuple(
            Span(lanes[e["pid"]], e["name"], 1e-6 * e["ts"], 1e-6 * e["dur"])
            for e in events
            if e["ph"] == "X"
        )
        marks = tuple(Mark(e["name"], 1e-6 * e["ts"]) for e in events if e["ph"] == "i")
    except OSError as error:
        raise InvalidRequest("trace", f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("trace", f"{path} is no trace of a session") from error
    return Timeline(spans, marks)


@dataclass(frozen=True, slots=True)
class Lane:
    """Spans of one kind in one lane."""

    name: str
    what: str
    count: int
    median_s: float
    busy: float | None
    """Share of the timeline that they cover; None for messages, of which many are on their way."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A timeline in figures."""

    length_s: float
    hits: int
    misses: int
    guessed: int
    """Tokens committed that were guessed."""
    decisions: Mapping[str, int]
    """What was decided for the session, and how often."""
    lanes: tuple[Lane, ...]


def summarize(timeline: Timeline) -> Summary:
    """Count and measure what a timeline holds. Raises `InvalidRequest` if that is nothing."""
    spans, marks = timeline.spans, timeline.marks
    ends_s = [span.start_s + span.duration_s for span in spans] + [mark.at_s for mark in marks]
    if not ends_s:
        raise InvalidRequest("trace", "holds no events")
    length_s = max(ends_s)
    names = Counter(mark.name for mark in marks)
    hits = {name: int(name.removeprefix("hit ")) for name in names if name.startswith("hit ")}
    kinds = sorted({(span.lane == NETWORK, span.lane, span.name) for span in spans})
    return Summary(
        length_s,
        sum(names[name] for name in hits),
        names["miss"],
        sum(names[name] * tokens for name, tokens in hits.items()),
        {name: count for name, count in names.items() if name not in hits and name != "miss"},
        tuple(
            _lane(
                lane,
                what,
                [s.duration_s for s in spans if (s.lane, s.name) == (lane, what)],
                length_s,
            )
            for _, lane, what in kinds
        ),
    )


def _lane(name: str, what: str, durations_s: list[float], length_s: float) -> Lane:
    busy = None if name == NETWORK or not length_s else min(1.0, sum(durations_s) / length_s)
    return Lane(name, what, len(durations_s), statistics.median(durations_s), busy)
