"""What useless drafters cost, and how soon one that turns honest is believed."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.drafters import Drafter, Honest, Policy, Silent, Unheard, WrongTrees
from bench.engine_driver import EngineDriver, EngineError, Trace
from bench.rates import tau_reached
from bench.texts import Texts

SESSIONS = (1, 4, 16, 64)
PROMPT_TOKENS = 48
SKIPPED_S = 1.0
"""Wrong trees at the start of each round: a drafter's first claims are believed."""

_SLICE_S = 0.5
_SLICE_STEPS = 4
_SETTLING_STEPS = 2
"""After a change of kind: what was in flight belongs to the kind before."""

_TAU = 1.5
_TAU_COMMITS = 8
_RECOVERY_MAX_S = 10.0
_KNOWN_TOKENS = 1_200


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, and the interval that holds the true one with 95%.

    Below six values there is none so wide: then it is all that they span.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of independent values; the interval from order statistics: of any distribution."""
        ordered = sorted(values)
        count = len(ordered)
        reach = 0.98 * math.sqrt(count)
        low = max(0, math.floor(count / 2 - reach) - 1)
        high = min(count - 1, math.ceil(count / 2 + reach))
        return cls(statistics.median(ordered), ordered[low], ordered[high])


@dataclass(frozen=True, slots=True)
class UselessResult:
    """Tokens a second at one number of sessions, turn by turn.

    The kinds of a turn follow each other on the same sessions, in slices so short that a machine
    whose speed drifts is about as fast for one kind as for the next.
    """

    sessions: int
    alone: tuple[float, ...]
    again: tuple[float, ...]
    """Without a drafter once more: what the two differ by is noise."""
    silent: tuple[float, ...]
    wrong: tuple[float, ...]

    def ratio(self, kind: str) -> Estimate:
        """Of a useless drafter over target-only, mean of both slices of a turn."""
        rates: tuple[float, ...] = getattr(self, kind)
        return Estimate.of(
            [
                2 * rate / (alone + again)
                for rate, alone, again in zip(rates, self.alone, self.again, strict=True)
            ]
        )

    @property
    def noise(self) -> Estimate:
        """Of the second slice without a drafter over the first."""
        return Estimate.of([b / a for a, b in zip(self.alone, self.again, strict=True)])

    @property
    def floor(self) -> float:
        """The lesser of the ratios of the two useless drafters."""
        return min(self.ratio("silent").median, self.ratio("wrong").median)


@dataclass(frozen=True, slots=True)
class RecoveryResult:
    """Seconds from the moment that a useless drafter turned honest; None: not within ten."""

    accepted_s: float | None
    """Until the first draft token was accepted."""
    tau_s: float | None
    """Until eight commits in a row had more than 1.5 tokens on average."""


KINDS = ("alone", "silent", "again", "wrong")
_ORDERS = tuple(
    tuple(KINDS[index] for index in order)
    for order in ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))
)
"""Of the turns, so that each kind is as often at each place, and after each other kind (Williams,
1949): contexts grow within a turn, which slows what comes last."""


def measure_useless(
    driver: EngineDriver,
    texts: Texts,
    counts: Sequence[int],
    kv_tokens_max: int,
    window_s: float,
    rounds: int,
    advance: Callable[[str], None],
) -> list[UselessResult]:
    """Compare no drafter, a silent one and a hopeless one on the same sessions, in turn.

    Once for each of `counts`, how many sessions there are at a time.
    """
    wrong = WrongTrees(driver.engine.model.vocabulary_size)
    silent = Silent(driver.engine.model.vocabulary_size)
    unheard = Unheard(wrong)
    policies: dict[str, Callable[[], Policy | None]] = {
        "alone": lambda: unheard,
        "again": lambda: unheard,
        "silent": lambda: silent,
        "wrong": lambda: wrong,
    }
    results = []
    for sessions in counts:
        prompts = [texts.take(index, PROMPT_TOKENS) for index in range(sessions)]
        tokens = min(2_048, kv_tokens_max // sessions) - PROMPT_TOKENS
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            advance(f"{sessions} sessions, round {number + 1}")
            with _decoding(driver, prompts, tokens) as (drafter, traces):
                drafter.policy = policies["wrong"]()
                _pause(driver, traces, SKIPPED_S)
                for kind, turns in _take_turns(driver, drafter, traces, policies, window_s).items():
                    rates[kind] += turns
        results.append(
            UselessResult(sessions, **{kind: tuple(rate) for kind, rate in rates.items()})
        )
    return results


def _take_turns(
    driver: EngineDriver,
    drafter: Drafter,
    traces: Sequence[Trace],
    policies: Mapping[str, Callable[[], Policy | None]],
    window_s: float,
) -> dict[str, list[float]]:
    """Tokens a second of each kind, turn by turn, until all have run for `window_s` or more."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    spent_s = dict.fromkeys(KINDS, 0.0)
    orders = itertools.cycle(_ORDERS)
    while min(spent_s.values()) < window_s:
        for kind in next(orders):
            drafter.policy = policies[kind]()
            slice_tokens, slice_s = _slice(driver, traces)
            rates[kind].append(slice_tokens / slice_s)
            spent_s[kind] += slice_s
    return rates


