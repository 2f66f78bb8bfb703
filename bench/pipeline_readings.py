"""From the times of tokens and steps to the figures of the pipelining benchmark. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.pipeline_results import Recovery
from bench.pipeline_setting import Setting
from bench.streams import Observed
from bench.timelines import busy_share, rate_between, rate_curve, settled_s
from orchestrator.planner.knots import duration_s
from outrider.errors import Unavailable

_TARGET_SHARE = 0.98
_FULL_SHARE = 0.95
_WINDOW_S = 0.5
_STRIDE_S = 0.05
_CHANGES = 4
"""Of acceptance: dropped, raised, dropped, raised."""

Step = tuple[float, float, int]


@dataclass(frozen=True, slots=True)
class Steps:
    """What the steps within a speculated window say."""

    occupancy: float
    """Share of the time that verifiers with sessions were in steps."""
    tau: float
    """Tokens a step and session."""
    stretch: float
    """From one step's begin to the next one's, over the stated duration."""


def rate(seen: Observed) -> float:
    """Tokens a second of all sessions.

    For each session from the first of its deliveries within the window to the last, so that no
    part of a step is counted for a whole one. Raises `Unavailable` if a session had fewer than two.
    """
    total = 0.0
    for deliveries in seen.deliveries:
        inside = [(at, n) for at, n in deliveries if seen.begin_s <= at <= seen.end_s]
        if len(inside) < 2:
            raise Unavailable(
                f"a session had {len(inside)} deliveries within {seen.end_s - seen.begin_s:.1f} s"
            )
        total += rate_between(inside, inside[0][0], inside[-1][0])
    return total


def read_steps(steps: Sequence[Sequence[Step]], seen: Observed, setting: Setting) -> Steps:
    """Read the steps of a window, verifier by verifier. Raises `Unavailable` if there are none."""
    within = [
        [step for step in of_one if seen.begin_s <= step[0] and step[1] <= seen.end_s]
        for of_one in steps
    ]
    counts = sum(map(len, within))
    if not counts:
        raise Unavailable("no verify step within the window")
    used = min(setting.verifiers, setting.sessions)
    busy = sum(busy_share(of_one, seen.begin_s, seen.end_s) for of_one in steps) / used
    tokens = rate_between(seen.merged, seen.begin_s, seen.end_s) * (seen.end_s - seen.begin_s)
    knots = tuple((size, ms / 1_000) for size, ms in setting.step_ms)
    pairs = [pair for of_one in within for pair in itertools.pairwise(of_one)]
    cycles_s = sum(later[0] - earlier[0] for earlier, later in pairs)
    stated_s = sum(duration_s(knots, earlier[2]) for earlier, _ in pairs)
    return Steps(busy, tokens * used / (counts * setting.sessions), cycles_s / stated_s)


def read_recovery(
    runs: Sequence[Observed], target_only: float, window_s: float, unbound: Sequence[int]
) -> Recovery:
    """Put the runs on top of each other, aligned at each change, and read the times back."""
    begins = [run.begin_s for run in runs]
    changes = [
        statistics.fmean(run.marks[at] - begin for run, begin in zip(runs, begins, strict=True))
        for at in range(_CHANGES)
    ]

    def curve_after(change: int | None) -> list[tuple[float, float]]:
        marks = [run.begin_s if change is None else run.marks[change] for run in runs]
        aligned = [
            [(at_s - mark_s, n) for at_s, n in run.merged]
            for run, mark_s in zip(runs, marks, strict=True)
        ]
        here = 0.0 if change is None else changes[change]
        after = 0 if change is None else change + 1
        until_s = (changes[after] if after < len(changes) else window_s) - here
        return rate_curve(aligned, 0.0, until_s - 0.02, _WINDOW_S, _STRIDE_S)

    curves = [curve_after(change) for change in (None, *range(_CHANGES))]
    full = statistics.fmean(rate for _, rate in curves[0])
    starts = [0.0, *changes]
    return Recovery(
        target_only,
        full,
        tuple(changes),
        tuple(
            (start + end_s, rate)
            for start, c in zip(starts, curves, strict=True)
            for end_s, rate in c
        ),
        tuple(settled_s(curves[at], _TARGET_SHARE * target_only) for at in (1, 3)),
        tuple(settled_s(curves[at], _FULL_SHARE * full) for at in (2, 4)),
        unbound=tuple(unbound),
        repeats=len(runs),
    )
