"""What answers add up to: speed-ups, tau, acceptance by depth, with confidence intervals. Pure.

Definitions are those of Spec-Bench's `evaluation/speed.py`: a question's speed is its tokens over
its wall time, a contender's speed the plain mean over questions, a speed-up the ratio of two such
means, tau the mean over all steps of all questions, the target's own token included. One thing
differs: there the baseline's tokens are counted again from decoded text, and the method's are not;
here both sides' ids are counted.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.spec.answers import Answer
from bench.spec.questions import in_order, sub_task_of

OVERALL = "overall"
DEPTHS = 8
_RESAMPLES = 2_000
_SEED = 1
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and where 95% of the bootstrap's resamples fall; None below two questions."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender at one temperature, against the baseline of the same rounds."""

    contender: str
    temperature: float
    questions: int
    speedups: Mapping[str, Interval]
    """By sub-task, and `OVERALL`."""
    taus: Mapping[str, Interval]
    tokens_per_s: Interval
    first_token_s: float
    """Median over turns."""
    by_depth: tuple[float, ...]
    """Share of steps in which at least 1, 2, ... guesses were accepted."""
    acceptance: float | None
    """Accepted over verified guesses; None if the contender does not say."""
    first_shares: Mapping[str, float]
    """By sub-task: what of the wall time went by before first tokens."""
    step_s: Mapping[str, float]
    """By sub-task: mean time of a step after the first, in seconds; 0 if there is none."""


def by_round(answers: Iterable[Answer], temperature: float) -> list[dict[str, Answer]]:
    """Group answers into the rounds in which they were measured, by contender."""
    rounds: defaultdict[str, dict[str, Answer]] = defaultdict(dict)
    for answer in answers:
        if answer.temperature == temperature:
            rounds[answer.round][answer.contender] = answer
    return list(rounds.values())


def summarize(
    rounds: Sequence[Mapping[str, Answer]], contender: str, baseline: str, temperature: float
) -> Summary | None:
    """Compare a contender with the baseline over the rounds that have both; None without any."""
    pairs = [
        (found[contender], found[baseline])
        for found in rounds
        if contender in found and baseline in found
    ]
    if not pairs:
        return None
    tasks: defaultdict[str, list[tuple[Answer, Answer]]] = defaultdict(list)
    for pair in pairs:
        tasks[sub_task_of(pair[0].category)].append(pair)
    parts = {name: tasks[name] for name in in_order(tasks)} | {OVERALL: pairs}
    own = [answer for answer, _ in pairs]
    return Summary(
        contender,
        temperature,
        len({answer.question_id for answer in own}),
        {name: speedup(part) for name, part in parts.items()},
        {name: tau([answer for answer, _ in part]) for name, part in parts.items()},
        _bootstrap(_by_question(own, lambda a: (a.tokens_per_s, 1.0))),
        statistics.median(turn.first_token_s for answer in own for turn in answer.turns),
        acceptance_by_depth(own),
        _acceptance(own),
        {name: _first_share(answer for answer, _ in part) for name, part in parts.items()},
        {name: _step_s(answer for answer, _ in part) for name, part in parts.items()},
    )


def speedup(pairs: Sequence[tuple[Answer, Answer]]) -> Interval:
    """Mean speed of the first over mean speed of the second, resampled by question."""
    own = _by_question([one for one, _ in pairs], lambda a: (a.tokens_per_s, 1.0))
    base = _by_question([other for _, other in pairs], lambda a: (a.tokens_per_s, 1.0))
    return _bootstrap(np.stack([own[:, 0] / own[:, 1], base[:, 0] / base[:, 1]], axis=1))


def tau(answers: Sequence[Answer]) -> Interval:
    """Tokens of a step of the target, over all steps."""
    return _bootstrap(
        _by_question(answers, lambda a: (float(a.tokens), float(len(a.accept_lengths))))
    )


def acceptance_by_depth(answers: Iterable[Answer]) -> tuple[float, ...]:
    """Share of steps that accepted at least 1, 2, ... `DEPTHS` guesses."""
    guesses = np.array([length - 1 for a in answers for length in a.accept_lengths])
    return tuple(float(np.mean(guesses >= depth)) for depth in range(1, DEPTHS + 1))


def _first_share(answers: Iterable[Answer]) -> float:
    turns = [turn for answer in answers for turn in answer.turns]
    return sum(turn.first_token_s for turn in turns) / sum(turn.wall_s for turn in turns)


def _step_s(answers: Iterable[Answer]) -> float:
    turns = [turn for answer in answers for turn in answer.turns]
    steps = sum(len(turn.accept_lengths) - 1 for turn in turns)
    return sum(turn.wall_s - turn.first_token_s for turn in turns) / steps if steps else 0.0


def _acceptance(answers: Iterable[Answer]) -> float | None:
    accepted = verified = 0
    for turn in (turn for answer in answers for turn in answer.turns):
        if turn.verified is None:
            return None
        verified += turn.verified
        accepted += sum(turn.accept_lengths) - len(turn.accept_lengths)
    return accepted / verified if verified else None


def _by_question(
    answers: Iterable[Answer], terms: Callable[[Answer], tuple[float, float]]
) -> _Floats:
    """Sum numerators and denominators of a question's repeats. Shape [questions, 2]."""
    sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for answer in answers:
        numerator, denominator = terms(answer)
        sums[answer.question_id][0] += numerator
        sums[answer.question_id][1] += denominator
    return np.array(list(sums.values()))


def _bootstrap(terms: _Floats) -> Interval:
    """Sum of numerators over sum of denominators; questions are drawn with replacement.

    A question's repeats stay together: they say little about other questions.
    """
    count = len(terms)
    total = terms.sum(axis=0)
    value = float(total[0] / total[1])
    if count < 2:
        return Interval(value)
    drawn = np.random.default_rng(_SEED).integers(count, size=(_RESAMPLES, count))
    sums = terms[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    return Interval(value, float(low), float(high))