def _slice(driver: EngineDriver, traces: Sequence[Trace]) -> tuple[int, float]:
    """Tokens and seconds of a few whole steps from some steps hence on."""
    first = len(driver.steps) + _SETTLING_STEPS
    _wait(driver, traces, lambda: len(driver.steps) > first + _SLICE_STEPS)
    _pause(driver, traces, driver.steps[first][0] + _SLICE_S - time.perf_counter())
    steps = driver.steps[first:]
    return sum(count for _, count in steps[1:]), steps[-1][0] - steps[0][0]


def _pause(driver: EngineDriver, traces: Sequence[Trace], pause_s: float) -> None:
    end_s = time.perf_counter() + pause_s
    _wait(driver, traces, lambda: time.perf_counter() >= end_s)


def _wait(driver: EngineDriver, traces: Sequence[Trace], done: Callable[[], bool]) -> None:
    """Wait until `done`; raises EngineError if a session ends meanwhile."""
    driver.wait(lambda: done() or any(trace.finished for trace in traces))
    if any(trace.finished for trace in traces):
        raise EngineError("a session ended within the window: choose a shorter one")


@contextmanager
def _decoding(
    driver: EngineDriver, prompts: Sequence[Sequence[int]], tokens: int
) -> Iterator[tuple[Drafter, list[Trace]]]:
    """Sessions that all decode, and a drafter of theirs that says nothing yet."""
    drafter = Drafter(driver, None)
    salt = f"useless-{time.perf_counter()}"
    sessions = [driver.open(p, tokens, f"{salt}-{i}") for i, p in enumerate(prompts)]
    traces = [driver.trace(number) for number in sessions]
    try:
        driver.wait(lambda: all(trace.commits for trace in traces))
        yield drafter, traces
    finally:
        drafter.close()
        driver.abort(sessions)


def measure_recovery(
    driver: EngineDriver, texts: Texts, wrong_s: float, attempts: int
) -> RecoveryResult | None:
    """Let a drafter of one session send wrong trees for a while, then the true continuation.

    The continuation is that of a run without drafters. Where the precision makes the two differ
    before the drafter is believed, another text is tried; None if all of them failed so.
    """
    for attempt in range(attempts):
        result = _turn_honest(driver, texts.counting(100 * (attempt + 1)), wrong_s, attempt)
        if result is not None:
            return result
    return None


def _turn_honest(
    driver: EngineDriver, prompt: Sequence[int], wrong_s: float, attempt: int
) -> RecoveryResult | None:
    known = driver.generate([prompt], _KNOWN_TOKENS, f"known-{attempt}")
    honest = Honest((*prompt, *known.ids[0]))
    drafter = Drafter(driver, WrongTrees(driver.engine.model.vocabulary_size))
    session = driver.open(prompt, _KNOWN_TOKENS, f"recovery-{attempt}")
    trace = driver.trace(session)
    driver.wait(lambda: bool(trace.commits))
    turn_s = trace.commits[0][0] + wrong_s
    driver.wait(lambda: time.perf_counter() > turn_s or trace.finished)
    turned_s, accepted_before = time.perf_counter(), trace.accepted
    drafter.policy = honest
    result = _believed(driver, session, turned_s, accepted_before, honest)
    drafter.close()
    driver.abort([session])
    return result


def _believed(
    driver: EngineDriver, session: int, turned_s: float, accepted_before: int, honest: Honest
) -> RecoveryResult | None:
    trace = driver.trace(session)
    accepted_s: float | None = None
    tau_s: float | None = None

    def done() -> bool:
        nonlocal accepted_s, tau_s
        now = trace.commits[-1][0]
        if accepted_s is None and trace.accepted > accepted_before:
            accepted_s = now - turned_s
        since = [commit for commit in trace.commits if commit[0] > turned_s]
        reached = tau_reached(since, _TAU, _TAU_COMMITS)
        tau_s = None if reached is None else reached - turned_s
        late = time.perf_counter() > turned_s + _RECOVERY_MAX_S
        return tau_s is not None or honest.diverged or trace.finished or late

    driver.wait(done)
    if tau_s is None and (honest.diverged or trace.finished):
        return None
    return RecoveryResult(accepted_s, tau_s)
