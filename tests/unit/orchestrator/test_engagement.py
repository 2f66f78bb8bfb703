"""Drafters that are not worth their while are unbound, and tried again in turn."""

from __future__ import annotations

import pytest

from orchestrator.budgets import VerifierPace
from orchestrator.engagement import Engagement, Judgement, Rotation
from outrider.domain import OWN_TEXT_SOURCE, SpeculationCounters, StepReport

STEP_S = 0.022
SOURCES = {1: 11, 2: 12}


def pace() -> VerifierPace:
    found = VerifierPace()
    found.observe(StepReport(STEP_S, 1, 20, plain_s=STEP_S))
    return found


def counters(
    steps: int, first: int, second: int = 0, *, received: int = 99, own_text: int = 0
) -> SpeculationCounters:
    by_source = {11: first, 12: second, OWN_TEXT_SOURCE: own_text}
    return SpeculationCounters(
        verify_steps=steps,
        accepted_draft_tokens=first + second + own_text,
        received_draft_tokens=received,
        accepted_by_source=by_source,
    )


def judged(
    first: int, second: int = 0, *, steps: int = 40, received: int = 99, own_text: int = 0
) -> Judgement | None:
    engagement = Engagement()
    begin = counters(10, 5, 5, received=0)
    assert engagement.look(0.0, begin, SOURCES, pace()) is None
    end = counters(10 + steps, 5 + first, 5 + second, received=received, own_text=own_text)
    return engagement.look(steps * STEP_S, end, SOURCES, pace())


def test_useful_drafters_stay() -> None:
    judgement = judged(40, 40)
    assert judgement is not None
    assert judgement.useless == ()
    assert judgement.gains == {1: 1.0, 2: 1.0}
    assert judgement.speedup == pytest.approx(3.0)


def test_drafters_that_win_nothing_are_useless() -> None:
    judgement = judged(1)
    assert judgement is not None
    assert judgement.useless == (1, 2)


def test_of_two_the_one_that_adds_nothing_is_useless() -> None:
    judgement = judged(80, 2)
    assert judgement is not None
    assert judgement.useless == (2,)


def test_drafters_are_not_kept_for_what_verifiers_guess_themselves() -> None:
    judgement = judged(1, own_text=80)
    assert judgement is not None
    assert judgement.useless == (1, 2)
    assert judgement.speedup > 3.0


def test_what_drafters_add_to_what_verifiers_guess_counts() -> None:
    judgement = judged(20, own_text=80)
    assert judgement is not None
    assert judgement.useless == (2,)


def test_a_few_steps_are_no_judgement() -> None:
    assert judged(0, steps=20) is None


def test_a_silent_drafter_is_given_time_for_the_prompt() -> None:
    assert judged(0, received=0) is None
    late = judged(0, received=0, steps=300)
    assert late is not None
    assert late.useless == (1, 2)


def test_each_window_is_judged_by_itself() -> None:
    engagement = Engagement()
    engagement.look(0.0, counters(0, 0, received=0), SOURCES, pace())
    assert engagement.look(1.0, counters(40, 80), SOURCES, pace()) is not None
    assert engagement.look(1.5, counters(60, 80), SOURCES, pace()) is None
    judgement = engagement.look(2.0, counters(80, 80, received=200), SOURCES, pace())
    assert judgement is not None
    assert judgement.useless == (1, 2)


def test_a_new_attachment_begins_anew() -> None:
    engagement = Engagement()
    engagement.look(0.0, counters(0, 0), {1: 11}, pace())
    assert engagement.look(1.0, counters(40, 0, received=200), SOURCES, pace()) is None


def test_another_verifier_counts_from_zero() -> None:
    engagement = Engagement()
    engagement.look(0.0, counters(500, 100), SOURCES, pace())
    assert engagement.look(1.0, counters(40, 80), SOURCES, pace()) is None
    judgement = engagement.look(2.0, counters(80, 160, received=200), SOURCES, pace())
    assert judgement is not None
    assert judgement.speedup == pytest.approx(3.0)


def off(count: int, since_s: float = 0.0) -> list[tuple[int, Engagement]]:
    return [(number, Engagement(off_since_s=since_s)) for number in range(count)]


def test_sessions_are_tried_in_turn() -> None:
    rotation, sessions = Rotation(), off(3)
    for number, engagement in sessions:
        engagement.off_since_s = -float(number)
    assert rotation.due(1.0, 0.5, sessions) == [2, 1]
    assert sessions[2][1].trial
    assert not sessions[0][1].trial


def test_a_session_rests_before_it_is_tried_again() -> None:
    assert Rotation().due(0.1, 0.5, off(1)) == []
    assert Rotation().due(1.0, 0.5, off(1)) == [0]


def test_a_large_fleet_is_not_tried_all_at_once_but_within_a_while() -> None:
    rotation, sessions = Rotation(), off(1_000)
    tried: set[int] = set()
    for look in range(2, 30):
        now_s = 0.5 * look
        due = rotation.due(now_s, 0.5, sessions)
        assert len(due) <= 60
        tried |= set(due)
        for number in due:
            sessions[number][1].off_since_s = now_s
    assert len(tried) == 1_000


def test_when_one_trial_pays_everybody_is_tried() -> None:
    rotation = Rotation()
    rotation.due(1.0, 0.5, off(100))
    rotation.paid(1.2)
    assert len(rotation.due(1.5, 0.5, off(100))) == 100
    assert len(rotation.due(9.0, 0.5, off(100))) < 20
