"""What the pipelining benchmark consists of, and how long each part of it takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PARTS: Mapping[str, str] = {
    "rtt": "One session at round trips of 0.5 to 50 ms, beside the other ways to speculate.",
    "draft": "The same at 2 ms with draft steps of 4, 6.7 and 8.2 ms, and with one leaf a step.",
    "slowed": "One session with all times five times as long: what this machine's own time costs.",
    "floor": "Drafters of no use, a silent one and a poor one at 50 ms, against target-only.",
    "fleet": "1 to 64 sessions on 4 verifiers and 8 drafters: goodput, and how busy verifiers are.",
    "recover": "Acceptance dropped to 0.05 and raised again, with drafters bound and unbound.",
    "drafters": "A drafter that is ten times slower, one that is 300 ms late: delays of steps.",
    "real": "Real models over the benchmark's prompts, each process on cores of its own.",
    "orchestrator": "Cost of a token and added latency with 10 to 10,000 streams (bench.relay).",
}
"""In the order in which they run; what each one shows."""

_START_S = 6.0
"""A fleet's start and end."""
_OPENING_S = 0.6
"""Of a run: connecting, the first token, and the fleet's forgetting of its sessions."""
_ROUND_TRIP_S = 6.0
"""Finding the delays that make a round trip."""
_CALCULATING_S = 1.25e-3
"""Simulation and planner, for a simulated step of a row."""
_REAL_START_S = 45.0
_REAL_TOKENS_PER_S = (30.0, 60.0)
"""Of the default models on two cores, target only and speculated."""
_STREAMS_START_S = 12.0
_STREAMS_PER_S = 700.0
"""Opened by the part `orchestrator`."""


@dataclass(frozen=True)
class Effort:
    """How much of everything is measured. The speculated runs are the noisy ones.

    A step of one session commits 3.8 tokens, more or less 2.5, so a window of 8 s has a standard
    deviation of 3.7% (simulated), and the median of three of 2.5%. Without guesses all steps are
    alike, and a second and a half say as much; such a run stands before and after each other one.
    """

    repeats: int = 3
    window_s: float = 8.0
    skipped_s: float = 1.5
    """Before a window: budgets and calibration find their level."""
    plain_window_s: float = 1.6
    """Of target-only runs."""
    plain_skipped_s: float = 0.5
    round_trips_ms: tuple[float, ...] = (0.5, 2.0, 5.0, 10.0, 20.0, 50.0)
    draft_steps_ms: tuple[float, ...] = (4.0, 6.7, 8.2)
    fleets: tuple[tuple[float, tuple[int, ...]], ...] = ((5.0, (1, 4)), (15.0, (8, 16, 32, 64)))
    """Of the part with many sessions: (slowed, sessions). All times of a fleet are so much longer,
    since one machine has to run what would be thirteen: the synthetic models of eight busy drafters
    take 3.6 ms of two cores for a draft step, which must be far less than what it stands for."""
    slowed: float = 5.0
    """All times of the part `slowed` are so much longer, its windows as well."""
    slowed_round_trips_ms: tuple[float, ...] = (2.0, 10.0)
    """Of that part, before they are made longer."""
    phase_s: float = 5.0
    """Of constant acceptance, in the part that changes it."""
    simulated_steps: int = 4_000
    prompts: int = 22
    """Of the part with real models."""
    prompt_repeats: int = 2
    prompt_tokens: int = 80
    streams: tuple[int, ...] = (10, 1_000, 10_000)
    """Of the part `orchestrator`."""
    streams_window_s: float = 5.0
    streams_repeats: int = 2
    """Without drafts; with them, once."""

    @property
    def recoveries(self) -> int:
        """Repeats of the part `recover`, where half a second of each has to say something."""
        return self.repeats + (self.repeats > 1)

    @property
    def plain_runs(self) -> int:
        """Target-only runs of a row: two at first, for an A/A comparison, one after each run."""
        return self.repeats + 2

    def fleet_window_s(self, sessions: int, slowed: float) -> float:
        """Window of so many sessions: more of them say as much in less time."""
        return float(self.window_s * max(0.875, 2.5 / sessions**0.5) * fleet_stretch(slowed))


