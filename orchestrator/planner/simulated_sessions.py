"""All sessions of a simulated fleet, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.fleet_scenario import FleetScenario
from orchestrator.planner.speed_table import Floats, SpeedTable

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a tick brought."""

    tokens: float
    plain_tokens: float
    """What the same sessions would have decoded without guesses."""
    verifiers_busy: int
    drafters_busy: float
    """Sum of the drafters' occupancies."""
    finished: Sequence[int]
    """Sessions that have all their tokens; they are still there."""
    times_per_token_s: Floats
    """Of those of them that have at least two tokens."""


class SimulatedSessions:
    """Sessions by number; a number is used again once its session was removed."""

    def __init__(self, scenario: FleetScenario, table: SpeedTable) -> None:
        self._scenario = scenario
        self._table = table
        size = scenario.verifiers * scenario.verifier_sessions_max
        bindings = max(1, scenario.drafters_per_session)
        self._free = list(range(size - 1, -1, -1))
        self._alive = np.zeros(size, dtype=np.bool_)
        self._verifier: Ints = np.zeros(size, dtype=np.int64)
        self._drafters: Ints = np.full((size, bindings), -1, dtype=np.int64)
        self._prompt = np.zeros(size)
        self._output = np.zeros(size)
        self._left = np.zeros(size)
        self._decodes_from_s = np.zeros(size)
        """When its prompt, and what it had decoded before it moved, is computed."""
        self._drafted_from_s = np.zeros(size)
        """When its drafters' guesses come."""
        self._first_token_s = np.zeros(size)

    def __len__(self) -> int:
        return len(self._alive) - len(self._free)

    def add(
        self, now_s: float, verifier: int, drafters: Sequence[int], prompt: int, output: int
    ) -> int:
        """Begin a session; there must be room."""
        session = self._free.pop()
        self._alive[session] = True
        self._verifier[session] = verifier
        self._drafters[session] = -1
        self._drafters[session, : len(drafters)] = drafters
        self._prompt[session] = prompt
        self._output[session] = self._left[session] = output
        ready_s = now_s + prompt / self._scenario.prefill_tokens_per_s
        self._decodes_from_s[session] = self._first_token_s[session] = ready_s
        self._drafted_from_s[session] = 0.0
        return session

    def remove(self, session: int) -> None:
        """End a session."""
        self._alive[session] = False
        self._free.append(session)

    def on_verifier(self, verifier: int) -> list[int]:
        """Sessions of a verifier."""
        found = np.flatnonzero(self._alive & (self._verifier == verifier))
        return [int(session) for session in found]

    def on_drafter(self, drafter: int) -> list[tuple[int, int]]:
        """Sessions of a drafter, with the place that it has among their drafters."""
        found = np.argwhere(self._alive[:, None] & (self._drafters == drafter))
        return [(int(session), int(slot)) for session, slot in found]

    def verifier_of(self, session: int) -> int:
        """Who verifies a session."""
        return int(self._verifier[session])

    def drafters_of(self, session: int) -> list[int]:
        """Who drafts for a session."""
        return [int(drafter) for drafter in self._drafters[session] if drafter >= 0]

    def move(self, session: int, verifier: int, now_s: float) -> None:
        """Go on at another verifier, which prefills what is committed."""
        committed = self._prompt[session] + self._output[session] - self._left[session]
        prefill_s = committed / self._scenario.prefill_tokens_per_s
        self._verifier[session] = verifier
        self._decodes_from_s[session] = now_s + self._scenario.detection_s + prefill_s

    def rebind(self, session: int, slot: int, drafter: int | None, now_s: float) -> None:
        """Replace a drafter that died, or go on without."""
        self._drafters[session, slot] = -1 if drafter is None else drafter
        self._drafted_from_s[session] = now_s + self._scenario.detection_s

    def decode(self, now_s: float, tick_s: float) -> Progress:
        """Let all sessions decode for a tick."""
        active = np.flatnonzero(self._alive & (self._decodes_from_s < now_s + tick_s))
        verifier = self._verifier[active]
        on_verifier = np.bincount(verifier, minlength=self._scenario.verifiers)
        rows = on_verifier[verifier].astype(np.float64)
        plain = self._table.row_rates[on_verifier[verifier]]
        speedup, drafters_busy = self._speedups(active, rows, now_s)
        rate = plain * speedup
        # Those whose prompt ends within the tick decode for the rest of it.
        span_s = np.minimum(tick_s, now_s + tick_s - self._decodes_from_s[active])
        left = self._left[active]
        decoded = np.minimum(left, rate * span_s)
        self._left[active] = left - decoded
        done = rate * span_s >= left
        finished = active[done]
        end_s = now_s + tick_s - span_s[done] + left[done] / rate[done]
        several = self._output[finished] > 1
        times = (end_s - self._first_token_s[finished])[several] / self._output[finished][several]
        return Progress(
            tokens=float(decoded.sum()),
            plain_tokens=float((decoded / speedup).sum()),
            verifiers_busy=int(np.count_nonzero(on_verifier)),
            drafters_busy=drafters_busy,
            finished=[int(session) for session in finished],
            times_per_token_s=times,
        )

    def _speedups(self, active: Ints, rows: Floats, now_s: float) -> tuple[Floats, float]:
        """Of each active session, and the sum of the drafters' occupancies."""
        speedup = np.ones(len(active))
        drafters = self._drafters[active]
        drafters[self._drafted_from_s[active] > now_s] = -1
        bound = drafters >= 0
        if not bound.any():
            return speedup, 0.0
        on_drafter = np.bincount(drafters[bound], minlength=self._scenario.drafters)
        # Drafters of one kind guess the same: what counts is the one with the most time.
        loads = np.where(bound, on_drafter[drafters], np.iinfo(np.int64).max)
        guessed = bound.any(axis=1)
        load = loads.min(axis=1)[guessed].astype(np.float64)
        speedup[guessed], _ = self._table.look_up(rows[guessed], load)
        row, slot = np.nonzero(bound)
        own = loads[row, slot].astype(np.float64)
        _, occupancy = self._table.look_up(rows[row], own)
        return speedup, float((occupancy / own).sum())
