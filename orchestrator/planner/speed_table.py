"""How fast a session decodes, by the company that it has: precomputed by the tree simulation.

Simulating every verify step of a thousand verifiers is out of reach; a fleet simulation looks up
what a step-by-step simulation says about small fleets with the same ratios.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.knots import duration_s
from orchestrator.planner.tree_simulation import TreeScenario, simulate

Floats = NDArray[np.float64]

GRID = (1, 4, 16, 64)
"""Sessions on a verifier, and on a drafter, for which is simulated; in between by logarithms."""
SESSION_STEPS = 400
"""Verify steps times sessions that are simulated for a cell."""
_STEPS_MIN = 12


@dataclass(frozen=True, slots=True)
class SpeedTable:
    """What sessions do that share a verifier with some and a drafter with others."""

    speedups: Floats
    """[sessions on the verifier, sessions on the drafter] over `GRID`: over target-only."""
    drafter_occupancies: Floats
    """Likewise: the share of the time that the drafter computes."""
    row_rates: Floats
    """[sessions on the verifier]: tokens/s of each without guesses; the first is not used."""

    def look_up(self, rows: Floats, drafter_sessions: Floats) -> tuple[Floats, Floats]:
        """Speed-up and drafter's occupancy for each session; arrays of one shape, values >= 1."""
        return (
            _bilinear(self.speedups, rows, drafter_sessions),
            _bilinear(self.drafter_occupancies, rows, drafter_sessions),
        )

    def tokens_per_s(self, rows: float, drafter_sessions: float) -> float:
        """Of one session."""
        speedup, _ = self.look_up(np.array([rows]), np.array([drafter_sessions]))
        plain = np.interp(rows, np.arange(len(self.row_rates)), self.row_rates)
        return float(speedup[0] * plain)


def build_speed_table(
    scenario: TreeScenario,
    rows_max: int,
    advance: Callable[[], None] = lambda: None,
    *,
    session_steps: int = SESSION_STEPS,
) -> SpeedTable:
    """Simulate the grid for a scenario's figures; `advance` is called once for each of its cells.

    Numbers of sessions, verifiers and drafters of the scenario do not count.
    """
    size = len(GRID)
    speedups, occupancies = np.ones((size, size)), np.zeros((size, size))
    for (at_row, rows), (at_load, load) in itertools.product(enumerate(GRID), repeat=2):
        sessions = max(rows, load)
        result = simulate(
            replace(
                scenario,
                sessions=sessions,
                verifiers=sessions // rows,
                drafters=sessions // load,
                drafters_per_session=1,
                silent_drafters=0,
                steps=max(_STEPS_MIN, session_steps // sessions),
                warmup_steps=min(20, max(4, 80 // sessions)),
                duration_s=None,
            )
        )
        speedups[at_row, at_load] = result.speedup
        occupancies[at_row, at_load] = result.drafter_occupancy
        advance()
    counts = range(1, rows_max + 1)
    rates = [math.nan, *(1.0 / duration_s(scenario.step, rows) for rows in counts)]
    rates[0] = rates[1]
    return SpeedTable(speedups, occupancies, np.array(rates))


def _bilinear(table: Floats, rows: Floats, loads: Floats) -> Floats:
    row, row_share = _place(rows)
    load, load_share = _place(loads)
    low = table[row, load] * (1 - load_share) + table[row, load + 1] * load_share
    high = table[row + 1, load] * (1 - load_share) + table[row + 1, load + 1] * load_share
    mixed: Floats = low * (1 - row_share) + high * row_share
    return mixed


def _place(values: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Cell and share within it, on a logarithmic scale; beyond the grid as at its edge."""
    logs = np.log(np.clip(values, GRID[0], GRID[-1]))
    marks = np.log(np.array(GRID, dtype=np.float64))
    cell = np.clip(np.searchsorted(marks, logs, side="right") - 1, 0, len(GRID) - 2)
    share: Floats = (logs - marks[cell]) / (marks[cell + 1] - marks[cell])
    return cell, share