QUICK = Effort(
    repeats=1,
    window_s=2.0,
    skipped_s=1.0,
    plain_window_s=1.0,
    round_trips_ms=(0.5, 20.0),
    draft_steps_ms=(8.2,),
    slowed=2.0,
    slowed_round_trips_ms=(2.0,),
    fleets=((5.0, (1, 16)),),
    phase_s=2.0,
    simulated_steps=500,
    prompts=2,
    prompt_repeats=1,
    prompt_tokens=32,
    streams=(10, 1_000),
    streams_window_s=1.0,
    streams_repeats=1,
)
"""Little of everything, to see that it runs."""


def fleet_stretch(slowed: float) -> float:
    """How much longer the windows of a fleet are that is slowed so much."""
    return max(1.0, slowed / 10.0)


def seconds_of(part: str, effort: Effort) -> float:
    """Estimate how long a part takes on a machine with two cores and nothing else to do."""
    match part:
        case "rtt":
            return 2 * _START_S + len(effort.round_trips_ms) * _row_s(effort)
        case "draft":
            return (len(effort.draft_steps_ms) + 1) * (_START_S + _row_s(effort))
        case "slowed":
            row_s = effort.slowed * _row_s(effort)
            return _START_S + len(effort.slowed_round_trips_ms) * row_s
        case "floor":
            return 2 * (_START_S + _row_s(effort))
        case "fleet":
            rows_s = sum(
                _fleet_row_s(effort, count, slowed)
                for slowed, counts in effort.fleets
                for count in counts
            )
            return len(effort.fleets) * (2 * _START_S + _ROUND_TRIP_S) + rows_s
        case "recover":
            script_s = 6 * effort.phase_s + effort.skipped_s + _OPENING_S
            return _START_S + _ROUND_TRIP_S + effort.recoveries * (script_s + _plain_s(effort))
        case "drafters":
            run_s = effort.skipped_s + effort.window_s + _OPENING_S
            return _START_S + _ROUND_TRIP_S + 3 * effort.repeats * run_s
        case "real":
            plain_s, speculated_s = (effort.prompt_tokens / rate for rate in _REAL_TOKENS_PER_S)
            prompt_s = effort.prompt_repeats * (plain_s + speculated_s) + speculated_s
            return _REAL_START_S + effort.prompts * prompt_s
        case "orchestrator":
            once_s = effort.streams_window_s + _STREAMS_START_S
            all_s = sum(once_s + count / _STREAMS_PER_S for count in effort.streams)
            return (effort.streams_repeats + 1) * all_s
        case _:
            raise ValueError(f"no such part: {part}")


def _plain_s(effort: Effort) -> float:
    return effort.plain_skipped_s + effort.plain_window_s + _OPENING_S


def _row_s(effort: Effort) -> float:
    speculated_s = effort.skipped_s + effort.window_s + _OPENING_S
    runs_s = effort.plain_runs * _plain_s(effort) + effort.repeats * speculated_s
    return _ROUND_TRIP_S + runs_s + effort.simulated_steps * _CALCULATING_S


def _fleet_row_s(effort: Effort, sessions: int, slowed: float) -> float:
    stretch = 2.0 * fleet_stretch(slowed)
    plain_s = _OPENING_S + stretch * (effort.plain_skipped_s + effort.plain_window_s)
    window_s = effort.fleet_window_s(sessions, slowed)
    speculated_s = stretch * effort.skipped_s + window_s + 2 * _OPENING_S
    return (
        effort.plain_runs * plain_s
        + effort.repeats * speculated_s
        + effort.simulated_steps * _CALCULATING_S
    )


class Countdown:
    """How much of a run is left. The caller's clock, in seconds."""

    def __init__(self, parts: Sequence[str], effort: Effort, begin_s: float) -> None:
        self._left = {part: seconds_of(part, effort) for part in parts}
        self._begin_s = self._part_s = begin_s
        self._current: str | None = None

    @property
    def total_s(self) -> float:
        """Of the parts that are not over, from the beginning of each."""
        return sum(self._left.values())

    def begins(self, part: str, now_s: float) -> None:
        """A part begins; the one before is over."""
        if self._current is not None:
            self._left.pop(self._current, None)
        self._current, self._part_s = part, now_s

    def left_s(self, now_s: float) -> float:
        """Return what is left, going by the estimates."""
        spent_s = 0.0
        if self._current is not None:
            spent_s = min(now_s - self._part_s, self._left.get(self._current, 0.0))
        return self.total_s - spent_s

    def says(self, now_s: float) -> str:
        """Return time passed and left, for people."""
        minutes, seconds = divmod(int(now_s - self._begin_s), 60)
        return f"{minutes:02}:{seconds:02}, about {self.left_s(now_s) / 60:.0f} min left"
