"""What useless drafters cost, and how soon one that turns honest is believed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.drafters import Drafter, Honest, Policy, Silent, WrongTrees
from bench.engine_driver import EngineDriver, EngineError, Trace
from bench.rates import step_rate, tau_reached
from bench.texts import Texts

SESSIONS = (1, 4, 16, 64)
PROMPT_TOKENS = 48
SKIPPED_S = 1.0
"""At the start of each phase: a drafter's first claims are believed."""

_TAU = 1.5
_TAU_COMMITS = 8
_RECOVERY_MAX_S = 10.0
_KNOWN_TOKENS = 1_200


@dataclass(frozen=True, slots=True)
class UselessResult:
    """Tokens a second at one number of sessions, round by round.

    The kinds of a round follow each other on the same sessions.
    """

    sessions: int
    alone: tuple[float, ...]
    again: tuple[float, ...]
    """Without a drafter once more: how far its ratio is from 1 is noise."""
    silent: tuple[float, ...]
    wrong: tuple[float, ...]

    def ratio(self, kind: str) -> float:
        """Of one kind over target-only; median of the rounds."""
        rates: tuple[float, ...] = getattr(self, kind)
        return statistics.median(
            rate / alone for rate, alone in zip(rates, self.alone, strict=True)
        )

    @property
    def floor(self) -> float:
        """The lesser of the ratios of the two useless drafters."""
        return min(self.ratio("silent"), self.ratio("wrong"))


@dataclass(frozen=True, slots=True)
class RecoveryResult:
    """Seconds from the moment that a useless drafter turned honest; None: not within ten."""

    accepted_s: float | None
    """Until the first draft token was accepted."""
    tau_s: float | None
    """Until eight commits in a row had more than 1.5 tokens on average."""


KINDS = ("alone", "silent", "again", "wrong")


def measure_useless(
    driver: EngineDriver,
    texts: Texts,
    kv_tokens_max: int,
    window_s: float,
    rounds: int,
    advance: Callable[[str], None],
) -> list[UselessResult]:
    """Compare no drafter, a silent one and a hopeless one on the same sessions, in turn."""
    policies: dict[str, Callable[[], Policy | None]] = {
        "alone": lambda: None,
        "again": lambda: None,
        "silent": lambda: Silent(driver.engine.model.vocabulary_size),
        "wrong": lambda: WrongTrees(driver.engine.model.vocabulary_size),
    }
    results = []
    for sessions in SESSIONS:
        prompts = [texts.take(index, PROMPT_TOKENS) for index in range(sessions)]
        tokens = min(2_048, kv_tokens_max // sessions) - PROMPT_TOKENS
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            # Rotated, so that growing contexts favour nobody.
            turn = number % len(KINDS)
            with _decoding(driver, prompts, tokens) as (drafter, traces):
                for kind in KINDS[turn:] + KINDS[:turn]:
                    advance(f"{sessions} sessions, drafter {kind}")
                    drafter.policy = policies[kind]()
                    rates[kind].append(_rate(driver, traces, window_s))
        results.append(
            UselessResult(sessions, **{kind: tuple(rate) for kind, rate in rates.items()})
        )
    return results


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


def _rate(driver: EngineDriver, traces: Sequence[Trace], window_s: float) -> float:
    """Tokens a second from a second hence on; raises EngineError if a session ends meanwhile."""
    begin_s = time.perf_counter() + SKIPPED_S
    end_s = begin_s + window_s
    driver.wait(lambda: time.perf_counter() > end_s or any(trace.finished for trace in traces))
    if any(trace.finished for trace in traces):
        raise EngineError("a session ended within the window: choose a shorter one")
    return step_rate(driver.steps, begin_s, end_s)


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
