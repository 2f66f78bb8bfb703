"""What useless drafters cost, and how soon one that turns honest is believed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.drafters import Drafter, Honest, Policy, Silent, WrongTrees
from bench.engine_driver import EngineDriver
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
    """Tokens a second at one number of sessions, repeat by repeat."""

    sessions: int
    alone: tuple[float, ...]
    silent: tuple[float, ...]
    wrong: tuple[float, ...]

    @property
    def silent_ratio(self) -> float:
        """With a drafter that fell silent, over target-only; medians."""
        return statistics.median(self.silent) / statistics.median(self.alone)

    @property
    def wrong_ratio(self) -> float:
        """With full wrong trees, over target-only; medians."""
        return statistics.median(self.wrong) / statistics.median(self.alone)

    @property
    def floor(self) -> float:
        """The lesser of the two."""
        return min(self.silent_ratio, self.wrong_ratio)


@dataclass(frozen=True, slots=True)
class RecoveryResult:
    """Seconds from the moment that a useless drafter turned honest; None: not within ten."""

    accepted_s: float | None
    """Until the first draft token was accepted."""
    tau_s: float | None
    """Until eight commits in a row had more than 1.5 tokens on average."""


def measure_useless(
    driver: EngineDriver,
    texts: Texts,
    kv_tokens_max: int,
    window_s: float,
    repeats: int,
    advance: Callable[[str], None],
) -> list[UselessResult]:
    """Run phases without a drafter, with a silent and with a hopeless one in turn."""
    vocabulary_size = driver.engine.model.vocabulary_size
    results = []
    for sessions in SESSIONS:
        prompts = [texts.take(index, PROMPT_TOKENS) for index in range(sessions)]
        tokens = min(2_048, kv_tokens_max // sessions) - PROMPT_TOKENS
        rates: dict[str, list[float]] = {"alone": [], "silent": [], "wrong": []}
        for number in range(repeats):
            kinds = list(rates)
            turn = number % len(kinds)
            for kind in kinds[turn:] + kinds[:turn]:
                advance(f"{sessions} sessions, drafter {kind}")
                policies: dict[str, Policy | None] = {
                    "alone": None,
                    "silent": Silent(vocabulary_size),
                    "wrong": WrongTrees(vocabulary_size),
                }
                rates[kind].append(_phase(driver, policies[kind], prompts, tokens, window_s))
        results.append(
            UselessResult(
                sessions, tuple(rates["alone"]), tuple(rates["silent"]), tuple(rates["wrong"])
            )
        )
    return results


def _phase(
    driver: EngineDriver,
    policy: Policy | None,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    window_s: float,
) -> float:
    """Tokens a second while all sessions decode, after the first second."""
    drafter = Drafter(driver, policy)
    salt = f"useless-{time.perf_counter()}"
    sessions = [driver.open(p, tokens, f"{salt}-{i}") for i, p in enumerate(prompts)]
    traces = [driver.trace(number) for number in sessions]
    driver.wait(lambda: all(trace.commits for trace in traces))
    begin_s = max(trace.commits[0][0] for trace in traces) + SKIPPED_S
    end_s = begin_s + window_s
    driver.wait(lambda: time.perf_counter() > end_s or any(trace.finished for trace in traces))
    drafter.close()
    driver.abort(sessions)
    end_s = min([end_s, *(trace.commits[-1][0] for trace in traces if trace.finished)])
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
