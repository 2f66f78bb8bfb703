"""Speed-ups, tau and intervals, against sums done by hand and known distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from bench.spec.answers import Answer, Turn
from bench.spec.publishing import ours_over, summaries_of
from bench.spec.report import speed_table
from bench.spec.statistics import OVERALL, acceptance_by_depth, by_round, speedup, summarize, tau


def answer(
    question: int,
    contender: str,
    wall_s: float,
    lengths: Sequence[int] = (1, 1, 1, 1),
    *,
    category: str = "qa",
    repeat: int = 0,
    verified: int | None = 0,
    temperature: float = 0.0,
) -> Answer:
    ids = tuple(range(sum(lengths)))
    turn = Turn("", ids, 10, wall_s, wall_s / 4, tuple(lengths), verified)
    name = f"{question}-{repeat}-{temperature}"
    return Answer(question, category, contender, temperature, repeat, name, (turn,), 0.0)


def _rounds(*answers: Answer) -> list[Mapping[str, Answer]]:
    return list(by_round(answers, 0.0))


def test_a_speed_up_is_the_ratio_of_mean_speeds_as_in_spec_bench() -> None:
    rounds = _rounds(
        answer(1, "base", 4.0),  # 1 token/s
        answer(1, "ours", 2.0),  # 2
        answer(2, "base", 1.0),  # 4
        answer(2, "ours", 0.5),  # 8
        answer(3, "base", 2.0, category="rag"),  # 2
        answer(3, "ours", 0.4, category="rag"),  # 10
        answer(4, "base", 1.0),  # has no counterpart
        answer(5, "ours", 1.0, temperature=1.0),  # another temperature
    )
    summary = summarize(rounds, "ours", "base", 0.0)
    assert summary is not None
    assert summary.questions == 3
    assert list(summary.speedups) == ["qa", "rag", OVERALL]
    assert summary.speedups["qa"].value == pytest.approx(2.0)
    assert summary.speedups["rag"].value == pytest.approx(5.0)
    assert summary.speedups["rag"].low is None  # one question says nothing of others
    assert summary.speedups[OVERALL].value == pytest.approx(20 / 7)
    assert summary.tokens_per_s.value == pytest.approx(20 / 3)
    assert summary.first_token_s == pytest.approx(0.125)


def test_time_is_split_at_the_first_token() -> None:
    # A quarter of the wall time goes by before the first token, the rest is three steps.
    summary = summarize(
        _rounds(answer(1, "o", 4.0, (1, 3, 2, 1)), answer(1, "b", 8.0, (1,) * 7)), "o", "b", 0.0
    )
    assert summary is not None
    assert summary.first_shares["qa"] == pytest.approx(0.25)
    assert summary.step_s[OVERALL] == pytest.approx(1.0)


def test_tau_is_over_steps_and_counts_the_targets_own_token() -> None:
    answers = [answer(1, "o", 1.0, (1, 3, 2)), answer(2, "o", 1.0, (1,) * 9)]
    assert tau(answers).value == pytest.approx(15 / 12)
    assert tau([answer(1, "base", 1.0)]).value == 1.0


def test_acceptance_by_depth_is_a_share_of_steps() -> None:
    shares = acceptance_by_depth([answer(1, "o", 1.0, (1, 3, 2, 3))])
    assert shares[:4] == (0.75, 0.5, 0.0, 0.0)


def test_acceptance_is_unknown_where_a_peer_does_not_say() -> None:
    said = summarize(
        _rounds(answer(1, "o", 1.0, (1, 3), verified=4), answer(1, "b", 1.0)), "o", "b", 0.0
    )
    silent = summarize(
        _rounds(answer(1, "o", 1.0, (1, 3), verified=None), answer(1, "b", 1.0)), "o", "b", 0.0
    )
    assert said is not None
    assert said.acceptance == 0.5
    assert silent is not None
    assert silent.acceptance is None


def test_repeats_of_a_question_do_not_narrow_an_interval() -> None:
    once = [a for n in range(4) for a in (answer(n, "b", 1.0), answer(n, "o", 1 / (1 + n)))]
    often = [
        a
        for n in range(4)
        for r in range(9)
        for a in (answer(n, "b", 1.0, repeat=r), answer(n, "o", 1 / (1 + n), repeat=r))
    ]
    found = [summarize(by_round(answers, 0.0), "o", "b", 0.0) for answers in (once, often)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].speedups[OVERALL] == found[1].speedups[OVERALL]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 experiments with 25 questions; a bootstrap of means this small holds 90 to 97 %."""
    chance = random.Random(3)
    truth, inside = 2.0, 0
    for _ in range(400):
        ratios = [truth * math.exp(chance.gauss(-0.045, 0.3)) for _ in range(25)]  # mean 2
        interval = speedup(
            [(answer(n, "o", 1 / ratio), answer(n, "b", 1.0)) for n, ratio in enumerate(ratios)]
        )
        assert interval.low is not None
        assert interval.high is not None
        inside += interval.low <= truth <= interval.high
    assert 0.90 <= inside / 400 <= 0.97


def test_nobody_without_a_counterpart_is_summarized() -> None:
    assert summarize(_rounds(answer(1, "o", 1.0)), "o", "b", 0.0) is None


def test_ours_is_compared_with_others_where_both_have_answered() -> None:
    answers = [
        answer(1, "target-only", 4.0),
        answer(1, "outrider", 2.0),  # 2 tokens/s
        answer(1, "vllm", 4.0),  # 1
        answer(2, "target-only", 4.0),
        answer(2, "outrider", 0.1),  # the peer was not asked
        answer(3, "target-only", 1.0, temperature=1.0),
        answer(3, "outrider", 0.1, temperature=1.0),
    ]
    found = ours_over(answers)
    assert found.keys() == {"target-only", "vllm"}
    assert found["vllm"] == pytest.approx(2.0)
    assert found["target-only"] == pytest.approx(21.0)
    rows = [s for s in summaries_of(answers) if s.temperature == 0.0]
    table = speed_table(rows, intervals=False)
    assert "outrider, 2 questions" in table
    assert "| vllm, 1 question |" in table
    assert "questions" not in speed_table(rows[:1], intervals=False)
