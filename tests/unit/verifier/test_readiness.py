"""When a step waits for drafts, and when it does not."""

from __future__ import annotations

import pytest

from verifier_service.readiness import Hold, Readiness

STEP_S = 0.022
DELAY_S = 0.004
SOURCES = "a drafter"


def experienced(
    *, delay_s: float = DELAY_S, gain: float = 1.0, steps: int = 16
) -> tuple[Readiness, float]:
    """What a verifier knows after steps of one session that did not wait, and the time then."""
    readiness, now_s = Readiness(), 100.0
    for _ in range(steps):
        readiness.ready()
        readiness.learn(1, SOURCES, 1.0, delay_s, gain)
        now_s += STEP_S
        readiness.committed(1, 1, STEP_S)
    return readiness, now_s


def hold(readiness: Readiness, now_s: float, *, scale: float = 1.0) -> Hold | None:
    readiness.ready()
    readiness.stand_for(scale)
    readiness.watch(1, SOURCES, now_s)
    return readiness.hold(now_s)


def test_nothing_is_waited_for_that_was_never_seen() -> None:
    readiness = Readiness()
    assert hold(readiness, 0.0) is None
    readiness.committed(1, 1, STEP_S)
    assert hold(readiness, 1.0) is None


def test_a_draft_that_wins_more_than_it_costs_is_waited_for() -> None:
    readiness, now_s = experienced()
    held = hold(readiness, now_s)
    assert held is not None
    assert held.sessions == (1,)
    assert now_s + DELAY_S < held.until_s < now_s + 3 * DELAY_S
    # One token more, less what 4 ms at one token each 22 ms would have brought.
    assert held.gain == pytest.approx(1.0 - DELAY_S / STEP_S, abs=0.01)


@pytest.mark.parametrize(("delay_s", "gain"), [(1.1 * STEP_S, 1.0), (DELAY_S, 0.1), (0.3, 3.0)])
def test_a_draft_that_costs_more_than_it_wins_is_not(delay_s: float, gain: float) -> None:
    readiness, now_s = experienced(delay_s=delay_s, gain=gain)
    assert hold(readiness, now_s) is None


def test_what_the_step_after_is_worse_for_counts() -> None:
    readiness, now_s = experienced()
    for _ in range(100):
        readiness.followed(3, held=False)
        readiness.followed(2, held=True)
    assert hold(readiness, now_s) is None
    for _ in range(200):
        readiness.followed(3, held=True)
    assert hold(readiness, now_s) is not None


def test_all_rows_pay_for_the_waiting_of_one() -> None:
    readiness, now_s = experienced()
    # Fifteen others commit one token each in the same steps.
    for _ in range(200):
        readiness.committed(16, 16, STEP_S)
    assert hold(readiness, now_s) is None


def test_those_watched_stand_for_all() -> None:
    readiness, now_s = experienced()
    for _ in range(200):
        readiness.committed(16, 16, STEP_S)
    assert hold(readiness, now_s, scale=16.0) is not None


def test_the_step_begins_when_the_draft_is_there() -> None:
    readiness, now_s = experienced()
    assert hold(readiness, now_s) is not None
    readiness.arrived(1, 2.0, now_s + DELAY_S)
    assert readiness.hold(now_s + DELAY_S) is None


def test_drafts_that_add_nothing_do_not_prolong_the_waiting() -> None:
    readiness, now_s = experienced()
    held = hold(readiness, now_s)
    assert held is not None
    for _ in range(9):
        readiness.arrived(1, 1.0, now_s + 0.9 * (held.until_s - now_s))
    again = readiness.hold(now_s + 0.9 * (held.until_s - now_s))
    assert again is None or again.until_s <= held.until_s + 0.001
    assert readiness.hold(held.until_s + 0.001) is None


def test_waiting_goes_on_for_the_next_draft_if_that_pays_too() -> None:
    readiness, now_s = experienced()
    for _ in range(16):
        readiness.learn(1, SOURCES, 2.0, 0.5 * DELAY_S, 0.8)
    assert hold(readiness, now_s) is not None
    readiness.arrived(1, 2.0, now_s + DELAY_S)
    assert readiness.hold(now_s + DELAY_S) is not None
    readiness.arrived(1, 2.8, now_s + 1.5 * DELAY_S)
    assert readiness.hold(now_s + 1.5 * DELAY_S) is None


def test_a_first_draft_is_waited_for_if_only_those_after_it_pay() -> None:
    readiness, now_s = experienced(delay_s=0.023)
    assert hold(readiness, now_s) is None
    for _ in range(16):
        readiness.learn(1, SOURCES, 2.0, 0.002, 2.0)
    assert hold(readiness, now_s) is not None


def test_one_miss_ends_the_waiting_until_a_draft_comes_in_time() -> None:
    readiness, now_s = experienced()
    held = hold(readiness, now_s)
    assert held is not None
    assert readiness.hold(held.until_s) is None, "overdue: begun without it"
    now_s += STEP_S
    assert hold(readiness, now_s) is None, "not waited for again"
    # Too late: that proves nothing.
    readiness.learn(1, SOURCES, 1.0, 0.3, 1.0)
    assert hold(readiness, now_s) is None
    # In time, though nobody waited.
    readiness.learn(1, SOURCES, 1.0, DELAY_S, 1.0)
    assert hold(readiness, now_s) is not None


def test_a_miss_of_one_session_is_not_held_against_another() -> None:
    readiness, now_s = experienced()
    held = hold(readiness, now_s)
    assert held is not None
    assert readiness.hold(held.until_s) is None
    readiness.ready()
    readiness.watch(2, SOURCES, now_s)
    assert readiness.hold(now_s) is not None


def test_drafts_that_come_after_their_step_show_that_waiting_would_pay() -> None:
    readiness, now_s = Readiness(), 0.0
    for _ in range(16):
        now_s += STEP_S
        readiness.committed(1, 1, STEP_S)
        readiness.learn(1, SOURCES, 1.0, STEP_S + 0.003, 3.0)
    held = hold(readiness, now_s)
    assert held is not None
    assert held.until_s > now_s + STEP_S


def test_a_session_that_ended_is_forgotten() -> None:
    readiness, now_s = experienced()
    held = hold(readiness, now_s)
    assert held is not None
    assert readiness.hold(held.until_s) is None
    readiness.forget(1)
    assert not readiness.watched(1)
    # Its number may be used again.
    assert hold(readiness, now_s) is not None
